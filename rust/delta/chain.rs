//! A base and the deltas on it, opened in order: each must name what comes before it.

use super::Mode;
use super::apply::{Applied, Trust};
use super::stored::{Decoded, Stored};
use crate::artifact::ArtifactFile;
use crate::error::{Error, Result};
use crate::input::{self, Model};
use crate::pipeline::hex;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The most deltas on one base.
pub const MAX_DEPTH: usize = 16;

/// What a chain gives.
pub enum Content {
    /// A model of floats.
    Model(Box<dyn Model>),
    /// A quantised model.
    Stored(Box<dyn Stored>),
}

/// A base with deltas on it.
pub struct Chain {
    /// What comes out.
    pub content: Content,
    /// Its identity: an artifact's root, or the digest of a model's tensors; None where nobody needed it yet.
    pub identity: Option<[u8; 32]>,
    /// How many deltas there are.
    pub depth: usize,
    /// The digests of a model's tensors, where they had to be computed for its identity.
    digests: Option<Vec<[u8; 32]>>,
}

impl Content {
    /// As floats.
    ///
    /// # Errors
    /// As [`Decoded::new`].
    pub fn into_model(self) -> Result<Box<dyn Model>> {
        Ok(match self {
            Content::Model(model) => model,
            Content::Stored(stored) => Box::new(Decoded::new(stored)?),
        })
    }

    /// Every file that is read.
    pub fn paths(&self) -> Vec<std::path::PathBuf> {
        match self {
            Content::Model(model) => model.paths(),
            Content::Stored(stored) => stored.paths(),
        }
    }
}

/// Opens a base, `paths[0]`, and the deltas on it, the innermost first.
///
/// With `Trust::Base` the base is compared with what the first delta names, whole; with `Trust::Nothing` only what
/// costs no time is, and tensors when they are read.
///
/// # Errors
/// A usage error for a delta that was made from another base, naming both digests, for a cycle, and for more than
/// [`MAX_DEPTH`] deltas; whatever is wrong with a file.
pub fn open(paths: &[impl AsRef<Path>], trust: Trust) -> Result<Chain> {
    let Some((base, deltas)) = paths.split_first() else {
        return Err(Error::usage("a delta needs a base; give one"));
    };
    if deltas.len() > MAX_DEPTH {
        return Err(Error::usage(format!(
            "{} deltas on one base; at most {MAX_DEPTH} are allowed: materialise some, and continue from the result",
            deltas.len()
        )));
    }
    let mut chain = open_base(base.as_ref())?;
    if trust == Trust::Base && !deltas.is_empty() {
        chain.identify()?;
    }
    let mut seen: Vec<[u8; 32]> = chain.identity.into_iter().collect();
    for path in deltas {
        chain = chain.push(path.as_ref(), trust, &mut seen)?;
    }
    Ok(chain)
}

fn open_base(path: &Path) -> Result<Chain> {
    if !is_artifact(path) {
        return Ok(Chain {
            content: Content::Model(input::open(path)?),
            identity: None,
            depth: 0,
            digests: None,
        });
    }
    let file = ArtifactFile::open(path)?;
    if let Some(delta) = file.delta() {
        return Err(Error::usage(format!(
            "{} is a delta and no base: give its own base ({}) first, and then it",
            path.display(),
            hex(&delta.base)
        )));
    }
    let identity = Some(file.root());
    Ok(Chain { content: Content::Stored(Box::new(file)), identity, depth: 0, digests: None })
}

/// Whether a file starts as an artifact does.
pub fn is_artifact(path: &Path) -> bool {
    let mut head = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && crate::artifact::MAGIC.starts_with(&head)
}

impl Chain {
    /// Its identity, which for a model of floats takes reading all of it.
    ///
    /// # Errors
    /// An input error if a file has changed since it was opened.
    pub fn identify(&mut self) -> Result<[u8; 32]> {
        let identity = match (&self.identity, &self.content) {
            (Some(known), _) => *known,
            (None, Content::Model(model)) => {
                let digests = input::digests(&**model)?;
                let identity = input::digest_of(model.tensors(), &digests);
                self.digests = Some(digests);
                identity
            }
            (None, Content::Stored(stored)) => stored.root(),
        };
        self.identity = Some(identity);
        Ok(identity)
    }

    fn push(self, path: &Path, trust: Trust, seen: &mut Vec<[u8; 32]>) -> Result<Chain> {
        let file = ArtifactFile::open(path)?;
        let at = |e: Error| e.at(path.display());
        let Some(delta) = file.delta().cloned() else {
            return Err(at(Error::usage("this is no delta; give the base first, then the deltas on it")));
        };
        if let Some(found) = self.identity.filter(|found| *found != delta.base) {
            return Err(at(Error::usage(format!(
                "the delta was made from {}, and the base given is {}; give the base that it was made from",
                hex(&delta.base),
                hex(&found)
            ))));
        }
        if !seen.contains(&delta.base) {
            seen.push(delta.base);
        }
        // One that changes files alone comes back to where it started, and does no harm.
        if delta.result != delta.base && seen.contains(&delta.result) {
            return Err(at(Error::usage(format!(
                "the deltas go round in a circle: this one leads back to {}; leave out those that cancel out",
                hex(&delta.result)
            ))));
        }
        seen.push(delta.result);
        // What a delta gives is compared with its own digests, so that those on top of it can rely on it.
        let trust = if self.depth > 0 { Trust::Base } else { trust };
        let content = match Mode::from_name(&delta.mode).map_err(at)? {
            Mode::Exact | Mode::Bit1 => {
                Content::Model(Box::new(Applied::new(file, self.content.into_model()?, self.digests, trust)?))
            }
            Mode::Codes => match self.content {
                Content::Stored(base) => Content::Stored(Box::new(super::recoded::Recoded::new(file, base)?)),
                Content::Model(_) => {
                    return Err(at(Error::usage(
                        "the delta is one of codes: its base is a .tenpak file, and no model of floats",
                    )));
                }
            },
        };
        Ok(Chain { content, identity: Some(delta.result), depth: self.depth + 1, digests: None })
    }
}
