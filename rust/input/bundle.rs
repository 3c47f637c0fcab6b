//! The JSON bundle input: small, readable models. Streamed over the mapped text, never held as a tree.
//!
//! `{"tensors":[{"name":"w","shape":[2],"data":[1,2]}]}`, or short: `{"tensors":{"w":{"shape":[2],"data":[1,2]}}}`.
//! Opening finds each tensor's data in the text and checks every number; reading parses them again.

use super::check::{self, MAX_TENSORS, json_error, line_column, quoted, sized};
use super::source::Source;
use super::{Model, Sidecar, TensorInfo};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Encoding, Tensor};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use half::{bf16, f16};
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The longest bundle.
pub(crate) const MAX_BYTES: u64 = 1 << 30;

/// Above this, another format is worth a word.
const LARGE: usize = 100_000_000;

/// What `format` must say, where it is given.
const FORMAT: &str = "tenpak-bundle";

/// The dtypes of a bundle, by their names in it.
const DTYPES: [(&str, Dtype); 3] = [("f32", Dtype::F32), ("f16", Dtype::F16), ("bf16", Dtype::BF16)];

/// An open JSON bundle.
pub struct Bundle {
    source: Source,
    tensors: Vec<TensorInfo>,
    data: Vec<Data>,
}

/// Where a tensor's data stand in the text, as JSON.
struct Data {
    range: Range<usize>,
    base64: bool,
}

impl Bundle {
    /// Opens a bundle and checks all of it, every number included.
    ///
    /// # Errors
    /// An I/O error; an input error that names the tensor and the line or the element; an unsupported error
    /// for a version or a dtype that is not known.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Source::open(path)?)
    }

    /// As [`Bundle::open`], over bytes in memory; `name` stands in messages.
    ///
    /// # Errors
    /// As [`Bundle::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(Source::of_bytes(name, bytes))
    }

    fn parse(source: Source) -> Result<Self> {
        if source.len() as u64 > MAX_BYTES {
            return Err(source.error(format_args!(
                "the JSON has {} bytes; at most {} MiB are read, use safetensors for more",
                source.len(),
                MAX_BYTES >> 20
            )));
        }
        if source.starts_with(b"\xef\xbb\xbf") {
            return Err(source.error("the JSON begins with a byte order mark; save it as UTF-8 without one"));
        }
        let version = Cell::new(1);
        let mut json = serde_json::Deserializer::from_slice(&source);
        let parsed = Top(&version).deserialize(&mut json).and_then(|raw| json.end().map(|()| raw));
        let raw = match parsed {
            // What is wrong with a newer version's text is no help to anyone.
            _ if version.get() != 1 => {
                return Err(source
                    .unsupported(format_args!("bundle version {} is not known; 1 is read", version.get())));
            }
            Ok(raw) => raw,
            Err(e) => {
                let (offset, message) = json_error(&source, &e);
                let (line, column) = line_column(&source, offset);
                return Err(source.error(format_args!("line {line}, column {column}: {message}")));
            }
        };
        let mut tensors = Vec::with_capacity(raw.len());
        let mut data = Vec::with_capacity(raw.len());
        let mut seen = HashSet::new();
        for tensor in raw {
            let name = tensor.name.clone();
            let at = |e: Error| e.at(format_args!("{}: tensor {}", source.path().display(), quoted(&name)));
            if !seen.insert(tensor.name.clone()) {
                return Err(at(Error::input("the name stands twice")));
            }
            let (info, place) = tensor.check(&source).map_err(at)?;
            tensors.push(info);
            data.push(place);
        }
        Ok(Bundle { source, tensors, data })
    }
}

impl Model for Bundle {
    fn format(&self) -> &'static str {
        "JSON bundle"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let info = &self.tensors[index];
        let at =
            |e: Error| e.at(format_args!("{}: tensor {}", self.source.path().display(), quoted(&info.name)));
        let dtype = info.encoding.dtype();
        // Opening saw that the text holds so many elements.
        let bytes = info.shape.iter().product::<usize>() * dtype.size();
        let mut out = Vec::with_capacity(bytes);
        self.data[index]
            .elements(&self.source, dtype, bytes, &mut |element| out.extend_from_slice(element))
            .map_err(at)?;
        Ok(Tensor { shape: info.shape.clone(), encoding: info.encoding, bytes: Cow::Owned(out) })
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(Vec::new())
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.source.path().to_path_buf()]
    }

    fn notes(&self) -> Vec<String> {
        if self.source.len() <= LARGE {
            return Vec::new();
        }
        vec![format!(
            "{} is {} MB of JSON; safetensors would be read many times faster",
            self.source.path().display(),
            self.source.len() / 1_000_000
        )]
    }
}

