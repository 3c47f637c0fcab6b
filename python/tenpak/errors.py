"""Exceptions, all under `TenpakError`; the extension raises them by name."""

from __future__ import annotations


class TenpakError(Exception):
    """Anything that Tenpak refuses or fails to do; its text is one sentence with the place and the remedy."""


class UsageError(TenpakError, ValueError):
    """The request itself is wrong: an unknown codec, a bad option, an output that exists or is the input."""


class InputError(TenpakError):
    """A model that cannot be read: malformed, incomplete, or holding a value that no codec stores."""


class ArtifactError(TenpakError):
    """A `.tenpak` file that is damaged or contradicts itself."""


class UnsupportedError(TenpakError):
    """Valid, but from a newer version or of a kind that this build does not know."""


class StorageError(TenpakError, OSError):
    """The operating system refused: no such file, no space, no permission."""


class InterruptedByUser(TenpakError):
    """The work was asked to stop; what it would have written is not there."""
