//! From token states to an embedding on the unit sphere.

use crate::config::NORMALIZE_EPS;
use crate::error::Error;
use crate::linalg::{Linear, norm};

/// The mean of each sequence's rows: h (T, D) and the lengths of its B sequences give (B, D); zeros for an empty one.
pub(crate) fn means(mut h: &[f32], lengths: &[usize], width: usize) -> Vec<f32> {
    let mut pooled = vec![0.0; lengths.len() * width];
    for (&length, mean) in lengths.iter().zip(pooled.chunks_exact_mut(width)) {
        let (rows, others) = h.split_at(length * width);
        h = others;
        for row in rows.chunks_exact(width) {
            for (mean, x) in mean.iter_mut().zip(row) {
                *mean += x;
            }
        }
        for mean in mean {
            *mean /= length.max(1) as f32;
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
    let rows = embeddings.chunks_exact_mut(embed_dim);
    let rows = rows.map(|embedding| {
        norm::l2_normalize(embedding, NORMALIZE_EPS);
        embedding.to_vec()
    });
    Ok(rows.collect())
}

/// # Errors
/// [`Error::NotFinite`] if one of `numbers` is not finite; `what` they are.
pub(crate) fn demand_finite(numbers: &[f32], what: &str) -> Result<(), Error> {
    if numbers.iter().all(|x| x.is_finite()) {
        return Ok(());
    }
    Err(Error::NotFinite(format!("{what} has a number that is not finite: the weights are damaged; export them again")))
}
