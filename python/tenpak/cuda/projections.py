"""A decoder's linear layers as a GPU's step multiplies with them: those that share an input as one product.

Queries, keys and values are rows of one weight; so are gates and what they multiply, in turns of eight rows, so that
one lane of the kernel holds both and nothing between them is written. The norm before a product of few tokens is made
in its launch. Weights of different codecs cannot be joined, and are multiplied one after another; those that
were kept are FP16 (FP32 where that cannot hold them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from tenpak.artifact import KEEP, ArtifactFile
from tenpak.cuda import glue
from tenpak.cuda.plans import FEW, Fused, NormKind, Output
from tenpak.cuda.products import launch, matmul
from tenpak.cuda.weight import QuantizedWeight

#: Rows of a gate that lie together.
TURN = 8


class Projection:
    """y = x Wᵀ + b for one or several weights on one input, FP16 with FP32 sums.

    Args:
        artifact: Holds the weights.
        names: Their names; [out, in], or [in, out] where `axis` is 0.
        biases: FP32 [out] of each, or None.
        axis: The input dimension.
        turns: Join two weights of as many rows in turns of eight, for `activated`.
    """

    def __init__(
        self, artifact: ArtifactFile, names: Sequence[str], biases: Sequence[Any], *, axis: int = 1, turns: bool = False
    ) -> None:
        self._weights = _joined(artifact, names, axis, turns)
        #: Whether the outputs of gates and of what they multiply come in turns.
        self.in_turns = turns and len(self._weights) == 1
        parts = [bias if bias is None else bias.astype(cupy.float16) for bias in biases]
        if len(self._weights) == 1:
            parts = [_join(parts, self.in_turns) if all(part is not None for part in parts) else None]
        self._biases = parts

    @property
    def n(self) -> int:
        """Outputs of all weights together."""
        return sum(weight.shape[0] for weight in self._weights)

    @property
    def weight(self) -> Any:
        """The one weight, where it is one."""
        (weight,) = self._weights
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory."""
        return sum(int(array.nbytes) for array in (*self._weights, *self._biases) if array is not None)

    def __call__(self, x: Any) -> Any:
        """[m, k] to [m, n], FP16, in a new array."""
        y = cupy.empty((len(x), self.n), cupy.float16)
        self.into(y, x)
        return y

    def norms(self, tokens: int) -> bool:
        """Whether so many tokens can be given as the residual stream, with the norm that is before them."""
        weight = self._weights[0]
        return (
            len(self._weights) == 1
            and tokens <= FEW
            and isinstance(weight, QuantizedWeight)
            and weight.shape[1] % 4 == 0
        )

    def into(self, y: Any, x: Any, norm: Any = None) -> None:
        """Fills y [m, n], FP16, or of one token FP32, from x, or where it `norms` from the norm of x, FP32."""
        output: Output = "float32" if y.dtype == np.float32 else "activations"
        at = 0
        for weight, bias in zip(self._weights, self._biases, strict=True):
            end = at + weight.shape[0]
            self._one(weight, bias, x, y[:, at:end], output, norm)
            at = end

    def add_to(self, h: Any, x: Any) -> Any:
        """h += y, of h FP32 [m, n]; or where there are many tokens, y, which is then to be added. One weight only."""
        weight, (bias,) = self.weight, self._biases
        if len(x) > (FEW if isinstance(weight, QuantizedWeight) else 1):
            return self(x)
        self._one(weight, bias, x, h, "added")
        return None

    def activated(self, out: Any, x: Any, activation: str, y: Any, norm: Any = None) -> None:
        """out = activation(y) [m, n]; of two weights, the activated first one's y times the second's: [m, n / 2].

        `x` and `norm` as `into` has them. `y`, FP16 [m, n], is overwritten: memory for what is written between product
        and activation.
        """
        if len(self._weights) == 1 and len(x) <= FEW and isinstance(self._weights[0], QuantizedWeight):
            fused = Fused(_kind(norm), activation=activation, gated=self.in_turns, overlaps=True)
            _launch(self._weights[0], self._biases[0], x, out, fused, norm)
        elif len(self._weights) == 1:
            self.into(y, x)
            glue.gate(y, out, activation, in_turns=self.in_turns)
        else:
            halves = y.reshape(2, len(x), -1)
            for half, weight, bias in zip(halves, self._weights, self._biases, strict=True):
                self._one(weight, bias, x, half, "activations")
            glue.gate(halves[0], out, activation, others=halves[1])

    def _one(self, weight: Any, bias: Any, x: Any, y: Any, output: Output, norm: Any = None) -> None:
        packed, whole = isinstance(weight, QuantizedWeight), bool(y.flags.c_contiguous)
        if whole and packed and len(x) <= FEW:
            _launch(weight, bias, x, y, Fused(_kind(norm), output=output, overlaps=True), norm)
        elif whole and not packed and len(x) == 1:
            glue.product(weight, x, y, bias, output)
        elif whole and packed:
            matmul(x, weight, bias, y)
        else:
            y[...] = matmul(x, weight) if packed else x.astype(weight.dtype) @ weight.T
            if bias is not None:
                y += bias


