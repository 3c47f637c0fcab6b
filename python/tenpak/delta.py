"""Deltas: fine-tunes stored as small differences from a base, and restored from it.

A base is a model of any input format or an artifact, or a list that starts with one and goes on with the deltas on it,
the innermost first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tenpak import _core, dtypes
from tenpak.errors import UsageError
from tenpak.models import PathLike, checked_shard_bytes, source_of
from tenpak.progress import Progress
from tenpak.report import Report
from tenpak.threads import checked_threads

#: A model or artifact, or one followed by the deltas on it.
Base = PathLike | Sequence[PathLike]
Mode = Literal["exact", "codes", "bit1"]


@dataclass(frozen=True)
class TensorDelta:
    """What happened to one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    #: `same`, `exact`, `bit1`, `codes`, `keep`, `alias`, or a codec's name for what is quantised afresh.
    method: str
    #: The base's tensor that it is coded against, or the one of the result that it is an alias of.
    base: str | None
    weights: int
    #: Elements (in mode `codes`: codes) that are not as in the base.
    changed: int
    #: ‖new - old‖ / ‖new‖, estimated from a sample.
    relative_change: float | None
    #: Σ(w - ŵ)² / Σw² of what is coded with loss.
    relative_error: float | None
    #: Σ(w - ŵ)² / Σ(w - base)² of what is coded as bit1.
    change_lost: float | None
    #: Groups that were quantised afresh, and all of them, in mode `codes`.
    fresh_groups: int | None
    groups: int | None
    #: Bytes in the delta.
    bytes: int


@dataclass(frozen=True)
class MethodTotals:
    """Tensors that are coded in the same way."""

    method: str
    tensors: int
    weights: int
    changed: int
    bytes: int


@dataclass(frozen=True)
class DeltaReport(Report):
    """What making a delta did."""

    mode: str
    #: Identities in hexadecimal: an artifact's root, or the digest of a model's tensors.
    base: str
    result: str
    #: The delta's own root.
    root: str
    tensors: tuple[TensorDelta, ...]
    #: Totals by method, the largest first.
    methods: tuple[MethodTotals, ...]
    #: Tensors of the base that the result lacks.
    removed: tuple[str, ...]
    #: Files that the delta holds, and those that the result has from the base.
    files: tuple[str, ...]
    files_of_base: tuple[str, ...]
    weights: int
    file_bytes: int
    #: Bytes of the fine-tune's tensors.
    input_bytes: int
    #: Bytes of the delta over those of the tensors.
    ratio: float
    #: Bits of the delta per weight.
    bits_per_weight: float
    #: Σ(w - ŵ)² / Σw² of all that is coded with loss; None where nothing is.
    relative_error: float | None
    #: Σ(w - ŵ)² / Σ(w - base)² of all that is coded as bit1.
    change_lost: float | None
    seconds: float
    #: The fine-tune's bytes over seconds.
    gigabytes_per_second: float


@dataclass(frozen=True)
class MaterializeReport(Report):
    """What materialising did."""

    #: The output's format: `json`, `safetensors`, `folder` or `tenpak`.
    format: str
    #: The result's identity, which has been checked.
    result: str
    #: Deltas that were applied.
    deltas: int
    #: Tensors written, aliases among them.
    tensors: int
    weights: int
    bytes: int
    #: Files that were restored, and those that the output's format has no place for.
    files: tuple[str, ...]
    files_left_out: tuple[str, ...]
    seconds: float
    #: Bytes of tensors over seconds.
    gigabytes_per_second: float


