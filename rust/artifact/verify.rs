//! Checks every byte of an artifact: frames, padding, and both checksums of every part.

use super::checksums::{checksums, map_parts};
use super::index::PartRef;
use super::reader::damaged;
use super::{ArtifactFile, header};
use crate::error::{Error, Result};

/// Bytes that are hashed between two calls of the progress function.
const BATCH: u64 = 64 << 20;

/// What was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Tensors.
    pub tensors: usize,
    /// Parts of tensors.
    pub parts: usize,
    /// Embedded files.
    pub files: usize,
    /// Bytes of the file, all of them checked.
    pub bytes: u64,
    /// The artifact's identity.
    pub root: [u8; 32],
}

impl ArtifactFile {
    /// Checks every byte. `progress` gets the bytes hashed and the bytes to hash, on the calling thread, and
    /// can stop the work with an error.
    ///
    /// # Errors
    /// An artifact error for the first damage in the order of the file; whatever `progress` returned.
    pub fn verify(&self, progress: &dyn Fn(u64, u64) -> Result<()>) -> Result<VerifyReport> {
        self.check_bytes(progress).map_err(|e| match e.kind() {
            crate::Kind::Artifact => e.at(self.path().display()),
            _ => e,
        })
    }

    fn check_bytes(&self, progress: &dyn Fn(u64, u64) -> Result<()>) -> Result<VerifyReport> {
        self.frames()?;
        let parts = self.all_parts();
        let total = parts.iter().map(|(_, part)| part.len).sum();
        let mut end = header::FRAME as u64;
        let mut done = 0;
        progress(done, total)?;
        let mut rest = parts.as_slice();
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(batch_len(rest));
            let sound = map_parts(
                batch,
                |(_, part)| part.len,
                |(_, part)| checksums(self.part(part)) == (part.xxh3, part.b3),
            );
            for ((place, part), sound) in batch.iter().zip(sound) {
                self.check_padding(end, part.off)?;
                if !sound {
                    return Err(damaged(&place.to_string(), part));
                }
                end = part.off + part.len;
            }
            rest = later;
            done += batch.iter().map(|(_, part)| part.len).sum::<u64>();
            progress(done, total)?;
        }
        self.check_padding(end, self.file_len() - header::FRAME as u64 - self.index_len())?;
        Ok(VerifyReport {
            tensors: self.tensors().len(),
            parts: parts.len() - self.files().len(),
            files: self.files().len(),
            bytes: self.file_len(),
            root: self.root(),
        })
    }

    fn all_parts(&self) -> Vec<(Place<'_>, &PartRef)> {
        let tensors = self.tensors().iter().flat_map(|entry| {
            let parts = entry.parts_in_order().into_iter();
            parts.map(|(name, part)| (Place::Tensor(&entry.name, name), part))
        });
        let files = self.files().iter().map(|file| (Place::File(&file.path), &file.part));
        tensors.chain(files).collect()
    }

    fn check_padding(&self, start: u64, end: u64) -> Result<()> {
        let padding = &self.bytes()[start as usize..end as usize];
        match padding.iter().position(|&b| b != 0) {
            Some(i) => Err(Error::artifact(format!(
                "the padding at offset {} is damaged: it is not zero; copy the file again",
                start + i as u64
            ))),
            None => Ok(()),
        }
    }
}

/// How many parts come next: as few as hold [`BATCH`] bytes, or all that are left.
fn batch_len(parts: &[(Place<'_>, &PartRef)]) -> usize {
    let mut bytes = 0;
    let full = parts.iter().position(|(_, part)| {
        bytes += part.len;
        bytes >= BATCH
    });
    full.map_or(parts.len(), |last| last + 1)
}

enum Place<'a> {
    Tensor(&'a str, &'a str),
    File(&'a str),
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Tensor(tensor, part) => write!(f, "tensor {tensor:?}, {part}"),
            Place::File(path) => write!(f, "file {path:?}"),
        }
    }
}
