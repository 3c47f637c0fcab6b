//! A quantised base with a delta of codes on it: parts are put together when they are read.
//!
//! A tensor of method `codes` has the base's layout. Its one part, `data`, holds the differences of parameters from the
//! base's, in the layout's order, byte by byte modulo 256, then those of the codes from the ones that are [`expected`]
//! under the new parameters, whichever parts hold their bits, modulo 2^bits, a byte each. All are coded by
//! [`super::rans`]; parameters of runs with the move of the run before them in the layout's order as the context. Rows
//! that the base lacks are differences from zeros.

use super::codes::{codes_of, store_all_codes};
use super::entry::{self, Method};
use super::expected::expected;
use super::stored::{Stored, codec};
use super::{apply, exact, rans};
use crate::artifact::{ArtifactFile, Entry, KEEP, PartRef};
use crate::codec::{Codec, Part, Per};
use crate::error::{Error, Result};
use crate::input::Sidecar;
use crate::pipeline::{hex, named};
use crate::runner;
use crate::tensor::{Encoding, Rows, Tensor};
use rayon::prelude::*;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// The part of a tensor of method `codes`.
pub const DATA: &str = "data";

/// See the file's head.
pub struct Recoded {
    delta: ArtifactFile,
    base: Box<dyn Stored>,
    places: HashMap<String, usize>,
    entries: Vec<Entry>,
    root: [u8; 32],
}

impl Recoded {
    /// Puts a delta on its base, which the caller has identified.
    ///
    /// # Errors
    /// An artifact error for a delta that contradicts itself or its base; an unsupported error for one from a newer
    /// version.
    pub fn new(delta: ArtifactFile, base: Box<dyn Stored>) -> Result<Recoded> {
        let places = places(&*base);
        let root = delta.delta().map(|d| d.result).unwrap_or_default();
        let entries = delta
            .tensors()
            .iter()
            .map(|entry| {
                result(entry, &*base, &places).map_err(|e| named(e, &entry.name).at(delta.path().display()))
            })
            .collect::<Result<_>>()?;
        Ok(Recoded { delta, base, places, entries, root })
    }

    fn part(&self, entry: &Entry, name: &str) -> Result<&[u8]> {
        let part =
            entry.parts.get(name).ok_or_else(|| Error::artifact(format!("the part {name} is missing")))?;
        self.delta.checked_part(part, &format!("tensor {:?}, {name}", entry.name))
    }

    fn put_together(&self, entry: &Entry, result: &Entry) -> Result<Vec<Cow<'_, [u8]>>> {
        let Some(method) = Method::of(entry)? else {
            return Ok(self.delta.entry_parts(entry)?.into_iter().map(Cow::Borrowed).collect());
        };
        let base = match entry::text(entry, "base").map(|name| self.places[name]) {
            Some(index) => Some((&self.base.entries()[index], self.base.parts(index)?)),
            None => None,
        };
        let missing = || Error::artifact("it names no tensor of the base");
        let parts = match method {
            Method::Same => base.ok_or_else(missing)?.1,
            Method::Exact => {
                let old = match base {
                    None => Cow::Borrowed(&[][..]),
                    Some((from, mut parts)) => {
                        let (encoding, bytes) = (Encoding::Plain(from.dtype), parts.swap_remove(0));
                        apply::reference(Tensor { shape: from.extents()?, encoding, bytes }, entry.dtype)?
                    }
                };
                let data = self.part(entry, "data")?;
                exact::chunks(data, entry.elements())?;
                let mut new = room(entry.elements() as usize * entry.dtype.size())?;
                exact::decode(data, &old, entry.dtype, &mut new)?;
                vec![Cow::Owned(new)]
            }
            Method::Codes => {
                let (from, parts) = base.ok_or_else(missing)?;
                let rows = Rows::new(&result.extents()?, result.axis as usize)?;
                if Rows::new(&from.extents()?, from.axis as usize)?.cols != rows.cols {
                    return Err(Error::artifact("its rows have another length than its base's"));
                }
                self.add(entry, codec(result)?, rows, &parts)?.into_iter().map(Cow::Owned).collect()
            }
            Method::Bit1 => return Err(Error::artifact("a delta of floats holds it")),
        };
        let (found, wanted) = (digest(&parts), entry::b3(entry)?);
        if found != wanted {
            return Err(Error::artifact(format!(
                "what comes out is {}, and should be {}",
                hex(&found),
                hex(&wanted)
            )));
        }
        Ok(parts)
    }

    /// The base's parts with the differences on them.
    fn add(&self, entry: &Entry, codec: &Codec, rows: Rows, base: &[Cow<'_, [u8]>]) -> Result<Vec<Vec<u8>>> {
        let layout = codec.layout;
        let mut data = self.part(entry, DATA)?;
        if data.len() < rans::least_bytes(rows.len()) {
            return Err(Error::artifact("its differences are cut short"));
        }
        let old: Vec<&[u8]> = base.iter().map(|p| &**p).collect();
        let mut known = Moves::default();
        let mut out: Vec<Vec<u8>> = Vec::new();
        for (part, old) in layout.parts.iter().zip(&old) {
            let mut bytes = Vec::new();
            if !matches!(part.per, Per::Weight(_)) {
                bytes = room(rows.count() * part.row_bytes(rows.cols))?;
                rans::decode(&mut data, known.of_part(part, bytes.len()).as_deref(), &mut bytes)?;
                known.learn(part, rows.cols, &bytes);
                bytes.iter_mut().zip(*old).for_each(|(d, old)| *d = d.wrapping_add(*old));
            }
            out.push(bytes);
        }
        for (part, bytes) in
            layout.parts.iter().zip(&mut out).filter(|(p, _)| matches!(p.per, Per::Weight(_)))
        {
            *bytes = room(rows.count() * part.row_bytes(rows.cols))?;
        }
        let mut codes = room(rows.len())?;
        let slices: Vec<&[u8]> = out.iter().map(Vec::as_slice).collect();
        let expected = expected(layout, rows.cols, rows.count(), &old, &slices);
        rans::decode(&mut data, Some(&expected.contexts), &mut codes)?;
        if !data.is_empty() {
            return Err(Error::artifact("something follows its differences"));
        }
        let mask = u8::MAX >> (8 - layout.code_bits);
        codes.par_iter_mut().with_min_len(1 << 16).enumerate().for_each(|(i, d)| {
            *d = d.wrapping_add(expected.codes[i]) & mask;
        });
        store_all_codes(layout, &codes, rows.cols, &mut out);
        Ok(out)
    }
}

