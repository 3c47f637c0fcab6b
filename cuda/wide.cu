// y = x Wᵀ for many tokens on Hopper: the copy engine brings tokens, warps of their own weights.
//
// A block owns tiles of ROWS = 64 * BLOCKS * GROUPS rows by TOKENS tokens. Four warps ask for copies, STAGES stages of STEP
// times 64 columns ahead: the copy engine's boxes of x, swizzled as wgmma reads them, and packed weights. GROUPS
// warpgroups turn weights into A operands (columns.cuh) and multiply; operands of sixteen columns are made while the last
// three are multiplied. Those groups own nearly all registers, so that a block may have 256 tokens and each operand that is
// made serves as many as that: weights are unpacked for less than the time of multiplying.
//
// Tiles go round the blocks one each. What does not come out even (one to two tiles a block, or fewer if there are fewer)
// is cut evenly into units of STEP times 64 columns, and goes first: the block that begins such a tile finishes it, adding
// the sums of those that went on with it in order, so results repeat; they have stored them as their first deed. Blocks
// take those shares from the back: a block waits only for blocks that were started before it.
//
// sm_90a. -DGROUPS, -DBLOCKS (of 64 rows a warpgroup), -DTOKENS, -DSTEP (1 or 2), -DSTAGES.
#include "columns.cuh"

