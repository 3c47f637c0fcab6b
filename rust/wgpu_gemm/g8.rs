//! The shortest way to a product: groups of eight, and a weight that is uploaded with every call.

use super::{AdapterInfo, Context, Options};
use crate::codec;
use crate::error::{Error, Result};
use half::f16;

/// The codec whose layout [`G8GemmContext::gemm`] takes.
const CODEC: &str = "int4_g8_fp16_v1";

/// A device for products with four-bit weights in groups of eight.
#[derive(Debug)]
pub struct G8GemmContext {
    context: Context,
}

impl G8GemmContext {
    /// Opens the adapter that `TENPAK_WGPU_ADAPTER` names, or else the fastest.
    ///
    /// # Errors
    /// Unsupported: no adapter, or a build without the feature `gpu`.
    pub async fn new() -> Result<G8GemmContext> {
        Ok(G8GemmContext { context: Context::new(Options::default()).await? })
    }

    /// What the adapter says of itself.
    pub fn adapter(&self) -> &AdapterInfo {
        self.context.adapter()
    }

    /// y = x Wᵀ, where W\[r\]\[c\] = q·s + o.
    ///
    /// `x` is [m, k]; `w_packed` [n, ⌈k/2⌉], two codes a byte, the first in the low bits; `scales` and `offsets`
    /// [n, ⌈k/8⌉], one for each group of eight, stored in half precision on the GPU. Returns [m, n].
    ///
    /// # Errors
    /// Usage: lengths that do not fit `m`, `n` and `k`, or a parameter beyond half precision. Io: the GPU is lost or
    /// out of memory.
    #[allow(clippy::too_many_arguments)]
    pub async fn gemm(
        &self,
        x: &[f32],
        w_packed: &[u8],
        scales: &[f32],
        offsets: &[f32],
        m: usize,
        n: usize,
        k: usize,
    ) -> Result<Vec<f32>> {
        let (scales, offsets) = (halves("scales", scales)?, halves("offsets", offsets)?);
        let weight =
            self.context.weight(codec::find(CODEC)?.layout, &[w_packed, &scales, &offsets], n, k, 0)?;
        self.context.matmul(x, m, &weight).await
    }
}

fn halves(name: &str, values: &[f32]) -> Result<Vec<u8>> {
    if let Some((i, value)) = values.iter().enumerate().find(|(_, v)| !f16::from_f32(**v).is_finite()) {
        return Err(Error::usage(format!("{name}[{i}] is {value}; half precision holds at most 65504")));
    }
    Ok(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect())
}
