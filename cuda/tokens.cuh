// What the ways of multiplying few tokens have in common: the block's share of the activations, and sums of lanes.
#pragma once
#include "layouts.cuh"

namespace tenpak {

constexpr int THREADS = WARPS * LANES;  // those that multiply

// What a block's warps take of a strip in a step.
constexpr int BLOCK_STAGE_BYTES = WARPS * STAGE_BYTES;

// What a block takes of x: rows `stride` elements apart, columns first_column .. first_column + columns, zeros beyond k.
struct XSlice {
    const u16* x;
    long long stride;
    int tokens, k, first_column, columns;

    // Whether runs of `bytes` may be read at once.
    __device__ __forceinline__ bool aligned(int bytes) const {
        return k % (bytes / 2) == 0 && stride % (bytes / 2) == 0 && (u64)x % bytes == 0;
    }
};

// Where two tiles of a warp lie in shared memory: codes, parameters, super-scales.
struct PairAt {
    u32 codes, params, supers;
};

__device__ __forceinline__ void add(float4& a, const float4& b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

}  // namespace tenpak
