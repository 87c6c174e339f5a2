//! What the layers remember between tokens: of a size that does not depend on how many tokens there were.

use crate::config::{BackboneConfig, Mamba3Config};

/// One layer's memory of one sequence.
#[derive(Clone)]
pub(super) struct LayerState {
    /// (H, S) rotation angles in radians, in [-pi, pi].
    pub(super) theta: Vec<f32>,
    /// (H, P, N) the recurrent state.
    pub(super) h: Vec<f32>,
    /// (H, R, N) the last token's K.
    pub(super) k: Vec<f32>,
    /// (H, P) the last token's V, before MIMO spreads it.
    pub(super) v: Vec<f32>,
}

/// The part of a [`LayerState`] that belongs to one head: (S), (P, N), (R, N), (P).
pub(super) struct HeadState<'a> {
    pub(super) theta: &'a mut [f32],
    pub(super) h: &'a mut [f32],
    pub(super) k: &'a mut [f32],
    pub(super) v: &'a mut [f32],
}

impl LayerState {
    fn new(config: &Mamba3Config) -> LayerState {
        let (heads, size) = (config.nheads(), config.d_state);
        LayerState {
            theta: vec![0.0; heads * config.n_angles()],
            h: vec![0.0; heads * config.headdim * size],
            k: vec![0.0; heads * config.rank() * size],
            v: vec![0.0; heads * config.headdim],
        }
    }

    /// The heads' parts, in order.
    pub(super) fn heads(&mut self, config: &Mamba3Config) -> impl Iterator<Item = HeadState<'_>> {
        let h_size = config.headdim * config.d_state;
        self.theta
            .chunks_exact_mut(config.n_angles())
            .zip(self.h.chunks_exact_mut(h_size))
            .zip(self.k.chunks_exact_mut(config.rank() * config.d_state))
            .zip(self.v.chunks_exact_mut(config.headdim))
            .map(|(((theta, h), k), v)| HeadState { theta, h, k, v })
    }
}

/// A backbone's memory of one sequence; [`Clone`] copies it, as beam search needs.
#[derive(Clone)]
pub(crate) struct BackboneState {
    pub(super) layers: Vec<LayerState>,
}

impl BackboneState {
    /// The state before the first token.
    pub(crate) fn new(config: &BackboneConfig) -> BackboneState {
        BackboneState { layers: vec![LayerState::new(&config.layer); config.n_layers] }
    }
}
