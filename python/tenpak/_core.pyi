# The extension's interface; `python -m mypy.stubtest tenpak._core` checks it against what was built.
from collections.abc import Callable, Sequence
from typing import Any, final

from numpy.typing import NDArray

__all__ = [
    "ArtifactFile",
    "DeltaModel",
    "Model",
    "WgpuContext",
    "WgpuWeight",
    "__version__",
    "codecs",
    "compress",
    "cuda_source",
    "decode",
    "decompress",
    "encode",
    "exit_codes",
    "exponent",
    "make_delta",
    "materialize",
    "output_format",
    "part_shapes",
    "replace_parts",
    "simd",
    "tables",
    "wgpu_adapters",
]
__version__: str
_Buffer = bytes | bytearray | memoryview | NDArray[Any]

@final
class ArtifactFile:
    def __new__(cls, path: str) -> ArtifactFile: ...
    # Also a read-only buffer over the file; stubs can say that only from Python 3.12 on.
    def index(self) -> str: ...
    def resolve(self, name: str) -> str: ...
    def decode(self, name: str, dtype: str, threads: int, out: _Buffer) -> None: ...
    def check(self, name: str, part: str | None) -> None: ...
    def chunk_kinds(self, name: str) -> list[tuple[str, int, int]]: ...
    def verify(self, progress: Callable[[int, int], object] | None) -> tuple[int, int, int, int]: ...

@final
class DeltaModel:
    def __new__(cls, paths: Sequence[str]) -> DeltaModel: ...
    def identity(self) -> str: ...
    def tensors(self) -> list[tuple[str, list[int], str]]: ...
    def read(self, name: str, threads: int, out: _Buffer) -> None: ...
    def files(self) -> list[tuple[str, bytes]]: ...

@final
class Model:
    def __new__(cls, path: str) -> Model: ...
    def format(self) -> str: ...
    def tensors(self) -> list[tuple[str, list[int], str]]: ...
    def read(self, name: str, threads: int, out: _Buffer) -> None: ...
    def notes(self) -> list[str]: ...
    def config(self) -> str | None: ...
    def digest(self) -> str: ...
    def sidecar(self, path: str) -> bytes | None: ...

@final
class WgpuContext:
    def __new__(
        cls, adapter: str | None, low_power: bool, full_precision: bool, binding_bytes: int | None
    ) -> WgpuContext: ...
    def adapter(self) -> dict[str, Any]: ...
    def weight(self, codec: str, parts: Sequence[_Buffer], rows: int, cols: int, exponent: int) -> WgpuWeight: ...
    def matmul(self, products: Sequence[tuple[_Buffer, int, WgpuWeight]], outs: Sequence[_Buffer]) -> None: ...
    def time(self, weights: Sequence[WgpuWeight], tokens: int, rounds: int) -> list[float]: ...

@final
class WgpuWeight:
    def nbytes(self) -> int: ...
    def slabs(self) -> int: ...

def codecs() -> list[dict[str, Any]]: ...
def simd() -> tuple[str, list[str]]: ...
def wgpu_adapters() -> list[dict[str, Any]]: ...
def exit_codes() -> list[tuple[str, int]]: ...
def output_format(path: str) -> str: ...
def cuda_source(name: str) -> str: ...
def tables(layout: str) -> list[list[int]]: ...
def exponent(codec: str, largest: float) -> int: ...
def part_shapes(codec: str, shape: list[int], axis: int) -> list[tuple[str, str, int, int]]: ...
def replace_parts(
    source: str, target: str, parts: Sequence[tuple[str, str, _Buffer]], force: bool
) -> tuple[str, int]: ...
def encode(
    data: _Buffer,
    dtype: str,
    shape: list[int],
    axis: int,
    codec: str,
    importance: list[float] | None,
    second_moment: _Buffer | None,
    output_moment: _Buffer | None,
    tokens: int | None,
    measure: bool,
    threads: int,
    parts: Sequence[_Buffer],
) -> tuple[int, float, float, tuple[float, float, float] | None]: ...
def decode(
    codec: str,
    exponent: int,
    shape: list[int],
    axis: int,
    parts: Sequence[_Buffer],
    dtype: str,
    threads: int,
    out: _Buffer,
) -> None: ...
def compress(
    source: str | list[tuple[str, str, list[int], _Buffer]],
    target: str,
    codec: str,
    embeddings: str,
    rules: list[tuple[str, str]],
    axes: list[tuple[str, int]],
    threads: int,
    force: bool,
    strict: bool,
    dry_run: bool,
    calibration: tuple[str, str] | None,
    estimate: bool,
    progress: Callable[[int, int], object] | None,
) -> str: ...
def make_delta(
    base: Sequence[str],
    source: str | list[tuple[str, str, list[int], _Buffer]],
    target: str,
    mode: str,
    threads: int,
    force: bool,
    progress: Callable[[int, int], object] | None,
) -> str: ...
def materialize(
    paths: Sequence[str],
    target: str,
    format: str | None,
    threads: int,
    force: bool,
    shard_bytes: int | None,
    progress: Callable[[int, int], object] | None,
) -> str: ...
def decompress(
    source: str,
    target: str,
    format: str | None,
    dtype: str | None,
    threads: int,
    force: bool,
    shard_bytes: int | None,
    progress: Callable[[int, int], object] | None,
) -> str: ...
