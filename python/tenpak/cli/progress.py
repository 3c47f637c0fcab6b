"""A line of progress on standard error: how far, how fast, how long yet."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from tenpak.cli.table import duration, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--quiet` and `--progress`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", "-q", action="store_true", help="no progress and no notes on standard error")
    group.add_argument("--progress", action="store_true", help="show progress also where no person is watching")


class ProgressLine:
    """Called with done and total; draws over itself on a terminal, and prints a line now and then elsewhere."""

    def __init__(
        self,
        label: str,
        arguments: argparse.Namespace,
        bytes_per_unit: int = 4,
        amount: Callable[[float], str] | None = None,
    ) -> None:
        """`amount` says how much a number of units is, where that is not bytes."""
        self._terminal = sys.stderr.isatty()
        self._shown = not arguments.quiet and (self._terminal or arguments.progress)
        self._label = label
        self._amount = amount or (lambda units: size(units * bytes_per_unit))
        self._start = time.monotonic()
        self._last = 0.0
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        interval = 0.1 if self._terminal else 2.0
        if not self._shown or (now - self._last < interval and done < total):
            return
        self._last = now
        elapsed = now - self._start
        fraction = done / total if total else 1.0
        line = f"{self._label} {fraction:4.0%}  {self._amount(done)} of {self._amount(total)}"
        if elapsed > 0.2:
            line += f"  {self._amount(done / elapsed)}/s"
        if 0 < done < total and elapsed > 0.5:
            line += f"  {duration(elapsed * (total - done) / done)} left"
        if self._terminal:
            filled = int(fraction * 24)
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {line}"
            sys.stderr.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


class Stages:
    """Called with steps done, in all, and what they are; draws a line for each stage."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._line: ProgressLine | None = None
        self._stage = ""

    def __call__(self, done: int, total: int, stage: str) -> None:
        self._draw(done, total, stage, lambda n: f"{n:.0f} steps")

    def weights(self, stage: str) -> Callable[[int, int], None]:
        """What is called with weights done and in all, for a stage that counts those."""
        return lambda done, total: self._draw(done, total, stage, None)

    def _draw(self, done: int, total: int, stage: str, amount: Callable[[float], str] | None) -> None:
        if self._line is None or stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._line = ProgressLine(stage, self._arguments, amount=amount)
        self._line(done, total)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        if self._line is not None:
            self._line.__exit__()
            self._line = None
