//! The encoder against the reference, and the files it is read from.

mod files;
mod values;

use std::collections::BTreeMap;

use serde_json::json;

use super::{PixelShape, VisionEncoder};
use crate::config::{VisionConfig, VisionKind};
use crate::loader::Weights;
use crate::testing::{Random, TinyModel};

/// Hidden size, heads, depth, patch, tubelet; the perceptron is 2.5 times as wide as the rest.
fn config(hidden_size: usize, heads: usize, depth: usize, patch_size: usize, tubelet_size: usize) -> VisionConfig {
    VisionConfig {
        kind: VisionKind::Vjepa2,
        hidden_size,
        depth,
        heads,
        mlp_ratio: 2.5,
        image_size: 4 * patch_size,
        patch_size,
        tubelet_size,
        frames: 4 * tubelet_size,
        pretrained: true,
    }
}

/// The same of V-JEPA 2.1.
fn config_21(hidden_size: usize, heads: usize, depth: usize, patch_size: usize, tubelet_size: usize) -> VisionConfig {
    VisionConfig { kind: VisionKind::Vjepa21, ..config(hidden_size, heads, depth, patch_size, tubelet_size) }
}

/// An export with such an X-Encoder.
fn model(config: &VisionConfig) -> TinyModel {
    TinyModel::new().set("/vision", json!(config))
}

fn exported(model: &TinyModel) -> Weights {
    Weights::from_bytes("x_encoder.safetensors", &model.component("x_encoder")).expect("a whole file")
}

fn encoder(config: &VisionConfig) -> VisionEncoder {
    VisionEncoder::from_weights(&exported(&model(config))).expect("valid weights")
}

/// Shapes and numbers by `transformers`' names.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn tensors(model: &TinyModel) -> Tensors {
    let weights = exported(model);
    let name = |key: &str| key.strip_prefix("x_encoder.").expect("a key of the component").to_owned();
    let read = |key: &str| weights.to_f32(key).expect("numbers");
    weights.tensors().iter().map(|(key, info)| (name(key), (info.shape.clone(), read(key)))).collect()
}

fn pixels(shape: PixelShape) -> Vec<f32> {
    Random::new(3).normals(match shape {
        PixelShape::Image { height, width } => 3 * height * width,
        PixelShape::Clip { frames, height, width } => 3 * frames * height * width,
    })
}

fn image(height: usize, width: usize) -> PixelShape {
    PixelShape::Image { height, width }
}

fn clip(frames: usize, height: usize, width: usize) -> PixelShape {
    PixelShape::Clip { frames, height, width }
}
