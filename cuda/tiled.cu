// y = x Wᵀ for many tokens on any GPU: weights go through registers into tensor cores, tokens through shared memory.
//
// A block owns tiles of ROWS = 16 * STRIPS * WARPS rows by TOKENS tokens. A warp multiplies STRIPS strips of 16 rows, whose
// operands it makes from packed weights (columns.cuh), with all of the tile's tokens. STAGES - 1 steps of STEP times 64 columns
// are on their way while one is multiplied: each warp copies its own strips, all of them the tokens.
//
// Work is cut evenly (stream-K): every block takes the same number of steps of tiles, so that no multiprocessor idles in a last
// wave. The block that begins a tile finishes it: it adds the sums of those that went on with it in order, so results repeat.
// Blocks take their shares from the back: a block waits only for blocks that were started before it, all of which fit at a time.
//
// With -DGROUPED=1 the matrices are experts, and those tokens are an expert's that `offsets` says.
//
// -DWARPS, -DSTRIPS, -DTOKENS (a multiple of 16), -DSTEP (1 or 2), -DSTAGES, -DGROUPED.
#include "columns.cuh"
#include "experts.cuh"
#include "few.cuh"

namespace tenpak {

constexpr int THREADS = WARPS * LANES, BLOCK_STRIPS = WARPS * STRIPS, ROWS = BLOCK_STRIPS * TILE_ROWS;
// A stage: STEP boxes of tokens, then each strip's codes, parameters and super-scales.
constexpr int X_BYTES = TOKENS * TILE_COLS * 2;
constexpr int PARAMS_AT = STEP * Layout::CODE_BYTES, SUPERS_AT = PARAMS_AT + Columns::PARAM_BYTES(STEP);
constexpr int STRIP_BYTES = SUPERS_AT + Columns::SUPER_BYTES;
constexpr int BYTES_OF_STAGE = STEP * X_BYTES + BLOCK_STRIPS * STRIP_BYTES;
static_assert(STRIP_BYTES % 16 == 0 && TOKENS % 16 == 0 && THREADS % 8 == 0 && STAGES > 1, "copies are of sixteen bytes");

// ---- Work -------------------------------------------------------------------------------------------------------------

// The tiles of a product, matrix after matrix, and in a matrix those of the same rows after each other.
struct Tiles {
    int m, row_tiles, token_tiles;
    Experts experts;

    __device__ __forceinline__ u32 count(int batch) const { return GROUPED ? experts.tiles() : (u32)batch * row_tiles * token_tiles; }
};

// Where a tile is: its tokens are `tokens` rows of x and y from `first` on.
struct Place {
    int matrix, strip, first, tokens;

    __device__ __forceinline__ Place() {}
    __device__ __forceinline__ Place(u32 tile, const Tiles& tiles) {
        if constexpr (GROUPED) {
            const PlaceOfExpert here = tiles.experts.place(tile, TOKENS);
            matrix = here.matrix, strip = here.line * BLOCK_STRIPS;
            first = here.token, tokens = here.tokens;
            return;
        }
        const int width = tiles.token_tiles;
        const u32 of_matrix = (u32)tiles.row_tiles * width;
        matrix = tile / of_matrix;
        tile -= matrix * of_matrix;
        const u32 row = tile / width;
        strip = row * BLOCK_STRIPS;
        const int token = (tile - row * width) * TOKENS;
        first = matrix * tiles.m + token;
        tokens = min(TOKENS, tiles.m - token);
    }
};

// A block's place in the steps of all tiles, tile after tile.
struct Cursor {
    u64 unit, end;
    u32 tile;
    int step;
    Place at;

