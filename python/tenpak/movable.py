"""What of an artifact's tensors can move while its codes stay: scales and offsets of linear layers, gains of norms.

Each kind has `moves`, FP32 numbers that start at 0 and are relative to what they move, the rate at which they may
learn, and tells what it is rebuilt to, how a loss's gradient reaches the moves, and what is to be stored. Weights are
not kept here: callers bring them as the artifact rebuilds them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tenpak.artifact import KEEP, ArtifactFile
from tenpak.codecs import codecs
from tenpak.decoder import Decoder
from tenpak.decoder.source import ArtifactSource
from tenpak.errors import UsageError

#: How much an Adam step moves, at most, as a part of what is moved. Faster ones raised the divergence on other text.
SCALE_RATE = 3e-4
GAIN_RATE = 1e-3

#: Groups under one super-scale of the layouts with tables.
_SUPER = 16


class Movable(Protocol):
    """Some numbers of one tensor."""

    #: On the array module.
    moves: Any
    rate: float

    def parts(self) -> dict[str, NDArray[Any]]:
        """The parts that have changed, as they are stored."""


class MovableWeight(Movable, Protocol):
    """Those of a linear layer's weight [out, in]; `stored` is what the artifact rebuilds it to."""

    def rebuilt(self, stored: Any, *, rounded: bool = False) -> Any:
        """The moved weight, in a new array; `rounded` as it will be read once it is stored."""

    def gradient(self, d: Any, stored: Any) -> Any:
        """A loss's gradient at the moves, from that at the moved weight."""


def of_linear(artifact: ArtifactFile, name: str, xp: Any) -> MovableWeight | None:
    """What can move of a linear layer's tensor; None where nothing can."""
    if _is_shared(artifact, name):
        return None
    info = artifact.info(name)
    kinds = {part.name: part.dtype for part in info.parts}
    if kinds.get("scales") == kinds.get("offsets") == "F16" and kinds.get("codes") == "U8":
        return _Affine(artifact, name, xp)
    return _Supers(artifact, name, xp) if "supers" in kinds else None


def gain_of(artifact: ArtifactFile, name: str, gain: Any, xp: Any) -> Gain | None:
    """A norm's gain [width]; None where a rule asked for a codec, or another norm's is the same."""
    info = artifact.info(name)
    return None if info.codec != KEEP or _is_shared(artifact, name) else Gain(info.dtype, gain, xp)


def open_artifact(path: str | os.PathLike[str], xp: Any) -> tuple[Decoder, ArtifactFile]:
    """An artifact whose tensors are to move, as a decoder and as a file.

    Raises:
        UsageError: It is a model of another kind.
        InputError, ArtifactError, UnsupportedError, StorageError: As for `Decoder.open`.
    """
    decoder = Decoder.open(path, xp=xp)
    if not isinstance(decoder.source, ArtifactSource):
        raise UsageError(f"{os.fspath(path)} is no .tenpak; compress the model first")
    return decoder, decoder.source.artifact