/// The differences of a tensor's parts from its base's, coded: the part [`DATA`].
pub fn difference(codec: &Codec, rows: Rows, old: &[Cow<'_, [u8]>], new: &[Vec<u8>]) -> Vec<u8> {
    let layout = codec.layout;
    let subtract = |new: &mut [u8], old: &[u8], mask: u8| {
        new.iter_mut().zip(old).for_each(|(new, old)| *new = new.wrapping_sub(*old) & mask);
    };
    let old: Vec<&[u8]> = old.iter().map(|p| &**p).collect();
    let mut known = Moves::default();
    let mut out = Vec::new();
    for ((part, old), new) in layout.parts.iter().zip(&old).zip(new) {
        if !matches!(part.per, Per::Weight(_)) {
            let mut bytes = new.clone();
            subtract(&mut bytes, old, u8::MAX);
            rans::encode(&bytes, known.of_part(part, bytes.len()).as_deref(), &mut out);
            known.learn(part, rows.cols, &bytes);
        }
    }
    let slices: Vec<&[u8]> = new.iter().map(Vec::as_slice).collect();
    let mut codes = codes_of(layout, &slices, rows.cols);
    let expected = expected(layout, rows.cols, rows.count(), &old, &slices);
    subtract(&mut codes, &expected.codes, u8::MAX >> (8 - layout.code_bits));
    rans::encode(&codes, Some(&expected.contexts), &mut out);
    out
}

/// How parameters of runs have moved, as far as is known: by -7 to 7 steps, which stands for more, plus 7.
#[derive(Default)]
struct Moves {
    /// Weights of a run, runs in a row, and each run's move, for the parts so far.
    parts: Vec<(usize, usize, Vec<u8>)>,
}

/// The move of what has not moved.
const STILL: u8 = 7;

impl Moves {
    /// Takes note of a part's differences.
    fn learn(&mut self, part: &Part, cols: usize, differences: &[u8]) {
        let Per::Run(n) = part.per else { return };
        let of = |bytes: &[u8]| {
            let far = STILL.cast_signed();
            let low = bytes[0].cast_signed();
            let sign = if low < 0 { 255 } else { 0 };
            let step = if bytes[1..].iter().all(|&b| b == sign) {
                low.clamp(-far, far)
            } else if bytes[bytes.len() - 1] >= 128 {
                -far
            } else {
                far
            };
            (step + far).cast_unsigned()
        };
        self.parts.push((n, cols.div_ceil(n), differences.chunks_exact(part.dtype.size()).map(of).collect()));
    }

    /// Contexts for the bytes of a part of runs as long as those of the last part that is known.
    fn of_part(&self, part: &Part, len: usize) -> Option<Vec<u8>> {
        let (n, _, moves) = self.parts.last()?;
        let size = part.dtype.size();
        if part.per != Per::Run(*n) || moves.len() * size != len {
            return None;
        }
        // The bytes of an element have statistics of their own.
        Some(moves.iter().flat_map(|m| (0..size).map(move |i| m * 2 + u8::from(i > 0))).collect())
    }
}

/// Zeros, or an error where a file claims more than there is memory.
fn room(len: usize) -> Result<Vec<u8>> {
    super::apply::check_room(len)?;
    Ok(runner::zeroed(len))
}

/// BLAKE3 of parts, one after another.
pub fn digest(parts: &[impl AsRef<[u8]>]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    parts.iter().for_each(|part| {
        hasher.update_rayon(part.as_ref());
    });
    *hasher.finalize().as_bytes()
}

/// Places of tensors by their names and aliases.
pub fn places(stored: &dyn Stored) -> HashMap<String, usize> {
    let mut places: HashMap<String, usize> =
        stored.entries().iter().enumerate().map(|(i, e)| (e.name.clone(), i)).collect();
    for (alias, of) in stored.aliases() {
        if let Some(&i) = places.get(of) {
            places.insert(alias.clone(), i);
        }
    }
    places
}

/// The result's entry for an entry of a delta.
fn result(entry: &Entry, base: &dyn Stored, places: &HashMap<String, usize>) -> Result<Entry> {
    let Some(method) = Method::of(entry)? else { return Ok(entry.clone()) };
    let from = match entry::text(entry, "base") {
        None => None,
        Some(name) => {
            let missing = || Error::artifact(format!("the base has no tensor {name:?}"));
            Some(&base.entries()[*places.get(name).ok_or_else(missing)?])
        }
    };
    let missing = || Error::artifact("it names no tensor of the base");
    let of = |codec: &str, version: u32, axis, params, parts: &[&str]| Entry {
        axis,
        codec: codec.to_owned(),
        codec_version: version,
        params,
        // Only the names matter: what is stored is another artifact's affair.
        parts: parts
            .iter()
            .map(|name| ((*name).to_owned(), PartRef { b3: [0; 32], len: 0, off: 0, xxh3: 0 }))
            .collect(),
        ..entry.clone()
    };
    match method {
        Method::Same => {
            let from = from.ok_or_else(missing)?;
            if from.shape != entry.shape || from.dtype != entry.dtype {
                return Err(Error::artifact(
                    "it is said to be as in the base, and has another shape or dtype",
                ));
            }
            Ok(Entry { name: entry.name.clone(), ..from.clone() })
        }
        Method::Exact => {
            if from.is_some_and(|from| !from.is_kept()) {
                return Err(Error::artifact("its base is quantised"));
            }
            Ok(of(KEEP, 1, 0, BTreeMap::new(), &["data"]))
        }
        Method::Codes => {
            let from = from.ok_or_else(missing)?;
            let codec = codec(from)?;
            let names: Vec<&str> = codec.layout.parts.iter().map(|p| p.name).collect();
            let exponent = from.params.get("exponent").cloned();
            let params: BTreeMap<String, Value> =
                exponent.map(|e| ("exponent".to_owned(), e)).into_iter().collect();
            if entry.axis as usize >= entry.shape.len().max(1) {
                return Err(Error::artifact(format!("axis {} does not exist", entry.axis)));
            }
            Ok(of(codec.name, codec.version, entry.axis, params, &names))
        }
        Method::Bit1 => Err(Error::artifact("a delta of floats holds it")),
    }
}

impl Stored for Recoded {
    fn root(&self) -> [u8; 32] {
        self.root
    }

    fn about(&self) -> (&str, &str) {
        (self.delta.codec(), self.delta.writer())
    }

    fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn parts(&self, index: usize) -> Result<Vec<Cow<'_, [u8]>>> {
        let entry = &self.delta.tensors()[index];
        self.put_together(entry, &self.entries[index])
            .map_err(|e| named(e, &entry.name).at(self.delta.path().display()))
    }

    fn aliases(&self) -> &BTreeMap<String, String> {
        self.delta.aliases()
    }

    fn files(&self) -> Result<Vec<Sidecar>> {
        apply::files(&self.delta, &|| self.base.files())
    }

    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = self.base.paths();
        paths.push(self.delta.path().to_owned());
        paths
    }
}
