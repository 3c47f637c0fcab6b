//! Quantised models as they are stored, whether in one artifact or as an artifact with deltas on it.

use crate::artifact::{ArtifactFile, Entry};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::input::{Model, Sidecar, TensorInfo};
use crate::pipeline::named;
use crate::runner;
use crate::tensor::{Encoding, Tensor};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// A quantised model: its entries, and the bytes of their parts.
pub trait Stored: Send + Sync {
    /// The artifact's root, written or not.
    fn root(&self) -> [u8; 32];

    /// The codec that was asked for, and the program that wrote it.
    fn about(&self) -> (&str, &str);

    /// The tensors; places and checksums of parts are not to be relied on.
    fn entries(&self) -> &[Entry];

    /// Bytes of every part of tensor `index`, in the order of its layout.
    ///
    /// # Errors
    /// An artifact error for damage.
    fn parts(&self, index: usize) -> Result<Vec<Cow<'_, [u8]>>>;

    /// Second names of tensors.
    fn aliases(&self) -> &BTreeMap<String, String>;

    /// The embedded files, in their order.
    ///
    /// # Errors
    /// An artifact error for damage.
    fn files(&self) -> Result<Vec<Sidecar>>;

    /// Every file that is read.
    fn paths(&self) -> Vec<PathBuf>;
}

impl Stored for ArtifactFile {
    fn root(&self) -> [u8; 32] {
        self.root()
    }

    fn about(&self) -> (&str, &str) {
        (self.codec(), self.writer())
    }

    fn entries(&self) -> &[Entry] {
        self.tensors()
    }

    fn parts(&self, index: usize) -> Result<Vec<Cow<'_, [u8]>>> {
        let parts = self.entry_parts(&self.tensors()[index])?;
        Ok(parts.into_iter().map(Cow::Borrowed).collect())
    }

    fn aliases(&self) -> &BTreeMap<String, String> {
        self.aliases()
    }

    fn files(&self) -> Result<Vec<Sidecar>> {
        let file = |f: &crate::artifact::SidecarRef| {
            let bytes = self.checked_part(&f.part, &f.path)?.to_vec();
            Ok(Sidecar { path: f.path.clone(), bytes })
        };
        self.files().iter().map(file).collect()
    }

    fn paths(&self) -> Vec<PathBuf> {
        vec![self.path().to_owned()]
    }
}

/// The codec of an entry that is not kept.
///
/// # Errors
/// An unsupported error for one from a newer version.
pub fn codec(entry: &Entry) -> Result<&'static Codec> {
    entry.known_codec().ok_or_else(|| {
        Error::unsupported(format!(
            "codec {:?}, version {}, needs a newer tenpak",
            entry.codec, entry.codec_version
        ))
    })
}

/// A quantised model as floats: every tensor in its source's dtype.
pub struct Decoded {
    stored: Box<dyn Stored>,
    infos: Vec<TensorInfo>,
    /// The entry of each tensor; aliases come last.
    entries: Vec<usize>,
}

impl Decoded {
    /// Around a quantised model.
    ///
    /// # Errors
    /// An unsupported error for shapes that are too large for this machine.
    pub fn new(stored: Box<dyn Stored>) -> Result<Decoded> {
        let places: HashMap<&str, usize> =
            stored.entries().iter().enumerate().map(|(i, e)| (e.name.as_str(), i)).collect();
        let own = stored.entries().iter().enumerate().map(|(i, e)| (&e.name, i));
        let aliases = stored.aliases().iter().map(|(name, of)| (name, places[of.as_str()]));
        let (mut infos, mut entries) = (Vec::new(), Vec::new());
        for (name, i) in own.chain(aliases) {
            let entry = &stored.entries()[i];
            let shape = entry.extents().map_err(|e| named(e, name))?;
            infos.push(TensorInfo { name: name.clone(), shape, encoding: Encoding::Plain(entry.dtype) });
            entries.push(i);
        }
        Ok(Decoded { stored, infos, entries })
    }
}

impl Model for Decoded {
    fn format(&self) -> &'static str {
        "tenpak"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let TensorInfo { name, shape, encoding } = &self.infos[index];
        let entry = &self.stored.entries()[self.entries[index]];
        let mut parts = self.stored.parts(self.entries[index])?;
        let bytes = if entry.is_kept() {
            parts.swap_remove(0)
        } else {
            let mut out = runner::zeroed(shape.iter().product::<usize>() * entry.dtype.size());
            let parts: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
            let axis = entry.axis as usize;
            codec(entry)
                .and_then(|codec| {
                    runner::decode(codec, entry.exponent(), shape, axis, &parts, entry.dtype, &mut out)
                })
                .map_err(|e| named(e, name))?;
            Cow::Owned(out)
        };
        Ok(Tensor { shape: shape.clone(), encoding: *encoding, bytes })
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        self.stored.files()
    }

    fn paths(&self) -> Vec<PathBuf> {
        self.stored.paths()
    }
}