impl Data {
    /// Hands each element, or a run of them, to `take` as little-endian bytes, `expected` in all.
    fn elements(
        &self,
        source: &Source,
        dtype: Dtype,
        expected: usize,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        if self.base64 {
            self.decode(source, dtype, expected, take)
        } else {
            self.parse(source, dtype, expected, take)
        }
    }

    /// The text, which the JSON parser has found to be UTF-8.
    fn text<'s>(&self, source: &'s Source) -> Result<&'s str> {
        std::str::from_utf8(&source[self.range.clone()]).map_err(|_| Error::input("the data are not UTF-8"))
    }

    /// A list of numbers. They are parsed here and not by the JSON parser, so that each is rounded once.
    fn parse(
        &self,
        source: &Source,
        dtype: Dtype,
        expected: usize,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let text = self.text(source)?;
        let expected = expected / dtype.size();
        let problem = |i: usize, offset: usize, what: fmt::Arguments<'_>| {
            let (line, column) = line_column(source, self.range.start + offset);
            Error::input(format!("data[{i}] (line {line}, column {column}): {what}"))
        };
        let Some(list) = text.strip_prefix('[') else {
            return Err(problem(0, 0, format_args!("data must be a list of numbers")));
        };
        let list = list.as_bytes();
        let (mut at, mut count) = (0, 0);
        loop {
            at += list[at..].iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r' | b',')).count();
            let len = list[at..]
                .iter()
                .take_while(|b| !matches!(b, b' ' | b'\t' | b'\n' | b'\r' | b',' | b']'))
                .count();
            if len == 0 {
                break;
            }
            let token = &text[1 + at..1 + at + len];
            let value = match token.parse::<f32>() {
                // Rust would also take `nan` and `inf`, which JSON has no words for.
                Ok(value) if token.starts_with(|c: char| c == '-' || c.is_ascii_digit()) => value,
                _ if token.starts_with('[') => {
                    return Err(problem(
                        count,
                        1 + at,
                        format_args!("a list in a list; data must be flat, row by row"),
                    ));
                }
                _ => return Err(problem(count, 1 + at, format_args!("{} is no number", quoted(token)))),
            };
            if count == expected {
                return Err(problem(
                    count,
                    1 + at,
                    format_args!("the shape has only {expected} elements, but more numbers follow"),
                ));
            }
            let (f16, bf16) = (f16::from_f32(value), bf16::from_f32(value));
            let finite = match dtype {
                Dtype::F16 => f16.is_finite(),
                Dtype::BF16 => bf16.is_finite(),
                _ => value.is_finite(),
            };
            if !finite {
                return Err(problem(count, 1 + at, format_args!("{token} lies beyond {}", dtype.name())));
            }
            match dtype {
                Dtype::F16 => take(&f16.to_le_bytes()),
                Dtype::BF16 => take(&bf16.to_le_bytes()),
                _ => take(&value.to_le_bytes()),
            }
            count += 1;
            at += len;
        }
        if count < expected {
            return Err(Error::input(format!(
                "data has {count} numbers, but the shape has {expected} elements"
            )));
        }
        Ok(())
    }

    /// Base64 of the elements' bytes.
    fn decode(
        &self,
        source: &Source,
        dtype: Dtype,
        expected: usize,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let text = self.text(source)?;
        let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
        let encoded: Cow<'_, str> = match inner {
            Some(inner) if !inner.contains('\\') => Cow::Borrowed(inner),
            // Some writers escape the slash.
            Some(_) => {
                Cow::Owned(serde_json::from_str(text).map_err(|e| Error::input(format!("data_b64: {e}")))?)
            }
            None => return Err(Error::input("data_b64 must be a string of base64")),
        };
        let bytes = BASE64.decode(encoded.as_bytes()).map_err(|e| Error::input(format!("data_b64: {e}")))?;
        if bytes.len() != expected {
            return Err(Error::input(format!(
                "data_b64 holds {} bytes, but the shape as {} takes {expected}",
                bytes.len(),
                dtype.name()
            )));
        }
        let mut values = [0f32; 256];
        for (c, chunk) in bytes.chunks(256 * dtype.size()).enumerate() {
            let values = &mut values[..chunk.len() / dtype.size()];
            Encoding::Plain(dtype).widen(chunk, 0, values);
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::input(format!("data_b64: element {} is {}", c * 256 + i, values[i])));
            }
        }
        take(&bytes);
        Ok(())
    }
}

/// A tensor as it is written, its data still text.
struct Raw<'a> {
    name: String,
    shape: Vec<u64>,
    dtype: Option<String>,
    data: &'a RawValue,
    base64: bool,
}

