//! The scan as matrix products over chunks, for whole sequences: time and memory linear in the length.
//!
//! With a_t the decay from the start of a chunk to its token t, the recurrence unrolls within the chunk to
//!
//! ```text
//! y_t = a_t Q_t h + sum_{s <= t} M_ts (Q_t . K_s) V_s + D V_t
//! h'  = a_C h     + sum_s (a_C / a_s) w_s K_s V_s
//! ```
//!
//! with w_s = lambda_s dt_s + (1 - lambda_{s+1}) dt_{s+1}: what token s adds by its own step and, one token later, by the
//! trapezoid. M_ts is (a_t / a_s) w_s below the diagonal and lambda_t dt_t on it, where the second share has not arrived
//! yet. So the h between two chunks already holds the next token's share of the last K V.
//!
//! C tokens of one chunk, X = C R rows, one per token and rank, tokens outermost.

use super::head::Head;
use super::projection::Columns;
use super::rotation;
use super::state::HeadState;
use crate::config::Mamba3Config;
use crate::linalg::gemm::{View, product};
use crate::linalg::math;

/// exp(-40) per token and exp(-60) over several are zero beside anything they meet. Without the first bound, one token
/// that forgets everything takes the precision of the cumulative sum away from the tokens after it; without the second,
/// denormal numbers make a CPU crawl.
const MIN_LOG_DECAY: f32 = -40.0;
const MIN_LOG_CHUNK_DECAY: f32 = -60.0;

/// Rows X of a chunk at most: a longer chunk has larger products, but more of them per token.
const CHUNK_ROWS: usize = 64;

/// Tokens of a chunk at most.
fn most_tokens(rank: usize) -> usize {
    (CHUNK_ROWS / rank).max(1)
}

/// Tokens of a chunk, for a sequence of `length` tokens: as few chunks as can be, of much the same length.
fn chunk_size(length: usize, rank: usize) -> usize {
    length.div_ceil(length.div_ceil(most_tokens(rank)).max(1)).max(1)
}

/// What one head's scan is computed in.
pub(super) struct ChunkScratch {
    work: Work,
    /// (S) and (P, N), the state of a sequence whose state nobody keeps.
    theta: Vec<f32>,
    h: Vec<f32>,
}

/// What one chunk is computed in.
struct Work {
    /// (X, N).
    k: Vec<f32>,
    q: Vec<f32>,
    /// (X, P).
    v: Vec<f32>,
    y: Vec<f32>,
    /// (X, X).
    scores: Vec<f32>,
    /// (C, S).
    theta: Vec<f32>,
    sin: Vec<f32>,
    cos: Vec<f32>,
    /// (C) logarithm of a_t; lambda_t dt_t; w_t; a row of M.
    log_decay: Vec<f32>,
    now: Vec<f32>,
    weight: Vec<f32>,
    mask: Vec<f32>,
    /// (P).
    spare: Vec<f32>,
}

impl ChunkScratch {
    /// For sequences of up to `length` tokens.
    pub(super) fn new(config: &Mamba3Config, length: usize) -> ChunkScratch {
        let tokens = length.min(most_tokens(config.rank()));
        let (rows, angles) = (tokens * config.rank(), config.n_angles());
        let numbers = |count: usize| vec![0.0; count];
        let work = Work {
            k: numbers(rows * config.d_state),
            q: numbers(rows * config.d_state),
            v: numbers(rows * config.headdim),
            y: numbers(rows * config.headdim),
            scores: numbers(rows * rows),
            theta: numbers(tokens * angles),
            sin: numbers(tokens * angles),
            cos: numbers(tokens * angles),
            log_decay: numbers(tokens),
            now: numbers(tokens),
            weight: numbers(tokens),
            mask: numbers(tokens),
            spare: numbers(config.headdim),
        };
        ChunkScratch { work, theta: numbers(angles), h: numbers(config.headdim * config.d_state) }
    }
}

