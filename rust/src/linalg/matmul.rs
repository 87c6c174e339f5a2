//! y = x Wᵀ, row-major as they lie: both factors are read along K, so that nothing has to be packed and 16-bit weights are
//! widened in registers.
//!
//! A tile of rows of W times a few rows of x is summed in registers. The order in which a number of y is summed depends on K
//! and the instruction set alone: it is the same bits for any other rows of x, and for any number of threads.

use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::simd::{InstructionSet, Kernel, Simd};

/// Products of this many inputs are summed at a time: eight rows of W then stay in the first-level cache.
const BLOCK_K: usize = 1024;
/// Rows of x at a time where there are many: such a block stays in the second-level cache. A multiple of the tile's.
const BLOCK_T: usize = 96;
/// Numbers of x that stay in the second-level cache.
const CACHED: usize = BLOCK_T * BLOCK_K;
/// Multiplications that are worth another task.
const TASK: usize = 1 << 18;
/// Rows of W in the largest tile.
const TILE_ROWS: usize = 8;

/// A type of weights, widened as it is read.
pub(crate) trait Weight: Copy + Default + Sync {
    /// Reads `S::LANES` weights.
    ///
    /// # Safety
    /// `from` is valid for reads of `S::LANES` weights.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::Vector;
}

macro_rules! weight {
    ($type:ty, $load:ident) => {
        impl Weight for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::Vector {
                // SAFETY: the caller's promise.
                unsafe { simd.$load(from) }
            }
        }
    };
}
weight!(f32, load_f32);
weight!(f16, load_f16);
weight!(bf16, load_bf16);

/// y (T, M) = x (T, K) Wᵀ for `weights` (M, K); overwrites y. Runs on the current thread pool.
///
/// # Panics
/// If the lengths do not fit each other.
pub(crate) fn matmul<W: Weight>(
    set: InstructionSet,
    weights: &[W],
    x: &[f32],
    y: &mut [f32],
    rows: usize,
    cols: usize,
) {
    assert_eq!(weights.len(), rows * cols, "a matrix has rows * cols weights");
    if rows == 0 {
        return assert!(y.is_empty(), "no output has no numbers");
    }
    assert_eq!(y.len() % rows, 0, "y has whole rows");
    let tokens = y.len() / rows;
    assert_eq!(x.len(), tokens * cols, "x and y have as many rows");
    if cols == 0 {
        return y.fill(0.0);
    }
    let product = Product { weights, x, y: Output(y.as_mut_ptr()), rows, cols };
    let (block_t, block_k) = if x.len() <= CACHED { (tokens, cols) } else { (BLOCK_T, BLOCK_K) };
    for k in blocks(0..cols, block_k) {
        for t in blocks(0..tokens, block_t) {
            let task_rows = (TASK / (t.len() * k.len())).next_multiple_of(TILE_ROWS).max(TILE_ROWS);
            let tasks = rows.div_ceil(task_rows);
            let run = |task: usize| {
                let rows = task * task_rows..rows.min((task + 1) * task_rows);
                set.run(Part { product: &product, rows, tokens: t.clone(), k: k.clone() });
            };
            if tasks == 1 { run(0) } else { (0..tasks).into_par_iter().for_each(run) }
        }
    }
}

/// `range` cut into ranges of `size`; the last may be shorter.
fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(size.max(1)).map(move |start| start..range.end.min(start + size))
}

/// Operands whose sizes [`matmul`] has checked.
struct Product<'a, W> {
    weights: &'a [W],
    x: &'a [f32],
    y: Output,
    rows: usize,
    cols: usize,
}

/// Where y lies: tasks write columns of their own.
struct Output(*mut f32);

// SAFETY: tasks that run at the same time write different columns of y, see `Part::tile`.
unsafe impl Sync for Output {}

/// The share of a task: some outputs of some tokens, of the inputs `k`; adds to y unless `k` starts at 0.
struct Part<'a, W> {
    product: &'a Product<'a, W>,
    rows: Range<usize>,
    tokens: Range<usize>,
    k: Range<usize>,
}

impl<W: Weight> Kernel for Part<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // As many sums as there are registers for.
        match S::LANES {
            16 => self.tiles::<S, 8, 3>(simd),
            8 => self.tiles::<S, 4, 3>(simd),
            _ => self.tiles::<S, 4, 2>(simd),
        }
    }
}

