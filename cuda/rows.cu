// y = x Wᵀ for up to 16 tokens, or more in turns, where x is much to read: blocks have many rows, and x streams with the weights.
//
// Each block of skinny.cu keeps all of x and has a few rows at a time; with eight tokens and more, x is as many bytes as those
// rows, and with 8192 columns 16 tokens do not fit. Here a block's turn is ROWS strips of 16 rows, STRIPS for each warp, so that what
// is read of x serves all of them; SHARERS warps share the columns of a strip, pairs of tiles in turn. Each stage of the ring has a
// step's tiles of all strips and the columns of x that they meet. At the end of a turn the sums of warps that share meet in
// shared memory, where all warps add some of them, always in the same order.
//
// Grid: x turns (persistent), z matrices of a batch. -DWARPS, -DSHARERS, -DSTRIPS, -DDEPTH, -DCOLUMNS (tiles of 8 tokens), -DCOPIERS,
// warps that ask for copies. Compute capability 9.0.
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

namespace tenpak {

constexpr int ROWS = GROUPS * STRIPS;
constexpr int ALL_WARPS = WARPS + COPIERS;
constexpr int PARTS = STRIPS * COLUMNS;
// A stage: all strips' tiles, then x, whose rows begin 64 bytes further on in a line each.
constexpr int X_ROW_BYTES = STEP_TILES * TILE_COLS * 2 + 64;
constexpr int WEIGHTS_OF_STAGE = (ROWS * BLOCK_STAGE_BYTES + 127) / 128 * 128;
constexpr int BYTES_OF_STAGE = (WEIGHTS_OF_STAGE + TOKENS * X_ROW_BYTES + 127) / 128 * 128;
static_assert(WARPS % SHARERS == 0, "warps share strips evenly");

// One of the warps that ask for copies: of each step every COPIERS-th of the strips and of the tokens. (One warp asks for a copy in
// 64 cycles or so, however few its instructions are.)
struct Copier {
    static constexpr int MINE = (ROWS + COPIERS - 1) / COPIERS;

    u32 stages, full, empty;
    int index;  // among the copiers
    int slot = 0;
    u32 phase = 0;
    const u8 *codes[MINE], *params[MINE];

    __device__ __forceinline__ Copier(u32 stages, u32 full, int index)
        : stages(stages), full(full), empty(full + 8 * DEPTH), index(index) {}

