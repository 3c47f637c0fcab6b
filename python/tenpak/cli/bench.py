"""tenpak bench: compare all codecs on a model, or on random weights.

examples:
  tenpak bench --input tests/data/tiny-llama
  tenpak bench --input model.safetensors --codec int4_opt_v1 --codec int4_lut16_v1
  tenpak bench --gaussian 4096x4096 --threads 1 --json

Weights of linear layers are encoded and decoded in memory, in memory that was in use before. Speeds are millions
of weights a second: the median of --repeat runs, and half their range. The error is Σ(w - ŵ)² / Σw².
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tenpak
from tenpak import _core
from tenpak.cli.table import error, number, print_json, table, times
from tenpak.errors import InputError, UsageError

#: Weights of a model that are measured at the most; the largest tensors go first.
_LIMIT = 64_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", "-i", metavar="MODEL", help="a folder, .safetensors, .gguf or JSON bundle file")
    source.add_argument("--gaussian", metavar="ROWSxCOLS", help="random weights of this shape instead")
    parser.add_argument("--codec", "-c", action="append", metavar="NAME", help="only these; repeatable")
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use (all cores)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="runs of each (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    if arguments.repeat < 1 or (arguments.threads is not None and not 1 <= arguments.threads <= 1024):
        raise UsageError("--repeat and --threads take numbers from 1 on")
    names = arguments.codec or [codec.name for codec in tenpak.codecs()]
    tensors = _gaussian(arguments.gaussian) if arguments.gaussian else _model(arguments.input)
    weights = sum(array.size for array, _ in tensors)
    rows = [_measure(name, tensors, arguments) for name in names]
    about = {
        "source": arguments.input or f"gaussian {arguments.gaussian}",
        "tensors": len(tensors),
        "weights": weights,
        "threads": arguments.threads or os.cpu_count(),
        "simd": _core.simd()[0],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "tenpak": tenpak.__version__,
        "numpy": np.__version__,
    }
    if arguments.json:
        print_json(about | {"codecs": rows})
        return
    print(f"{about['source']}: {weights:,} weights in {len(tensors)} tensors")
    print(f"{about['cpu']}, {about['cores']} cores; {about['threads']} threads, {about['simd']}")
    print(f"{about['system']}, Python {about['python']}, tenpak {about['tenpak']}, numpy {about['numpy']}\n")
    print(
        table(
            ["codec", "bits/weight", "FP32", "error", "encode Mw/s", "±%", "decode Mw/s", "±%"],
            [
                [
                    row["codec"],
                    number(row["bits_per_weight"]),
                    times(row["compression_fp32"]),
                    error(row["relative_error"]),
                    number(row["encode_mws"], 0),
                    number(row["encode_spread"], 0),
                    number(row["decode_mws"], 0),
                    number(row["decode_spread"], 0),
                ]
                for row in rows
            ],
        )
    )


def _measure(name: str, tensors: list[tuple[NDArray[Any], int]], arguments: argparse.Namespace) -> dict[str, Any]:
    threads = arguments.threads
    encoded = [tenpak.encode(array, name, axis, threads=threads, measure=True) for array, axis in tensors]
    rebuilt = [tenpak.decode(e, np.float32, threads=threads) for e in encoded]
    weights = sum(array.size for array, _ in tensors)
    norms = [float(np.square(array, dtype=np.float64).sum()) for array, _ in tensors]
    encode_times, decode_times = [], []
    for _ in range(arguments.repeat):
        start = time.perf_counter()
        for (array, axis), out in zip(tensors, encoded, strict=True):
            tenpak.encode(array, name, axis, threads=threads, out=out)
        middle = time.perf_counter()
        for e, target in zip(encoded, rebuilt, strict=True):
            tenpak.decode(e, out=target, threads=threads)
        encode_times.append(middle - start)
        decode_times.append(time.perf_counter() - middle)
    lost = sum((e.relative_error or 0.0) * norm for e, norm in zip(encoded, norms, strict=True))
    bits = 8 * sum(e.nbytes for e in encoded) / weights
    encode, encode_spread = _speed(weights, encode_times)
    decode, decode_spread = _speed(weights, decode_times)
    return {
        "codec": name,
        "bits_per_weight": bits,
        "compression_fp32": 32 / bits,
        "relative_error": lost / sum(norms) if sum(norms) else 0.0,
        "encode_mws": encode,
        "encode_spread": encode_spread,
        "decode_mws": decode,
        "decode_spread": decode_spread,
    }


def _speed(weights: int, seconds: list[float]) -> tuple[float, float]:
    median = statistics.median(seconds)
    return weights / median / 1e6, 50 * (max(seconds) - min(seconds)) / median


def _cpu() -> str:
    """The processor's name, where the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gaussian(text: str) -> list[tuple[NDArray[Any], int]]:
    rows, _, cols = text.lower().partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and 0 < int(rows) * int(cols) <= 1 << 30):
        raise UsageError(f"--gaussian {text!r}: write ROWSxCOLS, such as 4096x4096")
    shape = (int(rows), int(cols))
    return [((np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)), 1)]


def _model(path: str) -> list[tuple[NDArray[Any], int]]:
    # The plan says which tensors are weights of linear layers, and an artifact of kept tensors hands them out.
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.tenpak"
        plan = tenpak.compress(path, kept, dry_run=True, embeddings="keep")
        linear = [t for t in plan.tensors if t.codec not in ("keep", "alias")]
        linear.sort(key=lambda t: -t.weights)
        tenpak.compress(path, kept, rules=[("", "keep")])
        chosen: list[tuple[NDArray[Any], int]] = []
        with tenpak.open(kept) as artifact:
            left = _LIMIT
            for tensor in linear:
                if tensor.weights <= left or not chosen:
                    chosen.append((artifact.read(tensor.name, np.float32), tensor.axis))
                    left -= tensor.weights
    if not chosen:
        raise InputError(f"{path}: holds no weights of linear layers to measure")
    return chosen
