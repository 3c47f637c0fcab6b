"""Runs `skinny.cu` on the CPU: the copy engine's and warps' copies, named barriers and products in plain C++.

As in hopper_on_cpu, which this builds on, copies happen at once or at the last moment, when somebody waits for them.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from guarded import each_guarded, guarded
from hopper_on_cpu import BOXES, ENGINE, FLAGS, HOPPER, layouts_on_cpu, tensor_maps
from numpy.typing import NDArray
from tenpak.cuda.plans import Plan
from warps_on_cpu import WARP, built

#: Copies of cuda/layouts.cuh, which `PAIRS` of hopper_on_cpu leaves out, and what else the kernel asks of CUDA.
COPIES = """
namespace tenpak {
inline void copy_once(u32 to, const u8* from) { copy16(at_shared(to), from); }
inline void commit_copies() { commit(); }
template <int PENDING> void wait_for_copies() { wait<PENDING>(); }
inline void write(u32 to, const float4& v) { memcpy(at_shared(to), &v, sizeof v); }
inline void write(u32 to, const float2& v) { memcpy(at_shared(to), &v, sizeof v); }
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline u32 __float_as_uint(float x) { return tenpak::to_bits(x); }
inline float __uint_as_float(u32 x) { return tenpak::from_bits(x); }
inline u32 bits_of(float x) { return tenpak::to_bits(x); }
inline u32 bits_of(u32 x) { return x; }
inline u32 bits_of(int x) { return (u32)x; }
template <class T> T __shfl_xor_sync(u32, T x, int mask) {
    return tenpak::same_bits<T>((u32)tenpak::share<1>({(u64)bits_of(x)})[threadIdx.x % 32 ^ mask][0]);
}
inline u32 __shfl_sync(u32, u32 x, int lane) { return (u32)tenpak::share<1>({(u64)x})[lane][0]; }
inline float __shfl_sync(u32, float x, int lane) {
    return tenpak::from_bits((u32)tenpak::share<1>({(u64)bits_of(x)})[lane][0]);
}
inline u32 __reduce_max_sync(u32, u32 x) {
    auto all = tenpak::share<1>({(u64)x});
    u32 most = 0;
    for (int i = 0; i < 32; ++i) most = max(most, (u32)all[i][0]);
    return most;
}
"""

#: Stands in for cuda/few.cuh.
FEW = """
#pragma once
#include "engine.cuh"
namespace tenpak {
inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { multiply<(bool)BF16>(d, a, b0, b1); }
template <bool SIGNED> void multiply(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    auto all = share<6>({a[0], a[1], a[2], a[3], b0, b1});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k) {
            const u8 of_a = (u8)(all[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2] >> (8 * (k % 4)));
            const signed char of_b = (signed char)(all[column * 4 + k % 16 / 4][4 + k / 16] >> (8 * (k % 4)));
            d[i] += (SIGNED ? (int)(signed char)of_a : (int)of_a) * of_b;
        }
    }
}
inline void read_if(u32 wanted, u32 from, u32& x, u32& y) {
    if (wanted) x = read<u32>(from), y = read<u32>(from + 4);
}
inline void read_if(u32 wanted, u32 from, u32& x, u32& y, u32& z, u32& w) {
    read_if(wanted, from, x, y);
    read_if(wanted, from + 8, z, w);
}
inline void copy_or_zeros(u32 to, const void* from, int bytes) { copy16(at_shared(to), from, bytes != 0); }
inline float reciprocal(float x) { return 1.0f / x; }
static Barrier named[16];
template <int OF> void wait_at_barrier(int barrier) { arrive(named[barrier], OF); }
template <int OF> void wait_at_barrier_after(u64, int barrier) { wait_at_barrier<OF>(barrier); }
}
"""


@functools.cache
def _library(source: str, kernel: str, defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    stand_ins = {"warp.cuh": WARP, "layouts.cuh": layouts_on_cpu(COPIES), "engine.cuh": ENGINE, "few.cuh": FEW}
    if source in ("rows.cu", "tiled.cu"):
        stand_ins["boxes.cuh"] = BOXES
    if source == "tiled.cu":
        stand_ins["hopper.cuh"] = HOPPER
    dynamic = "extern __shared__ __align__(128) uint4 dynamic[];", "uint4* const dynamic = (uint4*)dynamic_memory();"
    # What is Hopper's own is not used there, but read.
    flags = [*FLAGS, "-include", "layouts.cuh", *(["-DGROUPS=1"] if source == "tiled.cu" else [])]
    return built(source, kernel, defines, "sm_90", stand_ins, flags, dynamic)


def run(
    plan: Plan,
    packed: tuple[NDArray, NDArray | None, NDArray | None],
    x: NDArray,
    y: NDArray,
    bias: NDArray | None = None,
    offsets: NDArray | None = None,
    norm: tuple[NDArray, NDArray | None, float] | None = None,
    scale: float = 1.0,
) -> None:
    """As `tenpak.cuda.products.run` launches it, on NumPy arrays: x [batch, m, k] (or [tokens, k]) and y alike."""
    batch = packed[0].shape[0] if packed[0].ndim == 4 else 1
    partial, counters = guarded(np.full(plan.partial_bytes, 255, np.uint8)), guarded(np.zeros(plan.counters, np.uint32))
    x, out = guarded(x), guarded(y)
    *parts, bias, offsets = each_guarded(*packed, bias, offsets)

    def address(array: NDArray | None) -> np.uint64:
        return np.uint64(0 if array is None else array.ctypes.data)

    steps = [np.int64(0 if part is None else part.nbytes // batch) for part in parts]
    boxes = []
    if plan.boxes:
        boxes = [tensor_maps(x if x.ndim == 3 else x[None], x.shape[-1], plan.boxes)]
        arrays, stride = [*parts, out, bias, offsets, partial, counters], []
    else:
        arrays, stride = [*parts, x, out, bias, offsets, partial, counters], [np.int64(x.shape[-1])]
    arguments = [*map(address, arrays), *steps, *stride, *plan.scalars, np.float32(scale)]
    if norm is not None:
        arguments += [address(norm[0]), address(norm[1]), np.float32(norm[2])]
    boxes += [np.array([argument]) for argument in arguments]
    pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
    library = _library(plan.source, plan.kernel, tuple(sorted(plan.defines.items())))
    library.launch(pointers, (ctypes.c_uint * 3)(*plan.grid), plan.block[0], plan.shared)
    assert not counters.any()
    y[...] = out
