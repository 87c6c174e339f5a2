//! The Mamba-3 layer and the residual stack of such layers.
//!
//! Source: "Mamba-3: Improved Sequence Modeling using State Space Principles" (ICLR 2026, arXiv 2603.15569). Per head,
//! with K and Q the biased and rotated inputs and V the values, token t does
//!
//! ```text
//! h_t = alpha_t h_{t-1} + (1 - lambda_t) dt_t alpha_t K_{t-1} V_{t-1} + lambda_t dt_t K_t V_t
//! y_t = Q_t h_t + D V_t
//! ```
//!
//! `step` is one such turn, for decoding; `chunked` gives the same numbers from matrix products over chunks of tokens;
//! `sequential`, slow and plain, is what the tests hold against both.
//!
//! Letters: T tokens of all sequences, one sequence after the other; D model width; H heads of size P, in G groups that
//! share B and C; R ranks (1 unless MIMO); N state size; S rotated pairs. Inside, the N dimensions of B, C, K, Q and h
//! stand in the order of [`rotation::Order`].

mod backbone;
mod buffers;
mod chunked;
mod head;
mod layer;
mod mlp;
mod projection;
mod rotation;
#[cfg(test)]
#[expect(clippy::needless_range_loop, reason = "the indices of the formulas")]
pub(crate) mod sequential;
mod state;
mod step;
#[cfg(test)]
mod tests;
pub(crate) mod trace;

pub(crate) use backbone::{LayerHook, Mamba3Backbone};
pub(crate) use buffers::StepBuffers;
pub(crate) use state::BackboneState;
