// y = x Wᵀ for few tokens: the weights stream from memory once, and tensor cores do the sums.
//
// Weights are the 16-row operand of the tensor cores' instruction and tokens its 8 columns: in the activations' type
// (halves.cuh), or, for one or two tokens and int4_lut16, in integers (integers.cuh, -DINTEGER=1 or 2). A block
// stages its slice of x in shared memory once and walks over strips of 16 rows; its warps share the columns of a
// strip, pairs of tiles in turn. Each warp copies its own tiles, DEPTH pairs in flight, also across the end of a strip, so
// that memory never waits for sums. The warps' sums meet in shared memory, where warps of their own add them, so that nobody
// else waits for that either. Where K is cut into slices over blocks, the last block to arrive at a strip adds the slices in
// order (always the same order, so results repeat) and leaves the counter at zero for the next launch.
//
// Grid: x strips (persistent), y slices of K, z matrices of a batch. -DWARPS, -DDEPTH, -DCOLUMNS (tiles of 8 tokens),
// -DBLOCKS (a multiprocessor's blocks, for the register budget).
//
// A decoder's step has more in the same launch: -DNORM and -DEACH (normed.cuh), where x is the residual stream; -DOUTPUT=0
// writes the activations' type, 1 FP32, 2 adds to FP32; -DACTIVATION (activation.cuh); -DGATED=1 where each strip has eight
// rows of gates and then the eight rows that they multiply. With -DOVERLAP=1 the first weights are on their way before the
// previous kernel has ended (overlap.cuh).
#include "activation.cuh"
#include "layouts.cuh"
#include "engine.cuh"
#include "overlap.cuh"
#ifndef OUTPUT
#define OUTPUT 0
#endif
#ifndef GATED
#define GATED 0
#endif
#ifndef OVERLAP
#define OVERLAP 0
#endif
#ifndef INTEGER
#define INTEGER 0
#endif
#ifndef ENGINE
#define ENGINE 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef NORM
#define NORM 0
#endif
#ifndef STRIPS
#define STRIPS 1
#endif
#if INTEGER
#include "integers.cuh"
#else
#include "halves.cuh"
#endif
#if NORM
#include "normed.cuh"
#endif

namespace tenpak {

// Strips whose sums are in shared memory at a time, each with a warp that adds them.
#ifndef BUFFERS_OF
#define BUFFERS_OF (COLUMNS <= 2 ? 2 : 1)
#endif
constexpr int BUFFERS = BUFFERS_OF;
// Warps: those that multiply, those that add, one that finishes what the cluster has added, one that copies.
constexpr int FINISHER = WARPS + BUFFERS, COPIER = FINISHER + (CLUSTER > 1), ALL_WARPS = COPIER + (ENGINE > 0);
// Steps at a time. Long steps are not unrolled: a launch is so short that fetching instructions is part of its time.
constexpr int UNROLL = INTEGER || ENGINE ? 1 : DEPTH;
// Barriers: a buffer has been written, or read; x is staged.
constexpr int FULL = 1, EMPTY = FULL + BUFFERS, STAGED = EMPTY + BUFFERS, ASKED = STAGED + 1;
// Steps of x that the copy engine may bring one by one.
constexpr int X_STEPS = ENGINE && !INTEGER && !NORM ? 32 : 0;
// Strips of one owner whose sums other blocks of the cluster may have sent.
constexpr int MAILS = 4;
constexpr int PARTS = STRIPS * COLUMNS;
constexpr int MAIL_BYTES = CLUSTER * PARTS * LANES * 16;

__device__ __forceinline__ void wait_at(int barrier) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(THREADS + LANES) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier) {
    asm volatile("bar.arrive %0, %1;" :: "r"(barrier), "n"(THREADS + LANES) : "memory");
}
// Of those that multiply.
__device__ __forceinline__ void wait_for_staged() { asm volatile("bar.sync %0, %1;" :: "n"(STAGED), "n"(THREADS) : "memory"); }

// ---- Copies of weights ------------------------------------------------------------------------------------------------

