//! The GGUF input, versions 2 and 3, little-endian: metadata walked with every length checked, tensors borrowed.
//!
//! Layout: magic, version u32, tensor count u64, key-value count u64, the key-value pairs, the tensors'
//! descriptions, padding, then the data at the alignment that `general.alignment` gives.

use super::check::{self, MAX_TENSORS, duplicate, quoted, sized};
use super::source::Source;
use super::{Model, Sidecar, TensorInfo};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Encoding, Tensor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The embedded file that keeps the key-value metadata.
const SIDECAR: &str = "gguf_metadata.json";

/// The longest metadata, as JSON.
const MAX_METADATA: usize = 64 << 20;

/// The most key-value pairs; models have dozens.
const MAX_PAIRS: u64 = 65_536;

/// The longest key; the format's own limit.
const MAX_KEY: usize = 65_535;

/// The format's own limit.
const MAX_DIMS: u32 = 4;

/// Where `general.alignment` is not given.
const DEFAULT_ALIGNMENT: u64 = 32;

/// What a tensor's type number means: those that are read, and the names of those that are not.
fn encoding(id: u32) -> Result<Encoding, &'static str> {
    Ok(match id {
        0 => Encoding::Plain(Dtype::F32),
        1 => Encoding::Plain(Dtype::F16),
        2 => Encoding::Q4_0,
        3 => Encoding::Q4_1,
        8 => Encoding::Q8_0,
        24 => Encoding::Plain(Dtype::I8),
        25 => Encoding::Plain(Dtype::I16),
        26 => Encoding::Plain(Dtype::I32),
        27 => Encoding::Plain(Dtype::I64),
        28 => Encoding::Plain(Dtype::F64),
        30 => Encoding::Plain(Dtype::BF16),
        6 => return Err("Q5_0"),
        7 => return Err("Q5_1"),
        9 => return Err("Q8_1"),
        10 => return Err("Q2_K"),
        11 => return Err("Q3_K"),
        12 => return Err("Q4_K"),
        13 => return Err("Q5_K"),
        14 => return Err("Q6_K"),
        15 => return Err("Q8_K"),
        16 => return Err("IQ2_XXS"),
        17 => return Err("IQ2_XS"),
        18 => return Err("IQ3_XXS"),
        19 => return Err("IQ1_S"),
        20 => return Err("IQ4_NL"),
        21 => return Err("IQ3_S"),
        22 => return Err("IQ2_S"),
        23 => return Err("IQ4_XS"),
        29 => return Err("IQ1_M"),
        34 => return Err("TQ1_0"),
        35 => return Err("TQ2_0"),
        39 => return Err("MXFP4"),
        _ => return Err("unknown"),
    })
}

/// An open GGUF file.
pub struct Gguf {
    source: Source,
    /// In the order of their descriptions.
    tensors: Vec<TensorInfo>,
    data: Vec<Range<usize>>,
    metadata: Vec<u8>,
}

impl Gguf {
    /// Opens and validates a file; no tensor is read.
    ///
    /// # Errors
    /// An I/O error; an input error that names the tensor, key or byte; an unsupported error for a tensor
    /// type or a version that is not read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(Source::open(path)?)
    }

    /// As [`Gguf::open`], over bytes in memory; `name` stands in messages.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn from_bytes(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(Source::of_bytes(name, bytes))
    }

    fn parse(source: Source) -> Result<Self> {
        let (tensors, data, metadata) = {
            let mut cursor = Cursor { source: &source, at: 0 };
            let (tensor_count, pair_count) = cursor.head()?;
            let pairs = Pairs::read(&mut cursor, pair_count)?;
            let raw = cursor.descriptions(tensor_count)?;
            let (tensors, data) = place(&source, cursor.at, pairs.alignment, raw)?;
            (tensors, data, pairs.json())
        };
        Ok(Gguf { source, tensors, data, metadata })
    }
}

impl Model for Gguf {
    fn format(&self) -> &'static str {
        "GGUF"
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
        Ok(vec![Sidecar { path: SIDECAR.to_string(), bytes: self.metadata.clone() }])
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.source.path().to_path_buf()]
    }
}

/// A tensor's description as it is written.
struct Raw<'a> {
    name: &'a str,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// Reads forward; every length is checked against what is left.
