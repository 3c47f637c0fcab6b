"""Encode and decode speed in memory, one thread, beside ggml's quantisers, in one run.

    python tests/bench/bench_codecs.py [--rows 4096] [--cols 4096] [--runs 7]

One thread each: libgguf would otherwise take all cores. A Gaussian FP32 matrix; every output is memory that was in use
before. Ratios are to a peer of the same run, because the machine's speed changes from minute to minute. Left out:
reading and writing files (bench_files.py), and what a model loses (docs/quality.md).
"""

from __future__ import annotations

import argparse
import os

# Read when libgguf is loaded.
os.environ["LIBGGUF_NUM_THREADS"] = "1"

import libgguf
import numpy as np
import tenpak
from harness import machine, measure_together, report

#: ggml's number and name of each peer.
PEERS = {2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 12: "Q4_K", 20: "IQ4_NL"}
#: Runs of slow encoders are fewer: they vary less and take seconds.
SLOW = {"Q4_K", "IQ4_NL"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    weights = (np.random.default_rng(1).standard_normal((args.rows, args.cols)) * 0.02).astype(np.float32)
    million = weights.size / 1e6
    norm = float(np.square(weights, dtype=np.float64).sum())

    calls, decoders, errors, bits = {}, {}, {}, {}
    narrow = np.empty(weights.size * 3 // 4, np.uint8).reshape(-1, 3)
    packed = weights.reshape(-1, 4).view(np.uint8)
    plain = "plain: read 4 bytes, write 0.75"
    calls[plain] = lambda: np.copyto(narrow, packed[:, 3::4][:, :3])
    for codec in tenpak.codecs():
        encoded = tenpak.encode(weights, codec.name, threads=1)
        rebuilt = tenpak.decode(encoded)
        bits[codec.name] = encoded.bits_per_weight
        errors[codec.name] = float(np.square(weights - rebuilt, dtype=np.float64).sum()) / norm
        calls[codec.name] = lambda name=codec.name, out=encoded: tenpak.encode(weights, name, threads=1, out=out)
        decoders[codec.name] = lambda e=encoded, out=rebuilt: tenpak.decode(e, out=out, threads=1)
    for number, name in PEERS.items():
        out = libgguf.quantize_rows(weights, number)
        bits[name] = out.nbytes * 8 / weights.size
        rebuilt = libgguf.dequantize_rows(out, number, args.cols)
        errors[name] = (
            float(np.square(weights - np.asarray(rebuilt).reshape(weights.shape), dtype=np.float64).sum()) / norm
        )
        calls[name] = lambda q=number, out=out: libgguf.quantize_rows_into_raw(
            q, weights, out, args.rows, args.cols, None
        )
    fast = {name: call for name, call in calls.items() if name not in SLOW}
    timings = measure_together(fast, args.runs) | measure_together({n: calls[n] for n in SLOW}, 2)
    timings_decode = measure_together(decoders, args.runs)

    def speed(name: str) -> float:
        return million / timings[name].median

    rows = []
    for name in calls:
        rows.append(
            {
                "codec": name,
                "bits/weight": bits.get(name),
                "error x1e-3": errors[name] * 1e3 if name in errors else None,
                "encode Mw/s": speed(name),
                "±%": timings[name].spread * 100,
                "decode Mw/s": million / timings_decode[name].median if name in decoders else None,
                "x Q4_1": speed(name) / speed("Q4_1"),
                "x Q4_K": speed(name) / speed("Q4_K"),
                "x IQ4_NL": speed(name) / speed("IQ4_NL"),
            }
        )
    notes = [f"{args.rows} x {args.cols} Gaussian FP32 in memory, one thread, {args.runs} runs each in turn"]
    report("codecs", machine("tenpak", "libgguf", "numpy"), rows, notes)


if __name__ == "__main__":
    main()
