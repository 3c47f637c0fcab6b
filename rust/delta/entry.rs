//! What a delta's index says of one tensor: how it is coded, from which tensor of the base, and what must come out.

use crate::artifact::{Entry, NewEntry};
use crate::error::{Error, Result};
use crate::pipeline::hex;
use crate::tensor::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// How a tensor is coded; its name stands where other artifacts have a codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// As a tensor of the base, of whatever name and shape.
    Same,
    /// [`super::exact`].
    Exact,
    /// [`super::bit1`].
    Bit1,
    /// [`super::codes`].
    Codes,
}

impl Method {
    const ALL: [Method; 4] = [Method::Same, Method::Exact, Method::Bit1, Method::Codes];

    /// The name in the index.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Same => "same",
            Method::Exact => "exact",
            Method::Bit1 => "bit1",
            Method::Codes => "codes",
        }
    }

    /// The method of an entry, or `None` for one that is as in any artifact.
    ///
    /// # Errors
    /// An unsupported error for one that a newer version has written.
    pub fn of(entry: &Entry) -> Result<Option<Method>> {
        if entry.is_kept() || entry.known_codec().is_some() {
            return Ok(None);
        }
        let method = Method::ALL.into_iter().find(|m| m.name() == entry.codec && entry.codec_version == 1);
        method.map(Some).ok_or_else(|| {
            Error::unsupported(format!(
                "it is coded as {:?}, version {}, which needs a newer tenpak",
                entry.codec, entry.codec_version
            ))
        })
    }
}

/// A tensor of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct From {
    /// Its name.
    pub name: String,
    /// BLAKE3 of its elements.
    pub b3: [u8; 32],
}

/// An entry to write.
pub fn entry(
    method: Method,
    name: &str,
    shape: &[usize],
    dtype: Dtype,
    b3: [u8; 32],
    from: Option<&From>,
    about: &[(&str, Value)],
) -> NewEntry {
    let mut params: BTreeMap<String, Value> =
        about.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    params.insert("b3".to_owned(), hex(&b3).into());
    if let Some(from) = from {
        params.insert("base".to_owned(), from.name.clone().into());
        params.insert("base_b3".to_owned(), hex(&from.b3).into());
    }
    NewEntry {
        name: name.to_owned(),
        shape: shape.iter().map(|&n| n as u64).collect(),
        dtype,
        codec: method.name().to_owned(),
        codec_version: 1,
        axis: 0,
        params,
    }
}

/// The digest of the tensor that an entry gives.
///
/// # Errors
/// An artifact error where there is none.
pub fn b3(entry: &Entry) -> Result<[u8; 32]> {
    if entry.is_kept()
        && let Some(part) = entry.parts.get("data")
    {
        return Ok(part.b3);
    }
    digest(entry, "b3")
}

/// The tensor of the base that an entry is coded against, if there is one.
///
/// # Errors
/// An artifact error where its digest is missing.
pub fn from(entry: &Entry) -> Result<Option<From>> {
    let Some(name) = text(entry, "base") else { return Ok(None) };
    Ok(Some(From { name: name.to_owned(), b3: digest(entry, "base_b3")? }))
}

/// A parameter that is text.
pub fn text<'a>(entry: &'a Entry, key: &str) -> Option<&'a str> {
    entry.params.get(key).and_then(Value::as_str)
}

fn digest(entry: &Entry, key: &str) -> Result<[u8; 32]> {
    text(entry, key)
        .and_then(|text| blake3::Hash::from_hex(text.as_bytes()).ok())
        .map(Into::into)
        .ok_or_else(|| Error::artifact(format!("the parameter {key:?} is no digest")))
}
