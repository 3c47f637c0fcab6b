//! Tensors as the inputs hand them over: a shape, and bytes in a known encoding.

mod blocks;
mod dtype;
mod encoding;
mod rows;
mod shape;

pub use blocks::Blocks;
pub use dtype::Dtype;
pub use encoding::Encoding;
pub use rows::Rows;
pub use shape::{MAX_ELEMENTS, MAX_RANK, element_count};

use std::borrow::Cow;

/// A tensor: where it is named does not matter here, only what it holds.
///
/// `bytes` is row-major and exactly as long as `encoding.byte_len(element_count(shape))`; inputs
/// guarantee that when they are opened.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// How `bytes` spells the elements.
    pub encoding: Encoding,
    /// The elements, little-endian.
    pub bytes: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
