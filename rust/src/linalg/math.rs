//! Functions of every number of a slice.

use std::marker::PhantomData;

use rayon::prelude::*;

use super::elementary;
use super::lanes::{largest, sum};
use super::simd::{InstructionSet, Kernel, Simd};

/// Numbers that are worth another task.
const TASK: usize = 1 << 14;

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

/// A function of one number.
trait Function: Send + Sync {
    fn of<S: Simd>(x: f32) -> f32;
}

macro_rules! slice_form {
    ($(#[$doc:meta])* $name:ident, $type:ident, $function:ident) => {
        struct $type;

        impl Function for $type {
            #[inline(always)]
            fn of<S: Simd>(x: f32) -> f32 {
                elementary::$function::<S>(x)
            }
        }

        $(#[$doc])*
        pub(crate) fn $name(x: &mut [f32]) {
            map::<$type>(InstructionSet::current(), x);
        }
    };
}

slice_form!(
    /// x = e^x.
    exp_slice, Exp, exp
);
slice_form!(
    /// x = sigmoid(x).
    sigmoid_slice, Sigmoid, sigmoid
);
slice_form!(
    /// x = ln(1 + e^x).
    softplus_slice, Softplus, softplus
);
slice_form!(
    /// x = tanh(x).
    tanh_slice, Tanh, tanh
);
slice_form!(
    /// x = x Φ(x) with the normal distribution function Φ itself (erf), not its tanh approximation.
    gelu, Gelu, gelu
);

/// x = F(x); long slices on the current thread pool.
fn map<F: Function>(set: InstructionSet, x: &mut [f32]) {
    struct Map<'a, F>(&'a mut [f32], PhantomData<F>);

    impl<F: Function> Kernel for Map<'_, F> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, _: S) {
            for x in self.0 {
                *x = F::of::<S>(*x);
            }
        }
    }

    if x.len() <= TASK {
        set.run(Map::<F>(x, PhantomData));
    } else {
        x.par_chunks_mut(TASK).for_each(|x| set.run(Map::<F>(x, PhantomData)));
    }
}

/// y = y silu(z), element by element.
///
/// # Panics
/// If they are not of the same length.
pub(crate) fn silu_gate(y: &mut [f32], z: &[f32]) {
    assert_eq!(y.len(), z.len(), "a gate for each number");
    SiluGate { y, z }.start(InstructionSet::current());
}

struct SiluGate<'a> {
    y: &'a mut [f32],
    z: &'a [f32],
}

impl SiluGate<'_> {
    fn start(self, set: InstructionSet) {
        if self.y.len() <= TASK {
            return set.run(self);
        }
        self.y.par_chunks_mut(TASK).zip(self.z.par_chunks(TASK)).for_each(|(y, z)| set.run(SiluGate { y, z }));
    }
}

impl Kernel for SiluGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (y, z) in self.y.iter_mut().zip(self.z) {
            *y *= elementary::silu::<S>(*z);
        }
    }
}

/// x = e^(x - max), max being the largest of x and `least`; returns max and the sum of the new x: softmax, block by block.
/// Runs on the calling thread.
pub(crate) fn exp_below_max(x: &mut [f32], least: f32) -> (f32, f32) {
    InstructionSet::current().run(ExpBelowMax { x, least })
}

struct ExpBelowMax<'a> {
    x: &'a mut [f32],
    least: f32,
}

impl Kernel for ExpBelowMax<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f32, f32) {
        let max = largest(self.x).max(self.least);
        for x in self.x.iter_mut() {
            *x = elementary::exp::<S>(*x - max);
        }
        (max, sum(self.x, |x| x))
    }
}

/// sin and cos of every angle of `theta`, in radians, to 1e-7 up to a magnitude of 1e4. Runs on the calling thread.
///
/// # Panics
/// If the three are not of the same length.
pub(crate) fn sin_cos(theta: &[f32], sin: &mut [f32], cos: &mut [f32]) {
    assert!(theta.len() == sin.len() && theta.len() == cos.len(), "a sine and a cosine for each angle");
    InstructionSet::current().run(SinCos { theta, sin, cos });
}

struct SinCos<'a> {
    theta: &'a [f32],
    sin: &'a mut [f32],
    cos: &'a mut [f32],
}

