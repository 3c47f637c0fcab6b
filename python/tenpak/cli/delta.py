"""tenpak delta: store a fine-tune as its differences from a base.

examples:
  tenpak delta --base base-folder --input tuned-folder --output tuned-delta.tenpak
  tenpak delta --base base.tenpak --input tuned-folder --output tuned-delta.tenpak --mode codes --text book.txt
  tenpak delta --base base-folder first-delta.tenpak --input next-folder --output second-delta.tenpak

A base is a Hugging Face folder, a .safetensors, .gguf, JSON bundle or .tenpak file; deltas on it may follow, the
innermost first. `tenpak materialize` restores what was put in, and needs the same base.

modes:
  exact  every bit of every tensor and file comes back (the default)
  codes  the base is a .tenpak file: weights are quantised on its own scales, offsets and tables, groups that would
         lose more than 5 % by that afresh; the result is a .tenpak file that runs on the same kernels
  bit1   the sign of each difference and one scale a row, for fine-tunes close to their base
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import tenpak
from tenpak.cli import progress
from tenpak.cli.table import count, duration, error, number, pairs, print_json, size, table
from tenpak.delta import DeltaReport
from tenpak.errors import UsageError
from tenpak.outputs import put_back, refuse_existing

MODES = ("exact", "codes", "bit1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", "-b", required=True, nargs="+", action="extend", metavar="BASE", help="what it was made from"
    )
    parser.add_argument("--input", "-i", required=True, metavar="MODEL", help="the fine-tune")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="the delta to write")
    parser.add_argument("--mode", "-m", choices=MODES, default="exact", help="how to code differences (%(default)s)")
    parser.add_argument("--text", "-t", metavar="FILE", help="also measure the perplexity of what comes back on a text")
    parser.add_argument("--windows", type=int, metavar="N", help="the most windows of the text to use (all)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (all cores)")
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.text is not None and not Path(arguments.text).is_file():
        raise UsageError(f"--text {arguments.text}: there is no such file")
    if arguments.windows is not None and arguments.windows < 1:
        raise UsageError(f"--windows {arguments.windows} is too small; give at least 1")
    # What is measured, once the delta is written, may fail.
    with contextlib.nullcontext() if arguments.text is None else put_back(arguments.output):
        if arguments.text is not None:
            refuse_existing(arguments.output, arguments.force, arguments.text)
        with progress.ProgressLine("comparing", arguments, 2) as line:
            report = tenpak.delta(
                arguments.base,
                arguments.input,
                arguments.output,
                arguments.mode,
                threads=arguments.threads,
                force=arguments.force,
                progress=line,
            )
        measured = _perplexities(arguments) if arguments.text is not None else {}
    if arguments.json:
        found = {"perplexity": measured} if measured else {}
        print_json({"output": arguments.output, **report.to_dict(), **found})
    else:
        print(_text(report, arguments.output, measured))


def _perplexities(arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity of the fine-tune, of what the delta gives, and, in mode codes, of quantising it afresh."""

    def perplexity(model: str | Path) -> float:
        with progress.ProgressLine("evaluating", arguments, amount=lambda n: f"{count(round(n))} tokens") as line:
            found = tenpak.evaluate(str(model), Path(arguments.text), windows=arguments.windows, progress=line)
        return found.perplexity.value

    with tempfile.TemporaryDirectory(prefix="tenpak-") as folder:
        restored = Path(folder) / ("restored.tenpak" if arguments.mode == "codes" else "restored")
        tenpak.materialize(arguments.base, arguments.output, restored)
        measured = {"fine-tune": perplexity(arguments.input), "from the delta": perplexity(restored)}
        if arguments.mode == "codes":
            fresh = Path(folder) / "fresh.tenpak"
            with tenpak.open(restored) as artifact:
                rules = [(f"^{_literal(info.name)}$", info.codec) for info in artifact.infos]
                tenpak.compress(arguments.input, fresh, artifact.codec, rules=rules)
            measured["quantised afresh"] = perplexity(fresh)
    return measured


def _literal(name: str) -> str:
    """A regular expression of the core that matches one name."""
    return "".join(c if c.isalnum() or c == "_" else f"\\{c}" if c.isascii() else c for c in name)


def _text(report: DeltaReport, output: str, measured: dict[str, float]) -> str:
    methods = [
        [
            m.method,
            count(m.tensors),
            count(m.weights),
            f"{100 * m.changed / m.weights:.2f} %" if m.weights else "-",
            size(m.bytes),
            number(8 * m.bytes / m.weights if m.weights else None),
        ]
        for m in report.methods
    ]
    rows: list[tuple[str, Any]] = [
        (
            "delta",
            f"{size(report.file_bytes)}, {100 * report.ratio:.2f} % of the fine-tune's {size(report.input_bytes)}",
        ),
        ("bits/weight", number(report.bits_per_weight)),
    ]
    if report.mode == "codes":
        fresh = sum(t.fresh_groups or 0 for t in report.tensors)
        groups = sum(t.groups or 0 for t in report.tensors)
        rows.append(("groups afresh", f"{count(fresh)} of {count(groups)}"))
    if report.relative_error is not None:
        rows.append(("relative squared error", error(report.relative_error)))
    if report.change_lost is not None:
        rows.append(("of the change lost", f"{100 * report.change_lost:.1f} % of its squared norm"))
    if report.removed:
        rows.append(("left out of the base", ", ".join(report.removed)))
    rows += [(f"perplexity, {name}", number(value)) for name, value in measured.items()]
    rows += [
        ("time", f"{duration(report.seconds)}, {report.gigabytes_per_second:.2f} GB/s"),
        ("written", output),
        ("base", report.base),
        ("result", report.result),
    ]
    header = ["method", "tensors", "weights", "changed", "bytes", "bits/weight"]
    return table(header, methods) + "\n\n" + pairs(rows)
