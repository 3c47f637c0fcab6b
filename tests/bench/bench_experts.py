"""Grouped products with experts' quantised weights, by each kernel that has them, beside PyTorch's in BF16.

    python tests/bench/bench_experts.py [--layouts int4_g32_fp16] [--models Mixtral] [--tokens 64,512]

Needs CuPy and torch. Of each model's layers the two shapes of an expert, [n, k], for so many tokens, each of which goes
to the model's number of experts, drawn evenly. Every product is compared with the unpacked weight's. Times are medians
over replays of a CUDA graph. What `grouped_matmul` takes is marked; results/experts.json has all.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from functools import partial
from typing import Any

import cupy
import numpy as np
import torch
from bench_gemm import graph_us, installed, random_weight
from harness import machine, report
from tenpak.cuda import plans, products
from tenpak.cuda.compile import function

#: Experts, those of a token, and the shapes [n, k] of an expert's weights.
MODELS = {
    "Mixtral 8x7B": (8, 2, ((28672, 4096), (4096, 14336))),
    "Qwen3 30B A3B": (128, 8, ((1536, 2048), (2048, 768))),
}
TOKENS = "1,4,16,32,64,128,256,1024,4096"


def experts(layout: str, n: int, k: int, batch: int) -> Any:
    """A weight of `batch` random matrices [n, k]: one matrix of as many rows, whose strips are then those of each."""
    weight = random_weight(layout, batch * n, k)
    weight.shape, weight.batch = (n, k), batch
    return weight


def kernels(layout: str, n: int, k: int, m: int, batch: int) -> dict[str, plans.Plan]:
    """Plans of all kernels that have experts, the one that is taken first."""
    here = products.device_of(0)
    taken = plans.choose(here, layout, n, k, m, batch, grouped=True, in_boxes=True)
    found = {
        "skinny": plans.skinny_plans(here, layout, n, k, m, batch, False, True)[0],
        "tiled": plans.tiled_plan(here, layout, n, k, m, batch, grouped=True),
    }
    if m > 32 * batch:  # It reads the weights for each few tokens of an expert again.
        del found["skinny"]
    if here.hopper:
        found["wide"] = plans.experts_plan(here, layout, n, k, m, batch, False)
    return {taken.kernel: taken, **found}


def multiply(w: Any, plan: plans.Plan, kernel: Any, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> None:
    """y = x Wᵀ by a plan, on torch's current stream."""
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    m, k = x.shape
    addresses = (x.data_ptr(), y.data_ptr())
    products.run((plan, kernel), w, *addresses, m, k, bf16=False, stream=stream, offsets=offsets.data_ptr())


def measure(weight: Any, layout: str, dense: torch.Tensor, chosen: Any) -> dict[str, Any]:
    """Microseconds of each kernel and of PyTorch's for tokens of the experts `chosen`, one a token and sorted."""
    batch, n, k = dense.shape
    m = len(chosen)
    ends = np.cumsum(np.bincount(chosen, minlength=batch))
    offsets = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).cuda()
    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
    parts = zip(x.split(np.diff(ends, prepend=0).tolist()), dense, strict=True)
    wanted = torch.cat([tokens.float() @ matrix.float().T for tokens, matrix in parts])
    brain, matrices = x.bfloat16(), dense.bfloat16().transpose(1, 2)
    row: dict[str, Any] = {
        "BF16 us": graph_us([partial(torch._grouped_mm, brain, matrices, offs=offsets[1:])] * 8, replays=5)
    }
    found = kernels(layout, n, k, m, batch)
    row["taken"] = next(iter(found))
    for name, plan in found.items():
        kernel = function(plan.source, plan.kernel, plan.defines, 0)
        y.fill_(float("nan"))
        multiply(weight, plan, kernel, x, y, offsets)
        error = float((y.float() - wanted).norm() / wanted.norm())
        if not error < 2e-3:
            raise SystemExit(f"{layout} {k}x{n}, {m} tokens of {batch} experts, {name}: relative error {error}")
        calls = [partial(multiply, weight, plan, kernel, x, y, offsets)] * 8
        row[f"{name} us"] = statistics.median(graph_us(calls, replays=5) for _ in range(3))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="int4_g32_fp16")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=TOKENS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    random = np.random.default_rng(1)
    models = [model for model in MODELS if any(name in model for name in args.models.split(","))]
    for layout, model in itertools.product(args.layouts.split(","), models):
        batch, of_token, shapes = MODELS[model]
        for n, k in shapes:
            weight = experts(layout, n, k, batch)
            dense = torch.empty((batch, n, k), device="cuda", dtype=torch.float16)
            stream = cupy.cuda.get_current_stream()
            for i in range(batch):
                products.unpack(weight, cupy.asarray(dense[i]), False, stream, i)
            stream.synchronize()
            for count in map(int, args.tokens.split(",")):
                chosen = np.sort(np.concatenate([random.permutation(batch)[:of_token] for _ in range(count)]))
                row = {"layout": layout, "model": model, "K x N": f"{k}x{n}", "tokens": count}
                row["experts"] = len(np.unique(chosen))
                row |= measure(weight, layout, dense, chosen)
                rows.append(row)
                times = ", ".join(f"{name[:-3]} {us:.1f}" for name, us in row.items() if name.endswith(" us"))
                print(
                    f"{model} {k}x{n}, {count} tokens, {row['experts']} experts: {row['taken']} of {times} us",
                    flush=True,
                )
    notes = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}"]
    report("experts", machine(*installed("tenpak", "torch", "cupy-cuda12x", "cupy-cuda13x")), rows, notes)


if __name__ == "__main__":
    main()
