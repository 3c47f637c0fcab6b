//! A tensor seen as rows along its input dimension, whichever axis that is.
//!
//! Groups run along the reduction dimension of the matrix product. For a weight held as [out, in] the rows
//! are the tensor's own; for GPT-2's `Conv1D`, held as [in, out], they are its columns. In general, with
//! the input dimension at `axis`, element (outer, k, inner) of a tensor [outer…, k, inner…] is column k of
//! row outer·inner_count + inner.

use super::Tensor;
use crate::error::{Error, Result};

/// The geometry of that view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Product of the extents before the axis.
    pub outer: usize,
    /// Extent of the axis: weights per row.
    pub cols: usize,
    /// Product of the extents behind the axis; 1 where the rows are contiguous.
    pub inner: usize,
}

impl Rows {
    /// The view of `shape` along `axis`. A scalar is one row of one weight.
    ///
    /// # Errors
    /// A usage error if the axis is not one of the shape's.
    pub fn new(shape: &[usize], axis: usize) -> Result<Rows> {
        if shape.is_empty() && axis == 0 {
            return Ok(Rows { outer: 1, cols: 1, inner: 1 });
        }
        if axis >= shape.len() {
            return Err(Error::usage(format!("axis {axis} does not exist in shape {shape:?}")));
        }
        Ok(Rows {
            outer: shape[..axis].iter().product(),
            cols: shape[axis],
            inner: shape[axis + 1..].iter().product(),
        })
    }

    /// The number of rows.
    pub fn count(&self) -> usize {
        self.outer * self.inner
    }

    /// The number of weights.
    pub fn len(&self) -> usize {
        self.count() * self.cols
    }

    /// Whether there is no weight at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The position in the tensor of column `col` of row `row`.
    pub fn position(&self, row: usize, col: usize) -> usize {
        (row / self.inner * self.cols + col) * self.inner + row % self.inner
    }

    /// Widens rows `first .. first + out.len() / cols` of `tensor` into `out`, row-major.
    pub fn gather(&self, tensor: &Tensor<'_>, first: usize, out: &mut [f32]) {
        if self.cols == 0 {
            return;
        }
        if self.inner == 1 {
            return tensor.encoding.widen(&tensor.bytes, first * self.cols, out);
        }
        // A strip of a transposed matrix: read a run of neighbouring columns at a time.
        let mut run = vec![0f32; self.inner.min(out.len() / self.cols)];
        let mut row = 0;
        while row < out.len() / self.cols {
            let inner = (first + row) % self.inner;
            let n = (self.inner - inner).min(out.len() / self.cols - row);
            for col in 0..self.cols {
                tensor.encoding.widen(&tensor.bytes, self.position(first + row, col), &mut run[..n]);
                for (i, &x) in run[..n].iter().enumerate() {
                    out[(row + i) * self.cols + col] = x;
                }
            }
            row += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, Encoding};

    #[test]
    fn rows_of_every_axis_gather_what_indexing_gives() {
        let shape = vec![3usize, 4, 5];
        let values: Vec<f32> = (0..60u8).map(f32::from).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let tensor =
            Tensor { shape: shape.clone(), encoding: Encoding::Plain(Dtype::F32), bytes: bytes.into() };
        for axis in 0..3 {
            let rows = Rows::new(&shape, axis).unwrap();
            assert_eq!(rows.len(), 60);
            for first in 0..rows.count() {
                let mut out = vec![0f32; (rows.count() - first) * rows.cols];
                rows.gather(&tensor, first, &mut out);
                for (i, &x) in out.iter().enumerate() {
                    assert_eq!(x, values[rows.position(first + i / rows.cols, i % rows.cols)]);
                }
            }
        }
        assert!(Rows::new(&shape, 3).is_err());
        assert_eq!(Rows::new(&[], 0).unwrap().len(), 1);
    }
}
