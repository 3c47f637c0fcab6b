"""Runs those CUDA kernels that are plain C++ on the CPU, with as much of CuPy as their callers need.

So that packing, encoding and decoding are tested to the bit where there is no GPU. A kernel is compiled by the host's
C++ compiler, its threads run one after another, and NumPy arrays stand for device memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from guarded import guarded
from support import ROOT
from tenpak.cuda import compile as kernels

COMPILER = shutil.which("c++") or shutil.which("g++")

#: Stands in for cuda/floats.cuh.
FLOATS = """
#pragma once
#include <math.h>
#include <string.h>
#include <utility>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ static
struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx, blockDim;
inline void atomicMax(unsigned* at, unsigned value) { if (value > *at) *at = value; }
inline void atomicOr(unsigned* at, unsigned value) { *at |= value; }
namespace tenpak {
template <class To, class From> To same_bits(From x) { To to; memcpy(&to, &x, sizeof to); return to; }
inline float from_half(unsigned short x) { return (float)same_bits<_Float16>(x); }
inline unsigned short to_half(float x) { return same_bits<unsigned short>((_Float16)x); }
inline float from_bits(unsigned x) { return same_bits<float>(x); }
inline unsigned to_bits(float x) { return same_bits<unsigned>(x); }
template <class... A, size_t... I>
void run(void (*kernel)(A...), void** given, std::index_sequence<I...>, unsigned blocks, unsigned threads) {
    blockDim = {threads, 1, 1};
    for (unsigned b = 0; b < blocks; ++b)
        for (unsigned t = 0; t < threads; ++t) {
            blockIdx = {b, 0, 0};
            threadIdx = {t, 0, 0};
            kernel(*static_cast<A*>(given[I])...);
        }
}
template <class... A>
void launch(void (*kernel)(A...), void** given, unsigned blocks, unsigned threads) {
    run(kernel, given, std::index_sequence_for<A...>{}, blocks, threads);
}
}
"""


def compiled(files: dict[str, str], flags: Sequence[str]) -> ctypes.CDLL:
    """kernel.cpp among files of these names and texts as a library, compiled once for each text."""
    key = hashlib.sha256("\0".join([*files.values(), *flags]).encode()).hexdigest()[:20]
    library = Path(tempfile.gettempdir()) / "tenpak-on-cpu" / key / "kernel.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Several tests may build the same at a time.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            for file, content in files.items():
                Path(folder, file).write_text(content)
            command = [COMPILER, "-shared", "-fPIC", "-Og", "-w", *flags, "kernel.cpp", "-o", "kernel.so"]
            subprocess.run(command, check=True, cwd=folder)
            Path(folder, "kernel.so").replace(library)
    return ctypes.CDLL(str(library))


def language(source: str, defines: Mapping[str, str | int], arch: str) -> list[str]:
    """The compiler's options for a kernel of cuda/ that a C++ compiler of the host has, too."""
    return [option for option in kernels.options(source, dict(defines), arch) if option.startswith(("-std", "-D"))]


@functools.cache
def _library(name: str, defines: tuple[tuple[str, str | int], ...], kernel: str) -> ctypes.CDLL:
    text, header = ((ROOT / "cuda" / file).read_text() for file in (name, "weights.cuh"))
    launcher = f'extern "C" void launch(void** a, unsigned b, unsigned t) {{ tenpak::launch({kernel}, a, b, t); }}\n'
    files = {"floats.cuh": FLOATS, "weights.cuh": header, "kernel.cpp": text + launcher}
    return compiled(files, ["-ffp-contract=off", *language(name, dict(defines), "sm_80")])


def function(name: str, kernel: str, defines: dict[str, str | int], device: int) -> Any:
    """`tenpak.cuda.compile.function`, on the CPU."""
    library = _library(name, tuple(sorted(defines.items())), kernel)

    def call(
        grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], shared: int = 0, stream: Any = None
    ) -> None:
        # Bare integers are addresses.
        values = [np.uint64(a) if isinstance(a, int) else a for a in arguments]
        boxes = [np.array([value]) for value in values]
        library.launch((ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes)), grid[0], block[0])

    return call


class Array(np.ndarray):
    """A NumPy array that looks like one of CuPy's."""

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Any:
        return SimpleNamespace(id=0)

    def get(self) -> np.ndarray:
        return np.asarray(self)


def array(given: Any, kind: type[Array] = Array) -> Any:
    """In `guarded` memory, if it is not one yet."""
    return given.view(kind) if isinstance(given, Array) else guarded(np.asarray(given)).view(kind)


def makers(names: Sequence[str], kind: type[Array] = Array) -> dict[str, Any]:
    """NumPy's functions of these names, whose arrays look like CuPy's."""

    def made(name: str, *arguments: Any, **options: Any) -> Any:
        found = getattr(np, name)(*arguments, **options)
        # What is an array already stays where it is.
        same = isinstance(arguments[0], Array) and np.may_share_memory(found, arguments[0])
        return found.view(kind) if same else array(found, kind)

    return {name: functools.partial(made, name) for name in names}


def _cupy() -> ModuleType:
    module = ModuleType("cupy")
    module.ndarray = Array
    vars(module).update(makers(("empty", "zeros", "full", "asarray", "ascontiguousarray")))
    module.asnumpy = np.asarray
    module.argmax, module.isfinite = np.argmax, np.isfinite
    module.cuda = SimpleNamespace(Device=lambda number=0: nullcontext())
    return module


@contextmanager
def afresh(cupy: ModuleType, modules: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """Modules of `tenpak.cuda`, loaded anew over a stand-in for CuPy; as they were before, at the end."""
    package = sys.modules["tenpak.cuda"]
    names = ["cupy", *(f"tenpak.cuda.{module}" for module in modules)]
    before = {name: sys.modules.pop(name, None) for name in names}
    kept = {module: package.__dict__.pop(module, None) for module in modules}
    sys.modules["cupy"] = cupy
    try:
        yield {module: importlib.import_module(f"tenpak.cuda.{module}") for module in modules}
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if before[name] is not None:
                sys.modules[name] = before[name]
        for module, value in kept.items():
            package.__dict__.pop(module, None)
            if value is not None:
                setattr(package, module, value)


@contextmanager
def cuda_on_cpu() -> Iterator[SimpleNamespace]:
    """`tenpak.cuda.codec` and `tenpak.cuda.weight`, loaded afresh over NumPy."""
    with afresh(_cupy(), ("codec", "weight")) as loaded:
        loaded["codec"].function = function  # type: ignore[attr-defined]
        yield SimpleNamespace(codec=loaded["codec"], QuantizedWeight=loaded["weight"].QuantizedWeight)
