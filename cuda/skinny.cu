// y = x Wᵀ for few tokens: the weights stream from memory once, and tensor cores do the sums.
//
// Weights are the 16-row operand of the tensor cores' instruction and tokens its 8 columns: in the activations' type
// (halves.cuh), or, for one or two tokens, in integers (integers.cuh, -DINTEGER=1 or 2). A block stages its slice of x in shared
// memory once and walks over strips of 16 rows, STRIPS at a time; its warps share the columns of a strip, pairs of tiles in
// turn. Copies of weights are DEPTH steps ahead, also across the end of a strip (ring.cuh), so that memory never waits
// for sums. The warps' sums meet in shared memory, where warps of their own add them, so that nobody else waits for that
// either. Where K is cut into slices over blocks, the last block to arrive at a strip adds the slices in order (always the
// same order, so results repeat) and leaves the counter at zero for the next launch. With -DHEAD=1 it is the strips which are left
// over that are cut (Walk of ring.cuh), and their parts meet alike.
//
// Grid: x strips (persistent), y slices of K, z matrices of a batch; with -DGROUPED=1, not in integers and without -DHEAD, those
// experts that have tokens share x and z. -DWARPS, -DDEPTH, -DCOLUMNS (tiles of 8 tokens), -DBLOCKS (a multiprocessor's blocks, for
// the register budget), -DENGINE=1 (the copy engine brings weights, and x where it can). With it: -DSTRIPS=2 (what is read of x
// serves two strips), -DCOPIERS (warps that ask for copies, each for a part: one asks for a copy in 64 cycles or so, whatever its
// size), -DSHARERS (warps that take a step; groups of them take steps in turn).
//
// A decoder's step has more in the same launch: -DNORM and -DEACH (normed.cuh), where x is the residual stream; -DOUTPUT=0
// writes the activations' type, 1 FP32, 2 adds to FP32; -DACTIVATION (activation.cuh); -DGATED=1 where each strip has eight
// rows of gates and then the eight rows that they multiply. With -DOVERLAP=1 the first weights are on their way before the
// previous kernel has ended (overlap.cuh).
#if !INTEGER
#define RAW 1
#endif
#ifndef GROUPED
#define GROUPED 0
#endif
#include "activation.cuh"
#if GROUPED
#include "experts.cuh"
#endif
#include "layouts.cuh"
#include "overlap.cuh"
#ifndef OVERLAP
#define OVERLAP 0
#endif
#ifndef NORM
#define NORM 0
#endif
#include "output.cuh"
#include "ring.cuh"
#include "sums.cuh"
#if INTEGER
#include "integers.cuh"
#else
#include "halves.cuh"
#endif
#if NORM
#include "normed.cuh"
#endif

namespace tenpak {

// Strips (or pairs of strips) whose sums are in shared memory at a time, each with a warp that adds them.
constexpr int BUFFERS = 2;
// Warps: those that multiply, those that add, and those that ask for copies.
constexpr int FIRST_COPIER = WARPS + BUFFERS, ALL_WARPS = FIRST_COPIER + ENGINE * COPIERS;
// Tiles of sums, of a strip's 16 rows by eight tokens each.
constexpr int PARTS = STRIPS * COLUMNS;
static_assert(DEPTH % GROUPS == 0, "a stage is always the same group's: its barrier's parity tells one use from the next, no more");
// A block's barriers: those in shared memory are made, for copiers; x is staged, for those who multiply and who add. Copiers wait for
// nobody else, and nobody for them.
constexpr int READY = 1, STAGED = 2;
// Steps of x that the copy engine may bring one by one.
constexpr int X_STEPS = ENGINE && !INTEGER && !NORM && !HEAD ? 32 : 0;
static_assert(ENGINE || !HEAD, "a warp that copies for itself begins and ends where strips do");

using Sum = Products::Sum;
using Sums = SumsBarriers<BUFFERS, WARPS, 1>;
__device__ __forceinline__ void wait_for_staging() {
    wait_at_barrier<FIRST_COPIER * LANES>(STAGED);
    // racecheck may let the last who arrives go on before it notes that others have: of a second barrier it knows them all.
    if (RACECHECK) wait_at_barrier<FIRST_COPIER * LANES>(STAGED);
}

#if ENGINE
// The columns of x of one step: of one copier's tokens.
__device__ __forceinline__ void copy_x(const XSlice& from, u32 to, int row_bytes, int step, u32 barrier, int copier) {
    constexpr int MOST = STEP_TILES * TILE_COLS;
    const int column = step * MOST, bytes = min(MOST, from.columns - column) * 2;
    const int tokens = max(from.tokens - copier + COPIERS - 1, 0) / COPIERS;
    if (elected()) {
        barrier_expect(barrier, tokens * bytes);
#pragma unroll 1
        for (int token = copier; token < from.tokens; token += COPIERS)
            copy_bulk(to + token * row_bytes + column * 2, from.x + token * from.stride + from.first_column + column, bytes, barrier);
    }
}
#endif

}  // namespace tenpak

