//! The centre square of a picture, resampled as Pillow does it: bicubic (a = -0.5), antialiased, with weights in fixed
//! point and 8 bits between the two passes.
//!
//! Source: `Resample.c` of Pillow. Its result is the definition here, so each step is done in the order and the type in
//! which it is done there; the tests hold it against a plain reference.

/// Bits after the binary point of a weight: 8 of the result and 2 for negative sums and overshoot are left of 32.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// The centre square of interleaved RGB pixels (height, width, 3), shorter side resized to `size`.
///
/// The square may start at half a pixel; rows are resampled first, then columns. Only what the square needs is touched.
///
/// Returns (size, size, 3), interleaved. `width`, `height` and `size` are at least 1.
pub(super) fn centre_square(rgb: &[u8], width: usize, height: usize, size: usize) -> Vec<u8> {
    let side = width.min(height);
    let columns = Weights::new(&Span::centre(width, side, size), side, size);
    let rows = Weights::new(&Span::centre(height, side, size), side, size);

    let (top, bottom) = rows.source_range();
    let mut narrow = vec![0; (bottom - top) * size * 3];
    for (source, target) in
        rgb.chunks_exact(width * 3).skip(top).zip(narrow.chunks_exact_mut(size * 3)).take(bottom - top)
    {
        resample_row(source, target, &columns);
    }
    let mut square = vec![0; size * size * 3];
    let mut sums = vec![0; size * 3];
    for (target, (first, weights)) in square.chunks_exact_mut(size * 3).zip(rows.iter()) {
        let source = narrow.chunks_exact(size * 3).skip(first - top);
        resample_column(source, weights, &mut sums, target);
    }
    square
}

/// The middle of an axis and the pixels around it that the filter may see.
struct Span {
    /// First pixel that is needed, and one past the last.
    first: usize,
    end: usize,
    /// Where the middle starts, counted from `first`; a whole number or a half.
    start: f64,
}

impl Span {
    fn centre(length: usize, side: usize, size: usize) -> Self {
        let reach = 2 * side.div_ceil(size) + 1;
        let beside = length - side;
        let first = (beside / 2).saturating_sub(reach);
        let end = length.min(beside.div_ceil(2) + side + reach);
        // at most MAX_PIXELS, so exact in f64
        Self { first, end, start: (beside - 2 * first) as f64 / 2.0 }
    }
}

/// For each output pixel of an axis the first input pixel and the weights from there on.
struct Weights {
    bounds: Vec<(usize, usize)>,
    /// (outputs, `stride`), of which the first `bounds.1` of each row count.
    weights: Vec<i32>,
    stride: usize,
}

impl Weights {
    /// `precompute_coeffs` and `normalize_coeffs_8bpc`.
    fn new(span: &Span, side: usize, size: usize) -> Self {
        let scale = side as f64 / size as f64;
        let filter_scale = scale.max(1.0);
        let support = 2.0 * filter_scale;
        let inverse_scale = 1.0 / filter_scale;
        // float to integer conversions saturate: a negative bound is 0
        let stride = support.ceil() as usize * 2 + 1;
        let length = span.end - span.first;
        let mut bounds = Vec::with_capacity(size);
        let mut weights = vec![0; size * stride];
        let mut exact = vec![0.0; stride];
        for (output, fixed) in weights.chunks_exact_mut(stride).enumerate() {
            let centre = span.start + (output as f64 + 0.5) * scale;
            let first = (centre - support + 0.5) as usize;
            let count = length.min((centre + support + 0.5) as usize) - first;
            let mut sum = 0.0;
            for (x, weight) in exact[..count].iter_mut().enumerate() {
                *weight = bicubic(((x + first) as f64 - centre + 0.5) * inverse_scale);
                sum += *weight;
            }
            for (fixed, weight) in fixed.iter_mut().zip(&exact[..count]) {
                *fixed = to_fixed(if sum == 0.0 { *weight } else { weight / sum });
            }
            bounds.push((span.first + first, count));
        }
        Self { bounds, weights, stride }
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let rows = self.weights.chunks_exact(self.stride);
        self.bounds.iter().zip(rows).map(|(&(first, count), row)| (first, &row[..count]))
    }

    /// The input pixels that any output needs: the first, and one past the last.
    fn source_range(&self) -> (usize, usize) {
        let first = self.bounds.first().map_or(0, |bound| bound.0);
        (first, self.bounds.last().map_or(first, |bound| bound.0 + bound.1))
    }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Half a unit is rounded away from zero.
fn to_fixed(weight: f64) -> i32 {
    let scaled = weight * f64::from(1 << PRECISION_BITS);
    (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32 // towards zero, as in C; at most 1.3 * 2^22
}

/// Half of the last place, so that the shift rounds.
const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn resample_row(source: &[u8], target: &mut [u8], weights: &Weights) {
    for (pixel, (first, weights)) in target.chunks_exact_mut(3).zip(weights.iter()) {
        let mut sums = [HALF; 3];
        for (rgb, weight) in source[3 * first..].chunks_exact(3).zip(weights) {
            sums[0] += i32::from(rgb[0]) * weight;
            sums[1] += i32::from(rgb[1]) * weight;
            sums[2] += i32::from(rgb[2]) * weight;
        }
        pixel.copy_from_slice(&sums.map(clip));
    }
}

fn resample_column<'a>(source: impl Iterator<Item = &'a [u8]>, weights: &[i32], sums: &mut [i32], target: &mut [u8]) {
    sums.fill(HALF);
    for (row, weight) in source.zip(weights) {
        for (sum, sample) in sums.iter_mut().zip(row) {
            *sum += i32::from(*sample) * weight;
        }
    }
    for (sample, sum) in target.iter_mut().zip(sums) {
        *sample = clip(*sum);
    }
}