def parts_of(movables: Mapping[str, Movable]) -> list[tuple[str, str, NDArray[np.uint8]]]:
    """What is to be stored of tensors by name: tensor, part and bytes, as `_core.replace_parts` takes them."""
    return [
        (name, part, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for name, movable in movables.items()
        for part, array in movable.parts().items()
    ]


def _is_shared(artifact: ArtifactFile, name: str) -> bool:
    """Whether two names have the tensor: it would have to move for both."""
    return name in artifact.aliases or name in artifact.aliases.values()


def _groups(x: Any, size: int, xp: Any) -> Any:
    """[rows, cols] as [rows, groups, size], a last group filled with zeros."""
    rows, cols = x.shape
    if cols % size:
        filled = xp.zeros((rows, -(-cols // size) * size), x.dtype)
        filled[:, :cols] = x
        x = filled
    return x.reshape(rows, -1, size)


def _ungrouped(groups: Any, like: Any) -> Any:
    """[rows, groups, size] as `like`, [rows, cols]."""
    return groups.reshape(len(groups), -1)[:, : like.shape[1]]


def _nonzero(x: Any, xp: Any) -> Any:
    """What can be divided by; what is zero stays so however it moves."""
    return xp.where(x == 0, np.float32(1), x)


class _Affine:
    """Codes q with an FP16 scale and offset a group: (q·s + o)·2^exponent; both move in units of s."""

    rate = SCALE_RATE

    def __init__(self, artifact: ArtifactFile, name: str, xp: Any) -> None:
        info, parts = artifact.info(name), artifact.parts(name)
        self._xp, self._group = xp, _group_of(info.codec)
        self._scales, self._offsets = (xp.asarray(parts[part].astype(np.float32)) for part in ("scales", "offsets"))
        self._unit = np.float32(2.0**info.exponent)
        self.moves = xp.zeros((2, *self._scales.shape), np.float32)

    def _codes(self, stored: Any) -> Any:
        """[rows, groups, size]: whole numbers, which the rounding of what was rebuilt from them does not hide."""
        codes = _groups(stored / self._unit, self._group, self._xp)
        codes -= self._offsets[..., None]
        codes /= _nonzero(self._scales, self._xp)[..., None]
        return self._xp.rint(codes)

    def _moved(self) -> tuple[Any, Any]:
        return self._scales * (1 + self.moves[0]), self._offsets + self._scales * self.moves[1]

    def rebuilt(self, stored: Any, *, rounded: bool = False) -> Any:
        scales, offsets = self._moved()
        if rounded:
            scales, offsets = (x.astype(np.float16).astype(np.float32) for x in (scales, offsets))
        weight = self._codes(stored)
        weight *= scales[..., None]
        weight += offsets[..., None]
        weight *= self._unit
        return _ungrouped(weight, stored)

    def gradient(self, d: Any, stored: Any) -> Any:
        d = _groups(d, self._group, self._xp)
        both = self._xp.stack([self._xp.einsum("rgk,rgk->rg", d, self._codes(stored)), d.sum(axis=-1)])
        both *= self._scales * self._unit
        return both

    def parts(self) -> dict[str, NDArray[Any]]:
        scales, offsets = (_on_host(x.astype(np.float16), self._xp) for x in self._moved())
        return {"scales": scales, "offsets": offsets}


class _Supers:
    """Layouts with tables: the FP16 super-scale of each sixteen groups, which all their weights are multiples of."""

    rate = SCALE_RATE

    def __init__(self, artifact: ArtifactFile, name: str, xp: Any) -> None:
        self._xp = xp
        self._supers = xp.asarray(artifact.parts(name)["supers"].astype(np.float32))
        self._size = _SUPER * _group_of(artifact.info(name).codec)
        self.moves = xp.zeros(self._supers.shape, np.float32)

    def rebuilt(self, stored: Any, *, rounded: bool = False) -> Any:
        times = 1 + self.moves
        if rounded:
            moved = (self._supers * times).astype(np.float16).astype(np.float32)
            times = moved / _nonzero(self._supers, self._xp)
        return _ungrouped(_groups(stored, self._size, self._xp) * times[..., None], stored)

    def gradient(self, d: Any, stored: Any) -> Any:
        return _groups(d * stored, self._size, self._xp).sum(axis=-1)

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"supers": _on_host((self._supers * (1 + self.moves)).astype(np.float16), self._xp)}


class Gain:
    """A norm's gain, which artifacts keep."""

    rate = GAIN_RATE

    def __init__(self, dtype: str, gain: Any, xp: Any) -> None:
        self._xp, self._dtype, self._gain = xp, dtype, gain
        self.moves = xp.zeros(gain.shape, np.float32)

    def rebuilt(self, *, rounded: bool = False) -> Any:
        gain = self._gain * (1 + self.moves)
        if rounded:
            stored = _stored(_on_host(gain, self._xp), self._dtype)
            wide = (stored.astype(np.uint32) << 16).view(np.float32) if self._dtype == "BF16" else stored
            gain = self._xp.asarray(wide.astype(np.float32))
        return gain

    def gradient(self, d: Any) -> Any:
        return d * self._gain

    def parts(self) -> dict[str, NDArray[Any]]:
        return {"data": _stored(_on_host(self._gain * (1 + self.moves), self._xp), self._dtype)}


def _stored(x: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """FP32 numbers as a dtype of weights; bfloat16 as its bits, rounded to even."""
    if dtype == "BF16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return x.astype({"F16": np.float16, "F32": np.float32}[dtype])


def _group_of(codec: str) -> int:
    group = next(c.group for c in codecs() if c.name == codec)
    assert group is not None, "layouts without groups have no scales a group"
    return group


def _on_host(x: Any, xp: Any) -> NDArray[Any]:
    host: NDArray[Any] = x if xp is np else xp.asnumpy(x)
    return host