struct Cursor<'a> {
    source: &'a Source,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn error(&self, what: impl std::fmt::Display) -> Error {
        self.source.error(format_args!("byte {}: {what}", self.at))
    }

    fn left(&self) -> usize {
        self.source.len() - self.at
    }

    fn bytes(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
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

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        self.bytes(len, what)
    }

    /// A string that must be UTF-8: a key or a name.
    fn text(&mut self, what: &str) -> Result<&'a str> {
        let start = self.at;
        let bytes = self.string(what)?;
        std::str::from_utf8(bytes).map_err(|_| {
            self.source.error(format_args!("byte {start}: {what} {} is not UTF-8", bytes.escape_ascii()))
        })
    }

    /// Magic, version and counts.
    fn head(&mut self) -> Result<(u64, u64)> {
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

    fn descriptions(&mut self, count: u64) -> Result<Vec<Raw<'a>>> {
        let mut raw = Vec::new();
        for i in 0..count {
            let name = self.text(&format!("the name of tensor {i}"))?;
            let what = format!("the description of tensor {}", quoted(name));
            let dims = self.u32(&what)?;
            if dims > MAX_DIMS {
                return Err(
                    self.error(format_args!("{what} has {dims} dimensions; at most {MAX_DIMS} are allowed"))
                );
            }
            let dims = (0..dims).map(|_| self.u64(&what)).collect::<Result<_>>()?;
            raw.push(Raw { name, dims, kind: self.u32(&what)?, offset: self.u64(&what)? });
        }
        Ok(raw)
    }
}

type Placed = (Vec<TensorInfo>, Vec<Range<usize>>);

/// Checks names, types and shapes, and finds each tensor's bytes.
fn place(source: &Source, end: usize, alignment: u64, raw: Vec<Raw<'_>>) -> Result<Placed> {
    if let Some(name) = duplicate(raw.iter().map(|t| t.name)) {
        return Err(source.error(format_args!("the tensor {} stands twice", quoted(name))));
    }
    let start = (end as u64).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(raw.len());
    let mut data = Vec::with_capacity(raw.len());
    for t in raw {
        let at = |e: Error| e.at(format_args!("{}: tensor {}", source.path().display(), quoted(t.name)));
        let (info, bytes) = describe(&t).map_err(at)?;
        let outside = || {
            at(Error::input(format!(
                "{bytes} bytes at offset {} reach beyond the {} bytes of data; the file is cut short or damaged",
                t.offset,
                (source.len() as u64).saturating_sub(start)
            )))
        };
        if !t.offset.is_multiple_of(alignment) {
            return Err(at(Error::input(format!(
                "offset {} is no multiple of the alignment, {alignment}",
                t.offset
            ))));
        }
        if bytes == 0 {
            data.push(0..0);
            tensors.push(info);
            continue;
        }
        let from = start.checked_add(t.offset).ok_or_else(outside)?;
        let to = from.checked_add(bytes).filter(|&to| to <= source.len() as u64).ok_or_else(outside)?;
        // Both are at most the file's length, which is a length in memory.
        data.push(from as usize..to as usize);
        tensors.push(info);
    }
    let mut order: Vec<usize> = (0..data.len()).filter(|&i| !data[i].is_empty()).collect();
    order.sort_by_key(|&i| data[i].start);
    for pair in order.windows(2) {
        let (a, b) = (&data[pair[0]], &data[pair[1]]);
        if b.start < a.end {
            return Err(source.error(format_args!(
                "tensor {}: its data at byte {} overlap those of tensor {}, which end at byte {}",
                quoted(&tensors[pair[1]].name),
                b.start,
                quoted(&tensors[pair[0]].name),
                a.end
            )));
        }
    }
    Ok((tensors, data))
}

fn describe(t: &Raw<'_>) -> Result<(TensorInfo, u64)> {
    check::check_name(t.name)?;
    let encoding = encoding(t.kind).map_err(|name| {
        Error::unsupported(format!(
            "type {name} ({}) is not read; these are: F32, F16, BF16, Q8_0, Q4_0, Q4_1 (start from the F16 or BF16 file)",
            t.kind
        ))
    })?;
    // The fastest dimension comes first in the file, and last here.
    let shape: Vec<u64> = t.dims.iter().rev().copied().collect();
    let block = encoding.block().0 as u64;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        return Err(Error::input(format!(
            "rows of {row} weights are no whole number of {} blocks",
            encoding.name()
        )));
    }
    let (shape, bytes) = sized(&shape, encoding)?;
    Ok((TensorInfo { name: t.name.to_string(), shape, encoding }, bytes))
}

/// The key-value metadata, each value already as JSON.
struct Pairs<'a> {
    values: BTreeMap<&'a str, Vec<u8>>,
    alignment: u64,
}

impl<'a> Pairs<'a> {
    fn read(cursor: &mut Cursor<'a>, count: u64) -> Result<Self> {
        let mut pairs = Pairs { values: BTreeMap::new(), alignment: DEFAULT_ALIGNMENT };
        let mut total = 2;
        for i in 0..count {
            let key = cursor.text(&format!("key {i}"))?;
            if key.len() > MAX_KEY {
                return Err(cursor.error(format_args!(
                    "key {} has {} bytes; at most {MAX_KEY} are allowed",
                    quoted(key),
                    key.len()
                )));
            }
            let what = format!("the value of {}", quoted(key));
            let kind = cursor.u32(&what)?;
            let room = MAX_METADATA.saturating_sub(total);
            let mut json = Vec::new();
            let number = value(cursor, kind, &what, room, &mut json)?;
            pairs.note(cursor.source, key, number)?;
            total += key.len() + json.len() + 4;
            match pairs.values.entry(key) {
                Entry::Vacant(slot) => slot.insert(json),
                Entry::Occupied(_) => {
                    return Err(cursor.error(format_args!("the key {} stands twice", quoted(key))));
                }
            };
            if total > MAX_METADATA {
                return Err(cursor.error(too_much()));
            }
        }
        Ok(pairs)
    }

