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
#ifndef RAW
#define RAW 1
#endif
#include "activation.cuh"
#include "layouts.cuh"
#include "overlap.cuh"
#define OVERLAP 0
#include "ring.cuh"
#include "halves.cuh"
#include "boxes.cuh"
#include "output.cuh"

#ifndef ROTATE
#define ROTATE 0
#endif
#ifndef WARM
#define WARM 0
#endif

namespace tenpak {

constexpr int ROWS = GROUPS * STRIPS;
constexpr int ALL_WARPS = WARPS + COPIERS;
constexpr int PARTS = STRIPS * COLUMNS;
// A stage: a box of x, of STEP_TILES tiles, then all strips' tiles.
constexpr int X_TILE_BYTES = TOKENS * TILE_COLS * 2, X_BYTES = STEP_TILES * X_TILE_BYTES;
constexpr int BYTES_OF_STAGE = (X_BYTES + ROWS * BLOCK_STAGE_BYTES + 1023) / 1024 * 1024;
static_assert(WARPS % SHARERS == 0, "warps share strips evenly");
// Barriers of a block: where copiers meet, and where the others do.
constexpr int READY = 1, SUMS = 2;

// One of the warps that ask for copies: of each step every COPIERS-th of the strips, and the first the box. (One warp asks for a
// copy in 64 cycles or so, however few its instructions are.)
struct Copier {
    u32 stages, full, empty;
    int index;  // among the copiers
    int slot = 0, early = DEPTH;  // steps that it asks for before it meets the others
    u32 phase = 0;

    __device__ __forceinline__ Copier(u32 stages, u32 full, int index)
        : stages(stages), full(full), empty(full + 8 * DEPTH), index(index) {}

    // `count` of a turn's steps, from `first` on, and from the first of all on after the last: strips from `strip` on, and x as
    // box(to, tile, barrier) brings it.
    template <class Box>
    __device__ __forceinline__ void copy(const Weight& weight, int strip, int strips, int first, int count, int steps, Box box) {
        const int there = min(ROWS, strips - strip), mine = (there - index + COPIERS - 1) / COPIERS;
#pragma unroll 1
        for (int i = 0, step = first; i < count; ++i) {
            if (early-- == 0) __syncthreads();
            barrier_wait(empty + 8 * slot, phase ^ 1);
            const int tile = step * STEP_TILES, here = min(STEP_TILES, weight.tiles - tile);
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
            if (++step == steps) step = 0;
            if (++slot == DEPTH) {
                slot = 0;
                phase ^= 1;
            }
        }
    }
    __device__ __forceinline__ void meet() const {
        if (early >= 0) __syncthreads();
    }
};

}  // namespace tenpak

