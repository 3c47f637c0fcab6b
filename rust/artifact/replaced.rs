//! A copy of an artifact in which some tensors' parts are others.

use super::{ArtifactFile, Finished, NewEntry, Writer};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;

/// Bytes by the names of tensor and part.
pub type Parts<'a> = BTreeMap<(String, String), &'a [u8]>;

/// Writes `source` to `target` with `parts` in the place of its own.
///
/// # Errors
/// A usage error for a part that `source` does not have or that has another size, or for a delta; as
/// [`Writer::create`] and [`ArtifactFile::open`].
pub fn replaced(source: &ArtifactFile, target: &Path, force: bool, parts: &Parts<'_>) -> Result<Finished> {
    if source.delta().is_some() {
        return Err(Error::usage(format!("{} is a delta; materialize it first", source.path().display())));
    }
    for ((tensor, part), bytes) in parts {
        let entry = source.find(tensor)?;
        if entry.name != *tensor {
            return Err(Error::usage(format!("{tensor:?} is an alias; give parts of {:?}", entry.name)));
        }
        let stored = entry.parts.get(part).map(|p| p.len);
        if stored != Some(bytes.len() as u64) {
            let stored = stored.map_or("none".to_owned(), |n| format!("one of {n} bytes"));
            let given = bytes.len();
            return Err(Error::usage(format!(
                "{given} bytes were given for part {part:?} of tensor {tensor:?}, which has {stored}"
            )));
        }
    }
    let mut writer = Writer::create(target, force, source.file_len(), source.codec())?;
    for entry in source.tensors() {
        let stored = source.entry_parts(entry)?;
        let names = entry.parts_in_order();
        let now: Vec<(&str, &[u8])> = names
            .iter()
            .zip(stored)
            .map(|((name, _), stored)| {
                let given = parts.get(&(entry.name.clone(), (*name).to_owned()));
                (*name, given.copied().unwrap_or(stored))
            })
            .collect();
        writer.tensor(NewEntry::like(entry), &now)?;
    }
    for (alias, of) in source.aliases() {
        writer.alias(alias, of)?;
    }
    for file in source.files() {
        writer.file(&file.path, source.checked_part(&file.part, &file.path)?)?;
    }
    writer.finish()
}