    // All steps of a turn: strips from `strip` on, with x of its tokens.
    __device__ __forceinline__ void copy(const Weight& weight, const XSlice& from, int strip, int strips) {
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            const int row = min(strip + index + j * COPIERS, strips - 1);
            codes[j] = weight.codes + (size_t)(u32)(row * weight.tiles) * Layout::CODE_BYTES;
            params[j] = Layout::param_run(weight, row, 0, STEP_TILES).from;
        }
        const u32 param_bytes = Layout::param_run(weight, 0, 0, STEP_TILES).bytes;
        const int mine = (ROWS - index + COPIERS - 1) / COPIERS, tokens = max(from.tokens - index + COPIERS - 1, 0) / COPIERS;
#pragma unroll 1
        for (int tile = 0, step = 0; tile < weight.tiles; tile += STEP_TILES, ++step) {
            barrier_wait(empty + 8 * slot, phase ^ 1);
            const int here = min(STEP_TILES, weight.tiles - tile);
            const u32 barrier = full + 8 * slot, to = stages + slot * BYTES_OF_STAGE;
            const u32 of_codes = here * Layout::CODE_BYTES, of_params = Layout::param_run(weight, 0, tile, here).bytes;
            const u32 of_supers = Layout::super_run(weight, 0, tile, here).bytes;
            const u32 of_x = here * TILE_COLS * 2;
            if (elected()) {
                // What is expected is said first: what has come may not be more.
                barrier_expect(barrier, mine * (of_codes + of_params + of_supers) + tokens * of_x);
#pragma unroll 1
                for (int token = index; token < from.tokens; token += COPIERS)
                    copy_bulk(to + WEIGHTS_OF_STAGE + token * X_ROW_BYTES, from.x + token * from.stride + tile * TILE_COLS, of_x, barrier);
#pragma unroll
                for (int j = 0; j < MINE; ++j) {
                    const int i = index + j * COPIERS;
                    const u32 at = to + i * BLOCK_STAGE_BYTES;
                    if (i < ROWS) {
                        copy_bulk_once(at, codes[j] + tile * Layout::CODE_BYTES, of_codes, barrier);
                        if (Layout::PAIR_BYTES) copy_bulk_once(at + Ring::PARAMS_AT, params[j] + step * param_bytes, of_params, barrier);
                        if (Layout::PARAM_BYTES > Layout::PAIR_BYTES)
                            copy_bulk_once(at + Ring::SUPERS_AT,
                                           Layout::super_run(weight, min(strip + i, strips - 1), tile, here).from, of_supers, barrier);
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

// As skinny's: arguments that are not used are those of experts and of slices of K. k is a multiple of 64, and rows of x begin
// at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(tenpak::ALL_WARPS * 32, 1)
rows(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
     tenpak::Out* y, const unsigned short* bias, const int*, float4*, unsigned int*, long long codes_step,
     long long params_step, long long row_params_step, long long x_stride, int m, int n, int k, int tiles, int supers, int,
     float scale) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    __shared__ u64 barriers[2 * DEPTH];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int matrix = blockIdx.z;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS, turns = (strips + ROWS - 1) / ROWS;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const u32 stages = keep_address(shared_address(dynamic)), full = keep_address(shared_address(barriers)), empty = full + 8 * DEPTH;
    const u32 sums_at = keep_address(stages + DEPTH * BYTES_OF_STAGE);
    Products::prepare(threadIdx.x);
    if (threadIdx.x == 0) {
        for (int i = 0; i < DEPTH; ++i) {
            barrier_init(full + 8 * i, COPIERS);
            barrier_init(empty + 8 * i, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    Copier copier(stages, full, warp - WARPS);
    const int group = warp / SHARERS * STRIPS, sharer = warp % SHARERS;
    int slot = 0;
    u32 phase = 0;
    // Each turn for each of the chunks of tokens.
    const int items = turns * ((m + TOKENS - 1) / TOKENS);
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int strip = item % turns * ROWS, token = item / turns * TOKENS, tokens = min(TOKENS, m - token);
        if (warp >= WARPS) {
            const XSlice here{x + ((long long)matrix * m + token) * x_stride, x_stride, tokens, k, 0, tiles * TILE_COLS};
            copier.copy(weight, here, strip, strips);
        } else {
            Layout::Rows of_rows[STRIPS];
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) of_rows[i] = Layout::rows(weight, min(strip + group + i, strips - 1), lane);
            Products products(Ring::place(stages + group * BLOCK_STAGE_BYTES, sharer),
                              stages + WEIGHTS_OF_STAGE + sharer * (STAGE_TILES * TILE_COLS * 2), X_ROW_BYTES, tokens, 0, lane);
            products.clear();
#pragma unroll 1
            for (int tile = sharer * STAGE_TILES; tile - sharer * STAGE_TILES < tiles; tile += STEP_TILES) {
                barrier_wait(full + 8 * slot, phase);
                const u32 on = slot * BYTES_OF_STAGE;
                if (tile < tiles) {
                    Products::Pair pair;
                    products.load(pair, on, lane);
                    products.multiply_at(pair, of_rows, on, tile + 1 < tiles);
                }
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * slot);
                if (++slot == DEPTH) {
                    slot = 0;
                    phase ^= 1;
                }
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                write(sums_at + ((warp * PARTS + part) * LANES + lane) * 16, products.sum(part, lane));
        }
        __syncthreads();
        if (warp < WARPS) {
            const Output out{y + ((size_t)matrix * m + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
            for (int i = warp; i < ROWS * COLUMNS; i += WARPS) {
                const int row = i / COLUMNS, column = i % COLUMNS * 8;
                if (strip + row >= strips || column >= tokens) continue;
                // Of the warps that share this strip, in order.
                const u32 from = sums_at + ((row / STRIPS * SHARERS * PARTS + row % STRIPS * COLUMNS + i % COLUMNS) * LANES + lane) * 16;
                float4 sum = read<float4>(from);
#pragma unroll
                for (int other = 1; other < SHARERS; ++other) add(sum, read<float4>(from + other * (PARTS * LANES * 16)));
                const Layout::Rows of_row = Layout::rows(weight, strip + row, lane);
                out.store(sum, strip + row, column, tokens, Layout::row_scale(of_row, false), Layout::row_scale(of_row, true), lane);
            }
        }
        __syncthreads();
    }
}
