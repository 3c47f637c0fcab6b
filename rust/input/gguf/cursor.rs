//! Reading a GGUF file forward: its numbers, strings and head; every length is checked against what is left.

use super::super::check::MAX_TENSORS;
use super::super::source::Source;
use crate::error::{Error, Result};

/// The most bytes of a string that a message quotes.
const MOST_SHOWN: usize = 80;
/// The most key-value pairs; models have dozens.
const MAX_PAIRS: u64 = 65_536;

/// A place in the file.
pub(super) struct Cursor<'a> {
    pub source: &'a Source,
    pub at: usize,
}

impl<'a> Cursor<'a> {
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        self.source.error(format_args!("byte {}: {what}", self.at))
    }

    pub fn left(&self) -> usize {
        self.source.len() - self.at
    }

    pub fn bytes(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let start = self.at;
        match usize::try_from(len) {
            Ok(len) if len <= self.left() => {
                self.at += len;
                Ok(&self.source[start..self.at])
            }
            _ => {
                Err(self
                    .error(format_args!("{what} takes {len} bytes, but the file ends after {}", self.left())))
            }
        }
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N as u64, what)?);
        Ok(array)
    }

    pub fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        self.bytes(len, what)
    }

    /// A string that must be UTF-8: a key or a name.
    pub fn text(&mut self, what: &str) -> Result<&'a str> {
        let start = self.at;
        let bytes = self.string(what)?;
        std::str::from_utf8(bytes).map_err(|_| {
            // A length that is wrong may make it as long as the file.
            let shown = bytes[..bytes.len().min(MOST_SHOWN)].escape_ascii();
            let rest = if bytes.len() > MOST_SHOWN { "…" } else { "" };
            self.source.error(format_args!("byte {start}: {what} {shown}{rest} is not UTF-8"))
        })
    }

    /// Magic, version and counts.
    pub fn head(&mut self) -> Result<(u64, u64)> {
        if self.bytes(4, "the magic")? != b"GGUF" {
            return Err(self.source.error("the file does not start with `GGUF`; it is no GGUF file"));
        }
        match self.u32("the version")? {
            2 | 3 => {}
            1 => {
                return Err(self
                    .source
                    .unsupported("GGUF version 1 is not read; convert the file with a current llama.cpp"));
            }
            v if v.swap_bytes() <= 16 => {
                return Err(self
                    .source
                    .unsupported("big-endian GGUF is not read; use the little-endian file"));
            }
            v => {
                return Err(self
                    .source
                    .unsupported(format_args!("GGUF version {v} is not known; 2 and 3 are read")));
            }
        }
        let tensors = self.u64("the tensor count")?;
        // A description takes 24 bytes at least, a pair 13.
        if tensors > MAX_TENSORS as u64 || tensors > self.left() as u64 / 24 {
            return Err(self.error(format_args!(
                "{tensors} tensors do not fit into the file, or are over {MAX_TENSORS}"
            )));
        }
        let pairs = self.u64("the key-value count")?;
        if pairs > MAX_PAIRS || pairs > self.left() as u64 / 13 {
            return Err(self.error(format_args!(
                "{pairs} key-value pairs do not fit into the file, or are over {MAX_PAIRS}"
            )));
        }
        Ok((tensors, pairs))
    }
}
