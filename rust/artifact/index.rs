//! The index: what the artifact holds and where, as canonical JSON, with every rule that a reader checks.
//!
//! Canonical means: keys sorted by their bytes, no spaces, nothing escaped but what JSON demands. There is one
//! spelling for one content, so the index's digest names the content. Structs declare their fields in the
//! order in which they are written.

use super::header::{ALIGN, DELTA, FRAME, align_up};
use super::{KEEP, Limits};
use crate::codec::{self, Codec, EXPONENTS};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Rows, element_count};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::io;

/// One array of bytes in the file, with its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartRef {
    /// BLAKE3.
    #[serde(with = "hex_digest")]
    pub b3: [u8; 32],
    /// Bytes.
    pub len: u64,
    /// Offset from the start of the file, in bytes; a multiple of 256.
    pub off: u64,
    /// XXH3 (64 bits, seed 0).
    #[serde(with = "hex_u64")]
    pub xxh3: u64,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The input dimension, along which groups run.
    pub axis: u32,
    /// The codec's name, or `keep` for a tensor that is stored as it was.
    pub codec: String,
    /// The version of the bytes under that codec's name.
    pub codec_version: u32,
    /// The source's dtype.
    #[serde(with = "dtype_name")]
    pub dtype: Dtype,
    /// The name.
    pub name: String,
    /// The codec's own parameters: integers, strings and booleans; empty for most.
    pub params: BTreeMap<String, Value>,
    /// The arrays that are stored.
    pub parts: BTreeMap<String, PartRef>,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<u64>,
}

/// An embedded file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "FileEntry", into = "FileEntry")]
pub struct SidecarRef {
    /// Its path: relative, separated by `/`, without `..`.
    pub path: String,
    /// Its bytes.
    pub part: PartRef,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    #[serde(with = "hex_digest")]
    b3: [u8; 32],
    len: u64,
    off: u64,
    path: String,
    #[serde(with = "hex_u64")]
    xxh3: u64,
}

impl From<FileEntry> for SidecarRef {
    fn from(f: FileEntry) -> Self {
        SidecarRef { path: f.path, part: PartRef { b3: f.b3, len: f.len, off: f.off, xxh3: f.xxh3 } }
    }
}

impl From<SidecarRef> for FileEntry {
    fn from(s: SidecarRef) -> Self {
        let PartRef { b3, len, off, xxh3 } = s.part;
        FileEntry { b3, len, off, path: s.path, xxh3 }
    }
}

/// What makes an artifact a delta: the base that it needs, and what comes out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaRef {
    /// The base's identity: an artifact's root, or the digest of a model's tensors.
    #[serde(with = "hex_digest")]
    pub base: [u8; 32],
    /// Files that the result has from the base, and their BLAKE3.
    pub files: BTreeMap<String, HexDigest>,
    /// How differences are coded: `exact`, `codes` or `bit1`.
    pub mode: String,
    /// The base's tensors that the result lacks, sorted.
    pub removed: Vec<String>,
    /// The result's identity, as that of the base.
    #[serde(with = "hex_digest")]
    pub result: [u8; 32],
}

/// A digest, in hexadecimal where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HexDigest(#[serde(with = "hex_digest")] pub [u8; 32]);

/// The whole index.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// Names that stand for another tensor, and that tensor's name.
    pub aliases: BTreeMap<String, String>,
    /// The codec that was asked for.
    pub codec: String,
    /// Where this is a delta: what from, and what to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<DeltaRef>,
    /// The embedded files, in the order of their bytes.
    pub files: Vec<SidecarRef>,
    /// The tensors, in the order of their bytes.
    pub tensors: Vec<Entry>,
    /// The program that wrote the artifact.
    pub writer: String,
}

