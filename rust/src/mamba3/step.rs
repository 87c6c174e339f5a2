//! One token of one head: constant time and memory.

use super::head::Head;
use super::projection::Columns;
use super::rotation;
use super::state::HeadState;
use crate::config::Mamba3Config;
use crate::linalg::math;

/// What a head's step works with, and leaves behind for who looks inside.
#[derive(Clone)]
pub(super) struct HeadScratch {
    /// (R, N) K and Q of the token.
    k: Vec<f32>,
    pub(super) q: Vec<f32>,
    /// (R, P) V over the ranks, of this token and of the one before.
    v: Vec<f32>,
    v_before: Vec<f32>,
    /// (R, P) Q h + D V.
    pub(super) y: Vec<f32>,
    /// (S).
    turned: Vec<f32>,
    sin: Vec<f32>,
    cos: Vec<f32>,
    /// (P).
    pub(super) spare: Vec<f32>,
}

impl HeadScratch {
    pub(super) fn new(config: &Mamba3Config) -> HeadScratch {
        let (rank, angles) = (config.rank(), config.n_angles());
        let states = || vec![0.0; rank * config.d_state];
        let values = || vec![0.0; rank * config.headdim];
        HeadScratch {
            k: states(),
            q: states(),
            v: values(),
            v_before: values(),
            y: values(),
            turned: vec![0.0; angles],
            sin: vec![0.0; angles],
            cos: vec![0.0; angles],
            spare: vec![0.0; config.headdim],
        }
    }
}

/// Lets `state` see a token, given as a prepared row, and leaves the head's output in `scratch.y`.
pub(super) fn step(
    head: &Head<'_>,
    row: &[f32],
    columns: &Columns,
    state: &mut HeadState<'_>,
    scratch: &mut HeadScratch,
) {
    let HeadScratch { k, q, v, v_before, y, turned, sin, cos, spare: _ } = scratch;
    let (dt, trapezoid) = (row[columns.dt.start + head.index], row[columns.trap.start + head.index]);
    let alpha = row[columns.a.start + head.index].exp();
    let x = head.part(&row[columns.x.clone()]);

    rotation::advance(state.theta, &row[columns.angle.clone()], dt, turned);
    state.theta.copy_from_slice(turned);
    math::sin_cos(turned, sin, cos);
    head.keys_and_queries(row, columns, (sin, cos), k, q);
    head.spread(x, v);
    head.spread(state.v, v_before);

    let now = trapezoid * dt;
    let before = (1.0 - trapezoid) * dt * alpha;
    let (size, n) = (x.len(), state.h.len() / x.len());
    for (p, h) in state.h.chunks_exact_mut(n).enumerate() {
        let mut kept = alpha;
        for (r, (k, k_before)) in k.chunks_exact(n).zip(state.k.chunks_exact(n)).enumerate() {
            let (before, now) = (before * v_before[r * size + p], now * v[r * size + p]);
            for ((h, k_before), k) in h.iter_mut().zip(k_before).zip(k) {
                *h = kept * *h + before * k_before + now * k;
            }
            kept = 1.0;
        }
        for (r, q) in q.chunks_exact(n).enumerate() {
            y[r * size + p] = dot(h, q) + head.skip * v[r * size + p];
        }
    }
    state.k.copy_from_slice(k);
    state.v.copy_from_slice(x);
}

/// Sum of the products, in eight sums side by side so that it vectorises.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0_f32; 8];
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}
