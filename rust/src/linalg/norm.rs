//! Norms over the last dimension.

use rayon::prelude::*;

use super::lanes::sum;
use super::simd::{InstructionSet, Kernel, Simd};

/// Numbers that are worth another task.
const TASK: usize = 1 << 14;

/// x / sqrt(mean(x²) + eps) * weight for every row of x (T, D), into out (T, D); many rows on the current thread pool.
///
/// # Panics
/// If x and out do not have the same length.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    Norm { x, weight, bias: None, eps, out }.start(InstructionSet::current());
}

/// (x - mean) / sqrt(variance + eps) * weight + bias for every row of x (T, D), into out (T, D); many rows on the current
/// thread pool.
///
/// # Panics
/// If x and out, or weight and bias, do not have the same length.
pub(crate) fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(weight.len(), bias.len(), "a bias for each weight");
    Norm { x, weight, bias: Some(bias), eps, out }.start(InstructionSet::current());
}

/// A LayerNorm where there is a bias, else an RMSNorm.
struct Norm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Norm<'_> {
    fn start(self, set: InstructionSet) {
        let Norm { x, weight, bias, eps, out } = self;
        each_part(x, out, weight.len(), |x, out| set.run(Norm { x, weight, bias, eps, out }));
    }
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let dim = self.weight.len();
        for (x, out) in self.x.chunks_exact(dim).zip(self.out.chunks_exact_mut(dim)) {
            let numbers = out.iter_mut().zip(x).zip(self.weight);
            match self.bias {
                None => {
                    let scale = 1.0 / (sum(x, |x| x * x) / dim as f32 + self.eps).sqrt();
                    for ((out, x), weight) in numbers {
                        *out = x * scale * weight;
                    }
                }
                Some(bias) => {
                    let mean = sum(x, |x| x) / dim as f32;
                    let variance = sum(x, |x| (x - mean) * (x - mean)) / dim as f32;
                    let scale = 1.0 / (variance + self.eps).sqrt();
                    for (((out, x), weight), bias) in numbers.zip(bias) {
                        *out = (x - mean) * scale * weight + bias;
                    }
                }
            }
        }
    }
}

/// Calls `norm` on rows of `dim` numbers of x and out, cut into tasks where there are many.
fn each_part(x: &[f32], out: &mut [f32], dim: usize, norm: impl Fn(&[f32], &mut [f32]) + Sync) {
    assert_eq!(x.len(), out.len(), "a norm for each row");
    if dim == 0 {
        return;
    }
    if x.len() <= TASK {
        return norm(x, out);
    }
    let part = TASK.div_ceil(dim) * dim;
    x.par_chunks(part).zip(out.par_chunks_mut(part)).for_each(|(x, out)| norm(x, out));
}

/// x divided by max(its length, eps), in place.
pub(crate) fn l2_normalize(x: &mut [f32], eps: f32) {
    let length = sum(x, |x| x * x).sqrt().max(eps);
    for x in x {
        *x /= length;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.73).sin() * 3.0 + 0.5).collect()
    }

    /// Mean and variance of a row, in f64.
    fn moments(x: &[f32]) -> (f64, f64) {
        let mean = |f: &dyn Fn(f64) -> f64| x.iter().map(|&x| f(f64::from(x))).sum::<f64>() / x.len() as f64;
        let first = mean(&|x| x);
        (first, mean(&|x| (x - first) * (x - first)))
    }

    #[test]
    fn rows_of_any_length_are_normed_as_in_f64() {
        for set in InstructionSet::available() {
            for dim in [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1023] {
                // The last count is cut into tasks.
                for rows in [0, 1, 3, TASK / dim + 3] {
                    let x = numbers(rows * dim + 1);
                    let (x, weight, bias) = (&x[1..], numbers(dim), numbers(dim));
                    let (mut rms, mut layer) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                    let eps = 1e-5;
                    Norm { x, weight: &weight, bias: None, eps, out: &mut rms }.start(set);
                    Norm { x, weight: &weight, bias: Some(&bias), eps, out: &mut layer }.start(set);
                    for (i, &x_i) in x.iter().enumerate() {
                        let (mean, variance) = moments(&x[i / dim * dim..][..dim]);
                        let (x_i, w, b) = (f64::from(x_i), f64::from(weight[i % dim]), f64::from(bias[i % dim]));
                        let wanted = x_i / (variance + mean * mean + 1e-5).sqrt() * w;
                        assert!(
                            (f64::from(rms[i]) - wanted).abs() < 1e-6 * (1.0 + wanted.abs()),
                            "{dim} {}",
                            set.name()
                        );
                        let wanted = (x_i - mean) / (variance + 1e-5).sqrt() * w + b;
                        assert!(
                            (f64::from(layer[i]) - wanted).abs() < 3e-6 * (1.0 + wanted.abs()),
                            "{dim} {}",
                            set.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_vector_becomes_one_long_and_a_short_one_stays_short() {
        let mut x = numbers(1023);
        l2_normalize(&mut x, 1e-6);
        assert!((x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() - 1.0).abs() < 1e-6);
        let mut short = [3e-8, 4e-8];
        l2_normalize(&mut short, 1e-6);
        assert_eq!(short, [3e-8 / 1e-6, 4e-8 / 1e-6]);
    }
}
