"""Putting weights on a GPU, and what a layer's call costs outside a graph.

    python tests/bench/bench_upload.py

Needs CuPy and torch. Encoding, packing and decoding of a Gaussian FP16 matrix that is already on the GPU, in GB of FP16
weights a second: medians of runs that wait for the GPU at their end. Then microseconds of `G8Linear` beside `nn.Linear`
for one token, as calls one after another, and replayed as a graph. Left out: the compilation of kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import cupy
import tenpak
import torch
from harness import machine, measure, report
from tenpak.cuda import G8Linear, QuantizedWeight, codec, layouts

CALLS = 200


def waiting(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def calls_us(call: Callable[[], object]) -> float:
    """Microseconds of one of many calls."""

    def many() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return measure(many, 7).median / CALLS * 1e6


def graph_us(call: Callable[[], object]) -> float:
    """The same as one graph of many."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return measure(waiting(graph.replay), 7).median / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8192x8192", help="outputs x inputs")
    args = parser.parse_args()
    n, k = map(int, args.shape.split("x"))
    dense = torch.randn(n, k, device="cuda", dtype=torch.float16) * 0.02
    array, gigabytes = cupy.asarray(dense), 2e-9 * n * k
    rows: list[dict[str, Any]] = []
    for about in tenpak.codecs():
        row: dict[str, Any] = {"codec": about.name}
        encoded = codec.encode(array, about.name)
        layout = layouts.find(about.layout)
        parts = codec.parts_on_device(about.name, encoded.parts, (n, k), 1)
        if about.encoder == "min/max":
            row["encode GB/s"] = gigabytes / measure(waiting(lambda c=about.name: codec.encode(array, c)), 5).median
        row["pack GB/s"] = gigabytes / measure(waiting(lambda p=parts, w=layout: codec.pack(w, p, n, k, 0)), 5).median
        row["decode GB/s"] = gigabytes / measure(waiting(lambda e=encoded: codec.decode(e)), 5).median
        weight = QuantizedWeight.from_parts(about.name, encoded.parts, (n, k), 1, encoded.exponent)
        row["to_dense GB/s"] = gigabytes / measure(waiting(weight.to_dense), 5).median
        row["bits/weight"] = weight.bits_per_weight
        rows.append(row)
    linear = torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.float16)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    layers = {"nn.Linear": linear, "G8Linear": G8Linear.from_linear(linear)}
    layers["G8Linear, int4_g32"] = G8Linear.from_linear(linear, "int4_g32_fp16_v1")
    with torch.no_grad():
        for name, layer in layers.items():
            rows.append(
                {
                    "codec": f"{name} 4096 x 4096, 1 token",
                    "call us": calls_us(lambda f=layer: f(x)),
                    "graph us": graph_us(lambda f=layer: f(x)),
                }
            )
    notes = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}, {n} x {k}"]
    report("upload", machine("numpy"), rows, notes)


if __name__ == "__main__":
    main()
