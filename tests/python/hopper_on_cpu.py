"""Runs `wide.cu` on the CPU: what Hopper's copy engine, barriers and warpgroup products do, in plain C++.

Blocks run one after another; their threads are the fibers of warps_on_cpu, some warps waiting at random. A copy happens
at once or, as likely, at the last moment that the kernel allows, when somebody waits for its barrier; a product, which
then reads shared memory, when its own group waits for it. So a stage read or released too early gives wrong sums.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
from guarded import each_guarded, guarded
from numpy.typing import NDArray
from support import ROOT
from tenpak.cuda import wide as plans
from tenpak.cuda.plans import STAGE_BYTES
from warps_on_cpu import WARP, built

#: Stands in for what cuda/layouts.cuh says in assembly: its sections on copies and on pairs of floats.
PAIRS = """
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
#define __constant__ static
#define __grid_constant__
#define __cluster_dims__(...)
#ifndef CLUSTER
#define CLUSTER 1
#endif
#define IN_CLUSTERS
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldg(const T* at) { return *at; }
inline int __shfl_sync(u32, int x, int lane) { return (int)tenpak::share<1>({(u64)(u32)x})[lane][0]; }

namespace tenpak {
// Shared arrays that are not dynamic have addresses by their distance from this.
alignas(256) static u64 pinned;
// Others are in a launch's dynamic shared memory.
static u32 first_shared, shared_size;
inline u8* at_shared(u32 address) {
    if (address >> 31) return (u8*)&pinned + ((long long)address - 0xc0000000ll);
    if (address < first_shared || address >= first_shared + shared_size) abort();
    return (u8*)(u64)address;
}
inline u32 shared_address(const void* p) {
    return (u64)p >> 31 ? (u32)((long long)((u8*)p - (u8*)&pinned) + 0xc0000000ll) : (u32)(u64)p;
}
template <class T> T read(const u8* from) { return *(const T*)from; }
template <class T> T read(u32 at) {
    if ((u64)at_shared(at) % sizeof(T)) abort();
    T v;
    memcpy(&v, at_shared(at), sizeof v);
    return v;
}
inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
inline u32 and_xor(u32 a, u32 b, u32 c) { return (a & b) ^ c; }
inline u32 permute(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 d = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 s = selector >> (4 * i) & 15, byte = bytes >> (8 * (s & 7)) & 255;
        d |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * i);
    }
    return d;
}
inline u32 low_twice(u32 pair) { return (pair & 0xffff) * 0x10001; }
inline u32 high_twice(u32 pair) { return (pair >> 16) * 0x10001; }
template <class F> u32 each(F f) { return f(0) | (u32)f(16) << 16; }
inline u32 half_fma(u32 a, u32 b, u32 c) {
    return each([=](int i) {
        const double sum = (double)from_half(a >> i) * from_half(b >> i) + from_half(c >> i);
        return same_bits<u16>((_Float16)sum);
    });
}
inline u32 half_sub(u32 a, u32 b) { return half_fma(b, 0xbc00bc00, a); }
inline u32 half_mul(u32 a, u32 b) { return half_fma(a, b, 0x80008000); }
inline float brain(u32 pair, int i) { return from_bits(pair >> i << 16); }
inline u32 bfloat_fma(u32 a, u32 b, u32 c) {
    return each([=](int i) { return to_brain((float)((double)brain(a, i) * brain(b, i) + brain(c, i))); });
}
inline u32 to_bfloat(u32 pair) { return each([=](int i) { return to_brain(from_half(pair >> i)); }); }
inline u16 narrow(float x) { return BF16 ? to_brain(x) : to_half(x); }
inline float widen(u16 x) { return real<BF16>(x, 0); }
inline u32 fma_pair(u32 a, u32 b, u32 c) { return BF16 ? bfloat_fma(a, b, c) : half_fma(a, b, c); }
}
"""

#: Stands in for cuda/engine.cuh.
ENGINE = """
#pragma once
#include "layouts.cuh"
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <map>

