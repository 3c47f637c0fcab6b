//! The GGUF input, versions 2 and 3, little-endian; models of known architectures appear as in Hugging Face folders.
//!
//! Layout: magic, version u32, tensor count u64, key-value count u64, the key-value pairs, the tensors'
//! descriptions, padding, then the data at the alignment that `general.alignment` gives.

mod config;
mod cursor;
mod family;
mod metadata;
mod order;
mod pre_tokenizer;
mod rope;
mod sentencepiece;
mod tensors;
mod tokenizer;
mod translate;

use super::source::Source;
use super::{BEGINNING, Model, Sidecar, TensorInfo};
use crate::error::Result;
use crate::tensor::Tensor;
use cursor::Cursor;
use metadata::Metadata;
use serde_json::Value;
use std::path::{Path, PathBuf};
use translate::{Translated, translate};

/// An open GGUF file.
pub struct Gguf {
    source: Source,
    /// In the order of their descriptions.
    model: Translated,
}

impl Gguf {
    /// Opens and validates a file; of its tensors only the rotation's factors are read.
    ///
    /// # Errors
    /// An I/O error; an input error that names the tensor, key or byte; an unsupported error for a tensor
    /// type or a version that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Source::open(path)?)
    }

    /// As [`Gguf::open`], over bytes in memory; `name` stands in messages.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(Source::of_bytes(name, bytes))
    }

    fn parse(source: Source) -> Result<Self> {
        let mut cursor = Cursor { source: &source, at: 0 };
        let (tensor_count, pair_count) = cursor.head()?;
        let metadata = Metadata::read(&mut cursor, pair_count)?;
        let raw = tensors::descriptions(&mut cursor, tensor_count)?;
        let placed = tensors::place(&source, cursor.at, metadata.alignment, raw)?;
        let model = translate(&source, &metadata, placed);
        Ok(Gguf { source, model })
    }

    /// A tensor as it lies in the file, with the shape that it has there.
    fn stored(&self, index: usize) -> Tensor<'_> {
        let placed = &self.model.stored[index];
        let bytes = self.source[self.model.data[index].clone()].into();
        Tensor { shape: placed.shape.clone(), encoding: placed.encoding, bytes }
    }
}

impl Model for Gguf {
    fn format(&self) -> &'static str {
        "GGUF"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.model.tensors
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        Ok(self.model.orders[index].arrange(self.stored(index)))
    }

    fn same(&self, a: usize, b: usize) -> Result<bool> {
        // Tensors that lie differently are never tied, and those that lie alike need not be arranged to see it.
        let bytes = |index: usize| &self.source[self.model.data[index].clone()];
        Ok(self.model.orders[a] == self.model.orders[b] && bytes(a) == bytes(b))
    }

    fn beginning(&self, index: usize) -> Result<Vec<u8>> {
        let bytes = &self.source[self.model.data[index].clone()];
        Ok(bytes[..bytes.len().min(BEGINNING)].to_vec())
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(self.model.sidecars.clone())
    }

    fn config(&self) -> Option<&Value> {
        self.model.config.as_ref()
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.source.path().to_path_buf()]
    }

    fn notes(&self) -> Vec<String> {
        self.model.notes.clone()
    }
}
