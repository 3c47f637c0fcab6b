"""Products with quantised weights beside cuBLAS FP16, Humming, tinygemm and GemLite, on one GPU, in one run.

    python tests/bench/bench_gemm.py [--layouts int4_g32_fp16] [--tokens 1,16] [--shapes 4096x4096] [--peers Humming]
                                     [--update] [--soak 0.4]

Needs CuPy and torch, which has tinygemm; Humming and GemLite are measured where they are installed. Random packed
weights: speed does not depend on what they hold, but correctness does, so every product is first compared with the
unpacked weight's in FP32. Times are medians over replays of a CUDA graph that goes round copies of the weight larger
than three times L2, from 256 tokens on in turns with cuBLAS's, for clocks fall with power; products that unpack the
weight for cuBLAS are not captured and are timed as a run of calls. Those bursts of some 20 ms begin before clocks have
fallen; with --soak each kernel first runs for so many seconds, until it has the clocks that its power leaves it.
`floor` is the time to read the weight once at the speed of a plain read of as many bytes, or to multiply at 790
TFLOP/s (both measured on an H200), whichever is longer. Left out: packing, and what a Python call costs outside a
graph.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import cupy
import torch
from gemm_peers import peers
from harness import machine, report, updated
from tenpak.cuda import layouts, plans, products

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672)]  # K x N
#: Prompts do not end where tiles do: hence those that are no power of two.
TOKENS = [1, 2, 4, 8, 16, 32, 64, 100, 128, 256, 300, 700, 1024, 2048]
PAIRS = {"int4_g8_fp16": 8, "int4_g16_fp16": 16, "int4_g32_fp16": 32, "int4_g64_fp16": 64, "int4_g128_fp16": 128}
BYTES = ("int4_g8_u8", "int4_g16_u8", "int5_g32_u8", "int6_g32_u8")
LAYOUTS = [*PAIRS, *BYTES, "int4_lut16", "int8_sym"]
#: Bytes of the copies of a weight that a graph goes round: three times the L2 of an H200.
RING = 180 << 20
#: Scales and offsets, and super-scales, are packed times this (`tenpak.cuda.layouts.power_of`).
POWER, SUPER_POWER = 512.0, 8192.0
#: Bytes per second of a plain read of 8, 16, 64 and 2048 MiB on an H200, as (bytes, speed).
READ_SPEEDS = [(8 << 20, 2.14e12), (16 << 20, 2.83e12), (64 << 20, 3.76e12), (2048 << 20, 4.25e12)]
MULTIPLY_SPEED = 790e12
#: Seconds in which clocks recover.
COOLING = 1.5
#: Tokens from which clocks fall with power, so that what is compared takes turns.
HOT = 256


def floor_us(weight_bytes: int, operations: float) -> float:
    """The shortest time in microseconds: of reading the weight or of multiplying."""
    speed = READ_SPEEDS[0][1]
    for (low, slow), (high, fast) in pairwise(READ_SPEEDS):
        if weight_bytes > low:
            speed = slow + (fast - slow) * min(1.0, (weight_bytes - low) / (high - low))
    return max(weight_bytes / speed, operations / MULTIPLY_SPEED) * 1e6


def random_weight(layout: str, n: int, k: int) -> Any:
    """A packed weight of random bytes with scales of a real weight's size, as `matmul` reads it."""
    random = cupy.random.default_rng(1)
    strips, tiles, supers = -(-n // 16), -(-k // 64), -(-k // 256)

    def uniform(*shape: int) -> Any:
        return random.random(shape, dtype=cupy.float32)

    def some_bytes(*shape: int) -> Any:
        return random.integers(0, 256, shape, dtype=cupy.uint8)

    params = row_params = None
    if layout in PAIRS:
        group = PAIRS[layout]
        shape = (strips, tiles, 8, 32 // group, 4) if group <= 32 else (strips, -(-tiles * 64 // group), 8, 2)
        scale = POWER * 0.002 * (1 + uniform(*shape))
        params = cupy.stack([scale, -7.5 * scale], -1).astype(cupy.float16)
    elif layout in BYTES:
        shape = layouts.find(layout).sizes(n, k, 0)[1]
        assert shape is not None
        params = some_bytes(*shape, 2)
        line = POWER * cupy.array([0.001, 1e-5, -0.02, 6e-5], cupy.float32)
        row_params = (line * (1 + uniform(strips * 16, 4))).astype(cupy.float16)
    elif layout == "int4_lut16":
        params = some_bytes(strips, tiles, 8, 2, 4)
        row_params = (SUPER_POWER * 2e-4 * (1 + uniform(strips, supers, 16))).astype(cupy.float16)
    else:
        row_params = 0.001 * (1 + uniform(strips * 16))
    codes = some_bytes(strips, tiles, 1024 if layout == "int8_sym" else 512).view(cupy.uint32)
    device = cupy.cuda.Device().id
    return SimpleNamespace(
        layout=layout,
        shape=(n, k),
        batch=0,
        codes=codes,
        params=params,
        row_params=row_params,
        scale=1.0 / {"int4_lut16": SUPER_POWER, "int8_sym": 1.0}.get(layout, POWER),
        device=device,
    )


def copy_of(w: Any) -> Any:
    """The same weight elsewhere in memory."""
    parts = {
        name: None if part is None else part.copy()
        for name, part in vars(w).items()
        if name.endswith(("codes", "params"))
    }
    return SimpleNamespace(**{**vars(w), **parts})


def ring_of_copies(layout: str, n: int, k: int) -> tuple[list[Any], int, torch.Tensor]:
    """A random weight and copies of it, beyond `RING` bytes in all; the bytes of one; and it unpacked to FP16."""
    weight = random_weight(layout, n, k)
    size = sum(part.nbytes for part in (weight.codes, weight.params, weight.row_params) if part is not None)
    plain = cupy.empty((n, k), cupy.float16)
    products.unpack(weight, plain, False, cupy.cuda.get_current_stream())
    cupy.cuda.get_current_stream().synchronize()
    copies = [weight, *(copy_of(weight) for _ in range(max(1, RING // size)))]
    return copies, size, torch.as_tensor(plain, device="cuda")


def graph_us(calls: list[Callable[[], object]], replays: int = 15, soak: float = 0.0) -> float:
    """Microseconds of one call: the median over replays of a graph of all of them, once each.

    `soak`: seconds for which the graph is replayed before that.
    """
    stream = torch.cuda.Stream()
    # What the calls read may still be on its way.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    since = time.monotonic()
    while time.monotonic() - since < soak:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def eager_us(calls: list[Callable[[], object]], runs: int = 5) -> float:
    """Microseconds of one call: the median over runs of all of them, for calls longer than it takes to make them."""
    times = []
    for _ in range(runs + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def multiply(w: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Our product, on torch's current stream."""
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    products.launch(w, x.data_ptr(), y.data_ptr(), x.shape[0], bf16=False, stream=stream)


def time_ours(copies: list[Any], x: torch.Tensor, y: torch.Tensor, soak: float = 0.0) -> float:
    """Microseconds of the kernel that `matmul` takes for these tokens."""
    ring = [copies[i % len(copies)] for i in range(max(len(copies), 8))]
    hopper = products.device_of(copies[0].device).hopper
    if x.shape[0] >= plans.dense_from(copies[0].layout, hopper, in_boxes=True):
        arrays = cupy.asarray(x), cupy.asarray(y)
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        return eager_us([partial(products.matmul, arrays[0], w, None, arrays[1], stream) for w in ring])
    return graph_us([partial(multiply, w, x, y) for w in ring], soak=soak)


def time_cublas(dense: list[torch.Tensor], x: torch.Tensor, y: torch.Tensor, soak: float = 0.0) -> float:
    """Microseconds of the FP16 product."""
    ring = [dense[i % len(dense)] for i in range(max(len(dense), 8))]
    return graph_us([partial(torch.mm, x, w.T, out=y) for w in ring], soak=soak)


def side_by_side(calls: list[Callable[[], float]], turns: int = 3) -> list[float]:
    """The median of each over turns of all of them."""
    return [statistics.median(times) for times in zip(*([call() for call in calls] for _ in range(turns)), strict=True)]


def time_peer(layers: list[Any], x: torch.Tensor, soak: float = 0.0) -> float:
    """Microseconds of another kernel's product."""
    ring = [layers[i % len(layers)] for i in range(max(len(layers), 8))]
    return graph_us([partial(layer, x) for layer in ring], soak=soak)


def activations(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random x [m, k], and y [m, n] full of NaN."""
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    return x, torch.full((m, n), float("nan"), device="cuda", dtype=torch.float16)


def installed(*names: str) -> list[str]:
    """Those of the packages that are there."""
    there = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return [name for name in names if name in there]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--shapes", default=",".join(f"{k}x{n}" for k, n in SHAPES), help="K x N, with an x between")
    parser.add_argument("--peers", default="Humming,tinygemm,GemLite", help="other kernels, where they are installed")
    parser.add_argument("--update", action="store_true", help="keep the other rows of the results")
    parser.add_argument(
        "--soak",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help=f"run each kernel for so long before it is timed, from {HOT} tokens on; results go to gemm_hot.json",
    )
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    notes = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}"]
    name = "gemm_hot" if args.soak else "gemm"
    try:
        measure(args, rows, notes)
    finally:  # a peer that takes the device with it leaves what was measured before
        if rows:
            about = machine(*installed("tenpak", "torch", "cupy-cuda12x", "cupy-cuda13x", "humming-kernels", "gemlite"))
            report(name, about, updated(name, rows, "K x N", "layout", "M") if args.update else rows, notes)


def measure(args: argparse.Namespace, rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Appends what is measured to `rows`, a product at a time, and to `notes` why a peer was not."""
    tokens = [int(m) for m in args.tokens.split(",")]
    chosen = [peer for peer in peers() if peer.name in args.peers.split(",")]
    for shape in args.shapes.split(","):
        k, n = map(int, shape.split("x"))
        dense = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(max(2, RING // (2 * n * k)))]
        cublas = {}
        for m in tokens:
            if m < HOT:
                cublas[m] = time_cublas(dense, *activations(m, n, k))
        for layout in args.layouts.split(","):
            copies, size, plain = ring_of_copies(layout, n, k)
            reference = plain.float()
            # Many tokens may have heated the GPU until its clocks fell, and few come first.
            time.sleep(COOLING if max(tokens) > 64 else 0)
            others = {}
            for peer in chosen:
                if PAIRS.get(layout) in peer.groups:
                    try:
                        others[peer] = peer.layers(n, k, PAIRS[layout], len(copies))
                    except Exception as failure:  # a peer that fails is a note, not a failed run
                        notes.append(f"{peer.name}, {layout}, {shape}: {type(failure).__name__}: {failure}"[:300])
            for m in tokens:
                x, y = activations(m, n, k)
                products.matmul(cupy.asarray(x), copies[0], out=cupy.asarray(y))
                torch.cuda.synchronize()
                wanted = x.float() @ reference.T
                error = float((y.float() - wanted).norm() / wanted.norm())
                if not error < 2e-3:
                    raise SystemExit(f"{layout} {shape} M={m}: relative error {error}")
                soak = args.soak if m >= HOT else 0.0
                if m < HOT:
                    us = time_ours(copies, x, y)
                else:
                    both = [partial(time_ours, copies, x, y, soak), partial(time_cublas, dense, x, y, soak)]
                    us, cublas[m] = side_by_side(both)
                floor = floor_us(size, 2.0 * m * n * k)
                row = {"layout": layout, "K x N": shape, "M": m, "us": us, "of floor": floor / us}
                row |= {"x cuBLAS": cublas[m] / us, "cuBLAS us": cublas[m], "error": error}
                rows.append(row)
                for peer, layers in list(others.items()):
                    try:
                        row[f"x {peer.name}"] = time_peer(layers, x.to(peer.dtype), soak) / us
                    except Exception as failure:
                        del others[peer]
                        what = f"{peer.name}, {layout}, {shape}, M={m}: {type(failure).__name__}: {failure}"[:300]
                        notes.append(what)
                        try:
                            torch.cuda.synchronize()
                        except Exception:  # nothing runs on the device after that
                            raise SystemExit(what) from failure
                ratios = ", ".join(f"{value:.2f} {name}" for name, value in row.items() if name.startswith("x "))
                print(f"{layout} {shape} M={m}: {us:.2f} us, {ratios}", flush=True)


if __name__ == "__main__":
    main()
