"""`tenpak.cuda.runner` over NumPy: its kernels run as in warps_on_cpu.py, and captured graphs are lists of calls.

Products with packed weights are NumPy's, of the weights that the kernels unpack.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import warps_on_cpu
from tenpak.cuda import plans
from tenpak.decoder.layers import activation

_MODULES = ("codec", "weight", "products", "cache", "attention", "glue", "projections", "runner")
#: Sources whose threads work alone.
_ALONE = ("pack.cu", "decode.cu", "encode.cu")


class _Graph:
    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def launch(self, stream: Any) -> None:
        for call in self.calls:
            call()


class _Stream:
    """Runs what is queued at once, or keeps it while a graph is captured."""

    ptr = 0
    graph: _Graph | None = None

    def __init__(self, non_blocking: bool = True) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def queue(self, call: Callable[[], None]) -> None:
        if _Stream.graph is None:
            call()
        else:
            _Stream.graph.calls.append(call)

    def begin_capture(self) -> None:
        _Stream.graph = _Graph()

    def end_capture(self) -> _Graph | None:
        graph, _Stream.graph = _Stream.graph, None
        return graph

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, disable_timing: bool = True) -> None:
        pass

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Array(cuda_on_cpu.Array):
    def set(self, values: Any) -> None:
        self[...] = values


def function(name: str, kernel: str, defines: dict[str, object], device: int) -> Any:
    """`tenpak.cuda.compile.function`, on the CPU, into the stream."""
    if name in _ALONE:
        return cuda_on_cpu.function(name, kernel, defines, device)
    call = warps_on_cpu.function(name, kernel, defines, device)
    return lambda *launched, **more: _Stream().queue(lambda: call(*launched, **more))


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> Any:
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    return np.frombuffer((ctypes.c_byte * (count * kind.itemsize)).from_address(address), kind).reshape(shape)


def _launch(
    w: Any, x: int, y: int, m: int, *, bf16: bool, stream: Any, bias: int = 0, fused: Any, norm: Any = None
) -> None:
    """`tenpak.cuda.products.launch`, by NumPy."""
    dense = np.asarray(w.to_dense(np.float32))
    n, k = w.shape

    def run() -> None:
        rows = _memory(x, (m, k), np.float16 if norm is None else np.float32)
        if norm is not None:
            weight, plus, eps = (_memory(norm[0], (k,), np.float32), norm[1], norm[2])
            centred = rows - rows.mean(-1, keepdims=True) if fused.norm == "layer" else rows
            rows = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(eps)) * weight
            rows = (rows + _memory(plus, (k,), np.float32) if plus else rows).astype(np.float16)
        sums = rows.astype(np.float32) @ dense.T
        if bias:
            sums += _memory(bias, (n,), np.float16)
        act = (lambda a: a) if fused.activation == "none" else activation(fused.activation, xp=np)
        if fused.gated:
            pairs = sums.reshape(m, n // 16, 2, 8)
            sums = (act(pairs[:, :, 0].copy()) * pairs[:, :, 1]).reshape(m, n // 2)
        else:
            sums = act(sums)
        out = _memory(y, sums.shape, np.float16 if fused.output == "activations" else np.float32)
        out[...] = out + sums if fused.output == "added" else sums

    stream.queue(run)


def _matmul(x: Any, w: Any, bias: Any = None, out: Any = None) -> Any:
    y = x.astype(np.float32) @ np.asarray(w.to_dense(np.float32)).T
    y = (y if bias is None else y + bias).astype(np.float16).view(_Array)
    if out is None:
        return y
    out[...] = y
    return out


@contextmanager
def runner_on_cpu() -> Iterator[SimpleNamespace]:
    """The modules of a runner, loaded afresh over NumPy."""
    cupy = cuda_on_cpu._cupy()
    names = ("empty", "zeros", "full", "asarray", "ascontiguousarray", "concatenate", "stack")
    vars(cupy).update(cuda_on_cpu.makers(names, _Array))
    cupy.uint8, cupy.uint32, cupy.int32, cupy.float16, cupy.float32 = (
        np.uint8,
        np.uint32,
        np.int32,
        np.float16,
        np.float32,
    )
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)

    def copy(to: int, source: int, count: int, kind: int, stream: int) -> None:
        ctypes.memmove(to, source, count)

    cupy.cuda = SimpleNamespace(
        Device=lambda number=0: nullcontext(),
        Stream=_Stream,
        Event=_Event,
        get_current_stream=_Stream,
        alloc_pinned_memory=bytearray,
        memory=SimpleNamespace(OutOfMemoryError=MemoryError),
        runtime=SimpleNamespace(getDevice=lambda: 0, memcpyAsync=copy, memcpyDeviceToHost=2),
    )
    with cuda_on_cpu.afresh(cupy, _MODULES) as loaded:
        for module in loaded.values():
            if hasattr(module, "function"):
                module.function = function
        device = plans.Device(3, 225 << 10, 228 << 10, 80)
        for name in ("attention", "glue"):
            loaded[name].device_of = lambda number: device
        loaded["projections"].launch = _launch
        loaded["projections"].matmul = _matmul
        yield SimpleNamespace(cupy=cupy, **loaded)
