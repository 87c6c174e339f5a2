//! Random numbers for sampling.

/// SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): 64 bits of state, small,
/// and good enough to draw tokens with. The numbers are not PyTorch's, and need not be.
pub(super) struct SplitMix64(u64);

impl SplitMix64 {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    /// The stream of one answer: `seed` and `row` together say which.
    pub(super) fn new(seed: u64, row: u64) -> Self {
        SplitMix64(mix(seed.wrapping_add(Self::STEP)) ^ mix(row.wrapping_mul(Self::STEP)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        mix(self.0)
    }

    /// Uniform in [0, 1), a multiple of 2^-24.
    pub(super) fn uniform(&mut self) -> f32 {
        let high = u16::try_from(self.next() >> 48).unwrap_or(0);
        let low = u8::try_from(self.next() >> 56).unwrap_or(0);
        (f32::from(high) * 256.0 + f32::from(low)) / 16_777_216.0
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_splitmix64() {
        // The first outputs for state 1234567, from the authors' C code (also on rosettacode.org).
        let mut random = SplitMix64(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(expected, std::array::from_fn(|_| random.next()));
    }

    #[test]
    fn uniform_numbers_fill_the_interval_and_differ_by_seed_and_row() {
        let mut random = SplitMix64::new(0, 0);
        let numbers: Vec<f32> = (0..10_000).map(|_| random.uniform()).collect();
        assert!(numbers.iter().all(|u| (0.0..1.0).contains(u)));
        for tenth in 0..10_u8 {
            let low = f32::from(tenth) / 10.0;
            let n = numbers.iter().filter(|u| (low..low + 0.1).contains(u)).count();
            assert!((850..1150).contains(&n), "{n} of 10000 in the tenth from {low}");
        }
        let first = |seed, row| SplitMix64::new(seed, row).next();
        let firsts = [first(0, 0), first(0, 1), first(1, 0), first(1, 1), first(2, 0), first(0, 2)];
        assert_eq!(crate::texts::distinct(firsts).len(), firsts.len());
    }
}