impl Kernel for SinCos<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for ((theta, sin), cos) in self.theta.iter().zip(self.sin).zip(self.cos) {
            (*sin, *cos) = elementary::sin_cos::<S>(*theta);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 17] = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, TASK, TASK + 5];

    /// Numbers from -1 to 1 and, denser, close to 0.
    fn unit() -> impl Iterator<Item = f32> + Clone {
        (-2000..=2000_i16).flat_map(|i| {
            let x = f32::from(i) / 2000.0;
            [x, x * x * x]
        })
    }

    /// F at |x| <= `most` is off by no more than `relative` of it and `absolute`, by every instruction set; the same in
    /// slices of any size.
    fn check<F: Function>(most: f32, wanted: impl Fn(f64) -> f64, relative: f64, absolute: f64) {
        for set in InstructionSet::available() {
            let x: Vec<f32> = unit().map(|x| x * most).collect();
            let mut y = x.clone();
            map::<F>(set, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                let wanted = wanted(f64::from(x));
                let y = f64::from(y);
                let close = y == wanted || (y - wanted).abs() <= relative * wanted.abs() + absolute;
                assert!(close, "{}: f({x:e}) = {y:e}, not {wanted:e}", set.name());
            }
            for size in SIZES {
                let numbers = || x.iter().zip(&y).cycle().skip(5).take(size + 1);
                let mut part: Vec<f32> = numbers().map(|(x, _)| *x).collect();
                map::<F>(set, &mut part[1..]);
                assert!(numbers().zip(&part).skip(1).all(|((_, y), part)| y == part), "{}: {size} numbers", set.name());
            }
            let mut special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            map::<F>(set, &mut special);
            assert!(special[0].is_nan(), "{}", set.name());
            for (x, y) in [(f64::INFINITY, special[1]), (f64::NEG_INFINITY, special[2])] {
                let (y, wanted) = (f64::from(y), wanted(x));
                let close = y == wanted || (y - wanted).abs() <= relative;
                // x Φ(x) at minus infinity is 0 times infinity: NaN here, as in PyTorch.
                assert!(close || y.is_nan() && x < 0.0, "{}: f({x}) = {y}", set.name());
            }
        }
    }

    #[test]
    fn exp_is_exact_to_two_units_in_the_last_place() {
        check::<Exp>(87.0, f64::exp, 1.2e-7, 0.0);
        check::<Exp>(1.0, f64::exp, 1.2e-7, 0.0);
        check::<Exp>(1e4, |x| if x > 88.73 { f64::INFINITY } else { x.exp() }, 1.2e-7, f64::from(f32::from_bits(1)));
    }

    #[test]
    fn sigmoid_softplus_and_tanh_are_exact_to_a_few_units_in_the_last_place() {
        check::<Sigmoid>(87.0, |x| 1.0 / (1.0 + (-x).exp()), 2.4e-7, 0.0);
        check::<Softplus>(87.0, |x| if x > 700.0 { x } else { x.exp().ln_1p() }, 3e-7, 0.0);
        check::<Softplus>(1e4, |x| if x > 700.0 { x } else { x.exp().ln_1p() }, 3e-7, 1e-40);
        check::<Tanh>(1.0, f64::tanh, 3e-7, 0.0);
        check::<Tanh>(100.0, f64::tanh, 4.2e-7, 0.0);
    }

    /// The Taylor series of erf in f64: good to 1e-9 up to |x| = 4.
    fn erf(x: f64) -> f64 {
        if x.abs() > 4.0 {
            return x.signum();
        }
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn gelu_is_the_one_of_the_error_function() {
        let gelu = |x: f64| if x < -40.0 { 0.0 } else { 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)) };
        check::<Gelu>(0.1, gelu, 3e-7, 0.0);
        check::<Gelu>(1.0, gelu, 2e-7, 1e-7);
        check::<Gelu>(6.0, gelu, 2e-7, 1.4e-6);
        check::<Gelu>(1000.0, gelu, 2e-7, 1.4e-6);
    }

    #[test]
    fn exp_below_max_of_large_masked_and_no_scores() {
        for set in InstructionSet::available() {
            let exp_below_max = |x: &mut [f32], least| set.run(ExpBelowMax { x, least });
            let mut x = [1000.0, 1000.0, f32::NEG_INFINITY];
            assert_eq!(exp_below_max(&mut x, f32::NEG_INFINITY), (1000.0, 2.0), "{}", set.name());
            assert_eq!(x, [1.0, 1.0, 0.0]);
            assert_eq!(exp_below_max(&mut x, 2000.0), (2000.0, 0.0), "{}", set.name());
            assert_eq!(exp_below_max(&mut [], 3.0), (3.0, 0.0), "{}", set.name());
            assert!(exp_below_max(&mut [0.0, f32::NAN, 1.0], 0.0).1.is_nan(), "{}", set.name());
        }
    }

    #[test]
    fn exp_below_max_is_as_in_f64_for_any_length() {
        for (set, size) in InstructionSet::available().into_iter().flat_map(|set| SIZES.map(|size| (set, size))) {
            let scores: Vec<f32> = unit().map(|x| x * 20.0).cycle().skip(40).take(size).collect();
            let mut x = scores.clone();
            let (max, sum) = set.run(ExpBelowMax { x: &mut x, least: -3.0 });
            assert_eq!(max, scores.iter().copied().fold(-3.0, f32::max));
            let mut wanted_sum = 0.0;
            for (&x, &score) in x.iter().zip(&scores) {
                let wanted = (f64::from(score) - f64::from(max)).exp();
                // The difference is rounded before its exponential is taken.
                assert!((f64::from(x) - wanted).abs() <= 4e-6 * wanted, "{}: {size} scores", set.name());
                wanted_sum += f64::from(x);
            }
            assert!((f64::from(sum) - wanted_sum).abs() <= 1e-6 * wanted_sum, "{}: {size} scores", set.name());
        }
    }

    #[test]
    fn a_gate_is_silu_for_any_length() {
        for (set, size) in InstructionSet::available().into_iter().flat_map(|set| SIZES.map(|size| (set, size))) {
            let z: Vec<f32> = unit().map(|x| x * 30.0).cycle().skip(9).take(size).collect();
            let mut y = vec![-2.0; size];
            SiluGate { y: &mut y, z: &z }.start(set);
            for (&y, &z) in y.iter().zip(&z) {
                let wanted = -2.0 * f64::from(z) / (1.0 + (-f64::from(z)).exp());
                assert!((f64::from(y) - wanted).abs() <= 3e-7 * wanted.abs(), "{}: silu({z}) = {y}", set.name());
            }
        }
    }

    #[test]
    fn sine_and_cosine_are_exact_to_1e_7() {
        for set in InstructionSet::available() {
            for most in [1.0, 7.0, 500.0, 1e4] {
                let theta: Vec<f32> = unit().map(|x| x * most).collect();
                let (mut sin, mut cos) = (theta.clone(), theta.clone());
                set.run(SinCos { theta: &theta, sin: &mut sin, cos: &mut cos });
                for ((&theta, &sin), &cos) in theta.iter().zip(&sin).zip(&cos) {
                    let (wanted_sin, wanted_cos) = f64::from(theta).sin_cos();
                    let error = (f64::from(sin) - wanted_sin).abs().max((f64::from(cos) - wanted_cos).abs());
                    assert!(error <= 1e-7, "{}: sine or cosine of {theta} is off by {error:e}", set.name());
                }
            }
            let mut not_finite = [[0.0; 2]; 2];
            let [sin, cos] = &mut not_finite;
            set.run(SinCos { theta: &[f32::NAN, f32::INFINITY], sin, cos });
            assert!(not_finite.as_flattened().iter().all(|x| x.is_nan()), "{}", set.name());
        }
    }

    #[test]
    fn the_forms_for_one_number_agree_with_those_for_slices() {
        let x: Vec<f32> = unit().map(|x| x * 50.0).collect();
        let [mut sigmoids, mut softplus_es] = [x.clone(), x.clone()];
        sigmoid_slice(&mut sigmoids);
        softplus_slice(&mut softplus_es);
        for ((&x, s), p) in x.iter().zip(sigmoids).zip(softplus_es) {
            assert!((sigmoid(x) - s).abs() <= 1e-6 * s && (softplus(x) - p).abs() <= 1e-6 * p, "at {x}");
            assert_eq!(silu(x), x * sigmoid(x));
        }
    }
}
