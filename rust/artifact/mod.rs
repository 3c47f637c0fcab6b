//! The `.tenpak` file: written in one pass, read with every byte checked. docs/format.md is its specification.

mod checksums;
mod header;
mod index;
mod limits;
mod near;
mod reader;
mod replaced;
mod size;
mod verify;
mod writer;

pub use header::{ALIGN, MAGIC, VERSION};
pub use index::{DeltaRef, Entry, HexDigest, PartRef, SidecarRef};
pub use limits::Limits;
pub use reader::ArtifactFile;
pub(crate) use reader::convert;
pub use replaced::{Parts, replaced};
pub use size::file_len;
pub use verify::VerifyReport;
pub use writer::{Finished, NewEntry, Writer};

/// The codec name of a tensor that is stored as it was, in one part named `data`.
pub const KEEP: &str = "keep";

/// What this build writes as the index's `writer`.
pub const WRITER: &str = concat!("tenpak ", env!("CARGO_PKG_VERSION"));
