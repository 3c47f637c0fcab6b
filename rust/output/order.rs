//! The order of tensors in a safetensors file: as given, unless that would put one where readers cannot view it.
//!
//! The format allows no padding, and torch refuses to view bytes as a dtype from an offset that is no
//! multiple of its size. An odd number of FP16 values in front of an FP32 tensor is enough.

use super::Item;
use crate::error::Result;

/// An order in which every tensor starts at a multiple of its element's size.
///
/// Where the given one does not do, tensors whose length is no multiple of 8 (nearly always tiny: biases,
/// flags) go to the end, larger elements first.
pub(super) fn aligned(items: &[Item]) -> Result<Vec<usize>> {
    let sizes = items.iter().map(Item::byte_len).collect::<Result<Vec<u64>>>()?;
    let mut offset = 0u64;
    let fits = items.iter().zip(&sizes).all(|(item, bytes)| {
        let aligned = offset.is_multiple_of(item.dtype.size() as u64);
        offset = offset.saturating_add(*bytes);
        aligned
    });
    let mut order: Vec<usize> = (0..items.len()).collect();
    if !fits {
        let odd = |i: usize| !sizes[i].is_multiple_of(8);
        order.sort_by_key(|&i| (odd(i), if odd(i) { 8 - items[i].dtype.size() } else { 0 }));
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    fn item(dtype: Dtype, n: usize) -> Item {
        Item { name: format!("{}{n}", dtype.name()), dtype, shape: vec![n] }
    }

    #[test]
    fn every_tensor_starts_at_a_multiple_of_its_elements() {
        use Dtype::{BOOL, F16, F32, I64};
        let straight = [item(F32, 3), item(F16, 3), item(BOOL, 5)];
        assert_eq!(aligned(&straight).unwrap(), [0, 1, 2]);
        let crooked = [item(BOOL, 3), item(F16, 4), item(F16, 5), item(F32, 7), item(I64, 2), item(F32, 2)];
        let order = aligned(&crooked).unwrap();
        assert_eq!(order, [1, 4, 5, 3, 2, 0]);
        let mut offset = 0;
        for i in order {
            assert_eq!(offset % crooked[i].dtype.size(), 0);
            offset += crooked[i].byte_len().unwrap() as usize;
        }
    }
}
