"""The codec table, as the core declares it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tenpak import _core
from tenpak.errors import UsageError


@dataclass(frozen=True)
class PartInfo:
    """One array of a layout."""

    #: The name in artifacts: `codes`, `scales`, …
    name: str
    #: Element type, as safetensors names it.
    dtype: str
    #: How many there are, for people.
    count: str


@dataclass(frozen=True)
class CodecInfo:
    """One row of the table."""

    name: str
    version: int
    #: When to choose it.
    summary: str
    #: The bytes that are stored, by name.
    layout: str
    #: How codes are chosen: `min/max`, `search`, `nearest`.
    encoder: str
    #: Weights that share parameters; None where that is a whole row.
    group: int | None
    code_bits: int
    #: Bits per weight in long rows.
    bits_per_weight: float
    #: Whether each row stores a few bytes more.
    row_parameters: bool
    #: The rebuilt weight, as a formula.
    rebuild: str
    parts: tuple[PartInfo, ...]

    @property
    def compression(self) -> float:
        """How much smaller than FP32, in long rows."""
        return 32 / self.bits_per_weight


@cache
def _table() -> tuple[CodecInfo, ...]:
    return tuple(CodecInfo(**{**row, "parts": tuple(PartInfo(*p) for p in row["parts"])}) for row in _core.codecs())


def codecs() -> list[CodecInfo]:
    """Every codec, in the order that people read them."""
    return list(_table())


def find(name: str) -> CodecInfo:
    """The codec of that name; `UsageError` lists the names there are."""
    for codec in _table():
        if codec.name == name:
            return codec
    raise UsageError(f"unknown codec {name!r}; choose one of {', '.join(c.name for c in _table())}")
