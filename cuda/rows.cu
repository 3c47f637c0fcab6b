// y = x Wᵀ for up to 16 tokens where x is much to read for each block: blocks have many rows, and x streams with the weights.
//
// A turn is ROWS strips of 16 rows, STRIPS for each warp; SHARERS warps share the columns of a strip, pairs of tiles in turn, and
// CLUSTER blocks share K. Each stage of the ring has a step's tiles of all strips and the columns of x that they meet. At the end
// of a turn the sums of those that share meet in shared memory, where each warp of either block adds some of them, always in
// the same order.
//
// Grid: x turns times CLUSTER (persistent), z matrices of a batch. -DWARPS, -DSHARERS, -DSTRIPS, -DDEPTH, -DCOLUMNS (tiles of 8
// tokens), -DCLUSTER (1 or 2), -DCOPIERS, warps that ask for copies. Compute capability 9.0.
#define ENGINE 1
#include "activation.cuh"
#include "layouts.cuh"
#include "overlap.cuh"
#ifndef OUTPUT
#define OUTPUT 0
#endif
#ifndef GATED
#define GATED 0
#endif
#define OVERLAP 0
#include "ring.cuh"
#include "halves.cuh"
#include "output.cuh"

#ifndef SHARED_X
#define SHARED_X 0
#endif

namespace tenpak {

constexpr int ROWS = GROUPS * STRIPS;
constexpr int ALL_WARPS = WARPS + COPIERS;
constexpr int PARTS = STRIPS * COLUMNS;
// A stage: all strips' tiles, then x, whose rows begin 64 bytes further on in a line each.
constexpr int X_ROW_BYTES = STEP_TILES * TILE_COLS * 2 + 64;
constexpr int WEIGHTS_OF_STAGE = (ROWS * BLOCK_STAGE_BYTES + 127) / 128 * 128;
constexpr int BYTES_OF_STAGE = (WEIGHTS_OF_STAGE + TOKENS * X_ROW_BYTES + 127) / 128 * 128;
static_assert(WARPS % SHARERS == 0, "warps share strips evenly");

// One of the warps that ask for copies: of each step every COPIERS-th of the strips and of the tokens. Copies are small and
// many, so that addresses are kept and moved on, not made anew.
struct Copier {
    static constexpr int MINE = (ROWS + COPIERS - 1) / COPIERS;

    u32 stages, full, empty;
    int index;  // among the copiers
    int slot = 0;
    u32 phase = 0;
    const u8 *codes[MINE], *params[MINE];

    __device__ __forceinline__ Copier(u32 stages, u32 full, int index)
        : stages(stages), full(full), empty(full + 8 * DEPTH), index(index) {}

    // All steps of a turn: `count` tiles from `first` on, of strips from `strip` on.
    __device__ __forceinline__ void copy(const Weight& weight, const XSlice& from, int strip, int strips, int first, int count) {
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            const int row = min(strip + index + j * COPIERS, strips - 1);
            codes[j] = weight.codes + (size_t)(u32)(row * weight.tiles + first) * Layout::CODE_BYTES;
            params[j] = Layout::param_run(weight, row, first, STEP_TILES).from;
        }
        const u32 param_bytes = Layout::param_run(weight, 0, 0, STEP_TILES).bytes;
#pragma unroll 1
        for (int tile = 0, step = 0; tile < count; tile += STEP_TILES, ++step) {
            barrier_wait(empty + 8 * slot, phase ^ 1);
            const int here = min(STEP_TILES, count - tile), row = min(strip + index, strips - 1);
            const u32 barrier = full + 8 * slot, to = stages + slot * BYTES_OF_STAGE;
            const u32 of_codes = here * Layout::CODE_BYTES, of_params = Layout::param_run(weight, 0, first + tile, here).bytes;
            const u32 of_supers = Layout::super_run(weight, 0, first + tile, here).bytes;
            const u32 of_x = min(here * TILE_COLS, from.columns - tile * TILE_COLS) * 2;
            const int mine = (ROWS - index + COPIERS - 1) / COPIERS, tokens = (from.tokens - index + COPIERS - 1) / COPIERS;
            if (elected()) {
                // What is expected is said first: what has come may not be more.
                barrier_expect(barrier, mine * (of_codes + of_params + of_supers) + max(tokens, 0) * of_x);
                constexpr int EVERY = COPIERS * (SHARED_X ? BROUGHT_EVERY : 1);
                int token = index + COPIERS * (SHARED_X ? first_brought() : 0);
                const u16* x = from.x + token * from.stride + (first + tile) * TILE_COLS;
                u32 at = to + WEIGHTS_OF_STAGE + token * X_ROW_BYTES;
#pragma unroll 1
                for (; token < from.tokens; token += EVERY, x += EVERY * from.stride, at += EVERY * X_ROW_BYTES) {
                    if (SHARED_X) copy_bulk_to_all(at, x, of_x, barrier);
                    else copy_bulk(at, x, of_x, barrier);
                }
#pragma unroll
                for (int j = 0; j < MINE; ++j) {
                    const int i = index + j * COPIERS;
                    const u32 at = to + i * BLOCK_STAGE_BYTES;
                    if (i < ROWS) {
                        copy_bulk_once(at, codes[j] + tile * Layout::CODE_BYTES, of_codes, barrier);
                        if (Layout::PAIR_BYTES) copy_bulk_once(at + Ring::PARAMS_AT, params[j] + step * param_bytes, of_params, barrier);
                        if (Layout::PARAM_BYTES > Layout::PAIR_BYTES)
                            copy_bulk_once(at + Ring::SUPERS_AT,
                                           Layout::super_run(weight, min(row + j * COPIERS, strips - 1), first + tile, here).from,
                                           of_supers, barrier);
                    }
                }
            }
            if (++slot == DEPTH) {
                slot = 0;
                phase ^= 1;
            }
        }
    }
};

}  // namespace tenpak

