"""What benchmarks share: the machine, timing with spread, and tables with their JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Timing:
    """Seconds of one call: the median of several, and half their range relative to it."""

    median: float
    spread: float


def measure(call: Callable[[], object], runs: int) -> Timing:
    """Times `call`, after one call that is not counted."""
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return Timing(median, (max(times) - min(times)) / 2 / median)


def measure_together(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, Timing]:
    """Times several calls in turn, so that a busy moment of the machine falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(runs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: Timing(statistics.median(t), (max(t) - min(t)) / 2 / statistics.median(t)) for name, t in times.items()
    }


def machine(*packages: str) -> dict[str, Any]:
    """The machine and the versions that a result depends on."""
    cpu = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def report(name: str, about: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Prints a table and writes results/NAME.json."""
    print(f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}")
    print(", ".join(f"{k} {v}" for k, v in about["versions"].items()))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        )
    for note in notes:
        print(note)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": about, "rows": rows, "notes": notes}, indent=1) + "\n")
    print(f"written to {path}")


def updated(name: str, rows: list[dict[str, Any]], *key: str) -> list[dict[str, Any]]:
    """The rows of results/NAME.json with those that have the same values of `key` as new ones replaced, and the rest of
    these appended."""
    found = {tuple(row[k] for k in key): row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}
    found |= {tuple(row[k] for k in key): row for row in rows}
    return list(found.values())


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
