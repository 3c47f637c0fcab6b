//! One error type for the whole crate: what kind it is, where it happened, what to do about it.

use std::fmt;
use std::path::Path;

/// What went wrong, in the coarse sense that decides an exit code and a Python exception class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request itself is wrong: an unknown codec, a bad option, input equal to output.
    Usage,
    /// A model that cannot be read: malformed, incomplete, or holding a value that no codec stores.
    Input,
    /// A `.tenpak` file that is damaged or lies about itself.
    Artifact,
    /// Valid, but from a newer version or of a kind that this build does not know.
    Unsupported,
    /// The operating system refused: missing file, no space, no permission.
    Io,
    /// The caller asked to stop.
    Interrupted,
}

impl Kind {
    /// Every kind, in exit-code order.
    pub const ALL: [Kind; 6] =
        [Kind::Usage, Kind::Input, Kind::Artifact, Kind::Unsupported, Kind::Io, Kind::Interrupted];

    /// The console script's exit code (documented in `tenpak --help`).
    pub const fn exit_code(self) -> i32 {
        match self {
            Kind::Usage => 2,
            Kind::Input => 3,
            Kind::Artifact => 4,
            Kind::Unsupported => 5,
            Kind::Io => 6,
            Kind::Interrupted => 130,
        }
    }
}

/// An error: its kind, and one sentence that names the place and, where there is one, the remedy.
#[derive(Clone, Debug)]
pub struct Error {
    kind: Kind,
    message: String,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error with a complete sentence.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// A wrong request.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// A model that cannot be read.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// A damaged artifact.
    pub fn artifact(message: impl Into<String>) -> Self {
        Self::new(Kind::Artifact, message)
    }

    /// Something this build does not know.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, message)
    }

    /// An operating-system error while doing `what` (for example "cannot open") to `path`.
    pub fn io(what: &str, path: &Path, source: &std::io::Error) -> Self {
        Self::new(Kind::Io, format!("{what} {}: {source}", path.display()))
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same error with a place in front: `place: message`.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