// As skinny's: arguments that are not used are those of experts and of slices over blocks. slice: tiles of K for each block of a
// cluster, a multiple of four. k is a multiple of 64, and rows of x begin at multiples of 16 bytes.
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(tenpak::ALL_WARPS * 32, 1)
rows(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
     tenpak::Out* y, const unsigned short* bias, const int*, float4*, unsigned int*, long long codes_step,
     long long params_step, long long row_params_step, long long x_stride, int m, int n, int k, int tiles, int supers, int slice,
     float scale) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    __shared__ u64 barriers[2 * DEPTH];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int matrix = blockIdx.z, rank = cluster_rank();
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS, turns = (strips + ROWS - 1) / ROWS;
    const int first_tile = SHARED_X ? 0 : rank * slice, count = min(slice, tiles - first_tile), steps = (count + STEP_TILES - 1) / STEP_TILES;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    u8* const stages = reinterpret_cast<u8*>(dynamic);
    const u32 stages_at = keep_address(shared_address(stages)), full = keep_address(shared_address(barriers)), empty = full + 8 * DEPTH;
    const u32 sums_at = keep_address(stages_at + DEPTH * BYTES_OF_STAGE);
    Products::prepare(threadIdx.x);
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; ++i) {
            barrier_init(full + 8 * i, COPIERS);
            barrier_init(empty + 8 * i, SHARED_X ? WARPS * CLUSTER : WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (SHARED_X) cluster_sync();
    // Those of a cluster have the same turn, or neighbouring ones.
    constexpr int TURNS = SHARED_X ? CLUSTER : 1;
    const int chunks = (m + TOKENS - 1) / TOKENS, groups = (turns + TURNS - 1) / TURNS, items = groups * chunks;
    Copier copier(stages_at, full, warp - WARPS);
    const int group = warp / SHARERS * STRIPS, sharer = warp % SHARERS;
    int slot = 0;
    u32 phase = 0;
    for (int item = blockIdx.x / CLUSTER; item < items; item += gridDim.x / CLUSTER) {
        const int strip = (item % groups * TURNS + (SHARED_X ? rank : 0)) * ROWS, token = item / groups * TOKENS, tokens = min(TOKENS, m - token);
        if (warp >= WARPS) {
            const XSlice here{x + ((long long)matrix * m + token) * x_stride, x_stride, tokens, k, first_tile * TILE_COLS, count * TILE_COLS};
            copier.copy(weight, here, strip, strips, first_tile, count);
            __syncwarp();
        } else {
            Layout::Rows of_rows[STRIPS];
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) of_rows[i] = Layout::rows(weight, min(strip + group + i, strips - 1), lane);
            Products products(Ring::place(stages_at + group * BLOCK_STAGE_BYTES, sharer),
                              stages_at + WEIGHTS_OF_STAGE + sharer * (STAGE_TILES * TILE_COLS * 2), X_ROW_BYTES, tokens, 0, lane);
            products.clear();
            int tile = sharer * STAGE_TILES;
#pragma unroll 1
            for (int step = 0; step < steps; ++step, tile += STEP_TILES) {
                barrier_wait(full + 8 * slot, phase);
                const u32 on = slot * BYTES_OF_STAGE;
                if (tile < count) {
                    Products::Pair pair;
                    products.load(pair, on, lane);
                    products.multiply_at(pair, of_rows, on, tile + 1 < count);
                }
                __syncwarp();
                if (lane == 0) {
                    if (SHARED_X) barrier_arrive_everywhere(empty + 8 * slot);
                    else barrier_arrive(empty + 8 * slot);
                }
                if (++slot == DEPTH) {
                    slot = 0;
                    phase ^= 1;
                }
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                write(sums_at + ((warp * PARTS + part) * LANES + lane) * 16, products.sum(part, lane));
        }
        if (CLUSTER > 1 && !SHARED_X) cluster_sync();
        else __syncthreads();
        if (warp < WARPS) {
            const Output out{y + ((size_t)matrix * m + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
            // Each of the block's part of a turn's sums.
            constexpr int SUMMED = SHARED_X ? 1 : CLUSTER;
            for (int i = (SUMMED > 1 ? rank : 0) * WARPS + warp; i < ROWS * COLUMNS; i += SUMMED * WARPS) {
                const int row = i / COLUMNS, column = i % COLUMNS;
                const u32 from = sums_at + (((row / STRIPS * SHARERS) * PARTS + row % STRIPS * COLUMNS + column) * LANES + lane) * 16;
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                for (int block = 0; block < SUMMED; ++block)
#pragma unroll
                    for (int other = 0; other < SHARERS; ++other) {
                        const u32 at = from + other * (PARTS * LANES * 16);
                        add(sum, SUMMED > 1 ? read_there(in_block(at, block)) : read<float4>(at));
                    }
                if (strip + row < strips && column * 8 < tokens) {
                    const Layout::Rows of_row = Layout::rows(weight, strip + row, lane);
                    out.store(sum, strip + row, column * 8, tokens, Layout::row_scale(of_row, false), Layout::row_scale(of_row, true), lane);
                }
            }
        }
        // What has been read may be overwritten, and no block ends before another has read its sums.
        if (CLUSTER > 1 && !SHARED_X) cluster_sync();
        else __syncthreads();
    }
    if (SHARED_X) cluster_sync();
}
