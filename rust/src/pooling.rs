//! From token states to an embedding on the unit sphere.

use crate::config::NORMALIZE_EPS;
use crate::error::Error;
use crate::linalg::{Linear, Matrix, norm};

/// The mean of each sequence's rows: h (T, D) and the lengths of its B sequences give (B, D); zeros for an empty one.
pub(crate) fn means(h: &[f32], lengths: &[usize], width: usize) -> Vec<f32> {
    let mut rest = h;
    let sequences = lengths.iter().map(|length| {
        let (sequence, others) = rest.split_at(length * width);
        rest = others;
        sequence
    });
    sequences.flat_map(|sequence| mean(sequence, width)).collect()
}

/// The mean (D) of the rows of h (T, D); zeros where there is none.
pub(crate) fn mean(h: &[f32], width: usize) -> Vec<f32> {
    let mut pooled = vec![0.0; width];
    for row in h.chunks_exact(width) {
        for (sum, x) in pooled.iter_mut().zip(row) {
            *sum += x;
        }
    }
    let count = (h.len() / width).max(1) as f32;
    for sum in &mut pooled {
        *sum /= count;
    }
    pooled
}

/// The means of every `pool` x `pool` neighbours among the tokens (side^2, D) of a picture, row by row: ((side / pool)^2, D).
pub(crate) fn grid_means(tokens: Vec<f32>, width: usize, side: usize, pool: usize) -> Vec<f32> {
    if pool == 1 {
        return tokens;
    }
    let cells = side / pool;
    let mut pooled = vec![0.0; cells * cells * width];
    for (i, token) in tokens.chunks_exact(width).enumerate() {
        let cell = (i / side / pool) * cells + i % side / pool;
        for (sum, x) in pooled[cell * width..][..width].iter_mut().zip(token) {
            *sum += x;
        }
    }
    let count = (pool * pool) as f32;
    for sum in &mut pooled {
        *sum /= count;
    }
    pooled
}

/// The mean (D) of the rows of h (T, D), weighted by the softmax of their products with the row of `score` (1, D).
///
/// Attention pooling: Ilse et al. 2018, arXiv 1802.04712.
pub(crate) fn attention_mean(h: &[f32], score: &Matrix) -> Vec<f32> {
    let width = score.cols();
    let mut weights = vec![0.0; h.len() / width];
    score.apply(h, &mut weights);
    let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for weight in &mut weights {
        *weight = (*weight - largest).exp();
    }
    let total: f32 = weights.iter().sum();
    let mut pooled = vec![0.0; width];
    for (row, weight) in h.chunks_exact(width).zip(&weights) {
        for (sum, x) in pooled.iter_mut().zip(row) {
            *sum += weight / total * x;
        }
    }
    pooled
}

/// Pooled states (B, D) through a linear head, each divided by its length: B embeddings (E) of unit length.
///
/// # Errors
/// [`Error::NotFinite`] if a state or an embedding has a number that is not finite.
pub(crate) fn embed(head: &Linear, pooled: &[f32]) -> Result<Vec<Vec<f32>>, Error> {
    demand_finite(pooled, "a pooled state")?;
    let (width, embed_dim) = (head.weight.cols(), head.weight.rows());
    let mut embeddings = vec![0.0; pooled.len() / width * embed_dim];
    head.apply(pooled, &mut embeddings);
    demand_finite(&embeddings, "an embedding")?;
    for embedding in embeddings.chunks_exact_mut(embed_dim) {
        // finite numbers may have a length that is not
        demand_finite(&[embedding.iter().map(|x| x * x).sum()], "the length of an embedding")?;
        norm::l2_normalize(embedding, NORMALIZE_EPS);
    }
    Ok(embeddings.chunks_exact(embed_dim).map(<[f32]>::to_vec).collect())
}

/// # Errors
/// [`Error::NotFinite`] if one of `numbers` is not finite; `what` they are.
pub(crate) fn demand_finite(numbers: &[f32], what: &str) -> Result<(), Error> {
    if numbers.iter().all(|x| x.is_finite()) {
        return Ok(());
    }
    Err(Error::NotFinite(format!("{what} has a number that is not finite: the weights are damaged; export them again")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_a_grid_are_averaged() {
        let tokens: Vec<f32> = (0..16).flat_map(|i| [i as f32, -2.0 * i as f32]).collect();
        let means = [2.5, 4.5, 10.5, 12.5].into_iter().flat_map(|mean| [mean, -2.0 * mean]).collect::<Vec<f32>>();
        assert_eq!(grid_means(tokens.clone(), 2, 4, 2), means);
        assert_eq!(grid_means(tokens.clone(), 2, 4, 4), [7.5, -15.0]);
        assert_eq!(grid_means(tokens.clone(), 2, 4, 1), tokens);
    }
}
