"""One array through one codec on the GPU: `tenpak.encode` and `tenpak.decode` for CuPy arrays, with the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cupy
import numpy as np
from numpy.typing import DTypeLike

from tenpak import _core, arrays, dtypes
from tenpak.arrays import Encoded
from tenpak.codecs import find as codec_named
from tenpak.cuda import layouts
from tenpak.cuda.compile import function
from tenpak.errors import InputError, UsageError

#: Values of -DIN and -DOUT.
_FLOATS = {"F32": 32, "F16": 16, "BF16": 116}
_LARGEST = {"F32": 3.4028234663852886e38, "F16": 65504.0, "BF16": 3.3895313892515355e38}
_ENCODE_BLOCK, _DECODE_BLOCK = 128, 256


def encode(array: Any, codec: str, axis: int = -1) -> Encoded:
    """Quantises a CuPy array where it is; its parts are CuPy arrays, byte-equal to `tenpak.encode`'s.

    Codecs whose encoder is min/max run on the GPU, and wait for it once; others on the CPU.

    Args:
        array: float32, float16 or bfloat16 weights, finite, of any shape.
        codec: A name from `tenpak.codecs()`.
        axis: The input dimension, as for `tenpak.encode`.

    Raises:
        InputError: A weight is NaN or infinite; the text names its index.
        UsageError: An unknown codec, axis or dtype.
    """
    about = codec_named(codec)
    dtype = dtypes.name_of(array.dtype)
    with cupy.cuda.Device(array.device.id):
        if about.encoder != "min/max" or about.group is None or array.size == 0 or array.ndim == 0:
            encoded = arrays.encode(cupy.asnumpy(array), codec, axis)
            encoded.parts = {name: cupy.asarray(part) for name, part in encoded.parts.items()}
            return encoded
        if not -array.ndim <= axis < array.ndim:
            raise UsageError(f"axis {axis} does not exist in an array of {array.ndim} dimensions")
        if dtype not in _FLOATS:
            raise UsageError(f"arrays of {array.dtype} hold no weights; use float32, float16 or bfloat16")
        position, shape = axis % array.ndim, tuple(array.shape)
        array = cupy.ascontiguousarray(array)
        parts = {
            name: cupy.empty((rows, per_row), dtypes.stored(kind))
            for name, kind, rows, per_row in _core.part_shapes(codec, list(shape), position)
        }
        kernel = function("encode.cu", "encode", {"WIDTH": about.group, "IN": _FLOATS[dtype]}, array.device.id)
        rows, k, inner = _rows(shape, position)
        threads = rows * -(-k // about.group)
        largest = cupy.zeros(1, np.uint32)

        def run(exponent: int) -> None:
            pointers = (array.data.ptr, *(part.data.ptr for part in parts.values()), largest.data.ptr)
            numbers = (np.uint64(rows), np.int32(k), np.int32(inner), np.float32(2.0**-exponent))
            kernel(_blocks(threads, _ENCODE_BLOCK), (_ENCODE_BLOCK,), (*pointers, *numbers))

        # As the core does: once without an exponent, and again where the largest magnitude asks for one.
        run(0)
        found = float(largest.get().view(np.float32)[0])
        if not np.isfinite(found):
            raise _not_finite(array)
        exponent = _core.exponent(codec, found)
        if exponent:
            run(exponent)
    return Encoded(codec, shape, position, dtype, exponent, parts)


def decode(encoded: Encoded, dtype: DTypeLike | None = None) -> Any:
    """Rebuilds an array on the current device, with the bits of `tenpak.decode`.

    Args:
        encoded: What `encode` or `tenpak.encode` returned; parts may be CuPy or NumPy arrays.
        dtype: float32, float16 or bfloat16; None for the original's.

    Returns:
        A CuPy array of the original's shape.
    """
    about = codec_named(encoded.codec)
    name = encoded.dtype if dtype is None else dtypes.name_of(dtype)
    out = cupy.empty(encoded.shape, float_type(name))
    if out.size == 0:
        return out
    rows, k, inner = _rows(encoded.shape, encoded.axis)
    parts = parts_on_device(encoded.codec, encoded.parts, encoded.shape, encoded.axis)
    device = out.device.id
    kernel = function("decode.cu", "decode_parts", {"LAYOUT": about.layout, "OUT": _FLOATS[name]}, device)
    pointers = (*addresses(parts), out.data.ptr)
    numbers = (np.uint64(rows), np.int32(k), np.int32(inner), *exponent_of(encoded.exponent, name))
    kernel(_blocks(rows * -(-k // 8), _DECODE_BLOCK), (_DECODE_BLOCK,), (*pointers, *numbers))
    return out


def decode_packed(w: Any, dtype: DTypeLike) -> Any:
    """A `QuantizedWeight` as a CuPy array [n, k] (or [batch, n, k]) on its device."""
    name = dtypes.name_of(dtype)
    n, k = w.shape
    with cupy.cuda.Device(w.device):
        out = cupy.empty((w.batch, n, k) if w.batch else (n, k), float_type(name))
        if out.size:
            decode_packed_into(w, out.data.ptr, name)
    return out


def decode_packed_into(w: Any, out: int, dtype: str, stream: Any = None) -> None:
    """The same to an address on the weight's device, which is the current one; F32, F16 or BF16."""
    n, k = w.shape
    kernel = function("decode.cu", "decode_packed", {"LAYOUT": w.layout, "OUT": _FLOATS[dtype]}, w.device)
    rows = max(w.batch, 1) * n
    pointers = (*(0 if a is None else a.data.ptr for a in (w.codes, w.params, w.row_params)), out)
    numbers = (np.uint64(rows), np.int32(n), np.int32(k), np.float32(w.scale), np.float32(_LARGEST[dtype]))
    blocks = _blocks(rows * -(-k // 8), _DECODE_BLOCK)
    kernel(blocks, (_DECODE_BLOCK,), (*pointers, *numbers), 0, stream)


def pack(layout: layouts.Layout, parts: list[Any], n: int, k: int, batch: int) -> layouts.Packed:
    """A packed weight from an artifact's parts on the current device; waits for it to know how large scales are."""
    sizes = layout.sizes(n, k, batch)
    codes = cupy.full(sizes[0], layout.zero_word, np.uint32)
    params = None if sizes[1] is None else cupy.zeros(sizes[1], layout.param)
    row_params = None if sizes[2] is None else cupy.zeros(sizes[2], layout.row_param)
    rows, power = max(batch, 1) * n, 0
    if rows and k:
        defines, size = {"LAYOUT": layout.name}, (np.uint64(rows), np.int32(n), np.int32(k))
        blocks, device = _blocks(rows * -(-k // 8), _DECODE_BLOCK), codes.device.id
        if layout.halves is not None:
            found = cupy.zeros(2, np.uint32)
            kernel = function("pack.cu", "largest", defines, device)
            kernel(blocks, (_DECODE_BLOCK,), (*addresses(parts), found.data.ptr, *size))
            scale, offset = found.get().view(np.float32)
            power = layouts.power_of(float(scale), float(offset))
        kernel = function("pack.cu", "pack", defines, device)
        pointers = (*addresses(parts), *(0 if a is None else a.data.ptr for a in (codes, params, row_params)))
        kernel(blocks, (_DECODE_BLOCK,), (*pointers, *size, np.float32(2.0**power)))
    return layouts.Packed(codes, params, row_params, power)


def parts_on_device(codec: str, parts: Mapping[str, Any], shape: tuple[int, ...], axis: int) -> list[Any]:
    """A codec's parts in their order, on the current device; `UsageError` where they do not fit the shape."""
    return [cupy.ascontiguousarray(cupy.asarray(part)) for part in layouts.ordered(codec, parts, shape, axis)]


def borrowed(tensor: Any) -> Any:
    """A PyTorch tensor on a CUDA device as a CuPy array in the same memory."""
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.nbytes, tensor, tensor.get_device())
    kind = str(tensor.dtype).removeprefix("torch.")
    return cupy.ndarray(tuple(tensor.shape), kind, cupy.cuda.MemoryPointer(memory, 0))


def float_type(name: str) -> Any:
    """The dtype of F32, F16 or BF16."""
    if name not in _FLOATS:
        raise UsageError(f"weights cannot be read as {name}; use float32, float16 or bfloat16")
    if name != "BF16":
        return dtypes.stored(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        raise UsageError("bfloat16 arrays need the package ml-dtypes; pip install ml-dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def exponent_of(exponent: int, name: str) -> tuple[np.float32, np.float32]:
    """The kernels' last arguments: the factor, and the largest finite value of the output's type."""
    return np.float32(2.0**exponent), np.float32(_LARGEST[name])


def addresses(parts: list[Any]) -> list[int]:
    """Five addresses, for the parts that a layout has."""
    return [part.data.ptr for part in parts] + [0] * (5 - len(parts))


def _rows(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """Rows along the axis, their length, and the distance of neighbours in a row (rust/tensor/rows.rs)."""
    if not shape:
        return 1, 1, 1
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    return int(np.prod(shape[:axis], dtype=np.int64)) * inner, shape[axis], inner


def _blocks(threads: int, block: int) -> tuple[int]:
    return (-(-threads // block),)


def _not_finite(array: Any) -> InputError:
    wide = array.astype(np.float32) if array.dtype.kind != "f" else array
    first = int(cupy.argmax(~cupy.isfinite(wide)))
    index = [int(i) for i in np.unravel_index(first, array.shape)]
    return InputError(f"{float(wide.ravel()[first])} at index {index}; only finite weights can be quantised")
