//! Attention in memory linear in the number of tokens: softmax over blocks of keys, rescaled as larger scores turn up
//! (Rabe and Staats 2021, arXiv 2112.05682; Dao et al. 2022, arXiv 2205.14135).

use rayon::prelude::*;

use crate::linalg::gemm::{View, product};
use crate::linalg::math::exp_below_max;

/// Queries that one task works on, and keys that it looks at together. The scores lie on the stack and fit the second-level
/// cache; the product packs the keys once per task, which fewer queries would not be worth.
const QUERIES: usize = 128;
const KEYS: usize = 256;

/// softmax(q kᵀ / √P) v for every head.
///
/// q, k, v: (N, H P), where head h has the columns from h P. out: (H, N, P). Runs on the current thread pool; cut by
/// fixed sizes, so that the result is the same on any number of threads.
pub(super) fn attend(q: &[f32], k: &[f32], v: &[f32], heads: usize, head_size: usize, out: &mut [f32]) {
    let width = heads * head_size;
    let tokens = q.len() / width;
    out.par_chunks_mut(tokens * head_size).enumerate().for_each(|(head, out)| {
        let column = head * head_size;
        out.par_chunks_mut(QUERIES * head_size).enumerate().for_each(|(block, out)| {
            let q = &q[block * QUERIES * width + column..];
            attend_block(q, &k[column..], &v[column..], width, tokens, head_size, out);
        });
    });
}

/// out (Q, P) for up to `QUERIES` queries of one head; rows of q (Q, P), k (N, P) and v (N, P) are `stride` apart.
fn attend_block(q: &[f32], k: &[f32], v: &[f32], stride: usize, tokens: usize, head_size: usize, out: &mut [f32]) {
    let scale = 1.0 / (head_size as f32).sqrt();
    let queries = out.len() / head_size;
    let mut scores = [0.0; QUERIES * KEYS];
    let mut state = [Running { max: f32::NEG_INFINITY, sum: 0.0 }; QUERIES];
    for start in (0..tokens).step_by(KEYS) {
        let keys = KEYS.min(tokens - start);
        let scores = &mut scores[..queries * keys];
        let (k, v) = (View::rows(&k[start * stride..], stride), View::rows(&v[start * stride..], stride));
        product(scores, keys, queries, keys, head_size, View::rows(q, stride), k.transposed(), scale, false);
        let rows = scores.chunks_exact_mut(keys).zip(out.chunks_exact_mut(head_size));
        for (state, (row, out)) in state.iter_mut().zip(rows) {
            let shrink = state.weigh(row);
            out.iter_mut().for_each(|x| *x *= shrink);
        }
        product(out, head_size, queries, head_size, keys, View::rows(scores, keys), v, 1.0, start > 0);
    }
    for (state, out) in state.iter().zip(out.chunks_exact_mut(head_size)) {
        let scale = 1.0 / state.sum;
        out.iter_mut().for_each(|x| *x *= scale);
    }
}

/// What a query has seen so far: its largest score, and the sum of e^(score - max).
#[derive(Clone, Copy)]
struct Running {
    max: f32,
    sum: f32,
}

impl Running {
    /// Turns more scores of the query into weights e^(score - max); returns by how much earlier weights shrink.
    fn weigh(&mut self, scores: &mut [f32]) -> f32 {
        let (max, sum) = exp_below_max(scores, self.max);
        let shrink = (self.max - max).exp(); // e^-∞ = 0 the first time
        *self = Running { max, sum: self.sum * shrink + sum };
        shrink
    }
}

#[cfg(test)]
mod tests {
    use super::{KEYS, QUERIES, attend};

    /// Scores of several hundred, ever larger from key to key: every block must rescale what came before it, and nothing
    /// may overflow.
    #[test]
    fn large_scores_that_grow() {
        let (heads, head_size) = (2, 3);
        let width = heads * head_size;
        let tokens = 2 * KEYS + QUERIES + 1;
        let wave = |scale: f32| move |i: usize| ((i * 7 % 23) as f32 / 11.0 - 1.0) * scale;
        let q: Vec<f32> = (0..tokens * width).map(|i| wave(1.0)(i) + 2.0).collect();
        let k: Vec<f32> = (0..tokens * width).map(|i| wave(3.0)(i) + i as f32 / 20.0).collect();
        let v: Vec<f32> = (0..tokens * width).map(wave(1.0)).collect();
        let mut out = vec![0.0; tokens * width];
        attend(&q, &k, &v, heads, head_size, &mut out);
        for head in 0..heads {
            for n in 0..tokens {
                let at = |x: &[f32], n: usize, p: usize| f64::from(x[n * width + head * head_size + p]);
                let score = |m| (0..head_size).map(|p| at(&q, n, p) * at(&k, m, p)).sum::<f64>() / 3_f64.sqrt();
                let scores: Vec<f64> = (0..tokens).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(max > 300.0);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                for p in 0..head_size {
                    let sum: f64 = (0..tokens).map(|m| weights[m] * at(&v, m, p)).sum();
                    let expected = sum / weights.iter().sum::<f64>();
                    let found = f64::from(out[(head * tokens + n) * head_size + p]);
                    assert!((found - expected).abs() < 2e-4, "{head} {n} {p}: {found} {expected}");
                }
            }
        }
    }
}