impl Index {
    /// The canonical JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("keys are strings and no value is a float")
    }

    /// The incompat bits of a header for this index.
    pub fn incompat(&self) -> u32 {
        if self.delta.is_some() { DELTA } else { 0 }
    }

    /// Parses an index of which every byte must be canonical. Nothing else is checked: see [`Index::check`].
    pub fn parse(json: &[u8]) -> Result<Index> {
        let index: Index = serde_json::from_slice(json)
            .map_err(|e| Error::artifact(format!("the index is malformed: {e}")))?;
        let mut rest = Expected(json);
        match serde_json::to_writer(&mut rest, &index) {
            Ok(()) if rest.0.is_empty() => Ok(index),
            _ => Err(Error::artifact(format!(
                "the index is not canonical JSON from byte {} on",
                json.len() - rest.0.len()
            ))),
        }
    }

    /// Checks everything that can be known without reading a part, and returns each tensor's position by its
    /// name. `index_off` is where the parts end, `incompat` what the header says of features.
    pub fn check(&self, index_off: u64, incompat: u32, limits: &Limits) -> Result<HashMap<String, usize>> {
        if self.tensors.len().saturating_add(self.aliases.len()) > limits.tensors {
            return Err(Error::artifact(format!(
                "{} tensors and {} aliases; at most {} are allowed (the limit can be raised)",
                self.tensors.len(),
                self.aliases.len(),
                limits.tensors
            )));
        }
        if self.files.len() > limits.files {
            return Err(Error::artifact(format!(
                "{} embedded files; at most {} are allowed (the limit can be raised)",
                self.files.len(),
                limits.files
            )));
        }
        limits.check_name("codec", &self.codec)?;
        limits.check_name("writer", &self.writer)?;

        if self.incompat() != incompat {
            return Err(Error::artifact("the header and the index disagree on whether this is a delta"));
        }
        if let Some(delta) = &self.delta {
            delta.check(limits)?;
        }
        let mut names = HashMap::with_capacity(self.tensors.len());
        let mut end = FRAME as u64;
        for (i, entry) in self.tensors.iter().enumerate() {
            let place = |e: Error| e.at(format_args!("tensor {:?}", entry.name));
            entry.check(limits).map_err(place)?;
            for (name, part) in entry.parts_in_order() {
                end = part.check_place(end, index_off).map_err(|e| place(e.at(name)))?;
            }
            if names.insert(entry.name.clone(), i).is_some() {
                return Err(Error::artifact(format!("two tensors are named {:?}", entry.name)));
            }
        }
        for (alias, target) in &self.aliases {
            limits.check_name("alias", alias)?;
            check_alias(alias, target, &names)?;
        }
        let mut paths = std::collections::HashSet::with_capacity(self.files.len());
        for file in &self.files {
            limits.check_path(&file.path)?;
            end = file
                .part
                .check_place(end, index_off)
                .map_err(|e| e.at(format_args!("file {:?}", file.path)))?;
            if !paths.insert(file.path.as_str()) {
                return Err(Error::artifact(format!("two embedded files are named {:?}", file.path)));
            }
        }
        if align_up(end) != Some(index_off) {
            return Err(Error::artifact(format!(
                "the parts end at byte {end} and the index starts at {index_off}, which leaves a gap"
            )));
        }
        Ok(names)
    }
}

impl DeltaRef {
    fn check(&self, limits: &Limits) -> Result<()> {
        limits.check_name("mode", &self.mode)?;
        if self.files.len() > limits.files || self.removed.len() > limits.tensors {
            return Err(Error::artifact(format!(
                "{} files of the base and {} removed tensors; at most {} and {} are allowed",
                self.files.len(),
                self.removed.len(),
                limits.files,
                limits.tensors
            )));
        }
        self.files.keys().try_for_each(|path| limits.check_path(path))?;
        self.removed.iter().try_for_each(|name| limits.check_name("tensor", name))
    }
}

/// Checks that `target` is a tensor and `alias` a name of its own.
pub fn check_alias(alias: &str, target: &str, names: &HashMap<String, usize>) -> Result<()> {
    if names.contains_key(alias) {
        return Err(Error::artifact(format!("{alias:?} names both a tensor and an alias")));
    }
    if !names.contains_key(target) {
        return Err(Error::artifact(format!(
            "the alias {alias:?} stands for {target:?}, which is no tensor"
        )));
    }
    Ok(())
}

