"""Products through wgpu on one GPU, beside the CUDA kernels where CuPy and torch are installed, in one run.

    python tests/bench/bench_wgpu.py [--codecs int4_g32_fp16_v1] [--tokens 1,64] [--shapes 4096x11008] [--adapter NAME]

Needs an extension with the Cargo feature `gpu`. Times are medians on the GPU's own clock over passes that go round
copies of the weight larger than three times an H200's L2, each product after the one before it; CUDA's are medians over
replays of graphs that do the same. Before each there are products for WARM seconds, so that clocks are up.
GB/s are the weight's bytes alone. Every product is first compared with the decoded weight's in FP64 on some rows. Left
out: packing, transfers, and what a call costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import tenpak
from harness import machine, report
from tenpak.wgpu import Context, QuantizedWeight, matmul

SHAPES = "4096x11008,8192x28672"  # K x N
CODECS = "int4_g8_fp16_v1,int4_g32_fp16_v1,int4_lut16_v1"
TOKENS = "1,64"
#: As in bench_gemm.py.
RING = 180 << 20
#: Seconds.
WARM = 0.2
#: Rows of the weight that are checked.
CHECKED = 512


def cuda_us(encoded: tenpak.Encoded, size: int, tokens: int) -> float | None:
    """Microseconds of the CUDA kernel, or None where there is none."""
    try:
        import bench_gemm
        import tenpak.cuda
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    weight = tenpak.cuda.QuantizedWeight.from_parts(
        encoded.codec, encoded.parts, encoded.shape, encoded.axis, encoded.exponent
    )
    weight = bench_gemm.SimpleNamespace(**vars(weight))
    copies = [weight] + [bench_gemm.copy_of(weight) for _ in range(max(1, RING // size))]
    x, y = bench_gemm.activations(tokens, *encoded.shape)
    return float(bench_gemm.time_ours(copies, x, y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", default=CODECS)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--shapes", default=SHAPES, help="K x N, with an x between")
    parser.add_argument("--adapter", help="a part of the GPU's name")
    parser.add_argument("--precision", default="auto", choices=("auto", "full"))
    args = parser.parse_args()
    context = Context(args.adapter, precision=args.precision)
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        dense = random.standard_normal((n, k), dtype=np.float32) * np.float32(0.02)
        for codec in args.codecs.split(","):
            encoded = tenpak.encode(dense, codec)
            start = time.perf_counter()
            weight = QuantizedWeight.from_parts(codec, encoded.parts, (n, k), -1, encoded.exponent, context=context)
            upload = time.perf_counter() - start
            again = [
                QuantizedWeight.from_parts(codec, encoded.parts, (n, k), -1, encoded.exponent, context=context)
                for _ in range(max(1, RING // weight.nbytes))
            ]
            copies = [weight, *again]
            rebuilt = tenpak.decode(encoded, np.float32)[:CHECKED].astype(np.float64)
            for tokens in map(int, args.tokens.split(",")):
                x = random.standard_normal((tokens, k), dtype=np.float32)
                wanted = x @ rebuilt.T
                y = matmul(x, weight)[:, :CHECKED]
                error = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
                if not error < 2e-3:
                    raise SystemExit(f"{codec} {shape} M={tokens}: relative error {error}")
                ring = [copies[i % len(copies)] for i in range(max(len(copies), 8))]
                start = time.perf_counter()
                while time.perf_counter() - start < WARM:
                    context.time(ring, tokens, 17)
                us = statistics.median(context.time(ring, tokens, 17)[2:]) * 1e6
                cuda = cuda_us(encoded, weight.nbytes, tokens)
                rows.append(
                    {
                        "codec": codec,
                        "K x N": shape,
                        "M": tokens,
                        "us": us,
                        "GB/s": weight.nbytes / us * 1e-3,
                        "TFLOP/s": 2e-6 * tokens * n * k / us,
                        "CUDA us": cuda,
                        "of CUDA's speed": cuda / us if cuda else None,
                        "error": error,
                        "upload s": upload,
                    }
                )
                print({name: round(v, 3) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    adapter = context.adapter
    notes = [f"{adapter.name} through {adapter.backend}, driver {adapter.driver}, precision {args.precision}"]
    report("wgpu", machine(), rows, [f"tenpak {tenpak.__version__}", *notes])


if __name__ == "__main__":
    main()
