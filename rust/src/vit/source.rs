//! Where the encoder's tensors come from, under the names that `transformers` gives them.

use crate::error::LoadError;
use crate::linalg::{Linear, Matrix};
use crate::loader::Fields;

/// Tensors by name, of a given shape.
pub(super) trait Source {
    /// A tensor of `shape` with `rows * cols` numbers, as a matrix.
    ///
    /// # Errors
    /// [`LoadError`] if it is missing, or of another shape or type.
    fn matrix(&mut self, name: &str, shape: &[usize], rows: usize, cols: usize) -> Result<Matrix, LoadError>;

    /// A small tensor of `shape`, row-major.
    ///
    /// # Errors
    /// As for `matrix`.
    fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError>;

    /// `len` numbers.
    ///
    /// # Errors
    /// As for `matrix`.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, LoadError> {
        self.numbers(name, &[len])
    }

    /// `{name}.weight` (outputs, inputs) and `{name}.bias` (outputs).
    ///
    /// # Errors
    /// As for `matrix`.
    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, LoadError> {
        let weight = self.matrix(&format!("{name}.weight"), &[outputs, inputs], outputs, inputs)?;
        let bias = self.vector(&format!("{name}.bias"), outputs)?;
        Ok(Linear { weight, bias })
    }
}

/// An exported `x_encoder.safetensors`.
impl Source for Fields<'_> {
    fn matrix(&mut self, name: &str, shape: &[usize], rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        self.shaped_matrix(name, shape, rows, cols)
    }

    fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        self.vector(name, shape)
    }
}
