//! Elements as unsigned integers of their own width, and the differences between them.

use crate::tensor::Dtype;

/// How two elements are compared. All three can be undone exactly, whatever the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// The distance between them on the number line, in steps of the dtype: small where values are near.
    Distance,
    /// The bits that differ.
    Bits,
}

/// An unsigned integer as wide as an element.
pub trait Word: Copy + Eq + Default + Send + Sync {
    /// Bytes of one.
    const BYTES: usize;

    /// From little-endian bytes.
    fn read(bytes: &[u8]) -> Self;

    /// To little-endian bytes.
    fn write(self, bytes: &mut [u8]);

    /// Byte `i`, the lowest first.
    fn byte(self, i: usize) -> u8;

    /// A word of which byte `i` is `byte` and the others are zero.
    fn of_byte(byte: u8, i: usize) -> Self;

    /// All bits of either.
    fn or(self, other: Self) -> Self;

    /// The difference of `new` from `old`; 0 only where they are equal. `float` orders bits as floats are ordered.
    fn difference(new: Self, old: Self, against: Against, float: bool) -> Self;

    /// The `new` that has this difference from `old`.
    fn restore(difference: Self, old: Self, against: Against, float: bool) -> Self;
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
            fn difference(new: Self, old: Self, against: Against, float: bool) -> Self {
                if against == Against::Bits {
                    return new ^ old;
                }
                let order = |x: Self| if float { ordered!(x, $unsigned, $signed) } else { x };
                let d = order(new).wrapping_sub(order(old));
                // Small distances of either sign become small numbers.
                (d << 1) ^ ((d.cast_signed() >> (Self::BITS - 1)).cast_unsigned())
            }

            #[inline(always)]
            fn restore(difference: Self, old: Self, against: Against, float: bool) -> Self {
                if against == Against::Bits {
                    return difference ^ old;
                }
                let d = (difference >> 1) ^ (difference & 1).wrapping_neg();
                if !float {
                    return old.wrapping_add(d);
                }
                let x = ordered!(old, $unsigned, $signed).wrapping_add(d);
                x ^ (((!x).cast_signed() >> (Self::BITS - 1)).cast_unsigned() | 1 << (Self::BITS - 1))
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
    fn differences_can_be_undone_and_are_small_for_neighbours() {
        let edges = [0u16, 1, 2, 0x3f80, 0x3f81, 0x7f80, 0x7fff, 0x8000, 0x8001, 0xbf80, 0xffff];
        for old in edges {
            for new in edges {
                for float in [false, true] {
                    for against in [Against::Distance, Against::Bits] {
                        let d = u16::difference(new, old, against, float);
                        assert_eq!(u16::restore(d, old, against, float), new);
                        assert_eq!(d == 0, new == old);
                    }
                }
            }
        }
        assert_eq!(u16::difference(0x3f81, 0x3f80, Against::Distance, true), 2);
        assert_eq!(u16::difference(0xbf81, 0xbf80, Against::Distance, true), 1);
        assert_eq!(
            u16::difference(0x8000, 0x0000, Against::Distance, true),
            1,
            "the two zeros are neighbours"
        );
    }
}
