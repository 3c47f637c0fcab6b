//! A tensor as its base plus one sign for each element and one scale for each row (BitDelta, arXiv:2402.10193).
//!
//! The scale of the least squared error under given signs is the mean of |new - old| over the row. Rows run along
//! the last dimension. Parts: `signs`, a bit for each element (1: up), the lowest first, every row from a byte on;
//! `scales`, one BF16 for each row.

use crate::error::{Error, Result};
use crate::tensor::{Dtype, Encoding};
use half::bf16;
use rayon::prelude::*;

/// Rows and columns of a shape, along its last dimension.
pub fn rows(shape: &[usize]) -> (usize, usize) {
    match shape.split_last() {
        Some((cols, outer)) => (outer.iter().product(), *cols),
        None => (1, 1),
    }
}

/// The parts of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The part `signs`.
    pub signs: Vec<u8>,
    /// The part `scales`.
    pub scales: Vec<u8>,
}

/// Codes `new` against `old`, both of `dtype` and of that shape; `None` where a difference is not finite.
pub fn encode(old: &[u8], new: &[u8], dtype: Dtype, shape: &[usize]) -> Option<Encoded> {
    let (count, cols) = rows(shape);
    if cols == 0 || count == 0 {
        return None;
    }
    let mut signs = vec![0u8; count * cols.div_ceil(8)];
    let scales: Vec<Option<bf16>> = signs
        .par_chunks_mut(cols.div_ceil(8))
        .enumerate()
        .map_init(
            || [vec![0f32; cols], vec![0f32; cols]],
            |[a, b], (row, signs)| {
                Encoding::Plain(dtype).widen(old, row * cols, a);
                Encoding::Plain(dtype).widen(new, row * cols, b);
                let mut sum = 0f64;
                for ((signs, old), new) in signs.iter_mut().zip(a.chunks(8)).zip(b.chunks(8)) {
                    for (i, (old, new)) in old.iter().zip(new).enumerate() {
                        *signs |= u8::from(new >= old) << i;
                        sum += f64::from((new - old).abs());
                    }
                }
                let scale = bf16::from_f64(sum / cols as f64);
                scale.is_finite().then_some(scale)
            },
        )
        .collect();
    let scales = scales.into_iter().collect::<Option<Vec<_>>>()?;
    Some(Encoded { signs, scales: scales.iter().flat_map(|s| s.to_le_bytes()).collect() })
}

/// Rebuilds into `new`: every element is `old` ± its row's scale in FP32, rounded to the dtype.
///
/// # Errors
/// An artifact error for parts that do not fit the shape.
pub fn decode(
    signs: &[u8],
    scales: &[u8],
    old: &[u8],
    dtype: Dtype,
    shape: &[usize],
    new: &mut [u8],
) -> Result<()> {
    let (count, cols) = rows(shape);
    let fits = cols > 0
        && dtype.is_weight()
        && Some(signs.len()) == count.checked_mul(cols.div_ceil(8))
        && scales.len() == 2 * count
        && old.len() == new.len()
        && new.len() == count * cols * dtype.size();
    if !fits {
        return Err(Error::artifact(format!("the parts of bit1 do not fit shape {shape:?}")));
    }
    let done: Vec<Result<()>> = new
        .par_chunks_mut(cols * dtype.size())
        .enumerate()
        .map_init(
            || vec![0f32; cols],
            |values, (row, new)| {
                Encoding::Plain(dtype).widen(old, row * cols, values);
                let scale = bf16::from_le_bytes([scales[2 * row], scales[2 * row + 1]]).to_f32();
                let signs = &signs[row * cols.div_ceil(8)..];
                for (i, value) in values.iter_mut().enumerate() {
                    *value += if signs[i / 8] >> (i % 8) & 1 == 1 { scale } else { -scale };
                }
                dtype.narrow(values, new)
            },
        )
        .collect();
    done.into_iter().collect()
}
