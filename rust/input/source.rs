//! A file's bytes, mapped read-only, with the name that messages use for it.

use crate::error::{Error, Kind, Result};
use memmap2::Mmap;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// The bytes of one input file.
pub(super) struct Source {
    path: PathBuf,
    bytes: Bytes,
}

enum Bytes {
    Map(Mmap),
    Owned(Vec<u8>),
}

impl Source {
    /// Maps a regular file. An empty one is refused, because no format here allows it.
    pub fn open(path: &Path) -> Result<Source> {
        let meta = fs::metadata(path).map_err(|e| Error::io("cannot open", path, &e))?;
        if !meta.is_file() {
            let what = if meta.is_dir() { "a folder" } else { "not a regular file" };
            return Err(Error::input(format!("{}: this is {what}; a file is needed", path.display())));
        }
        if meta.len() == 0 {
            return Err(Error::input(format!("{}: the file is empty", path.display())));
        }
        let file = File::open(path).map_err(|e| Error::io("cannot open", path, &e))?;
        // SAFETY: the map is read-only and private to this process. As with every mapped model file, the
        // file must not be shortened by someone else while it is read; opening it for writing is not ours.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("cannot map", path, &e))?;
        Ok(Source { path: path.to_path_buf(), bytes: Bytes::Map(map) })
    }

    /// Bytes that the caller has, shown to people as `name`.
    pub fn of_bytes(name: &str, bytes: Vec<u8>) -> Source {
        Source { path: PathBuf::from(name), bytes: Bytes::Owned(bytes) }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An input error about this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format!("{}: {what}", self.path.display()))
    }

    /// An unsupported error about this file.
    pub fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::unsupported(format!("{}: {what}", self.path.display()))
    }
}

impl Deref for Source {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Map(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Reads a small file whole, unless it is longer than `cap` bytes.
pub(super) fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|e| Error::io("cannot open", path, &e))?;
    let mut bytes = Vec::new();
    file.take(cap + 1).read_to_end(&mut bytes).map_err(|e| Error::io("cannot read", path, &e))?;
    if bytes.len() as u64 > cap {
        return Err(too_long(path, cap));
    }
    Ok(bytes)
}

pub(super) fn too_long(path: &Path, cap: u64) -> Error {
    Error::new(
        Kind::Input,
        format!("{}: the file is longer than {} MiB, the most allowed for it", path.display(), cap >> 20),
    )
}