namespace tenpak {
inline u32 load_acquire(const u32* at) { return *at; }
inline void add_release(u32* at, u32 value) { *at += value; }
inline void check(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "%s\\n", what);
    abort();
}
inline u32 keep_address(u32 address) { return address; }
inline u32 opaque_minus_one() { return ~0u; }

struct Counter { int of, missing; long long bytes; u32 parity; };
struct Piece { u32 to; const u8* from; u32 bytes; };
// The copy engine's piece, whose bytes a barrier counts, or a thread's pieces, after which it arrives.
struct Engine { std::vector<Piece> pieces; bool arrives; };
static std::map<u32, Counter> counters;
static std::map<int, std::vector<Piece>> asked_for;
static std::map<u32, std::vector<Engine>> under_way;
static u32 random_state;
static u64 turns;

// Where a block's dynamic shared memory is: of 32 bits, the lowest eighteen zero but for an odd sixteen bytes.
inline u8* memory() {
    static u8* const begin = [] {
        u8* some = (u8*)mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        check(some != MAP_FAILED, "no memory");
        return (u8*)(((u64)some + (1 << 18) - 1) >> 18 << 18) + 16;
    }();
    return begin;
}
// For each block anew, whose threads ask for it once each.
inline u8* dynamic_memory() {
    static u64 asked = 0;
    if (asked++ % blockDim.x == 0) {
        first_shared = (u32)(u64)memory();
        shared_size = dynamic.size() - 16;
        memset(memory(), 0xff, 230 << 10);
        for (const auto& copies : under_way) check(copies.second.empty(), "a block ends before its copies");
        counters.clear();
        under_way.clear();
        asked_for.clear();
    }
    return memory();
}
inline Counter& counter(u32 barrier) {
    check(counters.count(barrier), "a barrier is used before it is made");
    return counters[barrier];
}
inline void may_end(Counter& c) {
    check(c.missing >= 0, "more arrive at a barrier than it expects");
    if (c.missing || c.bytes) return;
    c.missing = c.of;
    c.parity ^= 1;
}
inline void barrier_init(u32 barrier, u32 count) { counters[barrier] = {(int)count, (int)count, 0, 0}; }
inline void barriers_ready() {}
inline void barrier_arrive(u32 barrier) {
    Counter& c = counter(barrier);
    --c.missing;
    may_end(c);
}
#define RACECHECK 0
constexpr int ARRIVALS = 1;
inline void lane_arrives(u32 barrier, int lane) {
    if (lane == 0) barrier_arrive(barrier);
}
inline void warp_arrives(u32 barrier, int lane) {
    __syncwarp();
    lane_arrives(barrier, lane);
}
inline bool elected() {
    __syncwarp();
    return threadIdx.x % 32 == 0;
}
inline void barrier_expect(u32 barrier, u32 bytes) {
    counter(barrier).bytes += bytes;
    barrier_arrive(barrier);
}
inline u32 random_bits() { return (random_state = random_state * 1664525 + 1013904223) >> 8; }
inline void perform(const Engine& copy, u32 barrier) {
    Counter& c = counter(barrier);
    for (const Piece& piece : copy.pieces) {
        if (piece.from) memcpy(at_shared(piece.to), piece.from, piece.bytes);
        else memset(at_shared(piece.to), 0, piece.bytes);
        if (!copy.arrives) c.bytes -= piece.bytes;
    }
    if (copy.arrives) --c.missing;
    may_end(c);
}
inline void ask_for(const Engine& copy, u32 barrier) {
    if (random_bits() & 256) perform(copy, barrier);
    else under_way[barrier].push_back(copy);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    while (counter(barrier).parity == parity) {
        auto& copies = under_way[barrier];
        if (copies.empty()) {
            check(++turns < 1u << 30, "nobody arrives at a barrier");
            swapcontext(&current->context, &scheduler);
            continue;
        }
        std::swap(copies[random_bits() % copies.size()], copies.back());
        const Engine copy = copies.back();
        copies.pop_back();
        perform(copy, barrier);
    }
}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    check(to % 16 == 0 && (u64)from % 16 == 0 && bytes % 16 == 0, "a copy is not made of sixteen bytes");
    ask_for({{{to, (const u8*)from, bytes}}, false}, barrier);
}
inline void copy_bulk_once(u32 to, const void* from, u32 bytes, u32 barrier) { copy_bulk(to, from, bytes, barrier); }
}
"""

#: Stands in for cuda/boxes.cuh.
BOXES = """
#pragma once
#include "engine.cuh"

