"""What writers of a file ask before their work, and what they leave if it fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tenpak.errors import UsageError

#: What is in files that Tenpak writes into a model's folder, and no model is: an artifact's magic, and statistics' key.
_OURS = (b"\x89TPK", b"tenpak.calibration")


def refuse_existing(output: str | os.PathLike[str], force: bool, *inputs: object) -> None:
    """Raises a UsageError where an output exists and may not be replaced: before what takes minutes.

    Of `inputs` those that are paths are what the output is made from: neither they nor files of a model's folder are
    replaced, whatever `force` says.
    """
    if not os.path.lexists(output):
        return
    if not force:
        raise UsageError(f"output {os.fspath(output)} exists; choose another, or replace it with --force")
    for given in inputs:
        if isinstance(given, str | os.PathLike) and _is_part_of(Path(output), Path(given)):
            raise UsageError(f"output {os.fspath(output)} is the input {os.fspath(given)}; choose another output")


def _is_part_of(output: Path, given: Path) -> bool:
    """Whether a file is an input, is in a model's folder, or lies beside a weight file as its config does."""
    try:
        if output.samefile(given):
            return True
        beside = output.resolve().parent.samefile(given if given.is_dir() else given.resolve().parent)
        config = given.is_file() and given.suffix != ".tenpak" and output.suffix == ".json"
        if not beside or not output.is_file() or not (given.is_dir() or config):
            return False
        with output.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    return not any(mark in head for mark in _OURS)


def working_name(path: str | os.PathLike[str], what: str) -> str:
    """A hidden name of this process in the folder of a path, for what becomes of it; names may have 255 bytes."""
    folder, name = os.path.split(os.fspath(path))
    return os.path.join(folder, f".{os.fsdecode(os.fsencode(name)[:200])}.{os.getpid()}.{what}")


@contextlib.contextmanager
def put_back(output: str | os.PathLike[str]) -> Iterator[None]:
    """For work that writes `output` more than once: if it fails, what was there is there again, or nothing.

    Meanwhile that has a second name, `.OUTPUT.PID.before`. A file system without hard links cannot give it one: there a
    failure leaves what was written last. Links are followed, as writers do.
    """
    output = os.path.realpath(output)
    before, existed = working_name(output, "before"), os.path.lexists(output)
    if existed:
        with contextlib.suppress(OSError):
            os.link(output, before)
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
