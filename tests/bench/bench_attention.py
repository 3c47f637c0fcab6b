"""Attention of one new token over the quantised cache, beside torch's SDPA and FlashInfer, on one GPU, in one run.

    python tests/bench/bench_attention.py [--kv int8,int4,fp16] [--prefill]

Needs CuPy and torch; FlashInfer is measured where it is installed. Every cache is filled with random tokens by
`append`, and its output first compared with FP64 attention over the tokens before they were quantised, so the error
shown is that of the codes. Times are medians, in microseconds, over replays of a CUDA graph that goes round layers
larger than three times L2. `step` is what a decoder's step launches instead: the token is turned and appended, too,
and launches overlap as `tenpak.cuda.launch` has them. `floor` is the time to read a layer's tokens once in a kernel
that does nothing else (`READ`). Left out: what a Python call costs outside a graph; appending is shown apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import cupy
import numpy as np
import torch
from bench_gemm import RING
from harness import machine
from tenpak.cuda import KVCache, RotaryTable, append_and_attend, attend, prefill
from tenpak.cuda.launch import overlapping

HEAD_DIM = 128
#: What a kernel takes that only reads, on an H200, by cp.async as cuda/attention.cu does: microseconds however few the
#: bytes, and bytes a second. Within 3 % of what 18, 35, 69, 138 and 277 MB took there.
READ = (2.1, 4.62e12)
#: Batch, query heads, kv heads, context.
SHAPES = [
    (1, 32, 8, 32768),
    (1, 32, 8, 131072),
    (16, 32, 8, 4096),
    (1, 32, 32, 4096),
    (1, 32, 8, 4096),
    (1, 32, 8, 512),
]


def rounds(copies: int) -> int:
    """How often a graph goes round its copies, so that what it costs to begin one is small for all."""
    return max(1, 24 // copies)


def median_us(capture: Callable[[], Any], calls: int, runs: int = 20) -> float:
    """Microseconds of a call, of `calls` in a torch graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        capture()
    times = []
    for _ in range(runs + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[3:])


def replays_us(graph: Any, stream: Any, calls: int, runs: int = 20) -> float:
    """Microseconds of a call, of `calls` in a CuPy graph."""
    times = []
    for _ in range(runs + 3):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        graph.launch(stream)
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1e3 / calls)
    return statistics.median(times[3:])


def random_heads(*shape: int) -> Any:
    return cupy.random.standard_normal(shape, dtype=cupy.float32).astype(cupy.float16)


