//! A base with a delta on it, as a model: tensors are restored one at a time, when they are read.

use super::entry::{self, Method};
use super::{bit1, exact};
use crate::artifact::{ArtifactFile, Entry};
use crate::error::{Error, Result};
use crate::input::{Each, Model, Sidecar, TensorInfo, content_digest};
use crate::pieces;
use crate::pipeline::{hex, named, plain};
use crate::runner;
use crate::tensor::{Dtype, Encoding, Tensor};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

/// Which digests are compared when a tensor is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The base has been checked as a whole: the result is.
    Base,
    /// Nothing has been checked: the base's tensor and the result are.
    Nothing,
}

/// The model that a delta of mode `exact` or `bit1` makes of its base.
pub struct Applied {
    delta: ArtifactFile,
    base: Box<dyn Model>,
    /// Of the base's tensors, where they are known.
    digests: Option<Vec<[u8; 32]>>,
    places: HashMap<String, usize>,
    infos: Vec<TensorInfo>,
    trust: Trust,
}

impl Applied {
    /// Puts a delta on its base, which the caller has identified; `digests` of its tensors spare computing them again.
    ///
    /// # Errors
    /// An artifact error for a delta that contradicts itself or names tensors that the base lacks; an unsupported
    /// error for one from a newer version.
    pub fn new(
        delta: ArtifactFile,
        base: Box<dyn Model>,
        digests: Option<Vec<[u8; 32]>>,
        trust: Trust,
    ) -> Result<Applied> {
        let places: HashMap<String, usize> =
            base.tensors().iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let mut infos = Vec::new();
        let names = delta.tensors().iter().map(|e| (&e.name, e));
        let aliases = delta.aliases().keys().map(|name| Ok((name, delta.find(name)?)));
        for found in names.map(Ok).chain(aliases) {
            let (name, entry): (&String, &Entry) = found?;
            let at = |e: Error| named(e, name).at(delta.path().display());
            Method::of(entry).map_err(at)?;
            let from = entry::from(entry).map_err(at)?;
            if let Some(from) = from.filter(|from| !places.contains_key(&from.name)) {
                let what = format!(
                    "the base is not the one that the delta was made from: it has no tensor {:?}",
                    from.name
                );
                return Err(at(Error::usage(what)));
            }
            let shape = entry.extents().map_err(at)?;
            infos.push(TensorInfo { name: name.clone(), shape, encoding: Encoding::Plain(entry.dtype) });
        }
        Ok(Applied { delta, base, digests, places, infos, trust })
    }

    /// The tensor of the base that an entry is coded against, and what it hashes to where that is known.
    fn base_of(&self, entry: &Entry) -> Result<Option<(Tensor<'_>, Option<[u8; 32]>)>> {
        let Some(from) = entry::from(entry)? else { return Ok(None) };
        let place = self.places[&from.name];
        let tensor = self.base.read(place)?;
        let mut known = self.digests.as_ref().map(|digests| digests[place]);
        if self.trust == Trust::Nothing {
            let found = content_digest(&tensor.bytes);
            if found != from.b3 {
                return Err(Error::usage(format!(
                    "the base is not the one that the delta was made from: its tensor {:?} is {}, and should be {}",
                    from.name,
                    hex(&found),
                    hex(&from.b3)
                )));
            }
            known = Some(found);
        }
        Ok(Some((tensor, known)))
    }

    /// Hands over a tensor in pieces; only where it is coded as such does any of it come out before all of it does.
    fn restore_each(&self, entry: &Entry, each: Each<'_>) -> Result<()> {
        if Method::of(entry)? != Some(Method::Exact) {
            return pieces::each(&self.restore(entry)?, each);
        }
        let old = match self.base_of(entry)? {
            Some((base, _)) => reference(base, entry.dtype)?,
            None => Cow::Borrowed(&[][..]),
        };
        let found = exact::decode_each(self.part(entry, "data")?, &old, entry.dtype, len(entry)?, each)?;
        check(found, entry)
    }

