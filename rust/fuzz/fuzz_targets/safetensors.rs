//! Any bytes as a safetensors file, and as every component that may be read from one; or an exported component, damaged.

#![no_main]

mod common;

use std::sync::LazyLock;

use common::{TinyModel, damaged};
use kore_vljepa::angn::AdaptiveNeuralGate;
use kore_vljepa::loader::Weights;
use kore_vljepa::predictor::Mamba3Predictor;
use kore_vljepa::recursion::Recursion;
use kore_vljepa::vit::VisionEncoder;
use kore_vljepa::y_decoder::Mamba3Decoder;
use kore_vljepa::y_encoder::Mamba3TextEncoder;
use libfuzzer_sys::fuzz_target;

const COMPONENTS: [&str; 6] = ["predictor", "y_encoder", "angn", "y_decoder", "recursion", "x_encoder"];

static WHOLE: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let model = TinyModel::new();
    COMPONENTS.iter().map(|component| model.component(component)).collect()
});

fuzz_target!(|bytes: &[u8]| {
    let content = match bytes {
        [choice, cut, changes @ ..] if usize::from(*choice) < WHOLE.len() => {
            damaged(&WHOLE[usize::from(*choice)], *cut, changes)
        }
        other => other.to_vec(),
    };
    let Ok(weights) = Weights::from_bytes("fuzz.safetensors", &content) else { return };
    for key in weights.tensors().keys() {
        let _ = weights.to_f32(key);
        let _ = weights.to_i64(key);
        let _ = weights.to_u8(key);
    }
    let _ = Mamba3Predictor::from_weights(&weights);
    let _ = Mamba3TextEncoder::from_weights(&weights);
    let _ = Mamba3Decoder::from_weights(&weights);
    let _ = AdaptiveNeuralGate::from_weights(&weights);
    let _ = Recursion::from_weights(&weights);
    let _ = VisionEncoder::from_weights(&weights);
});
