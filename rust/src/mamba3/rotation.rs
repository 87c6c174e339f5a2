//! The rotation that makes the state complex-valued.

use std::{f32, f64};

/// 2 pi in two parts: multiples of the first, up to 2^15 of them, are exact.
const TAU_HIGH: f32 = 6.281_25;
const TAU_LOW: f32 = 1.935_307_2e-3;
/// Adding it to a small number and taking it away again rounds to the nearest integer.
const ROUNDER: f32 = 12_582_912.0;
/// Up to this step size angles are reduced in f32. An angle moves by at most pi times the step size.
const MAX_SHORT_STEP: f32 = 1e4;

/// The order of the N state dimensions in which rotated pairs are two contiguous halves: the first of all pairs, the
/// second of all pairs, then the dimensions that do not turn. A product of Q and K does not depend on the order.
pub(super) struct Order(Vec<usize>);

impl Order {
    /// The pairs are (2i, 2i + 1) where `interleaved`, else (i, i + N/2), for i < S.
    pub(super) fn new(d_state: usize, n_angles: usize, interleaved: bool) -> Order {
        let (stride, second) = if interleaved { (2, 1) } else { (1, d_state / 2) };
        let firsts = (0..n_angles).map(|i| stride * i);
        let mut order: Vec<usize> = firsts.clone().chain(firsts.map(|i| i + second)).collect();
        let mut turns = vec![false; d_state];
        for &i in &order {
            turns[i] = true;
        }
        order.extend((0..d_state).filter(|&i| !turns[i]));
        Order(order)
    }

    /// Brings the N numbers of `from` into the order.
    pub(super) fn apply(&self, from: &[f32], to: &mut [f32]) {
        for (to, &i) in to.iter_mut().zip(&self.0) {
            *to = from[i];
        }
    }

    /// Brings every N numbers of a weight into the order.
    pub(super) fn applied(&self, weight: &[f32]) -> Vec<f32> {
        weight.chunks_exact(self.0.len()).flat_map(|row| self.0.iter().map(|&i| row[i])).collect()
    }

    /// Brings every N numbers back into the order of the weights.
    pub(super) fn undone(&self, ordered: &[f32]) -> Vec<f32> {
        let mut natural = vec![0.0; ordered.len()];
        for (row, natural) in ordered.chunks_exact(self.0.len()).zip(natural.chunks_exact_mut(self.0.len())) {
            for (&x, &i) in row.iter().zip(&self.0) {
                natural[i] = x;
            }
        }
        natural
    }
}

/// theta_after = theta + dt omega in [-pi, pi], up to rounding; all of length S, omega within pi of zero.
pub(super) fn advance(theta: &[f32], omega: &[f32], dt: f32, after: &mut [f32]) {
    if dt > MAX_SHORT_STEP {
        for ((after, &theta), &omega) in after.iter_mut().zip(theta).zip(omega) {
            let turned = (f64::from(theta) + f64::from(dt) * f64::from(omega)) % f64::consts::TAU;
            *after = reduce(turned as f32);
        }
        return;
    }
    for ((after, &theta), &omega) in after.iter_mut().zip(theta).zip(omega) {
        *after = reduce(theta + dt * omega);
    }
}

/// `angle` without its whole turns.
fn reduce(angle: f32) -> f32 {
    let turns = (angle * (1.0 / f32::consts::TAU) + ROUNDER) - ROUNDER;
    (angle - turns * TAU_HIGH) - turns * TAU_LOW
}

/// Turns the S pairs of x (N), which stands in [`Order`], by angles of which `sin` and `cos` (S) are given.
pub(super) fn turn(x: &mut [f32], sin: &[f32], cos: &[f32]) {
    let (first, rest) = x.split_at_mut(sin.len());
    for (((first, second), sin), cos) in first.iter_mut().zip(rest).zip(sin).zip(cos) {
        (*first, *second) = (*first * cos - *second * sin, *first * sin + *second * cos);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_pairs() {
        assert_eq!(Order::new(7, 1, true).0, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(Order::new(8, 2, true).0, [0, 2, 1, 3, 4, 5, 6, 7]);
        assert_eq!(Order::new(8, 2, false).0, [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(Order::new(8, 4, false).0, [0, 1, 2, 3, 4, 5, 6, 7]);
        let order = Order::new(8, 2, true);
        let x: Vec<f32> = (0..16_u8).map(f32::from).collect();
        assert_eq!(order.undone(&order.applied(&x)), x);
    }

    #[test]
    fn angles_stay_within_half_a_turn_and_on_the_circle() {
        let omega = [-3.1, -1.0, 0.0, 0.3, 3.1];
        for dt in [0.0, 1e-3, 0.7, 5.0, 900.0, 2e4, 3e6, 1e30, f32::MAX] {
            let theta = [-3.1, -0.2, 0.0, 1.9, 3.1];
            let mut after = [0.0; 5];
            advance(&theta, &omega, dt, &mut after);
            for ((&after, &theta), &omega) in after.iter().zip(&theta).zip(&omega) {
                assert!(after.abs() < f32::consts::PI + 1e-5, "{after} after a step of {dt}");
                let exact = f64::from(theta) + f64::from(dt) * f64::from(omega);
                // the sum itself is rounded to 24 bits up to the short step's limit
                let rounding = if dt > MAX_SHORT_STEP { 1e-6 } else { 1e-6 + exact.abs() * 1.2e-7 };
                if exact.abs() < 1e8 {
                    assert!(((exact - f64::from(after)) / 2.0).sin().abs() < rounding, "{exact} became {after}");
                }
            }
        }
    }
}