    fn restore(&self, entry: &Entry) -> Result<Cow<'_, [u8]>> {
        let Some(method) = Method::of(entry)? else {
            return Ok(Cow::Borrowed(self.delta.entry_parts(entry)?[0]));
        };
        let (base, mut known) = self.base_of(entry)?.unzip();
        if method != Method::Same
            || base.as_ref().is_none_or(|base| base.encoding != Encoding::Plain(entry.dtype))
        {
            known = None;
        }
        let missing = || Error::artifact("it names no tensor of the base");
        let len = len(entry)?;
        let bytes = match method {
            Method::Same => reference(base.ok_or_else(missing)?, entry.dtype)?,
            Method::Exact => {
                let old = base.map_or(Ok(Cow::Borrowed(&[][..])), |base| reference(base, entry.dtype))?;
                let data = self.part(entry, "data")?;
                // What a small file claims is not allocated before it can be true.
                exact::chunks(data, entry.elements())?;
                check_room(len)?;
                let mut new = runner::zeroed(len);
                exact::decode(data, &old, entry.dtype, &mut new)?;
                Cow::Owned(new)
            }
            Method::Bit1 => {
                let old = reference(base.ok_or_else(missing)?, entry.dtype)?;
                let (signs, scales) = (self.part(entry, "signs")?, self.part(entry, "scales")?);
                if old.len() != len {
                    return Err(Error::artifact("it has another size than its base"));
                }
                let mut new = runner::zeroed(len);
                bit1::decode(signs, scales, &old, entry.dtype, &entry.extents()?, &mut new)?;
                Cow::Owned(new)
            }
            Method::Codes => return Err(Error::artifact("a delta of mode codes holds it")),
        };
        check(known.flatten().unwrap_or_else(|| content_digest(&bytes)), entry)?;
        if bytes.len() != len {
            return Err(Error::artifact("what comes out has another length than it should"));
        }
        Ok(bytes)
    }

    fn part(&self, entry: &Entry, name: &str) -> Result<&[u8]> {
        match entry.parts.get(name) {
            Some(part) => self.delta.checked_part(part, &format!("tensor {:?}, {name}", entry.name)),
            None => Err(Error::artifact(format!("the part {name} is missing"))),
        }
    }
}

/// Bytes of the tensor that an entry gives.
fn len(entry: &Entry) -> Result<usize> {
    usize::try_from(entry.elements() * entry.dtype.size() as u64)
        .map_err(|_| Error::unsupported("the tensor is too large for this machine"))
}

/// Compares what comes out with what the entry says.
fn check(found: [u8; 32], entry: &Entry) -> Result<()> {
    let wanted = entry::b3(entry)?;
    if found == wanted {
        return Ok(());
    }
    Err(Error::artifact(format!("what comes out is {}, and should be {}", hex(&found), hex(&wanted))))
}

/// Refuses what a file claims and no memory can hold, instead of ending the program.
pub fn check_room(len: usize) -> Result<()> {
    let mut room: Vec<u8> = Vec::new();
    room.try_reserve_exact(len)
        .map_err(|_| Error::new(crate::Kind::Io, format!("there is no memory for a tensor of {len} bytes")))
}

/// A tensor's bytes as a base for others of `dtype`: weights of another dtype are converted.
///
/// # Errors
/// An artifact error for dtypes that cannot be converted.
pub fn reference(tensor: Tensor<'_>, dtype: Dtype) -> Result<Cow<'_, [u8]>> {
    let from = tensor.encoding.dtype();
    let bytes = plain(tensor);
    if from == dtype {
        return Ok(bytes);
    }
    if !from.is_weight() || !dtype.is_weight() {
        return Err(Error::artifact(format!("{} cannot be a base for {}", from.name(), dtype.name())));
    }
    let mut out = runner::zeroed(bytes.len() / from.size() * dtype.size());
    crate::artifact::convert(from, &bytes, dtype, &mut out)?;
    Ok(Cow::Owned(out))
}

impl Model for Applied {
    fn format(&self) -> &'static str {
        "delta"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let info = &self.infos[index];
        let bytes = self
            .delta
            .find(&info.name)
            .and_then(|entry| self.restore(entry))
            .map_err(|e| named(e, &info.name).at(self.delta.path().display()))?;
        Ok(Tensor { shape: info.shape.clone(), encoding: info.encoding, bytes })
    }

    fn pieces(&self, index: usize, each: Each<'_>) -> Result<()> {
        let info = &self.infos[index];
        self.delta
            .find(&info.name)
            .and_then(|entry| self.restore_each(entry, each))
            .map_err(|e| named(e, &info.name).at(self.delta.path().display()))
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        files(&self.delta, &|| self.base.sidecars())
    }

    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = self.base.paths();
        paths.push(self.delta.path().to_owned());
        paths
    }
}

/// The result's files: those that a delta holds, and those that it has from its base.
///
/// # Errors
/// An artifact error for a damaged one; a usage error where the base's is missing or another.
pub fn files(delta: &ArtifactFile, base: &dyn Fn() -> Result<Vec<Sidecar>>) -> Result<Vec<Sidecar>> {
    let mut files = Vec::new();
    for file in delta.files() {
        let bytes = delta.checked_part(&file.part, &file.path)?.to_vec();
        files.push(Sidecar { path: file.path.clone(), bytes });
    }
    let wanted = delta.delta().map(|d| &d.files).into_iter().flatten();
    let mut theirs = None;
    for (path, digest) in wanted {
        if theirs.is_none() {
            theirs = Some(base()?);
        }
        let found = theirs.iter().flatten().find(|f| f.path == *path);
        match found {
            Some(file) if content_digest(&file.bytes) == digest.0 => files.push(file.clone()),
            _ => {
                let found = found.map_or("missing".to_owned(), |f| hex(&content_digest(&f.bytes)));
                return Err(Error::usage(format!(
                    "{}: the base's file {path:?} is {found}, and should be {}; give the base with all of its files",
                    delta.path().display(),
                    hex(&digest.0)
                )));
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}