/// Runs one head over a sequence: prepared rows (L, W) to gated outputs (L, P). It continues from `state` and leaves it
/// as it is after the last token; without one it starts from zero.
pub(super) fn scan(
    head: &Head<'_>,
    rows: &[f32],
    columns: &Columns,
    mut state: Option<HeadState<'_>>,
    scratch: &mut ChunkScratch,
    out: &mut [f32],
) {
    let width = columns.width;
    let length = rows.len() / width;
    if length == 0 {
        return;
    }
    let ChunkScratch { work, theta, h } = scratch;
    let keeps_state = state.is_some();
    let (theta, h) = match &mut state {
        Some(state) => {
            add_share_of_last_token(head, &rows[..width], columns, state, work);
            (&mut *state.theta, &mut *state.h)
        }
        None => {
            theta.fill(0.0);
            h.fill(0.0);
            (&mut theta[..], &mut h[..])
        }
    };
    let size = chunk_size(length, head.rank);
    for start in (0..length).step_by(size) {
        let end = length.min(start + size);
        let chunk = Chunk {
            head,
            columns,
            rows: &rows[start * width..end * width],
            next: rows.get(end * width..(end + 1) * width),
            tokens: end - start,
        };
        chunk.turn(theta, work);
        chunk.decay(work);
        chunk.attend(work);
        if start > 0 || keeps_state {
            chunk.add_past(h, work);
        }
        chunk.gate(work, &mut out[start * head.size..end * head.size]);
        if end < length || keeps_state {
            chunk.carry(h, work);
        }
    }
    if let Some(state) = state {
        let last = (length - 1) % size * head.rank * head.state;
        state.k.copy_from_slice(&work.k[last..last + head.rank * head.state]);
        state.v.copy_from_slice(head.part(&rows[(length - 1) * width..][columns.x.clone()]));
    }
}

/// h += (1 - lambda) dt K V, with K and V of the last token before the sequence, lambda and dt of its first.
fn add_share_of_last_token(
    head: &Head<'_>,
    row: &[f32],
    columns: &Columns,
    state: &mut HeadState<'_>,
    work: &mut Work,
) {
    let v = &mut work.v[..head.rank * head.size];
    head.spread(state.v, v);
    let weight = later(head, row, columns);
    let (v, k) = (View::rows(v, head.size).transposed(), View::rows(state.k, head.state));
    product(state.h, head.state, head.size, head.state, head.rank, v, k, weight, true);
}

/// lambda dt of a token.
fn now(head: &Head<'_>, row: &[f32], columns: &Columns) -> f32 {
    row[columns.trap.start + head.index] * row[columns.dt.start + head.index]
}

/// (1 - lambda) dt of a token.
fn later(head: &Head<'_>, row: &[f32], columns: &Columns) -> f32 {
    (1.0 - row[columns.trap.start + head.index]) * row[columns.dt.start + head.index]
}

/// Some tokens of a sequence, as one head sees them.
struct Chunk<'a> {
    head: &'a Head<'a>,
    columns: &'a Columns,
    /// (C, W) prepared rows.
    rows: &'a [f32],
    /// (W) that of the token after the chunk, if there is one.
    next: Option<&'a [f32]>,
    /// C.
    tokens: usize,
}

