//! Elementary functions of one number without a branch, so that a loop over them becomes vector instructions.
//!
//! The approximations are those of Cephes (exp, sine and cosine) and Eigen (tanh, erf), good to a few units in the last place.

use std::f32::consts::{FRAC_2_PI, FRAC_2_SQRT_PI, LOG2_E};

use super::simd::{Simd, mul_add};

/// Adding it to a number of magnitude up to 2^22 rounds to an integer, which then stands in the last bits.
const ROUND: f32 = 12_582_912.0;

/// The integer nearest to x, as a number and as an integer.
#[inline(always)]
fn round(x: f32) -> (f32, i32) {
    let shifted = x + ROUND;
    (shifted - ROUND, shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed())
}

/// c[0] + c[1] x + c[2] x² + ...
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut sum = 0.0;
    for c in c.iter().rev() {
        sum = mul_add::<S>(sum, x, *c);
    }
    sum
}

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(n.wrapping_add(127).cast_unsigned() << 23)
}

/// e^x.
#[inline(always)]
pub(super) fn exp<S: Simd>(x: f32) -> f32 {
    // ln 2 in two parts, the first so short that its product with an exponent is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Outside, e^x is infinite or 0.
    let x = x.clamp(-104.0, 89.0);
    let (n, exponent) = round(x * LOG2_E);
    let x = mul_add::<S>(n, -LN_2_LOW, mul_add::<S>(n, -LN_2_HIGH, x));
    let tail = polynomial::<S, 6>(x, [0.5, 0.166_666_65, 4.166_579_6e-2, 8.333_452e-3, 1.398_199_9e-3, 1.987_569_1e-4]);
    let e_x = mul_add::<S>(tail, x * x, x + 1.0);
    // In two steps, of which the second may overflow or become denormal.
    let half = exponent >> 1;
    e_x * power_of_two(half) * power_of_two(exponent - half)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<S>(-x))
}

/// x sigmoid(x).
#[inline(always)]
pub(super) fn silu<S: Simd>(x: f32) -> f32 {
    x / (1.0 + exp::<S>(-x))
}

/// ln(1 + e^x).
#[inline(always)]
pub(super) fn softplus<S: Simd>(x: f32) -> f32 {
    x.max(0.0) + ln_1p::<S>(exp::<S>(-x.abs()))
}

/// ln(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x)) by its Taylor series.
#[inline(always)]
fn ln_1p<S: Simd>(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let terms = [1.0, 1.0 / 3.0, 1.0 / 5.0, 1.0 / 7.0, 1.0 / 9.0, 1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0];
    2.0 * s * polynomial::<S, 8>(s * s, terms)
}

/// The hyperbolic tangent.
#[inline(always)]
pub(super) fn tanh<S: Simd>(x: f32) -> f32 {
    /// Beyond it the tangent is 1 in f32.
    const LIMIT: f32 = 7.905_311;
    /// Below it the tangent is its argument.
    const TINY: f32 = 4e-4;
    let inside = x.clamp(-LIMIT, LIMIT);
    let x2 = inside * inside;
    let numerator = polynomial::<S, 7>(
        x2,
        [4.893_524_6e-3, 6.372_619_3e-4, 1.485_722_4e-5, 5.122_297e-8, -8.604_672e-11, 2.000_188e-13, -2.760_768_5e-16],
    );
    let denominator = polynomial::<S, 4>(x2, [4.893_525e-3, 2.268_434_6e-3, 1.185_347_1e-4, 1.198_258_4e-6]);
    if x.abs() < TINY { x } else { inside * numerator / denominator }
}

/// x Φ(x) with the normal distribution function Φ itself, by way of the error function.
#[inline(always)]
pub(super) fn gelu<S: Simd>(x: f32) -> f32 {
    let half = 0.5 * x;
    mul_add::<S>(half, erf::<S>(x * std::f32::consts::FRAC_1_SQRT_2), half)
}

/// The error function.
#[inline(always)]
fn erf<S: Simd>(x: f32) -> f32 {
    /// Beyond it the function is 1 in f32.
    const LIMIT: f32 = 3.832_507;
    let x = x.clamp(-LIMIT, LIMIT);
    let x2 = x * x;
    let numerator = polynomial::<S, 5>(x2, [FRAC_2_SQRT_PI, 0.185_208_32, 0.050_955_695, 3.408_291e-3, 2.290_506_6e-4]);
    let denominator = polynomial::<S, 7>(
        x2,
        [1.0, 0.497_469_25, 0.110_985_05, 0.014_070_47, 1.017_962_5e-3, 2.354_796_6e-5, -1.179_160_3e-7],
    );
    (x * numerator / denominator).clamp(-1.0, 1.0)
}

/// Sine and cosine for |x| <= 1e4, both to 1e-7; beyond, the error grows with x.
#[inline(always)]
pub(super) fn sin_cos<S: Simd>(x: f32) -> (f32, f32) {
    // pi / 2 in three parts, the first two so short that their products with a number of quarters are exact.
    const PARTS: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];
    let (n, quarter) = round(x * FRAC_2_PI);
    let mut r = x;
    for part in PARTS {
        r = mul_add::<S>(n, -part, r);
    }
    let r2 = r * r;
    let sin = mul_add::<S>(r * r2, polynomial::<S, 3>(r2, [-0.166_666_55, 8.332_161e-3, -1.951_529_6e-4]), r);
    let tail = polynomial::<S, 3>(r2, [4.166_664_6e-2, -1.388_731_6e-3, 2.443_315_7e-5]);
    let cos = mul_add::<S>(r2 * r2, tail, mul_add::<S>(r2, -0.5, 1.0));
    let (sin, cos) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let negated = |x: f32, quarter: i32| f32::from_bits(x.to_bits() ^ (quarter.cast_unsigned() & 2) << 30);
    (negated(sin, quarter), negated(cos, quarter.wrapping_add(1)))
}
