//! One Mamba-3 layer: in_proj, scan, gate, out_proj.

use rayon::prelude::*;

use super::buffers::{PassBuffers, StepBuffers};
use super::chunked::{self, ChunkScratch};
use super::head::{Head, HeadWeights};
use super::projection::{Columns, Preparation};
use super::rotation::Order;
use super::state::{HeadState, LayerState};
use super::step::{self, HeadScratch};
use crate::config::Mamba3Config;
use crate::error::LoadError;
use crate::linalg::Matrix;
use crate::loader::Fields;

/// Numbers of state that a thread updates in a step before it is worth waking another.
const STATE_PER_TASK: usize = 1 << 16;
/// Tokens that a thread prepares in a row.
pub(super) const ROWS_PER_TASK: usize = 16;

/// One layer's weights.
pub(super) struct Mamba3Layer {
    pub(super) config: Mamba3Config,
    pub(super) columns: Columns,
    pub(super) order: Order,
    pub(super) in_proj: Matrix,
    preparation: Preparation,
    heads: HeadWeights,
    pub(super) out_proj: Matrix,
}

/// One head's part of a pass over one sequence.
struct HeadTask<'a> {
    head: usize,
    /// (L, W) prepared rows.
    rows: &'a [f32],
    state: Option<HeadState<'a>>,
    /// (L, P).
    out: &'a mut [f32],
}

impl Mamba3Layer {
    /// Reads the layer whose keys start with `prefix`.
    ///
    /// # Errors
    /// [`LoadError::MissingKey`], [`LoadError::Shape`] or [`LoadError::Type`].
    pub(super) fn from_fields(
        fields: &mut Fields<'_>,
        prefix: &str,
        config: &Mamba3Config,
    ) -> Result<Mamba3Layer, LoadError> {
        let key = |name: &str| format!("{prefix}.{name}");
        let order = Order::new(config.d_state, config.n_angles(), !config.is_mimo);
        Ok(Mamba3Layer {
            columns: Columns::new(config),
            in_proj: fields.matrix(&key("in_proj.weight"), config.projected(), config.d_model)?,
            preparation: Preparation {
                dt_bias: fields.vector(&key("dt_bias"), &[config.nheads()])?,
                b_norm: fields.vector(&key("B_norm.weight"), &[config.d_state])?,
                c_norm: fields.vector(&key("C_norm.weight"), &[config.d_state])?,
                activation: config.a_activation,
            },
            heads: HeadWeights::from_fields(fields, prefix, config, &order)?,
            out_proj: fields.matrix(&key("out_proj.weight"), config.d_model, config.d_inner())?,
            order,
            config: config.clone(),
        })
    }