// What a block multiplies, in order: strips `first`, first + every, ..., and of each the tiles from first_tile on.
struct Walk {
    Weight weight;
    int first, every, turns;
    int first_tile, count;  // of this block's slice
    int steps;              // of a warp and strip, each two tiles
    int strips;

    __device__ __forceinline__ int strip(int turn) const { return (first + turn * every) * STRIPS; }
};

#if ENGINE
// The copy engine brings what all warps take in a step, DEPTH steps ahead, asked by one thread.
constexpr int PARAMS_AT = WARPS * STAGE_TILES * Layout::CODE_BYTES;
constexpr int SUPERS_AT = PARAMS_AT + WARPS * Layout::PAIR_BYTES;
constexpr int STEP_TILES = WARPS * STAGE_TILES;

struct Ring {
    u32 stages, full, empty;
    int slot = 0;
    u32 phase = 0;

    __device__ __forceinline__ Ring(u32 stages, u32 barriers) : stages(stages), full(barriers), empty(barriers + 8 * DEPTH) {}
    // Where a warp's tiles are in the first stage.
    static __device__ __forceinline__ PairAt place(u32 stages, int warp) {
        return {stages + warp * STAGE_TILES * Layout::CODE_BYTES, stages + PARAMS_AT + warp * Layout::PAIR_BYTES,
                stages + SUPERS_AT + warp / 2 * 32};
    }
    static __device__ __forceinline__ void init(u32 barriers) {
        for (int i = 0; i < DEPTH; ++i) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (DEPTH + i), WARPS);
        }
    }
    __device__ __forceinline__ void next() {
        if (++slot == DEPTH) {
            slot = 0;
            phase ^= 1;
        }
    }
    // How far on the tiles are that come next, once they are there.
    __device__ __forceinline__ u32 wait() const {
        barrier_wait(full + 8 * slot, phase);
        return slot * STRIPS * BLOCK_STAGE_BYTES;
    }
    // What wait() said is in registers.
    __device__ __forceinline__ void release(int lane) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
        next();
    }
    // One step's weights, once its stage is empty; by one thread.
    __device__ __forceinline__ void copy(const Walk& walk, int turn, int step) {
        barrier_wait(empty + 8 * slot, phase ^ 1);
        const int tile = walk.first_tile + step * STEP_TILES, here = min(STEP_TILES, walk.first_tile + walk.count - tile);
        const u32 barrier = full + 8 * slot;
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            const u32 to = stages + (slot * STRIPS + s) * BLOCK_STAGE_BYTES;
            const int strip = min(walk.strip(turn) + s, walk.strips - 1);
            const ParamRun params = Layout::param_run(walk.weight, strip, tile, here);
            const ParamRun supers = Layout::super_run(walk.weight, strip, tile, here);
            if (s == 0) barrier_expect(barrier, STRIPS * (here * Layout::CODE_BYTES + params.bytes + supers.bytes));
            copy_bulk(to, walk.weight.codes + (size_t)(u32)(strip * walk.weight.tiles + tile) * Layout::CODE_BYTES,
                      here * Layout::CODE_BYTES, barrier);
            if (Layout::PAIR_BYTES) copy_bulk(to + PARAMS_AT, params.from, params.bytes, barrier);
            if (Layout::PARAM_BYTES > Layout::PAIR_BYTES) copy_bulk(to + SUPERS_AT, supers.from, supers.bytes, barrier);
        }
        next();
    }
    // One step's columns of x.
    static __device__ __forceinline__ void copy_x(const XSlice& from, u32 to, int row_bytes, int step, u32 barrier) {
        constexpr int MOST = STEP_TILES * TILE_COLS;
        const int column = step * MOST, columns = min(MOST, from.columns - column);
        barrier_expect(barrier, from.tokens * columns * 2);
        for (int token = 0; token < from.tokens; ++token)
            copy_bulk_kept(to + token * row_bytes + column * 2,
                           reinterpret_cast<const u8*>(from.x + token * from.stride + from.first_column + column), columns * 2, barrier);
    }
};
#else
// Each warp copies its own tiles, DEPTH steps ahead, also across the end of a strip.
struct Ring {
    u32 stages;
    Walk walk;
    Source source;
    int warp, lane, turn_ahead, left, steps_left;
    int slot = 0;

