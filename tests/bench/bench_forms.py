"""The forms that wide.cu has for products of many tokens, beside each other: what is lost by the one that is taken.

    python tests/bench/bench_forms.py [--layouts int4_g32_fp16] [--shapes 4096x4096] [--tokens 100,300]

Needs CuPy, torch and a Hopper GPU. Of each kind (size of tiles; whole, cut, narrow, with helpers, in clusters) the
cheapest by the estimate in tenpak/cuda/wide.py is compared with the unpacked weight's product and timed, if it is
estimated to take no more than 1.3 times the least: medians of three turns, in each of which every form and cuBLAS
replay a CUDA graph that goes round copies of the weight. A line for each product says which form is taken and which
would be fastest; results/forms.json has all, and the cycles that were estimated.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import cupy
import torch
from bench_gemm import activations, graph_us, installed, ring_of_copies
from harness import machine, report
from tenpak.cuda import plans, products, wide
from tenpak.cuda.compile import function

SHAPES = "4096x4096,4096x11008,11008x4096,4096x6144,4096x28672,14336x4096,5120x5120,8192x28672"  # K x N
TOKENS = "24,40,56,64,72,100,130,160,192,224,256,300,350,400,448,512,600,700,768,900,1024,1300,1536,2048,3000"
#: Times the least estimate, beyond which a form is not timed.
WITHIN = 1.3


def forms(layout: str, n: int, k: int, m: int) -> list[tuple[str, float | None, plans.Plan]]:
    """Of each kind the cheapest: name, estimated cycles and plan, the one that is taken first; and tiled.cu, which has
    none of Hopper's own instructions."""
    here = products.device_of(0)
    found = wide.choices(layout, plans.STAGE_BYTES[layout], here.multiprocessors, here.shared, n, k, m, 1)
    kinds: dict[tuple[Any, ...], tuple[wide.Choice, plans.Plan]] = {}
    for choice, plan in zip(found, plans.wide_plans(here, layout, n, k, m, 1, False), strict=True):
        if choice.cycles <= WITHIN * found[0].cycles:
            helped, whole = choice.head > 0, choice.tiles % choice.grid == 0
            kind = (choice.groups, choice.tokens, choice.step, choice.cluster, choice.narrow > 0, helped, whole)
            kinds.setdefault(kind, (choice, plan))
    named: list[tuple[str, float | None, plans.Plan]]
    named = [(name_of(choice), choice.cycles, plan) for choice, plan in kinds.values()]
    return [*named, ("tiled.cu", None, plans.tiled_plan(here, layout, n, k, m))]


def name_of(choice: wide.Choice) -> str:
    """Rows by tokens of its tiles, and how blocks share them."""
    name = f"{choice.rows} x {choice.tokens}"
    if choice.step != (1 if choice.tokens > 128 else 2):
        name += f", steps of {choice.step}"
    if choice.narrow:
        return f"{name}, then {choice.narrow}"
    if choice.cluster > 1:
        return f"{name}, clusters of {choice.cluster}"
    if choice.head:
        return f"{name}, {choice.grid - choice.tiles} helpers"
    return f"{name}, {choice.grid} blocks" + (", cut" if choice.tiles % choice.grid else "")


def multiply(w: Any, plan: plans.Plan, kernel: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """y = x Wᵀ by a plan, on torch's current stream."""
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    m, k = x.shape
    products.run((plan, kernel), w, x.data_ptr(), y.data_ptr(), m, k, bf16=False, stream=stream)


def measure(layout: str, copies: list[Any], dense: torch.Tensor, m: int) -> list[dict[str, Any]]:
    """A row for each form of a product, the one that is taken first."""
    n, k = dense.shape
    x, y = activations(m, n, k)
    wanted = (x @ dense.T).float()
    ring = [copies[i % len(copies)] for i in range(max(len(copies), 8))]
    rows, calls = [], []
    for name, cycles, plan in forms(layout, n, k, m):
        kernel = function(plan.source, plan.kernel, plan.defines, 0)
        y.fill_(float("nan"))
        multiply(copies[0], plan, kernel, x, y)
        error = float((y.float() - wanted).norm() / wanted.norm())
        if not error < 2e-3:
            raise SystemExit(f"{layout} {k}x{n} M={m}, {name}: relative error {error}")
        rows.append({"layout": layout, "K x N": f"{k}x{n}", "M": m, "form": name, "cycles": cycles})
        calls.append([partial(multiply, w, plan, kernel, x, y) for w in ring])
    calls.append([partial(torch.mm, x, dense.T, out=y) for _ in ring])
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(3):
        # Clocks fall with power: none comes always after the same one.
        for i in range(len(calls))[:: -1 if turn % 2 else 1]:
            time.sleep(0.01)
            times[i].append(graph_us(calls[i], replays=5))
    *ours, cublas = (statistics.median(of_form) for of_form in times)
    return [{**row, "us": us, "x cuBLAS": cublas / us} for row, us in zip(rows, ours, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="int4_g32_fp16,int4_lut16,int4_g8_fp16")
    parser.add_argument("--shapes", default=SHAPES, help="K x N, with an x between")
    parser.add_argument("--tokens", default=TOKENS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    losses = []
    for layout in args.layouts.split(","):
        for shape in args.shapes.split(","):
            k, n = map(int, shape.split("x"))
            copies, _, dense = ring_of_copies(layout, n, k)
            for m in map(int, args.tokens.split(",")):
                found = measure(layout, copies, dense, m)
                rows += found
                taken, best = found[0], min(found, key=lambda row: row["us"])
                losses.append(taken["us"] / best["us"] - 1)
                line = (
                    f"{layout} {shape} M={m}: {taken['us']:.1f} us, {taken['x cuBLAS']:.2f} x cuBLAS, {taken['form']}"
                )
                if best is not taken:
                    line += f"; {100 * losses[-1]:.1f} % less by {best['form']}"
                print(line, flush=True)
    notes = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}",
        f"what is taken was {100 * statistics.mean(losses):.2f} % slower than the fastest form of each product in the "
        f"mean of {len(losses)}, {100 * max(losses):.1f} % at most",
    ]
    report("forms", machine(*installed("tenpak", "torch", "cupy-cuda12x", "cupy-cuda13x")), rows, notes)


if __name__ == "__main__":
    main()
