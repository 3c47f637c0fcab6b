//! The largest magnitude among some weights, and whether all of them are finite.

use super::simd::Simd;

/// The largest magnitude, as its FP32 bits: for magnitudes, bits are ordered as values are, and infinity
/// and NaN come last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    bits: u32,
}

/// The largest magnitude that FP16 offsets take without an exponent.
pub const LARGEST: f32 = 32768.0;

/// All bits of an FP32 value but its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// Exponents that both 2^exponent and its inverse have in FP32.
pub const EXPONENTS: std::ops::RangeInclusive<i32> = -126..=127;

impl Range {
    /// The range of some weights.
    pub fn of(weights: &[f32]) -> Range {
        Range { bits: weights.iter().map(|x| x.to_bits() & MAGNITUDE).fold(0, u32::max) }
    }

    /// The range of both.
    #[must_use]
    pub fn and(self, other: Range) -> Range {
        Range { bits: self.bits.max(other.bits) }
    }

    /// The largest magnitude.
    pub fn largest(self) -> f32 {
        f32::from_bits(self.bits)
    }

    /// Whether every weight is finite.
    pub fn is_finite(self) -> bool {
        self.largest().is_finite()
    }

    /// The exponent that brings the largest magnitude between 1 and 2, or 0 where that is not needed.
    pub fn exponent(self, normal_from: f32) -> i32 {
        let largest = self.largest();
        if largest == 0.0 || (normal_from..=LARGEST).contains(&largest) {
            return 0;
        }
        // Subnormals have a biased exponent of 0 and end up at the clamp.
        let exponent = (self.bits >> 23).cast_signed() - 127;
        exponent.clamp(*EXPONENTS.start(), *EXPONENTS.end())
    }
}

/// A range that grows a vector at a time.
#[derive(Clone, Copy)]
pub struct RangeLanes<S: Simd>(S::I);

impl<S: Simd> RangeLanes<S> {
    /// Nothing so far.
    #[inline(always)]
    pub fn new(s: S) -> Self {
        RangeLanes(s.splat_i(0))
    }

    /// Adds vectors of weights.
    #[inline(always)]
    pub fn add(&mut self, s: S, x: &[S::F]) {
        for &x in x {
            self.0 = s.max_u(self.0, s.and(s.bits(x), s.splat_i(MAGNITUDE)));
        }
    }

    /// The range of all that was added.
    #[inline(always)]
    pub fn finish(self, s: S) -> Range {
        let mut lanes = [0; super::simd::LANES];
        s.store_i(self.0, &mut lanes);
        Range { bits: lanes.into_iter().fold(0, u32::max) }
    }
}
