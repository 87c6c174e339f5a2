//! Matrices of weights, in the type they have in the file, and products with them.

use half::{bf16, f16};

use super::matmul::matmul;
use super::simd::InstructionSet;
use crate::loader::Numbers;

/// The weights of a linear map, (M outputs, K inputs), row-major, f32, f16 or bf16.
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Data,
}

enum Data {
    F32(Numbers<f32>),
    F16(Numbers<f16>),
    Bf16(Numbers<bf16>),
}

impl Matrix {
    pub(crate) fn from_f32(rows: usize, cols: usize, numbers: Numbers<f32>) -> Matrix {
        Matrix { rows, cols, data: Data::F32(numbers) }
    }

    pub(crate) fn from_f16(rows: usize, cols: usize, numbers: Numbers<f16>) -> Matrix {
        Matrix { rows, cols, data: Data::F16(numbers) }
    }

    pub(crate) fn from_bf16(rows: usize, cols: usize, numbers: Numbers<bf16>) -> Matrix {
        Matrix { rows, cols, data: Data::Bf16(numbers) }
    }

    /// Outputs M.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Writes row `index` (K numbers) to `out`.
    ///
    /// # Panics
    /// If there is no such row, or `out` has not K numbers.
    pub fn row(&self, index: usize, out: &mut [f32]) {
        assert!(index < self.rows && out.len() == self.cols, "row {index} of {} into {}", self.rows, out.len());
        let range = index * self.cols..(index + 1) * self.cols;
        match &self.data {
            Data::F32(numbers) => out.copy_from_slice(&numbers.as_slice()[range]),
            Data::F16(numbers) => widen(&numbers.as_slice()[range], out, f16::to_f32),
            Data::Bf16(numbers) => widen(&numbers.as_slice()[range], out, bf16::to_f32),
        }
    }

    /// y (T, M) = x (T, K) Wᵀ, for any T; overwrites y. Runs on the current thread pool.
    ///
    /// A row of y has the same bits whatever the other rows and the number of threads.
    ///
    /// # Panics
    /// If x and y do not have T rows both.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        let set = InstructionSet::current();
        match &self.data {
            Data::F32(numbers) => matmul(set, numbers.as_slice(), x, y, self.rows, self.cols),
            Data::F16(numbers) => matmul(set, numbers.as_slice(), x, y, self.rows, self.cols),
            Data::Bf16(numbers) => matmul(set, numbers.as_slice(), x, y, self.rows, self.cols),
        }
    }
}

fn widen<T: Copy>(from: &[T], to: &mut [f32], wide: impl Fn(T) -> f32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = wide(from);
    }
}

/// A linear map with a bias.
pub struct Linear {
    /// (M, K).
    pub weight: Matrix,
    /// (M,).
    pub bias: Vec<f32>,
}

impl Linear {
    /// y (T, M) = x (T, K) Wᵀ + bias; overwrites y.
    ///
    /// # Panics
    /// If x and y do not have T rows both, or `bias` has not M numbers.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        assert_eq!(self.bias.len(), self.weight.rows(), "a bias for each output");
        self.weight.apply(x, y);
        for row in y.chunks_exact_mut(self.bias.len().max(1)) {
            for (y, bias) in row.iter_mut().zip(&self.bias) {
                *y += bias;
            }
        }
    }
}
