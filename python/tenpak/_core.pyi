# The extension's interface; `python -m mypy.stubtest tenpak._core` checks it against what was built.
from collections.abc import Callable
from typing import Any, final

from typing_extensions import Buffer

__version__: str

@final
class ArtifactFile:
    def __new__(cls, path: str) -> ArtifactFile: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def index(self) -> str: ...
    def resolve(self, name: str) -> str: ...
    def decode(self, name: str, dtype: str, threads: int, out: Buffer) -> None: ...
    def check(self, name: str, part: str | None) -> None: ...
    def verify(self, progress: Callable[[int, int], object] | None) -> tuple[int, int, int, int]: ...

def codecs() -> list[dict[str, Any]]: ...
def simd() -> tuple[str, list[str]]: ...
def exit_codes() -> list[tuple[str, int]]: ...
def output_format(path: str) -> str: ...
def part_shapes(codec: str, shape: list[int], axis: int) -> list[tuple[str, str, int, int]]: ...
def encode(
    data: Buffer,
    dtype: str,
    shape: list[int],
    axis: int,
    codec: str,
    importance: list[float] | None,
    measure: bool,
    threads: int,
    parts: list[Buffer],
) -> tuple[int, float, float]: ...
def decode(
    codec: str,
    exponent: int,
    shape: list[int],
    axis: int,
    parts: list[Buffer],
    dtype: str,
    threads: int,
    out: Buffer,
) -> None: ...
def compress(
    source: str | list[tuple[str, str, list[int], Buffer]],
    target: str,
    codec: str,
    embeddings: str,
    rules: list[tuple[str, str]],
    axes: list[tuple[str, int]],
    threads: int,
    force: bool,
    strict: bool,
    dry_run: bool,
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
