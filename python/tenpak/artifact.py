"""Open artifacts: what they hold, random access to tensors, zero-copy views of what is stored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tenpak import _core, dtypes
from tenpak.errors import UsageError
from tenpak.threads import checked_threads

if TYPE_CHECKING:
    from tenpak.delta import DeltaFile

#: The codec of a tensor that is stored as it was.
KEEP = "keep"


@dataclass(frozen=True)
class Part:
    """One stored array of a tensor."""

    name: str
    #: Element type, as safetensors names it.
    dtype: str
    #: `[rows, elements per row]`, or the tensor's own shape where it was kept.
    shape: tuple[int, ...]
    #: Place in the file, in bytes.
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorInfo:
    """What an artifact says of one tensor."""

    name: str
    shape: tuple[int, ...]
    #: The source's element type, as safetensors names it.
    dtype: str
    #: The codec's name; `keep` for a tensor that is stored as it was.
    codec: str
    codec_version: int
    #: The input dimension, along which groups run.
    axis: int
    #: Rebuilt weights are multiplied by two to this power.
    exponent: int
    parts: tuple[Part, ...]
    #: Whether this build can rebuild it.
    known: bool
    #: The codec's own parameters; in a delta, what a tensor comes from and what must come out.
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over elements; 0 for an empty tensor."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says of itself; identities are an artifact's root or the digest of a model's tensors."""

    #: `exact`, `codes` or `bit1`.
    mode: str
    base: str
    result: str
    #: Tensors of the base that the result lacks.
    removed: tuple[str, ...]
    #: Files that the result has from the base, and their BLAKE3.
    files: dict[str, str]


