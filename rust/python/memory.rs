//! A model that lies in Python's memory: named arrays.

use super::buffers::Bytes;
use super::dtype_named;
use crate::error::{Error, Result};
use crate::input::{Model, Sidecar, TensorInfo};
use crate::tensor::{Encoding, Tensor, element_count};
use std::collections::HashSet;
use std::path::PathBuf;

/// The arrays.
pub struct MemoryModel {
    tensors: Vec<TensorInfo>,
    arrays: Vec<Bytes>,
}

impl MemoryModel {
    /// From names, dtypes, shapes and bytes.
    pub fn new(arrays: Vec<(String, String, Vec<usize>, Bytes)>) -> Result<Self> {
        let mut model = MemoryModel { tensors: Vec::new(), arrays: Vec::new() };
        let mut names = HashSet::new();
        for (name, dtype, shape, bytes) in arrays {
            let encoding = Encoding::Plain(dtype_named(&dtype)?);
            let extents: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
            let wanted = element_count(&extents).map(|n| encoding.byte_len(n))?;
            if wanted != Some(bytes.as_slice().len() as u64) {
                return Err(Error::usage(format!(
                    "array {name:?} has the wrong number of bytes for {shape:?}"
                )));
            }
            if !names.insert(name.clone()) {
                return Err(Error::usage(format!("two arrays are named {name:?}")));
            }
            model.tensors.push(TensorInfo { name, shape, encoding });
            model.arrays.push(bytes);
        }
        Ok(model)
    }
}

impl Model for MemoryModel {
    fn format(&self) -> &'static str {
        "arrays"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let TensorInfo { shape, encoding, .. } = &self.tensors[index];
        let bytes = self.arrays[index].as_slice().into();
        Ok(Tensor { shape: shape.clone(), encoding: *encoding, bytes })
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(Vec::new())
    }

    fn paths(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}