    __device__ __forceinline__ Ring(u32 all_stages, const Walk& walk, int warp, int lane)
        : stages(all_stages + warp * (DEPTH * STAGE_BYTES)), walk(walk), source(walk.weight, walk.first, walk.first_tile + 2 * warp, lane),
          warp(warp), lane(lane), turn_ahead(0), left(walk.count - 2 * warp), steps_left(walk.steps) {}
    static __device__ __forceinline__ PairAt place(u32 all_stages, int warp) {
        const u32 codes = all_stages + warp * (DEPTH * STAGE_BYTES), params = codes + STAGE_TILES * Layout::CODE_BYTES;
        return {codes, params, params + Layout::PAIR_BYTES};
    }
    // Where the next copies come from, and how many tiles there are from there to the end of the slice.
    __device__ __forceinline__ void copy_ahead(int to) {
        if (left > 0) source.copy(left > 1 ? 2 : 1, stages + to * STAGE_BYTES, lane);
        commit_copies();
        source.advance(WARPS, lane);
        left -= 2 * WARPS;
    }
    // After each UNROLL of those.
    __device__ __forceinline__ void turn() {
        if ((steps_left -= UNROLL) > 0) return;
        ++turn_ahead;
        steps_left = walk.steps;
        source = Source(walk.weight, walk.strip(turn_ahead), walk.first_tile + 2 * warp, lane);
        left = turn_ahead < walk.turns ? walk.count - 2 * warp : 0;
    }
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int first = 0; first < DEPTH; first += UNROLL) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) copy_ahead(first + i);
            turn();
        }
    }
    __device__ __forceinline__ u32 wait(int i) const {
        wait_for_copies<DEPTH - 1>();
        __syncwarp();
        return (slot + i) * STAGE_BYTES;
    }
    __device__ __forceinline__ void release(int i) {
        __syncwarp();
        copy_ahead(slot + i);
    }
    __device__ __forceinline__ void next() {
        turn();
        slot = slot + UNROLL == DEPTH ? 0 : slot + UNROLL;
    }
};
#endif

#if OUTPUT == 0
using Out = u16;
#else
using Out = float;
#endif

struct Output {
    Out* y;
    const u16* bias;
    int n;
    float scale;

    __device__ __forceinline__ float finished(float sum, int row) const {
        return sum * scale + (bias ? widen(bias[row]) : 0.0f);
    }
    static __device__ __forceinline__ void put(Out& to, float x) {
#if OUTPUT == 0
        to = narrow(x);
#elif OUTPUT == 1
        to = x;
#else
        // Past L1, which may hold what was there before a kernel that this one overlaps with: only threads that wait for
        // it see to that.
        to = __ldcg(&to) + x;
#endif
    }
    // One lane's four sums: rows g and g + 8 of the strip, tokens 2t and 2t + 1.
    __device__ __forceinline__ void store(const float4& sum, int strip, int token, int tokens, float low, float high, int lane) const {
        const int row = strip * TILE_ROWS + lane / 4;
        token += lane % 4 * 2;
        const float v[4] = {sum.x * low, sum.y * low, sum.z * high, sum.w * high};
#if GATED
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (row + 8 >= n || token + i >= tokens) continue;
            put(y[(size_t)(token + i) * (n / 2) + strip * 8 + lane / 4],
                activate(finished(v[i], row)) * finished(v[2 + i], row + 8));
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + i / 2 * 8, m = token + i % 2;
            if (r < n && m < tokens) put(y[(size_t)m * n + r], activate(finished(v[i], r)));
        }
#endif
    }
};

}  // namespace tenpak

