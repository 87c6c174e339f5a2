//! Products, norms and elementwise functions on row-major f32 slices.
//!
//! Letters: T rows (tokens), K inputs, M outputs.

pub(crate) mod gemm;
pub(crate) mod math;
mod matrix;
pub(crate) mod norm;

pub use matrix::{Linear, Matrix};
