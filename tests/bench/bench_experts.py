"""Grouped products with experts' quantised weights, by each kernel that has them, beside PyTorch's in BF16.

    python tests/bench/bench_experts.py [--layouts int4_g32_fp16] [--models Mixtral] [--tokens 64,512]

Needs CuPy and torch. Of each model's layers the two shapes of an expert, [n, k], for so many tokens, each of which goes
to the model's number of experts, drawn evenly. Every product is compared with the unpacked weight's. Times are medians
over replays of a CUDA graph. What `grouped_matmul` takes is marked; results/experts.json has all.
"""

from __future__ import annotations

import argparse
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
        taken.kernel: taken,
        "skinny": plans.skinny_plans(here, layout, n, k, m, batch, False, True, plans.PLAIN)[0],
        "tiled": plans.tiled_plan(here, layout, n, k, m, batch, grouped=True),
    }
    if here.hopper:
        found["wide"] = plans.experts_plan(here, layout, n, k, m, batch, False)
    return {taken.kernel: taken, **found}


def multiply(w: Any, plan: plans.Plan, kernel: Any, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor) -> None:
    """y = x Wᵀ by a plan, on torch's current stream."""
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
    m, k = x.shape
    addresses = (x.data_ptr(), y.data_ptr())
    products.run((plan, kernel), w, *addresses, m, k, bf16=False, stream=stream, offsets=offsets.data_ptr())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default="int4_g32_fp16")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=TOKENS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    random = np.random.default_rng(1)
    for layout in args.layouts.split(","):
        for model, (batch, of_token, shapes) in MODELS.items():
            if not any(name in model for name in args.models.split(",")):
                continue
            for n, k in shapes:
                weight = experts(layout, n, k, batch)
                dense = torch.empty((batch, n, k), device="cuda", dtype=torch.float16)
                stream = cupy.cuda.get_current_stream()
                for i in range(batch):
                    products.unpack(weight, cupy.asarray(dense[i]), False, stream, i)
                stream.synchronize()
                brain = dense.bfloat16().transpose(1, 2)
                for count in map(int, args.tokens.split(",")):
                    chosen = np.concatenate([random.permutation(batch)[:of_token] for _ in range(count)])
                    ends = np.cumsum(np.bincount(chosen, minlength=batch)).astype(np.int32)
                    offsets = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).cuda()
                    m = count * of_token
                    x = torch.randn(m, k, device="cuda", dtype=torch.float16)
                    y = torch.empty(m, n, device="cuda", dtype=torch.float16)
                    parts = [
                        x[a:b].float() @ dense[i].float().T
                        for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
                    ]
                    wanted = torch.cat(parts)
                    brains = graph_us([partial(torch._grouped_mm, x.bfloat16(), brain, offs=offsets[1:])] * 8, replays=5)
                    row: dict[str, Any] = {"layout": layout, "model": model, "K x N": f"{k}x{n}", "tokens": count}
                    plans_of = kernels(layout, n, k, m, batch)
                    row |= {"taken": next(iter(plans_of)), "BF16 us": brains}
                    for name, plan in plans_of.items():
                        kernel = function(plan.source, plan.kernel, plan.defines, 0)
                        y.fill_(float("nan"))
                        multiply(weight, plan, kernel, x, y, offsets)
                        error = float((y.float() - wanted).norm() / wanted.norm())
                        if not error < 2e-3:
                            raise SystemExit(
                                f"{layout} {model} {k}x{n}, {count} tokens, {name}: relative error {error}"
                            )
                        calls = [partial(multiply, weight, plan, kernel, x, y, offsets)] * 8
                        row[f"{name} us"] = statistics.median(graph_us(calls, replays=5) for _ in range(3))
                    rows.append(row)
                    print(
                        {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()},
                        flush=True,
                    )
    notes = [f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CuPy {cupy.__version__}"]
    report("experts", machine(*installed("tenpak", "torch", "cupy-cuda12x", "cupy-cuda13x")), rows, notes)


if __name__ == "__main__":
    main()