impl PartRef {
    /// Checks that this part follows a part that ended at `end`, and returns its own end.
    fn check_place(&self, end: u64, index_off: u64) -> Result<u64> {
        let wanted = align_up(end);
        if wanted != Some(self.off) {
            return Err(Error::artifact(format!(
                "offset {} is not the next multiple of {ALIGN} after byte {end}",
                self.off
            )));
        }
        self.off.checked_add(self.len).filter(|&end| end <= index_off).ok_or_else(|| {
            Error::artifact(format!("{} bytes at offset {} go beyond the parts' end", self.len, self.off))
        })
    }
}

impl Entry {
    /// The codec of the table, if this build knows it in this version; `None` for kept tensors too.
    pub fn known_codec(&self) -> Option<&'static Codec> {
        codec::find(&self.codec).ok().filter(|c| c.version == self.codec_version)
    }

    /// Whether the tensor is stored as it was.
    pub fn is_kept(&self) -> bool {
        self.codec == KEEP && self.codec_version == 1
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        // The product was checked, so the fallback is for entries that came from elsewhere.
        element_count(&self.shape).unwrap_or(u64::MAX)
    }

    /// The power of two that rebuilt weights are multiplied by.
    pub fn exponent(&self) -> i32 {
        let exponent = self.params.get("exponent").and_then(Value::as_i64);
        exponent.and_then(|e| i32::try_from(e).ok()).unwrap_or(0)
    }

    /// The parts in the order of their bytes: the layout's, or by offset where the layout is not known.
    pub fn parts_in_order(&self) -> Vec<(&str, &PartRef)> {
        if let Some(codec) = self.known_codec() {
            return codec
                .layout
                .parts
                .iter()
                .filter_map(|p| Some((p.name, self.parts.get(p.name)?)))
                .collect();
        }
        let mut parts: Vec<_> = self.parts.iter().map(|(name, part)| (name.as_str(), part)).collect();
        parts.sort_by_key(|(_, part)| (part.off, part.len));
        parts
    }

    /// The shape as sizes of this machine.
    pub fn extents(&self) -> Result<Vec<usize>> {
        // On a 32-bit machine the product must fit, not only each extent.
        usize::try_from(element_count(&self.shape)?)
            .and_then(|_| self.shape.iter().map(|&n| usize::try_from(n)).collect())
            .map_err(|_| Error::unsupported(format!("shape {:?} is too large for this machine", self.shape)))
    }

    /// Checks everything but the parts' places and checksums.
    pub fn check(&self, limits: &Limits) -> Result<()> {
        limits.check_name("tensor", &self.name)?;
        limits.check_name("codec", &self.codec)?;
        for name in self.parts.keys() {
            limits.check_name("part", name)?;
        }
        let elements = element_count(&self.shape).map_err(|e| Error::artifact(e.to_string()))?;
        if self.axis as usize >= self.shape.len().max(1) {
            return Err(Error::artifact(format!(
                "axis {} does not exist in shape {:?}",
                self.axis, self.shape
            )));
        }
        for (name, value) in &self.params {
            limits.check_name("parameter", name)?;
            let plain = value.is_i64() || value.is_u64() || value.is_string() || value.is_boolean();
            if !plain {
                return Err(Error::artifact(format!(
                    "the parameter {name:?} is {value}; only integers, strings and booleans are allowed"
                )));
            }
        }
        if self.is_kept() {
            self.check_kept(elements)
        } else if let Some(codec) = self.known_codec() {
            self.check_coded(codec)
        } else {
            // From a newer version: what it stores is not known here, only that it lies in the file.
            Ok(())
        }
    }

    fn check_kept(&self, elements: u64) -> Result<()> {
        if self.axis != 0 {
            return Err(Error::artifact("a kept tensor has axis 0"));
        }
        if let Some(name) = self.params.keys().next() {
            return Err(Error::artifact(format!("a kept tensor has no parameter {name:?}")));
        }
        // Below 2^56 elements of at most 8 bytes: no overflow.
        self.check_parts(&["data"], &[elements * self.dtype.size() as u64])
    }

    fn check_coded(&self, codec: &Codec) -> Result<()> {
        if !self.dtype.is_weight() {
            return Err(Error::artifact(format!("{} cannot hold dtype {}", codec.name, self.dtype.name())));
        }
        for (name, value) in &self.params {
            let exponent = value.as_i64().and_then(|e| i32::try_from(e).ok());
            let known = name == "exponent" && exponent.is_some_and(|e| e != 0 && EXPONENTS.contains(&e));
            if !known {
                return Err(Error::artifact(format!("the parameter {name:?} cannot be {value}")));
            }
        }
        let rows = Rows::new(&self.extents()?, self.axis as usize)?;
        let sizes = codec
            .layout
            .part_bytes(rows.count() as u64, rows.cols as u64)
            .ok_or_else(|| Error::artifact(format!("the parts of shape {:?} are too large", self.shape)))?;
        let names: Vec<_> = codec.layout.parts.iter().map(|p| p.name).collect();
        self.check_parts(&names, &sizes)
    }

    fn check_parts(&self, names: &[&str], sizes: &[u64]) -> Result<()> {
        for (name, size) in names.iter().zip(sizes) {
            match self.parts.get(*name) {
                Some(part) if part.len == *size => {}
                Some(part) => {
                    return Err(Error::artifact(format!(
                        "{name} has {} bytes; shape {:?} as {} has {size}",
                        part.len, self.shape, self.codec
                    )));
                }
                None => return Err(Error::artifact(format!("the part {name} is missing"))),
            }
        }
        match self.parts.keys().find(|k| !names.contains(&k.as_str())) {
            Some(extra) => Err(Error::artifact(format!("{} has no part {extra:?}", self.codec))),
            None => Ok(()),
        }
    }
}