    __device__ __forceinline__ Cursor(u64 begin, u64 end, int steps, const Tiles& tiles) : unit(begin), end(end) {
        tile = (u32)(begin / steps);
        step = (int)(begin - (u64)tile * steps);
        at = Place(tile, tiles);
    }
    __device__ __forceinline__ void next(int steps, const Tiles& tiles) {
        if (++unit == end) return;
        if (++step == steps) {
            step = 0;
            at = Place(++tile, tiles);
        }
    }
};

// ---- Copies -----------------------------------------------------------------------------------------------------------

// A run of bytes, sixteen a lane and instruction; of each 512, this lane's go to `place`.
template <int MOST>
__device__ __forceinline__ void copy_lanes(u32 to, const u8* from, int bytes, int lane, int place) {
#pragma unroll
    for (int i = 0; i < MOST; i += 16 * LANES)
        if (i + 16 * lane < bytes) copy_once(to + i + 16 * place, from + i + 16 * lane);
}

// A warp's strips of a step.
__device__ __forceinline__ void copy_weights(const Weight& w, int strip, int strips, int step, u32 to, int lane) {
    const int k = STEP * step, count = STEP == 1 ? 1 : min(STEP, w.tiles - k);
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
        if (strip + i >= strips) break;
        const u32 here = to + i * STRIP_BYTES;
        const u8* codes = w.codes + (size_t)(u32)((strip + i) * w.tiles + k) * Layout::CODE_BYTES;
        copy_lanes<STEP * Layout::CODE_BYTES>(here, codes, count * Layout::CODE_BYTES, lane, place_of(lane));
        copy_lanes<Columns::PARAM_BYTES(STEP)>(here + PARAMS_AT, Columns::params(w, strip + i, k), Columns::PARAM_BYTES(count), lane, lane);
        copy_lanes<Columns::SUPER_BYTES>(here + SUPERS_AT, Columns::supers(w, strip + i, k), Columns::SUPER_BYTES, lane, lane);
    }
}

// A tile's tokens: a row of 128 bytes each, whose chunks of sixteen bytes are exchanged so that eight rows meet all banks.
struct Tokens {
    const u16* x;
    long long stride;
    int k;
    bool vectors;

    __device__ __forceinline__ void copy(const Place& at, int tile, u32 to, u8* memory) const {
        const int chunk = threadIdx.x % 8, column = tile * TILE_COLS + 8 * chunk;
        const u16* from = x + at.first * stride + column;
#pragma unroll
        for (int pass = 0; pass < (TOKENS + THREADS / 8 - 1) / (THREADS / 8); ++pass) {
            const int token = threadIdx.x / 8 + pass * (THREADS / 8);
            if (TOKENS % (THREADS / 8) && token >= TOKENS) break;
            const u32 place = token * 128 + (chunk ^ token % 8) * 16;
            const bool there = token < at.tokens && column < k;
            if (vectors) {
                copy_or_zeros(to + place, there ? from + token * stride : x, there ? 16 : 0);
            } else {
                // Rows that are not aligned: rare, so short rather than fast.
                u16* line = reinterpret_cast<u16*>(memory + place);
#pragma unroll 1
                for (int i = 0; i < 8; ++i) line[i] = there && column + i < k ? from[token * stride + i] : (u16)0;
            }
        }
    }
};

// ---- Products -----------------------------------------------------------------------------------------------------------

using Sums = float[STRIPS][TOKENS / 8][4];

// Sixteen columns of a tile with all tokens: `x` is where this lane reads rows of both chunks of eight tokens, then of the next eight.
template <int QUARTER>
__device__ __forceinline__ void multiply_quarter(Sums& sums, const Columns::Tile (&tiles)[STRIPS], const Columns::Rows (&rows)[STRIPS],
                                                 u32 x, int lane) {
    u32 a[STRIPS][4];
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) Columns::template operand<QUARTER>(tiles[i], rows[i], lane, a[i]);
    const u32 from = x + ((2 * QUARTER + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int pair = 0; pair < TOKENS / 16; ++pair) {
        const uint4 b = load_matrices(from + pair * 2048);
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) {
            multiply(sums[i][2 * pair], a[i], b.x, b.y);
            multiply(sums[i][2 * pair + 1], a[i], b.z, b.w);
        }
    }
}

