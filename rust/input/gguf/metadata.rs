//! The key-value metadata: walked with every length checked, and kept as canonical JSON, value by value.

use super::super::check::quoted;
use super::super::source::Source;
use super::cursor::Cursor;
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// The longest metadata, as JSON.
const MAX_METADATA: usize = 64 << 20;

/// The longest key; the format's own limit.
const MAX_KEY: usize = 65_535;

/// Where `general.alignment` is not given.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The key-value metadata, each value already as JSON.
pub(super) struct Metadata<'a> {
    values: BTreeMap<&'a str, Vec<u8>>,
    /// What data are aligned to.
    pub alignment: u64,
}

impl<'a> Metadata<'a> {
    pub fn read(cursor: &mut Cursor<'a>, count: u64) -> Result<Self> {
        let mut metadata = Metadata { values: BTreeMap::new(), alignment: DEFAULT_ALIGNMENT };
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
            metadata.note(cursor.source, key, number)?;
            total += key.len() + json.len() + 4;
            match metadata.values.entry(key) {
                Entry::Vacant(slot) => slot.insert(json),
                Entry::Occupied(_) => {
                    return Err(cursor.error(format_args!("the key {} stands twice", quoted(key))));
                }
            };
            if total > MAX_METADATA {
                return Err(cursor.error(too_much()));
            }
        }
        Ok(metadata)
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

    /// The value of that key, if there is one and it is of that type; numbers that are not finite are none.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        serde_json::from_slice(self.values.get(key)?).ok()
    }

    /// Whether there is such a key.
    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The keys that start with `prefix`, in order.
    pub fn keys(&self, prefix: &str) -> impl Iterator<Item = &'a str> {
        self.values.keys().copied().filter(move |key| key.starts_with(prefix))
    }

    /// Canonical JSON of all pairs but those in `without`: sorted keys, no spaces.
    pub fn json(&self, without: &[&str]) -> Vec<u8> {
        let mut out = vec![b'{'];
        for (key, value) in self.values.iter().filter(|(key, _)| !without.contains(key)) {
            if out.len() > 1 {
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
