"""tenpak tune: move an artifact's scales, offsets and norms until the whole model is nearer to its original.

examples:
  tenpak tune model.tenpak --against model-folder --text book.txt --output tuned.tenpak
  tenpak tune model.tenpak --against model-folder --self --output tuned.tenpak --device cuda

Encoders look at one layer at a time. Tuning lets text through the original and the artifact and lowers the divergence
between the two: codes stay, what they are rebuilt with moves (scales and offsets of the FP16 layouts, super-scales of
those with tables, the gains of norms under every layout), and so sizes, speed and format stay too. An eighth of the
text is not learned from and says whether it has helped; if not, the output is what the artifact was.

It comes after `compress`, best of all after `compress --calibration`, and wants the same text. An epoch takes as long
as some five passes of the text through the model, on a CPU minutes for small ones. The artifact's weights are in memory
in FP32.
"""

from __future__ import annotations

import argparse

import tenpak
from tenpak.cli import learning, progress
from tenpak.cli.table import count, duration, pairs, print_json, size
from tenpak.tune import EPOCHS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="FILE", help="the .tenpak to tune")
    parser.add_argument("--against", "-a", required=True, metavar="MODEL", help="the original that it was made from")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="the .tenpak file to write")
    learning.add_arguments(parser, sampler="original", seed="sampling and the order")
    parser.add_argument(
        "--epochs", type=int, default=EPOCHS, metavar="N", help="how often each window is learned from (%(default)s)"
    )
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with progress.Stages(arguments) as stages:
        report = tenpak.tune(
            arguments.artifact,
            arguments.output,
            arguments.against,
            learning.text_of(arguments),
            windows=arguments.windows,
            context=arguments.context,
            epochs=arguments.epochs,
            seed=arguments.seed,
            device=arguments.device,
            force=arguments.force,
            progress=stages,
        )
    if arguments.json:
        print_json({"output": arguments.output, **report.to_dict()})
        return
    text = "sampled by the original" if report.text == "sampled" else report.text
    change = (
        f"{1e3 * report.divergence_before:.3f}e-3 -> {1e3 * report.divergence:.3f}e-3 nats on text not learned from"
    )
    rows = [
        ("artifact", report.artifact),
        ("original", report.original),
        ("text", f"{text}, {count(report.windows)} windows of {count(report.context)} tokens, {report.epochs} times"),
        ("moved", f"{count(report.moved)} numbers" if report.better else "nothing: it would not have become better"),
        ("KL divergence", change),
        ("time", f"{duration(report.seconds)} on {report.device}"),
        ("written", f"{arguments.output}, {size(report.file_bytes)}"),
        ("root", report.root),
    ]
    print(pairs(rows))
