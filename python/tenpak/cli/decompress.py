"""tenpak decompress: restore a model from a .tenpak file.

examples:
  tenpak decompress --input model.tenpak --output model-folder
  tenpak decompress --input model.tenpak --output model.safetensors --dtype F16
  tenpak decompress --input model.tenpak --output model.json

The output's name decides: .json is a JSON bundle, .safetensors one file, anything else a Hugging Face folder
with config and tokenizer, which transformers loads.
"""

from __future__ import annotations

import argparse
import sys

import tenpak
from tenpak.cli import progress
from tenpak.cli.table import count, duration, pairs, print_json, size
from tenpak.errors import UsageError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", "-i", required=True, metavar="FILE", help="the .tenpak file")
    parser.add_argument("--output", "-o", required=True, metavar="MODEL", help="what to write")
    parser.add_argument("--format", choices=["json", "safetensors", "folder"], help="where the name does not say")
    parser.add_argument("--dtype", choices=["F32", "F16", "BF16"], help="for all weights (each tensor's own)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a folder's weight files, such as 2GB (5GB)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that decode (all cores)")
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with progress.ProgressLine("restoring", arguments) as line:
        report = tenpak.decompress(
            arguments.input,
            arguments.output,
            format=arguments.format,
            dtype=arguments.dtype,
            threads=arguments.threads,
            force=arguments.force,
            shard_bytes=parse_size(arguments.max_shard_size),
            progress=line,
        )
    if report.files_left_out and not arguments.quiet:
        left_out = ", ".join(report.files_left_out)
        print(f"note: {report.format} has no place for {left_out}; a folder has", file=sys.stderr)
    if arguments.json:
        print_json({"input": arguments.input, "output": arguments.output, **report.to_dict()})
        return
    rows = [
        ("restored", f"{count(report.tensors)} tensors, {count(report.weights)} weights, {size(report.bytes)}"),
        ("time", f"{duration(report.seconds)}, {report.gigabytes_per_second:.2f} GB/s as FP32"),
        ("written", f"{arguments.output} ({report.format})"),
    ]
    if report.files:
        rows.insert(1, ("with", ", ".join(report.files)))
    print(pairs(rows))


def parse_size(text: str | None) -> int | None:
    """The bytes that --max-shard-size asks for."""
    if text is None:
        return None
    unit = _UNITS.get(text[-2:].upper(), 0)
    digits = text[:-2] if unit else text
    if not digits.strip().isdecimal() or int(digits) == 0:
        raise UsageError(f"--max-shard-size {text!r}: write a number of bytes, or one with KB, MB or GB")
    return int(digits) * (unit or 1)
