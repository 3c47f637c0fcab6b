"""Runs CUDA kernels whose warps work together on the CPU: attention, the cache, a decoder's steps, with no GPU.

A block's threads are fibers that take turns; where lanes of a warp exchange values (cuda/warp.cuh, which plain C++
replaces here), each waits for the others. Copies in the background happen at the last moment that the kernel allows,
and shared memory begins as NaN, so that a missing wait or barrier shows.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
from support import ROOT
from tenpak.cuda import compile as kernels

#: Fibers and the linker's options are Linux's.
COMPILER = cuda_on_cpu.COMPILER if sys.platform == "linux" else None

#: Stands in for cuda/warp.cuh.
WARP = """
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <deque>
#include <utility>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
using std::max;
using std::min;
struct Dim { unsigned x, y, z; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Barrier { int arrived = 0, generation = 0; };
struct Copy { void* to; const void* from; bool there; };
struct Warp { Barrier barrier; u64 slots[2][32][6]; };
struct Fiber {
    ucontext_t context;
    // Of which only what is used becomes memory: a process has hundreds of libraries like this one.
    char* stack = nullptr;
    Dim index;
    bool done;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
static Dim blockIdx, blockDim, gridDim;
static Fiber* current;
static ucontext_t scheduler;
constexpr size_t STACK = 1 << 16;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Barrier block;
static std::vector<u8> dynamic;
static unsigned launches;
#define threadIdx (current->index)
inline void arrive(Barrier& barrier, int of) {
    const int generation = barrier.generation;
    if (++barrier.arrived == of) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
    }
}
inline Warp& warp_here() { return warps[threadIdx.x / 32]; }
inline void __syncwarp() { arrive(warp_here().barrier, 32); }
inline void __syncthreads() { arrive(block, blockDim.x); }
inline void __threadfence() {}
template <class T> T atomicAdd(T* at, T value) { T old = *at; *at += value; return old; }
inline u64 __umul64hi(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcg(T* to, T value) { *to = value; }

namespace tenpak {
constexpr int LANES = 32;
struct alignas(16) Vector { u32 words[4]; };
template <class To, class From> To same_bits(From x) { To to; memcpy(&to, &x, sizeof to); return to; }
inline float from_half(u16 x) { return (float)same_bits<_Float16>(x); }
inline u16 to_half(float x) { return same_bits<u16>((_Float16)x); }
inline float from_bits(u32 x) { return same_bits<float>(x); }
inline u32 to_bits(float x) { return same_bits<u32>(x); }
inline u16 to_brain(float x) { u32 b = to_bits(x); return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16); }
inline u8* dynamic_shared() { return dynamic.data(); }

// Each lane's values, for all lanes of its warp.
template <int N> u64 (*share(const u64 (&mine)[N]))[6] {
    Warp& warp = warp_here();
    u64 (*slots)[6] = warp.slots[warp.barrier.generation & 1];
    for (int i = 0; i < N; ++i) slots[threadIdx.x % 32][i] = mine[i];
    arrive(warp.barrier, 32);
    return slots;
}
template <bool BRAIN> float real(u64 word, int half) {
    const u16 x = (u16)(word >> (16 * half));
    return BRAIN ? from_bits((u32)x << 16) : from_half(x);
}
template <bool BRAIN> void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    auto all = share<6>({a[0], a[1], a[2], a[3], b0, b1});
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k)
            sum += (double)real<BRAIN>(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                   real<BRAIN>(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
        d[i] = (float)sum;
    }
}
inline u32 transpose(u32 x) {
    auto all = share<1>({x});
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    auto at = [&](int row) { return (u32)(u16)(all[row * 4 + g / 2][0] >> (16 * (g % 2))); };
    return at(2 * t) | at(2 * t + 1) << 16;
}
inline void load_matrices(u32 (&d)[4], const void* row) {
    auto all = share<1>({(u64)row});
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < 4; ++m) d[m] = ((const u32*)all[8 * m + g][0])[t];
}
inline void load_transposed(u32 (&d)[4], const void* row) {
    auto all = share<1>({(u64)row});
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int m = 0; m < 4; ++m)
        d[m] = ((const u16*)all[8 * m + 2 * t][0])[g] | (u32)((const u16*)all[8 * m + 2 * t + 1][0])[g] << 16;
}
inline int lane_of_warp() { return threadIdx.x % 32; }
// Dynamic shared memory has addresses from 64 on.
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - dynamic.data()) + 64; }
inline u8* at_address(u32 at, int bytes) {
    if (at < 64 || at - 64 + bytes > dynamic.size() || at % bytes) abort();
    return dynamic.data() + at - 64;
}
template <int N> void read(u32 (&words)[N], u32 at) { memcpy(words, at_address(at, 4 * N), 4 * N); }
inline void copy16(void* to, const void* from, bool there = true) { current->open.push_back({to, from, there}); }
inline void copy16(u32 to, const void* from, bool there = true) { copy16(at_address(to, 16), from, there); }
inline u32 arrive_at(u32* counter) { return (*counter)++; }
inline void commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}
template <int PENDING> void wait() {
    while (current->groups.size() > PENDING) {
        for (const Copy& copy : current->groups.front()) {
            if (copy.there) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
        current->groups.pop_front();
    }
}
inline float exchange(float x, int mask) { return from_bits((u32)share<1>({to_bits(x)})[threadIdx.x % 32 ^ mask][0]); }
inline float from_lane(float x, int lane) { return from_bits((u32)share<1>({to_bits(x)})[lane][0]); }
inline u64 from_lane_below(u64 x, int step) {
    auto all = share<1>({x});
    const int lane = threadIdx.x % 32;
    return lane < step ? x : all[lane - step][0];
}
inline bool any(bool x) {
    auto all = share<1>({(u64)x});
    bool result = false;
    for (int i = 0; i < 32; ++i) result |= all[i][0] != 0;
    return result;
}
template <bool UPPER> u32 bytes_as_halves(u32 x) {
    if (UPPER) x >>= 16;
    return (x & 255) | (x >> 8 & 255) << 16;
}
inline u32 halves(double low, double high) {
    return to_half((float)low) | (u32)to_half((float)high) << 16;
}
template <bool BRAIN = false> u32 pack(float low, float high) {
    return BRAIN ? to_brain(low) | (u32)to_brain(high) << 16 : halves(low, high);
}
inline u32 __ballot_sync(u32, bool x) {
    auto all = share<1>({(u64)x});
    u32 found = 0;
    for (int lane = 0; lane < 32; ++lane) found |= (u32)all[lane][0] << lane;
    return found;
}
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline float power_of_two(float x) { return exp2f(x); }
template <bool BRAIN> float from_activation(u16 x) { return real<BRAIN>(x, 0); }
template <bool BRAIN> u16 to_activation(float x) { return (u16)pack<BRAIN>(x, 0.0f); }

struct Task { void (*call)(void*); void* with; };
static Task task;
inline void enter() {
    task.call(task.with);
    // What nobody has waited for is copied all the same.
    commit();
    wait<0>();
    current->done = true;
    swapcontext(&current->context, &scheduler);
}
inline void run_block() {
    for (unsigned t = 0; t < blockDim.x; ++t) {
        Fiber& fiber = fibers[t];
        fiber.index = {t, 0, 0};
        fiber.done = false;
        fiber.groups.clear();
        fiber.open.clear();
        if (!fiber.stack) fiber.stack = (char*)malloc(STACK);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, (void (*)())enter, 0);
    }
#ifndef SKIPS
#define SKIPS 0
#endif
    // With SKIPS some warps wait, so that others come far.
    bool skip = false;
    for (bool busy = true; busy;) {
        busy = false;
        for (unsigned t = 0; t < blockDim.x; ++t) {
            if (fibers[t].done) continue;
            busy = true;
            if (SKIPS && t % 32 == 0) skip = rand() % 4 != 0;
            if (skip) continue;
            current = &fibers[t];
            swapcontext(&scheduler, &current->context);
        }
    }
}
template <class F> void launch_all(F call, const unsigned* grid, unsigned threads, unsigned shared) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    if (fibers.size() < threads) fibers.resize(threads);
    warps.assign((threads + 31) / 32, Warp());
    task = {[](void* f) { (*(F*)f)(); }, &call};
