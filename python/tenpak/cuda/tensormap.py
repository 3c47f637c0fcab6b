"""Descriptions of matrices in memory for Hopper's copy engine, made by the driver (cuTensorMapEncodeTiled).

A map is 128 bytes that a kernel takes by value: it holds an address, so they are made for each buffer, and kept.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenpak.errors import TenpakError, UnsupportedError

#: Columns of a box: 128 bytes of 16-bit floats, the widest that can be swizzled.
BOX_COLUMNS = 64
#: CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16, by whether it is bfloat16.
_TYPES = {False: 6, True: 9}
_NO_INTERLEAVE, _SWIZZLE_128, _PROMOTE_256, _FILL_ZERO = 0, 3, 3, 0
_BYTES, _ALIGNMENT = 128, 64


def fits(address: int, stride: int) -> bool:
    """Whether the copy engine can read rows `stride` elements apart from there."""
    return address % 16 == 0 and stride % 8 == 0 and sys.platform == "linux"


@functools.lru_cache(maxsize=4096)
def maps_of(
    address: int, k: int, m: int, batch: int, stride: int, tokens: tuple[int, ...], bf16: bool, tiles: int = 0
) -> NDArray[Any]:
    """Maps of x [batch, m, k], rows `stride` elements apart, one for each of `tokens`, the rows of its boxes.

    Boxes have 64 columns or, with `tiles`, so many times 64, those of all their rows one after another; k is a
    multiple of 64 then. Returns an array of one element, 128 bytes for each map, which CuPy hands to a kernel by value.

    Raises:
        UnsupportedError: The driver is older than Hopper.
        TenpakError: The driver refuses: the text is its error's number.
    """
    sizes, strides, rest = [k, m, batch], [2 * stride, 2 * stride * m], [1]
    if tiles:
        sizes[0] = BOX_COLUMNS
        sizes.insert(2, k // BOX_COLUMNS)
        strides.insert(1, 2 * BOX_COLUMNS)
        rest.insert(0, tiles)
    rank = len(sizes)
    memory = np.zeros(_BYTES * len(tokens) + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    encoded = memory[start : start + _BYTES * len(tokens)]
    for i, rows in enumerate(tokens):
        error = _encoder()(
            ctypes.c_void_p(encoded.ctypes.data + i * _BYTES),
            _TYPES[bf16],
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(BOX_COLUMNS, rows, *rest),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            _NO_INTERLEAVE,
            _SWIZZLE_128,
            _PROMOTE_256,
            _FILL_ZERO,
        )
        if error:
            shape = f"[{batch}, {m}, {k}] with rows of {stride}"
            raise TenpakError(f"cuTensorMapEncodeTiled of {shape} failed: error {error}")
    return encoded.view(np.dtype((np.void, encoded.nbytes)))


@functools.cache
def _encoder() -> Any:
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise UnsupportedError("the CUDA driver has no cuTensorMapEncodeTiled; install version 12 or newer") from error
    encode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
        *(ctypes.c_int,) * 4,
    ]
    encode.restype = ctypes.c_int
    return encode
