"""Tables and numbers for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    out = []
    for n, line in enumerate(lines):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        out.append("  ".join(cells).rstrip())
        if n == 0:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def print_json(value: Any) -> None:
    """One JSON object on standard output, in UTF-8 or in ASCII: what no encoding has is escaped as JSON does."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding if sys.stdout.encoding.lower() == "utf-8" else "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def count(n: int) -> str:
    """An integer with thousands separated."""
    return f"{n:,}"


def size(n: float) -> str:
    """Bytes in the unit that people would use."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def number(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}x"


def error(value: float | None) -> str:
    """A relative squared error."""
    return "-" if value is None else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _is_number(cell: str) -> bool:
    return bool(cell) and (cell[0].isdigit() or cell[0] in "-±")
