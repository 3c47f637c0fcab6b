"""What every writer of a file asks before its work."""

from __future__ import annotations

import os

from tenpak.errors import UsageError


def refuse_existing(output: str | os.PathLike[str], force: bool) -> None:
    """Raises a UsageError where an output exists and may not be replaced: before what takes minutes."""
    if os.path.lexists(output) and not force:
        raise UsageError(f"output {os.fspath(output)} exists; choose another, or replace it with --force")
