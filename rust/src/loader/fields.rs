//! Reading one component out of a file: every tensor the configuration asks for, and no other.

use std::collections::BTreeSet;

use safetensors::Dtype;

use super::{TensorInfo, Weights};
use crate::config::Mamba3JepaConfig;
use crate::error::LoadError;
use crate::linalg::{Linear, Matrix};

/// The tensors of one component, taken one by one; [`Fields::finish`] demands that none is left.
pub(crate) struct Fields<'a> {
    weights: &'a Weights,
    component: &'static str,
    /// Type of the matrices; vectors are F32 always.
    matrix_type: Dtype,
    taken: BTreeSet<String>,
}

impl<'a> Fields<'a> {
    /// Opens an exported component, and its configuration.
    ///
    /// # Errors
    /// [`LoadError::Mismatch`] if the file holds another component, or has an unknown type or phase.
    pub(crate) fn open(
        weights: &'a Weights,
        component: &'static str,
    ) -> Result<(Fields<'a>, Mamba3JepaConfig), LoadError> {
        let config = weights.config()?;
        let mismatch = |reason: String| LoadError::Mismatch { path: weights.path().to_path_buf(), reason };
        let found = weights.metadata().get("component").map_or("nothing", String::as_str);
        if found != component {
            return Err(mismatch(format!("it holds {found:?}, not {component:?}")));
        }
        let phase = weights.metadata().get("phase").map_or("none", String::as_str);
        if !["1", "2", "3"].contains(&phase) {
            return Err(mismatch(format!("phase {phase:?}: expected 1, 2 or 3")));
        }
        let matrix_type = match weights.metadata().get("dtype").map_or("none", String::as_str) {
            "float32" => Dtype::F32,
            "float16" => Dtype::F16,
            "bfloat16" => Dtype::BF16,
            other => return Err(mismatch(format!("dtype {other:?}: expected float32, float16 or bfloat16"))),
        };
        Ok((Fields { weights, component, matrix_type, taken: BTreeSet::new() }, config))
    }

    /// `{component}.{name}` with `rows` outputs of `cols` inputs each.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(crate) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        self.shaped_matrix(name, &[rows, cols], rows, cols)
    }

    /// A tensor of any `shape` with `rows * cols` numbers, read as a matrix: the kernel of a convolution.
    ///
    /// # Errors
    /// As for [`Fields::matrix`].
    pub(crate) fn shaped_matrix(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, LoadError> {
        let (key, info) = self.take(name, shape, self.matrix_type)?;
        self.weights
            .matrix(info, rows, cols)
            .ok_or_else(|| self.weights.wrong_type(&key, "F32, F16 or BF16", info.dtype))
    }

    /// A matrix and its bias: `{name}.weight` and `{name}.bias`.
    ///
    /// # Errors
    /// As for [`Fields::matrix`].
    pub(crate) fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Linear, LoadError> {
        let weight = self.matrix(&format!("{name}.weight"), outputs, inputs)?;
        let bias = self.vector(&format!("{name}.bias"), &[outputs])?;
        Ok(Linear { weight, bias })
    }

    /// A small F32 tensor of the given shape, copied, row-major.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(crate) fn vector(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let (key, _) = self.take(name, shape, Dtype::F32)?;
        self.weights.to_f32(&key)
    }

    /// A single F32 number; `expected` says what `is_right` demands of it.
    ///
    /// # Errors
    /// As for [`Fields::vector`]; [`LoadError::Damaged`] for another number.
    pub(crate) fn scalar(
        &mut self,
        name: &str,
        expected: &str,
        is_right: impl FnOnce(f32) -> bool,
    ) -> Result<f32, LoadError> {
        let number = self.vector(name, &[])?[0];
        if is_right(number) {
            return Ok(number);
        }
        let reason = format!("{}.{name}: {number}, expected {expected}", self.component);
        Err(LoadError::Damaged { path: self.weights.path().to_path_buf(), reason })
    }

    /// Whether the file's format version is at least `version`.
    pub(crate) fn version_at_least(&self, version: u32) -> bool {
        let found = self.weights.metadata().get("format_version").and_then(|text| text.parse::<u32>().ok());
        found.is_some_and(|found| found >= version)
    }

    /// Demands that every tensor of the file was taken.
    ///
    /// # Errors
    /// [`LoadError::UnknownKey`] for what is left.
    pub(crate) fn finish(self) -> Result<(), LoadError> {
        let mut left = self.weights.tensors().keys().filter(|&key| !self.taken.contains(key));
        match left.next() {
            None => Ok(()),
            Some(key) => Err(LoadError::UnknownKey {
                path: self.weights.path().to_path_buf(),
                key: key.clone(),
                more: left.count(),
            }),
        }
    }

    fn take(&mut self, name: &str, shape: &[usize], dtype: Dtype) -> Result<(String, &'a TensorInfo), LoadError> {
        let weights = self.weights;
        let key = format!("{}.{name}", self.component);
        let info = weights.tensors().get(&key).ok_or_else(|| weights.missing(&key))?;
        if info.shape != shape {
            return Err(LoadError::Shape {
                path: weights.path().to_path_buf(),
                key,
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        if info.dtype != dtype {
            return Err(weights.wrong_type(&key, &format!("{dtype:?}"), info.dtype));
        }
        self.taken.insert(key.clone());
        Ok((key, info))
    }
}