def filled(kv: str, batch: int, kv_heads: int, context: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """A cache of enough layers, and the first layer's keys and values."""
    cache = KVCache(1, kv_heads, HEAD_DIM, 32, kv)
    bytes_ = cache.bytes_per_token * context * batch
    layers = max(2, -(-RING // int(bytes_)))
    cache = KVCache(layers, kv_heads, HEAD_DIM, context + 16, kv, batch)
    k, v = (random_heads(batch, context, kv_heads, HEAD_DIM) for _ in range(2))
    for layer in range(layers):
        cache.append(layer, k.copy(), v.copy())
    cache.advance(context - 1)  # `attend` counts the last one as new.
    return cache, [(k, v)]


def error_of(out: Any, q: Any, k: Any, v: Any) -> float:
    """Against FP64 of the first sequence."""
    group = q.shape[2] // k.shape[2]
    errors = []
    for head in range(0, q.shape[2], max(1, q.shape[2] // 4)):
        keys, values = (x[0, :, head // group].astype(cupy.float64) for x in (k, v))
        p = keys @ q[0, 0, head].astype(cupy.float64) / HEAD_DIM**0.5
        p = cupy.exp(p - p.max())
        expected = p @ values / p.sum()
        errors.append(float(cupy.linalg.norm(out[0, 0, head] - expected) / cupy.linalg.norm(expected)))
    return max(errors)


def ours(kv: str, batch: int, heads: int, kv_heads: int, context: int) -> tuple[float, float, float, float]:
    """Microseconds of `attend` and of `append_and_attend`, error, floor."""
    cache, [(k, v)] = filled(kv, batch, kv_heads, context)
    q = random_heads(batch, 1, heads, HEAD_DIM)
    out = cupy.full(q.shape, cupy.nan, cupy.float16)
    attend(q, cache, 0, out=out)
    error = error_of(out, q, k, v)
    stream = cupy.cuda.Stream(non_blocking=True)
    layers = [layer for _ in range(rounds(cache.layers)) for layer in range(cache.layers)]
    rotary = RotaryTable(np.ones(HEAD_DIM // 2, np.float32), context)
    newest = [x[:, -1:] for x in (k, v)]
    calls: list[Callable[[int], Any]] = [
        lambda layer: attend(q, cache, layer, out=out, stream=stream),
        lambda layer: append_and_attend(q, *newest, cache, layer, rotary=rotary, out=out, stream=stream),
    ]
    medians = []
    for call, around in zip(calls, (nullcontext, overlapping), strict=True):
        with stream:
            call(0)
            stream.begin_capture()
            with around():
                for layer in layers:
                    call(layer)
            graph = stream.end_capture()
        medians.append(replays_us(graph, stream, len(layers)))
    bytes_ = cache.bytes_per_token / cache.layers * context * batch
    return medians[0], medians[1], error, READ[0] + bytes_ / READ[1] * 1e6


def sdpa(batch: int, heads: int, kv_heads: int, context: int) -> float:
    bytes_ = 4 * batch * kv_heads * context * HEAD_DIM
    copies = max(2, -(-RING // bytes_))
    q = torch.randn(batch, heads, 1, HEAD_DIM, device="cuda", dtype=torch.float16)
    pairs = [
        [torch.randn(batch, kv_heads, context, HEAD_DIM, device="cuda", dtype=torch.float16) for _ in range(2)]
        for _ in range(copies)
    ]
    attention = torch.nn.functional.scaled_dot_product_attention

    def run() -> None:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            for k, v in pairs * rounds(copies):
                attention(q, k, v, enable_gqa=heads != kv_heads)

    run()
    torch.cuda.synchronize()
    return median_us(run, copies * rounds(copies))


def flashinfer(batch: int, heads: int, kv_heads: int, context: int, dtype: Any) -> float | None:
    """FlashInfer's tensor-core kernels, of one sequence or, in pages of 16 tokens, of several; None where missing."""
    try:
        import flashinfer
    except ImportError:
        return None
    bytes_ = 2 * batch * kv_heads * context * HEAD_DIM * torch.empty(0, dtype=dtype).element_size()
    copies = max(2, -(-RING // bytes_))
    q = torch.randn(batch, heads, HEAD_DIM, device="cuda", dtype=torch.float16)

    def filled(*shape: int) -> Any:
        return torch.randn(*shape, kv_heads, HEAD_DIM, device="cuda", dtype=torch.float16).to(dtype)

    if batch == 1:
        pairs = [[filled(context) for _ in range(2)] for _ in range(copies)]

        def run() -> None:
            for k, v in pairs * rounds(copies):
                flashinfer.single_decode_with_kv_cache(q[0], k, v, use_tensor_cores=True)
    else:
        page, pages = 16, context // 16
        paged = [filled(batch * pages, 2, page) for _ in range(copies)]
        room = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", use_tensor_cores=True)
        numbers = {"dtype": torch.int32, "device": "cuda"}
        starts, used = torch.arange(batch + 1, **numbers) * pages, torch.arange(batch * pages, **numbers)
        types = {"q_data_type": torch.float16, "kv_data_type": dtype}
        wrapper.plan(starts, used, torch.full((batch,), page, **numbers), heads, kv_heads, HEAD_DIM, page, **types)

        def run() -> None:
            for kv in paged * rounds(copies):
                wrapper.run(q, kv)

    run()
    torch.cuda.synchronize()
    return median_us(run, copies * rounds(copies))


def prompt(tokens: int, heads: int, kv_heads: int) -> dict[str, float]:
    """Milliseconds of a prompt's attention and of appending it (int4)."""
    q, k, v = (random_heads(1, tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
    out = cupy.empty_like(q)
    cache = KVCache(1, kv_heads, HEAD_DIM, tokens, "int4")
    t = [torch.as_tensor(x, device="cuda").transpose(1, 2) for x in (q, k, v)]
    attention = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, Callable[[], Any]] = {
        "prefill": lambda: prefill(q, k, v, out=out),
        "append int4": lambda: cache.append(0, k, v),
        "SDPA": lambda: attention(*t, is_causal=True, enable_gqa=True),
    }
    times = {}
    for name, call in calls.items():
        call()
        cupy.cuda.Device().synchronize()
        runs = []
        for _ in range(7):
            stream = torch.cuda.current_stream() if name == "SDPA" else None
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream) if stream is not None else start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            runs.append(start.elapsed_time(end))
        times[name] = statistics.median(runs)
    reference = attention(*(x.float() for x in t), is_causal=True, enable_gqa=True).transpose(1, 2)
    times["error"] = float((torch.as_tensor(out, device="cuda").float() - reference).norm() / reference.norm())
    return times


def step_us(kv: str, batch: int, heads: int, kv_heads: int, context: int) -> float:
    """Microseconds of an append of one token with its rotation."""
    cache = KVCache(2, kv_heads, HEAD_DIM, context + 64, kv, batch)
    cache.lengths[...] = context
    rotary = RotaryTable(np.ones(HEAD_DIM // 2, np.float32), context + 64)
    q, k, v = (random_heads(batch, 1, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        cache.append(0, k, v, q=q, rotary=rotary, stream=stream)
        cache.advance(1, stream=stream)
        stream.begin_capture()
        for _ in range(32):
            cache.append(0, k, v, q=q, rotary=rotary, stream=stream)
        graph = stream.end_capture()
    return replays_us(graph, stream, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="int8,int4,fp16")
    parser.add_argument("--prefill", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES:
        row: dict[str, Any] = {"batch, heads, kv heads, context": ", ".join(map(str, shape))}
        row["SDPA fp16"] = sdpa(*shape)
        for name, dtype in (("FlashInfer fp16", torch.float16), ("FlashInfer fp8", torch.float8_e4m3fn)):
            if (time := flashinfer(*shape, dtype)) is not None:
                row[name] = time
        for kv in arguments.kv.split(","):
            row[kv], row[f"{kv} step"], row[f"{kv} error"], row[f"{kv} floor"] = ours(kv, *shape)
        row["append int8"] = step_us("int8", *shape)
        rows.append(row)
        print(", ".join(f"{k}: {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in row.items()), flush=True)
        cupy.get_default_memory_pool().free_all_blocks()
        torch.cuda.empty_cache()
    if arguments.prefill:
        for tokens in (512, 4096, 16384):
            print(tokens, "tokens, 32 heads, 8 kv heads, ms:", prompt(tokens, 32, 8), flush=True)
    print(machine("torch", "cupy-cuda13x"))


if __name__ == "__main__":
    main()
