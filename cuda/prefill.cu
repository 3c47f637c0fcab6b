// y = x Wᵀ for many tokens on Hopper: weights go through registers into wgmma, which reads the tokens from shared memory.
//
// A block owns tiles of ROWS = 64 * BLOCKS * GROUPS rows by TOKENS tokens. GROUPS consumer warpgroups copy packed
// weights, each warp its own strips, DEPTH pairs of tiles ahead, turn them into A operands and multiply; the next
// operand is made while the last one is multiplied. One producer warpgroup brings x, STAGES units of 128 columns ahead,
// through registers: that is how x gets both the order of columns that layouts.cuh describes and the 128-byte swizzle
// that wgmma reads, without a pass of its own.
//
// Work is cut evenly (stream-K): every block takes the same number of units, a unit being 128 columns of a tile, so that no
// multiprocessor idles in a last wave. The block that begins a tile finishes it: it waits for the sums of those that
// went on with it and adds them in order, so results repeat. Blocks take their shares from the back: a block waits only
// for blocks that were started before it.
//
// sm_90a. -DGROUPS, -DBLOCKS (of 64 rows a warpgroup), -DTOKENS, -DDEPTH, -DSTAGES.
#include "hopper.cuh"

namespace tenpak {

constexpr int CONSUMER_WARPS = 4 * GROUPS;
constexpr int CONSUMERS = 128 * GROUPS;
constexpr int PRODUCERS = 128;
constexpr int ROWS = 64 * BLOCKS * GROUPS;
constexpr int X_BYTES = TOKENS * TILE_COLS * 2;  // of one tile; a stage holds two
constexpr int RING_BYTES = BLOCKS * STAGE_BYTES;  // one step of a warp: two tiles of each of its strips
static_assert(TOKENS % 8 == 0 && X_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");

// ---- Work -------------------------------------------------------------------------------------------------------------

// A block's place in the units of all tiles, tile after tile.
struct Work {
    int row_tiles, token_tiles, steps;  // steps: units of a tile
    u64 units;

    __device__ __forceinline__ u64 begin(u32 share) const { return share * units / gridDim.x; }
    // Whose share unit u is in.
    __device__ __forceinline__ u32 owner(u64 u) const { return (u32)(((u + 1) * gridDim.x - 1) / units); }
};

// The tile and step of a unit, and how to go on.
struct Cursor {
    int step, strip, token, matrix;
    u32 tile;

    __device__ __forceinline__ void place(const Work& w) {
        const u32 row_and_matrix = tile / w.token_tiles;
        token = (tile - row_and_matrix * w.token_tiles) * TOKENS;
        matrix = row_and_matrix / w.row_tiles;
        strip = (row_and_matrix - matrix * w.row_tiles) * (ROWS / TILE_ROWS);
    }
    __device__ __forceinline__ Cursor(const Work& w, u64 unit) : step(unit % w.steps), tile((u32)(unit / w.steps)) { place(w); }
    __device__ __forceinline__ void next(const Work& w) {
        if (++step == w.steps) {
            step = 0;
            ++tile;
            place(w);
        }
    }
};

// ---- Producer -----------------------------------------------------------------------------------------------------------

// A thread brings columns 8c..8c+7 of every sixteenth token, c being its place among eight.
constexpr int PASSES = TOKENS / 16;

struct XTile {
    const u16* from;  // this thread's columns of its first token
    int tokens;       // from there on, if its columns exist
    int columns;
};

__device__ __forceinline__ uint4 load_x(const XTile& tile, int pass, long long stride, bool vectors) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (16 * pass < tile.tokens) {
        const u16* from = tile.from + 16 * pass * stride;
        if (vectors) {
            v = __ldg(reinterpret_cast<const uint4*>(from));
        } else {
            // Rows that are not aligned: rare, so short rather than fast.
#pragma unroll 1
            for (int i = 0; i < 8; ++i) {
                const u32 next = i < tile.columns ? from[i] : 0;
                v.x = v.x >> 16 | v.y << 16;
                v.y = v.y >> 16 | v.z << 16;
                v.z = v.z >> 16 | v.w << 16;
                v.w = v.w >> 16 | next << 16;
            }
        }
    }
    return v;
}

// Pair i of lane t = c % 4 and half c / 4 is element 2t of the chunk of sixteen bytes 4 * half + i; no two lanes meet in a bank.
__device__ __forceinline__ void store_x(u8* tile, int pass, const uint4& v, int thread) {
    const int row = thread / 8, half = thread % 8 / 4, t = thread % 4;
    u8* to = tile + pass * 2048 + row * 128 + t * 4;
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<u32*>(to + (((half * 4 + i) ^ (row & 7)) * 16)) = pairs[i];
}

// ---- Consumers ------------------------------------------------------------------------------------------------------------

// The sums of 16 rows a warp to y [tokens, n].
__device__ __forceinline__ void store(const float (&sums)[SUMS], u16* y, const u16* bias, int strip, int tokens, int n, float scale,
                                      float low, float high, int lane) {
    const int g = lane / 4, t = lane % 4, row = strip * TILE_ROWS;
    const float low_bias = bias && row + g < n ? widen(bias[row + g]) : 0.0f;
    const float high_bias = bias && row + g + 8 < n ? widen(bias[row + g + 8]) : 0.0f;
    const bool even = n % 2 == 0 && (u64)y % 4 == 0;
    low *= scale;
    high *= scale;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        if (8 * j >= tokens) break;
        const u32 upper = narrow(sums[4 * j] * low + low_bias) | (u32)narrow(sums[4 * j + 1] * low + low_bias) << 16;
        const u32 lower = narrow(sums[4 * j + 2] * high + high_bias) | (u32)narrow(sums[4 * j + 3] * high + high_bias) << 16;
        // Now a lane holds rows 2t and 2t + 1 of token g: neighbours in y.
        const u32 pairs[2] = {transpose8x8(upper), transpose8x8(lower)};
        const int token = 8 * j + g;
        if (token >= tokens) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = row + 8 * i + 2 * t;
            u16* to = y + (size_t)token * n + r;
            if (even) {
                if (r < n) *reinterpret_cast<u32*>(to) = pairs[i];
            } else {
                if (r < n) to[0] = (u16)pairs[i];
                if (r + 1 < n) to[1] = (u16)(pairs[i] >> 16);
            }
        }
    }
}

}  // namespace tenpak