// x [batch, m, k] (FP32 before a norm) with rows of x_stride elements; or, grouped, all tokens of m experts, sorted by expert, whose
// tokens begin at offsets [m + 1]. y alike with rows of n, or n / 2 if gated. bias [batch, n] or null. slice: tiles of K for
// each block, a multiple of four; partial [slots, parts, strips, PARTS, lanes] of Sum (Parts of ring.cuh) and arrived
// [slots, strips] (of the first strip of each turn) serve slices > 1 and, with -DHEAD, strips that are cut, where there is one
// slice. norm_weight, norm_bias (or null): FP32 [k], with -DNORM.
extern "C" __global__ void __launch_bounds__(tenpak::ALL_WARPS * 32, BLOCKS)
skinny(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
       tenpak::Out* y, const unsigned short* bias, const int* offsets, tenpak::Sum* partial, unsigned int* arrived,
       long long codes_step, long long params_step, long long row_params_step, long long x_stride, int m, int n, int k,
       int tiles, int supers, int slice,
#if HEAD
       int wholes, int head, unsigned int step_ratio,
#endif
       float scale
#if NORM
       , const float* norm_weight, const float* norm_bias, float eps
#endif
) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
#if GROUPED
    const ShareOfExpert share(offsets, m, blockIdx.z * gridDim.x + blockIdx.x, gridDim.z * gridDim.x, lane);
    const int matrix = share.expert;
    if (matrix < 0) return;
    const Walk walk(strips, tiles, slice, share.first, share.every);
    if (!walk.has(0)) return;  // of an expert that has more blocks than turns
    const long long begin = offsets[matrix];
    const int total = offsets[matrix + 1] - (int)begin;
#else
    const int matrix = blockIdx.z;
#if HEAD
    const Walk walk(strips, tiles, slice, wholes, head, step_ratio);
#else
    const Walk walk(strips, tiles, slice);
#endif
    const long long begin = (long long)matrix * m;
    const int total = m;
#endif
    // Each role makes its own, for what a launch begins with takes time by its instructions.
    auto weight_of = [&] {
        return Weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step, tiles, supers};
    };
    if (OVERLAP) let_next_begin();
    if (total <= 0) return;

    const int row_bytes = Products::row_bytes(slice);
    Sum* sums_of_warps = reinterpret_cast<Sum*>(dynamic);
    u8* stages = reinterpret_cast<u8*>(sums_of_warps + BUFFERS * WARPS * PARTS * LANES);
    u8* staged_x = stages + DEPTH * STRIPS * BLOCK_STAGE_BYTES;
    __shared__ u64 barriers_of_sums[Sums::BARRIERS];
    Sums buffers(keep_address(shared_address(barriers_of_sums)));
    // In integers there are no more tokens than one chunk has.
    const int chunks = INTEGER ? 1 : (total + TOKENS - 1) / TOKENS;
    auto slice_of_x = [&](int chunk) {
        const int token = chunk * TOKENS;
        return XSlice{x + (begin + token) * x_stride, x_stride, min(TOKENS, total - token),
                      k, walk.first_tile * TILE_COLS, walk.count * TILE_COLS};
    };
    // Whether the copy engine brings x, too: where a row of it is what its tiles hold.
    const bool x_by_engine = X_STEPS && walk.steps <= X_STEPS && k % TILE_COLS == 0 && slice_of_x(0).aligned(16);

