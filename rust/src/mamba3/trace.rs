//! What happens inside a layer and between the layers, made visible for comparison with golden files. N stands in the order
//! of the weights here.

use super::buffers::StepBuffers;
use super::layer::Mamba3Layer;
use super::state::LayerState;
use super::step::HeadScratch;
use super::{BackboneState, LayerHook, Mamba3Backbone};
use crate::config::NORM_EPS;
use crate::linalg::norm;

/// Tensors by name, row-major.
pub(crate) type Traced = Vec<(String, Vec<f32>)>;

/// The residual stream before each layer's norm and after each layer, and what each layer and MLP added, in a pass or a step.
pub(crate) struct Recorder<'a> {
    /// Called first.
    pub(crate) inner: &'a mut dyn LayerHook,
    pub(crate) inputs: Vec<Vec<f32>>,
    pub(crate) mixed: Vec<Vec<f32>>,
    pub(crate) of_mlps: Vec<Vec<f32>>,
    pub(crate) outputs: Vec<Vec<f32>>,
}

impl<'a> Recorder<'a> {
    pub(crate) fn new(inner: &'a mut dyn LayerHook) -> Recorder<'a> {
        Recorder { inner, inputs: Vec::new(), mixed: Vec::new(), of_mlps: Vec::new(), outputs: Vec::new() }
    }
}

impl LayerHook for Recorder<'_> {
    fn before_layer(&mut self, layer: usize, x: &mut [f32]) {
        self.inner.before_layer(layer, x);
        self.inputs.push(x.to_vec());
    }

    fn after_mixer(&mut self, layer: usize, y: &[f32]) {
        self.inner.after_mixer(layer, y);
        self.mixed.push(y.to_vec());
    }

    fn after_mlp(&mut self, layer: usize, y: &[f32]) {
        self.inner.after_mlp(layer, y);
        self.of_mlps.push(y.to_vec());
    }

    fn after_layer(&mut self, layer: usize, x: &[f32]) {
        self.inner.after_layer(layer, x);
        self.outputs.push(x.to_vec());
    }
}

impl Mamba3Backbone {
    /// Layer 0 on the first tokens of a residual stream (T, D), one at a time from the zero state, with everything that the
    /// recurrence makes: `u` (T, D), `in_proj.*`, `dt`, `alpha`, `lambda` (T, H), `state.*` after each token, `Q`
    /// (T, R, H, N), `y` (T, R, H, P), `out` (T, D).
    pub(crate) fn trace_layer0(&self, stream: &[f32]) -> Traced {
        let (Some(layer), Some(weight)) = (self.layers.first(), self.norms.first()) else { return Traced::new() };
        let mut u = vec![0.0; stream.len()];
        norm::rms_norm(stream, weight, NORM_EPS, &mut u);
        layer.trace(&u, BackboneState::new(&self.config).layers.remove(0))
    }

    /// A sequence (L, D) one token at a time from the zero state, without gates: `layers.{i}` (L, D), the residual stream
    /// after the layer, and `hidden` (L, D).
    pub(crate) fn trace_steps(&self, x: &[f32]) -> Traced {
        let mut state = [BackboneState::new(&self.config)];
        let mut buffers = StepBuffers::new(&self.config.layer, 1);
        let mut hidden = x.to_vec();
        let mut layers = vec![Vec::new(); self.layers.len()];
        for x in hidden.chunks_exact_mut(self.config.d_model()) {
            let mut empty = ();
            let mut recorder = Recorder::new(&mut empty);
            self.step(x, &mut state, &mut buffers, &mut recorder);
            for (layer, output) in layers.iter_mut().zip(recorder.outputs) {
                layer.extend(output);
            }
        }
        let layers = layers.into_iter().enumerate().map(|(i, rows)| (format!("layers.{i}"), rows));
        layers.chain([("hidden".to_owned(), hidden)]).collect()
    }

    /// The state of each layer: `{i}.theta` (H, S), `{i}.h` (H, P, N), `{i}.k` (R, H, N), `{i}.v` (H, P).
    pub(crate) fn trace_state(&self, state: &BackboneState) -> Traced {
        let layers = self.layers.iter().zip(&state.layers).enumerate();
        layers
            .flat_map(|(i, (layer, state))| layer.named(state).map(|(name, numbers)| (format!("{i}.{name}"), numbers)))
            .collect()
    }
}

impl Mamba3Layer {
    fn trace(&self, u: &[f32], mut state: LayerState) -> Traced {
        let (config, columns) = (&self.config, &self.columns);
        let mut buffers = StepBuffers::new(config, u.len() / config.d_model);
        let (rows, spares) = (&mut buffers.projected, &mut buffers.spares);
        self.in_proj.apply(u, rows);
        let mut traced = Tracer::default();
        traced.add("u", u.iter().copied());
        for row in rows.chunks_exact(columns.width) {
            for (name, range) in [
                ("z", &columns.z),
                ("x", &columns.x),
                ("B", &columns.b),
                ("C", &columns.c),
                ("dd_dt", &columns.dt),
                ("dd_A", &columns.a),
                ("trap", &columns.trap),
                ("angle", &columns.angle),
            ] {
                traced.add(&format!("in_proj.{name}"), row[range.clone()].iter().copied());
            }
        }
        self.prepare(rows, spares);
        let mut scratch = HeadScratch::new(config);
        for row in rows.chunks_exact(columns.width) {
            let (mut q, mut y, mut outputs) = (Vec::new(), Vec::new(), vec![0.0; config.d_inner()]);
            let heads = state.heads(config).zip(outputs.chunks_exact_mut(config.headdim)).enumerate();
            for (index, (mut state, out)) in heads {
                self.step_head(index, row, &mut state, &mut scratch);
                q.extend(self.order.undone(&scratch.q));
                y.extend_from_slice(&scratch.y);
                self.gate_head(index, row, &mut scratch, out);
            }
            let mut out = vec![0.0; config.d_model];
            self.out_proj.apply(&outputs, &mut out);
            traced.add("dt", row[columns.dt.clone()].iter().copied());
            traced.add("alpha", row[columns.a.clone()].iter().map(|a| a.exp()));
            traced.add("lambda", row[columns.trap.clone()].iter().copied());
            for (name, numbers) in self.named(&state) {
                traced.add(&format!("state.{name}"), numbers);
            }
            traced.add("Q", self.ranks_first(&q));
            traced.add("y", self.ranks_first(&y));
            traced.add("out", out);
        }
        traced.0
    }

    fn named(&self, state: &LayerState) -> [(&'static str, Vec<f32>); 4] {
        [
            ("theta", state.theta.clone()),
            ("h", self.order.undone(&state.h)),
            ("k", self.ranks_first(&self.order.undone(&state.k))),
            ("v", state.v.clone()),
        ]
    }

    /// (H, R, X) to (R, H, X).
    fn ranks_first(&self, numbers: &[f32]) -> Vec<f32> {
        let (heads, ranks) = (self.config.nheads(), self.config.rank());
        let size = numbers.len() / (heads * ranks);
        let part = |head: usize, rank: usize| &numbers[(head * ranks + rank) * size..][..size];
        (0..ranks).flat_map(|rank| (0..heads).flat_map(move |head| part(head, rank).iter().copied())).collect()
    }
}

/// Collects rows by name, in the order in which the names first come.
#[derive(Default)]
struct Tracer(Traced);

impl Tracer {
    fn add(&mut self, name: &str, row: impl IntoIterator<Item = f32>) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, rows)) => rows.extend(row),
            None => self.0.push((name.to_owned(), row.into_iter().collect())),
        }
    }
}
