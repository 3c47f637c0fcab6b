// What the ways of multiplying few tokens have in common: a block's steps, its share of the activations, and sums of lanes.
#pragma once
#include "few.cuh"
#ifndef ENGINE
#define ENGINE 0
#endif
#ifndef COPIERS
#define COPIERS 1
#endif
#ifndef STRIPS
#define STRIPS 1
#endif
#ifndef INTEGER
#define INTEGER 0
#endif
#ifndef HEAD
#define HEAD 0
#endif

namespace tenpak {

constexpr int THREADS = WARPS * LANES;  // those that multiply
#ifndef SHARERS
#define SHARERS WARPS
#endif
constexpr int GROUPS = WARPS / SHARERS;
// What the warps that share a strip take of it in a step: two tiles each.
constexpr int STEP_TILES = SHARERS * STAGE_TILES, BLOCK_STAGE_BYTES = SHARERS * STAGE_BYTES;
// Steps at a time. Long steps are not unrolled: a launch is so short that fetching instructions is part of its time.
constexpr int UNROLL = INTEGER || ENGINE ? 1 : DEPTH;

// Where two tiles of a warp are in shared memory: codes, parameters, super-scales.
struct PairAt {
    u32 codes, params, supers;
};

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

__device__ __forceinline__ void add(float2& a, const float2& b) {
    a.x += b.x;
    a.y += b.y;
}
__device__ __forceinline__ void add(float4& a, const float4& b) {
    a.x += b.x;
    a.y += b.y;
    a.z += b.z;
    a.w += b.w;
}

}  // namespace tenpak
