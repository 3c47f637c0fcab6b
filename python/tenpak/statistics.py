"""The file of statistics that calibrated encoders read: one safetensors file, written input by input.

An input NAME has `NAME.diagonal` ([in], E[x_j²]) and, unless only diagonals are wanted, `NAME.second_moment`
([in, in], E[x xᵀ]), both FP32; a weight NAME.weight may have `NAME.output_moment` ([out, out], E[g gᵀ] of the gradients
at its layer's outputs). `tokens` ([windows, context], I32) are some of the text, for norms. The metadata key
`tenpak.calibration` holds JSON that says which weights read which input, how many tokens and gradients were seen, and
of which model and text.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tenpak.errors import InputError, StorageError, UsageError
from tenpak.outputs import refuse_existing, working_name

KEY = "tenpak.calibration"
VERSION = 1

_TOKENS = "tokens"


def _header(file: BinaryIO) -> dict[str, Any]:
    """A safetensors file's header, after which its data begin; a ValueError where there is none."""
    length = int.from_bytes(file.read(8), "little")
    if length > os.fstat(file.fileno()).st_size:
        raise ValueError("the header is longer than the file")
    header: dict[str, Any] = json.loads(file.read(length))
    return header


def sequential_of(path: str | os.PathLike[str]) -> str | None:
    """The codec under which layers before were quantised, or None; also of what is no statistics: the core says so."""
    try:
        with open(path, "rb") as file:
            found = json.loads(_header(file)["__metadata__"][KEY])["sequential"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def tokens_of(path: str | os.PathLike[str]) -> NDArray[np.int32] | None:
    """The windows of text in statistics, [windows, context], or None; the core must have read the file before.

    Raises:
        InputError: They are no tokens.
    """
    with open(path, "rb") as file:
        header = _header(file)
        if (info := header.get(_TOKENS)) is None:
            return None
        shape, start = info["shape"], file.tell() + info["data_offsets"][0]
        if info["dtype"] != "I32" or len(shape) != 2 or 0 in shape:
            raise InputError(f"statistics {os.fspath(path)}: tensor {_TOKENS!r} holds no windows; gather them again")
        file.seek(start)
        return np.frombuffer(file.read(4 * shape[0] * shape[1]), "<i4").reshape(shape)


class StatisticsWriter:
    """Writes inputs as they come, so that one at a time is in memory; the file appears whole, or not at all.

    safetensors has its header in front, and what stands there is known only at the end: data goes to a file beside
    the target first.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        refuse_existing(path, force)
        # Where a link points to, as for other outputs.
        self.path = Path(os.path.realpath(path))
        self._tensors: dict[str, dict[str, Any]] = {}
        self._inputs: dict[str, dict[str, Any]] = {}
        self._end = 0
        self._data: BinaryIO | None = None
        try:
            self._data = self._part("data").open("wb")
        except OSError as error:
            raise self._storage_error(error) from error

    def add(
        self,
        weights: Iterable[str],
        tokens: int,
        diagonal: NDArray[np.float32],
        second_moment: NDArray[np.float32] | None,
        output_moments: Mapping[str, NDArray[np.float32]] | None = None,
        output_tokens: int = 0,
    ) -> None:
        """Adds the statistics of one input.

        Args:
            weights: Names of the weights that read it.
            tokens: How many tokens were seen.
            diagonal: E[x_j²], [in].
            second_moment: E[x xᵀ], [in, in], or None.
            output_moments: E[g gᵀ] by the weight's name, [out, out].
            output_tokens: How many tokens these are of.
        """
        names = list(weights)
        name = names[0].removesuffix(".weight")
        self._inputs[name] = {"tokens": int(tokens), "weights": names}
        if output_moments:
            self._inputs[name]["output_tokens"] = int(output_tokens)
        self._append(f"{name}.diagonal", diagonal)
        if second_moment is not None:
            self._append(f"{name}.second_moment", second_moment)
        for weight, moment in (output_moments or {}).items():
            self._append(f"{weight.removesuffix('.weight')}.output_moment", moment)

    def add_tokens(self, tokens: NDArray[np.integer[Any]]) -> None:
        """Adds some windows of the text, [windows, context]."""
        self._append(_TOKENS, tokens, "I32")

    def finish(self, about: dict[str, Any]) -> None:
        """Writes the header, with `about` beside the inputs, and puts the file in its place."""
        if self._data is None:
            raise UsageError("the statistics are already written")
        # One key with sorted JSON: files with several keys would differ from run to run.
        text = json.dumps({"version": VERSION, "inputs": self._inputs, **about}, sort_keys=True)
        header = json.dumps({"__metadata__": {KEY: text}, **self._tensors}).encode()
        header += b" " * (-len(header) % 8)
        whole = self._part("whole")
        try:
            self._data.close()
            self._data = None
            with whole.open("wb") as file, self._part("data").open("rb") as data:
                file.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(data, file, 1 << 24)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                # As other outputs, which keep what they replace as private as it was.
                shutil.copymode(self.path, whole)
            whole.replace(self.path)
        except OSError as error:
            raise self._storage_error(error) from error
        finally:
            self._clean()

    def _append(self, name: str, array: NDArray[Any], dtype: Literal["F32", "I32"] = "F32") -> None:
        if self._data is None:
            raise UsageError("the statistics are already written")
        try:
            self._data.write(
                np.ascontiguousarray(array, {"F32": "<f4", "I32": "<i4"}[dtype]).reshape(-1).view(np.uint8).data
            )
        except OSError as error:
            raise self._storage_error(error) from error
        end = self._end + 4 * array.size
        self._tensors[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [self._end, end]}
        self._end = end

    def _part(self, what: str) -> Path:
        return Path(working_name(self.path, what))

    def _clean(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None
        for what in ("data", "whole"):
            self._part(what).unlink(missing_ok=True)

    def _storage_error(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write {self.path}: {error.strerror or error}")

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()
