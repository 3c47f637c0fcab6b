//! Deltas: models as small differences from a base, and the way back.
//!
//! - [`make`] codes a model against a base: [`exact`]ly, with one sign an element ([`bit1`]), or, where the base is
//!   quantised, on the base's own grid ([`codes`]).
//! - [`chain`] opens a base with deltas on it: a model ([`apply`]) or a quantised one ([`recoded`]).
//! - [`materialize`] writes that down.
//!
//! A delta is an artifact with a bit in its header: docs/delta.md specifies what its entries hold.

mod apply;
pub mod bit1;
mod bits;
mod chain;
pub mod codes;
mod entry;
pub mod exact;
mod expected;
mod make;
mod make_codes;
mod materialize;
mod plane;
mod prefix;
mod rans;
mod recoded;
mod report;
mod scaled;
mod stored;
mod word;

pub use apply::Trust;
pub use chain::{Chain, Content, MAX_DEPTH, open};
pub use entry::Method;
pub use exact::chunk_kinds;
pub use make::{Options, delta};
pub use materialize::{MaterializeOptions, materialize};
pub use report::{DeltaReport, MaterializeReport, MethodReport, TensorReport};
pub use stored::Stored;

use crate::error::{Error, Result};

/// How differences are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Without loss, against any model.
    Exact,
    /// As codes on the grid of a quantised base.
    Codes,
    /// As one sign an element and one scale a row.
    Bit1,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Mode; 3] = [Mode::Exact, Mode::Codes, Mode::Bit1];

    /// The name in options and in the index.
    pub const fn name(self) -> &'static str {
        match self {
            Mode::Exact => "exact",
            Mode::Codes => "codes",
            Mode::Bit1 => "bit1",
        }
    }

    /// The mode of that name.
    ///
    /// # Errors
    /// An unsupported error that lists the names.
    pub fn from_name(name: &str) -> Result<Mode> {
        Self::ALL.into_iter().find(|m| m.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Mode::name).join(", ");
            Error::unsupported(format!("mode {name:?} is not known; this tenpak knows {names}"))
        })
    }
}