namespace tenpak {
constexpr u64 KEEP_LONG = 2;
struct TensorMap { u64 x, stride; int columns, rows, matrices, tokens; u64 more[12]; };
inline void prefetch_map(const TensorMap&) {}
// A tile of a box, in sixteen bytes each; those beyond the matrix are zeros (the test's rows end between two).
inline void copy_tile(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier) {
    check(to % 1024 == 0, "a box is not aligned");
    for (int r = 0; r < map.tokens; ++r)
        for (int c = 0; c < 8; ++c) {
            const u32 at = to + r * 128 + c * 16;
            const bool there = row + r < map.rows && column + 8 * c < map.columns;
            const u16* from = (const u16*)map.x + ((u64)matrix * map.rows + row + r) * map.stride + column + 8 * c;
            ask_for({{{at ^ (at >> 7 & 7) << 4, there ? (const u8*)from : nullptr, 16}}, false}, barrier);
        }
}
inline void copy_box(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier, u64) {
    copy_tile(to, map, column, row, matrix, barrier);
}
#ifdef SHARERS
inline void copy_tiles(u32 to, const TensorMap& map, int token, int tile, int matrix, u32 barrier, u64) {
    for (int j = 0; j < STEP_TILES; ++j) copy_tile(to + j * TOKENS * 128, map, (tile + j) * 64, token, matrix, barrier);
}
#endif
}
"""

#: Stands in for cuda/hopper.cuh.
HOPPER = """
#pragma once
#include "boxes.cuh"

namespace tenpak {
inline const u8* keep_pointer(const u8* pointer) { return pointer; }
inline uint4 load_matrices(u32 row) {
    auto all = share<1>({(u64)row});
    const int lane = threadIdx.x % 32;
    u32 v[4];
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint4 of_row = read<uint4>((u32)all[8 * matrix + lane / 4][0]);
        v[matrix] = (&of_row.x)[lane % 4];
    }
    return {v[0], v[1], v[2], v[3]};
}

static Barrier of_groups[8];
inline void group_barrier(int group) { arrive(of_groups[group], 128); }
inline void wait_for_block(int threads) { arrive(block, threads); }
inline void arrive_at_block(int threads) {
    if (++block.arrived < threads) return;
    block.arrived = 0;
    ++block.generation;
}
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static Barrier of_consumers, of_cluster;
inline void consumers_barrier(int threads) { arrive(of_consumers, threads); }
// What each block of a cluster left for the others, in the launch before this one, which is the same.
static std::map<u32, std::vector<u8>> left;
inline void cluster_meet() { arrive(of_cluster, 128 * GROUPS); }
inline void cluster_sync() {
    cluster_meet();
    if (threadIdx.x == 0) left[blockIdx.x].assign(memory(), memory() + shared_size);
}
inline int cluster_rank() { return blockIdx.x % CLUSTER; }
static int asked_rank;
inline u32 in_block(u32 at, int rank) {
    asked_rank = rank;
    return at;
}
inline float4 read_there(u32 at) {
    const std::vector<u8>& from = left[blockIdx.x / CLUSTER * CLUSTER + asked_rank];
    float4 v = {};
    if (!from.empty()) memcpy(&v, from.data() + (at - first_shared), sizeof v);
    return v;
}

