//! Tenpak's core: codecs that shrink weights, the artifact that holds them, the inputs and outputs around it.
//!
//! The layers, each knowing only those above it in this list:
//!
//! - [`error`]: one error type, with a kind and a place.
//! - [`tensor`]: dtypes, and a tensor's bytes seen as rows along its input dimension.
//! - [`codec`]: the table of codecs; each knows rows of floats, never files or threads.
//! - [`runner`]: one tensor through one codec, on many threads.
//! - [`atomic`]: files that appear whole or not at all.
//! - [`pieces`]: BLAKE3 of bytes in pieces.
//! - [`artifact`]: the `.tenpak` file, written in one pass and read with every byte checked.
//! - [`input`] and [`output`]: the model formats around it.
//! - [`calibration`]: statistics of layers' inputs, which some encoders heed.
//! - [`estimate`]: the same estimated from the weights alone, where there are no statistics.
//! - [`plan`] and [`pipeline`]: which tensor gets which codec, and a whole model through all of the above.
//! - [`delta`]: models as differences from a base, and back.
//! - [`wgpu_gemm`]: products with quantised weights on any GPU (feature `gpu`); it knows only [`codec`].

pub mod artifact;
pub mod atomic;
pub mod calibration;
pub mod codec;
pub mod delta;
pub mod error;
pub mod estimate;
pub mod input;
pub mod output;
pub mod pieces;
pub mod pipeline;
pub mod plan;
#[cfg(feature = "python")]
mod python;
pub mod runner;
pub mod tensor;
pub mod wgpu_gemm;

pub use artifact::ArtifactFile;
pub use error::{Error, Kind, Result};