// x: a map of [batch, k / 64, m, 64] with boxes of STEP_TILES tiles of TOKENS tokens, swizzled by 128 bytes. Otherwise as skinny's, but
// those of experts. partial: [batch, gridDim.x, ROWS * COLUMNS, lanes] float4; arrived: [batch, gridDim.x], zero before and after.
extern "C" __global__ void __launch_bounds__(tenpak::ALL_WARPS * 32, 1)
rows(const __grid_constant__ tenpak::TensorMap x, const unsigned char* codes, const unsigned char* params,
     const unsigned char* row_params, tenpak::Out* y, const unsigned short* bias, float4* partial, unsigned int* arrived,
     long long codes_step, long long params_step, long long row_params_step, int m, int n, int k, int tiles, int supers,
     int share_steps, float scale) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    __shared__ u64 barriers[2 * DEPTH];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int matrix = blockIdx.z;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS, turns = (strips + ROWS - 1) / ROWS;
    const int steps = (tiles + STEP_TILES - 1) / STEP_TILES;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const u32 stages = keep_address((shared_address(dynamic) + 1023) / 1024 * 1024), full = keep_address(shared_address(barriers)), empty = full + 8 * DEPTH;
    // Each turn for each of the chunks of tokens, so many steps in all, of which a block does an equal share. The last share is the
    // first block's, so that who waits for sums waits for blocks that have begun before it.
    const int share = gridDim.x - 1 - blockIdx.x, from = share * share_steps;
    int left = min(share_steps, turns * ((m + TOKENS - 1) / TOKENS) * steps - from);
    int turn = from / steps, first = from - turn * steps, token = 0;
    for (; turn >= turns; turn -= turns) token += TOKENS;
    // What follows for each turn of these, as use(strip, first, start, count, token): `count` steps from `start` on.
    auto each = [&](auto use) {
        for (int count; left > 0; left -= count, first = 0, ++turn) {
            if (turn == turns) turn = 0, token += TOKENS;
            count = min(steps - first, left);
            // Blocks that have all columns of their strips begin at different ones, for the same ones of x come from one place.
            use(turn * ROWS, first, ROTATE && count == steps ? (int)blockIdx.x % steps : first, count, token);
        }
    };

    if (warp >= WARPS) {
        if (threadIdx.x == WARPS * LANES) {
            prefetch_map(x);
            for (int i = 0; i < DEPTH; ++i) {
                barrier_init(full + 8 * i, COPIERS);
                barrier_init(empty + 8 * i, WARPS * ARRIVALS);
            }
            barriers_ready();
        }
        if (COPIERS > 1) wait_at_barrier<COPIERS * LANES>(READY);
        else __syncwarp();
        Copier copier(stages, full, warp - WARPS);
        each([&](int strip, int, int start, int count, int token) {
            copier.copy(weight, strip, strips, start, count, steps,
                        [&](u32 to, int tile, u32 barrier) { copy_tiles(to, x, token, tile, matrix, barrier, KEEP_LONG); });
        });
        copier.meet();
        return;
    }

    Products::prepare(threadIdx.x);
    const u32 sums_at = keep_address(stages + DEPTH * BYTES_OF_STAGE);
    const int group = warp / SHARERS * STRIPS, sharer = warp % SHARERS;
    constexpr int PART = ROWS * COLUMNS * LANES;
    partial += (size_t)matrix * gridDim.x * PART;
    arrived += matrix * gridDim.x;
    int slot = 0;
    u32 phase = 0;
    Products products(Ring::place(stages + X_BYTES + group * BLOCK_STAGE_BYTES, sharer), stages + sharer * (STAGE_TILES * X_TILE_BYTES), lane);
    // Some warps go once through what a step does, with whatever a stage holds, while the first is on its way, as its instructions then are.
    bool warms = WARM && warp < 4;
    if (!warms) __syncthreads();
    each([&](int strip, int first, int start, int count, int token) {
        const int tokens = min(TOKENS, m - token);
        Layout::Rows of_rows[STRIPS];
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) of_rows[i] = Layout::rows(weight, min(strip + group + i, strips - 1), lane);
        products.clear();
#pragma unroll 1
        for (int i = 0, step = start; i < count; ++i) {
            const int tile = step * STEP_TILES + sharer * STAGE_TILES;
            if (!warms) barrier_wait(full + 8 * slot, phase);
            const u32 on = slot * BYTES_OF_STAGE;
            if (tile < tiles) {
                Products::Pair pair;
                products.load(pair, on, lane);
                products.multiply_at(pair, of_rows, on, tile + 1 < tiles);
            }
            if (warms) {
                products.clear();
                warms = false;
                --i;
                __syncthreads();
                continue;
            }
            warp_arrives(empty + 8 * slot, lane);
            if (++step == steps) step = 0;
            if (++slot == DEPTH) {
                slot = 0;
                phase ^= 1;
            }
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            write(sums_at + ((warp * PARTS + part) * LANES + lane) * 16, products.sum(part, lane));
        wait_at_barrier<THREADS>(SUMS);
        // Blocks that go on with these strips' columns, of the next shares.
        const int others = first || count == steps ? 0 : (steps - count + share_steps - 1) / share_steps;
        if (others) {
            if (lane < others)
                while (load_acquire(arrived + share + 1 + lane) == 0) {}
            __syncwarp();
        }
        const Output out{y + ((size_t)matrix * m + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
        for (int i = warp; i < ROWS * COLUMNS; i += WARPS) {
            const int row = i / COLUMNS, column = i % COLUMNS * 8;
            if (strip + row >= strips || column >= tokens) continue;
            float4* const mine = partial + ((size_t)share * ROWS * COLUMNS + i) * LANES + lane;
            // Of the warps that share this strip, in order.
            const u32 at = sums_at + ((row / STRIPS * SHARERS * PARTS + row % STRIPS * COLUMNS + i % COLUMNS) * LANES + lane) * 16;
            float4 sum = read<float4>(at);
#pragma unroll
            for (int other = 1; other < SHARERS; ++other) add(sum, read<float4>(at + other * (PARTS * LANES * 16)));
            if (first) {
                __stcg(mine, sum);
                continue;
            }
            for (int other = 1; other <= others; ++other) add(sum, __ldcg(mine + other * PART));
            const Layout::Rows of_row = Layout::rows(weight, strip + row, lane);
            out.store(sum, strip + row, column, tokens, Layout::row_scale(of_row, false), Layout::row_scale(of_row, true), lane);
        }
        wait_at_barrier<THREADS>(SUMS);
        if (first && threadIdx.x == 0) add_release(arrived + share, 1);
        if ((int)threadIdx.x < others) arrived[share + 1 + threadIdx.x] = 0;
    });
}
