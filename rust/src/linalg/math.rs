//! Elementwise functions.

use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// 1 / (1 + e^-x), without overflow.
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// x sigmoid(x).
pub(crate) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// ln(1 + e^x); above 20 it is x, as in PyTorch.
pub(crate) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// x = e^x.
pub(crate) fn exp_slice(x: &mut [f32]) {
    for x in x {
        *x = x.exp();
    }
}

/// x = sigmoid(x).
pub(crate) fn sigmoid_slice(x: &mut [f32]) {
    for x in x {
        *x = sigmoid(*x);
    }
}

/// x = softplus(x).
pub(crate) fn softplus_slice(x: &mut [f32]) {
    for x in x {
        *x = softplus(*x);
    }
}

/// x = tanh(x).
pub(crate) fn tanh_slice(x: &mut [f32]) {
    for x in x {
        *x = x.tanh();
    }
}

/// y = y silu(z), element by element; both of the same length.
pub(crate) fn silu_gate(y: &mut [f32], z: &[f32]) {
    for (y, &z) in y.iter_mut().zip(z) {
        *y *= silu(z);
    }
}

/// x = x Φ(x) with the normal distribution function Φ itself (erf), not its tanh approximation.
pub(crate) fn gelu(x: &mut [f32]) {
    for x in x {
        *x = 0.5 * *x * (1.0 + erf(*x * FRAC_1_SQRT_2));
    }
}

/// The error function: the rational approximation of Eigen and XLA, exact to a few units in the last place.
fn erf(x: f32) -> f32 {
    /// Beyond it erf is 1 in f32.
    const LIMIT: f32 = 3.832_507;
    let x = x.clamp(-LIMIT, LIMIT);
    let x2 = x * x;
    let numerator = [0.003_408_291, 0.050_955_695, 0.185_208_32, FRAC_2_SQRT_PI]
        .iter()
        .fold(0.000_229_050_66_f32, |sum, c| sum * x2 + c);
    let denominator = [2.354_796_6e-5, 1.017_962_5e-3, 0.014_070_47, 0.110_985_05, 0.497_469_25, 1.0]
        .iter()
        .fold(-1.179_160_3e-7_f32, |sum, c| sum * x2 + c);
    x * numerator / denominator
}

/// Softmax of every row of x (T, `cols`), in place.
pub(crate) fn softmax_rows(x: &mut [f32], cols: usize) {
    if cols == 0 {
        return;
    }
    for row in x.chunks_exact_mut(cols) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for x in row.iter_mut() {
            *x = (*x - max).exp();
        }
        let scale = 1.0 / row.iter().sum::<f32>();
        for x in row {
            *x *= scale;
        }
    }
}

/// sin and cos of every angle in `theta` (radians, of magnitude up to 1e4); all three of the same length.
pub(crate) fn sin_cos(theta: &[f32], sin: &mut [f32], cos: &mut [f32]) {
    for ((theta, sin), cos) in theta.iter().zip(sin).zip(cos) {
        (*sin, *cos) = theta.sin_cos();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The Taylor series of erf in f64: good to 1e-9 up to |x| = 4.
    fn erf_series(x: f64) -> f64 {
        let mut term = x;
        let mut sum = x;
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn gelu_is_the_exact_one() {
        for i in -6000..=6000_i16 {
            let x = f32::from(i) / 1000.0;
            let mut y = [x];
            gelu(&mut y);
            let wanted =
                0.5 * f64::from(x) * (1.0 + erf_series(f64::from(x) / std::f64::consts::SQRT_2).clamp(-1.0, 1.0));
            assert!(
                (f64::from(y[0]) - wanted).abs() < 3e-7 * (1.0 + f64::from(x.abs())),
                "gelu({x}) = {}, not {wanted}",
                y[0]
            );
        }
    }

    #[test]
    fn softmax_of_large_and_of_masked_scores() {
        let mut x = [1000.0, 1000.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0];
        softmax_rows(&mut x, 3);
        assert_eq!(x, [0.5, 0.5, 0.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]);
    }
}