def _kind(norm: Any) -> NormKind:
    return "none" if norm is None else "layer" if hasattr(norm, "bias") else "rms"


def _launch(weight: QuantizedWeight, bias: Any, x: Any, y: Any, fused: Fused, norm: Any) -> None:
    launch(
        weight,
        x.data.ptr,
        y.data.ptr,
        len(x),
        bf16=False,
        stream=cupy.cuda.get_current_stream(),
        bias=0 if bias is None else bias.data.ptr,
        fused=fused,
        norm=None if norm is None else glue.norm_arguments(norm),
    )


def weight_of(artifact: ArtifactFile, name: str) -> Any:
    """One tensor as a `QuantizedWeight` where it has a codec, and as an FP16 or FP32 array else."""
    if _packs(artifact, name):
        return QuantizedWeight.from_artifact(artifact, name)
    return _dense(artifact.read(name, np.float32))


def _packs(artifact: ArtifactFile, name: str) -> bool:
    return artifact.info(name).codec != KEEP


def _dense(array: Any) -> Any:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return cupy.asarray(half if np.isfinite(half).all() else array)


def _joined(artifact: ArtifactFile, names: Sequence[str], axis: int, turns: bool) -> list[Any]:
    infos = [artifact.info(name) for name in names]
    alike = len({(info.codec, info.exponent) for info in infos}) == 1
    if turns:
        rows = {info.shape[1 - axis] for info in infos}
        alike = alike and len(rows) == 1 and rows.pop() % TURN == 0
    if len(names) == 1 or not alike:
        return [_read(artifact, name, axis) for name in names]
    if not _packs(artifact, names[0]):
        return [_join([_read(artifact, name, axis) for name in names], turns)]
    parts = [artifact.parts(name) for name in names]
    joined = {part: _join([np.asarray(one[part]) for one in parts], turns) for part in parts[0]}
    k, n = infos[0].shape[axis], sum(info.shape[1 - axis] for info in infos)
    return [QuantizedWeight.from_parts(infos[0].codec, joined, (n, k), 1, infos[0].exponent)]


def _read(artifact: ArtifactFile, name: str, axis: int) -> Any:
    weight = weight_of(artifact, name)
    return weight if isinstance(weight, QuantizedWeight) or axis == 1 else cupy.ascontiguousarray(weight.T)


def _join(arrays: Sequence[Any], turns: bool) -> Any:
    """Arrays [rows, …] one after another, or in turns of eight rows."""
    xp = cupy if isinstance(arrays[0], cupy.ndarray) else np
    if not turns:
        return xp.concatenate(arrays)
    rest = arrays[0].shape[1:]
    return xp.stack([array.reshape(-1, TURN, *rest) for array in arrays], 1).reshape(-1, *rest)