    /// u (T, D), the sequences of `lengths` one after the other, becomes the layer's output. With `states`, one for each
    /// sequence, it continues from them and leaves them as they are after the last token.
    pub(super) fn forward<'s>(
        &self,
        u: &mut [f32],
        lengths: &[usize],
        states: Option<impl Iterator<Item = &'s mut LayerState>>,
        buffers: &mut PassBuffers,
    ) {
        let PassBuffers { projected, heads, spares, chunks, longest, .. } = buffers;
        self.in_proj.apply(u, projected);
        self.prepare(projected, spares);
        self.tasks(projected, lengths, states, heads).into_par_iter().for_each(|task| {
            let mut scratch = chunks.take().unwrap_or_else(|| ChunkScratch::new(&self.config, *longest));
            chunked::scan(&self.head(task.head), task.rows, &self.columns, task.state, &mut scratch, task.out);
            chunks.put(scratch);
        });
        // what was projected has been read: its memory takes the heads' outputs, token by token
        let joined = &mut projected[..heads.len()];
        self.join(heads, lengths, joined);
        self.out_proj.apply(joined, u);
    }

    /// One token of each of B sequences: u (B, D) becomes the layer's output.
    pub(super) fn step<'s>(
        &self,
        u: &mut [f32],
        states: impl Iterator<Item = &'s mut LayerState>,
        buffers: &mut StepBuffers,
    ) {
        let StepBuffers { projected, outputs, spares, heads, .. } = buffers;
        self.in_proj.apply(u, projected);
        self.prepare(projected, spares);
        let rows = projected.chunks_exact(self.columns.width);
        for ((row, state), out) in rows.zip(states).zip(outputs.chunks_exact_mut(self.config.d_inner())) {
            self.step_heads(row, state, heads, out);
        }
        self.out_proj.apply(outputs, u);
    }

    /// Rows (T, W) of in_proj become prepared rows; `spares` (T / [`ROWS_PER_TASK`], N) is overwritten.
    pub(super) fn prepare(&self, projected: &mut [f32], spares: &mut [f32]) {
        projected
            .par_chunks_mut(ROWS_PER_TASK * self.columns.width)
            .zip(spares.par_chunks_mut(self.config.d_state))
            .for_each(|(rows, spare)| {
                for row in rows.chunks_exact_mut(self.columns.width) {
                    self.preparation.apply(row, &self.columns, &self.order, spare);
                }
            });
    }

    /// One task for each head and sequence. The outputs (T, H P) are cut by sequence, then by head.
    fn tasks<'a, 's: 'a>(
        &self,
        mut rows: &'a [f32],
        lengths: &[usize],
        mut states: Option<impl Iterator<Item = &'s mut LayerState>>,
        mut outputs: &'a mut [f32],
    ) -> Vec<HeadTask<'a>> {
        let config = &self.config;
        let mut tasks = Vec::with_capacity(lengths.len() * config.nheads());
        for &length in lengths {
            let (sequence, others) = rows.split_at(length * self.columns.width);
            let (outs, other_outs) = outputs.split_at_mut(length * config.d_inner());
            (rows, outputs) = (others, other_outs);
            let mut state = states.as_mut().and_then(Iterator::next).map(|state| state.heads(config));
            if length == 0 {
                continue;
            }
            for (head, out) in outs.chunks_exact_mut(length * config.headdim).enumerate() {
                let state = state.as_mut().and_then(Iterator::next);
                tasks.push(HeadTask { head, rows: sequence, state, out });
            }
        }
        tasks
    }

    /// Outputs cut by sequence, then by head, to rows (T, H P).
    fn join(&self, mut heads: &[f32], lengths: &[usize], mut joined: &mut [f32]) {
        let (inner, size) = (self.config.d_inner(), self.config.headdim);
        for &length in lengths {
            let (outs, other_outs) = heads.split_at(length * inner);
            let (rows, other_rows) = joined.split_at_mut(length * inner);
            (heads, joined) = (other_outs, other_rows);
            rows.par_chunks_exact_mut(inner).with_min_len(ROWS_PER_TASK).enumerate().for_each(|(t, row)| {
                for (part, out) in row.chunks_exact_mut(size).zip(outs.chunks_exact(length * size)) {
                    part.copy_from_slice(&out[t * size..(t + 1) * size]);
                }
            });
        }
    }

    /// All heads of one token: a prepared row (W) to gated outputs (H, P).
    fn step_heads(&self, row: &[f32], state: &mut LayerState, heads: &mut [HeadScratch], outputs: &mut [f32]) {
        let config = &self.config;
        let h_size = config.headdim * config.d_state;
        let parts = (state.theta.par_chunks_exact_mut(config.n_angles()))
            .zip(state.h.par_chunks_exact_mut(h_size))
            .zip(state.k.par_chunks_exact_mut(config.rank() * config.d_state))
            .zip(state.v.par_chunks_exact_mut(config.headdim))
            .map(|(((theta, h), k), v)| HeadState { theta, h, k, v });
        parts
            .zip(heads)
            .zip(outputs.par_chunks_exact_mut(config.headdim))
            .enumerate()
            .with_min_len(STATE_PER_TASK.div_ceil(h_size * config.rank()))
            .for_each(|(index, ((mut state, scratch), out))| {
                self.step_head(index, row, &mut state, scratch);
                self.gate_head(index, row, scratch, out);
            });
    }

    /// Lets one head see a token, given as a prepared row (W).
    pub(super) fn step_head(&self, index: usize, row: &[f32], state: &mut HeadState<'_>, scratch: &mut HeadScratch) {
        step::step(&self.head(index), row, &self.columns, state, scratch);
    }

    /// The gated output (P) of a head that has just made its step.
    pub(super) fn gate_head(&self, index: usize, row: &[f32], scratch: &mut HeadScratch, out: &mut [f32]) {
        let head = self.head(index);
        head.gate(&mut scratch.y, head.part(&row[self.columns.z.clone()]), &mut scratch.spare, out);
    }

    fn head(&self, index: usize) -> Head<'_> {
        self.heads.head(index, &self.config)
    }
}
