// Boxes of tokens that the copy engine brings as a map describes them (compute capability 9.0; tenpak/cuda/tensormap.py).
#pragma once
#include "engine.cuh"

namespace tenpak {

// What the driver makes of a matrix in memory (cuTensorMapEncodeTiled).
struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}

// How long L2 should keep what passes through it.
constexpr u64 KEEP_LONG = 0x14f0000000000000;

// The map's box at these coordinates; zeros beyond the matrix are counted as bytes, too.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row, int matrix, u32 barrier, u64 keep) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4}], [%5], %6;"
        :: "r"(to), "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(barrier), "l"(keep) : "memory");
}

// The same of a map of [matrices, tiles, tokens, columns of a tile].
__device__ __forceinline__ void copy_tiles(u32 to, const TensorMap& map, int token, int tile, int matrix, u32 barrier, u64 keep) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;"
        :: "r"(to), "l"(&map), "r"(0), "r"(token), "r"(tile), "r"(matrix), "r"(barrier), "l"(keep) : "memory");
}

}  // namespace tenpak