#if ENGINE
    __shared__ u64 barriers[Ring::BARRIERS + X_STEPS];
    const u32 ring_barriers = keep_address(shared_address(barriers)), x_full = ring_barriers + 8 * Ring::BARRIERS;
    if (warp >= FIRST_COPIER) {
        const int copier = warp - FIRST_COPIER;
        Ring ring(keep_address(shared_address(stages)), ring_barriers);
        const u32 to = keep_address(shared_address(staged_x));
        const Weight weight = weight_of();
        // What the first copies are of is known by the time there are barriers.
        const u64 known = (u64)weight.codes | (u64)weight.params | (u64)weight.row_params | (u32)(walk.strip(0) | tiles | supers);
        wait_at_barrier_after<(COPIERS + 1) * LANES>(known, READY);
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const XSlice here = slice_of_x(chunk);
            if (chunk) __syncthreads();
            // Of each step x, where it is there, and then the weights: all by the same few instructions, for those that are new come from
            // far.
            int turn = 0, step = walk.head_begin, x_steps = x_by_engine ? 0 : walk.steps;
#pragma unroll 1
            for (int asked = chunk ? DEPTH : 0; walk.has(turn) || (X_STEPS && x_steps < walk.steps); ++asked) {
                if (X_STEPS && OVERLAP && asked == DEPTH) wait_for_previous();
                if (X_STEPS && x_steps < walk.steps && (!OVERLAP || asked >= DEPTH)) {
                    copy_x(here, to, row_bytes, x_steps, x_full + 8 * x_steps, copier);
                    ++x_steps;
                }
                if (walk.has(turn)) {
                    ring.copy(walk, weight, turn, step, copier);
                    if (++step == walk.end(turn)) step = 0, ++turn;
                }
            }
        }
        return;
    }
#endif

    if (warp >= WARPS) {
        const int buffer = warp - WARPS;
        if (threadIdx.x == WARPS * LANES) {
            buffers.init();
#if ENGINE
            Ring::init(ring_barriers);
            if (x_by_engine)
                for (int i = 0; i < walk.steps; ++i) barrier_init(x_full + 8 * i, COPIERS);
            barriers_ready();
#endif
        }
#if ENGINE
        if (warp == WARPS) {
            __syncwarp();
            wait_at_barrier<(COPIERS + 1) * LANES>(READY);
        }
#endif
        Products::prepare(threadIdx.x - WARPS * LANES);
        const Weight weight = weight_of();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int token = chunk * TOKENS, tokens = min(TOKENS, total - token);
            const Output out{y + (begin + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
            const size_t slot = begin / TOKENS + matrix + chunk;
            if (chunk) __syncthreads();
            wait_for_staging();
            for (int turn = buffer; walk.has(turn); turn += BUFFERS) {
                const int strip = walk.strip(turn);
                Layout::Rows rows[STRIPS];
#pragma unroll
                for (int i = 0; i < STRIPS; ++i) rows[i] = Layout::rows(weight, walk.strip(turn, i), lane);
                buffers.wait_until_written(buffer);
                Sum sums[PARTS];
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const Sum* from = sums_of_warps + (buffer * WARPS * PARTS + part) * LANES + lane;
                    sums[part] = from[0];
#pragma unroll
                    for (int other = 1; other < WARPS; ++other) add(sums[part], from[other * PARTS * LANES]);
                }
                buffers.read(buffer, lane);
                buffers.next(buffer);
                const Parts parts = walk.parts(turn);
                if (parts.count > 1) {
                    const size_t step = (size_t)parts.strips * PARTS * LANES;
                    Sum* all = partial + (slot * parts.most * parts.strips + parts.strip) * PARTS * LANES + lane;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) __stcg(all + parts.mine * step + part * LANES, sums[part]);
                    __threadfence();
                    __syncwarp();
                    unsigned int* counter = arrived + slot * strips + strip;
                    u32 before = 0;
                    if (lane == 0) before = atomicAdd(counter, 1u);
                    if (__shfl_sync(~0u, before, 0) + 1 != (u32)parts.count) continue;
                    __threadfence();
#pragma unroll
                    for (int part = 0; part < PARTS; ++part) sums[part] = __ldcg(all + part * LANES);
                    for (int other = 1; other < parts.count; ++other)
#pragma unroll
                        for (int part = 0; part < PARTS; ++part) add(sums[part], __ldcg(all + other * step + part * LANES));
                    if (lane == 0) *counter = 0;
                }
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const int i = part / COLUMNS, column = part % COLUMNS * 8;
                    if (column < tokens && strip + i < strips)
                        Products::store(out, sums[part], strip + i, column, tokens, Layout::row_scale(rows[i], false),
                                        Layout::row_scale(rows[i], true), lane);
                }
            }
        }
        return;
    }

    // x goes first, so that it is there first; or, where it is not written yet, the weights do.