// x [batch, m, k] with rows of x_stride elements; y [batch, m, n]; bias [batch, n] or null. partial: [gridDim.x][2][GROUPS]
// [BLOCKS][SUMS / 4][128] float4; arrived: a counter for each tile and group, zero before and after. At most one block
// a multiprocessor.
extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1)
prefill(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
        unsigned short* y, const unsigned short* bias, float4* partial, unsigned int* arrived, long long codes_step,
        long long params_step, long long row_params_step, long long x_stride, int batch, int m, int n, int k, int tiles,
        int supers, float scale) {
    using namespace tenpak;
    extern __shared__ __align__(1024) u8 dynamic[];
    __shared__ alignas(8) u64 barriers[2 * STAGES];
    u8* const staged_x = dynamic + (0u - shared_address(dynamic)) % 1024;
    const u32 x_address = shared_address(staged_x);
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;

    Work work;
    work.row_tiles = (n + ROWS - 1) / ROWS;
    work.token_tiles = (m + TOKENS - 1) / TOKENS;
    work.steps = (tiles + 1) / 2;
    work.units = (u64)batch * work.row_tiles * work.token_tiles * work.steps;
    const u32 share = gridDim.x - 1 - blockIdx.x;
    const u64 begin = work.begin(share), end = work.begin(share + 1);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, PRODUCERS);
            barrier_init(empty + 8 * i, CONSUMER_WARPS * ARRIVALS);
        }
        barriers_ready();
    }
