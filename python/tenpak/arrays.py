"""One array through one codec, in memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from tenpak import _core, dtypes
from tenpak.errors import UsageError
from tenpak.threads import checked_threads


@dataclass
class Encoded:
    """An array's parts under a codec."""

    #: The codec's name.
    codec: str
    #: The array's shape.
    shape: tuple[int, ...]
    #: The input dimension, along which groups run.
    axis: int
    #: The array's dtype, as safetensors names it.
    dtype: str
    #: Rebuilt weights are multiplied by two to this power; 0 for ordinary magnitudes.
    exponent: int
    #: The stored arrays by name, each `[rows, elements per row]`.
    parts: dict[str, NDArray[Any]] = field(repr=False)
    #: Σ(w - ŵ)² / Σw², where it was asked for.
    relative_error: float | None = None
    #: tr(ΔHΔᵀ) / tr(WHWᵀ), where a second moment H was given.
    output_error: float | None = None
    #: The same for the codes that the search alone had chosen.
    output_error_before: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Everything that is stored, over the number of weights; 0 for an empty array."""
        weights = int(np.prod(self.shape, dtype=np.int64))
        return 8 * self.nbytes / weights if weights else 0.0


def encode(
    array: ArrayLike,
    codec: str,
    axis: int = -1,
    *,
    importance: ArrayLike | None = None,
    second_moment: ArrayLike | None = None,
    output_moment: ArrayLike | None = None,
    tokens: int | None = None,
    measure: bool = False,
    threads: int | None = None,
    out: Encoded | None = None,
) -> Encoded:
    """Quantises an array of any shape.

    Args:
        array: float32, float16 or bfloat16 (`ml_dtypes`) weights, finite; it must not change meanwhile.
        codec: A name from `tenpak.codecs()`.
        axis: The input dimension: the last for `nn.Linear` weights [out, in], 0 for GPT-2's `Conv1D` [in, out].
        importance: One weight per input, none negative, [shape[axis]], for the layout's search, whichever encoder the
            codec has; E[x_j²] of the layer's input is what one would give ("diag"). None weighs all inputs alike.
            Layouts of eight bits pass it over.
        second_moment: H = E[x xᵀ] of the layer's input, [in, in] float32: codes are chosen column by column, each
            making good what those before it have lost (GPTQ, Frantar et al. 2022). `importance` is then H's
            diagonal unless it is given.
        output_moment: With `second_moment`, E[g gᵀ] of gradients at the layer's outputs, [out, out] float32: outputs,
            too, then make good what others have lost, and `output_error` is of what they were to be (YAQA, Tseng
            et al. 2025).
        tokens: How many tokens moments are a mean of: they are trusted less where they were few.
        measure: Whether to fill `relative_error`.
        threads: Threads to use; None for one on each core. The result does not depend on it.
        out: The result of an earlier call with the same codec and shape, whose memory is used again.

    Returns:
        The parts; `decode` rebuilds the array from them.

    Raises:
        InputError: A weight is NaN or infinite; the text names its index.
        UsageError: An unknown codec, axis or dtype, or importance that does not fit.
    """
    given = np.asarray(array)
    data, dtype = dtypes.bytes_of(given)
    shape = list(given.shape)
    position = _axis(axis, len(shape))
    shapes = _core.part_shapes(codec, shape, position)
    wanted = {name: ((rows, per_row), dtypes.stored(kind)) for name, kind, rows, per_row in shapes}
    if out is None:
        parts = {name: np.empty(size, kind) for name, (size, kind) in wanted.items()}
    else:
        parts = out.parts
        if {name: (part.shape, part.dtype) for name, part in parts.items()} != wanted:
            raise UsageError(f"out holds {out.codec} of shape {out.shape}, not {codec} of shape {tuple(shape)}")
        if not all(part.flags.c_contiguous and part.flags.writeable for part in parts.values()):
            raise UsageError("out's parts must be writable C-contiguous arrays, as `encode` makes them")
    if output_moment is not None and second_moment is None:
        raise UsageError("output_moment is of use beside a second_moment only")

    def moment(given: ArrayLike | None) -> NDArray[np.uint8] | None:
        return None if given is None else np.ascontiguousarray(given, np.float32).reshape(-1).view(np.uint8)

    if importance is not None and np.ndim(importance) != 1:
        raise UsageError(f"importance has shape {np.shape(importance)}; give one number per input")
    if tokens is not None and not 0 <= tokens < 1 << 63:
        raise UsageError(f"tokens {tokens} is no number of tokens")
    weights = None if importance is None else np.asarray(importance, np.float32).tolist()
    buffers = [part.reshape(-1).view(np.uint8) for part in parts.values()]
    exponent, error, norm, output = _core.encode(
        data,
        dtype,
        shape,
        position,
        codec,
        weights,
        moment(second_moment),
        moment(output_moment),
        tokens,
        measure,
        checked_threads(threads),
        buffers,
    )
    relative = (error / norm if norm else 0.0) if measure else None
    encoded = Encoded(codec, tuple(shape), position, dtype, exponent, parts, relative)
    if output is not None:
        after, before, of = output
        encoded.output_error = after / of if of else 0.0
        encoded.output_error_before = before / of if of else 0.0
    return encoded


def decode(
    encoded: Encoded,
    dtype: DTypeLike | None = None,
    *,
    out: NDArray[Any] | None = None,
    threads: int | None = None,
) -> NDArray[Any]:
    """Rebuilds an array.

    Args:
        encoded: What `encode` returned.
        dtype: float32 or float16; None for the original's (float32 for bfloat16).
        out: A C-contiguous array of the same shape to fill, float32 or float16.
        threads: Threads to use; None for one on each core.

    Raises:
        UsageError: A dtype that weights cannot have, or an `out` that does not fit.
    """
    if out is None:
        name = dtypes.readable(encoded.dtype) if dtype is None else dtypes.name_of(dtype)
        if name == "BF16":
            raise UsageError("NumPy has no bfloat16; decode to float32 and convert")
        out = np.empty(encoded.shape, dtypes.stored(name))
    elif out.shape != encoded.shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise UsageError(f"out must be a writable C-contiguous array of shape {encoded.shape}")
    elif not out.dtype.isnative:
        raise UsageError(f"out holds {out.dtype}, whose bytes are in another order than this machine's")
    elif dtype is not None and np.dtype(dtype) != out.dtype:
        raise UsageError(f"out holds {out.dtype}, not {np.dtype(dtype)}")
    parts = [dtypes.bytes_of(part)[0] for part in encoded.parts.values()]
    _core.decode(
        encoded.codec,
        encoded.exponent,
        list(encoded.shape),
        encoded.axis,
        parts,
        dtypes.name_of(out.dtype),
        checked_threads(threads),
        out.reshape(-1).view(np.uint8),
    )
    return out


def _axis(axis: int, rank: int) -> int:
    try:
        axis = operator.index(axis)
    except TypeError:
        raise UsageError(f"axis {axis!r} is no whole number") from None
    if -rank <= axis < rank:
        return axis % rank
    if rank == 0 and axis in (0, -1):
        return 0
    raise UsageError(f"axis {axis} does not exist in an array of {rank} dimensions")


def shape_of(shape: Sequence[int]) -> str:
    """A shape for people."""
    return " x ".join(map(str, shape)) if shape else "scalar"
