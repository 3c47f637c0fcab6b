//! The `.tenpak` file: written in one pass, read with every byte checked. docs/format.md is its specification.

mod header;
mod index;
mod limits;
mod near;
mod reader;
mod verify;
mod writer;

pub use header::{ALIGN, VERSION};
pub use index::{Entry, PartRef, SidecarRef};
pub use limits::Limits;
pub use reader::ArtifactFile;
pub use verify::VerifyReport;
pub use writer::{Finished, NewEntry, Writer};

/// The codec name of a tensor that is stored as it was, in one part named `data`.
pub const KEEP: &str = "keep";
