//! The configuration of Mamba-3 layers and stacks of them.

use serde::{Deserialize, Serialize};

use super::{MAX_LAYERS, count, counts, is_default};

/// How the decay rate is made from its projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AActivation {
    /// 1 + v for v >= 0, 1 / (1 - v) below.
    HeavyTail,
    /// ln(1 + e^v), as mamba-ssm had it up to version 2.3.2.
    Softplus,
}

/// One Mamba-3 layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mamba3Config {
    /// Width D of input and output.
    pub d_model: usize,
    /// State size N per head.
    pub d_state: usize,
    /// Inner width / D.
    pub expand: usize,
    /// Head size P.
    pub headdim: usize,
    /// Groups G of heads that share B and C.
    pub ngroups: usize,
    /// Share of the state dimensions that rotate: 0.5 or 1.0.
    pub rope_fraction: f64,
    /// How the decay rate is made.
    pub a_activation: AActivation,
    /// Whether the layer has several ranks (multi-input multi-output).
    pub is_mimo: bool,
    /// Ranks R, where `is_mimo`.
    pub mimo_rank: usize,
    /// Whether the scan's output is normalised per head before the gate.
    pub is_outproj_norm: bool,
    /// Tokens per chunk in training; no meaning for the result.
    pub chunk_size: usize,
}

impl Mamba3Config {
    /// Inner width: H P.
    pub fn d_inner(&self) -> usize {
        self.expand * self.d_model
    }

    /// Heads H.
    pub fn nheads(&self) -> usize {
        self.d_inner() / self.headdim
    }

    /// Ranks R: 1 unless MIMO.
    pub fn rank(&self) -> usize {
        if self.is_mimo { self.mimo_rank } else { 1 }
    }

    /// Rotated pairs S.
    pub fn n_angles(&self) -> usize {
        // rope_fraction is 0.5 or 1.0
        if self.rope_fraction < 1.0 { self.d_state / 4 } else { self.d_state / 2 }
    }

    /// Outputs of `in_proj`: z, x, B, C, dd_dt, dd_A, trap, angle.
    pub fn projected(&self) -> usize {
        2 * self.d_inner() + 2 * self.rank() * self.ngroups * self.d_state + 3 * self.nheads() + self.n_angles()
    }

    fn check(&self, name: &str) -> Result<(), String> {
        let sizes = [
            ("d_model", self.d_model),
            ("d_state", self.d_state),
            ("expand", self.expand),
            ("headdim", self.headdim),
            ("ngroups", self.ngroups),
            ("mimo_rank", self.mimo_rank),
            ("chunk_size", self.chunk_size),
        ];
        counts(&format!("{name}.layer."), &sizes)?;
        count(&format!("{name}.layer: expand * d_model"), self.expand.saturating_mul(self.d_model))?;
        let per_state = self.rank().saturating_mul(self.ngroups).saturating_mul(self.d_state);
        count(&format!("{name}.layer: mimo_rank * ngroups * d_state"), per_state)?;
        // the state of one layer: it takes memory for every sequence, and no tensor of the file is as large
        let state = self.d_inner().saturating_mul(self.d_state);
        count(&format!("{name}.layer: expand * d_model * d_state"), state)?;
        if self.rope_fraction != 0.5 && self.rope_fraction != 1.0 {
            return Err(format!("{name}.layer.rope_fraction: {} must be 0.5 or 1.0", self.rope_fraction));
        }
        if !self.d_inner().is_multiple_of(self.headdim) {
            return Err(format!("{name}.layer.headdim: {} does not divide {}", self.headdim, self.d_inner()));
        }
        if !self.nheads().is_multiple_of(self.ngroups) {
            return Err(format!("{name}.layer.ngroups: {} does not divide {} heads", self.ngroups, self.nheads()));
        }
        if self.n_angles() == 0 {
            return Err(format!("{name}.layer.d_state: {} leaves no pair to rotate", self.d_state));
        }
        if self.is_mimo && !self.d_state.is_multiple_of(2) {
            return Err(format!("{name}.layer.d_state: MIMO needs an even one, not {}", self.d_state));
        }
        Ok(())
    }
}

/// The hidden width of an MLP is a multiple of this.
const MLP_MULTIPLE: usize = 128;

/// A stack of equal Mamba-3 layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackboneConfig {
    /// How many.
    pub n_layers: usize,
    /// Each of them.
    pub layer: Mamba3Config,
    /// Hidden width of the gated MLP behind each layer, before it is rounded up; 0, and left out of files: there is none.
    #[serde(default, skip_serializing_if = "is_default")]
    pub mlp_dim: usize,
}

impl BackboneConfig {
    /// Width D of the residual stream.
    pub fn d_model(&self) -> usize {
        self.layer.d_model
    }

    /// Hidden width of the MLPs: `mlp_dim` rounded up to a multiple of 128.
    pub fn mlp_width(&self) -> usize {
        self.mlp_dim.next_multiple_of(MLP_MULTIPLE)
    }

    pub(super) fn check(&self, name: &str) -> Result<(), String> {
        count(&format!("{name}.n_layers"), self.n_layers)?;
        if self.mlp_dim > 0 {
            count(&format!("{name}.mlp_dim"), self.mlp_dim)?;
        }
        if self.n_layers > MAX_LAYERS {
            return Err(format!("{name}.n_layers: {} is more than {MAX_LAYERS}", self.n_layers));
        }
        self.layer.check(name)
    }
}
