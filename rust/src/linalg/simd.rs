//! Instruction sets: one vector type each, chosen once at run time.
//!
//! A [`Kernel`] is written once, for any [`Simd`], and compiled for each. A value of a vector type's token ([`Avx512`],
//! [`Avx2`], [`Plain`]) is the proof that the processor has the instructions; that is why the operations are safe.

use std::ffi::OsStr;
use std::sync::OnceLock;

use half::{bf16, f16};

/// The environment variable that names the instruction set to use.
const VARIABLE: &str = "KORE_VLJEPA_SIMD";

/// The instruction sets that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstructionSet {
    /// Whatever the target always has.
    Plain,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// AVX-512 F, BW, DQ and VL beside them.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl InstructionSet {
    /// All that this processor has, the best last.
    pub(crate) fn available() -> Vec<InstructionSet> {
        let mut sets = vec![InstructionSet::Plain];
        #[cfg(target_arch = "x86_64")]
        {
            sets.extend(Avx2::detect().map(InstructionSet::Avx2));
            sets.extend(Avx512::detect().map(InstructionSet::Avx512));
        }
        sets
    }

    /// The one that kernels use: the one that `KORE_VLJEPA_SIMD` names, or the best one.
    pub(crate) fn current() -> InstructionSet {
        static CURRENT: OnceLock<InstructionSet> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let named = InstructionSet::named(&std::env::var_os(VARIABLE).unwrap_or_default());
            let best = || InstructionSet::available().last().copied();
            named.ok().flatten().or_else(best).unwrap_or(InstructionSet::Plain)
        })
    }

    /// The one that is called so, if it is a name at all.
    ///
    /// # Errors
    /// A name that is not one of an instruction set that this processor has.
    fn named(name: &OsStr) -> Result<Option<InstructionSet>, String> {
        let available = InstructionSet::available();
        match available.iter().find(|set| name == set.name()) {
            Some(&set) => Ok(Some(set)),
            None if name.is_empty() => Ok(None),
            None => {
                let names: Vec<&str> = available.iter().map(|set| set.name()).collect();
                Err(format!("{VARIABLE}={}: this processor has {}", name.to_string_lossy(), names.join(", ")))
            }
        }
    }

    /// `plain`, `avx2` or `avx512`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            InstructionSet::Plain => "plain",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512(_) => "avx512",
        }
    }

    /// Runs `kernel` with these instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            InstructionSet::Plain => kernel.run(Plain),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512(simd) => simd.run(kernel),
        }
    }
}

/// The name of the instruction set in use: `plain`, `avx2` or `avx512`.
///
/// It is the best one that the processor has, unless the environment variable `KORE_VLJEPA_SIMD` names a lesser one. What
/// it names and the processor does not have counts for nothing here; opening a model refuses it.
pub fn instruction_set() -> &'static str {
    InstructionSet::current().name()
}

/// Refuses a `KORE_VLJEPA_SIMD` that is no instruction set of this processor.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_instruction_set() -> Result<(), String> {
    InstructionSet::named(&std::env::var_os(VARIABLE).unwrap_or_default()).map(drop)
}

/// A computation that is compiled for every instruction set.
///
/// `run` and all that it calls should be `#[inline(always)]`: only what is inlined is compiled with the instructions.
pub(crate) trait Kernel {
    type Output;

    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Operations on a vector of f32.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Numbers in a vector.
    const LANES: usize;
    /// Whether multiply-add is one instruction.
    const FMA: bool;
    type Vector: Copy;

    fn zero(self) -> Self::Vector;

    /// Reads `LANES` numbers.
    ///
    /// # Safety
    /// `from` is valid for reads of `LANES` numbers; it need not be aligned to more than a number.
    unsafe fn load_f32(self, from: *const f32) -> Self::Vector;

    /// Reads and widens `LANES` numbers.
    ///
    /// # Safety
    /// As for [`Simd::load_f32`].
    unsafe fn load_bf16(self, from: *const bf16) -> Self::Vector;

    /// Reads and widens `LANES` numbers.
    ///
    /// # Safety
    /// As for [`Simd::load_f32`].
    unsafe fn load_f16(self, from: *const f16) -> Self::Vector;

    /// a b + c.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;

    /// The sum of each vector's lanes, added as a tree: lane i and lane i + n/2, and so on.
    fn sums(self, vectors: [Self::Vector; 4]) -> [f32; 4];
}