#if NORM
    using Staging = NormedStaging<Products>;
    auto staging_of = [&](int chunk) { return Staging(slice_of_x(chunk), norm_weight, norm_bias, eps); };
#else
    using Staging = Products::Staging;
    auto staging_of = [&](int chunk) {
        Staging staging(slice_of_x(chunk));
        if (!OVERLAP && !x_by_engine) {
            staging.begin(staged_x, row_bytes);
            commit_copies();
        }
        return staging;
    };
#endif
    Staging staging = staging_of(0);
#if ENGINE
    // Steps before the next of this warp's group.
    int ahead = warp / SHARERS;
    Ring ring(keep_address(shared_address(stages)), ring_barriers, ahead);
#endif
    const Weight weight = weight_of();
    const u32 staged_address = keep_address(shared_address(staged_x));
    const u32 my_sums = keep_address(shared_address(sums_of_warps + warp * PARTS * LANES + lane));
    for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk) {
            __syncthreads();
            staging = staging_of(chunk);
        }
#if !ENGINE
        Ring ring(keep_address(shared_address(stages)), walk, weight, warp, lane);
#endif
        Layout::Rows rows[STRIPS];
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) rows[i] = Layout::rows(weight, walk.strip(0, i), lane);
        Products products(Ring::place(shared_address(stages), warp % SHARERS), staged_address, row_bytes, staging.from.tokens,
                          walk.count, lane);
        if (OVERLAP) wait_for_previous();
#if NORM
        staging.stage(staged_x, row_bytes);
#else
        if (!x_by_engine) {
            if (OVERLAP) staging.begin(staged_x, row_bytes);
            staging.end(staged_x, row_bytes);
            if (!OVERLAP) wait_for_copies<ENGINE ? 0 : DEPTH>();
        }
#endif
        wait_for_staging();
#if ENGINE
        ahead += walk.head_begin;
#endif

        for (int turn = 0; walk.has(turn); ++turn) {
            Layout::Rows rows_after[STRIPS];
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) rows_after[i] = Layout::rows(weight, walk.strip(turn + 1, i), lane);
            products.clear();
#if ENGINE
            int step = ahead, tile = STAGE_TILES * (warp % SHARERS) + step * STEP_TILES;
#pragma unroll 1
            for (; step < walk.end(turn); step += GROUPS, tile += GROUPS * STEP_TILES) {
                Products::Pair pair;
                if (x_by_engine && turn < GROUPS) barrier_wait(x_full + 8 * step, chunk % 2);
                products.load(pair, ring.wait(), lane);
                ring.release(lane);
                products.multiply(pair, rows, tile, walk.count);
            }
            // The groups take turns across the ends of strips, too.
            ahead = step - walk.end(turn);
#else
            int tile = STAGE_TILES * warp;
#pragma unroll 1
            for (int step = 0; step < walk.steps; step += UNROLL) {
#pragma unroll
                for (int i = 0; i < UNROLL; ++i, tile += STEP_TILES) {
                    Products::Pair pair;
                    products.load(pair, ring.wait(i), lane);
                    ring.release(i);
                    products.multiply(pair, rows, tile, walk.count);
                }
                ring.next();
            }
#endif

            const int buffer = turn % BUFFERS;
            buffers.wait_until_read(buffer);
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                write(my_sums + (buffer * WARPS * PARTS + part) * (LANES * (int)sizeof(Sum)), products.sum(part, lane));
            buffers.written(buffer, lane);
            buffers.next(buffer);
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) rows[i] = rows_after[i];
        }
    }
}
