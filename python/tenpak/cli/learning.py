"""The options of commands that learn from a text, a user's or the model's own: which text, and how much of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from tenpak.calibrate import SAMPLED_WINDOWS, WINDOWS


def add_arguments(parser: argparse.ArgumentParser, *, sampler: str, seed: str) -> None:
    """`--text` or `--self`, `--windows`, `--context`, `--seed` and `--device`.

    Args:
        sampler: Who samples its own text.
        seed: What the seed is for.
    """
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", "-t", metavar="FILE", help="a UTF-8 text")
    text.add_argument("--self", action="store_true", dest="sampled", help=f"text that the {sampler} samples itself")
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help=f"windows to use, spread over the text, or to sample ({WINDOWS}, or {SAMPLED_WINDOWS} with --self)",
    )
    parser.add_argument("--context", type=int, metavar="N", help="tokens in a window (1024, or the model's most)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"for {seed} (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")


def text_of(arguments: argparse.Namespace) -> Path | None:
    """The text's file, or None where the model samples its own."""
    return None if arguments.sampled else Path(arguments.text)
