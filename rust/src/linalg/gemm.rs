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
    for i in 0..m {
        for j in 0..n {
            let sum: f32 = (0..k)
                .map(|l| {
                    lhs.data[i * lhs.row_stride + l * lhs.col_stride]
                        * rhs.data[l * rhs.row_stride + j * rhs.col_stride]
                })
                .sum();
            let dst = &mut dst[i * row_stride + j];
            *dst = alpha * sum + if accumulate { *dst } else { 0.0 };
        }
    }
}