namespace tenpak {

#ifndef PARTS
#define PARTS 1
#endif
#ifndef SPLITS
#define SPLITS 1
#endif
#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif
#ifndef LEAD
#define LEAD 0
#endif
#ifndef BATCH
#define BATCH 1
#endif
static_assert(GROUPS % PARTS == 0 && STEP % PARTS == 0, "groups of a part own the rows, parts the columns of a step");
constexpr int CONSUMER_WARPS = 4 * GROUPS, PRODUCER_WARPS = 4;
constexpr int ROW_GROUPS = GROUPS / PARTS;
constexpr int GROUP_STRIPS = 4 * BLOCKS, STRIPS = ROW_GROUPS * GROUP_STRIPS, ROWS = STRIPS * TILE_ROWS;

// A stage: STEP boxes of x, then each strip's codes, parameters and super-scales.
constexpr int X_BYTES = TOKENS * TILE_COLS * 2;
constexpr int PARAMS_AT = STEP * Layout::CODE_BYTES, SUPERS_AT = PARAMS_AT + Columns::PARAM_BYTES(STEP);
constexpr int STRIP_BYTES = SUPERS_AT + Columns::SUPER_BYTES;
constexpr int WEIGHTS_AT = STEP * X_BYTES;
constexpr int BYTES_OF_STAGE = (WEIGHTS_AT + STRIPS * STRIP_BYTES + 1023) / 1024 * 1024;
static_assert(X_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
constexpr int PRODUCER_STRIPS = STRIPS / PRODUCER_WARPS;
static_assert(STRIP_BYTES % 16 == 0 && STRIPS % PRODUCER_WARPS == 0, "copies are of sixteen bytes, warps have as many strips");

// On the way to y a group's sums of 64 rows by CHUNK tokens lie in shared memory, longer by one chunk of sixteen bytes: eight
// tokens then meet all banks.
constexpr int CHUNK = TOKENS < 32 ? TOKENS : 32;
constexpr int LINE_BYTES = 64 * 2 + 16, CHUNK_BYTES = CHUNK * LINE_BYTES;
// While one is read the next is written.
constexpr int CHUNKS = TOKENS > CHUNK ? 2 : 1;

// The registers of a thread that multiplies, and of one that does not; all together no more than there were at launch.
constexpr int MANY = GROUPS == 4 ? 112 : GROUPS == 3 ? 152 : 232;
constexpr int FEW = GROUPS == 4 ? 32 : GROUPS == 3 ? 56 : 40;

// ---- Work -------------------------------------------------------------------------------------------------------------

// Steps of one tile that follow each other.
struct Segment {
    u32 tile;
    int first, count;
};

// A block's segments, in order.
struct Schedule {
    int steps;         // of a tile
    u32 tiles;
    u32 shared_tiles;  // the first so many are cut into units
    u32 share;
    u32 unit, end;     // what is left of this block's share of those
    u32 whole;         // the next tile that is this block's alone

    __device__ __forceinline__ Schedule(u32 tiles, int steps) : steps(steps), tiles(tiles) {
        if constexpr (SPLITS > 1) {
            share = blockIdx.x;
            return;
        }
        const u32 rest = tiles % gridDim.x;
        shared_tiles = rest == 0 ? 0 : tiles < gridDim.x ? rest : rest + gridDim.x;
        share = gridDim.x - 1 - blockIdx.x;
        unit = begin(share);
        end = begin(share + 1);
        whole = shared_tiles + blockIdx.x;
    }
    // share * units / gridDim.x, in 32 bits.
    __device__ __forceinline__ u32 begin(u32 share) const {
        const u32 units = shared_tiles * steps, each = units / gridDim.x;
        return share * each + share * (units - each * gridDim.x) / gridDim.x;
    }
    // The last share that has a part of a tile, from this block's on.
    __device__ __forceinline__ u32 last_share(u32 tile) const {
        u32 last = share;
        while (begin(last + 1) < (tile + 1) * steps) ++last;
        return last;
    }
    __device__ __forceinline__ bool next(Segment& segment) {
        if constexpr (SPLITS > 1) {
            if (share >= tiles * SPLITS) return false;
            const int part = share % SPLITS;
            segment.tile = share / SPLITS;
            segment.first = steps * part / SPLITS;
            segment.count = steps * (part + 1) / SPLITS - segment.first;
            share += tiles * SPLITS;
            return true;
        }
        if (unit < end) {
            segment.tile = unit / steps;
            segment.first = (int)(unit - segment.tile * steps);
            segment.count = min(steps - segment.first, (int)(end - unit));
            unit += segment.count;
            return true;
        }
        if (whole >= tiles) return false;
        segment.tile = whole;
        segment.first = 0;
        segment.count = steps;
        whole += gridDim.x;
        return true;
    }
};

// Where a tile is: tiles of the same rows follow each other, so that their weights are still in L2.
struct Place {
    int matrix, strip, token;

    __device__ __forceinline__ Place(u32 tile, int row_tiles, int token_tiles) {
        const u32 row_and_matrix = tile / token_tiles;
        token = (tile - row_and_matrix * token_tiles) * TOKENS;
        matrix = row_and_matrix / row_tiles;
        strip = (row_and_matrix - matrix * row_tiles) * STRIPS;
    }
};

// The stage in turn, and the parity of its barriers.
struct Turn {
    int stage = 0;
    u32 phase;

    __device__ __forceinline__ explicit Turn(u32 phase) : phase(phase) {}
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// ---- Producer -----------------------------------------------------------------------------------------------------------

// One step's copies: boxes of x by one thread, and each producer warp's strips by its lanes, sixteen bytes each; strips
// beyond the weight's are copies of its last. The copy engine is not asked for weights: with
// its bulk copies of each strip's runs most shapes were slower.
__device__ __forceinline__ void copy_step(const TensorMap& x, const Weight& w, const Place& at, int strips, int step, u32 stage,
                                          u32 barrier, int producer, int lane) {
    const int k = STEP * step, count = STEP == 1 ? 1 : min(STEP, w.tiles - k);
    if (producer == 0 && lane == 0) {
        barrier_expect(barrier, count * X_BYTES);
#pragma unroll
        for (int j = 0; j < STEP; ++j)
            if (j < count) copy_box(stage + j * X_BYTES, x, (k + j) * TILE_COLS, at.token, at.matrix, barrier, KEEP_LONG);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PRODUCER_STRIPS; ++i) {
        const int strip_of_stage = producer + i * PRODUCER_WARPS, strip = min(at.strip + strip_of_stage, strips - 1);
        const u32 to = stage + WEIGHTS_AT + strip_of_stage * STRIP_BYTES;
        copy_run<STEP * Layout::CODE_BYTES>(to, w.codes + (size_t)(u32)(strip * w.tiles + k) * Layout::CODE_BYTES,
                                            count * Layout::CODE_BYTES, lane, place_of(lane));
        copy_run<Columns::PARAM_BYTES(STEP)>(to + PARAMS_AT, Columns::params(w, strip, k), Columns::PARAM_BYTES(count), lane, lane);
        copy_run<Columns::SUPER_BYTES>(to + SUPERS_AT, Columns::supers(w, strip, k), Columns::SUPER_BYTES, lane, lane);
    }
    copies_arrive(barrier);
}

// ---- Consumers ------------------------------------------------------------------------------------------------------------

// Sixteen columns of a tile, which are then under way with at most two before them.
template <int QUARTER>
__device__ __forceinline__ void multiply(float (&sums)[SUMS], const Columns::Tile& tile, const Layout::Rows& rows, u32 x, int lane) {
    u32 a[BATCH][4];
    Columns::template operand<QUARTER * BATCH>(tile, rows, lane, a[0]);
    if constexpr (BATCH > 1) Columns::template operand<QUARTER * BATCH + 1>(tile, rows, lane, a[1]);
    if constexpr (BATCH > 2) {
        Columns::template operand<2>(tile, rows, lane, a[2]);
        Columns::template operand<3>(tile, rows, lane, a[3]);
    }
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BATCH; ++i) wgmma(sums, a[i], x + 2 * (QUARTER * BATCH + i));
    wgmma_commit();
    wgmma_wait<BATCH == 1 ? 3 : 1>();
}

// A group's sums of 64 rows to y [tokens, n], by its 128 threads; `staged` is the group's own.
__device__ __forceinline__ void store(const float (&sums)[SUMS], u8* staged, u16* y, const u16* bias, int strip, int tokens, int n,
                                      float low, float high, int group) {
    const int thread = threadIdx.x % 128, warp = thread / LANES, lane = thread % LANES;
    const int first_row = strip * TILE_ROWS, row = first_row + warp * TILE_ROWS + lane / 4;
    const float low_bias = bias && row < n ? widen(bias[row]) : 0.0f;
    const float high_bias = bias && row + 8 < n ? widen(bias[row + 8]) : 0.0f;
    const bool vectors = n % 8 == 0 && (u64)y % 16 == 0;
    // Matrices of a store: rows g of eight tokens, rows g + 8, then both of the next eight.
    const u32 to = shared_address(staged) + (lane / 16 * 8 + lane % 8) * LINE_BYTES + warp * 32 + lane / 8 % 2 * 16;
    // What was stored last has been read.
    group_barrier(group);
#pragma unroll
    for (int first = 0; first < TOKENS; first += CHUNK) {
        if (first >= tokens) break;
        const int chunk = first / CHUNK % CHUNKS * CHUNK_BYTES;
#pragma unroll
        for (int token = 0; token < CHUNK; token += 16) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* two = sums + (first + token + i / 2 * 8) / 2 + i % 2 * 2;
                const float scale = i % 2 ? high : low, plus = i % 2 ? high_bias : low_bias;
                pairs[i] = narrow(two[0] * scale + plus) | (u32)narrow(two[1] * scale + plus) << 16;
            }
            store_transposed(to + chunk + token * LINE_BYTES, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        group_barrier(group);
        const int here = min(CHUNK, tokens - first), r = first_row + thread % 8 * 8;
        if (r >= n) continue;
#pragma unroll
        for (int token = thread / 8; token < CHUNK; token += 16) {
            if (token >= here) break;
            const u8* from = staged + chunk + token * LINE_BYTES + thread % 8 * 16;
            u16* line = y + (size_t)(first + token) * n + r;
            if (vectors) {
                *reinterpret_cast<uint4*>(line) = read<uint4>(from);
            } else {
                // Rows that are not aligned: rare, so short rather than fast.
#pragma unroll 1
                for (int i = 0; i < min(8, n - r); ++i) line[i] = read<u16>(from + 2 * i);
            }
        }
    }
}

// Parts of the same tile's sums, of this block's groups and its cluster's blocks: each leaves its own in shared memory, and
// each block adds those of some tokens. `sums` are scaled.
constexpr int EXCHANGE_ROW = ROWS + 4;  // floats of a token: eight rows of four tokens then meet all banks
constexpr int EXCHANGED = TOKENS * EXCHANGE_ROW * 4;  // bytes of a part
__device__ __forceinline__ void leave_sums(const float (&sums)[SUMS], u8* exchange, int first_row, float low, float high) {
    const int warp = threadIdx.x % 128 / LANES, lane = threadIdx.x % LANES;
    float* to = reinterpret_cast<float*>(exchange) + lane % 4 * 2 * EXCHANGE_ROW + first_row + warp * TILE_ROWS + lane / 4;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) to[(i / 4 * 8 + i % 2) * EXCHANGE_ROW + i / 2 % 2 * 8] = sums[i] * (i / 2 % 2 ? high : low);
}
__device__ __forceinline__ void store_exchanged(u32 exchange, int rank, u16* y, const u16* bias, int first_row, int tokens, int n) {
    constexpr int EACH = (TOKENS + SPLITS - 1) / SPLITS, FOURS = ROWS / 4;
    const bool vectors = n % 4 == 0 && (u64)y % 8 == 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < EACH * FOURS; i += 128 * GROUPS) {
        const int token = rank * EACH + i / FOURS, row = i % FOURS * 4, r = first_row + row;
        if (token >= min(tokens, TOKENS) || r >= n) continue;
        const u32 from = exchange + (token * EXCHANGE_ROW + row) * 4;
        float4 parts[SPLITS * PARTS];
#pragma unroll
        for (int j = 0; j < SPLITS * PARTS; ++j) parts[j] = cluster_float4(from + j % PARTS * EXCHANGED, j / PARTS);
        float4 v = parts[0];
#pragma unroll
        for (int j = 1; j < SPLITS * PARTS; ++j) {
            v.x += parts[j].x;
            v.y += parts[j].y;
            v.z += parts[j].z;
            v.w += parts[j].w;
        }
        const float all[4] = {v.x, v.y, v.z, v.w};
        u16 narrowed[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) narrowed[j] = narrow(all[j] + (bias && r + j < n ? widen(bias[r + j]) : 0.0f));
        u16* to = y + (size_t)token * n + r;
        if (vectors) {
            *reinterpret_cast<uint2*>(to) = make_uint2(narrowed[0] | (u32)narrowed[1] << 16, narrowed[2] | (u32)narrowed[3] << 16);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (r + j < n) to[j] = narrowed[j];
        }
    }
}

}  // namespace tenpak