// x [batch, m, k] (FP32 before a norm) with rows of x_stride elements, or, with offsets [batch + 1], all experts' tokens one
// after another, sorted by expert. y alike with rows of n, or n / 2 if gated. bias [batch, n] or null. slice: tiles of K for each block; partial
// [slots, slices, strips, COLUMNS, lanes] float4 and arrived [slots, strips] serve slices > 1. norm_weight, norm_bias (or
// null): FP32 [k], with -DNORM.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(tenpak::ALL_WARPS * 32, BLOCKS)
skinny(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
       tenpak::Out* y, const unsigned short* bias, const int* offsets, float4* partial, unsigned int* arrived,
       long long codes_step, long long params_step, long long row_params_step, long long x_stride, int m, int n, int k,
       int tiles, int supers, int slice, float scale
#if NORM
       , const float* norm_weight, const float* norm_bias, float eps
#endif
) {
    using namespace tenpak;
    extern __shared__ uint4 dynamic[];
    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES;
    const int matrix = blockIdx.z, slices = gridDim.y;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    // K is cut over the blocks of a cluster, or over the grid's y.
    const int rank = CLUSTER > 1 ? blockIdx.x % CLUSTER : blockIdx.y;
    const int first_tile = rank * slice, count = max(0, min(slice, tiles - first_tile));
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const int first = blockIdx.x / CLUSTER, every = gridDim.x / CLUSTER;
    const Walk walk{weight, first, every, ((strips + STRIPS - 1) / STRIPS - first + every - 1) / every, first_tile, count,
                    ((count + 2 * WARPS - 1) / (2 * WARPS) + UNROLL - 1) / UNROLL * UNROLL, strips};
    const long long begin = offsets ? offsets[matrix] : (long long)matrix * m;
    const int total = offsets ? offsets[matrix + 1] - (int)begin : m;
    if (OVERLAP) let_next_begin();
    if (total <= 0) return;

    const int row_bytes = Products::row_bytes(slice);
    float4* sums_of_warps = reinterpret_cast<float4*>(dynamic);
    u8* mail = reinterpret_cast<u8*>(sums_of_warps + BUFFERS * WARPS * PARTS * LANES);
    u8* stages = mail + (CLUSTER > 1 ? MAILS * MAIL_BYTES : 0);
    u8* staged_x = stages + STRIPS * WARPS * DEPTH * STAGE_BYTES;
    Products::prepare(threadIdx.x);
#if ENGINE || CLUSTER > 1
    // Of the ring: full, empty; of mail: full, and, for each owner, read; of steps of x, and that x has been read.
    __shared__ u64 barriers[2 * DEPTH + MAILS + CLUSTER * MAILS + X_STEPS + 1];
    const u32 ring_barriers = keep_address(shared_address(barriers));
    if (threadIdx.x == 0) {
#if ENGINE
        Ring::init(ring_barriers);
#endif
        for (int i = 0; i < MAILS + CLUSTER * MAILS + X_STEPS; ++i) barrier_init(ring_barriers + 8 * (2 * DEPTH + i), 1);
        barrier_init(ring_barriers + 8 * (2 * DEPTH + MAILS + CLUSTER * MAILS + X_STEPS), WARPS);
        barriers_ready();
    }
    const u32 mail_full = ring_barriers + 8 * 2 * DEPTH, mail_read = mail_full + 8 * MAILS, x_full = mail_read + 8 * CLUSTER * MAILS;
    __syncthreads();
#endif
#if CLUSTER > 1
    cluster_arrive();
#endif

    const int chunks = (total + TOKENS - 1) / TOKENS, all_turns = chunks * walk.turns;
    auto slice_of_x = [&](int chunk) {
        const int token = chunk * TOKENS;
        return XSlice{x + (begin + token) * x_stride, x_stride, min(TOKENS, total - token), k, first_tile * TILE_COLS, count * TILE_COLS};
    };
    // Whether the copy engine brings x, too: where a row of it is what its tiles hold.
    const bool x_by_engine = X_STEPS && walk.steps <= X_STEPS && k % TILE_COLS == 0 && slice_of_x(0).aligned(16);
    // The sums of a turn, counted over all chunks of tokens, become outputs.
    auto finish = [&](int done, const float4 (&sums)[PARTS]) {
        const int strip = walk.strip(done % walk.turns), token = done / walk.turns * TOKENS, tokens = min(TOKENS, total - token);
        const Output out{y + (begin + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int here = strip + part / COLUMNS, column = part % COLUMNS * 8;
            if (column >= tokens || here >= strips) continue;
            const Layout::Rows rows = Layout::rows(weight, here, lane);
            out.store(sums[part], here, column, tokens, Layout::row_scale(rows, false), Layout::row_scale(rows, true), lane);
        }
    };
    if (warp < WARPS) {
#if ENGINE
        Ring ring(keep_address(shared_address(stages)), ring_barriers);
#endif
        const u32 staged_address = keep_address(shared_address(staged_x));
        const u32 my_sums = keep_address(shared_address(sums_of_warps + warp * PARTS * LANES + lane));
        int done = 0;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const XSlice here = slice_of_x(chunk);
            if (chunk && !x_by_engine) wait_for_staged();
#if NORM
            NormedStaging<Products> staging(here, norm_weight, norm_bias, eps);
#else
            Products::Staging staging(here);
            // x goes first, so that it is there first; or, where it is not written yet, the weights do.
            if (!OVERLAP && !x_by_engine) {
                staging.begin(staged_x, row_bytes);
                commit_copies();
                if (ENGINE && chunk == 0) arrive_at(ASKED);
            }
#endif
#if !ENGINE
            Ring ring(keep_address(shared_address(stages)), walk, warp, lane);
            ring.begin();
#endif
            Layout::Rows rows[STRIPS];
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) rows[s] = Layout::rows(weight, min(walk.strip(0) + s, strips - 1), lane);
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
            if (!x_by_engine) wait_for_staged();

            Products products(Ring::place(shared_address(stages), warp), staged_address, row_bytes, here.tokens, count, lane);
            for (int turn = 0; turn < walk.turns; ++turn, ++done) {
                Layout::Rows rows_after[STRIPS];
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) rows_after[s] = Layout::rows(weight, min(walk.strip(turn + 1) + s, strips - 1), lane);
                products.clear();
                int tile = 2 * warp;
#pragma unroll 1
                for (int step = 0; step < walk.steps; step += UNROLL) {
#if ENGINE
                    Products::Pair pair;
                    if (X_STEPS && turn == 0 && x_by_engine) barrier_wait(x_full + 8 * step, chunk % 2);
                    products.load(pair, ring.wait(), lane);
                    ring.release(lane);
                    products.multiply(pair, rows, tile, count);
                    tile += 2 * WARPS;
#else
#pragma unroll
                    for (int i = 0; i < UNROLL; ++i, tile += 2 * WARPS) {
                        Products::Pair pair;
                        products.load(pair, ring.wait(i), lane);
                        ring.release(i);
                        products.multiply(pair, rows, tile, count);
                    }
                    ring.next();
#endif
                }

                const int buffer = done % BUFFERS;
                if (done >= BUFFERS) wait_at(EMPTY + buffer);
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const float4 sum = products.sum(part, lane);
                    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                                 :: "r"(my_sums + (buffer * WARPS * PARTS + part) * (LANES * 16)),
                                 "f"(sum.x), "f"(sum.y), "f"(sum.z), "f"(sum.w) : "memory");
                }
                arrive_at(FULL + buffer);
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) rows[s] = rows_after[s];
            }
