"""What writers of a file ask before their work, and what they leave if it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tenpak.errors import UsageError


def refuse_existing(output: str | os.PathLike[str], force: bool) -> None:
    """Raises a UsageError where an output exists and may not be replaced: before what takes minutes."""
    if os.path.lexists(output) and not force:
        raise UsageError(f"output {os.fspath(output)} exists; choose another, or replace it with --force")


@contextlib.contextmanager
def put_back(output: str | os.PathLike[str]) -> Iterator[None]:
    """For work that writes `output` more than once: if it fails, what was there is there again, or nothing.

    Meanwhile that has a second name, `OUTPUT.PID.before`. A file system without hard links cannot give it one: there a
    failure leaves what was written last.
    """
    before, existed = f"{os.fspath(output)}.{os.getpid()}.before", os.path.lexists(output)
    if existed:
        with contextlib.suppress(OSError):
            # A link itself, and not what it points to, where the system tells them apart.
            os.link(output, before, follow_symlinks=os.link not in os.supports_follow_symlinks)
    try:
        yield
    except BaseException:
        if os.path.lexists(before):
            os.replace(before, output)
        elif not existed:
            _unlink(output)
        raise
    finally:
        # Two names of the same file are not replaced by each other.
        _unlink(before)


def _unlink(path: str | os.PathLike[str]) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