// x: a map of [batch, m, k] with boxes of 64 columns and TOKENS rows, swizzled by 128 bytes; y [batch, m, n]; bias [batch, n] or
// null. partial: [gridDim.x][GROUPS][BLOCKS][SUMS / 4][128] float4; arrived: a counter for each tile and group, zero before
// and after. At most one block a multiprocessor, and no more than there are units.
extern "C" __global__ void CLUSTER __launch_bounds__(128 * GROUPS + 128, 1)
wide(const __grid_constant__ tenpak::TensorMap x, const unsigned char* codes, const unsigned char* params,
     const unsigned char* row_params, unsigned short* y, const unsigned short* bias, float4* partial, unsigned int* arrived,
     long long codes_step, long long params_step, long long row_params_step, int batch, int m, int n, int tiles, int supers,
     float scale) {
    using namespace tenpak;
    extern __shared__ __align__(1024) u8 dynamic[];
    __shared__ u64 barriers[2 * STAGES];
    u8* const stages = dynamic + (0u - shared_address(dynamic)) % 1024;
    const u32 stages_address = keep_address(shared_address(stages));
    const u32 full = keep_address(shared_address(barriers)), empty = full + 8 * STAGES;

    const int row_tiles = (n + ROWS - 1) / ROWS, token_tiles = (m + TOKENS - 1) / TOKENS;
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    // Each role makes its own: what both keep must fit in the registers of the smaller one.
    auto own_schedule = [&] { return Schedule((u32)batch * row_tiles * token_tiles, (tiles + STEP - 1) / STEP); };
    auto weight = [&](int matrix) {
        return Weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step, tiles, supers};
    };

    if (threadIdx.x == 0) {
        prefetch_map(x);
        for (int i = 0; i < STAGES; ++i) {
            // Each thread's copies of weights, and the one that asks for x.
            barrier_init(full + 8 * i, PRODUCER_WARPS * LANES + 1);
            barrier_init(empty + 8 * i, CONSUMER_WARPS);
        }
        barriers_ready();
    }
