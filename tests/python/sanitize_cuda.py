"""Every kind of product of some layouts, for compute-sanitizer; ends with 1 where one is wrong.

    compute-sanitizer --tool memcheck python tests/python/sanitize_cuda.py int4_g32_fp16
    compute-sanitizer --tool racecheck python tests/python/sanitize_cuda.py --racecheck int4_g32_fp16

Each array is an allocation of its own: in CuPy's pool what lies beyond one is often another's, and memcheck then finds
nothing. With --racecheck kernels are built so that racecheck follows their barriers (cuda/engine.cuh).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import cupy
import numpy as np
from tenpak.cuda import grouped_matmul, layouts, matmul, products
from test_cuda_matmul import TOLERANCE, activations, error, exact, expected_norm, poisoned, random_weight

#: Sources that have barriers in shared memory.
BARRIERS = ("skinny.cu", "rows.cu", "wide.cu")
#: Tokens of each of five experts: one has some, blocks more than strips, a few each, tiles, and several tiles.
EXPERTS = ([0, 0, 0, 1, 0], [2, 0, 0, 1, 1], [0, 6, 1, 0, 1], [0, 30, 0, 0, 10], [30, 0, 300, 70, 0])
#: Rows and columns: each kind of block, whole and in part.
SHAPES = ((130, 1000), (2500, 264))
#: Tokens: in integers, in few columns, in tiles, in several of them.
TOKENS = (1, 3, 9, 33, 70, 300)


def check(layout: str, dtype: str) -> list[str]:
    """What is wrong: products beside FP64, of x that the copy engine can read and, an element further on, cannot."""
    wrong = []

    def compare(what: str, ours: Any, wanted: np.ndarray, norm: float = 0.0) -> None:
        if not error(ours, wanted, norm) < TOLERANCE[dtype]:
            wrong.append(f"{layout}, {dtype}: {what}")

    for beside in (0, 1):
        n, k = 70, 200
        w = random_weight(layout, n, k, 5)
        dense = w.to_dense(np.float32).get().astype(np.float64)
        for counts in EXPERTS:
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            x = activations(cupy, sum(counts), k + beside, dtype=dtype)[:, beside:]
            parts = [x[slice(*offsets[e : e + 2])].get().astype(np.float64) @ dense[e].T for e in range(5)]
            out = poisoned(cupy, sum(counts), n, dtype=dtype)
            compare(f"experts {counts}", grouped_matmul(x, w, cupy.asarray(offsets), out=out), np.concatenate(parts))
        for n, k in SHAPES:
            w = random_weight(layout, n, k)
            bias = activations(cupy, n, dtype=dtype)
            for m in TOKENS:
                x = activations(cupy, m, k + beside, dtype=dtype)[:, beside:]
                compare(f"{m} x {n} x {k}", matmul(x, w, bias), exact(x, w, bias), expected_norm(x, w))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=list(layouts.LAYOUTS))
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float16")
    parser.add_argument("--racecheck", action="store_true")
    arguments = parser.parse_args()
    cupy.cuda.set_allocator(None)
    function = products.function
    if arguments.racecheck:

        def followed(source: str, kernel: str, defines: Any, device: int) -> Any:
            more = {"RACECHECK": 1} if source in BARRIERS else {}
            return function(source, kernel, {**defines, **more}, device)

        products.function = followed
    wrong = [one for layout in arguments.layouts for one in check(layout, arguments.dtype)]
    print("\n".join(wrong) or f"right: {', '.join(arguments.layouts)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
