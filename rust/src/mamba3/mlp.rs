//! The gated MLP behind a layer: fc2(a silu(g)), a and g the two halves of fc1(x).
//!
//! Source: SwiGLU (Shazeer 2020, arXiv 2002.05202), as the official Mamba-3 language models have it. M hidden width.

use rayon::prelude::*;

use super::layer::ROWS_PER_TASK;
use crate::config::{BackboneConfig, NORM_EPS};
use crate::error::LoadError;
use crate::linalg::{Matrix, math, norm};
use crate::loader::Fields;

/// One layer's MLP, with the norm before it.
pub(super) struct GatedMlp {
    norm: Vec<f32>,
    /// (2 M, D): a, then g.
    fc1: Matrix,
    /// (D, M).
    fc2: Matrix,
}

impl GatedMlp {
    /// Reads the MLP behind layer `index`.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(super) fn from_fields(
        fields: &mut Fields<'_>,
        index: usize,
        config: &BackboneConfig,
    ) -> Result<GatedMlp, LoadError> {
        let (width, hidden) = (config.d_model(), config.mlp_width());
        Ok(GatedMlp {
            norm: fields.vector(&format!("mlp_norms.{index}.weight"), &[width])?,
            fc1: fields.matrix(&format!("mlps.{index}.fc1.weight"), 2 * hidden, width)?,
            fc2: fields.matrix(&format!("mlps.{index}.fc2.weight"), width, hidden)?,
        })
    }

    /// What the MLP adds to the residual stream x (T, D), into y (T, D). `buffer` grows to what is needed and may be used
    /// again.
    pub(super) fn forward(&self, x: &[f32], y: &mut [f32], buffer: &mut Vec<f32>) {
        let hidden = self.fc2.cols();
        let tokens = x.len() / self.norm.len().max(1);
        norm::rms_norm(x, &self.norm, NORM_EPS, y);
        buffer.resize(tokens * 3 * hidden, 0.0);
        let (both, gated) = buffer.split_at_mut(tokens * 2 * hidden);
        self.fc1.apply(y, both);
        (gated.par_chunks_exact_mut(hidden))
            .zip(both.par_chunks_exact(2 * hidden))
            .with_min_len(ROWS_PER_TASK)
            .for_each(|(out, row)| {
                let (a, g) = row.split_at(hidden);
                out.copy_from_slice(a);
                math::silu_gate(out, g);
            });
        self.fc2.apply(gated, y);
    }
}