template <int MOST>
void copy_run(u32 to, const u8* from, u32 on, u32 bytes, int lane, int place) {
    check(bytes <= MOST, "a run is longer than its most");
    for (u32 at = 16 * lane; at < bytes; at += 16 * 32) {
        check(to % 16 == 0 && (u64)from % 16 == 0 && bytes % 16 == 0, "a copy is not made of sixteen bytes");
        asked_for[threadIdx.x].push_back({to + at + 16 * (place - lane), from + on + at - 16 * lane, 16});
    }
}
inline void copies_arrive(u32 barrier) {
    ask_for({std::move(asked_for[threadIdx.x]), true}, barrier);
    asked_for[threadIdx.x].clear();
}
template <int COUNT> void take_registers() {}
template <int COUNT> void leave_registers() {}
inline u32 transpose8x8(u32 pair) { return transpose(pair); }
inline void store_transposed(u32 row, u32 a, u32 b, u32 c, u32 d) {
    auto all = share<4>({a, b, c, d});
    const int matrix = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
    for (int column = 0; column < 8; ++column)
        ((u16*)at_shared(row))[column] = (u16)(all[column * 4 + r / 2][matrix] >> (16 * (r % 2)));
}

constexpr int SUMS = TOKENS / 2;
struct Product { float* sums; int count; u32 a[4][4]; u32 b; };
struct Products { std::deque<std::vector<Product>> groups; std::vector<Product> open; };
static std::map<int, Products> products;
inline float of_half(u16 x) {
    static const std::vector<float> all = [] {
        std::vector<float> v(65536);
        for (int i = 0; i < 65536; ++i) v[i] = real<BF16>(i, 0);
        return v;
    }();
    return all[x];
}
inline void run(const Product& p) {
    const u32 start = ((u32)(u64)memory() >> 18 << 18) + ((p.b & 0x3fff) << 4);
    check(p.b >> 14 == 4, "a descriptor is not one of rows");
    const int t = threadIdx.x % 4;
    for (int j = 0; j < p.count / 4; ++j)
        for (int i = 0; i < 4; ++i) {
            const int column = 8 * j + 2 * t + i % 2;
            double sum = p.sums[4 * j + i];
            for (int k = 0; k < 16; ++k) {
                u32 at = start + column / 8 * 1024 + column % 8 * 128 + k * 2;
                at ^= (at >> 7 & 7) << 4;
                const u16 a = (u16)(p.a[k % 8 / 2][i / 2 + k / 8 * 2] >> (16 * (k % 2)));
                sum += (double)of_half(a) * of_half(*(const u16*)at_shared(at));
            }
            p.sums[4 * j + i] = (float)sum;
        }
}
inline void wgmma_fence() {}
inline u32 descriptor(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
template <int COUNT> void wgmma(float (&d)[COUNT], const u32 (&a)[4], u32 b) {
    auto all = share<4>({a[0], a[1], a[2], a[3]});
    Product p = {d, COUNT, {}, b};
    for (int c = 0; c < 4; ++c)
        for (int i = 0; i < 4; ++i) p.a[c][i] = (u32)all[threadIdx.x % 32 / 4 * 4 + c][i];
    products[threadIdx.x].open.push_back(p);
}
inline void wgmma_commit() {
    Products& mine = products[threadIdx.x];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int PENDING> void wgmma_wait() {
    Products& mine = products[threadIdx.x];
    for (; mine.groups.size() > PENDING; mine.groups.pop_front())
        for (const Product& p : mine.groups.front()) run(p);
}
template <int N> void pin(float (&)[N]) {}
}
"""


def layouts_on_cpu(copies: str = "namespace tenpak { inline void copy_once(u32, const u8*) {} }") -> str:
    """cuda/layouts.cuh with `PAIRS`, and `copies`, in place of its assembly."""
    text = (ROOT / "cuda" / "layouts.cuh").read_text()
    begin, end = text.index("// ---- Copies to shared memory"), text.index("// ---- Four-bit codes")
    head = text[:begin].replace("constexpr int LANES = 32;\n", "")
    # Addresses of warp.cuh are of its own dynamic memory.
    renamed = '#define shared_address address_in_dynamic\n#include "warp.cuh"\n#undef shared_address'
    return f"#pragma once\n{renamed}\n{PAIRS}\n{copies}\n{head}\n{text[end:]}"


#: Libraries of different macros must not share what static variables hold; the order of blocks is that of a GPU.
FLAGS = ["-fno-gnu-unique", "-DASCENDING=1"]


@functools.cache
def _library(defines: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    stand_ins = {"warp.cuh": WARP, "layouts.cuh": layouts_on_cpu(), "engine.cuh": ENGINE}
    stand_ins |= {"boxes.cuh": BOXES, "hopper.cuh": HOPPER}
    dynamic = "extern __shared__ __align__(1024) u8 dynamic[];", "u8* const dynamic = dynamic_memory();"
    return built("wide.cu", "wide", defines, "sm_90a", stand_ins, [*FLAGS, "-DSKIPS=1"], dynamic)


def tensor_maps(x: NDArray[Any], k: int, tokens: tuple[int, ...]) -> NDArray[Any]:
    """TensorMaps, as `BOXES` has them, of the first k columns of x [batch, m, at least k], whose boxes have so many
    rows."""
    batch, m, stride = x.shape
    mapped = np.zeros(len(tokens), np.dtype([("wide", "<u8", 2), ("narrow", "<i4", 4), ("more", "<u8", 12)]))
    mapped["wide"], mapped["narrow"] = (x.ctypes.data, stride), [(k, m, batch, rows) for rows in tokens]
    return mapped


def wide(
    defines: dict[str, object],
    grid: int,
    x: NDArray[np.uint16],
    k: int,
    packed: tuple[NDArray[Any] | None, ...],
    n: int,
    scale: float,
    bias: NDArray[np.uint16] | None,
    head: int = 0,
    band: int = 1 << 16,
    offsets: NDArray[np.int32] | None = None,
) -> NDArray[np.uint16]:
    """y [batch, m, n] of x [batch, m, at least k], as bits; poisoned before. `packed`: codes, params, row_params.

    With `offsets` x and y are those of all experts, as one matrix.
    """
    batch, m, _ = x.shape
    x = guarded(x)
    *parts, bias, offsets = each_guarded(*packed, bias, offsets)
    y = guarded(np.full((batch, m, n), 0x7FFF, np.uint16))
    groups, tokens = (int(str(defines[name])) for name in ("GROUPS", "TOKENS"))
    narrow = int(str(defines.get("NARROW", 0)))
    step, stages = int(str(defines["STEP"])), int(str(defines["STAGES"]))
    layout = str(defines["LAYOUT"])
    strip = plans.strip_bytes(layout, STAGE_BYTES[layout], step)
    fixed, stage = plans.shared_bytes(groups, tokens, step, strip)
    tiles = -(-k // 64)
    rows = 64 * groups
    token_tiles = batch * -(-m // min(tokens, narrow or tokens))
    boxes, room = plans.boxes(m, tokens, narrow), 0
    if offsets is not None:
        batch = len(offsets) - 1
        token_tiles, boxes, room = m // tokens + batch, (tokens,), 4 * (2 * batch + 1)
    output_tiles = -(-n // rows) * token_tiles
    partial = guarded(np.full((output_tiles if head else grid) * rows * tokens, np.nan, np.float32))
    arrived = guarded(np.zeros(output_tiles * groups, np.uint32))
    mapped = tensor_maps(x, k, boxes)

    def address(array: NDArray[Any] | None) -> NDArray[np.uint64]:
        return np.array([0 if array is None else array.ctypes.data], np.uint64)

    steps = [np.array([0 if part is None else part.nbytes // batch], np.int64) for part in parts]
    scalars = [np.array([value], np.int32) for value in (batch, m, n, tiles, -(-k // 256), head, band)]
    given = [
        mapped,
        *map(address, [*parts, y, bias, offsets, partial, arrived]),
        *steps,
        *scalars,
        np.array([scale], np.float32),
    ]
    pointers = (ctypes.c_void_p * len(given))(*(value.ctypes.data for value in given))
    library = _library(tuple(sorted(defines.items())))
    # Of a cluster, the first launch leaves what its blocks read of each other.
    for _ in range(1 if defines.get("CLUSTER", 1) == 1 else 2):
        y[...] = 0x7FFF
        library.launch(pointers, (ctypes.c_uint * 3)(grid, 1, 1), 128 * groups + 128, fixed + stages * stage + room)
    assert not arrived.any(), "counters are not zero again"
    return y