#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x, Lut16::BIASED_XOR);
#endif
    __syncthreads();

    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = lane_of_warp();
    if (warp >= CONSUMER_WARPS) {
        leave_registers<FEW>();
        Schedule schedule = own_schedule();
        Segment segment;
        Turn turn(1);  // all stages are empty
        while (schedule.next(segment)) {
            const Place at(segment.tile, row_tiles, token_tiles);
            const Weight w = weight(at.matrix);
#pragma unroll 1
            for (int step = segment.first; step < segment.first + segment.count; ++step) {
                barrier_wait(empty + 8 * turn.stage, turn.phase);
                copy_step(x, w, at, strips, step, stages_address + turn.stage * BYTES_OF_STAGE, full + 8 * turn.stage,
                          warp - CONSUMER_WARPS, lane);
                turn.next();
            }
        }
    } else {
        take_registers<MANY>();
        Schedule schedule = own_schedule();
        Segment segment;
        const int group = warp / 4, thread = threadIdx.x % 128;
        u8* const staged = stages + STAGES * BYTES_OF_STAGE + group * CHUNKS * CHUNK_BYTES;
        // This warp's first strip in a stage; others follow four on.
        const int row_group = group % ROW_GROUPS, part_of_step = group / ROW_GROUPS;
        const u32 own = WEIGHTS_AT + (row_group * GROUP_STRIPS + warp % 4) * STRIP_BYTES;
#if LEAD
        bool first_segment = true;
#endif
        Turn turn(0);
        while (schedule.next(segment)) {
            const Place at(segment.tile, row_tiles, token_tiles);
            const Weight w = weight(at.matrix);
            const int first_strip = at.strip + row_group * GROUP_STRIPS;
            Layout::Rows rows[BLOCKS];
            float sums[BLOCKS][SUMS];
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
                rows[block] = Layout::rows(w, min(first_strip + warp % 4 + 4 * block, strips - 1), lane);
#pragma unroll
                for (int i = 0; i < SUMS; ++i) sums[block][i] = 0.0f;
            }

            u32 to_release = 0;  // the barrier of the stage whose products may still be under way
#if LEAD
            if (first_segment && group) lead_wait();
#endif
#pragma unroll 1
            for (int step = segment.first; step < segment.first + segment.count; ++step) {
#if LEAD
                if (first_segment && group == 0 && step == min(segment.first + LEAD, segment.first + segment.count - 1))
                    lead_arrive();
#endif
                barrier_wait(full + 8 * turn.stage, turn.phase);
                const u32 stage = stages_address + turn.stage * BYTES_OF_STAGE;
#pragma unroll
                for (int j = 0; j < STEP; ++j) {
                    if (PARTS > 1 && j % PARTS != part_of_step) continue;
                    if (j > 0 && STEP * step + j >= tiles) break;
                    const u32 box = descriptor(stage + j * X_BYTES);
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block) {
                        const u32 here = stage + own + 4 * block * STRIP_BYTES;
                        const Columns::Tile tile =
                            j ? Columns::template load<1>(here, here + PARAMS_AT, here + SUPERS_AT, lane)
                              : Columns::template load<0>(here, here + PARAMS_AT, here + SUPERS_AT, lane);
#if BATCH == 1
                        multiply<0>(sums[block], tile, rows[block], box, lane);
                        multiply<1>(sums[block], tile, rows[block], box, lane);
                        multiply<2>(sums[block], tile, rows[block], box, lane);
                        // Only this step's three are under way.
                        if (j < PARTS && block == 0 && to_release && lane == 0) barrier_arrive(to_release);
                        multiply<3>(sums[block], tile, rows[block], box, lane);
#elif BATCH == 2
                        multiply<0>(sums[block], tile, rows[block], box, lane);
                        if (j < PARTS && block == 0 && to_release && lane == 0) barrier_arrive(to_release);
                        multiply<1>(sums[block], tile, rows[block], box, lane);
#else
                        multiply<0>(sums[block], tile, rows[block], box, lane);
                        if (j < PARTS && block == 0 && to_release && lane == 0) barrier_arrive(to_release);
#endif
                    }
                }
                if (PARTS > 1 && STEP * step + part_of_step >= tiles) {
                    // This part's columns are beyond the last.
                    wgmma_wait<0>();
                    if (to_release && lane == 0) barrier_arrive(to_release);
                }
                to_release = empty + 8 * turn.stage;
                turn.next();
            }
