//! Products, norms and elementwise functions on row-major f32 slices.
//!
//! Letters: T rows (tokens), K inputs, M outputs.

mod elementary;
pub(crate) mod gemm;
mod lanes;
pub(crate) mod math;
mod matmul;
mod matrix;
pub(crate) mod norm;
mod simd;

pub use matrix::{Linear, Matrix};
pub(crate) use simd::check_instruction_set;
pub use simd::instruction_set;