impl Raw<'_> {
    fn check(self, source: &Source) -> Result<(TensorInfo, Data)> {
        check::check_name(&self.name)?;
        let dtype = match &self.dtype {
            None => Dtype::F32,
            Some(name) => {
                DTYPES.iter().find(|(known, _)| known == name).map(|(_, dtype)| *dtype).ok_or_else(|| {
                    Error::unsupported(format!(
                        "dtype {} is not known; a bundle holds f32, f16 and bf16",
                        quoted(name)
                    ))
                })?
            }
        };
        let encoding = Encoding::Plain(dtype);
        let (shape, bytes) = sized(&self.shape, encoding)?;
        // The raw value borrows from the source: where it starts is its place in it.
        let start = self.data.get().as_ptr().addr() - source.as_ptr().addr();
        let data = Data { range: start..start + self.data.get().len(), base64: self.base64 };
        // `sized` saw that the length fits an address.
        data.elements(source, dtype, bytes as usize, &mut |_| {})?;
        Ok((TensorInfo { name: self.name, shape, encoding }, data))
    }
}

/// The whole text; notes the version in passing.
struct Top<'a>(&'a Cell<u64>);

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = Vec<Raw<'de>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = Vec<Raw<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen = HashSet::new();
        let mut tensors = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "format" => {
                    let format = map.next_value::<String>()?;
                    if format != FORMAT {
                        return Err(de::Error::custom(format_args!(
                            "format {} is not {FORMAT:?}",
                            quoted(&format)
                        )));
                    }
                }
                "version" => {
                    self.0.set(map.next_value()?);
                    if self.0.get() != 1 {
                        return Err(de::Error::custom("unknown version"));
                    }
                }
                "tensors" if tensors.is_none() => tensors = Some(map.next_value::<Tensors<'de>>()?.0),
                "tensors" => {}
                _ => {
                    return Err(de::Error::custom(format_args!(
                        "unknown key {}; a bundle has format, version and tensors",
                        quoted(&key)
                    )));
                }
            }
            if !seen.insert(key.clone()) {
                return Err(de::Error::custom(format_args!("the key {key:?} stands twice")));
            }
        }
        tensors.ok_or_else(|| de::Error::missing_field("tensors"))
    }
}

struct Tensors<'a>(Vec<Raw<'a>>);

impl<'de> Deserialize<'de> for Tensors<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TensorsVisitor).map(Tensors)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Vec<Raw<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tensors, or an object of them by name")
    }

    /// The long form: each tensor holds its name.
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut tensors = Vec::new();
        while let Some(tensor) = seq
            .next_element_seed(OneTensor(None))
            .map_err(|e| de::Error::custom(format_args!("tensors[{}]: {e}", tensors.len())))?
        {
            room(&tensors)?;
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    /// The short form: the keys are the names.
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            room(&tensors)?;
            let tensor = map
                .next_value_seed(OneTensor(Some(name.clone())))
                .map_err(|e| de::Error::custom(format_args!("tensor {}: {e}", quoted(&name))))?;
            tensors.push(tensor);
        }
        Ok(tensors)
    }
}

fn room<E: de::Error>(tensors: &[Raw<'_>]) -> Result<(), E> {
    if tensors.len() < MAX_TENSORS {
        Ok(())
    } else {
        Err(E::custom(format_args!("more than {MAX_TENSORS} tensors")))
    }
}

/// One tensor, whose name is known in the short form.
struct OneTensor(Option<String>);

impl<'de> DeserializeSeed<'de> for OneTensor {
    type Value = Raw<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Raw<'de>, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for OneTensor {
    type Value = Raw<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with shape and data")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw<'de>, A::Error> {
        let short = self.0.is_some();
        let mut name = self.0;
        let (mut shape, mut dtype, mut data, mut base64) = (None, None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let twice = match key.as_str() {
                "name" if !short => name.replace(map.next_value()?).is_some(),
                "shape" => shape.replace(map.next_value()?).is_some(),
                "dtype" => dtype.replace(map.next_value()?).is_some(),
                "data" => data.replace(map.next_value::<&'de RawValue>()?).is_some(),
                "data_b64" => base64.replace(map.next_value::<&'de RawValue>()?).is_some(),
                _ => {
                    return Err(de::Error::custom(format_args!(
                        "unknown key {}; a tensor has {}shape, dtype, and data or data_b64",
                        quoted(&key),
                        if short { "" } else { "name, " }
                    )));
                }
            };
            if twice {
                return Err(de::Error::custom(format_args!("the key {key:?} stands twice")));
            }
        }
        let (data, base64) = match (data, base64) {
            (Some(data), None) => (data, false),
            (None, Some(data)) => (data, true),
            (None, None) => return Err(de::Error::custom("neither data nor data_b64 is there")),
            (Some(_), Some(_)) => {
                return Err(de::Error::custom("both data and data_b64 are there; give one"));
            }
        };
        Ok(Raw {
            name: name.ok_or_else(|| de::Error::missing_field("name"))?,
            shape: shape.ok_or_else(|| de::Error::missing_field("shape"))?,
            dtype,
            data,
            base64,
        })
    }
}
