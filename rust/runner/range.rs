//! What a strip of weights holds: its largest magnitude, whether all are finite; and errors of rebuilding.

use crate::codec::simd::{Kernel, LANES, Level, Simd};

/// The largest magnitude, as its FP32 bits: for magnitudes, bits are ordered as values are, and infinity
/// and NaN come last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    bits: u32,
}

/// The largest magnitude that FP16 offsets take without an exponent.
const LARGEST: f32 = 32768.0;

impl Range {
    /// The range of some weights.
    pub fn of(level: Level, weights: &[f32]) -> Range {
        Range {
            bits: level.run(LargestBits(weights)),
        }
    }

    /// The range of both.
    pub fn and(self, other: Range) -> Range {
        Range {
            bits: self.bits.max(other.bits),
        }
    }

    /// Whether every weight is finite.
    pub fn is_finite(self) -> bool {
        f32::from_bits(self.bits).is_finite()
    }

    /// The exponent that brings the largest magnitude between 1 and 2, or 0 where that is not needed.
    pub fn exponent(self, normal_from: f32) -> i32 {
        let largest = f32::from_bits(self.bits);
        if largest == 0.0 || (normal_from..=LARGEST).contains(&largest) {
            return 0;
        }
        // Subnormals have a biased exponent of 0 and end up at the clamp.
        let exponent = (self.bits >> 23).cast_signed() - 127;
        exponent.clamp(*super::EXPONENTS.start(), *super::EXPONENTS.end())
    }
}

struct LargestBits<'a>(&'a [f32]);

impl Kernel for LargestBits<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u32 {
        let (chunks, tail) = self.0.as_chunks::<LANES>();
        let magnitude = s.splat_i(0x7fff_ffff);
        let mut largest = [s.splat_i(0); 4];
        let (fours, rest) = chunks.as_chunks::<4>();
        for four in fours {
            for (m, x) in largest.iter_mut().zip(four) {
                *m = s.max_u(*m, s.and(s.bits(s.load(x)), magnitude));
            }
        }
        for x in rest {
            largest[0] = s.max_u(largest[0], s.and(s.bits(s.load(x)), magnitude));
        }
        let both = s.max_u(
            s.max_u(largest[0], largest[1]),
            s.max_u(largest[2], largest[3]),
        );
        let mut lanes = [0; LANES];
        s.store_i(both, &mut lanes);
        let tail = tail.iter().map(|x| x.to_bits() & 0x7fff_ffff);
        lanes.into_iter().chain(tail).fold(0, u32::max)
    }
}

/// Σ(x - y)² and Σx², summed in an order that depends on the lengths alone.
pub fn measure_error(x: &[f32], y: &[f32]) -> [f64; 2] {
    const BLOCK: usize = 64;
    let mut sums = [0f64; 2];
    for (x, y) in x.chunks(BLOCK).zip(y.chunks(BLOCK)) {
        let (mut error, mut norm) = ([0f64; 8], [0f64; 8]);
        for (x, y) in x.chunks(8).zip(y.chunks(8)) {
            for (i, (&x, &y)) in x.iter().zip(y).enumerate() {
                let (x, y) = (f64::from(x), f64::from(y));
                error[i] += (x - y) * (x - y);
                norm[i] += x * x;
            }
        }
        sums[0] += error.iter().sum::<f64>();
        sums[1] += norm.iter().sum::<f64>();
    }
    sums
}
