// Sums, maxima and running sums over all threads of a block, the same in every thread. -DTHREADS (a multiple of 32, at
// most 1024).
#pragma once
#include "warp.cuh"

namespace tenpak {

constexpr int WARPS = THREADS / LANES;

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[WARPS];
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x += exchange(x, mask);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = x;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += parts[i];
    __syncthreads();
    return sum;
}

// What comes before this thread's x when the threads' are added in order, and the sum of all.
__device__ __forceinline__ u64 block_sum_before(u64 x, u64& total) {
    __shared__ u64 parts[WARPS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    u64 sum = x;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) {
        const u64 other = from_lane_below(sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == LANES - 1) parts[warp] = sum;
    __syncthreads();
    u64 before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        if (i < warp) before += parts[i];
        total += parts[i];
    }
    __syncthreads();
    return before + sum - x;
}

}  // namespace tenpak
