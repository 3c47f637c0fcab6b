//! What every input checks in the same way: names, shapes, and where in a JSON text something stands.

use crate::error::{Error, Result};
use crate::tensor::{Encoding, element_count};
use std::collections::HashSet;

/// The most tensors that a model may have; the artifact's limit.
pub(super) const MAX_TENSORS: usize = 1_000_000;

/// The longest tensor name in bytes; the artifact's limit.
const MAX_NAME: usize = 1024;

/// A name in quotes, escaped, and cut short where a file holds something absurd.
pub(super) fn quoted(name: &str) -> String {
    match name.char_indices().nth(80) {
        Some((end, _)) => format!("{:?}…", &name[..end]),
        None => format!("{name:?}"),
    }
}

/// Checks a tensor's name: not empty, not too long, no control characters.
pub(super) fn check_name(name: &str) -> Result<()> {
    let problem = if name.is_empty() {
        "is empty".to_string()
    } else if name.len() > MAX_NAME {
        format!("has {} bytes; at most {MAX_NAME} are allowed", name.len())
    } else if name.chars().any(char::is_control) {
        "holds a control character".to_string()
    } else {
        return Ok(());
    };
    Err(Error::input(format!("the tensor name {} {problem}", quoted(name))))
}

/// The first name that occurs twice.
pub(super) fn duplicate<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = HashSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

/// Shape as `usize` and length in bytes, both checked.
///
/// # Errors
/// An input error without a place: callers add it.
pub(super) fn sized(shape: &[u64], encoding: Encoding) -> Result<(Vec<usize>, u64)> {
    let elements = element_count(shape)?;
    let bytes = encoding.byte_len(elements).ok_or_else(|| {
        Error::input(format!("shape {shape:?} is no whole number of {} blocks", encoding.name()))
    })?;
    let shape: Option<Vec<usize>> = shape.iter().map(|&n| usize::try_from(n).ok()).collect();
    match shape {
        Some(shape) if usize::try_from(bytes).is_ok() => Ok((shape, bytes)),
        _ => Err(Error::unsupported("the tensor is too large for this computer's address space")),
    }
}

/// The one-based line and column of a byte.
pub(super) fn line_column(text: &[u8], offset: usize) -> (usize, usize) {
    let before = &text[..offset.min(text.len())];
    let line_start = before.iter().rposition(|&b| b == b'\n').map_or(0, |i| i + 1);
    (before.iter().filter(|&&b| b == b'\n').count() + 1, before.len() - line_start + 1)
}

/// What a JSON error says, and the offset of the byte it stopped at.
pub(super) fn json_error(text: &[u8], error: &serde_json::Error) -> (usize, String) {
    let mut message = error.to_string();
    let offset = if error.line() == 0 {
        0
    } else {
        let suffix = format!(" at line {} column {}", error.line(), error.column());
        message.truncate(message.strip_suffix(&suffix).unwrap_or(&message).len());
        let line = match error.line() {
            1 => 0,
            n => text
                .iter()
                .enumerate()
                .filter(|&(_, &b)| b == b'\n')
                .nth(n - 2)
                .map_or(text.len(), |(i, _)| i + 1),
        };
        (line + error.column().saturating_sub(1)).min(text.len())
    };
    // JSON has no such numbers, but Python's json module writes them.
    let rest = &text[offset.saturating_sub(1)..];
    if ["NaN", "Infinity", "-Infinity"]
        .iter()
        .any(|word| (0..2).any(|i| rest.get(i..).is_some_and(|rest| rest.starts_with(word.as_bytes()))))
    {
        message += " (NaN and Infinity are no JSON)";
    }
    (offset, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_errors_keep_their_place() {
        let text = b"{\n \"a\": [1, NaN]\n}";
        let error = serde_json::from_slice::<serde_json::Value>(text).unwrap_err();
        let (offset, message) = json_error(text, &error);
        assert!(text[offset - 1..].starts_with(b"NaN") || text[offset..].starts_with(b"NaN"), "{offset}");
        assert!(message.contains("NaN and Infinity are no JSON") && !message.contains("line"), "{message}");
        assert_eq!(line_column(text, 12), (2, 11));
    }
}