/// A writer that accepts only the bytes that it holds: compares JSON without a second copy of it.
struct Expected<'a>(&'a [u8]);

impl io::Write for Expected<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.strip_prefix(bytes) {
            Some(rest) => {
                self.0 = rest;
                Ok(bytes.len())
            }
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

mod hex_digest {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(digest: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(blake3::Hash::from_bytes(*digest).to_hex().as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        blake3::Hash::from_hex(text.as_bytes())
            .map(Into::into)
            .map_err(|_| D::Error::custom("b3 is not 64 hex digits"))
    }
}

mod hex_u64 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&format_args!("{value:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        u64::from_str_radix(&text, 16).map_err(|_| D::Error::custom("xxh3 is not 16 hex digits"))
    }
}

mod dtype_name {
    use crate::tensor::Dtype;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(dtype: &Dtype, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(dtype.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Dtype, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        Dtype::from_name(&text).ok_or_else(|| {
            D::Error::custom(format_args!("dtype {text:?} is not known; a newer tenpak may know it"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"aliases":{},"codec":"keep","files":[],"tensors":[],"writer":"x"}"#;

    #[test]
    fn there_is_one_spelling() {
        assert_eq!(Index::parse(MINIMAL.as_bytes()).unwrap().to_json(), MINIMAL.as_bytes());
        let others = [
            MINIMAL.replace("{}", "{ }"),
            MINIMAL.replace(r#""keep""#, r#""k\u0065ep""#),
            MINIMAL.replace(r#""codec":"keep","#, r#""codec":"keep","codec":"keep","#),
            MINIMAL.replace(r#""codec":"keep","#, r#""codec":"keep","colour":1,"#),
            MINIMAL.replace("{}", r#"{"b":"x","a":"x"}"#),
            MINIMAL.replace("{}", r#"{"a":"x","a":"x"}"#),
            MINIMAL.replace(r#","writer":"x""#, ""),
            format!("{MINIMAL} "),
            format!(" {MINIMAL}"),
            MINIMAL[..MINIMAL.len() - 1].to_owned(),
        ];
        for other in others {
            assert!(Index::parse(other.as_bytes()).is_err(), "{other}");
        }
    }
}
