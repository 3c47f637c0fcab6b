//! Element types, named as safetensors names them.

use crate::error::{Error, Result};
use half::bf16;

macro_rules! dtypes {
    ($($variant:ident $name:literal $size:literal $doc:literal;)*) => {
        /// An element type.
        #[allow(non_camel_case_types)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Dtype { $(#[doc = $doc] $variant,)* }

        impl Dtype {
            /// Every element type.
            pub const ALL: &'static [Dtype] = &[$(Dtype::$variant,)*];

            /// The name that safetensors and the artifact's index use.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name,)* }
            }

            /// Bytes per element.
            pub const fn size(self) -> usize {
                match self { $(Dtype::$variant => $size,)* }
            }
        }
    };
}

dtypes! {
    F32 "F32" 4 "IEEE binary32.";
    F16 "F16" 2 "IEEE binary16.";
    BF16 "BF16" 2 "The upper half of an IEEE binary32.";
    F64 "F64" 8 "IEEE binary64.";
    F8_E4M3 "F8_E4M3" 1 "Eight-bit float, four exponent bits.";
    F8_E5M2 "F8_E5M2" 1 "Eight-bit float, five exponent bits.";
    I64 "I64" 8 "Signed 64-bit integer.";
    I32 "I32" 4 "Signed 32-bit integer.";
    I16 "I16" 2 "Signed 16-bit integer.";
    I8 "I8" 1 "Signed 8-bit integer.";
    U64 "U64" 8 "Unsigned 64-bit integer.";
    U32 "U32" 4 "Unsigned 32-bit integer.";
    U16 "U16" 2 "Unsigned 16-bit integer.";
    U8 "U8" 1 "Unsigned 8-bit integer.";
    BOOL "BOOL" 1 "One byte, 0 or 1.";
}

impl Dtype {
    /// The dtype of that name.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Self::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Whether codecs take it: FP32, FP16 and BF16 are weights, everything else is kept as it is.
    pub const fn is_weight(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// The largest finite weight: that of FP32 for dtypes that hold no weights.
    pub const fn largest(self) -> f32 {
        match self {
            Dtype::F16 => 65504.0,
            // All bits of the significand that it has.
            Dtype::BF16 => f32::from_bits(0x7f7f_0000),
            _ => f32::MAX,
        }
    }

    /// Appends `values` in this dtype, rounded to nearest even.
    ///
    /// # Errors
    /// An unsupported error unless [`Dtype::is_weight`].
    pub fn narrow(self, values: &[f32], out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), values.len() * self.size());
        match self {
            Dtype::F32 => {
                for (o, v) in out.chunks_exact_mut(4).zip(values) {
                    o.copy_from_slice(&v.to_le_bytes());
                }
            }
            Dtype::F16 => crate::codec::narrow_f16(values, out),
            Dtype::BF16 => {
                for (o, v) in out.chunks_exact_mut(2).zip(values) {
                    o.copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
                }
            }
            other => return Err(Error::unsupported(format!("cannot write weights as {}", other.name()))),
        }
        Ok(())
    }
}
