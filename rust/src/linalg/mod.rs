//! Products, norms and elementwise functions on row-major f32 slices.
//!
//! Letters: T rows (tokens), K inputs, M outputs.

mod elementary;
pub(crate) mod gemm;
pub(crate) mod lanes;
pub(crate) mod math;
mod matmul;
mod matrix;
pub(crate) mod norm;
pub(crate) mod simd;

pub use matrix::{Linear, Matrix};
pub use simd::instruction_set;
