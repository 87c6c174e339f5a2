//! The X-Encoder at the width of ViT-L, two of its layers: one image, a larger one, a clip.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Random, TinyModel};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kore_vljepa::loader::Weights;
use kore_vljepa::vit::{PixelShape, VisionEncoder};
use serde_json::json;

fn encode(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vision");
    group.sample_size(10);
    for dtype in ["float32", "bfloat16"] {
        let vision = json!({
            "hidden_size": 1024, "depth": 2, "heads": 16, "mlp_ratio": 4.0, "image_size": 256, "patch_size": 16,
            "tubelet_size": 2, "frames": 64, "pretrained": false
        });
        let file = TinyModel::new().set("/vision", vision).dtype(dtype).component("x_encoder");
        let weights = Weights::from_bytes("x_encoder.safetensors", &file).expect("a whole file");
        let encoder = VisionEncoder::from_weights(&weights).expect("valid weights");
        for (name, numbers, shape) in [
            ("image 256", 3 * 256 * 256, PixelShape::Image { height: 256, width: 256 }),
            ("image 512", 3 * 512 * 512, PixelShape::Image { height: 512, width: 512 }),
            ("clip of 8", 8 * 3 * 256 * 256, PixelShape::Clip { frames: 8, height: 256, width: 256 }),
        ] {
            let pixels = Random::new(1).normals(numbers);
            group.throughput(Throughput::Elements(1));
            group.bench_function(format!("{name}, {dtype}"), |bencher| {
                bencher.iter(|| encoder.encode(&pixels, shape).expect("a valid input"));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, encode);
criterion_main!(benches);
