"""Tokens per second of a Llama-2-7B-shaped model with random weights, batch 1, on one NVIDIA GPU.

    python tests/bench/bench_generate.py [--codecs int4_lut16_v1,int4_g32_fp16_v1] [--kv int8] [--context 512]

Needs CuPy. Weights are Gaussian, each matrix of a shape being encoded once and put on the GPU anew for each layer;
speed does not depend on what they hold. `tok/s` is that of a caller who takes the tokens one by one, `step us` one
replay of the captured graph among many, `no overlap` the same with launches that wait for each other. `floor` is the
time to read all weights (of the embedding one row) and the cache once, at the speed of a plain read of 2 GiB (measured
on an H200). `GPU MB` is what the process took of the device in all, beside weights and cache.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import cupy
import numpy as np
import tenpak
from bench_gemm import READ_SPEEDS
from harness import machine, report
from random_source import RandomSource
from tenpak.cuda import launch
from tenpak.cuda.runner import Runner
from tenpak.decoder import Decoder
from tenpak.sampling import Sampling

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def step_us(runner: Runner, steps: int) -> float:
    """Microseconds of a replay, among `steps` of them."""
    stream = runner.stream
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record(stream)
    for _ in range(steps):
        runner.graph.launch(stream)
    end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) * 1e3 / steps


def measured(codec: str, embeddings: str, kv: Any, context: int, tokens: int) -> dict[str, Any]:
    """One row of the table."""
    prompt = np.random.default_rng(0).integers(1, CONFIG["vocab_size"], context).tolist()
    cupy.get_default_memory_pool().free_all_blocks()
    free = cupy.cuda.runtime.memGetInfo()[0]
    source = RandomSource(CONFIG, codec, embeddings)

    def times(text: list[int]) -> tuple[Runner, list[float], float]:
        runner = Runner(Decoder(source, xp=cupy), kv)
        rates = []
        for seed in range(4):
            clock = cupy.cuda.Event(), cupy.cuda.Event()
            stream = runner.tokens(text, Sampling(seed=seed), tokens)
            next(stream)
            clock[0].record()
            for _ in stream:
                pass
            clock[1].record()
            clock[1].synchronize()
            rates.append((tokens - 1) / cupy.cuda.get_elapsed_time(*clock) * 1e3)
        # At the length in the middle of those texts.
        list(runner.tokens(text, Sampling(), tokens // 2))
        return runner, rates[1:], step_us(runner, 100)

    runner, rates, overlapped = times(prompt)
    taken = free - cupy.cuda.runtime.memGetInfo()[0]
    cache = runner.cache
    assert cache is not None
    cache_bytes = cache.bytes_per_token * (context + tokens / 2)
    floor = (runner.bytes_per_step + cache_bytes) / READ_SPEEDS[-1][1] * 1e6
    row = {
        "codec": codec,
        "kv": runner.kv,
        "tok/s": statistics.median(rates),
        "step us": overlapped,
        "floor us": floor,
        "of floor": floor * 1e-6 * statistics.median(rates),
        "step of floor": floor / overlapped,
        "weights MB": runner.weight_bytes / 1e6,
        "cache MB": cache.nbytes / 1e6,
        "GPU MB": (taken - runner.weight_bytes - cache.nbytes) / 1e6,
    }
    del runner, cache
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    kept, launch._launcher = launch._launcher, lambda: None  # type: ignore[assignment]
    try:
        row["no overlap us"] = times(prompt)[2]
    finally:
        launch._launcher = kept
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", default="int4_lut16_v1,int4_g32_fp16_v1")
    parser.add_argument("--embeddings", default="int8_sym_v1")
    parser.add_argument("--kv", default="int8,fp16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    rows = []
    for codec in args.codecs.split(","):
        for kv in args.kv.split(","):
            rows.append(measured(codec, args.embeddings, kv, args.context, args.tokens))
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    report("generate", machine("numpy"), rows, [f"{name}, CuPy {cupy.__version__}, tenpak {tenpak.__version__}"])


if __name__ == "__main__":
    main()
