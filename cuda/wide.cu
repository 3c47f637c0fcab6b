// y = x Wᵀ for many tokens on Hopper: the copy engine brings tokens, warps of their own weights.
//
// A block owns tiles of ROWS = 64 * GROUPS rows by TOKENS tokens. Four warps ask for copies, STAGES stages of STEP
// times 64 columns ahead: the copy engine's boxes of x, swizzled as wgmma reads them, and packed weights. GROUPS
// warpgroups turn weights into A operands (columns.cuh) and multiply; operands of 32 columns are made while the last
// 32 are multiplied. Those groups own nearly all registers, so that a block may have 256 tokens and each operand that is
// made serves as many as that: weights are unpacked for less than the time of multiplying.
//
// Tiles go round the blocks one each. Where they do not come out even, the last rows' tiles have fewer tokens (-DNARROW), so that
// there is one for each block of the last round; or tiles are cut along K, in units of STEP times 64 columns, in one of three ways,
// all of which repeat their results:
//
// - one to two tiles a block, or many fewer than blocks: cut evenly. The block that begins a tile finishes it, adding the sums
//   of those that went on with it in order, which they have stored as their first deed;
// - somewhat fewer tiles than blocks (`head` > 0): the blocks that are left over help. Each does the last columns of some tiles,
//   one after another, and a tile's own block, which does the first `head` units, adds one other's sums;
// - half as many, or fewer (-DCLUSTER): the blocks of a cluster share a tile's columns and add what they read of each other's
//   shared memory.
//
// A block waits only for blocks that were started before it, or with it.
//
// With -DGROUPED=1 the matrices are experts, whose tiles are whole or cut evenly.
//
// sm_90a. -DGROUPS, -DTOKENS, -DSTEP (1, 2 or 4), -DSTAGES, -DCLUSTER (1 to 4), -DNARROW (a multiple of 16, or 0).
#include "columns.cuh"
#include "experts.cuh"
#ifndef NARROW
#define NARROW 0
#endif
#ifndef GROUPED
#define GROUPED 0
#endif

