//! How large an artifact will be, to the byte, without its contents.

use super::header::{ALIGN, FRAME, align_up};
use super::index::Index;
use super::{Entry, NewEntry, PartRef, SidecarRef};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// A tensor that will be written, with the names and bytes of its parts, in their order.
pub type Sized<'a> = (NewEntry, Vec<(&'a str, u64)>);

/// The bytes of an artifact that holds these tensors, aliases and embedded files.
///
/// # Errors
/// An input error where that is 2^64 or more.
pub fn file_len(
    codec: &str,
    writer: &str,
    tensors: Vec<Sized<'_>>,
    aliases: BTreeMap<String, String>,
    files: &[(&str, u64)],
) -> Result<u64> {
    let mut end = FRAME as u64;
    let mut place = |len: u64| -> Option<PartRef> {
        let off = align_up(end)?;
        end = off.checked_add(len)?;
        // Checksums are written with a fixed number of digits.
        Some(PartRef { b3: [0; 32], len, off, xxh3: 0 })
    };
    let too_large = || Error::input("the artifact would have 2^64 bytes");
    let mut index = Index { aliases, codec: codec.to_owned(), writer: writer.to_owned(), ..Index::default() };
    for (new, parts) in tensors {
        let mut placed = BTreeMap::new();
        for (name, len) in parts {
            placed.insert(name.to_owned(), place(len).ok_or_else(too_large)?);
        }
        let NewEntry { name, shape, dtype, codec, codec_version, axis, params } = new;
        index.tensors.push(Entry { axis, codec, codec_version, dtype, name, params, parts: placed, shape });
    }
    for &(path, len) in files {
        index.files.push(SidecarRef { path: path.to_owned(), part: place(len).ok_or_else(too_large)? });
    }
    let index_off = align_up(end).ok_or_else(too_large)?;
    debug_assert!(index_off.is_multiple_of(ALIGN));
    index_off.checked_add((index.to_json().len() + FRAME) as u64).ok_or_else(too_large)
}
