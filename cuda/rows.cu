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
#define BOXED 1
#define RAW 1
#include "activation.cuh"
#include "layouts.cuh"
#include "overlap.cuh"
#define OVERLAP 0
#include "ring.cuh"
#include "halves.cuh"
#include "boxes.cuh"
#include "output.cuh"
#include "sums.cuh"

namespace tenpak {

constexpr int ROWS = GROUPS * STRIPS;
constexpr int ALL_WARPS = WARPS + COPIERS;
constexpr int PARTS = STRIPS * COLUMNS;
// A stage: a box of x, of STEP_TILES tiles, then all strips' tiles.
constexpr int X_TILE_BYTES = TOKENS * TILE_COLS * 2, X_BYTES = STEP_TILES * X_TILE_BYTES;
constexpr int BYTES_OF_STAGE = (X_BYTES + ROWS * BLOCK_STAGE_BYTES + 1023) / 1024 * 1024;
static_assert(WARPS % SHARERS == 0, "warps share strips evenly");
// A block's barriers: those in shared memory are made, for copiers and the warp that makes them; and the others know that, too. Copiers
// wait for nobody else.
constexpr int READY = 1, BEGIN = 2;
using Sums = SumsBarriers<1, WARPS, WARPS>;

// One of the warps that ask for copies: of each step every COPIERS-th of the strips, and the first the box. (One warp asks for a
// copy in 64 cycles or so, however few its instructions are.)
struct Copier {
    u32 stages, full, empty;
    int index;  // among the copiers
    int slot = 0;
    u32 phase = 0;

    __device__ __forceinline__ Copier(u32 stages, u32 full, int index)
        : stages(stages), full(full), empty(full + 8 * DEPTH), index(index) {}

    // A turn: strips from `strip` on, and x as box(to, tile, barrier) brings it. What is asked for first is so by the same few
    // instructions as the rest: those that are new come from far.
    template <class Box>
    __device__ __forceinline__ void copy(const Weight& weight, int strip, int strips, Box box) {
        const int there = min(ROWS, strips - strip), mine = (there - index + COPIERS - 1) / COPIERS;
#pragma unroll 1
        for (int tile = 0; tile < weight.tiles; tile += STEP_TILES) {
            barrier_wait(empty + 8 * slot, phase ^ 1);
            const int here = min(STEP_TILES, weight.tiles - tile);
            const u32 barrier = full + 8 * slot, to = stages + slot * BYTES_OF_STAGE;
            const u32 of_codes = here * Layout::CODE_BYTES, of_params = Layout::param_run(weight, 0, tile, here).bytes;
            const u32 of_supers = Layout::super_run(weight, 0, tile, here).bytes;
            if (elected()) {
                // What is expected is said first: what has come may not be more.
                barrier_expect(barrier, mine * (of_codes + of_params + of_supers) + (index == 0 ? X_BYTES : 0));
                if (index == 0) box(to, tile, barrier);
#pragma unroll 1
                for (int row = index; row < there; row += COPIERS) {
                    const u32 at = to + X_BYTES + row * BLOCK_STAGE_BYTES;
                    copy_bulk_once(at, weight.codes + (size_t)(u32)((strip + row) * weight.tiles + tile) * Layout::CODE_BYTES, of_codes, barrier);
                    if (Layout::PAIR_BYTES)
                        copy_bulk_once(at + Ring::PARAMS_AT, Layout::param_run(weight, strip + row, tile, here).from, of_params, barrier);
                    if (Layout::PARAM_BYTES > Layout::PAIR_BYTES)
                        copy_bulk_once(at + Ring::SUPERS_AT, Layout::super_run(weight, strip + row, tile, here).from, of_supers, barrier);
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

// x: a map of [batch, k / 64, m, 64] with boxes of STEP_TILES tiles of TOKENS tokens, swizzled by 128 bytes; k is a multiple of 64.
// Otherwise as skinny's; arguments that are not used are those of slices of K.
extern "C" __global__ void __launch_bounds__(tenpak::ALL_WARPS * 32, 1)
rows(const __grid_constant__ tenpak::TensorMap x, const unsigned char* codes, const unsigned char* params,
     const unsigned char* row_params, tenpak::Out* y, const unsigned short* bias, const int*, float4*, unsigned int*, long long codes_step,
     long long params_step, long long row_params_step, int m, int n, int, int tiles, int supers, int, float scale) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    __shared__ u64 barriers[2 * DEPTH + Sums::BARRIERS];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int matrix = blockIdx.z, strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const u32 stages = keep_address((shared_address(dynamic) + 1023) / 1024 * 1024);
    const u32 full = keep_address(shared_address(barriers)), empty = full + 8 * DEPTH;
    // This block's turns of ROWS strips, for each of the chunks of tokens, as use(strip, token).
    auto each_turn = [&](auto use) {
        const int turns = (strips + ROWS - 1) / ROWS;
        int turn = blockIdx.x;
        for (int token = 0; token < m; token += TOKENS, turn -= turns)
            for (; turn < turns; turn += gridDim.x) use(turn * ROWS, token);
    };

    if (warp >= WARPS) {
        wait_at_barrier<(COPIERS + 1) * LANES>(READY);
        Copier copier(stages, full, warp - WARPS);
        each_turn([&](int strip, int token) {
            copier.copy(weight, strip, strips,
                        [&](u32 to, int tile, u32 barrier) { copy_tiles(to, x, token, tile, matrix, barrier, KEEP_LONG); });
        });
        return;
    }

    Sums sums(full + 16 * DEPTH);
    if (warp == 0) {
        if (lane == 0) {
            prefetch_map(x);
            for (int i = 0; i < DEPTH; ++i) {
                barrier_init(full + 8 * i, COPIERS);
                barrier_init(empty + 8 * i, WARPS * ARRIVALS);
            }
            sums.init();
            barriers_ready();
        }
        __syncwarp();
        wait_at_barrier<(COPIERS + 1) * LANES>(READY);
    }
    Products::prepare(threadIdx.x);
    const u32 sums_at = keep_address(stages + DEPTH * BYTES_OF_STAGE);
    const int group = warp / SHARERS * STRIPS, sharer = warp % SHARERS;
    Products products(Ring::place(stages + X_BYTES + group * BLOCK_STAGE_BYTES, sharer), stages + sharer * (STAGE_TILES * X_TILE_BYTES), lane);
    int slot = 0;
    u32 phase = 0;
    wait_at_barrier<THREADS>(BEGIN);
    each_turn([&](int strip, int token) {
        Layout::Rows of_rows[STRIPS];
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) of_rows[i] = Layout::rows(weight, min(strip + group + i, strips - 1), lane);
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
            warp_arrives(empty + 8 * slot, lane);
            if (++slot == DEPTH) {
                slot = 0;
                phase ^= 1;
            }
        }
        sums.wait_until_read(0);
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            write(sums_at + ((warp * PARTS + part) * LANES + lane) * 16, products.sum(part, lane));
        sums.written(0, lane);
        sums.wait_until_written(0);
        const int tokens = min(TOKENS, m - token);
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
        sums.read(0, lane);
        sums.next(0);
    });
}