impl Chunk<'_> {
    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.rows.chunks_exact(self.columns.width)
    }

    /// Moves theta (S) on to the end of the chunk; fills `k` and `q`, and `v`.
    fn turn(&self, theta: &mut [f32], work: &mut Work) {
        let (head, pairs) = (self.head, theta.len());
        let count = self.tokens * pairs;
        for (row, after) in self.rows().zip(work.theta.chunks_exact_mut(pairs)) {
            rotation::advance(theta, &row[self.columns.angle.clone()], row[self.columns.dt.start + head.index], after);
            theta.copy_from_slice(after);
        }
        math::sin_cos(&work.theta[..count], &mut work.sin[..count], &mut work.cos[..count]);
        let turns = work.sin.chunks_exact(pairs).zip(work.cos.chunks_exact(pairs));
        let outputs = (work.k.chunks_exact_mut(head.rank * head.state))
            .zip(work.q.chunks_exact_mut(head.rank * head.state))
            .zip(work.v.chunks_exact_mut(head.rank * head.size));
        for ((row, turn), ((k, q), v)) in self.rows().zip(turns).zip(outputs) {
            head.keys_and_queries(row, self.columns, turn, k, q);
            head.spread(head.part(&row[self.columns.x.clone()]), v);
        }
    }

    /// Fills `log_decay`, `now` and `weight`.
    fn decay(&self, work: &mut Work) {
        let mut log_decay = 0.0;
        for (t, row) in self.rows().enumerate() {
            log_decay += row[self.columns.a.start + self.head.index].max(MIN_LOG_DECAY);
            work.log_decay[t] = log_decay;
            work.now[t] = now(self.head, row, self.columns);
        }
        for (t, row) in self.rows().skip(1).chain(self.next).enumerate() {
            work.weight[t] = work.now[t] + later(self.head, row, self.columns);
        }
        if self.next.is_none() {
            work.weight[self.tokens - 1] = work.now[self.tokens - 1];
        }
    }

    /// y = (M . Q K^T) V + D V.
    fn attend(&self, work: &mut Work) {
        let &Head { rank, state, size, skip, .. } = self.head;
        let x = self.tokens * rank;
        let (q, k) = (View::rows(&work.q, state), View::rows(&work.k, state));
        product(&mut work.scores, x, x, x, state, q, k.transposed(), 1.0, false);
        for t in 0..self.tokens {
            let mask = &mut work.mask[..=t];
            for (mask, before) in mask.iter_mut().zip(&work.log_decay) {
                *mask = (work.log_decay[t] - before).max(MIN_LOG_CHUNK_DECAY);
            }
            math::exp_slice(mask);
            for (mask, weight) in mask.iter_mut().zip(&work.weight) {
                *mask *= weight;
            }
            mask[t] = work.now[t];
            for scores in work.scores[t * rank * x..(t + 1) * rank * x].chunks_exact_mut(x) {
                let (past, future) = scores.split_at_mut((t + 1) * rank);
                for (scores, mask) in past.chunks_exact_mut(rank).zip(&*mask) {
                    for score in scores {
                        *score *= mask;
                    }
                }
                future.fill(0.0);
            }
        }
        let (scores, v) = (View::rows(&work.scores, x), View::rows(&work.v, size));
        product(&mut work.y, size, x, size, x, scores, v, 1.0, false);
        for (y, v) in work.y[..x * size].iter_mut().zip(&work.v) {
            *y += skip * v;
        }
    }

    /// y += a Q h^T, with h (P, N) from before the chunk. `q` is overwritten.
    fn add_past(&self, h: &[f32], work: &mut Work) {
        let &Head { rank, state, size, .. } = self.head;
        for (q, log_decay) in work.q.chunks_exact_mut(rank * state).zip(&work.log_decay[..self.tokens]) {
            let decay = log_decay.max(MIN_LOG_CHUNK_DECAY).exp();
            for q in q {
                *q *= decay;
            }
        }
        let (q, h) = (View::rows(&work.q, state), View::rows(h, state).transposed());
        product(&mut work.y, size, self.tokens * rank, size, state, q, h, 1.0, true);
    }

    /// Norm, gate and gathering of the ranks, to out (C, P). `y` is overwritten.
    fn gate(&self, work: &mut Work, out: &mut [f32]) {
        let head = self.head;
        let rows = self.rows().zip(work.y.chunks_exact_mut(head.rank * head.size));
        for ((row, y), out) in rows.zip(out.chunks_exact_mut(head.size)) {
            head.gate(y, head.part(&row[self.columns.z.clone()]), &mut work.spare, out);
        }
    }

    /// h becomes the state after the chunk. `v` is overwritten.
    fn carry(&self, h: &mut [f32], work: &mut Work) {
        let &Head { rank, state, size, .. } = self.head;
        let end = work.log_decay[self.tokens - 1];
        let through = end.max(MIN_LOG_CHUNK_DECAY).exp();
        for h in h.iter_mut() {
            *h *= through;
        }
        for (t, v) in work.v.chunks_exact_mut(rank * size).take(self.tokens).enumerate() {
            let kept = work.weight[t] * (end - work.log_decay[t]).max(MIN_LOG_CHUNK_DECAY).exp();
            for v in v {
                *v *= kept;
            }
        }
        let (v, k) = (View::rows(&work.v, size).transposed(), View::rows(&work.k, state));
        product(h, state, size, state, self.tokens * rank, v, k, 1.0, true);
    }
}