namespace tenpak {

constexpr int CONSUMER_WARPS = 4 * GROUPS, PRODUCER_WARPS = 4;
constexpr int GROUP_STRIPS = 4, STRIPS = GROUPS * GROUP_STRIPS, ROWS = STRIPS * TILE_ROWS;

// A stage: STEP boxes of x, then each strip's codes, parameters and super-scales.
constexpr int X_BYTES = TOKENS * TILE_COLS * 2;
constexpr int PARAMS_AT = STEP * Layout::CODE_BYTES, SUPERS_AT = PARAMS_AT + Columns::PARAM_BYTES(STEP);
constexpr int STRIP_BYTES = SUPERS_AT + Columns::SUPER_BYTES;
constexpr int WEIGHTS_AT = STEP * X_BYTES;
constexpr int BYTES_OF_STAGE = (WEIGHTS_AT + STRIPS * STRIP_BYTES + 1023) / 1024 * 1024;
static_assert(X_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
static_assert(NARROW % 16 == 0 && NARROW < TOKENS && (!NARROW || CLUSTER == 1), "narrow tiles have no room, or parts");
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

// A block's segments, in order. To divide takes as long as a part of a small product's step, so it is done seldom.
struct Schedule {
    int steps;         // of a tile
    int head;          // those that a tile's own block does, or 0
    u32 tiles;
    u32 shared_tiles;  // the first so many are cut into units
    u32 share;
    u32 shares, each, more;  // units of a share, and how many of the shares have one more
    u32 unit, end;     // what is left of this block's share of those; where there are helpers, of this one's tiles
    u32 whole;         // the next tile that is this block's alone
    u32 fewer;         // blocks, where experts have fewer units than there are blocks

    __device__ __forceinline__ u32 blocks() const { return GROUPED ? fewer : gridDim.x; }
    __device__ __forceinline__ Schedule(u32 tiles, int steps, int head) : steps(steps), head(head), tiles(tiles) {
        share = blockIdx.x;
        unit = end = 0;
        fewer = min(gridDim.x, tiles * steps);
        if (GROUPED && blockIdx.x >= fewer) {
            whole = tiles;
        } else if (CLUSTER > 1 || NARROW) {
            whole = share / CLUSTER;
        } else if (head) {
            const u32 helpers = gridDim.x - tiles;
            whole = share - helpers;
            if (share < helpers) {
                divide(tiles, helpers);
                whole = tiles;
            }
        } else {
            const u32 rest = tiles < blocks() ? tiles : tiles % blocks();
            shared_tiles = rest == tiles || rest == 0 ? rest : rest + blocks();
            share = blocks() - 1 - blockIdx.x;
            whole = shared_tiles + blockIdx.x;
            if (shared_tiles) divide(shared_tiles * steps, blocks());
        }
    }
    // So evenly that where tiles are those of as many shares, no share has parts of two.
    __device__ __forceinline__ void divide(u32 units, u32 count) {
        shares = count;
        each = units / shares;
        more = units - each * shares;
        const u32 before = share * more / shares;
        unit = share * each + before;
        end = unit + each + (share * more - before * shares + more >= shares);
    }
    __device__ __forceinline__ u32 begin(u32 share) const { return share * each + share * more / shares; }
    // Where a block that did not begin a tile leaves its sums, and those who did so for a tile that this one begins: from one
    // place to another.
    __device__ __forceinline__ u32 left_at(u32 tile) const { return head ? tile : share; }
    __device__ __forceinline__ u32 first_left(u32 tile) const { return head ? tile : share + 1; }
    __device__ __forceinline__ u32 last_left(u32 tile) const {
        if (head) return tile;
        u32 last = share;
        while (begin(last + 1) < (tile + 1) * steps) ++last;
        return last;
    }
    __device__ __forceinline__ bool next(Segment& segment) {
        if (unit < end) {
            if (head) {
                segment = {unit++, head, steps - head};
                return true;
            }
            segment.tile = unit / steps;
            segment.first = (int)(unit - segment.tile * steps);
            segment.count = min(steps - segment.first, (int)(end - unit));
            unit += segment.count;
            return true;
        }
        if (whole >= tiles) return false;
        segment = {whole, 0, head ? head : steps};
        whole += blocks();
        if constexpr (CLUSTER > 1) {
            const int rank = share % CLUSTER;
            segment.first = steps * rank / CLUSTER;
            segment.count = steps * (rank + 1) / CLUSTER - segment.first;
        }
        return true;
    }
};

// The tiles of a product: of TOKENS tokens all or, with NARROW, those of the first `wide_rows` rows of tiles, and then narrow ones.
struct Tiles {
    u32 wide_rows, wide_tokens, narrow_rows, narrow_tokens;  // how many follow each other
    int m, band;
    Experts experts;

    __device__ __forceinline__ Tiles(int m, int n, int band, int head) : m(m), band(band) {
        const u32 rows = (n + ROWS - 1) / ROWS;
        wide_rows = NARROW ? head : rows;
        wide_tokens = (m + TOKENS - 1) / TOKENS;
        narrow_rows = rows - wide_rows;
        narrow_tokens = NARROW ? (m + NARROW - 1) / max(NARROW, 1) : 0;
    }
    __device__ __forceinline__ u32 wide() const { return wide_rows * wide_tokens; }
    __device__ __forceinline__ u32 of_matrix() const { return wide() + narrow_rows * narrow_tokens; }
    __device__ __forceinline__ u32 count(int batch) const { return GROUPED ? experts.tiles() : (u32)batch * of_matrix(); }
};

// Where a tile is: tiles of the same rows follow each other, so that their weights are still in L2, but no more of them than
// `band`, whose tokens stay there, too.
struct Place {
    int matrix, strip;
    int token, tokens;  // the first, and how many; in the matrix's x, or in all experts'
    bool narrow;

    __device__ __forceinline__ int most_tokens() const { return narrow ? NARROW : TOKENS; }
    __device__ __forceinline__ size_t row(int m) const { return GROUPED ? token : (size_t)matrix * m + token; }

    __device__ __forceinline__ Place(u32 tile, const Tiles& tiles) {
        if constexpr (GROUPED) {
            const PlaceOfExpert here = tiles.experts.place(tile, TOKENS);
            matrix = here.matrix, strip = here.line * STRIPS;
            token = here.token, tokens = here.tokens;
            narrow = false;
            return;
        }
        u32 first = 0, width = tiles.wide_tokens;
        matrix = tile < tiles.of_matrix() ? 0 : tile / tiles.of_matrix();
        tile -= matrix * tiles.of_matrix();
        narrow = NARROW && tile >= tiles.wide();
        if (narrow) {
            tile -= tiles.wide();
            width = tiles.narrow_tokens;
        } else if (tiles.band < (int)width) {
            first = tile / (tiles.wide_rows * tiles.band) * tiles.band;
            tile -= first * tiles.wide_rows;
            width = min(tiles.band, (int)(width - first));
        }
        const u32 row = width == 1 ? tile : tile / width;
        token = (first + tile - row * width) * most_tokens();
        tokens = min(most_tokens(), tiles.m - token);
        strip = (row + (narrow ? tiles.wide_rows : 0)) * STRIPS;
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

// Of boxes of x: of a tile's tokens, and of those that the last tile has; and the same of narrow ones. With boxes that reach
// beyond the matrix, of which the copy engine makes zeros, some products take up to 40 % longer. (An expert's reach into the next's.)
struct Maps {
    TensorMap of[NARROW ? 4 : GROUPED ? 1 : 2];
};

// ---- Producer -----------------------------------------------------------------------------------------------------------

// Where a lane's copies of its warp's strips begin, as distances from the tile's first strip, so that a step moves on but what is
// the same for all lanes; strips beyond the weight's are copies of its last.
struct Distances {
    u32 codes[PRODUCER_STRIPS], params[PRODUCER_STRIPS], supers[PRODUCER_STRIPS];

    __device__ __forceinline__ Distances(const Weight& w, int strip, int strips, int producer, int lane) {
#pragma unroll
        for (int i = 0; i < PRODUCER_STRIPS; ++i) {
            const u32 on = min(producer + i * PRODUCER_WARPS, strips - 1 - strip);
            codes[i] = on * w.tiles * Layout::CODE_BYTES + 16 * lane;
            params[i] = on * Columns::params_of_strip(w) + 16 * lane;
            supers[i] = on * Columns::supers_of_strip(w) + 16 * lane;
        }
    }
};

// One step's copies: boxes of x by one thread, and each producer warp's strips by its lanes, sixteen bytes each. The copy engine
// is not asked for weights: with its bulk copies of each strip's runs most shapes were slower.
__device__ __forceinline__ void copy_step(const TensorMap& x, int tokens, const Weight& w, const Place& at, const Distances& on, int step,
                                          u32 stage, u32 barrier, int producer, int lane) {
    const int k = STEP * step, count = STEP == 1 ? 1 : min(STEP, w.tiles - k);
    if (producer == 0 && elected()) {
        barrier_expect(barrier, count * tokens * (TILE_COLS * 2));
#pragma unroll
        for (int j = 0; j < STEP; ++j)
            if (j < count) copy_box(stage + j * X_BYTES, x, (k + j) * TILE_COLS, at.token, GROUPED ? 0 : at.matrix, barrier, KEEP_LONG);
    }
    __syncwarp();
    const u8* const codes = keep_pointer(w.codes + (size_t)(u32)(at.strip * w.tiles + k) * Layout::CODE_BYTES);
    const u8 *const params = keep_pointer(Columns::params(w, at.strip, k)), *const supers = keep_pointer(Columns::supers(w, at.strip, k));
    const u32 first = stage + WEIGHTS_AT + producer * STRIP_BYTES;
#pragma unroll
    for (int i = 0; i < PRODUCER_STRIPS; ++i) {
        const u32 to = first + i * PRODUCER_WARPS * STRIP_BYTES;
        copy_run<STEP * Layout::CODE_BYTES>(to, codes, on.codes[i], count * Layout::CODE_BYTES, lane, place_of(lane));
        copy_run<Columns::PARAM_BYTES(STEP)>(to + PARAMS_AT, params, on.params[i], Columns::PARAM_BYTES(count), lane, lane);
        copy_run<Columns::SUPER_BYTES>(to + SUPERS_AT, supers, on.supers[i], Columns::SUPER_BYTES, lane, lane);
    }
    copies_arrive(barrier);
}

// ---- Consumers ------------------------------------------------------------------------------------------------------------

// That all lanes have read a stage, if there is one.
__device__ __forceinline__ void release(u32 barrier, int lane) {
    __syncwarp();
    if (barrier) lane_arrives(barrier, lane);
}

// Tile j of a stage; j is known when this is compiled.
__device__ __forceinline__ Columns::Tile load_tile(int j, u32 codes, u32 params, u32 supers, int lane) {
    return j == 0   ? Columns::template load<0>(codes, params, supers, lane)
           : j == 1 ? Columns::template load<1>(codes, params, supers, lane)
           : j == 2 ? Columns::template load<2>(codes, params, supers, lane)
                    : Columns::template load<3>(codes, params, supers, lane);
}

// Half of a tile's columns, which are then under way with at most the half before them.
template <int HALF, int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[COUNT], const Columns::Tile& tile, const Columns::Rows& rows, u32 x, int lane) {
    u32 a[2][4];
    Columns::template operand<2 * HALF>(tile, rows, lane, a[0]);
    Columns::template operand<2 * HALF + 1>(tile, rows, lane, a[1]);
    pin(sums);
    wgmma_fence();
    wgmma(sums, a[0], x + 4 * HALF);
    wgmma(sums, a[1], x + 4 * HALF + 2);
    wgmma_commit();
    wgmma_wait<1>();
}

// A segment's sums: what a warp of a group reads of each stage is `own` bytes into it.
template <int COUNT>
__device__ __forceinline__ void accumulate(float (&sums)[COUNT], Turn& turn, const Segment& segment, const Columns::Rows& rows, int tiles,
                                           u32 stages, u32 own, u32 full, u32 empty, int lane) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums[i] = 0.0f;
    u32 to_release = 0;  // the barrier of the stage whose products may still be under way
#pragma unroll 1
    for (int step = segment.first; step < segment.first + segment.count; ++step) {
        const u32 stage = stages + turn.stage * BYTES_OF_STAGE, here = stage + own;
        // Exchanged so that the compiler knows it to be the same for all lanes, as descriptors must be.
        const u32 boxes = __shfl_sync(~0u, descriptor(stage), 0);
        barrier_wait(full + 8 * turn.stage, turn.phase);
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            if (j > 0 && STEP * step + j >= tiles) break;
            const u32 box = boxes + j * (X_BYTES / 16);
            const Columns::Tile tile = load_tile(j, here, here + PARAMS_AT, here + SUPERS_AT, lane);
            multiply<0>(sums, tile, rows, box, lane);
            // Only this step's are under way.
            if (j == 0) release(to_release, lane);
            multiply<1>(sums, tile, rows, box, lane);
        }
        to_release = empty + 8 * turn.stage;
        turn.next();
    }
    wgmma_wait<0>();
    release(to_release, lane);
    pin(sums);
}

// A group's sums of 64 rows to y [tokens, n], by its 128 threads; `staged` is the group's own.
template <int COUNT>
__device__ __forceinline__ void store(const float (&sums)[COUNT], u8* staged, u16* y, const u16* bias, int strip, int tokens, int n,
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
    for (int first = 0; first < 2 * COUNT; first += CHUNK) {
        if (first >= tokens) break;
        const int chunk = first / CHUNK % CHUNKS * CHUNK_BYTES;
#pragma unroll
        for (int token = 0; token < CHUNK && first + token < 2 * COUNT; token += 16) {
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
        const int here = min(min(CHUNK, 2 * COUNT - first), tokens - first), r = first_row + thread % 8 * 8;
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

// The sums of one tile's columns, by the blocks of a cluster: each leaves its own in its shared memory, where stages were,
// scaled, and adds everybody's of some tokens.
constexpr int EXCHANGE_ROW = ROWS + 4;  // floats of a token: eight rows of four tokens then meet all banks
static_assert(CLUSTER == 1 || TOKENS * EXCHANGE_ROW * 4 <= STAGES * BYTES_OF_STAGE, "sums are left where stages were");
__device__ __forceinline__ void leave_sums(const float (&sums)[SUMS], u8* exchange, int first_row, float low, float high) {
    const int warp = threadIdx.x % 128 / LANES, lane = threadIdx.x % LANES;
    float* to = reinterpret_cast<float*>(exchange) + lane % 4 * 2 * EXCHANGE_ROW + first_row + warp * TILE_ROWS + lane / 4;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) to[(i / 4 * 8 + i % 2) * EXCHANGE_ROW + i / 2 % 2 * 8] = sums[i] * (i / 2 % 2 ? high : low);
}
__device__ __forceinline__ void store_exchanged(u32 exchange, int rank, u16* y, const u16* bias, int first_row, int tokens, int n) {
    constexpr int EACH = (TOKENS + CLUSTER - 1) / CLUSTER, FOURS = ROWS / 4;
    const bool vectors = n % 4 == 0 && (u64)y % 8 == 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < EACH * FOURS; i += 128 * GROUPS) {
        const int token = rank * EACH + i / FOURS, row = i % FOURS * 4, r = first_row + row;
        if (token >= tokens || r >= n) continue;
        const u32 from = exchange + (token * EXCHANGE_ROW + row) * 4;
        float4 parts[CLUSTER];
#pragma unroll
        for (int j = 0; j < CLUSTER; ++j) parts[j] = read_there(in_block(from, j));
        float all[4] = {};
#pragma unroll
        for (int j = 0; j < CLUSTER; ++j) {
            all[0] += parts[j].x;
            all[1] += parts[j].y;
            all[2] += parts[j].z;
            all[3] += parts[j].w;
        }
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

// x: maps of [batch, m, k], or of all experts' [m, k], with boxes of 64 columns and as many rows as Maps says, swizzled by 128 bytes;
// y alike; bias [batch, n] or null; offsets: where experts' tokens begin, [batch + 1]. head: a tile's units that its own block does,
// or with NARROW the rows of tiles before narrow ones, or 0. partial: [gridDim.x, or tiles where there are helpers][GROUPS][SUMS / 4]
// [128] float4; arrived: a counter for each tile and group, zero before and after; both serve tiles that are cut, but in clusters. At
// most one block a multiprocessor and, but for experts, no more than there are units.
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(128 * GROUPS + 128, 1)
wide(const __grid_constant__ tenpak::Maps x, const unsigned char* codes, const unsigned char* params, const unsigned char* row_params,
     unsigned short* y, const unsigned short* bias, const int* offsets, float4* partial, unsigned int* arrived, long long codes_step,
     long long params_step, long long row_params_step, int batch, int m, int n, int tiles, int supers, int head, int band,
     float scale) {
    using namespace tenpak;
    extern __shared__ __align__(1024) u8 dynamic[];
    __shared__ u64 barriers[2 * STAGES];
    u8* const stages = dynamic + (0u - shared_address(dynamic)) % 1024;
    const u32 stages_address = keep_address(shared_address(stages));
    const u32 full = keep_address(shared_address(barriers)), empty = full + 8 * STAGES;

    Tiles all(m, n, band, head);
    if constexpr (GROUPED) {
        u8* const room = stages + STAGES * BYTES_OF_STAGE + GROUPS * CHUNKS * CHUNK_BYTES;
        all.experts = Experts(batch, offsets, all.wide_rows, TOKENS, reinterpret_cast<u32*>(room), 128 * GROUPS + 128);
    }
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS;
    // Each role makes its own: what both keep must fit in the registers of the smaller one.
    auto own_schedule = [&] { return Schedule(all.count(batch), (tiles + STEP - 1) / STEP, NARROW ? 0 : head); };
    auto weight = [&](int matrix) {
        return Weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step, tiles, supers};
    };

    const int warp = __shfl_sync(~0u, threadIdx.x / LANES, 0), lane = lane_of_warp();
    if (warp >= CONSUMER_WARPS) {
        // Who asks for copies makes the barriers, so that they need nobody else for the first.
        if (threadIdx.x == CONSUMER_WARPS * LANES) {
            for (const TensorMap& map : x.of) prefetch_map(map);
            for (int i = 0; i < STAGES; ++i) {
                // Each thread's copies of weights, and the one that asks for x.
                barrier_init(full + 8 * i, PRODUCER_WARPS * LANES + 1);
                barrier_init(empty + 8 * i, CONSUMER_WARPS * ARRIVALS);
            }
            barriers_ready();
        }
        group_barrier(GROUPS);
        arrive_at_block(128 * GROUPS + 128);
        leave_registers<FEW>();
        Schedule schedule = own_schedule();
        Segment segment;
        Turn turn(1);  // all stages are empty
        while (schedule.next(segment)) {
            const Place at(segment.tile, all);
            const Weight w = weight(at.matrix);
            const Distances on(w, at.strip, strips, warp - CONSUMER_WARPS, lane);
            const int tokens = GROUPED ? TOKENS : at.tokens;
            const TensorMap& boxes = x.of[2 * at.narrow + (tokens < at.most_tokens())];
#pragma unroll 1
            for (int step = segment.first; step < segment.first + segment.count; ++step) {
                barrier_wait(empty + 8 * turn.stage, turn.phase);
                copy_step(boxes, tokens, w, at, on, step, stages_address + turn.stage * BYTES_OF_STAGE, full + 8 * turn.stage,
                          warp - CONSUMER_WARPS, lane);
                turn.next();
            }
        }
    } else {
#ifdef LUT16_TABLES
        Lut16::prepare(threadIdx.x, Lut16::BACKWARDS_XOR);
#endif
        wait_for_block(128 * GROUPS + 128);
        take_registers<MANY>();
        Schedule schedule = own_schedule();
        Segment segment;
        const int group = warp / 4, thread = threadIdx.x % 128;
        u8* const staged = stages + STAGES * BYTES_OF_STAGE + group * CHUNKS * CHUNK_BYTES;
        // This warp's strip in a stage.
        const u32 own = WEIGHTS_AT + (group * GROUP_STRIPS + warp % 4) * STRIP_BYTES;
        Turn turn(0);
        while (schedule.next(segment)) {
            const Place at(segment.tile, all);
            const Weight w = weight(at.matrix);
            const int first_strip = at.strip + group * GROUP_STRIPS;
            const Columns::Rows rows = Columns::rows(w, min(first_strip + warp % 4, strips - 1), lane);
            auto to = [&] { return y + at.row(m) * n; };
            auto plus = [&] { return bias ? bias + (size_t)at.matrix * n : nullptr; };
            if (NARROW && at.narrow) {
                float sums[NARROW ? NARROW / 2 : SUMS];
                accumulate(sums, turn, segment, rows, tiles, stages_address, own, full, empty, lane);
                store(sums, staged, to(), plus(), first_strip, at.tokens, n, scale * Columns::row_scale(rows, false),
                      scale * Columns::row_scale(rows, true), group);
                continue;
            }
            float sums[SUMS];
            accumulate(sums, turn, segment, rows, tiles, stages_address, own, full, empty, lane);
            if constexpr (CLUSTER > 1) {
                // Everybody's products have read their stages.
                consumers_barrier(128 * GROUPS);
                leave_sums(sums, stages, group * 64, scale * Columns::row_scale(rows, false), scale * Columns::row_scale(rows, true));
                cluster_sync();
                store_exchanged(stages_address, cluster_rank(), to(), plus(), at.strip * TILE_ROWS, at.tokens, n);
                cluster_meet();
                continue;
            }

            constexpr int PART = SUMS / 4 * 128;  // float4 of one group
            // Others' sums that registers have room for.
            constexpr int ROOM = (MANY - 40) / SUMS - 1, AT_ONCE = ROOM < 1 ? 1 : ROOM > 4 ? 4 : ROOM;
            unsigned int* const counter = arrived + (size_t)segment.tile * GROUPS + group;
            auto part = [&](u32 place) { return partial + ((size_t)place * GROUPS + group) * PART + thread; };
            if (segment.first > 0) {
                float4* left = part(schedule.left_at(segment.tile));
#pragma unroll
                for (int i = 0; i < SUMS; i += 4) __stcg(left + i / 4 * 128, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
                group_barrier(group);
                if (thread == 0) add_release(counter, 1);
                continue;
            }
            if (segment.count < schedule.steps) {
                const u32 first = schedule.first_left(segment.tile), last = schedule.last_left(segment.tile);
                if (thread == 0) {
                    while (load_acquire(counter) < last - first + 1) {}
                    *counter = 0;
                }
                group_barrier(group);
#pragma unroll 1
                for (u32 other = first; other <= last; other += AT_ONCE) {
                    float4 v[AT_ONCE][PART / 128];
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                        for (int j = 0; j < PART / 128; ++j)
                            v[i][j] = other + i <= last ? __ldcg(part(other + i) + j * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
                        for (int j = 0; j < PART / 128; ++j) {
                            float* to = sums + 4 * j;
                            to[0] += v[i][j].x;
                            to[1] += v[i][j].y;
                            to[2] += v[i][j].z;
                            to[3] += v[i][j].w;
                        }
                }
            }
            store(sums, staged, to(), plus(), first_strip, at.tokens, n, scale * Columns::row_scale(rows, false),
                  scale * Columns::row_scale(rows, true), group);
        }
    }
}
