//! Products at the sizes of the `small` model: one token (bound by memory, so in bytes of weights per second), a few, and
//! all tokens of an image (in multiply-adds per second). `KORE_VLJEPA_SIMD` chooses the instruction set.

#[path = "../tests/common/mod.rs"]
mod common;

use common::Random;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use kore_vljepa::linalg::{Matrix, instruction_set};
use kore_vljepa::loader::Weights;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const TYPES: [(&str, Dtype); 3] = [("f32", Dtype::F32), ("bf16", Dtype::BF16), ("f16", Dtype::F16)];

/// A random matrix (M, K), by way of a file in memory.
fn matrix(rows: usize, cols: usize, dtype: Dtype) -> Matrix {
    let numbers = Random::new(1).normals(rows * cols);
    let bytes: Vec<u8> = match dtype {
        Dtype::BF16 => numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let view = TensorView::new(dtype, vec![rows, cols], &bytes).expect("as many bytes as the shape says");
    let file = safetensors::serialize([("weight", view)], None).expect("a valid file");
    Weights::from_bytes("in memory", &file).and_then(|weights| weights.to_matrix("weight")).expect("a whole file")
}

fn products(criterion: &mut Criterion) {
    for (tokens, cols, rows) in [
        (1, 1024, 4480),
        (1, 512, 32_000),
        (4, 1024, 4480),
        (16, 1024, 4480),
        (272, 1024, 4480),
        (272, 2048, 1024),
        (256, 1024, 4096),
        (256, 4096, 1024),
    ] {
        let mut group =
            criterion.benchmark_group(format!("{tokens} x {cols} by {cols} x {rows}, {}", instruction_set()));
        group.sample_size(20);
        let x = Random::new(2).normals(tokens * cols);
        let mut y = vec![0.0; tokens * rows];
        for (name, dtype) in TYPES {
            let weights = matrix(rows, cols, dtype);
            let count = if tokens == 1 { dtype.bitsize() / 8 } else { tokens } * rows * cols;
            group.throughput(match tokens {
                1 => Throughput::Bytes(count as u64),
                _ => Throughput::Elements(count as u64),
            });
            group.bench_function(name, |bencher| bencher.iter(|| weights.apply(&x, &mut y)));
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
