//! Writes an artifact in one pass: parts as they come, then the index, then the footer.

use super::checksums::checksums;
use super::header::{self, Footer, align_up};
use super::index::{DeltaRef, Entry, Index, PartRef, SidecarRef, check_alias};
use super::{KEEP, Limits, WRITER};
use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::tensor::Dtype;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// A tensor to write: an [`Entry`] whose parts have no place yet.
#[derive(Clone, Debug)]
pub struct NewEntry {
    /// The name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<u64>,
    /// The source's dtype.
    pub dtype: Dtype,
    /// The codec's name, or `keep`.
    pub codec: String,
    /// The version of the codec's bytes; 1 for `keep`.
    pub codec_version: u32,
    /// The input dimension; 0 for `keep`.
    pub axis: u32,
    /// The codec's own parameters.
    pub params: BTreeMap<String, Value>,
}

impl NewEntry {
    /// A tensor that is stored as it was, in one part named `data`.
    pub fn kept(name: impl Into<String>, shape: Vec<u64>, dtype: Dtype) -> NewEntry {
        let (codec, params) = (KEEP.to_owned(), BTreeMap::new());
        NewEntry { name: name.into(), shape, dtype, codec, codec_version: 1, axis: 0, params }
    }

    /// What another artifact says of a tensor, without its parts' places.
    pub fn like(entry: &Entry) -> NewEntry {
        let Entry { axis, codec, codec_version, dtype, name, params, parts: _, shape } = entry.clone();
        NewEntry { name, shape, dtype, codec, codec_version, axis, params }
    }
}

/// What a finished artifact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// BLAKE3 of the index: the artifact's identity.
    pub root: [u8; 32],
    /// Bytes of the file.
    pub file_len: u64,
}

/// An artifact under construction; dropping it before [`Writer::finish`] leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    /// None where only the identity is asked for.
    file: Option<AtomicFile>,
    written: u64,
    index: Index,
    names: HashMap<String, usize>,
    limits: Limits,
}

