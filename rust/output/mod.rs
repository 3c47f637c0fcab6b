//! The outputs: models as other tools read them, streamed tensor by tensor, each file whole or not there at all.

mod bundle;
mod folder;
mod order;
mod safetensors;

use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::input::Sidecar;
use crate::tensor::{Dtype, element_count};
use std::collections::HashSet;
use std::path::Path;

/// An output format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The JSON bundle.
    Bundle,
    /// One `.safetensors` file.
    Safetensors,
    /// A Hugging Face folder: weights, shards where they are large, and the model's small files.
    Folder,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 3] = [Format::Bundle, Format::Safetensors, Format::Folder];

    /// The name that options use.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Bundle => "json",
            Format::Safetensors => "safetensors",
            Format::Folder => "folder",
        }
    }

    /// What the path's extension asks for; anything but `.json` and `.safetensors` is a folder.
    pub fn of(path: &Path) -> Format {
        let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        // `Path` drops a slash at the end, with which people say that they mean a folder.
        let slash = path.to_string_lossy().ends_with(['/', std::path::MAIN_SEPARATOR]);
        match extension.as_deref() {
            Some("json") if !slash => Format::Bundle,
            Some("safetensors") if !slash => Format::Safetensors,
            _ => Format::Folder,
        }
    }

    /// The format of that name.
    ///
    /// # Errors
    /// A usage error that lists the names.
    pub fn from_name(name: &str) -> Result<Format> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Format::name).join(", ");
            Error::usage(format!("unknown output format {name:?}; choose one of {names}"))
        })
    }
}

/// A tensor to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Its name.
    pub name: String,
    /// The dtype of the bytes that will be written.
    pub dtype: Dtype,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
}

impl Item {
    /// The bytes that the tensor takes.
    fn byte_len(&self) -> Result<u64> {
        let shape: Vec<u64> = self.shape.iter().map(|&n| n as u64).collect();
        // Below 2^56 elements of at most eight bytes: no overflow.
        Ok(element_count(&shape).map_err(|e| Error::usage(e.to_string()).at(&self.name))?
            * self.dtype.size() as u64)
    }
}

/// How to write.
#[derive(Clone, Debug)]
pub struct Options {
    /// Replace what is there.
    pub force: bool,
    /// The most bytes of weights in one file of a folder.
    pub shard_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { force: false, shard_bytes: 5_000_000_000 }
    }
}

/// Takes a piece of an item: the item's number, the piece's place in it, and its bytes; on any thread.
pub type Place<'a> = &'a (dyn Fn(usize, usize, &[u8]) -> Result<()> + Sync);

/// Hands every byte of every item to a [`Place`], once.
pub type Fill<'a> = &'a mut (dyn FnMut(Place<'_>) -> Result<()> + Send);

/// A model under construction. Dropping it unfinished leaves nothing behind.
pub trait ModelWriter: Send {
    /// Writes the next item, whole: little-endian, row-major.
    ///
    /// # Errors
    /// An I/O error; a usage error for a wrong number of bytes; an input error for a value that the format
    /// cannot hold, naming the tensor.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Where items can be written in any order, has `fill` write all of them instead of [`ModelWriter::write`];
    /// returns whether that is so.
    ///
    /// # Errors
    /// Whatever `fill` returns; an I/O error.
    fn fill(&mut self, fill: Fill<'_>) -> Result<bool> {
        let _ = fill;
        Ok(false)
    }

    /// Puts the model in its place.
    ///
    /// # Errors
    /// An I/O error; a usage error if items are missing.
    fn finish(self: Box<Self>) -> Result<()>;
}

/// Starts a model of `items`, which are then written in their order.
///
/// Only a folder holds sidecars; the other formats leave them out.
///
/// # Errors
/// A usage error if the target exists and may not be replaced, or for names that stand twice; an
/// unsupported one for dtypes that the format does not hold; an I/O error. Nothing is left then.
pub fn create(
    format: Format,
    path: &Path,
    items: &[Item],
    sidecars: &[Sidecar],
    options: &Options,
) -> Result<Box<dyn ModelWriter>> {
    let mut seen = HashSet::new();
    for item in items {
        item.byte_len()?;
        if !seen.insert(item.name.as_str()) {
            return Err(Error::usage(format!("{}: tensor {:?} stands twice", path.display(), item.name)));
        }
    }
    Ok(match format {
        Format::Bundle => Box::new(bundle::Writer::create(path, items, options)?),
        Format::Safetensors => {
            let open = |bytes| AtomicFile::create(path, options.force, bytes);
            Box::new(safetensors::Writer::create(items, open)?)
        }
        Format::Folder => Box::new(folder::Writer::create(path, items, sidecars, options)?),
    })
}

/// Which item comes next; every writer counts the same way.
struct Progress {
    items: Vec<Item>,
    next: usize,
}

impl Progress {
    fn new(items: &[Item]) -> Self {
        Progress { items: items.to_vec(), next: 0 }
    }

    /// The index of the item that `bytes` are, if they are as long as it.
    fn take(&mut self, bytes: &[u8]) -> Result<usize> {
        let Some(item) = self.items.get(self.next) else {
            return Err(Error::usage(format!("all {} tensors are written already", self.items.len())));
        };
        let wanted = item.byte_len()?;
        if wanted != bytes.len() as u64 {
            return Err(Error::usage(format!(
                "{} bytes given for tensor {:?}, which takes {wanted}",
                bytes.len(),
                item.name
            )));
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    /// All items have been written.
    fn complete(&mut self) {
        self.next = self.items.len();
    }

    fn check_done(&self) -> Result<()> {
        match self.items.get(self.next) {
            None => Ok(()),
            Some(item) => Err(Error::usage(format!(
                "tensor {:?} and {} more are not written yet",
                item.name,
                self.items.len() - self.next - 1
            ))),
        }
    }
}
