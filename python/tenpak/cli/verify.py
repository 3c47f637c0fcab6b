"""tenpak verify: check every byte of .tenpak files.

examples:
  tenpak verify model.tenpak
  tenpak verify *.tenpak --json

Frames, sizes, padding, both checksums of every part, and the root digest. Exit code 4 for the first damaged file.
"""

from __future__ import annotations

import argparse
import time

import tenpak
from tenpak.cli import progress
from tenpak.cli.table import count, duration, print_json, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="the .tenpak files")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    results = []
    for path in arguments.files:
        start = time.monotonic()
        with tenpak.open(path) as artifact, progress.ProgressLine("verifying", arguments, 1) as line:
            checked = artifact.verify(line)
            seconds = time.monotonic() - start
            results.append({"file": path, "bytes": checked, "root": artifact.root, "seconds": seconds})
            if not arguments.json:
                tensors = count(len(artifact.tensors))
                print(f"{path}: sound; {tensors} tensors, {size(checked)} checked in {duration(seconds)}")
    if arguments.json:
        print_json({"files": results})