impl Writer {
    /// Starts an artifact at `target`. `codec` is the codec that was asked for, recorded for people.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn create(target: &Path, force: bool, expected_bytes: u64, codec: &str) -> Result<Writer> {
        let index = Index { codec: codec.to_owned(), writer: WRITER.to_owned(), ..Index::default() };
        Self::start(Some((target, force, expected_bytes)), index)
    }

    /// As [`Writer::create`], for an artifact that another program's version has made before, byte for byte.
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn create_as(target: &Path, force: bool, codec: &str, writer: &str) -> Result<Writer> {
        let index = Index { codec: codec.to_owned(), writer: writer.to_owned(), ..Index::default() };
        Self::start(Some((target, force, 0)), index)
    }

    /// Starts an artifact that is written nowhere: [`Writer::finish`] says what it would be.
    ///
    /// # Errors
    /// A usage error for a codec's name that cannot be.
    pub fn nowhere(codec: &str, writer: &str) -> Result<Writer> {
        let index = Index { codec: codec.to_owned(), writer: writer.to_owned(), ..Index::default() };
        Self::start(None, index)
    }

    /// Starts a delta; what it is comes at the end, with [`Writer::finish_delta`].
    ///
    /// # Errors
    /// As [`AtomicFile::create`].
    pub fn create_delta(target: &Path, force: bool, mode: &str, codec: &str) -> Result<Writer> {
        let delta = DeltaRef {
            base: [0; 32],
            files: BTreeMap::new(),
            mode: mode.to_owned(),
            removed: Vec::new(),
            result: [0; 32],
        };
        let writer = WRITER.to_owned();
        let index = Index { codec: codec.to_owned(), writer, delta: Some(delta), ..Index::default() };
        Self::start(Some((target, force, 0)), index)
    }

    fn start(target: Option<(&Path, bool, u64)>, index: Index) -> Result<Writer> {
        let limits = Limits::default();
        limits.check_name("codec", &index.codec).map_err(|e| Error::usage(e.to_string()))?;
        let file = target.map(|(path, force, bytes)| AtomicFile::create(path, force, bytes)).transpose()?;
        let mut writer = Writer { file, written: 0, index, names: HashMap::new(), limits };
        writer.put(&header::header(writer.index.incompat()))?;
        Ok(writer)
    }

    /// Writes a tensor: `parts` in the order of the codec's layout, or one part `data` for a kept tensor.
    ///
    /// # Errors
    /// An input error for a name that is taken or not allowed; a usage error for parts that do not fit; an
    /// I/O error.
    pub fn tensor(&mut self, new: NewEntry, parts: &[(&str, &[u8])]) -> Result<()> {
        let NewEntry { name, shape, dtype, codec, codec_version, axis, params } = new;
        let place = |e: Error| Error::usage(e.to_string()).at(format_args!("tensor {name:?}"));
        self.limits.check_name("tensor", &name).map_err(|e| Error::input(e.to_string()))?;
        if self.names.contains_key(&name) || self.index.aliases.contains_key(&name) {
            return Err(Error::input(format!("two tensors or aliases are named {name:?}")));
        }
        if self.names.len() >= self.limits.tensors {
            return Err(Error::input(format!("an artifact holds at most {} tensors", self.limits.tensors)));
        }
        let unwritten = |bytes: &[u8]| PartRef { b3: [0; 32], len: bytes.len() as u64, off: 0, xxh3: 0 };
        let refs = parts.iter().map(|(part, bytes)| ((*part).to_owned(), unwritten(bytes))).collect();
        let mut entry =
            Entry { axis, codec, codec_version, dtype, name: name.clone(), params, parts: refs, shape };
        entry.check(&self.limits).map_err(place)?;
        // What a delta's own entries hold is the business of those that apply it.
        let own = self.index.delta.is_some();
        if !entry.is_kept() && entry.known_codec().is_none() && !own {
            return Err(place(Error::usage(format!(
                "unknown codec {:?}, version {}",
                entry.codec, entry.codec_version
            ))));
        }
        let order: Vec<_> = entry.parts_in_order().iter().map(|(part, _)| (*part).to_owned()).collect();
        let known = entry.is_kept() || entry.known_codec().is_some();
        let in_order = order.iter().eq(parts.iter().map(|(part, _)| part));
        if order.len() != parts.len() || (known && !in_order) {
            return Err(place(Error::usage(format!("the parts are not {}", order.join(", ")))));
        }
        for (part, bytes) in parts {
            let written = self.part(bytes)?;
            entry.parts.insert((*part).to_owned(), written);
        }
        self.names.insert(name, self.index.tensors.len());
        self.index.tensors.push(entry);
        Ok(())
    }

    /// Makes `name` stand for the tensor `of`, which must have been written.
    ///
    /// # Errors
    /// An input error for a name that is taken or not allowed; a usage error if `of` is no tensor.
    pub fn alias(&mut self, name: &str, of: &str) -> Result<()> {
        self.limits.check_name("alias", name).map_err(|e| Error::input(e.to_string()))?;
        if self.index.aliases.contains_key(name) {
            return Err(Error::input(format!("two aliases are named {name:?}")));
        }
        check_alias(name, of, &self.names).map_err(|e| Error::input(e.to_string()))?;
        self.index.aliases.insert(name.to_owned(), of.to_owned());
        Ok(())
    }

    /// Embeds a file under a relative path.
    ///
    /// # Errors
    /// An input error for a path that is taken or not allowed; an I/O error.
    pub fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        self.limits.check_path(path).map_err(|e| Error::input(e.to_string()))?;
        if self.index.files.iter().any(|f| f.path == path) {
            return Err(Error::input(format!("two embedded files are named {path:?}")));
        }
        let part = self.part(bytes)?;
        self.index.files.push(SidecarRef { path: path.to_owned(), part });
        Ok(())
    }

    /// Writes the index and the footer and puts the file in its place.
    ///
    /// # Errors
    /// An I/O error; an input error for more tensors, files or names than an artifact can hold.
    pub fn finish(self) -> Result<Finished> {
        self.finish_if(|_| Ok(()))
    }

    /// As [`Writer::finish`], for a delta: says what it is.
    ///
    /// # Errors
    /// As [`Writer::finish`].
    pub fn finish_delta(mut self, delta: DeltaRef) -> Result<Finished> {
        self.index.delta = Some(delta);
        self.finish()
    }

    /// As [`Writer::finish`], if `agree` has nothing against the root: the file takes its place only then.
    ///
    /// # Errors
    /// As [`Writer::finish`]; whatever `agree` returned.
    pub fn finish_if(mut self, agree: impl FnOnce([u8; 32]) -> Result<()>) -> Result<Finished> {
        let json = self.index.to_json();
        let index_off = self.pad()?;
        self.index
            .check(index_off, self.index.incompat(), &self.limits)
            .map_err(|e| Error::input(e.to_string()))?;
        if json.len() as u64 > self.limits.index_bytes {
            return Err(Error::input(format!(
                "the index would have {} bytes; at most {} are allowed",
                json.len(),
                self.limits.index_bytes
            )));
        }
        let root = *blake3::hash(&json).as_bytes();
        agree(root)?;
        self.put(&json)?;
        let file_len = self.written + header::FRAME as u64;
        self.put(&Footer { index_off, index_len: json.len() as u64, file_len, root }.to_bytes())?;
        if let Some(file) = self.file {
            file.commit()?;
        }
        Ok(Finished { root, file_len })
    }

    /// Writes one part behind the last, hashing it at the same time.
    fn part(&mut self, bytes: &[u8]) -> Result<PartRef> {
        let off = self.pad()?;
        let (written, sums) = rayon::join(|| self.put(bytes), || checksums(bytes));
        written?;
        Ok(PartRef { b3: sums.1, len: bytes.len() as u64, off, xxh3: sums.0 })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.file.as_mut().map_or(Ok(()), |file| file.put(bytes))
    }

    /// Writes zeros up to the next place where something can start.
    fn pad(&mut self) -> Result<u64> {
        let end = self.written;
        let start = align_up(end).ok_or_else(|| Error::input("the artifact would have 2^64 bytes"))?;
        self.put(&[0; header::ALIGN as usize][..(start - end) as usize])?;
        Ok(start)
    }
}
