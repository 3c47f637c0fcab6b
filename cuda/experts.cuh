// Tiles of a product whose matrices are experts: each has as many as its own tokens need, which only the device knows.
#pragma once
#include "layouts.cuh"

namespace tenpak {

// Experts' tokens begin where `offsets` says, and there are `before` tiles before each's, in shared memory; both have batch + 1.
struct Experts {
    const int* offsets;
    const u32* before;
    int batch;

    __device__ __forceinline__ Experts() {}
    // For all `threads` of a block. Tiles have up to `most` tokens, and a matrix `row_tiles` for as many; `room` has 2 batch + 1 words.
    __device__ __forceinline__ Experts(int batch, const int* offsets, int row_tiles, int most, u32* room, int threads)
        : offsets(offsets), before(room), batch(batch) {
        u32* const of_each = room + batch + 1;
        for (int e = threadIdx.x; e < batch; e += threads) of_each[e] = (offsets[e + 1] - offsets[e] + most - 1) / most * row_tiles;
        __syncthreads();
        for (int e = threadIdx.x; e <= batch; e += threads) {
            u32 sum = 0;
            for (int other = 0; other < e; ++other) sum += of_each[other];
            room[e] = sum;
        }
        __syncthreads();
    }
    __device__ __forceinline__ u32 tiles() const { return before[batch]; }
    // Whose a tile is: the last before whom there are no more. Those without tokens have none.
    __device__ __forceinline__ int of(u32 tile) const {
        int low = 0, high = batch;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (before[middle] <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// The expert that is `nth`, from zero, of those that have tokens, or -1. For all lanes of a warp.
__device__ __forceinline__ int expert_with_tokens(const int* offsets, int batch, int nth, int lane) {
#pragma unroll 1
    for (int first = 0; first < batch; first += LANES) {
        const int e = first + lane;
        u32 have = __ballot_sync(~0u, e < batch && offsets[min(e, batch - 1) + 1] > offsets[min(e, batch - 1)]);
        const int count = __popc(have);
        if (nth < count) {
            for (; nth > 0; --nth) have &= have - 1;
            return first + __ffs(have) - 1;
        }
        nth -= count;
    }
    return -1;
}

}  // namespace tenpak
