"""tenpak calibrate: gather statistics of the layers' inputs, for compress --calibration.

examples:
  tenpak calibrate model-folder --self --output statistics.safetensors
  tenpak calibrate model-folder --text book.txt --output statistics.safetensors
  tenpak calibrate model-folder --text book.txt --windows 128 --sequential int4_lut16_v1 --output statistics.safetensors
  tenpak compress --input model-folder --output model.tenpak --calibration statistics.safetensors

The text should be of the kind that the model will be used for; --self needs none, since the model samples its own.
Half of the windows also go backwards through the model, to weigh tokens and outputs by how much they matter;
--inputs-only leaves that out, in half the time and less memory, but codes are then chosen less well.
Statistics serve every codec and both encoders, but those of --sequential, which are of inputs only, just the codec that
they name. --diagonal keeps mean squares of inputs alone: small, and enough for --encoder diag. Models are those that
`tenpak eval` reads; `tenpak.torch.collect_statistics` gathers from any other, in PyTorch, of inputs only.
The file also holds 4,096 tokens of the text, with which `compress` shrinks the gains of norms.
"""

from __future__ import annotations

import argparse

import tenpak
from tenpak.cli import learning, progress
from tenpak.cli.table import count, duration, pairs, print_json, size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    codecs = [codec.name for codec in tenpak.codecs()]
    parser.add_argument("model", metavar="MODEL", help="the original, not quantised")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="the .safetensors file to write")
    learning.add_arguments(parser, sampler="model", seed="sampling")
    parser.add_argument("--diagonal", action="store_true", help="mean squares alone, for --encoder diag")
    parser.add_argument("--inputs-only", action="store_true", help="no gradients at outputs")
    parser.add_argument(
        "--sequential",
        choices=codecs,
        metavar="CODEC",
        help="gather each layer's statistics with the layers before it quantised under this codec",
    )
    parser.add_argument("--encoder", choices=("gptq", "diag"), default="gptq", help="for --sequential (%(default)s)")
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with progress.Stages(arguments) as stages:
        report = tenpak.calibrate(
            arguments.model,
            arguments.output,
            learning.text_of(arguments),
            windows=arguments.windows,
            context=arguments.context,
            seed=arguments.seed,
            diagonal=arguments.diagonal,
            gradients=not arguments.inputs_only,
            sequential=arguments.sequential,
            encoder=arguments.encoder,
            device=arguments.device,
            force=arguments.force,
            progress=stages,
        )
    if arguments.json:
        print_json({"output": arguments.output, **report.to_dict()})
        return
    tokens = report.windows * report.context
    text = "sampled by the model" if report.text == "sampled" else report.text
    rows = [
        ("model", report.model),
        ("text", f"{text}, {count(report.windows)} windows of {count(report.context)} tokens"),
        ("inputs", f"{count(report.inputs)}, read by {count(report.weights)} weights"),
        ("time", f"{duration(report.seconds)}, {count(round(tokens / report.seconds))} tokens/s on {report.device}"),
        ("written", f"{arguments.output}, {size(report.file_bytes)}"),
    ]
    if report.sequential is not None:
        rows.insert(3, ("layers before", f"quantised under {report.sequential}"))
    print(pairs(rows))
