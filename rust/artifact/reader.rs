//! Opens an artifact and hands out its tensors; a file is checked before anything in it is believed.

use super::Limits;
use super::checksums::map_parts;
use super::header::{self, Footer};
use super::index::{DeltaRef, Entry, Index, PartRef, SidecarRef};
use crate::error::{Error, Result};
use crate::runner;
use crate::tensor::{Dtype, Encoding};
use memmap2::Mmap;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Elements that are converted at a time: they fit a core's cache.
const CHUNK: usize = 1 << 15;

/// An open artifact: its index in memory, its parts in the file.
///
/// Opening checks the frames, the index and that every part lies where it must. The parts' own checksums are
/// checked when they are used ([`ArtifactFile::checked_part`], [`ArtifactFile::decode`]) and all together by
/// [`ArtifactFile::verify`].
pub struct ArtifactFile {
    path: PathBuf,
    source: Source,
    footer: Footer,
    limits: Limits,
    index: Index,
    names: HashMap<String, usize>,
}

enum Source {
    Map(Mmap),
    Memory(Vec<u8>),
}

impl Source {
    fn bytes(&self) -> &[u8] {
        match self {
            Source::Map(map) => map,
            Source::Memory(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for ArtifactFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArtifactFile")
            .field("path", &self.path)
            .field("codec", &self.index.codec)
            .field("tensors", &self.index.tensors.len())
            .finish_non_exhaustive()
    }
}

impl ArtifactFile {
    /// Opens an artifact with the default [`Limits`].
    ///
    /// # Errors
    /// An I/O error; an artifact error that says what is damaged; an unsupported error for newer versions.
    pub fn open(path: &Path) -> Result<ArtifactFile> {
        Self::open_with(path, &Limits::default())
    }

    /// Opens an artifact with limits of one's own.
    ///
    /// # Errors
    /// As [`ArtifactFile::open`].
    pub fn open_with(path: &Path, limits: &Limits) -> Result<ArtifactFile> {
        let cannot = |e: std::io::Error| Error::io("cannot open", path, &e);
        // Before it is opened, which a pipe that nobody writes to would never end.
        if !path.metadata().map_err(cannot)?.is_file() {
            return Err(Error::usage(format!("{} is no file; give a .tenpak file", path.display())));
        }
        let file = File::open(path).map_err(cannot)?;
        let about = file.metadata().map_err(cannot)?;
        let source = if about.len() == 0 {
            // An empty file cannot be mapped.
            Source::Memory(Vec::new())
        } else {
            // SAFETY: the map is read-only. Tenpak replaces artifacts by renaming, so a mapped file does not
            // change; another program that writes into it in place breaks every reader of mapped files.
            Source::Map(unsafe { Mmap::map(&file) }.map_err(cannot)?)
        };
        Self::check(path, source, limits).map_err(|e| e.at(path.display()))
    }

    /// Reads an artifact that is in memory already, with the same checks.
    ///
    /// # Errors
    /// As [`ArtifactFile::open`], without I/O errors.
    pub fn from_bytes(bytes: Vec<u8>, limits: &Limits) -> Result<ArtifactFile> {
        Self::check(Path::new("<memory>"), Source::Memory(bytes), limits)
    }

    fn check(path: &Path, source: Source, limits: &Limits) -> Result<ArtifactFile> {
        let (footer, json, incompat) = header::check(source.bytes(), limits)?;
        let index = Index::parse(json)?;
        let names = index.check(footer.index_off, incompat, limits)?;
        Ok(ArtifactFile { path: path.to_path_buf(), source, footer, limits: *limits, index, names })
    }

    /// The format's version.
    pub fn version(&self) -> u32 {
        header::VERSION
    }

    /// The codec that was asked for when the artifact was made; single tensors may have others.
    pub fn codec(&self) -> &str {
        &self.index.codec
    }

    /// What this is a delta of, if it is one.
    pub fn delta(&self) -> Option<&DeltaRef> {
        self.index.delta.as_ref()
    }

    /// The program that wrote the artifact, with its version.
    pub fn writer(&self) -> &str {
        &self.index.writer
    }

    /// The artifact's identity: BLAKE3 of its index.
    pub fn root(&self) -> [u8; 32] {
        self.footer.root
    }

    /// Bytes of the whole file.
    pub fn file_len(&self) -> u64 {
        self.footer.file_len
    }

    /// Bytes of the index.
    pub fn index_len(&self) -> u64 {
        self.footer.index_len
    }

    /// The file, or `<memory>`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in the order in which they were written.
    pub fn tensors(&self) -> &[Entry] {
        &self.index.tensors
    }

    /// Names that stand for another tensor.
    pub fn aliases(&self) -> &BTreeMap<String, String> {
        &self.index.aliases
    }

    /// The embedded files.
    pub fn files(&self) -> &[SidecarRef] {
        &self.index.files
    }

    /// The tensor of that name or alias.
    ///
    /// # Errors
    /// A usage error that suggests names like it.
    pub fn find(&self, name: &str) -> Result<&Entry> {
        let target = self.index.aliases.get(name).map_or(name, String::as_str);
        match self.names.get(target) {
            Some(&i) => Ok(&self.index.tensors[i]),
            None => Err(self.no_such_tensor(name)),
        }
    }

    fn no_such_tensor(&self, name: &str) -> Error {
        let all = self.index.tensors.iter().map(|t| &t.name).chain(self.index.aliases.keys());
        let near = super::near::nearest(name, all.map(String::as_str));
        let mut message = format!("no tensor {name:?} in {}", self.path.display());
        if let [first, others @ ..] = near.as_slice() {
            message += &format!("; did you mean {first:?}");
            others.iter().for_each(|other| message += &format!(" or {other:?}"));
            message.push('?');
        }
        Error::usage(message)
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        self.source.bytes()
    }

    /// A part's bytes, unchecked.
    ///
    /// # Panics
    /// If the part is not one of this artifact's.
    pub fn part(&self, part: &PartRef) -> &[u8] {
        &self.bytes()[part.off as usize..][..part.len as usize]
    }

    /// A part's bytes, with their XXH3 checked. `place` is for the error: `tensor "x", codes`.
    ///
    /// # Errors
    /// An artifact error if the bytes are damaged.
    ///
    /// # Panics
    /// If the part is not one of this artifact's.
    pub fn checked_part(&self, part: &PartRef, place: &str) -> Result<&[u8]> {
        let bytes = self.part(part);
        if xxhash_rust::xxh3::xxh3_64(bytes) == part.xxh3 {
            return Ok(bytes);
        }
        Err(damaged(place, part).at(self.path.display()))
    }

    /// Rebuilds a tensor into `out` as `dtype`, row-major; its parts' checksums are checked first.
    ///
    /// A tensor under a codec, or a kept one of dtype F32, F16 or BF16, can become any of these three; other
    /// kept tensors only what they are.
    ///
    /// # Errors
    /// An artifact error for damaged bytes; an unsupported error for a codec that this build does not know; a
    /// usage error for a dtype or an output size that does not fit.
    ///
    /// # Panics
    /// If the entry is not one of this artifact's.
    pub fn decode(&self, entry: &Entry, dtype: Dtype, out: &mut [u8]) -> Result<()> {
        let place = |e: Error| e.at(format_args!("tensor {:?}", entry.name));
        let shape = entry.extents().map_err(place)?;
        if (entry.elements()).checked_mul(dtype.size() as u64) != Some(out.len() as u64) {
            return Err(place(Error::usage(format!(
                "an output of {} bytes does not hold shape {:?} as {}",
                out.len(),
                entry.shape,
                dtype.name()
            ))));
        }
        if entry.is_kept() {
            return convert(entry.dtype, self.entry_parts(entry)?[0], dtype, out).map_err(place);
        }
        let Some(codec) = entry.known_codec() else {
            if self.index.delta.is_some() {
                return Err(place(Error::usage(
                    "this file is a delta, and its base is needed to read it (`tenpak materialize --base BASE --delta \
                     DELTA`, or `tenpak.open(delta, base=BASE)`)",
                )));
            }
            return Err(place(Error::unsupported(format!(
                "codec {:?}, version {}, needs a newer tenpak",
                entry.codec, entry.codec_version
            ))));
        };
        let parts = self.entry_parts(entry)?;
        runner::decode(codec, entry.exponent(), &shape, entry.axis as usize, &parts, dtype, out)
            .map_err(place)
    }

    /// Every part of a tensor, checked, in the order of their bytes.
    pub(crate) fn entry_parts(&self, entry: &Entry) -> Result<Vec<&[u8]>> {
        // Collected as results first: the first error in order wins, whichever thread was faster.
        let parts = map_parts(
            &entry.parts_in_order(),
            |(_, part)| part.len,
            |(name, part)| self.checked_part(part, &format!("tensor {:?}, {name}", entry.name)),
        );
        parts.into_iter().collect()
    }

    pub(super) fn frames(&self) -> Result<()> {
        let (footer, ..) = header::check(self.bytes(), &self.limits)?;
        if footer != self.footer {
            return Err(Error::artifact("the file has changed since it was opened"));
        }
        Ok(())
    }
}

pub(super) fn damaged(place: &str, part: &PartRef) -> Error {
    Error::artifact(format!(
        "{place} is damaged: its checksum does not match ({} bytes at offset {}); copy the file again",
        part.len, part.off
    ))
}

/// Rewrites weights of one dtype as another; finite ones stay finite.
pub(crate) fn convert(from: Dtype, bytes: &[u8], to: Dtype, out: &mut [u8]) -> Result<()> {
    if from == to {
        out.copy_from_slice(bytes);
        return Ok(());
    }
    if !from.is_weight() || !to.is_weight() {
        let (from, to) = (from.name(), to.name());
        return Err(Error::usage(format!(
            "it is kept as {from}, which cannot become {to}; read it as {from}"
        )));
    }
    let encoding = Encoding::Plain(from);
    out.par_chunks_mut(CHUNK * to.size()).enumerate().try_for_each_init(
        || vec![0f32; CHUNK],
        |scratch, (i, out)| {
            let weights = &mut scratch[..out.len() / to.size()];
            encoding.widen(bytes, i * CHUNK, weights);
            let largest = to.largest();
            weights.iter_mut().filter(|w| w.is_finite()).for_each(|w| *w = w.clamp(-largest, largest));
            to.narrow(weights, out)
        },
    )
}
