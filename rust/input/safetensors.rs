//! The `.safetensors` input: a strict header parser over a mapped file, and tensors that borrow from the map.
//!
//! Layout: the header's length as u64, the header (JSON), then the data, which the tensors' offsets must
//! cover without a hole or an overlap.

use super::check::{self, MAX_TENSORS, json_error, quoted, sized};
use super::source::Source;
use super::{Model, Sidecar, TensorInfo};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Encoding, Tensor};
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The longest header; the same limit as in the official library.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes in front of the header.
const PREFIX: usize = 8;

/// An open `.safetensors` file.
pub struct Safetensors {
    source: Source,
    /// In the order of the data.
    tensors: Vec<TensorInfo>,
    data: Vec<Range<usize>>,
    metadata: BTreeMap<String, String>,
}

impl Safetensors {
    /// Opens and validates a file; no data is read.
    ///
    /// # Errors
    /// An I/O error, an input error that names the tensor or the byte, or an unsupported one for a dtype
    /// that is not known here.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Source::open(path)?)
    }

    /// As [`Safetensors::open`], over bytes in memory; `name` stands in messages.
    ///
    /// # Errors
    /// As [`Safetensors::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(Source::of_bytes(name, bytes))
    }

    fn parse(source: Source) -> Result<Self> {
        let header_end = header_end(&source)?;
        let text = &source[PREFIX..header_end];
        if text.first() != Some(&b'{') {
            return Err(
                source.error("the header at byte 8 does not start with `{`; this is no safetensors file")
            );
        }
        let Header { tensors: mut raw, metadata } = serde_json::from_slice(text).map_err(|e| {
            let (offset, message) = json_error(text, &e);
            source.error(format_args!("header, byte {}: {message}", PREFIX + offset))
        })?;
        // The order of the data; the names decide between empty tensors, so that it is never in doubt.
        raw.sort_by(|(a_name, a), (b_name, b)| (a.offsets, a_name).cmp(&(b.offsets, b_name)));
        let data_len = (source.len() - header_end) as u64;
        let mut tensors = Vec::with_capacity(raw.len());
        let mut data = Vec::with_capacity(raw.len());
        let mut end = 0;
        for (name, info) in raw {
            let at = |e: Error| e.at(format_args!("{}: tensor {}", source.path().display(), quoted(&name)));
            let tensor = info.check(name.clone(), end, data_len).map_err(at)?;
            // Both ends are at most `data_len`, which is a length in memory.
            data.push(header_end + info.offsets.0 as usize..header_end + info.offsets.1 as usize);
            end = info.offsets.1;
            tensors.push(tensor);
        }
        if end != data_len {
            return Err(source.error(format_args!(
                "the tensors cover {end} bytes of data, but the file holds {data_len}; {} bytes from byte {} on \
                 belong to no tensor",
                data_len - end,
                header_end as u64 + end
            )));
        }
        Ok(Safetensors { source, tensors, data, metadata })
    }

    /// The text that `__metadata__` holds under a key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.source.path()
    }
}

/// Whether `head`, the start of a file of `len` bytes, looks like safetensors.
pub(super) fn looks_like(head: &[u8], len: u64) -> bool {
    let Some((prefix, rest)) = head.split_first_chunk::<PREFIX>() else { return false };
    let header = u64::from_le_bytes(*prefix);
    rest.first() == Some(&b'{') && header <= MAX_HEADER && header <= len
}

fn header_end(source: &Source) -> Result<usize> {
    let Some(prefix) = source.first_chunk::<PREFIX>() else {
        return Err(source.error(format_args!(
            "the file has {} bytes; a safetensors file starts with the 8-byte length of its header",
            source.len()
        )));
    };
    let len = u64::from_le_bytes(*prefix);
    if len > MAX_HEADER {
        return Err(source.error(format_args!(
            "the header's length at byte 0 is {len}; at most {MAX_HEADER} is allowed, so this is no safetensors \
             file or it is damaged"
        )));
    }
    let rest = source.len() - PREFIX;
    match usize::try_from(len) {
        Ok(len) if len <= rest => Ok(PREFIX + len),
        _ => Err(source.error(format_args!(
            "the header's length at byte 0 is {len}, but only {rest} bytes follow; the file is cut short or damaged"
        ))),
    }
}