def delta(
    base: Base,
    src: PathLike | Mapping[str, ArrayLike],
    dst: PathLike,
    mode: Mode = "exact",
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DeltaReport:
    """Writes what makes `src` of `base` into one small `.tenpak` file; the same bytes for any number of threads.

    Args:
        base: The model that `src` was made from; for mode `codes` an artifact.
        src: A Hugging Face folder, a `.safetensors`, `.gguf` or JSON bundle file, or a mapping of names to arrays.
        dst: The delta. A failure leaves what was there before, or nothing.
        mode: `exact` restores every bit. `codes` quantises on the base's own scales, offsets and tables, and afresh
            the groups that would lose more than 5 % by that; the result is an artifact. `bit1` keeps one sign an
            element and one scale a row of the difference.
        threads: Threads to use; None for one on each core.
        force: Replace an existing `dst`.
        progress: Called with weights done and in all.

    Raises:
        UsageError: A wrong option, an existing output, a base that fits neither the mode nor the deltas on it.
        InputError: A model is malformed.
        ArtifactError: The base is a damaged artifact.
        StorageError: The file system refused.
    """
    report = json.loads(
        _core.make_delta(_paths(base), source_of(src), os.fspath(dst), mode, checked_threads(threads), force, progress)
    )
    report["tensors"] = tuple(TensorDelta(**{**t, "shape": tuple(t["shape"])}) for t in report["tensors"])
    report["methods"] = tuple(MethodTotals(**m) for m in report["methods"])
    for names in ("removed", "files", "files_of_base"):
        report[names] = tuple(report[names])
    return DeltaReport(**report)


def materialize(
    base: Base,
    delta: Base,
    dst: PathLike,
    *,
    format: Literal["json", "safetensors", "folder", "tenpak"] | None = None,
    threads: int | None = None,
    force: bool = False,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> MaterializeReport:
    """Restores what `delta` makes of `base`, and checks that it is what was put in.

    Args:
        base: The base that the delta was made from.
        delta: The delta, or several, each made from what those before it give.
        dst: `….tenpak` for an artifact (of mode `codes` alone), `….json` for a JSON bundle, `….safetensors` for one
            file, anything else for a Hugging Face folder with config and tokenizer.
        format: To say so where the name does not.
        threads: Threads to use; None for one on each core.
        force: Replace an existing `dst`.
        shard_bytes: The most bytes of weights in one file of a folder.
        progress: Called with weights done and in all.

    Raises:
        UsageError: The base is another than the delta was made from (the text has both digests), deltas that go round
            in a circle, more than 16 of them, a wrong option, an existing output.
        ArtifactError: The delta is damaged, or the result is not what it should be.
        StorageError: The file system refused.
    """
    report = json.loads(
        _core.materialize(
            [*_paths(base), *_paths(delta)],
            os.fspath(dst),
            format,
            checked_threads(threads),
            force,
            checked_shard_bytes(shard_bytes),
            progress,
        )
    )
    report["files"], report["files_left_out"] = tuple(report["files"]), tuple(report["files_left_out"])
    return MaterializeReport(**report)


@dataclass(frozen=True)
class RestoredTensor:
    """What a base with deltas on it gives under one name."""

    name: str
    shape: tuple[int, ...]
    #: Element type, as safetensors names it.
    dtype: str

    @property
    def weights(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


class DeltaFile:
    """A base with deltas on it: tensors are restored one at a time, when they are read.

    A tensor is compared with its digest, and so is the base's that it comes from; nothing else of the base is read.
    """

    def __init__(self, paths: Iterable[PathLike]) -> None:
        self.paths = [os.fspath(path) for path in paths]
        core = _core.DeltaModel(self.paths)
        self._core: _core.DeltaModel | None = core
        #: The identity of what comes out: an artifact's root, or the digest of a model's tensors.
        self.result: str = core.identity()
        #: What can be read, by name.
        self.tensors: dict[str, RestoredTensor] = {
            name: RestoredTensor(name, tuple(shape), dtype) for name, shape, dtype in core.tensors()
        }

    @property
    def names(self) -> list[str]:
        """Every name that can be read, aliases last."""
        return list(self.tensors)

    @property
    def files(self) -> list[str]:
        """Names of the files that come with the result."""
        return [path for path, _ in self._open().files()]

    def read(self, name: str, dtype: DTypeLike | None = None, *, threads: int | None = None) -> NDArray[Any]:
        """Restores one tensor.

        Args:
            name: A tensor's name, or an alias.
            dtype: float32 or float16 for weights; None for its own (float32 where that is bfloat16).
            threads: Threads to use; None for one on each core.

        Raises:
            UsageError: There is no such tensor, it cannot have that dtype, or the base is not the right one.
            ArtifactError: The delta is damaged.
        """
        info = self._info(name)
        wanted = dtypes.readable(info.dtype) if dtype is None else dtypes.name_of(dtype)
        if wanted != info.dtype and not {wanted, info.dtype} <= set(dtypes.WEIGHTS):
            raise UsageError(f"tensor {name!r} is {info.dtype}, which cannot be read as {wanted}")
        if wanted == "BF16":
            raise UsageError("NumPy has no bfloat16; read as float32 and convert")
        out = self.read_stored(name, threads=threads)
        if info.dtype == "BF16":
            out = (out.astype(np.uint32) << 16).view(np.float32)
        return out.astype(dtypes.stored(wanted), copy=False)

    def read_stored(self, name: str, *, threads: int | None = None) -> NDArray[Any]:
        """As `read`, bit for bit: bfloat16 and 8-bit floats, which NumPy lacks, as unsigned integers."""
        info = self._info(name)
        out = np.empty(info.shape, dtypes.stored(info.dtype))
        self._open().read(name, checked_threads(threads), out.reshape(-1).view(np.uint8))
        return out

    def file(self, path: str) -> bytes:
        """A file that comes with the result."""
        files = dict(self._open().files())
        if path not in files:
            raise UsageError(f"no file {path!r} comes with it; there are {', '.join(files) or 'none'}")
        return files[path]

    def close(self) -> None:
        """Lets go of all files."""
        self._core = None

    def _info(self, name: str) -> RestoredTensor:
        if name not in self.tensors:
            raise UsageError(f"there is no tensor {name!r} in {self.paths[-1]}")
        return self.tensors[name]

    def _open(self) -> _core.DeltaModel:
        if self._core is None:
            raise UsageError(f"{self.paths[-1]} has been closed")
        return self._core

    def __enter__(self) -> DeltaFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"DeltaFile({self.paths!r}, tensors={len(self.tensors)})"


def _paths(base: Base) -> list[str]:
    return [os.fspath(base)] if isinstance(base, str | os.PathLike) else [os.fspath(path) for path in base]