class ArtifactFile:
    """An open `.tenpak` file, mapped into memory: tensors are read one at a time, when they are asked for.

    Its frames, index and sizes are checked when it is opened, a tensor's checksum when it is read, and every byte
    by `verify`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._core: _core.ArtifactFile | None = _core.ArtifactFile(self.path)
        index = json.loads(self._core.index())
        #: The format's version.
        self.version: int = index["version"]
        #: The codec that was asked for; single tensors may have others.
        self.codec: str = index["codec"]
        #: The program that wrote it.
        self.writer: str = index["writer"]
        #: The artifact's identity: BLAKE3 of its index, in hexadecimal.
        self.root: str = index["root"]
        self.nbytes: int = index["file_len"]
        #: Names that stand for another tensor.
        self.aliases: dict[str, str] = index["aliases"]
        #: What is stored, by name, in the file's order.
        self.tensors: dict[str, TensorInfo] = {t["name"]: _tensor(t) for t in index["tensors"]}
        #: Where this is a delta: what from, and what to.
        self.delta: DeltaInfo | None = None
        if (delta := index["delta"]) is not None:
            self.delta = DeltaInfo(**{**delta, "removed": tuple(delta["removed"])})
        self._files = {f["path"]: f["at"] for f in index["files"]}

    @property
    def names(self) -> list[str]:
        """Every name that can be read, aliases last."""
        return [*self.tensors, *self.aliases]

    @property
    def infos(self) -> list[TensorInfo]:
        """What is stored, in the file's order."""
        return list(self.tensors.values())

    @property
    def files(self) -> list[str]:
        """Names of the embedded files."""
        return list(self._files)

    def info(self, name: str) -> TensorInfo:
        """What is stored under a name or an alias; `UsageError` suggests names like it."""
        return self.tensors[self._open().resolve(name)]

    def read(self, name: str, dtype: DTypeLike | None = None, *, threads: int | None = None) -> NDArray[Any]:
        """Rebuilds one tensor, after checking its bytes.

        Args:
            name: A tensor's name, or an alias.
            dtype: float32 or float16 for weights; None for the source's (float32 where that was bfloat16).
            threads: Threads to use; None for one on each core.

        Raises:
            UsageError: There is no such tensor, or it cannot have that dtype.
            ArtifactError: The file is damaged.
            UnsupportedError: The codec is from a newer version.
        """
        info = self.info(name)
        wanted = dtypes.readable(info.dtype) if dtype is None else dtypes.name_of(dtype)
        if wanted == "BF16":
            raise UsageError("NumPy has no bfloat16; read as float32 and convert")
        out = np.empty(info.shape, dtypes.stored(wanted))
        self._open().decode(info.name, wanted, checked_threads(threads), out.reshape(-1).view(np.uint8))
        return out

    def parts(self, name: str) -> dict[str, NDArray[Any]]:
        """Read-only views of what is stored for a tensor, without a copy; their checksums are checked.

        They keep the file mapped, also after `close`.
        """
        info, core, data = self.info(name), self._open(), self._bytes()
        views = {}
        for part in info.parts:
            core.check(info.name, part.name)
            kind = dtypes.stored(part.dtype)
            count = part.nbytes // kind.itemsize
            views[part.name] = np.frombuffer(data, kind, count, part.offset).reshape(part.shape)
        return views

    def quantised(self, name: str) -> tuple[str, dict[str, NDArray[Any]], tuple[int, ...], int, int]:
        """Codec, parts, shape, axis and exponent of a tensor, as `from_parts` of weights in GPU memory takes them.

        Raises:
            UsageError: There is no such tensor, or it was kept as it was.
            ArtifactError: The file is damaged.
        """
        info = self.info(name)
        if info.codec == KEEP:
            raise UsageError(f"{name} is kept as {info.dtype}, not quantised; use artifact.read({name!r})")
        return info.codec, self.parts(name), info.shape, info.axis, info.exponent

    def file(self, path: str) -> bytes:
        """An embedded file, after checking its bytes."""
        if path not in self._files:
            raise UsageError(f"no file {path!r} is embedded; there are {', '.join(self._files) or 'none'}")
        at = self._files[path]
        self._open().check(path, None)
        return self._bytes()[at["off"] : at["off"] + at["len"]].tobytes()

    def chunk_kinds(self, name: str) -> list[tuple[str, int, int]]:
        """In a delta: the ways in which a tensor's chunks are coded exactly, how many in each, and their bytes."""
        return self._open().chunk_kinds(name)

    def verify(self, progress: Callable[[int, int], object] | None = None) -> int:
        """Checks every byte of the file and returns their number; `ArtifactError` names the first damage.

        `progress` is called with bytes done and in all.
        """
        return self._open().verify(progress)[3]

    def close(self) -> None:
        """Lets go of the file; views of its parts keep it mapped."""
        self._core = None

    def _open(self) -> _core.ArtifactFile:
        if self._core is None:
            raise UsageError(f"{self.path} has been closed")
        return self._core

    def _bytes(self) -> memoryview:
        # The extension's type is a buffer, which its stub can say only from Python 3.12 on.
        return memoryview(cast(Any, self._open()))

    def __enter__(self) -> ArtifactFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.tensors) + len(self.aliases)

    def __repr__(self) -> str:
        return f"ArtifactFile({self.path!r}, codec={self.codec!r}, tensors={len(self.tensors)}, nbytes={self.nbytes})"


@overload
def open(path: str | os.PathLike[str]) -> ArtifactFile: ...
@overload
def open(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
) -> DeltaFile: ...
def open(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None
) -> ArtifactFile | DeltaFile:
    """Opens an artifact.

    Args:
        path: A `.tenpak` file.
        base: Where that is a delta: its base, or a list of a base and the deltas on it. What comes back then reads
            tensors of the result, one at a time.

    Raises:
        UsageError: `path` is a delta of another base, or none.
        StorageError: It cannot be read.
        ArtifactError: It is damaged; the text says what is.
        UnsupportedError: It is from a newer version.
    """
    if base is None:
        return ArtifactFile(path)
    from tenpak.delta import DeltaFile

    return DeltaFile([*([base] if isinstance(base, str | os.PathLike) else base), path])


def _tensor(entry: dict[str, Any]) -> TensorInfo:
    parts = tuple(
        Part(p["name"], p["dtype"], tuple(p["shape"]), p["at"]["off"], p["at"]["len"]) for p in entry["parts"]
    )
    return TensorInfo(
        name=entry["name"],
        shape=tuple(entry["shape"]),
        dtype=entry["dtype"],
        codec=entry["codec"],
        codec_version=entry["codec_version"],
        axis=entry["axis"],
        exponent=entry["exponent"],
        parts=parts,
        known=entry["known"],
        params=entry["params"],
    )
