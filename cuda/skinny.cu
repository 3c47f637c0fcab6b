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
#ifndef NORM
#define NORM 0
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
constexpr int BUFFERS = COLUMNS <= 2 ? 2 : 1;
// Steps at a time. Long steps are not unrolled: a launch is so short that fetching instructions is part of its time.
constexpr int UNROLL = INTEGER ? 1 : DEPTH;
// Barriers: a buffer has been written, or read.
constexpr int FULL = 1, EMPTY = FULL + BUFFERS;

__device__ __forceinline__ void wait_at(int barrier) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(THREADS + LANES) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier) {
    asm volatile("bar.arrive %0, %1;" :: "r"(barrier), "n"(THREADS + LANES) : "memory");
}

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
extern "C" __global__ void __launch_bounds__((WARPS + (COLUMNS <= 2 ? 2 : 1)) * 32, BLOCKS)
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
    const int first_tile = blockIdx.y * slice, count = min(slice, tiles - first_tile);
    // Steps of a warp, each two tiles.
    const int steps = ((count + 2 * WARPS - 1) / (2 * WARPS) + UNROLL - 1) / UNROLL * UNROLL;
    const Weight weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step,
                        tiles, supers};
    const long long begin = offsets ? offsets[matrix] : (long long)matrix * m;
    const int total = offsets ? offsets[matrix + 1] - (int)begin : m;
    if (OVERLAP) let_next_begin();
    if (total <= 0) return;

    const int row_bytes = Products::row_bytes(count);
    float4* sums_of_warps = reinterpret_cast<float4*>(dynamic);
    u8* stages = reinterpret_cast<u8*>(sums_of_warps + BUFFERS * WARPS * COLUMNS * LANES);
    u8* staged_x = stages + WARPS * DEPTH * STAGE_BYTES;
    const u32 my_stages = shared_address(stages) + warp * (DEPTH * STAGE_BYTES);

#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x, INTEGER ? Lut16::SUM : Lut16::BIASED_XOR);
#endif

    // Strips of this block.
    const int turns = (strips - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    for (int chunk = 0; chunk * TOKENS < total; ++chunk) {
        const int token = chunk * TOKENS, tokens = min(TOKENS, total - token);
        if (chunk) __syncthreads();

        if (warp >= WARPS) {
            const Output out{y + (begin + token) * (GATED ? n / 2 : n), bias ? bias + (size_t)matrix * n : nullptr, n, scale};
            const size_t slot = begin / TOKENS + matrix + chunk;
            __syncthreads();
            const int buffer = warp - WARPS;
            for (int turn = buffer; turn < turns; turn += BUFFERS) {
                const int strip = blockIdx.x + turn * gridDim.x;
                const Layout::Rows rows = Layout::rows(weight, strip, lane);
                wait_at(FULL + buffer);
                float4 sums[COLUMNS];
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) {
                    const float4* from = sums_of_warps + (buffer * WARPS * COLUMNS + column) * LANES + lane;
                    sums[column] = from[0];
#pragma unroll
                    for (int other = 1; other < WARPS; ++other) add(sums[column], from[other * COLUMNS * LANES]);
                }
                if (turn + BUFFERS < turns) arrive_at(EMPTY + buffer);
                if (slices > 1) {
                    const size_t step = (size_t)strips * COLUMNS * LANES;
                    float4* all = partial + (slot * slices * strips + strip) * COLUMNS * LANES + lane;
#pragma unroll
                    for (int column = 0; column < COLUMNS; ++column) __stcg(all + blockIdx.y * step + column * LANES, sums[column]);
                    __threadfence();
                    __syncwarp();
                    unsigned int* counter = arrived + slot * strips + strip;
                    u32 before = 0;
                    if (lane == 0) before = atomicAdd(counter, 1);
                    if (__shfl_sync(~0u, before, 0) + 1 != (u32)slices) continue;
                    __threadfence();
#pragma unroll
                    for (int column = 0; column < COLUMNS; ++column) sums[column] = __ldcg(all + column * LANES);
                    for (int other = 1; other < slices; ++other)
#pragma unroll
                        for (int column = 0; column < COLUMNS; ++column) add(sums[column], __ldcg(all + other * step + column * LANES));
                    if (lane == 0) *counter = 0;
                }
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column)
                    if (column * 8 < tokens)
                        out.store(sums[column], strip, column * 8, tokens, Layout::row_scale(rows, false),
                                  Layout::row_scale(rows, true), lane);
            }
            continue;
        }

        const XSlice slice_of_x{x + (begin + token) * x_stride, x_stride, tokens, k, first_tile * TILE_COLS, count * TILE_COLS};
