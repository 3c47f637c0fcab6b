// Tiles of a product whose matrices are experts: each has as many as its own tokens need, which only the device knows.
#pragma once
#include "layouts.cuh"

namespace tenpak {

// A tile's expert, which of that expert's rows of tiles it is in, and its tokens: the first of all experts', and how many.
struct PlaceOfExpert {
    int matrix, line, token, tokens;
};

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
    // Where a tile of up to `most` tokens is. It is the last expert's before whom there are no more; those without tokens have none.
    __device__ __forceinline__ PlaceOfExpert place(u32 tile, int most) const {
        int low = 0, high = batch;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (before[middle] <= tile) {
                low = middle;
            } else {
                high = middle;
            }
        }
        tile -= before[low];
        const int begin = offsets[low], end = offsets[low + 1];
        const u32 width = (end - begin + most - 1) / most, line = tile / width;
        const int token = begin + (tile - line * width) * most;
        return {low, (int)line, token, min(most, end - token)};
    }
};

// Those of 32 experts from `first` on that have tokens, a bit each. For all lanes of a warp, as what follows.
__device__ __forceinline__ u32 experts_with_tokens(const int* offsets, int batch, int first, int lane) {
    const int e = min(first + lane, batch - 1);
    return __ballot_sync(~0u, first + lane < batch && offsets[e + 1] > offsets[e]);
}

// A block's expert, and which of as many of its blocks it is: those that have tokens share `blocks` of a grid as evenly as they can.
struct ShareOfExpert {
    int expert = -1, first = 0, every = 1;  // no expert, if none has tokens

    __device__ __forceinline__ ShareOfExpert(const int* offsets, int batch, u32 block, u32 blocks, int lane) {
        u32 experts = 0;
#pragma unroll 1
        for (int e = 0; e < batch; e += LANES) experts += __popc(experts_with_tokens(offsets, batch, e, lane));
        if (experts == 0) return;
        first = block / experts;
        int nth = block - first * experts;
        every = (blocks - nth + experts - 1) / experts;
#pragma unroll 1
        for (int e = 0;; e += LANES) {
            u32 have = experts_with_tokens(offsets, batch, e, lane);
            if (nth >= __popc(have)) {
                nth -= __popc(have);
                continue;
            }
            for (; nth > 0; --nth) have &= have - 1;
            expert = e + __ffs(have) - 1;
            return;
        }
    }
};

}  // namespace tenpak
