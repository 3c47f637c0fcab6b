"""Kernels from CUDA sources: NVRTC's options, a cache on disk, and functions loaded on a device.

A kernel is compiled at its first use, in a second or so, and its machine code kept under ~/.cache/tenpak (or
`TENPAK_CACHE_DIR`; an empty one keeps nothing). Nothing but `function` needs a GPU. `TENPAK_CUBIN_DIR` names a folder
with machine code that `tenpak.cuda.ahead` has made, which is taken where it has a kernel; `TENPAK_CUDA_DIR` one whose
sources are taken instead of those in the package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tenpak import _core
from tenpak.cuda.launch import Kernel
from tenpak.errors import StorageError, TenpakError, UnsupportedError

#: Macros by name; their values are written as they are.
Defines = Mapping[str, object]

#: The oldest compute capability that has the kernels' instructions.
OLDEST = 80

#: Sources whose results must be the core's, bit for bit.
_EXACT = frozenset({"decode.cu", "embed.cu", "encode.cu"})

#: Sources whose kernels always wait for what was launched before them (cuda/overlap.cuh); others do with -DOVERLAP=1.
_WAITING = frozenset({"append.cu", "attention.cu", "embed.cu", "gate.cu", "norm.cu", "product.cu", "sample.cu"})

#: The first compute capability whose launches may overlap.
_OVERLAPS_FROM = 90

#: Sources with instructions that only this architecture's own machine code may have, and that architecture.
_SPECIFIC = {"wide.cu": "sm_90a"}

_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


class _Compiler(Protocol):
    """NVRTC through one of the packages that bring it."""

    version: str

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> bytes: ...


class _CupyCompiler:
    def __init__(self) -> None:
        from cupy.cuda import nvrtc

        self._nvrtc = nvrtc
        self.version = ".".join(map(str, nvrtc.getVersion()))

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> bytes:
        texts, names = ([text.encode() for text in part] for part in (headers.values(), headers))
        program = self._nvrtc.createProgram(source, name, texts, names)
        try:
            self._nvrtc.compileProgram(program, options)
            return bytes(self._nvrtc.getCUBIN(program))
        except self._nvrtc.NVRTCError as error:
            raise _failure(name, options, self.version, self._nvrtc.getProgramLog(program) or str(error)) from error
        finally:
            self._nvrtc.destroyProgram(program)


class _BindingsCompiler:
    """NVIDIA's own bindings, which torch brings."""

    def __init__(self) -> None:
        from cuda.bindings import nvrtc

        self._nvrtc = nvrtc
        self.version = ".".join(map(str, self._call("nvrtcVersion")))

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        results: list[Any] = list(getattr(self._nvrtc, name)(*arguments))
        if int(results[0]):
            raise RuntimeError(f"{name}: {results[0].name}")
        return results[1:]

    def _output(self, name: str, program: Any) -> bytes:
        (size,) = self._call(f"nvrtcGet{name}Size", program)
        buffer = bytearray(size)
        self._call(f"nvrtcGet{name}", program, buffer)
        return bytes(buffer)

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: tuple[str, ...]) -> bytes:
        (program,) = self._call(
            "nvrtcCreateProgram",
            source.encode(),
            name.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [header.encode() for header in headers],
        )
        try:
            self._call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
            return self._output("CUBIN", program)
        except RuntimeError as error:
            log = self._output("ProgramLog", program).decode(errors="replace").strip("\0")
            raise _failure(name, options, self.version, log or str(error)) from error
        finally:
            self._call("nvrtcDestroyProgram", program)


@functools.cache
def _compiler() -> _Compiler:
    for kind in (_CupyCompiler, _BindingsCompiler):
        # Either package may be there without the library that it loads.
        with contextlib.suppress(ImportError, RuntimeError, OSError):
            return kind()
    raise UnsupportedError("NVRTC, the CUDA compiler, was not found; pip install 'tenpak[cuda13]' (or cuda12)")


def source(name: str) -> str:
    """The text of a CUDA source: from `TENPAK_CUDA_DIR` where that is set, or as it was built into the package."""
    folder = os.environ.get("TENPAK_CUDA_DIR")
    if not folder:
        return _core.cuda_source(name)
    try:
        return (Path(folder) / name).read_text()
    except OSError as error:
        raise StorageError(f"TENPAK_CUDA_DIR: {error.strerror}: {error.filename}") from error


def options(name: str, defines: Defines, arch: str) -> tuple[str, ...]:
    """What NVRTC is told for a source."""
    tables = table_words(str(defines.get("LAYOUT", "")))
    given = {**defines, **({"LUT16_TABLES": tables} if tables else {})}
    return (
        "-std=c++17",
        f"-arch={arch}",
        "-default-device",
        *(("--fmad=false",) if name in _EXACT else ()),
        *(f"-D{key}={value}" for key, value in sorted(given.items())),
    )


@functools.cache
def table_words(layout: str) -> str:
    """The tables of a layout as sixteen little-endian words, for `LUT16_TABLES`; empty where it has none."""
    entries = bytes(entry & 255 for table in _core.tables(layout) for entry in table)
    return ",".join(f"0x{int.from_bytes(entries[i : i + 4], 'little'):08x}u" for i in range(0, len(entries), 4))