#if NORM
        NormedStaging<Products> staging(slice_of_x, norm_weight, norm_bias, eps);
#else
        Products::Staging staging(slice_of_x);
        // x goes first, so that it is there first; or, where it is not written yet, the weights do.
        if (!OVERLAP) {
            staging.begin(staged_x, row_bytes);
            commit_copies();
        }
#endif
        // Where this warp's next copies come from, and how many tiles there are from there to the end of the slice.
        Source source(weight, blockIdx.x, first_tile + 2 * warp, lane);
        int strip_ahead = blockIdx.x, left = count - 2 * warp, steps_left = steps;
        auto copy_ahead = [&](int slot) {
            if (left > 0) source.copy(left > 1 ? 2 : 1, my_stages + slot * STAGE_BYTES, lane);
            commit_copies();
            source.advance(WARPS, lane);
            left -= 2 * WARPS;
        };
        // After each UNROLL of those.
        auto turn_ahead = [&] {
            if ((steps_left -= UNROLL) > 0) return;
            strip_ahead += gridDim.x;
            steps_left = steps;
            source = Source(weight, strip_ahead, first_tile + 2 * warp, lane);
            left = strip_ahead < strips ? count - 2 * warp : 0;
        };
#pragma unroll 1
        for (int slot = 0; slot < DEPTH; slot += UNROLL) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) copy_ahead(slot + i);
            turn_ahead();
        }
        Layout::Rows rows = Layout::rows(weight, blockIdx.x, lane);
        if (OVERLAP) wait_for_previous();
#if NORM
        staging.stage(staged_x, row_bytes);
#else
        if (OVERLAP) staging.begin(staged_x, row_bytes);
        staging.end(staged_x, row_bytes);
        if (!OVERLAP) wait_for_copies<DEPTH>();
#endif
        __syncthreads();

        Products products(staged_x, row_bytes, tokens, count, lane);
        int slot = 0;
        for (int turn = 0; turn < turns; ++turn) {
            const int after = blockIdx.x + (turn + 1) * gridDim.x;
            const Layout::Rows rows_after = Layout::rows(weight, min(after, strips - 1), lane);
            products.clear();
            int tile = 2 * warp;
#pragma unroll 1
            for (int step = 0; step < steps; step += UNROLL) {
#pragma unroll
                for (int i = 0; i < UNROLL; ++i, tile += 2 * WARPS) {
                    wait_for_copies<DEPTH - 1>();
                    __syncwarp();
                    const u8* my_stage = stages + (warp * DEPTH + slot + i) * STAGE_BYTES;
                    const Products::Tile first = Products::read_tile<0>(my_stage, lane);
                    const Products::Tile second = Products::read_tile<1>(my_stage, lane);
                    __syncwarp();
                    copy_ahead(slot + i);
                    products.multiply(first, second, rows, tile, count);
                }
                turn_ahead();
                slot = slot + UNROLL == DEPTH ? 0 : slot + UNROLL;
            }

            const int buffer = turn % BUFFERS;
            if (turn >= BUFFERS) wait_at(EMPTY + buffer);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
                sums_of_warps[((buffer * WARPS + warp) * COLUMNS + column) * LANES + lane] = products.sum(column, lane);
            arrive_at(FULL + buffer);
            rows = rows_after;
        }
    }
}