#if ENGINE
            if (x_by_engine) {
                __syncwarp();
                if (lane == 0) barrier_arrive(x_full + 8 * X_STEPS);
            }
#endif
        }
#if CLUSTER > 1
        cluster_wait();
#endif
        return;
    }
#if ENGINE
    if (warp == COPIER) {
        if (!OVERLAP && !NORM && !x_by_engine) wait_at(ASKED);
        if (lane == 0) {
            Ring ring(keep_address(shared_address(stages)), ring_barriers);
            const u32 to = keep_address(shared_address(staged_x));
            for (int chunk = 0; chunk < chunks; ++chunk) {
                const XSlice here = slice_of_x(chunk);
                int first = 0;
                if (x_by_engine && chunk) barrier_wait(x_full + 8 * X_STEPS, (chunk - 1) % 2);
                if (x_by_engine && OVERLAP && chunk == 0) {
                    for (; first < min(DEPTH, walk.steps); ++first) ring.copy(walk, 0, first);
                    wait_for_previous();
                    for (int step = 0; step < first; ++step) Ring::copy_x(here, to, row_bytes, step, x_full + 8 * step);
                }
                for (int turn = 0; turn < walk.turns; ++turn, first = 0)
#pragma unroll 1
                    for (int step = first; step < walk.steps; ++step) {
                        if (x_by_engine && turn == 0) Ring::copy_x(here, to, row_bytes, step, x_full + 8 * step);
                        ring.copy(walk, turn, step);
                    }
            }
        }
        __syncwarp();
#if CLUSTER > 1
        cluster_wait();
#endif
        return;
    }
