//! The nearest of many embeddings by cosine. Letters: G embeddings in the gallery, E their width.

/// A shorter embedding is divided by this, as PyTorch's `normalize` does.
const EPS: f32 = 1e-12;
const LANES: usize = 16;

/// Places and cosines of the `k` embeddings of `gallery` (G, E) nearest to `query` (E,), nearest first; all G when
/// G < k. Of equal ones the first comes first. A cosine that is not a number is the least.
pub(crate) fn nearest(query: &[f32], gallery: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut found: Vec<(usize, f32)> = Vec::new();
    for (place, cosine) in cosines(query, gallery).into_iter().enumerate() {
        let is_worse = |&(_, other): &(usize, f32)| other >= cosine || cosine.is_nan();
        if found.len() >= k && found.last().is_none_or(is_worse) {
            continue;
        }
        let at = found.partition_point(is_worse);
        found.insert(at, (place, cosine));
        found.truncate(k);
    }
    found
}

/// Cosine of `query` (E,) with each of `gallery` (G, E): (G,).
pub(crate) fn cosines(query: &[f32], gallery: &[f32]) -> Vec<f32> {
    let query: Vec<f32> = query.iter().map(|x| x / length(query)).collect();
    let rows = gallery.chunks_exact(query.len().max(1));
    rows.map(|row| dot(&query, row) / length(row)).collect()
}

/// The shares of `cosines` in a softmax of cosine / temperature.
pub(crate) fn shares(cosines: &[f32], temperature: f32) -> Vec<f32> {
    let largest = cosines.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // the difference first: a cosine by a tiny temperature is infinite
    let mut shares: Vec<f32> = cosines.iter().map(|cosine| ((cosine - largest) / temperature).exp()).collect();
    let total: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= total);
    shares
}

fn length(x: &[f32]) -> f32 {
    dot(x, x).sqrt().max(EPS)
}

/// Σ a b in several sums beside each other, which is faster and more exact than one.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_head, a_tail) = a.as_chunks::<LANES>();
    let (b_head, b_tail) = b.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in a_head.iter().zip(b_head) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same in f64 by sorting everything.
    fn reference(query: &[f32], gallery: &[f32], k: usize) -> Vec<usize> {
        let length = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(1e-12);
        let cosine = |row: &[f32]| {
            let dot: f64 = row.iter().zip(query).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            dot / length(row) / length(query)
        };
        let cosines: Vec<f64> = gallery.chunks_exact(query.len()).map(cosine).collect();
        let mut order: Vec<usize> = (0..cosines.len()).collect();
        order.sort_by(|&a, &b| cosines[b].total_cmp(&cosines[a]));
        order.truncate(k);
        order
    }

    #[test]
    fn finds_what_sorting_finds() {
        for width in [1, 2, 15, 16, 17, 33] {
            let gallery: Vec<f32> = (0..width * 40).map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32)).collect();
            let query: Vec<f32> = (0..width).map(|i| (i as f32 * 1.1).cos()).collect();
            for k in [0, 1, 5, 39, 40, 99] {
                let found = nearest(&query, &gallery, k);
                if width > 1 {
                    let places: Vec<usize> = found.iter().map(|&(place, _)| place).collect();
                    assert_eq!(places, reference(&query, &gallery, k), "width {width}, k {k}");
                }
                assert_eq!(found.len(), k.min(40));
                assert!(found.is_sorted_by(|a, b| a.1 >= b.1));
                assert!(found.iter().all(|(_, cosine)| cosine.abs() < 1.0 + 1e-6));
            }
        }
    }

    #[test]
    fn zero_is_near_to_nothing_and_nan_is_last() {
        let gallery = [0.0, 0.0, f32::NAN, 1.0, 3.0, 4.0, 3.0, 4.0];
        let found = nearest(&[3.0, 4.0], &gallery, 4);
        assert_eq!(found[..3], [(2, 1.0), (3, 1.0), (0, 0.0)]);
        assert_eq!(found[3].0, 1);
        assert_eq!(cosines(&[0.0, 0.0], &[1.0, 0.0]), [0.0]);
    }

    #[test]
    fn shares_are_a_softmax() {
        let shares = shares(&[0.5, -0.2, 0.5, 0.0], 0.07);
        assert!((shares.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(shares[0], shares[2]);
        assert!((f64::from(shares[3] / shares[0]).ln() + 0.5 / 0.07).abs() < 1e-4);
        for temperature in [f32::from_bits(1), 1e-40, 1e-30, f32::MAX] {
            let shares = super::shares(&[0.9, -0.5, 0.9], temperature);
            assert!(
                shares.iter().all(|share| share.is_finite()) && shares[0] == shares[2],
                "{temperature}: {shares:?}"
            );
            assert!((shares.iter().sum::<f32>() - 1.0).abs() < 1e-6, "{temperature}");
        }
    }
}