#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x, Lut16::BIASED_XOR);
#endif
    __syncthreads();
    if (begin == end) return;

    if (threadIdx.x >= CONSUMERS) {
        leave_registers<GROUPS == 4 ? 64 : 104>();
        const int thread = threadIdx.x - CONSUMERS;
        const bool vectors = k % 8 == 0 && x_stride % 8 == 0 && (u64)x % 16 == 0;
        auto tile_of = [&](const Cursor& c, int j) {
            const int column = (2 * c.step + j) * TILE_COLS + thread % 8 * 8;
            return XTile{x + ((long long)c.matrix * m + c.token + thread / 8) * x_stride + column,
                         column < k ? m - c.token - thread / 8 : 0, k - column};
        };
        Cursor at(work, begin);
        uint4 held[2][PASSES];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const XTile tile = tile_of(at, j);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) held[j][pass] = load_x(tile, pass, x_stride, vectors);
        }
        int stage = 0;
        u32 phase = 1;  // all stages are empty
        for (u64 unit = begin; unit < end; ++unit) {
            at.next(work);
            barrier_wait(empty + 8 * stage, phase);
            // While a unit is stored the next is on its way. A second tile beyond K is all zeros.
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                u8* to = staged_x + (2 * stage + j) * X_BYTES;
                XTile tile = tile_of(at, j);
                if (unit + 1 == end) tile.tokens = 0;
#pragma unroll
                for (int pass = 0; pass < PASSES; ++pass) store_x(to, pass, held[j][pass], thread);
#pragma unroll
                for (int pass = 0; pass < PASSES; ++pass) held[j][pass] = load_x(tile, pass, x_stride, vectors);
            }
            // Written through the generic proxy, read by wgmma through the asynchronous one.
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            barrier_arrive(full + 8 * stage);
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
    } else {
        take_registers<GROUPS == 4 ? 104 : 200>();
        const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = threadIdx.x % LANES, group = warp / 4;
        const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
        // Strips of this warp: first_strip + 4 * block within a tile.
        const int first_strip = group * (4 * BLOCKS) + warp % 4;
        const u8* const ring = staged_x + 2 * STAGES * X_BYTES + warp * (DEPTH * RING_BYTES);
        const u32 ring_address = shared_address(ring);

        Cursor ahead(work, begin);
        u64 unit_ahead = begin;
        int slot_ahead = 0;
        auto copy_ahead = [&] {
            if (unit_ahead < end) {
                const Weight w{codes + ahead.matrix * codes_step, params + ahead.matrix * params_step,
                               row_params + ahead.matrix * row_params_step, tiles, supers};
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
                    const int strip = ahead.strip + first_strip + 4 * block;
                    if (strip < strips)
                        copy_stage(w, strip, 2 * ahead.step, min(2, tiles - 2 * ahead.step),
                                   ring_address + slot_ahead * RING_BYTES + block * STAGE_BYTES, lane);
                }
                ahead.next(work);
                ++unit_ahead;
            }
            commit_copies();
            slot_ahead = slot_ahead + 1 == DEPTH ? 0 : slot_ahead + 1;
        };
#pragma unroll 1
        for (int i = 0; i < DEPTH - 1; ++i) copy_ahead();

        int stage = 0, slot = 0;
        u32 phase = 0;
        int to_release = -1;  // the stage whose products may still be under way
        Cursor at(work, begin);
        for (u64 unit = begin; unit < end;) {
            const int first_step = at.step, tile_steps = (int)min((u64)(work.steps - first_step), end - unit);
            const Weight w{codes + at.matrix * codes_step, params + at.matrix * params_step,
                           row_params + at.matrix * row_params_step, tiles, supers};
            Layout::Rows rows[BLOCKS];
            float sums[BLOCKS][SUMS];
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                rows[block] = Layout::rows(w, min(at.strip + first_strip + 4 * block, strips - 1), lane);
#pragma unroll
                for (int i = 0; i < SUMS; ++i) sums[block][i] = 0.0f;
            }