/// a b + c, rounded once where the instruction set does that in one instruction.
#[inline(always)]
pub(crate) fn mul_add<S: Simd>(a: f32, b: f32, c: f32) -> f32 {
    if S::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// No more than the target always has: 4 lanes, which the compiler vectorises (SSE2, NEON).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plain;

impl Simd for Plain {
    const LANES: usize = 4;
    const FMA: bool = cfg!(target_arch = "aarch64");
    type Vector = [f32; 4];

    #[inline(always)]
    fn zero(self) -> [f32; 4] {
        [0.0; 4]
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's promise; an array of f32 is aligned as f32 is.
        unsafe { from.cast::<[f32; 4]>().read() }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> [f32; 4] {
        // SAFETY: the caller's promise; an array of bf16 is aligned as bf16 is.
        unsafe { from.cast::<[bf16; 4]>().read() }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> [f32; 4] {
        // SAFETY: the caller's promise; an array of f16 is aligned as f16 is.
        unsafe { from.cast::<[f16; 4]>().read() }.map(widen_f16)
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| mul_add::<Plain>(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn sums(self, vectors: [[f32; 4]; 4]) -> [f32; 4] {
        vectors.map(|[a, b, c, d]| (a + c) + (b + d))
    }
}

/// f16 to f32 without a branch: the exponent is moved by a multiplication, which makes denormals right too.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    /// 2^112: the difference of the exponents' biases.
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(x.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * SCALE;
    // From 2^16 on it was infinity or NaN, whose exponent is all ones.
    let special = if magnitude >= 65536.0 { 0xff << 23 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::{Kernel, Simd};

    /// Proof that the processor has AVX2, FMA and F16C.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        pub(super) fn detect() -> Option<Avx2> {
            let found =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            found.then_some(Avx2(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn with_features<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { with_features(self, kernel) }
        }
    }

    impl Simd for Avx2 {
        const LANES: usize = 8;
        const FMA: bool = true;
        type Vector = __m256;

        #[inline(always)]
        fn zero(self) -> __m256 {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load_f32(self, from: *const f32) -> __m256 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(self, from: *const f16) -> __m256 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn sums(self, [a, b, c, d]: [__m256; 4]) -> [f32; 4] {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe {
                let half = |v| _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                sums_of_quarters([half(a), half(b), half(c), half(d)])
            }
        }
    }

    /// The sums of four vectors of four.
    #[inline(always)]
    unsafe fn sums_of_quarters([a, b, c, d]: [__m128; 4]) -> [f32; 4] {
        // SAFETY: SSE is part of x86-64; a vector of four is an array of four.
        unsafe {
            let ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));
            let cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
            std::mem::transmute::<__m128, [f32; 4]>(_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)))
        }
    }

    /// Proof that the processor has AVX-512 F, BW, DQ and VL beside AVX2, FMA and F16C.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Avx512(());

    impl Avx512 {
        pub(super) fn detect() -> Option<Avx512> {
            let found = Avx2::detect().is_some()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            found.then_some(Avx512(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            fn with_features<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { with_features(self, kernel) }
        }
    }

    impl Simd for Avx512 {
        const LANES: usize = 16;
        const FMA: bool = true;
        type Vector = __m512;

        #[inline(always)]
        fn zero(self) -> __m512 {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn load_f32(self, from: *const f32) -> __m512 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }

        #[inline(always)]
        unsafe fn load_f16(self, from: *const f16) -> __m512 {
            // SAFETY: the caller's promise, and the features as above.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn sums(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
            // SAFETY: `self` is made by `detect` alone, which found the features.
            unsafe {
                // Two vectors in, both halved: [a, b] of eight lanes each; then [a, b, c, d] of four.
                let eights =
                    |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                let (ab, cd) = (eights(a, b), eights(c, d));
                let fours = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
                let twos = _mm512_add_ps(fours, _mm512_permute_ps::<0x4e>(fours));
                let ones = _mm512_add_ps(twos, _mm512_permute_ps::<0xb1>(twos));
                let first = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, ones));
                std::mem::transmute::<__m128, [f32; 4]>(first)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            assert_eq!(widen_f16(x).to_bits(), x.to_f32_const().to_bits() & !quiet_bit(x), "{bits:#06x}");
        }
        /// `half` makes a signalling NaN quiet, as the processor does; the plain twin leaves it.
        fn quiet_bit(x: f16) -> u32 {
            if x.is_nan() && x.to_bits() & 0x200 == 0 { 1 << 22 } else { 0 }
        }
    }

    /// Adds the lanes of the vectors that start at 0, n, 2n and 3n; and 1 times each, to use all operations.
    struct Sums<'a>(&'a [f32]);

    impl Kernel for Sums<'_> {
        type Output = [f32; 4];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> [f32; 4] {
            let ones = [1.0; 16];
            assert!(S::LANES <= ones.len() && 4 * S::LANES <= self.0.len());
            let mut vectors = [simd.zero(); 4];
            for (i, vector) in vectors.iter_mut().enumerate() {
                // SAFETY: the assertion above.
                let (one, x) =
                    unsafe { (simd.load_f32(ones.as_ptr()), simd.load_f32(self.0[i * S::LANES..].as_ptr())) };
                *vector = simd.mul_add(one, x, simd.zero());
            }
            simd.sums(vectors)
        }
    }

    #[test]
    fn lanes_are_added_as_a_tree() {
        fn tree(x: &[f32]) -> f32 {
            match x {
                [x] => *x,
                _ => {
                    let (low, high) = x.split_at(x.len() / 2);
                    tree(&low.iter().zip(high).map(|(a, b)| a + b).collect::<Vec<_>>())
                }
            }
        }
        let x: Vec<f32> = (0..64_u8).map(|i| f32::from(i).mul_add(0.37, 1.0).exp2()).collect();
        for set in InstructionSet::available() {
            let lanes = match set.name() {
                "avx512" => 16,
                "avx2" => 8,
                _ => 4,
            };
            let wanted: Vec<f32> = x.chunks_exact(lanes).take(4).map(tree).collect();
            assert_eq!(set.run(Sums(&x)).as_slice(), wanted, "{}", set.name());
        }
    }

    #[test]
    fn instructions_have_names() {
        assert_eq!(InstructionSet::named(OsStr::new("")), Ok(None));
        let sets = InstructionSet::available();
        for &set in &sets {
            assert_eq!(InstructionSet::named(OsStr::new(set.name())), Ok(Some(set)));
        }
        let names: Vec<&str> = sets.iter().map(|set| set.name()).collect();
        for wrong in ["bogus", "AVX2", " plain"] {
            let message = InstructionSet::named(OsStr::new(wrong)).unwrap_err();
            assert_eq!(message, format!("KORE_VLJEPA_SIMD={wrong}: this processor has {}", names.join(", ")));
        }
    }

    #[test]
    fn the_name_is_one_that_the_processor_has() {
        assert!(InstructionSet::available().iter().any(|set| set.name() == instruction_set()));
    }
}
