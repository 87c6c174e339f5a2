//! Rotary position embedding in time, row and column, as V-JEPA 2 and 2.1 have it.

use rayon::prelude::*;

use super::pixels::Grid;
use crate::config::{VisionConfig, VisionKind};

/// Base of the geometric series of angles.
const BASE: f32 = 10_000.0;
/// V-JEPA 2.1 counts rows and columns as if every picture had the grid of one of so many pixels.
const PRETRAINED_SIZE: usize = 256;
/// Tokens that one task works on.
const TOKENS: usize = 16;

/// The rotation of every token's queries and keys: x ← x cos + swapped(x) sin within each head, where `swapped` exchanges
/// the numbers of each pair (2i, 2i + 1).
pub(super) struct Rotary {
    head_size: usize,
    /// (N, P).
    cos: Vec<f32>,
    /// (N, P), negative at the first number of each pair.
    sin: Vec<f32>,
}

impl Rotary {
    /// The rotation for the tokens of `grid` and heads of `head_size` P numbers.
    ///
    /// A head is split into three equal parts of even length, turned by the token's time, row and column; what is left
    /// over stays. In a part of length 2n, number j turns by position / 10000^((j mod n) / n): the two numbers of a pair
    /// turn by different angles. That is how V-JEPA 2 was trained. In V-JEPA 2.1 they turn by the same, of floor(j / 2)
    /// in place of j mod n, and the last row and column stand where those of a picture of 256 pixels do.
    pub(super) fn new(config: &VisionConfig, grid: Grid, head_size: usize) -> Rotary {
        let is_21 = config.kind == VisionKind::Vjepa21;
        let last = (PRETRAINED_SIZE / config.patch_size).max(1) - 1;
        let sides = [1, grid.rows, grid.columns];
        let part = 2 * (head_size / 3 / 2);
        let half = part / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / BASE.powf(i as f32 / half as f32)).collect();
        let mut cos = vec![1.0; grid.tokens() * head_size];
        let mut sin = vec![0.0; grid.tokens() * head_size];
        for (n, (cos, sin)) in cos.chunks_exact_mut(head_size).zip(sin.chunks_exact_mut(head_size)).enumerate() {
            for (axis, position) in grid.position(n).into_iter().enumerate() {
                let mut place = position as f32;
                if is_21 && axis > 0 {
                    place = place * last as f32 / sides[axis].saturating_sub(1).max(1) as f32;
                }
                for j in 0..part {
                    let angle = place * frequencies[if is_21 { j / 2 } else { j % half }];
                    let sign = if j % 2 == 0 { -1.0 } else { 1.0 };
                    cos[axis * part + j] = angle.cos();
                    sin[axis * part + j] = sign * angle.sin();
                }
            }
        }
        Rotary { head_size, cos, sin }
    }

    /// Adds `bias` (D) to every row of x (N, D), then rotates each head of it.
    pub(super) fn add_and_rotate(&self, x: &mut [f32], bias: &[f32]) {
        let (width, head_size) = (bias.len(), self.head_size);
        let angles = self.cos.par_chunks(TOKENS * head_size).zip(self.sin.par_chunks(TOKENS * head_size));
        x.par_chunks_mut(TOKENS * width).zip(angles).for_each(|(rows, (cos, sin))| {
            let angles = cos.chunks_exact(head_size).zip(sin.chunks_exact(head_size));
            for (row, (cos, sin)) in rows.chunks_exact_mut(width).zip(angles) {
                for (head, bias) in row.chunks_exact_mut(head_size).zip(bias.chunks_exact(head_size)) {
                    for (x, bias) in head.iter_mut().zip(bias) {
                        *x += bias;
                    }
                    rotate(head, cos, sin);
                }
            }
        });
    }
}

/// Rotates one head; the last number of an odd one has no partner, and stays.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let angles = cos.chunks_exact(2).zip(sin.chunks_exact(2));
    for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(angles) {
        let (first, second) = (pair[0], pair[1]);
        pair[0] = first * cos[0] + second * sin[0];
        pair[1] = second * cos[1] + first * sin[1];
    }
}
