//! The layer against the numbers of the reference implementation, and its three forms against each other.

use std::path::Path;

use serde_json::Value;

use super::buffers::{PassBuffers, StepBuffers};
use super::layer::Mamba3Layer;
use super::sequential::Reference;
use super::state::LayerState;
use super::*;
use crate::config::{BackboneConfig, Mamba3Config};
use crate::loader::{Fields, Weights};
use crate::testing::{Random, TinyModel};

/// The first layer of a model's Y-Encoder.
struct Layer {
    config: BackboneConfig,
    layer: Mamba3Layer,
    backbone: Mamba3Backbone,
    reference: Reference,
}

impl Layer {
    fn new(bytes: &[u8]) -> Layer {
        let weights = Weights::from_bytes("y_encoder.safetensors", bytes).unwrap();
        let (mut fields, config) = Fields::open(&weights, "y_encoder").unwrap();
        let config = config.y_encoder;
        Layer {
            layer: Mamba3Layer::from_fields(&mut fields, "layers.0", &config.layer).unwrap(),
            backbone: Mamba3Backbone::from_fields(&mut fields, &config).unwrap(),
            reference: Reference::new(&config.layer, &weights, "y_encoder.layers.0."),
            config,
        }
    }

    /// Steps so large that decays and angles matter within a chunk.
    fn strong(model: &TinyModel) -> Layer {
        Layer::new(&model.component_with("y_encoder", |key, numbers| {
            if key.ends_with("dt_bias") {
                numbers.iter_mut().for_each(|x| *x += 4.0);
            }
        }))
    }

    fn layer_config(&self) -> &Mamba3Config {
        &self.config.layer
    }

    fn input(&self, length: usize, seed: u64) -> Vec<f32> {
        Random::new(seed).normals(length * self.config.d_model())
    }

    fn state(&self) -> LayerState {
        BackboneState::new(&self.config).layers.remove(0)
    }

    fn chunked(&self, u: &[f32], state: Option<&mut LayerState>) -> Vec<f32> {
        let (mut u, lengths) = (u.to_vec(), [u.len() / self.config.d_model()]);
        let mut buffers = PassBuffers::new(self.layer_config(), &lengths);
        self.layer.forward(&mut u, &lengths, state.map(std::iter::once), &mut buffers);
        u
    }

