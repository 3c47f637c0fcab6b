"""Arrays behind which memory ends: a kernel that reads or writes beyond one stops the test where it does."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What CUDA kernels expect of the beginning of an array whose rows they read in vectors.
ALIGNMENT = 16
LINUX = sys.platform.startswith("linux")


def guarded(array: NDArray[Any]) -> NDArray[Any]:
    """A C-contiguous copy of `array` whose end, rounded up to its `ALIGNMENT`, is the last that may be touched.

    Elsewhere than on Linux a plain copy.
    """
    if not LINUX:
        return np.array(array, order="C")
    page = mmap.PAGESIZE
    size = -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    room = -(-size // page) * page
    pages = mmap.mmap(-1, room + page)
    memory = np.frombuffer(pages, np.uint8)
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(memory.ctypes.data + room), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = memory[room - size : room - size + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def each_guarded(*arrays: NDArray[Any] | None) -> list[NDArray[Any] | None]:
    """`guarded` copies, and None for what is not there."""
    return [None if array is None else guarded(array) for array in arrays]