#ifndef ASCENDING
#define ASCENDING 0
#endif
    // Blocks may count on no order: it turns every sixteen launches, so that steps which are a tile apart meet both.
    const bool ascending = ASCENDING || launches++ / 16 % 2;
    for (unsigned z = grid[2]; z-- > 0;)
        for (unsigned y = grid[1]; y-- > 0;)
            for (unsigned x = grid[0]; x-- > 0;) {
                blockIdx = {ascending ? grid[0] - 1 - x : x, y, z};
                dynamic.assign(shared + 16, 0xff);
                run_block();
            }
}
template <class... A, size_t... I>
void launch(void (*kernel)(A...), void** a, std::index_sequence<I...>, const unsigned* grid, unsigned threads,
            unsigned shared) {
    launch_all([=] { kernel(*static_cast<A*>(a[I])...); }, grid, threads, shared);
}
template <class... A>
void launch(void (*kernel)(A...), void** a, const unsigned* grid, unsigned threads, unsigned shared) {
    launch(kernel, a, std::index_sequence_for<A...>{}, grid, threads, shared);
}
}
"""


def built(
    source: str,
    kernel: str,
    defines: tuple[tuple[str, object], ...],
    arch: str,
    stand_ins: dict[str, str],
    flags: Sequence[str],
    dynamic: tuple[str, str] | None = None,
) -> ctypes.CDLL:
    """A kernel of cuda/ as a library that has `launch`, compiled once for each text.

    `stand_ins` are what headers are on a CPU; `flags` the compiler's; `dynamic` how the source declares its dynamic
    shared memory, and what stands in place of that.
    """
    # Kernels may be named like functions of the C library.
    flags = ["-Wl,-Bsymbolic", *flags, *cuda_on_cpu.language(source, dict(defines), arch)]
    launcher = (
        f'extern "C" void launch(void** a, const unsigned* g, unsigned t, unsigned s) '
        f"{{ tenpak::launch({kernel}, a, g, t, s); }}\n"
    )
    text = (ROOT / "cuda" / source).read_text()
    if dynamic is not None:
        assert dynamic[0] in text
        text = text.replace(*dynamic)
    return cuda_on_cpu.compiled({**kernels.headers(source), **stand_ins, "kernel.cpp": text + launcher}, flags)


@functools.cache
def _library(name: str, defines: tuple[tuple[str, object], ...], kernel: str) -> ctypes.CDLL:
    stand_ins = {"warp.cuh": WARP, "floats.cuh": '#pragma once\n#include "warp.cuh"\n'}
    return built(name, kernel, defines, "sm_80", stand_ins, ["-include", "warp.cuh"])


def function(name: str, kernel: str, defines: dict[str, object], device: int) -> Any:
    """`tenpak.cuda.compile.function`, on the CPU."""
    library = _library(name, tuple(sorted(defines.items())), kernel)

    def call(
        grid: tuple[int, int, int], block: tuple[int], arguments: Any, shared: int = 0, stream: Any = None
    ) -> None:
        values = [np.uint64(a) if isinstance(a, int) else a for a in arguments]
        boxes = [np.array([value]) for value in values]
        pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        library.launch(pointers, (ctypes.c_uint * 3)(*grid), block[0], shared)

    return call


class _Stream:
    ptr = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def warps_on_cpu(multiprocessors: int = 3) -> Iterator[SimpleNamespace]:
    """`tenpak.cuda.cache` and `tenpak.cuda.attention`, loaded afresh over NumPy and a GPU of few multiprocessors."""
    cupy = cuda_on_cpu._cupy()
    cupy.uint8, cupy.uint32, cupy.int32 = np.uint8, np.uint32, np.int32
    cupy.cuda = SimpleNamespace(
        Device=lambda number=0: nullcontext(),
        get_current_stream=_Stream,
        runtime=SimpleNamespace(getDevice=lambda: 0),
    )
    with cuda_on_cpu.afresh(cupy, ("products", "cache", "attention")) as loaded:
        cache, attention = loaded["cache"], loaded["attention"]
        device = SimpleNamespace(multiprocessors=multiprocessors, shared_all=228 << 10)
        attention.device_of = lambda number: device
        cache.function = attention.function = function
        yield SimpleNamespace(
            array=cuda_on_cpu.array,
            KVCache=cache.KVCache,
            RotaryTable=cache.RotaryTable,
            attend=attention.attend,
            append_and_attend=attention.append_and_attend,
            prefill=attention.prefill,
            prepare=attention.prepare,
        )