impl Model for Safetensors {
    fn format(&self) -> &'static str {
        "safetensors"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let info = &self.tensors[index];
        Ok(Tensor {
            shape: info.shape.clone(),
            encoding: info.encoding,
            bytes: self.source[self.data[index].clone()].into(),
        })
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(Vec::new())
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.source.path().to_path_buf()]
    }
}

/// A header entry as it is written, nothing believed yet.
struct RawInfo {
    dtype: String,
    shape: Vec<u64>,
    offsets: (u64, u64),
}

impl RawInfo {
    /// The tensor, if it is well formed and starts where the one before it ended.
    fn check(&self, name: String, end_before: u64, data_len: u64) -> Result<TensorInfo> {
        check::check_name(&name)?;
        let dtype = Dtype::from_name(&self.dtype).ok_or_else(|| {
            let known: Vec<_> = Dtype::ALL.iter().map(|d| d.name()).collect();
            Error::unsupported(format!(
                "dtype {} is not known; these are: {}",
                quoted(&self.dtype),
                known.join(", ")
            ))
        })?;
        let (begin, end) = self.offsets;
        if begin > end {
            return Err(Error::input(format!("data_offsets [{begin}, {end}] end before they begin")));
        }
        if end > data_len {
            return Err(Error::input(format!(
                "data_offsets [{begin}, {end}] reach beyond the {data_len} bytes of data; the file is cut short or \
                 damaged"
            )));
        }
        let (shape, bytes) = sized(&self.shape, Encoding::Plain(dtype))?;
        if bytes != end - begin {
            return Err(Error::input(format!(
                "shape {shape:?} as {} takes {bytes} bytes, but data_offsets [{begin}, {end}] hold {}",
                dtype.name(),
                end - begin
            )));
        }
        if begin < end_before {
            return Err(Error::input(format!(
                "data_offsets [{begin}, {end}] overlap the tensor before, which ends at {end_before}"
            )));
        }
        if begin > end_before {
            return Err(Error::input(format!(
                "data_offsets [{begin}, {end}] leave a hole: bytes {end_before} to {begin} belong to no tensor"
            )));
        }
        Ok(TensorInfo { name, shape, encoding: Encoding::Plain(dtype) })
    }
}

#[derive(Default)]
struct Header {
    tensors: Vec<(String, RawInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut header = Header::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format_args!("the key {} stands twice", quoted(&name))));
            }
            if name == "__metadata__" {
                header.metadata = map
                    .next_value_seed(InMetadata)
                    .map_err(|e| de::Error::custom(format_args!("__metadata__: {e}")))?;
                continue;
            }
            if header.tensors.len() == MAX_TENSORS {
                return Err(de::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
            let info = map
                .next_value::<RawInfo>()
                .map_err(|e| de::Error::custom(format_args!("tensor {}: {e}", quoted(&name))))?;
            header.tensors.push((name, info));
        }
        Ok(header)
    }
}

/// `__metadata__`: an object of strings, each key once.
struct InMetadata;

impl<'de> DeserializeSeed<'de> for InMetadata {
    type Value = BTreeMap<String, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for InMetadata {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut metadata = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            let text = map.next_value::<String>()?;
            if metadata.contains_key(&key) {
                return Err(de::Error::custom(format_args!("the key {} stands twice", quoted(&key))));
            }
            metadata.insert(key, text);
        }
        Ok(metadata)
    }
}

impl<'de> Deserialize<'de> for RawInfo {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InfoVisitor)
    }
}

/// By hand and not derived, because a derived one would take a list for an object as well.
struct InfoVisitor;

impl<'de> Visitor<'de> for InfoVisitor {
    type Value = RawInfo;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawInfo, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "dtype" => dtype.replace(map.next_value()?).is_some(),
                "shape" => shape.replace(map.next_value()?).is_some(),
                "data_offsets" => offsets.replace(map.next_value()?).is_some(),
                _ => {
                    map.next_value::<IgnoredAny>()?;
                    return Err(de::Error::custom(format_args!("unknown key {}", quoted(&key))));
                }
            };
            if twice {
                return Err(de::Error::custom(format_args!("the key {key:?} stands twice")));
            }
        }
        Ok(RawInfo {
            dtype: dtype.ok_or_else(|| de::Error::missing_field("dtype"))?,
            shape: shape.ok_or_else(|| de::Error::missing_field("shape"))?,
            offsets: offsets.ok_or_else(|| de::Error::missing_field("data_offsets"))?,
        })
    }
}
