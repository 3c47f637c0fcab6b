//! What a reader accepts from a file it does not trust, and the rules for names and paths.

use crate::error::{Error, Result};

/// Upper bounds that a caller can raise. Rank (8) and element counts (below 2^56) are the format's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tensors and aliases together.
    pub tensors: usize,
    /// Embedded files.
    pub files: usize,
    /// Bytes of a name or an embedded path, in UTF-8.
    pub name_bytes: usize,
    /// Bytes of the index.
    pub index_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { tensors: 1_000_000, files: 10_000, name_bytes: 1024, index_bytes: 64 << 20 }
    }
}

impl Limits {
    /// Checks a tensor's, codec's or part's name: not too long, no control characters.
    pub(super) fn check_name(&self, what: &str, name: &str) -> Result<()> {
        if name.len() > self.name_bytes {
            let start: String = name.chars().take(40).collect();
            return Err(Error::artifact(format!(
                "the {what} name {start:?}… has {} bytes; at most {} are allowed",
                name.len(),
                self.name_bytes
            )));
        }
        if name.chars().any(char::is_control) {
            return Err(Error::artifact(format!("the {what} name {name:?} holds a control character")));
        }
        Ok(())
    }

    /// Checks an embedded file's path: it must stay inside whatever folder it is written to, on any system.
    pub(super) fn check_path(&self, path: &str) -> Result<()> {
        self.check_name("file", path)?;
        let problem = if path.starts_with('/') {
            "starts with /"
        } else if path.contains('\\') {
            "holds a backslash"
        } else if path.contains(':') {
            "holds a colon"
        } else if path.split('/').any(str::is_empty) {
            "has an empty component"
        } else if path.split('/').any(|part| part == "." || part == "..") {
            "has a component . or .."
        } else {
            return Ok(());
        };
        Err(Error::artifact(format!(
            "the embedded path {path:?} {problem}; only plain relative paths are allowed"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_relative_paths_pass() {
        let limits = Limits::default();
        for good in ["config.json", "onnx/model.json", "a b/ü.txt", "..a/b..", ".hidden"] {
            limits.check_path(good).unwrap();
        }
        let long = "x".repeat(1025);
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "C:/x", "a\\b", "a\nb", &long] {
            assert!(limits.check_path(bad).is_err(), "{bad:?}");
        }
    }
}
