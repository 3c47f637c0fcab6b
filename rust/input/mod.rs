//! The inputs: models as other tools write them, validated when they are opened, before any work starts.
//!
//! Nothing in a file is believed before it is checked against the file's length, and no size that a file
//! states is allocated. Tensors are read where they lie: most inputs hand out slices of the mapped file.

mod bundle;
mod check;
mod gguf;
mod huggingface;
mod safetensors;
mod source;

pub use bundle::Bundle;
pub(crate) use bundle::MAX_BYTES as MAX_BUNDLE_BYTES;
pub use gguf::Gguf;
pub use huggingface::Folder;
pub use safetensors::Safetensors;

use crate::error::{Error, Result};
use crate::tensor::{Encoding, Tensor};
use rayon::prelude::*;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What is known of a tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the model.
    pub name: String,
    /// Extents, outermost first; a weight of a linear layer is [out, in].
    pub shape: Vec<usize>,
    /// How its elements are spelled.
    pub encoding: Encoding,
}

/// A small file that belongs to the model: config, tokenizer, licence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// Relative, with `/` between components, and none of them `..`.
    pub path: String,
    /// The file as it is.
    pub bytes: Vec<u8>,
}

/// Enough bytes to tell matrices of trained weights apart.
pub const BEGINNING: usize = 64;

/// Takes a piece of a tensor: its place, and its bytes.
pub type Each<'a> = &'a (dyn Fn(usize, &[u8]) -> Result<()> + Sync);

/// An open model.
pub trait Model: Send + Sync {
    /// The format's name, for people.
    fn format(&self) -> &'static str;

    /// Every tensor, in an order that depends on the model alone; no name stands twice.
    fn tensors(&self) -> &[TensorInfo];

    /// Tensor `index` of [`Model::tensors`], borrowed from the mapped file where possible.
    ///
    /// # Errors
    /// An input error if the file has changed since it was opened.
    ///
    /// # Panics
    /// If there is no such tensor.
    fn read(&self, index: usize) -> Result<Tensor<'_>>;

    /// Hands over the bytes of tensor `index` in pieces, each with its place, in no order and on any thread.
    ///
    /// # Errors
    /// As [`Model::read`]; whatever `each` returns.
    ///
    /// # Panics
    /// If there is no such tensor.
    fn pieces(&self, index: usize, each: Each<'_>) -> Result<()> {
        crate::pieces::each(&crate::pipeline::plain(self.read(index)?), each)
    }

    /// Whether two tensors of one shape and encoding hold the same; a model may say no where it cannot tell cheaply.
    ///
    /// # Errors
    /// As [`Model::read`].
    ///
    /// # Panics
    /// If there is no such tensor.
    fn same(&self, a: usize, b: usize) -> Result<bool> {
        Ok(self.read(a)?.bytes == self.read(b)?.bytes)
    }

    /// The first bytes of what [`Model::same`] compares, at most [`BEGINNING`]: tensors whose beginnings differ differ.
    ///
    /// # Errors
    /// As [`Model::read`].
    ///
    /// # Panics
    /// If there is no such tensor.
    fn beginning(&self, index: usize) -> Result<Vec<u8>> {
        let bytes = self.read(index)?.bytes;
        Ok(bytes[..bytes.len().min(BEGINNING)].to_vec())
    }

    /// The files that must travel with the weights.
    ///
    /// # Errors
    /// An I/O error, or an input error if one has grown too long since the model was opened.
    fn sidecars(&self) -> Result<Vec<Sidecar>>;

    /// `config.json`, if the model has one.
    fn config(&self) -> Option<&serde_json::Value> {
        None
    }

    /// Every file that is read, to see that none of them is the output.
    fn paths(&self) -> Vec<PathBuf>;

