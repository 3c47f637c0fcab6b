"""Launches that overlap: a kernel may begin while the one before it on its stream still runs (cuda/overlap.cuh).

CuPy launches kernels one after another. The driver's own call knows programmatic dependent launch, which a captured
graph keeps; it is called here through ctypes, as CUDA's header declares it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

#: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_PROGRAMMATIC = 6

_state = threading.local()


@contextmanager
def overlapping() -> Iterator[None]:
    """Lets this thread's launches of kernels that can wait begin early, each after the one before it on its stream."""
    before = getattr(_state, "on", False)
    _state.on = True
    try:
        yield
    finally:
        _state.on = before


class Kernel:
    """A function of CuPy's whose kernel waits for what was launched before it."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, grid: Any, block: Any, arguments: Any, shared: int = 0, stream: Any = None) -> None:
        launch = _launcher() if getattr(_state, "on", False) else None
        if launch is None:
            self._function(grid, block, arguments, shared, stream)
        else:
            launch(self._function.ptr, grid, block, arguments, shared, stream)


class _Attribute(ctypes.Structure):
    # The value is a union of 64 bytes at a multiple of 8.
    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_uint),
        ("allowed", ctypes.c_int),
        ("rest", ctypes.c_byte * 60),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


@functools.cache
def _launcher() -> Any:
    """The driver's launch with attributes, or None where it has none."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        call = driver.cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
    call.restype = ctypes.c_int

    def launch(function: int, grid: Any, block: Any, arguments: Any, shared: int, stream: Any) -> None:
        from cupy.cuda import driver as cupy_driver
        from cupy.cuda import get_current_stream

        stream = get_current_stream() if stream is None else stream
        boxes = [_box(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        attribute = _Attribute(_PROGRAMMATIC, 0, 1)
        sizes = ((ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block))
        config = _Config(*sizes, shared, stream.ptr, ctypes.pointer(attribute), 1)
        status = call(ctypes.byref(config), function, pointers, None)
        if status:
            raise cupy_driver.CUDADriverError(status)

    return launch


def _box(argument: Any) -> Any:
    """An array of one element that holds an argument; bare integers are addresses."""
    return np.array([argument], np.uint64 if isinstance(argument, int) else None)