    /// The keys that decide how the rest is read.
    fn note(&mut self, source: &Source, key: &str, number: Option<u64>) -> Result<()> {
        match (key, number) {
            ("general.alignment", Some(n)) if n.is_power_of_two() && n <= 1 << 30 => self.alignment = n,
            ("general.alignment", _) => {
                return Err(source.error("general.alignment is no power of two below 2^31"));
            }
            ("split.count", Some(n)) if n > 1 => {
                return Err(source.unsupported(format_args!(
                    "this is one of {n} parts of a model; join them with `llama-gguf-split --merge`"
                )));
            }
            _ => {}
        }
        Ok(())
    }

    /// Canonical JSON: sorted keys, no spaces.
    fn json(&self) -> Vec<u8> {
        let mut out = vec![b'{'];
        for (i, (key, value)) in self.values.iter().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            string(key.as_bytes(), &mut out);
            out.push(b':');
            out.extend_from_slice(value);
        }
        out.push(b'}');
        out
    }
}

fn too_much() -> String {
    format!("the metadata are longer than {} MiB as JSON, the most allowed", MAX_METADATA >> 20)
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Appends a value as JSON; returns it, if it is an unsigned number.
fn value(
    cursor: &mut Cursor<'_>,
    kind: u32,
    what: &str,
    room: usize,
    out: &mut Vec<u8>,
) -> Result<Option<u64>> {
    if kind != ARRAY {
        return scalar(cursor, kind, what, out);
    }
    let item = cursor.u32(what)?;
    if item == ARRAY {
        return Err(cursor
            .source
            .unsupported(format_args!("byte {}: {what} is an array of arrays", cursor.at)));
    }
    let count = cursor.u64(what)?;
    let least = scalar_bytes(item).ok_or_else(|| unknown_kind(cursor, item, what))?;
    if count > cursor.left() as u64 / least {
        return Err(cursor.error(format_args!("{what} has {count} items, which the file does not hold")));
    }
    out.push(b'[');
    for i in 0..count {
        if i > 0 {
            out.push(b',');
        }
        scalar(cursor, item, what, out)?;
        if out.len() > room {
            return Err(cursor.error(too_much()));
        }
    }
    out.push(b']');
    Ok(None)
}

fn unknown_kind(cursor: &Cursor<'_>, kind: u32, what: &str) -> Error {
    cursor.source.unsupported(format_args!("byte {}: {what} has the unknown type {kind}", cursor.at))
}

/// The least bytes that a value of that type takes.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | BOOL => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        STRING | 10..=12 => Some(8),
        _ => None,
    }
}

fn scalar(cursor: &mut Cursor<'_>, kind: u32, what: &str, out: &mut Vec<u8>) -> Result<Option<u64>> {
    let mut unsigned = None;
    match kind {
        0 => unsigned = Some(u64::from(cursor.array::<1>(what)?[0])),
        2 => unsigned = Some(u64::from(u16::from_le_bytes(cursor.array(what)?))),
        4 => unsigned = Some(u64::from(cursor.u32(what)?)),
        10 => unsigned = Some(cursor.u64(what)?),
        1 => json(&i8::from_le_bytes(cursor.array(what)?), out),
        3 => json(&i16::from_le_bytes(cursor.array(what)?), out),
        5 => json(&i32::from_le_bytes(cursor.array(what)?), out),
        11 => json(&i64::from_le_bytes(cursor.array(what)?), out),
        // Shortest digits that give the number back; what is not finite becomes null.
        6 => json(&f32::from_le_bytes(cursor.array(what)?), out),
        12 => json(&f64::from_le_bytes(cursor.array(what)?), out),
        BOOL => match cursor.array::<1>(what)?[0] {
            flag @ (0 | 1) => json(&(flag == 1), out),
            byte => return Err(cursor.error(format_args!("{what} is a boolean of value {byte}"))),
        },
        STRING => string(cursor.string(what)?, out),
        _ => return Err(unknown_kind(cursor, kind, what)),
    }
    if let Some(number) = unsigned {
        json(&number, out);
    }
    Ok(unsigned)
}

/// Appends a string; bytes that are no UTF-8, which some tokenizers hold, become U+FFFD.
fn string(bytes: &[u8], out: &mut Vec<u8>) {
    json(&*String::from_utf8_lossy(bytes), out);
}

fn json<T: serde::Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("numbers and strings are always JSON, and memory takes it");
}
