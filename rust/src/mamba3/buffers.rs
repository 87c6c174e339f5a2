//! The memory a pass or a step works in, taken once and used by one layer after the other.

use std::sync::{Mutex, PoisonError};

use super::chunked::ChunkScratch;
use super::layer::ROWS_PER_TASK;
use super::step::HeadScratch;
use crate::config::Mamba3Config;

/// For one pass over sequences of T tokens together.
pub(super) struct PassBuffers {
    /// (T, W) what in_proj gives.
    pub(super) projected: Vec<f32>,
    /// (T, H P) the heads' outputs, cut by sequence, then by head.
    pub(super) heads: Vec<f32>,
    /// (N) for each task that prepares rows.
    pub(super) spares: Vec<f32>,
    /// Of the MLPs, which size it.
    pub(super) mlp: Vec<f32>,
    /// One for each thread that scans.
    pub(super) chunks: Pool<ChunkScratch>,
    /// Tokens of the longest sequence.
    pub(super) longest: usize,
}

impl PassBuffers {
    pub(super) fn new(config: &Mamba3Config, lengths: &[usize]) -> PassBuffers {
        let tokens: usize = lengths.iter().sum();
        PassBuffers {
            projected: vec![0.0; tokens * config.projected()],
            heads: vec![0.0; tokens * config.d_inner()],
            spares: vec![0.0; tokens.div_ceil(ROWS_PER_TASK) * config.d_state],
            mlp: Vec::new(),
            chunks: Pool::default(),
            longest: lengths.iter().copied().max().unwrap_or(0),
        }
    }
}

/// For steps of B sequences.
#[derive(Clone)]
pub(crate) struct StepBuffers {
    /// (B, D).
    pub(super) u: Vec<f32>,
    /// (B, W).
    pub(super) projected: Vec<f32>,
    /// (B, H P).
    pub(super) outputs: Vec<f32>,
    pub(super) spares: Vec<f32>,
    /// Of the MLPs, which size it.
    pub(super) mlp: Vec<f32>,
    /// One for each head.
    pub(super) heads: Vec<HeadScratch>,
}

impl StepBuffers {
    /// For `batch` sequences.
    pub(crate) fn new(config: &Mamba3Config, batch: usize) -> StepBuffers {
        let heads = (0..config.nheads()).map(|_| HeadScratch::new(config)).collect();
        let (u, projected, outputs, spares, mlp) = Default::default();
        let mut buffers = StepBuffers { u, projected, outputs, spares, mlp, heads };
        buffers.resize(config, batch);
        buffers
    }

    /// For another number of sequences.
    pub(crate) fn resize(&mut self, config: &Mamba3Config, batch: usize) {
        self.u.resize(batch * config.d_model, 0.0);
        self.projected.resize(batch * config.projected(), 0.0);
        self.outputs.resize(batch * config.d_inner(), 0.0);
        self.spares.resize(batch.div_ceil(ROWS_PER_TASK) * config.d_state, 0.0);
    }
}

/// Things that tasks borrow and give back: the last one given back, still in the cache, is the next one taken.
pub(super) struct Pool<T>(Mutex<Vec<T>>);

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool(Mutex::new(Vec::new()))
    }
}

impl<T> Pool<T> {
    pub(super) fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    pub(super) fn put(&self, thing: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(thing);
    }
}