def architecture(name: str, capability: str) -> str:
    """NVRTC's name for a device of that compute capability ("90"), for one source.

    Raises:
        UnsupportedError: The device is older than the kernels' instructions.
    """
    if int(capability) < OLDEST:
        here, needed = (f"{number // 10}.{number % 10}" for number in (int(capability), OLDEST))
        raise UnsupportedError(f"a GPU of compute capability {here} is too old; the kernels need {needed} or newer")
    specific = _SPECIFIC.get(name)
    return specific if specific == f"sm_{capability}a" else f"sm_{capability}"


def compile_to_cubin(name: str, defines: Defines, arch: str) -> bytes:
    """Machine code of a source, from the cache on disk or from NVRTC; needs no GPU.

    Args:
        name: A file of cuda/, such as `pack.cu`.
        defines: Its macros, such as `{"LAYOUT": "int4_g32_fp16"}`.
        arch: NVRTC's architecture: `sm_80`, `sm_90`, `sm_90a`, `sm_120`, …

    Raises:
        UnsupportedError: There is no NVRTC, or it does not know the architecture.
        TenpakError: The source does not compile; the text is NVRTC's log.
    """
    folder = os.environ.get("TENPAK_CUBIN_DIR")
    if folder:
        with contextlib.suppress(FileNotFoundError):
            return (Path(folder) / ahead_name(name, defines, arch)).read_bytes()
    text, includes = source(name), headers(name)
    told = options(name, defines, arch)
    compiler = _compiler()
    kept = _cache_file(name, [compiler.version, *told, text, *(part for item in includes.items() for part in item)])
    if kept is not None and (cubin := _read(kept)) is not None:
        return cubin
    cubin = compiler.compile(name, text, includes, told)
    if kept is not None:
        _write(kept, cubin)
    return cubin


def function(name: str, kernel: str, defines: Defines, device: int) -> Any:
    """A kernel on a device, called as CuPy's functions are: grid, block, arguments, bytes of shared memory, stream.

    It may use all the shared memory that the device gives a block. Kept for each device: later calls only look it up.
    Inside `tenpak.cuda.launch.overlapping` its launches may begin before those before them have ended, if it can wait.
    """
    return _function(name, kernel, tuple(sorted(defines.items())), device)


@functools.cache
def _function(name: str, kernel: str, defines: tuple[tuple[str, object], ...], device: int) -> Any:
    import cupy

    here = cupy.cuda.Device(device)
    cubin = compile_to_cubin(name, dict(defines), architecture(name, here.compute_capability))
    with here:
        module = cupy.cuda.function.Module()
        module.load(cubin)
        loaded = module.get_function(kernel)
        driver = cupy.cuda.driver
        static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, loaded.ptr)
        most = here.attributes["MaxSharedMemoryPerBlockOptin"] - static
        driver.funcSetAttribute(loaded.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most)
    waits = name in _WAITING or ("OVERLAP", 1) in defines
    return Kernel(loaded) if waits and int(here.compute_capability) >= _OVERLAPS_FROM else loaded


def ahead_name(name: str, defines: Defines, arch: str) -> str:
    """What a kernel's machine code is called in `TENPAK_CUBIN_DIR`: by all that it is made of but the compiler."""
    parts = [*options(name, defines, arch), source(name), *(part for item in headers(name).items() for part in item)]
    return f"{Path(name).stem}-{arch}-{_digest(parts)}.cubin"


def headers(name: str) -> dict[str, str]:
    """The headers that a source includes, and those that they include, by name."""
    found: dict[str, str] = {}
    waiting = _INCLUDE.findall(source(name))
    while waiting:
        header = waiting.pop()
        if header not in found:
            found[header] = source(header)
            waiting += _INCLUDE.findall(found[header])
    return dict(sorted(found.items()))


def _failure(name: str, told: tuple[str, ...], version: str, log: str) -> TenpakError:
    arch = next(option for option in told if option.startswith("-arch"))
    if "arch" in log and "invalid value" in log:
        return UnsupportedError(f"NVRTC {version} does not know {arch[6:]}; install a newer one: tenpak[cuda13]")
    return TenpakError(f"cuda/{name} does not compile with {' '.join(told)} under NVRTC {version}: {log.strip()}")


def _cache_file(name: str, parts: list[str]) -> Path | None:
    folder = os.environ.get("TENPAK_CACHE_DIR")
    if folder == "":
        return None
    if folder is None:
        try:
            base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # no home
            return None
        folder = os.fspath(Path(base) / "tenpak")
    return Path(folder) / f"{Path(name).stem}-{_digest(parts)}.cubin"


def _digest(parts: list[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=20).hexdigest()


def _read(path: Path) -> bytes | None:
    """What `_write` has written, or None where it is missing or damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, cubin = stored[:32], stored[32:]
    return cubin if hashlib.blake2b(cubin, digest_size=32).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    """Keeps machine code, all of it or none; a cache that cannot be written is one that is not there."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.blake2b(cubin, digest_size=32).digest() + cubin)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