// One tile of 64 columns.
template <int J>
__device__ __forceinline__ void multiply_tile(Sums& sums, const Columns::Rows (&rows)[STRIPS], u32 x, u32 weights, int lane) {
    Columns::Tile tiles[STRIPS];
#pragma unroll
    for (int i = 0; i < STRIPS; ++i) {
        const u32 here = weights + i * STRIP_BYTES;
        tiles[i] = Columns::template load<J>(here, here + PARAMS_AT, here + SUPERS_AT, lane);
    }
    const u32 from = x + (lane / 16 * 8 + lane % 8) * 128;
    multiply_quarter<0>(sums, tiles, rows, from, lane);
    multiply_quarter<1>(sums, tiles, rows, from, lane);
    multiply_quarter<2>(sums, tiles, rows, from, lane);
    multiply_quarter<3>(sums, tiles, rows, from, lane);
}

// A strip's sums to y [tokens, n].
__device__ __forceinline__ void store(const float (&sums)[TOKENS / 8][4], u16* y, const u16* bias, int row, int tokens, int n, float low,
                                      float high, int lane) {
    const int g = lane / 4, t = lane % 4;
    const float low_bias = bias && row + g < n ? widen(bias[row + g]) : 0.0f;
    const float high_bias = bias && row + g + 8 < n ? widen(bias[row + g + 8]) : 0.0f;
    const bool even = n % 2 == 0 && (u64)y % 4 == 0;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        if (8 * j >= tokens) break;
        const u32 upper = narrow(sums[j][0] * low + low_bias) | (u32)narrow(sums[j][1] * low + low_bias) << 16;
        const u32 lower = narrow(sums[j][2] * high + high_bias) | (u32)narrow(sums[j][3] * high + high_bias) << 16;
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

// x [batch, m, k], or all experts' tokens [m, k], with rows of x_stride elements; y [.., n] alike; bias [batch, n] or null; offsets
// [batch + 1] or null. partial: [gridDim.x][STRIPS * TOKENS / 8][THREADS] float4; arrived: a counter for each tile, zero before and
// after. All blocks must be running at a time.
extern "C" __global__ void __launch_bounds__(tenpak::THREADS, 1)
tiled(const unsigned char* codes, const unsigned char* params, const unsigned char* row_params, const unsigned short* x,
      unsigned short* y, const unsigned short* bias, const int* offsets, float4* partial, unsigned int* arrived, long long codes_step,
      long long params_step, long long row_params_step, long long x_stride, int batch, int m, int n, int k, int tiles_of_k, int supers,
      float scale) {
    using namespace tenpak;
    extern __shared__ __align__(128) uint4 dynamic[];
    u8* const stages = reinterpret_cast<u8*>(dynamic);
    const u32 stages_at = shared_address(stages);
    const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
#ifdef LUT16_TABLES
    Lut16::prepare(threadIdx.x, Lut16::BACKWARDS_XOR);
    __syncthreads();
#endif

    const int row_tiles = (n + ROWS - 1) / ROWS;
    Tiles tiles{m, row_tiles, (m + TOKENS - 1) / TOKENS, {}};
    if constexpr (GROUPED)
        tiles.experts = Experts(batch, offsets, row_tiles, TOKENS, reinterpret_cast<u32*>(stages + STAGES * BYTES_OF_STAGE), THREADS);
    const int strips = (n + TILE_ROWS - 1) / TILE_ROWS, steps = (tiles_of_k + STEP - 1) / STEP;
    const u64 units = (u64)tiles.count(batch) * steps;
    // Experts may have fewer units than there are blocks.
    const u32 blocks = min((u64)gridDim.x, units);
    if (blockIdx.x >= blocks) return;
    const u32 share = blocks - 1 - blockIdx.x;
    auto begin_of = [&](u32 share) { return share * units / blocks; };
    const u64 begin = begin_of(share), end = begin_of(share + 1);
    auto weight = [&](int matrix) {
        return Weight{codes + matrix * codes_step, params + matrix * params_step, row_params + matrix * row_params_step, tiles_of_k, supers};
    };

    const Tokens tokens{x, x_stride, k, k % 8 == 0 && x_stride % 8 == 0 && (u64)x % 16 == 0};
    Cursor ahead(begin, end, steps, tiles);
    int slot_ahead = 0;
    auto copy_ahead = [&] {
        if (ahead.unit < end) {
            const u32 to = stages_at + slot_ahead * BYTES_OF_STAGE;
#pragma unroll
            for (int j = 0; j < STEP; ++j)
                if (j == 0 || STEP * ahead.step + j < tiles_of_k)
                    tokens.copy(ahead.at, STEP * ahead.step + j, to + j * X_BYTES, stages + slot_ahead * BYTES_OF_STAGE + j * X_BYTES);
            copy_weights(weight(ahead.at.matrix), ahead.at.strip + warp * STRIPS, strips, ahead.step,
                         to + STEP * X_BYTES + warp * (STRIPS * STRIP_BYTES), lane);
            ahead.next(steps, tiles);
        }
        commit_copies();
        slot_ahead = slot_ahead + 1 == STAGES ? 0 : slot_ahead + 1;
    };
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) copy_ahead();

    int slot = 0;
    Cursor here(begin, end, steps, tiles);
    while (here.unit < end) {
        const Place at = here.at;
        const u32 tile = here.tile;
        const bool begins = here.step == 0;
        const int strip = at.strip + warp * STRIPS;
        Columns::Rows rows[STRIPS];
        Sums sums;
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) {
            rows[i] = Columns::rows(weight(at.matrix), min(strip + i, strips - 1), lane);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
                for (int r = 0; r < 4; ++r) sums[i][j][r] = 0.0f;
        }
        int step;
        do {
            step = here.step;
            wait_for_copies<STAGES - 2>();
            // All have read what the next copies replace, and what all have copied for this step is there.
            __syncthreads();
            copy_ahead();
            const u32 stage = stages_at + slot * BYTES_OF_STAGE, own = stage + STEP * X_BYTES + warp * (STRIPS * STRIP_BYTES);
            multiply_tile<0>(sums, rows, stage, own, lane);
            if constexpr (STEP == 2)
                if (2 * step + 1 < tiles_of_k) multiply_tile<STEP - 1>(sums, rows, stage + X_BYTES, own, lane);
            slot = slot + 1 == STAGES ? 0 : slot + 1;
            here.next(steps, tiles);
        } while (here.unit < end && here.tile == tile);

        const bool ends = step + 1 == steps;
        auto part = [&](u32 of) { return partial + (size_t)of * (STRIPS * (TOKENS / 8) * THREADS) + threadIdx.x; };
        if (!begins) {
#pragma unroll
            for (int i = 0; i < STRIPS; ++i)
#pragma unroll
                for (int j = 0; j < TOKENS / 8; ++j)
                    __stcg(part(share) + (i * (TOKENS / 8) + j) * THREADS,
                           make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]));
            __syncthreads();
            if (threadIdx.x == 0) add_release(arrived + tile, 1);
            continue;
        }
        if (!ends) {
            // The shares that have what is left of this tile.
            const u64 tile_end = (u64)(tile + 1) * steps;
            u32 last = share;
            while (begin_of(last + 1) < tile_end) ++last;
            if (threadIdx.x == 0) {
                while (load_acquire(arrived + tile) < last - share) {}
                arrived[tile] = 0;
            }
            __syncthreads();
#pragma unroll 1
            for (u32 other = share + 1; other <= last; ++other) {
#pragma unroll
                for (int i = 0; i < STRIPS; ++i)
#pragma unroll
                    for (int j = 0; j < TOKENS / 8; ++j) {
                        const float4 v = __ldcg(part(other) + (i * (TOKENS / 8) + j) * THREADS);
                        sums[i][j][0] += v.x;
                        sums[i][j][1] += v.y;
                        sums[i][j][2] += v.z;
                        sums[i][j][3] += v.w;
                    }
            }
        }
#pragma unroll
        for (int i = 0; i < STRIPS; ++i)
            if (strip + i < strips)
                store(sums[i], y + (size_t)at.first * n, bias ? bias + (size_t)at.matrix * n : nullptr, (strip + i) * TILE_ROWS, at.tokens, n,
                      scale * Columns::row_scale(rows[i], false), scale * Columns::row_scale(rows[i], true), lane);
    }
    wait_for_copies<0>();
}
