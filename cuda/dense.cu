// A packed weight as plain FP16 or BF16 rows, for products so large that they are better left to cuBLAS.
//
// One warp a tile; a lane's word is eight neighbours of one row, sixteen bytes of the output.
#include "layouts.cuh"

namespace tenpak {

// Sums are scaled in float elsewhere; here each weight is, and rounded once more only if there is something to scale.
__device__ __forceinline__ u32 scaled(u32 pair, float scale) {
    if (scale == 1.0f) return pair;
    return narrow(widen((u16)pair) * scale) | (u32)narrow(widen((u16)(pair >> 16)) * scale) << 16;
}

template <int WORD>
__device__ __forceinline__ void write_word(const Layout::Tile& tile, const Layout::Rows& rows, u16* out, int row, int column, int end,
                                           int k, float scale) {
    if (row >= end || column >= k) return;
    u32 pairs[4];
    Layout::template fragment<WORD>(tile, rows, pairs);
    const float s = scale * Layout::row_scale(rows, WORD % 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = scaled(pairs[i], s);
    u16* to = out + (size_t)row * k + column;
    if (k % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (column + i < k) to[i] = (u16)(pairs[i / 2] >> (i % 2 * 16));
    }
}

}  // namespace tenpak

// Rows first_row (a multiple of 16) .. first_row + count of one matrix to out [count, k], aligned to sixteen bytes.
// Grid: x pairs of tiles along K, y strips; one warp a block of 32 threads times 4.
extern "C" __global__ void __launch_bounds__(128)
dense(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, unsigned short* out,
      int first_row, int count, int k, int tiles, int supers, float scale) {
    using namespace tenpak;
    __shared__ uint4 stages[4][STAGE_BYTES / 16];
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const int pair = blockIdx.x * 4 + warp, strip = first_row / TILE_ROWS + blockIdx.y;
    const Weight weight{codes, params, row_params, tiles, supers};
#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x, Lut16::BIASED_XOR);
    __syncthreads();
#endif
    if (2 * pair >= tiles) return;
    const int here = min(2, tiles - 2 * pair);
    copy_stage(weight, strip, 2 * pair, here, shared_address(stages[warp]), lane);
    commit_copies();
    const Layout::Rows rows = Layout::rows(weight, strip, lane);
    wait_for_copies<0>();
    __syncwarp();
    const u8* stage = reinterpret_cast<const u8*>(stages[warp]);
    const int row = blockIdx.y * TILE_ROWS + lane / 4;
    for (int j = 0; j < here; ++j) {
        const Layout::Tile tile = j ? read_stage<1>(stage, lane) : read_stage<0>(stage, lane);
        const int column = (2 * pair + j) * TILE_COLS + lane % 4 * 8;
        write_word<0>(tile, rows, out, row, column, count, k, scale);
        write_word<1>(tile, rows, out, row + 8, column, count, k, scale);
        write_word<2>(tile, rows, out, row, column + 32, count, k, scale);
        write_word<3>(tile, rows, out, row + 8, column + 32, count, k, scale);
    }
}
