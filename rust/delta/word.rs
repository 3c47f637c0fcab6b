//! Elements as unsigned integers of their own width, and the differences between them.

use crate::tensor::Dtype;

/// An unsigned integer as wide as an element.
pub trait Word: Copy + Eq + Default + Send + Sync {
    /// Bytes of one.
    const BYTES: usize;

    /// From little-endian bytes.
    fn read(bytes: &[u8]) -> Self;

    /// The number that these bits are in little-endian order, and the other way round.
    fn little_endian(self) -> Self;

    /// To little-endian bytes.
    fn write(self, bytes: &mut [u8]);

    /// Byte `i`, the lowest first.
    fn byte(self, i: usize) -> u8;

    /// A word of which byte `i` is `byte` and the others are zero.
    fn of_byte(byte: u8, i: usize) -> Self;

    /// All bits of either.
    fn or(self, other: Self) -> Self;

    /// How far `new` lies above `old` on the number line, in steps of the dtype, modulo their number.
    fn climb(new: Self, old: Self, float: bool) -> Self;

    /// Small numbers of either sign as small numbers; `steps` is a multiple of 2^`zeros`, which it is divided by.
    fn folded(steps: Self, zeros: u32) -> Self;

    /// What lies above `old` by the steps that became `folded`.
    fn climbed(folded: Self, zeros: u32, old: Self, float: bool) -> Self;

    /// The bits from `from` on that `mask` has room for: a float's exponent.
    fn field(self, from: u32, mask: u16) -> Self;

    /// `scale` less this exponent, from 0 to `most`.
    fn below(self, scale: u16, most: u8) -> Self;

    /// The position of the highest one, plus 127; of zero 0.
    fn magnitude(self) -> u32;

    /// Without its lowest `bits`, at most `most`.
    fn upper(self, bits: Self, most: u8) -> u8;

    /// The lowest `bits` below `upper`.
    fn whole(upper: u8, bits: Self, lower: Self) -> Self;

    /// As many ones.
    fn ones(self) -> Self;

    /// Whether bit `i` is one.
    fn bit(self, i: u32) -> bool;

    /// The number itself, which is small.
    fn small(self) -> u32;

    /// The most lower bits that are split from an element, so that those of eight bytes are at most 56.
    const SPLIT: u16 = 7 * Self::BYTES as u16;

    /// The bits in which they differ.
    fn xor(self, other: Self) -> Self;
}

/// Bits of a float as an integer that grows with it: all bits of negative numbers flip, the sign of the others.
macro_rules! ordered {
    ($x:expr, $unsigned:ty, $signed:ty) => {
        $x ^ (($x.cast_signed() >> (<$unsigned>::BITS - 1)).cast_unsigned() | 1 << (<$unsigned>::BITS - 1))
    };
}

macro_rules! words {
    ($($unsigned:ty, $signed:ty;)*) => {$(
        impl Word for $unsigned {
            const BYTES: usize = size_of::<$unsigned>();

            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("a word's bytes"))
            }

            #[inline(always)]
            fn little_endian(self) -> Self {
                Self::from_le(self)
            }

            #[inline(always)]
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }

            #[inline(always)]
            fn byte(self, i: usize) -> u8 {
                (self >> (8 * i)) as u8
            }

            #[inline(always)]
            fn of_byte(byte: u8, i: usize) -> Self {
                Self::from(byte) << (8 * i)
            }

            #[inline(always)]
            fn or(self, other: Self) -> Self {
                self | other
            }

            #[inline(always)]
            fn climb(new: Self, old: Self, float: bool) -> Self {
                let order = |x: Self| if float { ordered!(x, $unsigned, $signed) } else { x };
                order(new).wrapping_sub(order(old))
            }

            #[inline(always)]
            fn folded(steps: Self, zeros: u32) -> Self {
                let steps = steps.cast_signed() >> zeros;
                ((steps << 1) ^ (steps >> (Self::BITS - 1))).cast_unsigned()
            }

            #[inline(always)]
            fn climbed(folded: Self, zeros: u32, old: Self, float: bool) -> Self {
                let steps = ((folded >> 1) ^ (folded & 1).wrapping_neg()) << zeros;
                if !float {
                    return old.wrapping_add(steps);
                }
                let x = ordered!(old, $unsigned, $signed).wrapping_add(steps);
                x ^ (((!x).cast_signed() >> (Self::BITS - 1)).cast_unsigned() | 1 << (Self::BITS - 1))
            }

            #[inline(always)]
            fn field(self, from: u32, mask: u16) -> Self {
                (self >> from) & mask as Self
            }

            #[inline(always)]
            fn below(self, scale: u16, most: u8) -> Self {
                let scale = if Self::BYTES == 1 { scale.min(255) } else { scale };
                (scale as Self).saturating_sub(self).min(most as Self)
            }

            #[inline(always)]
            fn magnitude(self) -> u32 {
                (self as f32).to_bits() >> 23
            }

            #[inline(always)]
            fn upper(self, bits: Self, most: u8) -> u8 {
                (self >> (bits & (Self::BITS as Self - 1))).min(most as Self) as u8
            }

            #[inline(always)]
            fn whole(upper: u8, bits: Self, lower: Self) -> Self {
                ((upper as Self) << (bits & (Self::BITS as Self - 1))) | lower
            }

            #[inline(always)]
            fn ones(self) -> Self {
                ((1 as Self) << (self & (Self::BITS as Self - 1))).wrapping_sub(1)
            }

            #[inline(always)]
            fn bit(self, i: u32) -> bool {
                self >> i & 1 == 1
            }

            #[inline(always)]
            fn small(self) -> u32 {
                self as u32
            }

            #[inline(always)]
            fn xor(self, other: Self) -> Self {
                self ^ other
            }
        }
    )*};
}

words! {
    u8, i8;
    u16, i16;
    u32, i32;
    u64, i64;
}

/// Whether elements are a sign and a magnitude, whose order differs from that of their bits.
pub const fn is_float(dtype: Dtype) -> bool {
    use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
    matches!(dtype, F32 | F16 | BF16 | F64 | F8_E4M3 | F8_E5M2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_can_be_undone_and_are_small_for_neighbours() {
        let between = |new, old, float| u16::folded(u16::climb(new, old, float), 0);
        let edges = [0u16, 1, 2, 0x3f80, 0x3f81, 0x7f80, 0x7fff, 0x8000, 0x8001, 0xbf80, 0xffff];
        for old in edges {
            for new in edges {
                for float in [false, true] {
                    let d = between(new, old, float);
                    assert_eq!(u16::climbed(d, 0, old, float), new);
                    assert_eq!(d == 0, new == old);
                    let steps = u16::climb(new, old, float);
                    let zeros = steps.trailing_zeros().min(15);
                    assert_eq!(u16::climbed(u16::folded(steps, zeros), zeros, old, float), new);
                }
            }
        }
        assert_eq!(between(0x3f81, 0x3f80, true), 2);
        assert_eq!(between(0xbf81, 0xbf80, true), 1);
        assert_eq!(between(0x8000, 0x0000, true), 1, "the two zeros are neighbours");
    }
}
