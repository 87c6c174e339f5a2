//! Drawing a token: temperature, top-k, top-p.

use super::GenerationConfig;

/// The token that the uniform number `u` in [0, 1) picks from `logits` (V,).
///
/// Temperature first, then the `top_k` most probable tokens, then the fewest of those whose share of what is left
/// reaches `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751).
pub(super) fn draw(logits: &[f32], u: f32, config: &GenerationConfig) -> usize {
    let order = candidates(logits, config);
    let largest = order.iter().map(|&token| logits[token]).fold(f32::NEG_INFINITY, f32::max);
    // f64: dividing by a tiny temperature stays finite, or becomes the -inf of a probability of 0
    let weights: Vec<f64> =
        order.iter().map(|&token| (f64::from(logits[token] - largest) / config.temperature).exp()).collect();
    let kept = config.top_p.map_or(weights.len(), |top_p| nucleus(&weights, top_p));
    let threshold = f64::from(u) * weights[..kept].iter().sum::<f64>();
    let mut mass = 0.0;
    let position = weights[..kept].iter().position(|weight| {
        mass += weight;
        mass > threshold
    });
    order[position.unwrap_or(0)] // the whole sum is above the threshold, because u is below 1
}

/// The tokens to draw from; where there is a limit, the most probable first, of equal ones the first.
fn candidates(logits: &[f32], config: &GenerationConfig) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let by_probability = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    if let Some(k) = config.top_k.filter(|&k| k < order.len()) {
        order.select_nth_unstable_by(k, by_probability);
        order.truncate(k);
    }
    if config.top_k.is_some() || config.top_p.is_some() {
        order.sort_unstable_by(by_probability);
    }
    order
}

/// How many of the weights, largest first, have at least the share `top_p` of all.
fn nucleus(weights: &[f64], top_p: f64) -> usize {
    let total: f64 = weights.iter().sum();
    let mut before = 0.0;
    let kept = weights.iter().take_while(|&&weight| {
        let is_kept = before / total < top_p && weight > 0.0;
        before += weight;
        is_kept
    });
    kept.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::Method;

    fn config() -> GenerationConfig {
        GenerationConfig { method: Method::Sample, ..Default::default() }
    }

    /// Probabilities 0.4, 0.3, 0.2, 0.1 at the places 2, 0, 3, 1.
    fn logits() -> Vec<f32> {
        [0.3_f32, 0.1, 0.4, 0.2].map(f32::ln).to_vec()
    }

    fn at(points: &[f32], config: &GenerationConfig) -> Vec<usize> {
        points.iter().map(|&u| draw(&logits(), u, config)).collect()
    }

    #[test]
    fn picks_by_probability() {
        let points = [0.0, 0.29, 0.31, 0.39, 0.41, 0.79, 0.81, 0.999_999_9];
        assert_eq!(at(&points, &config()), [0, 0, 1, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn top_k_and_top_p_leave_the_most_probable() {
        let top_k = GenerationConfig { top_k: Some(2), ..config() };
        assert_eq!(at(&[0.0, 0.57, 0.58, 0.99], &top_k), [2, 2, 0, 0]); // 4/7 and 3/7
        let top_p = GenerationConfig { top_p: Some(0.75), ..config() };
        assert_eq!(at(&[0.0, 0.44, 0.45, 0.77, 0.78, 0.99], &top_p), [2, 2, 0, 0, 3, 3]); // 4/9, 3/9, 2/9
        let tiny = GenerationConfig { top_p: Some(1e-9), ..config() };
        assert_eq!(at(&[0.0, 0.99], &tiny), [2, 2]);
        let all = GenerationConfig { top_k: Some(9), ..config() };
        assert_eq!(at(&[0.39, 0.41, 0.71, 0.91], &all), [2, 0, 3, 1]);
        // of the two that top-k leaves, the first has 4/7 of what is left
        let both = GenerationConfig { top_k: Some(2), top_p: Some(0.5), ..config() };
        assert_eq!(at(&[0.0, 0.99], &both), [2, 2]);
    }

    #[test]
    fn a_low_temperature_is_greedy_and_a_high_one_is_even() {
        let cold = GenerationConfig { temperature: 1e-300, ..config() };
        assert_eq!(at(&[0.0, 0.999_999_9], &cold), [2, 2]);
        let hot = GenerationConfig { temperature: 1e9, ..config() };
        assert_eq!(at(&[0.24, 0.26, 0.51, 0.76], &hot), [0, 1, 2, 3]);
    }
}