#pragma unroll 1
            for (int step = first_step; step < first_step + tile_steps; ++step) {
                wait_for_copies<DEPTH - 2>();
                __syncwarp();
                const u8* here = ring + slot * RING_BYTES;
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
                // Into the slot that the last step emptied.
                copy_ahead();
                barrier_wait(full + 8 * stage, phase);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    if (2 * step + j >= tiles) break;
                    const u32 b = descriptor(x_address + (2 * stage + j) * X_BYTES);
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block) {
                        const Layout::Tile tile = j ? read_stage<1>(here + block * STAGE_BYTES, lane) : read_stage<0>(here + block * STAGE_BYTES, lane);
                        float (&d)[SUMS] = sums[block];
                        u32 a[2][2][4];
                        fragments<0>(tile, rows[block], a[0]);
                        fragments<1>(tile, rows[block], a[1]);
                        pin(d);
                        wgmma_fence();
                        wgmma(d, a[0][0], b);
                        wgmma(d, a[0][1], b + 2);
                        wgmma(d, a[1][0], b + 4);
                        wgmma(d, a[1][1], b + 6);
                        wgmma_commit();
                        if constexpr (BLOCKS == 1) {
                            // The other warpgroups' products fill the time in which this one makes its next tile.
                            wgmma_wait<0>();
                        } else {
                            // The tile before is done, and with it, at a step's first tile, the step before. The next tile is
                            // made while this one is multiplied.
                            wgmma_wait<1>();
                            if (j == 0 && block == 0 && to_release >= 0) lane_arrives(empty + 8 * to_release, lane);
                        }
                    }
                }
                if (BLOCKS == 1) lane_arrives(empty + 8 * stage, lane);
                to_release = stage;
                if (++stage == STAGES) {
                    stage = 0;
                    phase ^= 1;
                }
                __syncwarp();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) pin(sums[block]);

            const u64 tile_begin = unit - first_step, tile_end = tile_begin + work.steps;
            const bool begins = first_step == 0, ends = unit + tile_steps == tile_end;
            constexpr int PART = BLOCKS * SUMS / 4 * 128;  // float4 of one group
            const int thread = threadIdx.x % 128;
            unsigned int* const counter = arrived + (size_t)at.tile * GROUPS + group;
            if (!begins) {
                float4* to = partial + ((size_t)share * GROUPS + group) * PART + thread;
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                    for (int i = 0; i < SUMS / 4; ++i)
                        __stcg(to + (block * (SUMS / 4) + i) * 128, make_float4(sums[block][4 * i], sums[block][4 * i + 1],
                                                                                sums[block][4 * i + 2], sums[block][4 * i + 3]));
                __threadfence();
                group_barrier(group);
                if (thread == 0) atomicAdd(counter, 1);
            } else {
                if (!ends) {
                    const u32 last = work.owner(tile_end - 1);
                    if (thread == 0) {
                        while (load_acquire(counter) < last - share) {}
                        *counter = 0;
                    }
                    group_barrier(group);
                    __threadfence();
                    for (u32 other = share + 1; other <= last; ++other) {
                        const float4* from = partial + ((size_t)other * GROUPS + group) * PART + thread;
#pragma unroll
                        for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                            for (int i = 0; i < SUMS / 4; ++i) {
                                const float4 v = __ldcg(from + (block * (SUMS / 4) + i) * 128);
                                sums[block][4 * i] += v.x;
                                sums[block][4 * i + 1] += v.y;
                                sums[block][4 * i + 2] += v.z;
                                sums[block][4 * i + 3] += v.w;
                            }
                    }
                }
                u16* to = y + ((size_t)at.matrix * m + at.token) * n;
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block)
                    store(sums[block], to, bias ? bias + (size_t)at.matrix * n : nullptr, at.strip + first_strip + 4 * block,
                          m - at.token, n, scale, Layout::row_scale(rows[block], false), Layout::row_scale(rows[block], true), lane);
            }
            unit += tile_steps;
            at.step = work.steps - 1;
            at.next(work);
        }
        wait_for_copies<0>();
    }
}
