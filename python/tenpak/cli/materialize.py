"""tenpak materialize: restore a fine-tune from its base and a delta.

examples:
  tenpak materialize --base base-folder --delta tuned-delta.tenpak --output tuned-folder
  tenpak materialize --base base.tenpak --delta tuned-delta.tenpak --output tuned.tenpak
  tenpak materialize --base base-folder --delta first-delta.tenpak second-delta.tenpak --output next.safetensors

The base must be the one that the delta was made from; its digest is compared first, and the result's at the end. The
output's name decides: .tenpak is an artifact (from deltas of mode codes alone), .json a JSON bundle, .safetensors one
file, anything else a Hugging Face folder with config and tokenizer.
"""

from __future__ import annotations

import argparse
import sys

import tenpak
from tenpak.cli import progress
from tenpak.cli.decompress import parse_size
from tenpak.cli.table import count, duration, pairs, print_json, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", "-b", required=True, nargs="+", action="extend", metavar="BASE", help="what the delta was made from"
    )
    parser.add_argument(
        "--delta",
        "-d",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="the deltas, the innermost first",
    )
    parser.add_argument("--output", "-o", required=True, metavar="MODEL", help="what to write")
    parser.add_argument(
        "--format", choices=["tenpak", "json", "safetensors", "folder"], help="where the name does not say"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a folder's weight files, such as 2GB (5GB)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (all cores)")
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with progress.ProgressLine("restoring", arguments, 2) as line:
        report = tenpak.materialize(
            arguments.base,
            arguments.delta,
            arguments.output,
            format=arguments.format,
            threads=arguments.threads,
            force=arguments.force,
            shard_bytes=parse_size(arguments.max_shard_size),
            progress=line,
        )
    if report.files_left_out and not arguments.quiet:
        left_out = ", ".join(report.files_left_out)
        print(f"note: {report.format} has no place for {left_out}; a folder has", file=sys.stderr)
    if arguments.json:
        print_json({"output": arguments.output, **report.to_dict()})
        return
    rows = [
        ("restored", f"{count(report.tensors)} tensors, {count(report.weights)} weights, {size(report.bytes)}"),
        ("result", f"{report.result}, checked"),
        ("time", f"{duration(report.seconds)}, {report.gigabytes_per_second:.2f} GB/s"),
        ("written", f"{arguments.output} ({report.format})"),
    ]
    if report.files:
        rows.insert(1, ("with", ", ".join(report.files)))
    print(pairs(rows))
