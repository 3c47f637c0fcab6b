"""tenpak inspect: show what a .tenpak file holds.

examples:
  tenpak inspect model.tenpak
  tenpak inspect model.tenpak --tensor model.layers.0.mlp.up_proj.weight
  tenpak inspect model.tenpak --json

Only the index is read; `tenpak verify` checks every byte. Tensors of codecs that this build does not know are
shown as well.
"""

from __future__ import annotations

import argparse
from typing import Any

import tenpak
from tenpak.artifact import KEEP, ArtifactFile, TensorInfo
from tenpak.cli import delta_view
from tenpak.cli.table import count, number, pairs, print_json, size, table, times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the .tenpak file")
    parser.add_argument("--tensor", metavar="NAME", help="one tensor and its parts")
    parser.add_argument("--summary", action="store_true", help="leave the table of tensors out")


def run(arguments: argparse.Namespace) -> None:
    with tenpak.open(arguments.file) as artifact:
        if arguments.tensor:
            info = artifact.info(arguments.tensor)
            if arguments.json:
                print_json(_tensor(info))
            else:
                print(_describe(info, artifact))
        elif arguments.json:
            print_json(_summary(artifact) | {"tensors": [_tensor(info) for info in artifact.infos]})
        elif artifact.delta is not None:
            print(delta_view.text(artifact, artifact.delta, arguments.summary))
        else:
            print(_text(artifact, arguments.summary))


def _summary(artifact: ArtifactFile) -> dict[str, Any]:
    weights = sum(info.weights for info in artifact.infos)
    quantised = [info for info in artifact.infos if info.codec != KEEP]
    quantised_weights = sum(info.weights for info in quantised)
    return {
        "file": artifact.path,
        "bytes": artifact.nbytes,
        "version": artifact.version,
        "writer": artifact.writer,
        "root": artifact.root,
        "codec": artifact.codec,
        "weights": weights,
        "bits_per_weight": 8 * artifact.nbytes / weights if weights else None,
        "quantised_bits_per_weight": (
            8 * sum(info.nbytes for info in quantised) / quantised_weights if quantised_weights else None
        ),
        "compression_fp32": 4 * weights / artifact.nbytes if weights else None,
        "compression_fp16": 2 * weights / artifact.nbytes if weights else None,
        "aliases": artifact.aliases,
        "files": artifact.files,
        "delta": None if artifact.delta is None else delta_view.summary(artifact, artifact.delta),
    }


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "shape": info.shape,
        "dtype": info.dtype,
        "codec": info.codec,
        "codec_version": info.codec_version,
        "known": info.known,
        "axis": info.axis,
        "exponent": info.exponent,
        "weights": info.weights,
        "bytes": info.nbytes,
        "bits_per_weight": info.bits_per_weight,
        "params": info.params,
        "parts": [vars(part) for part in info.parts],
    }


def _text(artifact: ArtifactFile, summary_only: bool) -> str:
    about = _summary(artifact)
    rows = [
        ("file", f"{artifact.path}, {size(artifact.nbytes)}, format version {artifact.version}, by {artifact.writer}"),
        ("root", artifact.root),
        ("codec", artifact.codec),
        ("weights", f"{count(about['weights'])} in {count(len(artifact.tensors))} tensors"),
        (
            "bits/weight",
            f"{number(about['quantised_bits_per_weight'])} quantised, {number(about['bits_per_weight'])} whole file",
        ),
        ("smaller than", f"FP32 {times(about['compression_fp32'])}, FP16 {times(about['compression_fp16'])}"),
    ]
    if artifact.aliases:
        rows.append(("aliases", ", ".join(f"{alias} = {name}" for alias, name in artifact.aliases.items())))
    if artifact.files:
        rows.append(("files", ", ".join(artifact.files)))
    if "gguf_metadata.json" in artifact.files and "config.json" not in artifact.files:
        rows.append(("names", "GGUF's own; the model cannot be run"))
    text = pairs(rows)
    if summary_only:
        return text
    tensors = [
        [
            info.name,
            " x ".join(map(str, info.shape)) or "scalar",
            info.dtype,
            info.codec if info.known else f"{info.codec} (unknown)",
            size(info.nbytes),
            number(info.bits_per_weight),
        ]
        for info in artifact.infos
    ]
    return text + "\n\n" + table(["tensor", "shape", "from", "codec", "bytes", "bits/weight"], tensors)


def _describe(info: TensorInfo, artifact: ArtifactFile) -> str:
    rows = [
        ("tensor", info.name),
        ("shape", " x ".join(map(str, info.shape)) or "scalar"),
        ("from", info.dtype),
        ("codec", f"{info.codec}, version {info.codec_version}" + ("" if info.known else ", unknown to this build")),
        ("input axis", str(info.axis)),
        ("exponent", str(info.exponent)),
        ("bits/weight", number(info.bits_per_weight, 4)),
    ]
    if artifact.delta is not None:
        rows += delta_view.describe(artifact, info)
    parts = [
        [part.name, part.dtype, " x ".join(map(str, part.shape)), count(part.nbytes), count(part.offset)]
        for part in info.parts
    ]
    return pairs(rows) + "\n\n" + table(["part", "dtype", "shape", "bytes", "offset"], parts)
