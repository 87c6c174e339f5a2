//! Reductions in several lanes: what a vector adds side by side, and more exact than one sum after the other.

const LANES: usize = 32;

/// The sum of f(x) over `x`; lane i has the numbers i, i + 32, i + 64, ...
#[inline(always)]
pub(super) fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    tree(lanes, |a, b| a + b)
}

/// The largest number of `x`, or minus infinity; NaN counts as none.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(*x);
    }
    tree(lanes, f32::max)
}

/// Folds the second half of the lanes onto the first until one is left.
#[inline(always)]
fn tree(mut lanes: [f32; LANES], fold: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = fold(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