#if LEAD
            first_segment = false;
#endif
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(to_release);
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) pin(sums[block]);

            u16* const to = y + ((size_t)at.matrix * m + at.token) * n;
            const u16* const plus = bias ? bias + (size_t)at.matrix * n : nullptr;
            if constexpr (SPLITS > 1) {
                static_assert(SPLITS == 1 || PARTS * EXCHANGED <= STAGES * BYTES_OF_STAGE, "sums are left where stages were");
                // Everybody's products have read their stages.
                consumers_barrier(128 * GROUPS);
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block)
                    leave_sums(sums[block], stages + part_of_step * EXCHANGED, (row_group * BLOCKS + block) * 64,
                               scale * Layout::row_scale(rows[block], false), scale * Layout::row_scale(rows[block], true));
                cluster_barrier();
                store_exchanged(stages_address, cluster_rank(), to, plus, at.strip * TILE_ROWS, m - at.token, n);
                cluster_read();
                continue;
            }

            // Parts of K of the same rows, that of the first group's.
            if constexpr (PARTS > 1) {
                float4* const others = reinterpret_cast<float4*>(stages + STAGES * BYTES_OF_STAGE + GROUPS * CHUNKS * CHUNK_BYTES) +
                                       row_group * (BLOCKS * SUMS / 4 * 128) + thread;
                static_assert(PARTS <= 2, "one group's sums wait at a time");
                if (part_of_step == 1) {
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                        for (int i = 0; i < SUMS; i += 4)
                            others[(block * SUMS + i) / 4 * 128] =
                                make_float4(sums[block][i], sums[block][i + 1], sums[block][i + 2], sums[block][i + 3]);
                }
                pair_barrier(row_group);
                if (part_of_step == 0) {
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                        for (int i = 0; i < SUMS; i += 4) {
                            const float4 v = others[(block * SUMS + i) / 4 * 128];
                            sums[block][i] += v.x;
                            sums[block][i + 1] += v.y;
                            sums[block][i + 2] += v.z;
                            sums[block][i + 3] += v.w;
                        }
                }
                pair_barrier(row_group);
                if (part_of_step == 1) continue;
            }

            constexpr int PART = BLOCKS * SUMS / 4 * 128;  // float4 of one group
            unsigned int* const counter = arrived + (size_t)segment.tile * ROW_GROUPS + group;
            auto part = [&](u32 share) { return partial + ((size_t)share * ROW_GROUPS + group) * PART + thread; };
            if (segment.first > 0) {
                float4* to = part(schedule.share);
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                    for (int i = 0; i < SUMS; i += 4)
                        __stcg(to + (block * SUMS + i) / 4 * 128,
                               make_float4(sums[block][i], sums[block][i + 1], sums[block][i + 2], sums[block][i + 3]));
                group_barrier(group);
                if (thread == 0) add_release(counter, 1);
                continue;
            }
            if (segment.count < schedule.steps) {
                const u32 last = schedule.last_share(segment.tile);
                if (thread == 0) {
                    while (load_acquire(counter) < last - schedule.share) {}
                    *counter = 0;
                }
                group_barrier(group);
                for (u32 other = schedule.share + 1; other <= last; ++other) {
                    const float4* from = part(other);
#pragma unroll
                    for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
                        for (int i = 0; i < SUMS; i += 4) {
                            const float4 v = __ldcg(from + (block * SUMS + i) / 4 * 128);
                            sums[block][i] += v.x;
                            sums[block][i + 1] += v.y;
                            sums[block][i + 2] += v.z;
                            sums[block][i + 3] += v.w;
                        }
                }
            }
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block)
                store(sums[block], staged, to, plus, first_strip + 4 * block, m - at.token, n,
                      scale * Layout::row_scale(rows[block], false), scale * Layout::row_scale(rows[block], true), group);
        }
    }
}