    /// Advice for the user, a sentence each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// BLAKE3 of every tensor's name, dtype, shape and the BLAKE3 of its elements, in the order of the names: what a
/// model is, whatever file or shards hold it.
///
/// # Errors
/// An input error if a file has changed since it was opened.
pub fn digest(model: &dyn Model) -> Result<[u8; 32]> {
    Ok(digest_of(model.tensors(), &digests(model)?))
}

/// BLAKE3 of every tensor's elements, in the model's order.
///
/// # Errors
/// An input error if a file has changed since it was opened.
pub fn digests(model: &dyn Model) -> Result<Vec<[u8; 32]>> {
    // Collected as results first: the first error in order wins, whichever thread was faster.
    let digests: Vec<_> = (0..model.tensors().len())
        .into_par_iter()
        .with_max_len(1)
        .map(|i| Ok(content_digest(&model.read(i)?.bytes)))
        .collect();
    digests.into_iter().collect()
}

/// BLAKE3 of a tensor's elements, on the threads that are free.
pub fn content_digest(bytes: &[u8]) -> [u8; 32] {
    crate::pieces::digest(bytes)
}

/// The [`digest`] of a model whose tensors have those digests of their own.
pub fn digest_of(tensors: &[TensorInfo], digests: &[[u8; 32]]) -> [u8; 32] {
    let mut order: Vec<_> = tensors.iter().zip(digests).collect();
    order.sort_by_key(|(info, _)| &info.name);
    let mut hasher = blake3::Hasher::new();
    for (info, digest) in order {
        let line = format!(
            "{:?} {} {:?} {}\n",
            info.name,
            info.encoding.name(),
            info.shape,
            blake3::Hash::from_bytes(*digest).to_hex()
        );
        hasher.update(line.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Opens a model of any format: the contents decide, not the file's name.
///
/// # Errors
/// An I/O error for a path that cannot be read; an input error for a malformed model; a usage error for a
/// path that is no model; an unsupported error for formats that are never read.
pub fn open(path: &Path) -> Result<Box<dyn Model>> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("cannot open", path, &e))?;
    if meta.is_dir() {
        return Ok(Box::new(Folder::open(path)?));
    }
    if !meta.is_file() {
        return Err(Error::usage(format!("{}: not a regular file or a folder", path.display())));
    }
    if meta.len() == 0 {
        return Err(Error::input(format!("{}: the file is empty", path.display())));
    }
    let mut head = Vec::with_capacity(512);
    File::open(path)
        .and_then(|file| file.take(512).read_to_end(&mut head))
        .map_err(|e| Error::io("cannot read", path, &e))?;

    if head.starts_with(b"GGUF") {
        return Ok(Box::new(Gguf::open(path)?));
    }
    refuse_other_formats(path, &head)?;
    if has_extension(path, &["safetensors"]) || safetensors::looks_like(&head, meta.len()) {
        return Ok(Box::new(Safetensors::open(path)?));
    }
    if has_extension(path, &["gguf"]) {
        return Err(Error::input(format!(
            "{}: the file does not start with `GGUF`; it is damaged or no GGUF file",
            path.display()
        )));
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&head);
    let object = text.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{');
    if object || has_extension(path, &["json"]) {
        return match Bundle::open(path) {
            Ok(bundle) => Ok(Box::new(bundle)),
            Err(_) if huggingface::is_sidecar(path) => Err(Error::usage(format!(
                "{}: this is one of the small files of a Hugging Face model; give its folder",
                path.display()
            ))),
            Err(e) => Err(e),
        };
    }
    Err(Error::input(format!(
        "{}: not a model that can be read; give a .safetensors, .gguf or JSON bundle file, or a Hugging Face folder",
        path.display()
    )))
}

/// One sentence for each file that people are likely to give and that is no input.
fn refuse_other_formats(path: &Path, head: &[u8]) -> Result<()> {
    let shown = path.display();
    if head.starts_with(b"\x89TPK") {
        return Err(Error::usage(format!(
            "{shown}: already compressed; restore it with `tenpak decompress`, or look inside with `tenpak inspect`"
        )));
    }
    if head.starts_with(b"version https://git-lfs") {
        return Err(Error::input(format!(
            "{shown}: this is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
        )));
    }
    let file_name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if file_name.ends_with(".index.json") {
        return Err(Error::usage(format!("{shown}: this is the index of a sharded model; give its folder")));
    }
    let zip = head.starts_with(b"PK\x03\x04");
    let pickled = head.len() > 1 && head[0] == 0x80 && (2..=5).contains(&head[1]);
    if head.starts_with(b"\x93NUMPY") || (zip && has_extension(path, &["npz"])) {
        return Err(Error::unsupported(format!(
            "{shown}: NumPy files are not read; save the arrays with `safetensors.numpy.save_file`"
        )));
    }
    if head.starts_with(b"\x89HDF") || has_extension(path, &["h5", "msgpack", "onnx"]) {
        return Err(Error::unsupported(format!(
            "{shown}: this format is not read; convert it to safetensors"
        )));
    }
    let safe = safetensors::looks_like(head, u64::MAX);
    if zip
        || (pickled && !safe)
        || has_extension(path, &["bin", "pt", "pth", "pkl", "pickle", "ckpt"]) && !safe
    {
        return Err(pickle(path));
    }
    Ok(())
}

/// The refusal of PyTorch's own format.
fn pickle(path: &Path) -> Error {
    Error::unsupported(format!(
        "{}: pickle files can run code and are never read; convert to safetensors first \
         (`model.save_pretrained(folder, safe_serialization=True)`)",
        path.display()
    ))
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|e| extensions.iter().any(|known| e.eq_ignore_ascii_case(known)))
}
