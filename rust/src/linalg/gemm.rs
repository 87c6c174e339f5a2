//! The matrix product of small strided matrices: what heads and chunks need, on one thread.

/// A matrix of f32 somewhere in a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> View<'a> {
    /// Rows of `row_stride` numbers each, of which a product reads the first.
    pub(crate) fn rows(data: &'a [f32], row_stride: usize) -> View<'a> {
        View { data, row_stride, col_stride: 1 }
    }

    /// The same matrix transposed.
    pub(crate) fn transposed(self) -> View<'a> {
        View { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0 || cols == 0 || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// dst (m, n) = alpha lhs (m, k) rhs (k, n), or dst += that where `accumulate` is set.
///
/// Row i of dst starts at `dst[i * row_stride]`; numbers between the rows stay as they are. Runs on the calling thread.
///
/// # Panics
/// If a matrix does not fit its slice, or rows of dst overlap.
#[expect(clippy::too_many_arguments, reason = "the arguments of a BLAS product, in their usual order")]
pub(crate) fn product(
    dst: &mut [f32],
    row_stride: usize,
    m: usize,
    n: usize,
    k: usize,
    lhs: View<'_>,
    rhs: View<'_>,
    alpha: f32,
    accumulate: bool,
) {
    assert!(lhs.holds(m, k) && rhs.holds(k, n), "a factor does not fit its slice");
    assert!(m <= 1 || n <= row_stride, "rows of the result overlap");
    assert!(m == 0 || n == 0 || (m - 1) * row_stride + n <= dst.len(), "the result does not fit its slice");
    if m == 0 || n == 0 {
        return;
    }
    let stride =
        |stride: usize| isize::try_from(stride).expect("an index into a slice, or an unused stride, fits isize");
    // SAFETY: each factor and the result lie in their slices, as asserted above, and the result is borrowed exclusively.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride(row_stride),
            accumulate,
            lhs.data.as_ptr(),
            stride(lhs.col_stride),
            stride(lhs.row_stride),
            rhs.data.as_ptr(),
            stride(rhs.col_stride),
            stride(rhs.row_stride),
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix as rows of its own.
    fn dense(view: View<'_>, rows: usize, cols: usize) -> Vec<Vec<f32>> {
        let at = |i, j| view.data[i * view.row_stride + j * view.col_stride];
        (0..rows).map(|i| (0..cols).map(|j| at(i, j)).collect()).collect()
    }

    #[test]
    fn is_the_product_of_strided_matrices() {
        let numbers: Vec<f32> = (0..9000_u16).map(|i| f32::from(i % 101 * 37 % 101) / 50.0 - 1.0).collect();
        for (m, n, k) in [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (1, 9, 5), (9, 1, 5), (7, 8, 2), (17, 33, 65)] {
            let rows = |stride| View::rows(&numbers, stride);
            for lhs in [rows(k + 3), rows(m + 1).transposed()] {
                for rhs in [rows(n), rows(k + 2).transposed()] {
                    for (alpha, accumulate) in [(1.0, false), (0.5, true), (-2.0, false)] {
                        let row_stride = n + 2;
                        let mut dst = vec![3.0; m * row_stride];
                        product(&mut dst, row_stride, m, n, k, lhs, rhs, alpha, accumulate);
                        let (lhs, rhs) = (dense(lhs, m, k), dense(rhs, k, n));
                        for (i, row) in dst.chunks_exact(row_stride).enumerate() {
                            for (j, &found) in row[..n].iter().enumerate() {
                                let sum: f32 = (0..k).map(|l| lhs[i][l] * rhs[l][j]).sum();
                                let wanted = alpha * sum + if accumulate { 3.0 } else { 0.0 };
                                assert!((found - wanted).abs() < 1e-4, "({m}, {n}, {k}) at ({i}, {j})");
                            }
                            assert_eq!(row[n..], [3.0; 2], "({m}, {n}, {k}): outside of the result");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a factor does not fit its slice")]
    fn a_factor_that_is_too_short_is_refused() {
        let view = View::rows(&[1.0; 5], 3);
        product(&mut [0.0; 4], 2, 2, 2, 3, view, View::rows(&[1.0; 6], 2), 1.0, false);
    }

    #[test]
    #[should_panic(expected = "the result does not fit its slice")]
    fn a_result_that_is_too_short_is_refused() {
        product(&mut [0.0; 3], 2, 2, 2, 1, View::rows(&[1.0; 2], 1), View::rows(&[1.0; 2], 2), 1.0, false);
    }
}