impl<W: Weight> Part<'_, W> {
    #[inline(always)]
    fn tiles<S: Simd, const R: usize, const C: usize>(&self, simd: S) {
        let mut row = self.rows.start;
        while row + R <= self.rows.end {
            self.tile_row::<S, R, C>(simd, row);
            row += R;
        }
        while row < self.rows.end {
            self.tile_row::<S, 1, C>(simd, row);
            row += 1;
        }
    }

    /// The tiles of `R` rows of W, for all tokens.
    #[inline(always)]
    fn tile_row<S: Simd, const R: usize, const C: usize>(&self, simd: S, row: usize) {
        for k in blocks(self.k.clone(), BLOCK_K) {
            let mut token = self.tokens.start;
            while token + C <= self.tokens.end {
                self.tile::<S, R, C>(simd, row, token, k.clone());
                token += C;
            }
            match self.tokens.end - token {
                2 => self.tile::<S, R, 2>(simd, row, token, k),
                1 => self.tile::<S, R, 1>(simd, row, token, k),
                _ => {}
            }
        }
    }

    /// `R` outputs of `C` tokens.
    #[inline(always)]
    fn tile<S: Simd, const R: usize, const C: usize>(&self, simd: S, row: usize, token: usize, k: Range<usize>) {
        let Product { weights, x, y, rows, cols } = self.product;
        let (rows, cols) = (*rows, *cols);
        let weights = &weights[row * cols..(row + R) * cols];
        let x = &x[token * cols..(token + C) * cols];
        let mut sums = [[simd.zero(); R]; C];
        let whole = k.len() / S::LANES * S::LANES;
        for i in (k.start..k.start + whole).step_by(S::LANES) {
            // SAFETY: i + LANES <= k.end <= cols, so that the reads end within the rows, which the slices hold.
            unsafe {
                step::<S, W, R, C>(simd, weights.as_ptr().add(i), cols, x.as_ptr().add(i), cols, &mut sums);
            }
        }
        if whole < k.len() {
            self.tail::<S, R, C>(simd, weights, x, k.start + whole..k.end, &mut sums);
        }
        for (c, sums) in sums.iter().enumerate() {
            let sums = totals(simd, sums);
            for (r, sum) in sums.into_iter().enumerate() {
                // SAFETY: token + c is one of T tokens and row + r one of M outputs, so that this lies in y; no other task
                // that runs at this time has these outputs, and `matmul` has y borrowed exclusively.
                unsafe {
                    let y = y.0.add((token + c) * rows + row + r);
                    *y = if k.start == 0 { sum } else { *y + sum };
                }
            }
        }
    }

    /// The last inputs, fewer than a vector has lanes, filled up with zeros.
    #[inline(always)]
    fn tail<S: Simd, const R: usize, const C: usize>(
        &self,
        simd: S,
        weights: &[W],
        x: &[f32],
        k: Range<usize>,
        sums: &mut [[S::Vector; R]; C],
    ) {
        const MOST: usize = 16;
        let mut last_weights = [[W::default(); MOST]; R];
        let mut last_x = [[0.0; MOST]; C];
        for (to, from) in last_weights.iter_mut().zip(weights.chunks_exact(self.product.cols)) {
            to[..k.len()].copy_from_slice(&from[k.clone()]);
        }
        for (to, from) in last_x.iter_mut().zip(x.chunks_exact(self.product.cols)) {
            to[..k.len()].copy_from_slice(&from[k.clone()]);
        }
        // SAFETY: the arrays have rows of 16 numbers, and no vector has more lanes.
        unsafe {
            step::<S, W, R, C>(simd, last_weights.as_ptr().cast(), MOST, last_x.as_ptr().cast(), MOST, sums);
        }
    }
}

/// Adds the products of one vector of each of `R` rows of W and each of `C` rows of x.
///
/// # Safety
/// `weights + r * weights_stride` for r < R and `x + c * x_stride` for c < C are valid for reads of `S::LANES` numbers.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "with constant indices the sums stay in registers")]
unsafe fn step<S: Simd, W: Weight, const R: usize, const C: usize>(
    simd: S,
    weights: *const W,
    weights_stride: usize,
    x: *const f32,
    x_stride: usize,
    sums: &mut [[S::Vector; R]; C],
) {
    let mut inputs = [simd.zero(); C];
    for (c, input) in inputs.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *input = unsafe { simd.load_f32(x.add(c * x_stride)) };
    }
    for r in 0..R {
        // SAFETY: the caller's promise.
        let weight = unsafe { W::load(simd, weights.add(r * weights_stride)) };
        for c in 0..C {
            sums[c][r] = simd.mul_add(weight, inputs[c], sums[c][r]);
        }
    }
}