#endif
#if CLUSTER > 1
    cluster_wait();
    if (warp == FINISHER) {
        // Strips go round the cluster's blocks; this one finishes its own.
        for (int done = rank; done < all_turns; done += CLUSTER) {
            const int number = done / CLUSTER, box = number % MAILS;
            if (lane == 0) barrier_expect(mail_full + 8 * box, MAIL_BYTES);
            __syncwarp();
            barrier_wait_cluster(mail_full + 8 * box, number / MAILS % 2);
            const float4* from = reinterpret_cast<const float4*>(mail + box * MAIL_BYTES) + lane;
            float4 sums[PARTS];
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                sums[part] = from[part * LANES];
#pragma unroll
                for (int other = 1; other < CLUSTER; ++other) add(sums[part], from[(other * PARTS + part) * LANES]);
            }
            __syncwarp();
            // Blocks that will send no more may have ended.
            if (done + CLUSTER * MAILS < all_turns && lane < CLUSTER) arrive_there(address_in(mail_read + 8 * (rank * MAILS + box), lane));
            finish(done, sums);
        }
        return;
    }
#endif
    const int buffer = warp - WARPS;
    for (int done = buffer; done < all_turns; done += BUFFERS) {
        wait_at(FULL + buffer);
        float4 sums[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const float4* from = sums_of_warps + (buffer * WARPS * PARTS + part) * LANES + lane;
            sums[part] = from[0];
#pragma unroll
            for (int other = 1; other < WARPS; ++other) add(sums[part], from[other * PARTS * LANES]);
        }
        if (done + BUFFERS < all_turns) arrive_at(EMPTY + buffer);
#if CLUSTER > 1
        const int owner = done % CLUSTER, number = done / CLUSTER, box = number % MAILS;
        if (number >= MAILS) barrier_wait_cluster(mail_read + 8 * (owner * MAILS + box), (number / MAILS - 1) % 2);
        const u32 to = address_in(shared_address(mail) + box * MAIL_BYTES + (rank * PARTS * LANES + lane) * 16, owner);
        const u32 barrier = address_in(mail_full + 8 * box, owner);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) store_there(to + part * LANES * 16, sums[part], barrier);
#else
        if (slices > 1) {
            const int strip = walk.strip(done % walk.turns);
            const size_t slot = begin / TOKENS + matrix + done / walk.turns;
            const size_t step = (size_t)strips * PARTS * LANES;
            float4* all = partial + (slot * slices * strips + strip) * PARTS * LANES + lane;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) __stcg(all + blockIdx.y * step + part * LANES, sums[part]);
            __threadfence();
            __syncwarp();
            unsigned int* counter = arrived + slot * strips + strip;
            u32 before = 0;
            if (lane == 0) before = atomicAdd(counter, 1);
            if (__shfl_sync(~0u, before, 0) + 1 != (u32)slices) continue;
            __threadfence();
#pragma unroll
            for (int part = 0; part < PARTS; ++part) sums[part] = __ldcg(all + part * LANES);
            for (int other = 1; other < slices; ++other)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) add(sums[part], __ldcg(all + other * step + part * LANES));
            if (lane == 0) *counter = 0;
        }
        finish(done, sums);
#endif
    }
}
