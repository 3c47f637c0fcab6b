//! How a tensor's elements are arranged in the file, compared with how a Hugging Face model has them.

use super::super::TensorInfo;
use crate::tensor::{Dtype, Encoding, Tensor};
use std::borrow::Cow;

/// Rows that are transposed at once, so that whole cache lines are written.
const TILE: usize = 32;

/// The arrangement in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The same.
    Same,
    /// Rows of each head of so many are interleaved: 0, n/2, 1, n/2 + 1, …, as llama.cpp rotates neighbours
    /// where transformers rotates halves.
    Interleaved(usize),
    /// Linear layers are [out, in], where GPT-2's `Conv1D` has [in, out].
    Transposed,
}

impl Order {
    /// What a tensor becomes, or `None` where it cannot be arranged so.
    pub fn arranged(self, info: &TensorInfo) -> Option<TensorInfo> {
        let TensorInfo { name, shape, encoding } = info.clone();
        match self {
            Order::Same => Some(info.clone()),
            Order::Interleaved(head) => {
                let plain = matches!(encoding, Encoding::Plain(_));
                let fits = match shape[..] {
                    [rows] => plain && rows % head == 0,
                    [rows, _] => rows % head == 0,
                    _ => false,
                };
                fits.then_some(TensorInfo { name, shape, encoding })
            }
            Order::Transposed => {
                let &[out, inputs] = &shape[..] else { return None };
                // Blocks run along rows that are columns afterwards.
                let encoding = match encoding {
                    Encoding::Blocks(_) => Encoding::Plain(Dtype::F32),
                    plain => plain,
                };
                Some(TensorInfo { name, shape: vec![inputs, out], encoding })
            }
        }
    }

    /// The tensor, arranged as [`Order::arranged`] says.
    pub fn arrange(self, stored: Tensor<'_>) -> Tensor<'_> {
        match self {
            Order::Same => stored,
            Order::Interleaved(head) => {
                let bytes = separated(&stored.bytes, stored.shape[0], head).into();
                Tensor { bytes, ..stored }
            }
            Order::Transposed => transposed(&stored),
        }
    }
}

/// Row 2j + h of a head goes to its half h, row j; whole rows move, so that blocks stay as they are.
fn separated(bytes: &[u8], rows: usize, head: usize) -> Vec<u8> {
    let row = bytes.len() / rows.max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact((row * head).max(1)) {
        for half in 0..2 {
            head.chunks_exact(row).skip(half).step_by(2).for_each(|row| out.extend_from_slice(row));
        }
    }
    out
}

fn transposed(stored: &Tensor<'_>) -> Tensor<'static> {
    let (rows, cols) = (stored.shape[0], stored.shape[1]);
    let shape = vec![cols, rows];
    let (encoding, bytes) = match stored.encoding {
        Encoding::Plain(dtype) => {
            let element = dtype.size();
            let source = |first: usize, n: usize| {
                Cow::Borrowed(&stored.bytes[first * cols * element..][..n * cols * element])
            };
            (stored.encoding, columns(rows, cols, element, source))
        }
        Encoding::Blocks(_) => {
            let source = |first: usize, n: usize| {
                let mut values = vec![0f32; n * cols];
                stored.encoding.widen(&stored.bytes, first * cols, &mut values);
                values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
            };
            (Encoding::Plain(Dtype::F32), columns(rows, cols, Dtype::F32.size(), source))
        }
    };
    Tensor { shape, encoding, bytes: bytes.into() }
}

/// The columns, one after another; `source` gives the bytes of some rows.
fn columns<'s>(
    rows: usize,
    cols: usize,
    element: usize,
    source: impl Fn(usize, usize) -> Cow<'s, [u8]>,
) -> Vec<u8> {
    let mut out = vec![0; rows * cols * element];
    for first in (0..rows).step_by(TILE) {
        let n = TILE.min(rows - first);
        let tile = source(first, n);
        for col in 0..cols {
            let column = &mut out[(col * rows + first) * element..][..n * element];
            for (row, to) in column.chunks_exact_mut(element).enumerate() {
                to.copy_from_slice(&tile[(row * cols + col) * element..][..element]);
            }
        }
    }
    out
}