/// The sums of the lanes of each vector.
#[inline(always)]
fn totals<S: Simd, const R: usize>(simd: S, vectors: &[S::Vector; R]) -> [f32; R] {
    let mut totals = [0.0; R];
    for (totals, vectors) in totals.chunks_mut(4).zip(vectors.chunks(4)) {
        let mut four = [simd.zero(); 4];
        four[..vectors.len()].copy_from_slice(vectors);
        totals.copy_from_slice(&simd.sums(four)[..vectors.len()]);
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in -1..1 that look random.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from_bits(state >> 9 | 0x3f80_0000) * 2.0 - 3.0
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn threads(count: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap()
    }

    /// Checks y, and how far it may be from a sum in f64: a few roundings of the largest partial sum.
    fn check<W: Weight>(set: InstructionSet, wide: impl Fn(W) -> f32, weights: &[W], x: &[f32], sizes: [usize; 3]) {
        let [tokens, cols, rows] = sizes;
        let mut y = vec![f32::NAN; tokens * rows];
        matmul(set, weights, x, &mut y, rows, cols);
        for t in 0..tokens {
            for m in 0..rows {
                let (mut sum, mut size) = (0.0_f64, 0.0_f64);
                for k in 0..cols {
                    let product = f64::from(x[t * cols + k]) * f64::from(wide(weights[m * cols + k]));
                    sum += product;
                    size += product.abs();
                }
                let error = (f64::from(y[t * rows + m]) - sum).abs();
                assert!(error <= 1e-6 * size, "{} {sizes:?} at ({t}, {m}): off by {error:e}", set.name());
            }
        }
    }

    fn check_all_types(sizes: [usize; 3]) {
        let [tokens, cols, rows] = sizes;
        // One number more, so that the slices can start off the alignment of any vector.
        let weights = noise(rows * cols + 1, 1);
        let x = &noise(tokens * cols + 1, 2)[1..];
        let f16s: Vec<f16> = weights.iter().map(|&w| f16::from_f32(w)).collect();
        let bf16s: Vec<bf16> = weights.iter().map(|&w| bf16::from_f32(w)).collect();
        for set in InstructionSet::available() {
            check(set, |w: f32| w, &weights[1..], x, sizes);
            check(set, f16::to_f32, &f16s[1..], x, sizes);
            check(set, bf16::to_f32, &bf16s[1..], x, sizes);
        }
    }

    #[test]
    fn is_the_product_at_awkward_sizes() {
        for cols in [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025] {
            for rows in [0, 1, 7, 8, 9, 12] {
                for tokens in [0, 1, 2, 3, 5] {
                    check_all_types([tokens, cols, rows]);
                }
            }
        }
    }

    #[test]
    fn is_the_product_where_it_is_cut_into_blocks() {
        check_all_types([2, 2050, 600]);
        check_all_types([BLOCK_T + 2, BLOCK_K + 9, 19]);
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads() {
        for set in InstructionSet::available() {
            for (tokens, cols, rows) in [(7, 300, 1500), (BLOCK_T + 5, 1100, 37)] {
                let (weights, x) = (noise(rows * cols, 3), noise(tokens * cols, 4));
                let mut y = vec![0.0; tokens * rows];
                threads(1).install(|| matmul(set, &weights, &x, &mut y, rows, cols));
                for count in [2, 3] {
                    let mut again = vec![0.0; tokens * rows];
                    threads(count).install(|| matmul(set, &weights, &x, &mut again, rows, cols));
                    assert_eq!(again, y, "{count} threads");
                }
                for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact(rows)) {
                    let mut alone = vec![0.0; rows];
                    matmul(set, &weights, x, &mut alone, rows, cols);
                    assert_eq!(alone, y);
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_row() {
        for set in InstructionSet::available() {
            let mut weights = vec![1.0; 3 * 18];
            (weights[17], weights[20]) = (f32::NAN, f32::INFINITY);
            let mut y = [0.0; 6];
            matmul(set, &weights, &[vec![1.0; 18], vec![-2.0; 18]].concat(), &mut y, 3, 18);
            assert!(y[0].is_nan() && y[3].is_nan());
            assert_eq!([y[1], y[2], y[4], y[5]], [f32::INFINITY, 18.0, f32::NEG_INFINITY, -36.0]);
        }
    }

    #[test]
    fn denormal_weights_count() {
        for set in InstructionSet::available() {
            let mut y = [0.0];
            matmul(set, &[f16::from_bits(1); 17], &[1.0; 17], &mut y, 1, 17);
            assert_eq!(y[0], 17.0 * 2.0_f32.powi(-24));
            matmul(set, &[bf16::from_bits(1); 17], &[1024.0; 17], &mut y, 1, 17);
            assert_eq!(y[0], 17.0 * f32::from_bits(1 << 16) * 1024.0);
        }
    }
}
