"""tenpak compress: turn a model into one .tenpak file.

examples:
  tenpak compress --input model-folder --output model.tenpak
  tenpak compress --input model.gguf --output model.tenpak --codec int4_lut16_v1
  tenpak compress --input model-folder --output model.tenpak --codec int4_lut16_v1 --calibration self
  tenpak compress --input model-folder --output model.tenpak --dry-run
  tenpak compress --input model-folder --output model.tenpak \\
      --rule 'down_proj=int4_opt_llama_v1' --rule 'layers\\.0\\.=keep' --embeddings keep

The input is a Hugging Face folder, a .safetensors, .gguf or JSON bundle file. Weights of linear layers get
--codec, embeddings and output heads --embeddings, norms and biases are kept; the first --rule that matches a
tensor's name overrides all of that. `tenpak codecs` lists the codecs.

With --calibration, four-bit codes are chosen so that the layers' outputs change least: by the statistics that
`tenpak calibrate` has gathered, or (self) from text that the model samples itself, which takes minutes. Last, some
of that text goes through both models, and norms' gains shrink by what the noise of quantised weights has added.
"""

from __future__ import annotations

import argparse
import sys

import tenpak
from tenpak.artifact import KEEP
from tenpak.cli import progress
from tenpak.cli.table import count, duration, error, number, pairs, print_json, size, table, times
from tenpak.errors import UsageError
from tenpak.models import CompressReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [codec.name for codec in tenpak.codecs()]
    parser.add_argument("--input", "-i", required=True, metavar="MODEL", help="what to compress")
    parser.add_argument("--output", "-o", required=True, metavar="FILE", help="the .tenpak file to write")
    parser.add_argument(
        "--codec", "-c", default=names[0], metavar="NAME", help=f"for linear layers: {', '.join(names)} (%(default)s)"
    )
    parser.add_argument(
        "--embeddings",
        default="int8_sym_v1",
        metavar="NAME",
        help="for embeddings and heads: a codec or keep (%(default)s)",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=CODEC",
        help="a codec, or keep, for tensors whose names match; repeatable, the first match wins",
    )
    parser.add_argument(
        "--input-axis",
        action="append",
        default=[],
        metavar="REGEX=AXIS",
        help="the input dimension of tensors whose names match, where it is not what the model's kind says",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE|self|none",
        help="statistics of `tenpak calibrate`; self gathers them from text that the model samples; none does not "
        "even estimate them from the weights",
    )
    parser.add_argument(
        "--encoder",
        choices=("gptq", "diag"),
        default="gptq",
        help="what to do with the statistics: gptq loses least, diag is faster (%(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the model runs for --calibration; encoding is the CPU's (%(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads that encode (all cores)")
    parser.add_argument("--dry-run", action="store_true", help="decide, and show exact sizes, but write nothing")
    parser.add_argument("--strict", action="store_true", help="refuse to leave out a weight that no rule asks to keep")
    parser.add_argument("--force", "-f", action="store_true", help="replace an existing output")
    parser.add_argument("--tensors", action="store_true", help="list every tensor in the report")
    progress.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    rules = [_pair("--rule", rule) for rule in arguments.rule]
    axes = [(pattern, _axis(text)) for pattern, text in (_pair("--input-axis", a) for a in arguments.input_axis)]
    with progress.Stages(arguments) as stages:
        report = tenpak.compress(
            arguments.input,
            arguments.output,
            arguments.codec,
            embeddings=arguments.embeddings,
            rules=rules,
            input_axes=axes,
            threads=arguments.threads,
            force=arguments.force,
            strict=arguments.strict,
            dry_run=arguments.dry_run,
            calibration=arguments.calibration,
            encoder=arguments.encoder,
            device=arguments.device,
            progress=stages.weights("looking" if arguments.dry_run else "compressing"),
            stages=stages,
        )
    if not arguments.quiet:
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        print_json({"input": arguments.input, "output": arguments.output, **report.to_dict()})
    else:
        print(_text(report, arguments))


def _text(report: CompressReport, arguments: argparse.Namespace) -> str:
    quantised = [g for g in report.groups if g.codec not in (KEEP, "alias")]
    rows = [
        [
            g.codec if g.reason is None else f"{g.codec}: {g.reason}",
            count(g.tensors),
            count(g.weights),
            size(g.bytes),
            number(g.bits_per_weight),
            error(g.relative_error),
        ]
        for g in report.groups
    ]
    blocks = []
    if arguments.tensors:
        blocks.append(
            table(
                ["tensor", "shape", "from", "to", "encoder", "bits/weight", "error", "output error"],
                [
                    [
                        t.name,
                        " x ".join(map(str, t.shape)),
                        t.source,
                        t.codec if t.reason is None else f"{t.codec}: {t.reason}",
                        (t.encoder or "") if t.uncalibrated is None else f"{t.encoder} ({t.uncalibrated})",
                        number(8 * t.bytes / t.weights if t.weights and t.codec != "alias" else None),
                        error(t.relative_error),
                        error(t.output_error),
                    ]
                    for t in report.tensors
                ],
            )
        )
    blocks.append(table(["codec", "tensors", "weights", "bytes", "bits/weight", "error"], rows))
    tensors, bits = sum(g.tensors for g in quantised), report.quantised_bits_per_weight
    smaller = f", {times(32 / bits)} smaller than FP32, {times(16 / bits)} than FP16" if bits else ""
    whole = f", {times(report.compression_fp32)} smaller than FP32, {times(report.compression_fp16)} than FP16"
    summary = [
        ("quantised", f"{count(tensors)} tensors, {number(bits)} bits/weight{smaller}"),
        ("whole file", f"{size(report.file_bytes)}, {number(report.file_bits_per_weight)} bits/weight{whole}"),
    ]
    if report.relative_error is not None:
        summary.append(("relative squared error", error(report.relative_error)))
    if report.output_error is not None:
        summary.append(
            (
                "squared error of outputs",
                f"{error(report.output_error)}, {error(report.output_error_before)} before gptq",
            )
        )
    if report.norm_factor is not None:
        summary.append(("gains of norms", f"times {report.norm_factor:.5f} on average, against noise"))
    speed = f"{duration(report.seconds)}, {report.gigabytes_per_second:.2f} GB/s as FP32"
    if report.dry_run:
        summary.append(
            ("dry run", f"nothing was written; {arguments.output} would have {count(report.file_bytes)} bytes")
        )
    else:
        summary.append(("time", speed))
        summary.append(("written", arguments.output))
        summary.append(("root", report.root))
    blocks.append(pairs(summary))
    return "\n\n".join(blocks)


def _pair(option: str, text: str) -> tuple[str, str]:
    # Codec names hold no `=`, so the last one separates.
    pattern, separator, value = text.rpartition("=")
    if not separator or not pattern or not value:
        raise UsageError(f"{option} {text!r}: write REGEX={'CODEC' if option == '--rule' else 'AXIS'}")
    return pattern, value


def _axis(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise UsageError(f"--input-axis: {text!r} is no dimension; count from 0")
    return int(text)
