"""tenpak eval: measure perplexity on a text, and how far a model has moved from the original.

examples:
  tenpak eval model.tenpak --text book.txt
  tenpak eval model.tenpak --text book.txt --against model-folder
  tenpak eval model-folder --text book.txt --context 512 --windows 16 --json
  tenpak eval model.tenpak --text book.txt --kv int4

The model is a .tenpak or .gguf file, a Hugging Face folder, or a .safetensors file with config.json beside it, of the
GPT-2, Llama, Mistral, Qwen2 or Qwen3 kind; it is computed in FP32. The text is cut into windows of --context tokens,
each predicted without those before it. ± is the standard error over windows; that of the change in perplexity compares
window with window. KL divergence is KL(original || model), in nats per position. --kv reads keys and values from a
quantised cache at every position, as generation does, and compares with an FP16 cache unless --against is given. With
--device wgpu the quantised layers of a .tenpak run on any GPU that Vulkan, Metal or DX12 reach, the rest on the CPU.

exit codes: 0 done; 2 a wrong request, a text too short, a package that is missing; 3 a model or text that cannot be
read; 4 a damaged artifact; 5 a kind of model that cannot be run; 6 the file system refused; 130 interrupted
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tenpak
from tenpak.cli import progress
from tenpak.cli.table import count, duration, pairs, print_json
from tenpak.decoder.kv import KV_TYPES
from tenpak.evaluate import EvalReport, Mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="what to measure")
    parser.add_argument("--text", "-t", required=True, metavar="FILE", help="a UTF-8 text that it has not seen")
    parser.add_argument("--against", "-a", metavar="ORIGINAL", help="the model it was made from")
    parser.add_argument("--context", type=int, metavar="N", help="tokens in a window (1024, or the model's most)")
    parser.add_argument("--windows", type=int, metavar="N", help="the most windows to use, from the start (all)")
    parser.add_argument("--batch", type=int, metavar="N", help="windows computed at once (1 on the CPU, 8 elsewhere)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "wgpu"), default="cpu", help="where to compute (%(default)s)"
    )
    parser.add_argument("--kv", choices=KV_TYPES, help="read keys and values from a cache of that kind (FP32)")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    with progress.ProgressLine("evaluating", arguments, amount=lambda n: f"{count(round(n))} tokens") as line:
        report = tenpak.evaluate(
            arguments.model,
            Path(arguments.text),
            against=arguments.against,
            context=arguments.context,
            windows=arguments.windows,
            device=arguments.device,
            batch=arguments.batch,
            kv=arguments.kv,
            progress=line,
        )
    if arguments.json:
        print_json({"text": arguments.text, **report.to_dict()})
    else:
        print(_text(report, arguments.text))


def _text(report: EvalReport, text: str) -> str:
    rows = [
        ("model", _with_cache(report.model, report.kv)),
        ("text", f"{text}, {count(report.windows)} windows of {count(report.context)} tokens"),
        ("perplexity", _plus_minus(report.perplexity, 3)),
    ]
    if (against := report.comparison) is not None:
        top1 = Mean(100 * against.top1.value, None if against.top1.error is None else 100 * against.top1.error)
        rows += [
            ("original", _with_cache(against.original, against.kv)),
            ("original's perplexity", _plus_minus(against.perplexity, 3)),
            ("change in perplexity", _plus_minus(against.change, 3, "%", sign=True)),
            ("KL divergence", _plus_minus(against.divergence, 6, " nats")),
            ("same most likely token", _plus_minus(top1, 2, "%")),
        ]
    speed = f"{duration(report.seconds)}, {count(round(report.tokens_per_second))} tokens/s on {report.device}"
    return pairs([*rows, ("time", speed)])


def _with_cache(path: str, kv: str | None) -> str:
    return path if kv is None else f"{path}, {kv} cache"


def _plus_minus(mean: Mean, digits: int, unit: str = "", sign: bool = False) -> str:
    text = f"{mean.value:{'+' if sign else ''}.{digits}f}{unit}"
    return text if mean.error is None else f"{text} ± {mean.error:.{digits}f}"
