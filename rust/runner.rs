//! One tensor through one codec, strip by strip, on every thread of the current rayon pool.

use crate::codec::Codec;
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// A tensor's parts under a codec.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// The parameter `exponent` of the index: rebuilt weights are multiplied by 2^exponent. It is 0 unless
    /// the largest magnitude lies outside what FP16 parameters express well.
    pub exponent: i32,
    /// The parts, in the layout's order.
    pub parts: Vec<Vec<u8>>,
    /// Σ(w - ŵ)², where it was asked for.
    pub squared_error: f64,
    /// Σw², where it was asked for.
    pub squared_norm: f64,
}

/// Encodes `tensor` with groups along `axis`; the same bytes for any number of threads.
///
/// `importance` holds one positive weight per column. `measure` asks for the squared error.
///
/// # Errors
/// An input error that names the index of the first NaN or infinity; a usage error for a wrong axis or
/// importance.
pub fn encode(
    tensor: &Tensor<'_>,
    axis: usize,
    codec: &Codec,
    importance: Option<&[f32]>,
    measure: bool,
) -> Result<Encoded> {
    let _ = (tensor, axis, codec, importance, measure);
    todo!()
}

/// Rebuilds a tensor of `shape` into `out` as `dtype` (FP32, FP16 or BF16), row-major.
///
/// # Errors
/// A usage error where a size does not fit.
pub fn decode(
    codec: &Codec,
    exponent: i32,
    shape: &[usize],
    axis: usize,
    parts: &[&[u8]],
    dtype: Dtype,
    out: &mut [u8],
) -> Result<()> {
    let _ = (codec, exponent, shape, axis, parts, dtype, out);
    todo!()
}