    fn stepped(&self, u: &[f32], state: &mut LayerState) -> Vec<f32> {
        let mut u = u.to_vec();
        let mut buffers = StepBuffers::new(self.layer_config(), 1);
        for u in u.chunks_exact_mut(self.config.d_model()) {
            self.layer.step(u, std::iter::once(&mut *state), &mut buffers);
        }
        u
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Length of the difference over length of what is expected.
fn relative(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found.iter().zip(expected).map(|(&a, b)| (f64::from(a) - b).powi(2)).sum();
    let length: f64 = expected.iter().map(|x| x * x).sum();
    difference.sqrt() / length.sqrt().max(1e-6)
}

fn assert_close(found: &[f32], expected: &[f64], bound: f64, what: &str) {
    let error = relative(found, expected);
    assert!(error < bound, "{what}: off by {error:.2e}");
}

fn assert_states_close(layer: &Mamba3Layer, a: &LayerState, b: &LayerState, what: &str) {
    assert_close(&a.h, &wide(&b.h), 3e-6, &format!("{what}: h"));
    assert_close(&a.k, &wide(&b.k), 3e-6, &format!("{what}: K"));
    assert_close(&a.v, &wide(&b.v), 3e-6, &format!("{what}: V"));
    assert_eq!(a.theta, b.theta, "{what}: the same sums in the same order");
    assert_eq!(a.theta.len(), layer.config.nheads() * layer.config.n_angles());
}

#[test]
fn all_forms_match_the_reference_implementation() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../training/tests/fixtures");
    let names = ["siso", "siso_full_rope_groups", "siso_outnorm", "mimo", "mimo_outnorm"];
    for name in names {
        let fixture = crate::loader::load_safetensors(folder.join(format!("mamba3_{name}.safetensors"))).unwrap();
        let given: Value = serde_json::from_str(&fixture.metadata()["config"]).unwrap();
        let mut model = TinyModel::new().set("/y_encoder/n_layers", 1);
        for (key, value) in given.as_object().unwrap() {
            model.config["y_encoder"]["layer"][key] = value.clone();
        }
        let layer = Layer::new(&model.component_with("y_encoder", |key, numbers| {
            if let Some(name) = key.strip_prefix("y_encoder.layers.0.") {
                *numbers = fixture.to_f32(&format!("param.{name}")).unwrap();
            }
        }));
        let (input, output) = (fixture.to_f32("input").unwrap(), wide(&fixture.to_f32("output").unwrap()));
        let row = fixture.tensors()["input"].shape[1..].iter().product();
        for (input, output) in input.chunks_exact(row).zip(output.chunks_exact(row)) {
            let bound = 1e-5;
            assert_close(&layer.chunked(input, None), output, bound, &format!("{name}: chunked"));
            assert_close(&layer.stepped(input, &mut layer.state()), output, bound, &format!("{name}: step"));
            let plain: Vec<f32> = layer.reference.run(input).0.iter().map(|&x| x as f32).collect();
            assert_close(&plain, output, bound, &format!("{name}: sequential"));
        }
    }
}

#[test]
fn chunked_equals_sequential_equals_step() {
    for (name, model) in TinyModel::variants() {
        let layer = Layer::strong(&model);
        for length in [0, 1, 2, 63, 64, 65, 130] {
            let what = format!("{name}, {length} tokens");
            let u = layer.input(length, 1);
            let (expected, end) = layer.reference.run(&u);
            let (mut chunked, mut stepped) = (layer.state(), layer.state());
            assert_close(&layer.chunked(&u, Some(&mut chunked)), &expected, 3e-6, &format!("{what}: chunked"));
            assert_close(&layer.chunked(&u, None), &expected, 3e-6, &format!("{what}: chunked without state"));
            assert_close(&layer.stepped(&u, &mut stepped), &expected, 3e-6, &format!("{what}: step"));
            assert_states_close(&layer.layer, &chunked, &stepped, &what);

            let order = &layer.layer.order;
            assert_close(&order.undone(&chunked.h), &end.h, 1e-5, &format!("{what}: h"));
            assert_close(&order.undone(&chunked.k), &end.k, 1e-5, &format!("{what}: K"));
            for (found, expected) in chunked.theta.iter().zip(&end.theta) {
                let off = ((f64::from(*found) - expected) / 2.0).sin().abs();
                assert!(off < 2e-5, "{what}: an angle is off by {off:.1e}");
            }
        }
    }
}

#[test]
fn a_cut_sequence_continues() {
    for (name, model) in TinyModel::variants() {
        let layer = Layer::strong(&model);
        let u = layer.input(97, 2);
        let mut whole_state = layer.state();
        let whole = wide(&layer.chunked(&u, Some(&mut whole_state)));
        for cut in [0, 1, 2, 31, 64, 65, 96, 97] {
            let what = format!("{name}, cut at {cut}");
            let (first, second) = u.split_at(cut * layer.config.d_model());
            let mut state = layer.state();
            let mut out = layer.chunked(first, Some(&mut state));
            let mut stepped = state.clone();
            out.extend(layer.chunked(second, Some(&mut state)));
            assert_close(&out, &whole, 3e-6, &what);
            assert_states_close(&layer.layer, &state, &whole_state, &what);
            layer.stepped(second, &mut stepped);
            assert_states_close(&layer.layer, &stepped, &whole_state, &format!("{what}, stepped"));
        }
    }
}

#[test]
fn packed_sequences_are_as_alone() {
    for (name, model) in TinyModel::variants() {
        let layer = Layer::strong(&model);
        let lengths = [3, 0, 70, 1, 16];
        let sequences: Vec<Vec<f32>> = lengths.iter().zip(5..).map(|(&n, seed)| layer.input(n, seed)).collect();
        let mut packed = sequences.concat();
        let mut states = vec![BackboneState::new(&layer.config); lengths.len()];
        layer.backbone.forward(&mut packed, &lengths, Some(&mut states), &mut ());
        let mut rest = &packed[..];
        for ((mut alone, length), state) in sequences.into_iter().zip(lengths).zip(&states) {
            let mut own = [BackboneState::new(&layer.config)];
            layer.backbone.forward(&mut alone, &[length], Some(&mut own), &mut ());
            let (part, others) = rest.split_at(alone.len());
            rest = others;
            assert_close(part, &wide(&alone), 3e-6, name);
            for (layers, own) in state.layers.iter().zip(&own[0].layers) {
                assert_close(&layers.h, &wide(&own.h), 3e-6, name);
            }
        }
    }
}

#[test]
fn a_batch_of_steps_is_as_alone() {
    for (name, model) in TinyModel::variants() {
        let layer = Layer::strong(&model);
        let mut states = vec![BackboneState::new(&layer.config); 3];
        let mut alone = states.clone();
        let mut buffers = StepBuffers::new(layer.layer_config(), 3);
        let mut own_buffers = StepBuffers::new(layer.layer_config(), 1);
        for t in 0..5 {
            let x = layer.input(3, 40 + t);
            let mut together = x.clone();
            layer.backbone.step(&mut together, &mut states, &mut buffers, &mut ());
            let width = layer.config.d_model();
            for (i, state) in alone.iter_mut().enumerate() {
                let mut x = x[i * width..(i + 1) * width].to_vec();
                layer.backbone.step(&mut x, std::slice::from_mut(state), &mut own_buffers, &mut ());
                assert_close(&together[i * width..(i + 1) * width], &wide(&x), 3e-6, name);
            }
        }
    }
}

#[test]
fn a_state_does_not_grow() {
    let layer = Layer::strong(&TinyModel::new());
    let size = |state: &BackboneState| {
        let layers = state.layers.iter();
        layers.map(|x| x.theta.len() + x.h.len() + x.k.len() + x.v.len()).sum::<usize>()
    };
    let mut states = [BackboneState::new(&layer.config)];
    let before = size(&states[0]);
    layer.backbone.forward(&mut layer.input(90, 3), &[90], Some(&mut states), &mut ());
    assert_eq!(size(&states[0]), before);
    assert!(states[0].layers.iter().all(|layer| layer.h.iter().any(|&x| x != 0.0)));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for (name, model) in TinyModel::variants() {
        let layer = Layer::strong(&model);
        let u = layer.input(133, 4);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut state = layer.state();
            let out = pool.install(|| layer.chunked(&u, Some(&mut state)));
            let more = pool.install(|| layer.stepped(&u[..10 * layer.config.d_model()], &mut state));
            (out, more, state.h)
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{name}");
    }
}

#[test]
fn extreme_inputs_stay_finite() {
    for (name, model) in TinyModel::variants() {
        // steps that forget everything and turn many times; steps of nothing; enormous and vanishing inputs
        for (dt_bias, scale) in [(100.0, 1.0), (1e5, 1.0), (1e9, 1e-3), (-200.0, 1.0), (0.0, 1e8), (0.0, 1e-30)] {
            let layer = Layer::new(&model.component_with("y_encoder", |key, numbers| {
                if key.ends_with("dt_bias") {
                    numbers.fill(dt_bias);
                }
            }));
            let u: Vec<f32> = layer.input(70, 6).iter().map(|x| x * scale).collect();
            let what = format!("{name}, dt_bias {dt_bias}, input times {scale}");
            let chunked = layer.chunked(&u, None);
            assert!(chunked.iter().all(|x| x.is_finite()), "{what}: chunked");
            let stepped = layer.stepped(&u, &mut layer.state());
            assert!(stepped.iter().all(|x| x.is_finite()), "{what}: step");
            if scale <= 1.0 && dt_bias < 1e9 {
                assert_close(&chunked, &wide(&stepped), 1e-5, &what);
            }
        }
    }
}

#[test]
fn a_token_that_forgets_everything_leaves_the_others_precise() {
    let model = TinyModel::new();
    let layer = Layer::new(&model.component("y_encoder"));
    let mut u = layer.input(40, 7);
    let width = layer.config.d_model();
    for x in &mut u[20 * width..21 * width] {
        *x *= 1e5;
    }
    let (expected, _) = layer.reference.run(&u);
    let found = layer.chunked(&u, None);
    for (t, (found, expected)) in found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        assert_close(found, expected, 1e-4, &format!("token {t}"));
    }
}
