// Products of one token, or of two with int4_lut16, in the tensor cores' eight-bit instruction, mma.m16n8k32.
//
// Codes are integers, and so are the entries of int4_lut16's tables: as they are, they are operands, four to a register.
// Making FP16 of each and scaling it would take two to three times the instructions, and those, not memory, would take the time.
//
// Activations become sixteen bits, x = (256 h + l) s with h and l of eight signed bits and one scale s for 128 columns
// of a token: their error is at most 2^-16 of the largest of those, less than what FP16 leaves of a weight. h and l of a token
// are two columns of the instruction's eight. Where groups are smaller than a tile, they are there once for each of SPLITS
// parts of the columns of K, zero elsewhere, so that different lanes get the sums of different groups. What is summed is
// exact: only x is rounded, and FP32 sums of groups.
//
// An affine weight is q s + o: the sums of q are multiplied by s, and those of x, which staging has added up, by o. A weight
// d L T[t][q] of int4_lut16: sums of entries are multiplied by the integer L of their group, and every 128 columns by d. (With
// more tokens a column has no room for groups, and making h and l takes longer than is won.)
//
// -DINTEGER: tokens, 1 or 2.
#pragma once
#include "tokens.cuh"

namespace tenpak {

constexpr int TOKENS = INTEGER;
#ifdef LUT16_TABLES
constexpr bool TABLES = true;
#else
constexpr bool TABLES = false;
#endif
static_assert(COLUMNS == 1 && (TOKENS == 1 || (TABLES && TOKENS == 2)), "eight columns are h and l of four parts");

constexpr int GROUP = Layout::SIZE;
static_assert(GROUP >= 16, "there are no columns for more parts than four");
constexpr bool WHOLE = GROUP == 2 * TILE_COLS;  // two tiles are one group
constexpr int SPLITS = GROUP >= TILE_COLS ? 1 : GROUP == 32 ? 2 : 4 / TOKENS;
// Sums of a tile: of both halves together, or of each.
constexpr int SETS = TOKENS;
constexpr int UNITS = SPLITS * SETS;  // of a tile: runs of columns whose sums stay apart
constexpr int UNIT = WHOLE ? 2 * TILE_COLS : TILE_COLS / UNITS;
static_assert(UNIT == GROUP, "sums of groups");

// ---- Activations ----------------------------------------------------------------------------------------------------

// A row of x: for each tile 64 bytes of h and 64 of l, of each lane t its columns in both halves; scales of 128 columns; and sums
// of units, as multiples of those. Columns lie as the bytes of the other operand do: where codes are packed by pairs, as a
// mask finds them, each pair of the first half between the bytes of that of the second. Where halves are different units,
// tiles are there twice: with zeros in place of the second half, and of the first.
struct Digits {
    static constexpr int BLOCK_COLS = STAGE_TILES * TILE_COLS;  // columns of x that share a scale
    static constexpr float LARGEST = 32639.0f;                  // 256 * 127 + 127
    // Blocks that a warp splits at a time, so that all warps together split 4096 columns at once.
    static constexpr int AT_ONCE = (4096 / BLOCK_COLS + WARPS - 1) / WARPS < 4 ? (4096 / BLOCK_COLS + WARPS - 1) / WARPS : 4;
    static constexpr int VERSIONS = !TABLES && UNIT < TILE_COLS ? 2 : 1;
    static constexpr int TILE_BYTES = VERSIONS * 2 * TILE_COLS, BLOCK_BYTES = STAGE_TILES * TILE_BYTES;

    static __device__ __forceinline__ int blocks(int columns) { return (columns + BLOCK_COLS - 1) / BLOCK_COLS; }
    static __device__ __forceinline__ int scales_at(int columns) { return blocks(columns) * BLOCK_BYTES; }
    static __device__ __forceinline__ int units_at(int columns) { return scales_at(columns) + blocks(columns) * 4; }
    static __device__ __forceinline__ int row_bytes(int tiles) {
        const int b = blocks(tiles * TILE_COLS);
        return (b * (BLOCK_BYTES + 4 + (TABLES ? 0 : BLOCK_COLS / UNIT * 4)) + 127) / 128 * 128 + 32;
    }

    // Four neighbouring values, of which so many are there; zeros beyond.
    static __device__ __forceinline__ uint2 load(const u16* values, int there, bool vectors) {
        uint2 v = make_uint2(0, 0);
        if (vectors) {
            if (there >= 4) v = __ldg(reinterpret_cast<const uint2*>(values));
        } else {
            // Rows that are not aligned: rare, so short rather than fast.
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
                const u32 next = i < there ? values[i] : 0;
                v.x = v.x >> 16 | v.y << 16;
                v.y = v.y >> 16 | next << 16;
            }
        }
        return v;
    }

    // Four columns of this lane, of COUNT blocks each, as h and l; zeros beyond the slice. Token row(i) has block(i), or is
    // null where there is none. Several at a time, since each alone would be all latency.
    template <int COUNT, class Row, class Block>
    static __device__ __forceinline__ void split(const uint2 (&v)[COUNT], int columns, Row row, Block block, int lane) {
        float values[COUNT][4], scale[COUNT];
        u32 largest[COUNT], high[COUNT], low[COUNT];
        int sum[COUNT];
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            values[j][0] = widen((u16)v[j].x);
            values[j][1] = widen((u16)(v[j].x >> 16));
            values[j][2] = widen((u16)v[j].y);
            values[j][3] = widen((u16)(v[j].y >> 16));
            // Compared as bits, NaN is the largest: it becomes the scale and so what is summed.
            largest[j] = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[j] = max(largest[j], __float_as_uint(values[j][i]) & 0x7fffffff);
        }
#pragma unroll
        for (int j = 0; j < COUNT; ++j) largest[j] = __reduce_max_sync(~0u, largest[j]);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            const float most = __uint_as_float(largest[j]), inverse = most > 1e-30f ? LARGEST * reciprocal(most) : 0.0f;
            scale[j] = most * (1.0f / LARGEST);
            // Above 1.5 * 2^23 a float's lowest bits are the integer nearest to what was added.
            constexpr u32 ABOVE = 0x4b400000;
            u32 q[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) q[i] = __float_as_uint(fmaf(values[j][i], inverse, __uint_as_float(ABOVE)));
            sum[j] = (int)(q[0] + q[1] + q[2] + q[3] - 4 * ABOVE);
            low[j] = permute(permute(q[0], q[1], 0x0040), permute(q[2], q[3], 0x0040), 0x5410);
#pragma unroll
            for (int i = 0; i < 4; ++i) q[i] += 128;
            high[j] = permute(permute(q[0], q[1], 0x0051), permute(q[2], q[3], 0x0051), 0x5410);
        }
        if (!TABLES && VERSIONS == 1) {
            // Of the lanes with the same columns of both halves the first writes their first pairs, the second the others.
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                const u32 other_high = __shfl_xor_sync(~0u, high[j], 8), other_low = __shfl_xor_sync(~0u, low[j], 8);
                high[j] = lane / 8 % 2 ? permute(other_high, high[j], 0x7362) : permute(high[j], other_high, 0x5140);
                low[j] = lane / 8 % 2 ? permute(other_low, low[j], 0x7362) : permute(low[j], other_low, 0x5140);
            }
        }
#ifndef LUT16_TABLES
#pragma unroll
        for (int lanes = 1; lanes < UNIT / 4; lanes *= 2)
#pragma unroll
            for (int j = 0; j < COUNT; ++j) sum[j] += __shfl_xor_sync(~0u, sum[j], lanes);
#endif
        const int tile = lane / 16, half = lane / 8 % 2, t = lane % 8 / 2, upper = lane % 2;
        const int place = tile * TILE_BYTES + t * 16 +
                          (TABLES ? half * 8 + upper * 4 : VERSIONS == 1 ? upper * 8 + half * 4 : half * (2 * TILE_COLS) + upper * 8);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
            u8* const to = row(j);
            if (!to) continue;
            const int b = block(j);
            u8* const at = to + b * BLOCK_BYTES + place;
            if (VERSIONS == 2) {
                const u32 first = half ? 0x1404 : 0x4140, second = half ? 0x3424 : 0x4342;
                *reinterpret_cast<uint2*>(at) = make_uint2(permute(high[j], 0, first), permute(high[j], 0, second));
                *reinterpret_cast<uint2*>(at + TILE_COLS) = make_uint2(permute(low[j], 0, first), permute(low[j], 0, second));
            } else {
                *reinterpret_cast<u32*>(at) = high[j];
                *reinterpret_cast<u32*>(at + TILE_COLS) = low[j];
            }
            if (lane == 0) *reinterpret_cast<float*>(to + scales_at(columns) + 4 * b) = scale[j];
#ifndef LUT16_TABLES
            if (lane % (UNIT / 4) == 0)
                *reinterpret_cast<float*>(to + units_at(columns) + (b * (BLOCK_COLS / UNIT) + lane / (UNIT / 4)) * 4) = (float)sum[j];
#endif
        }
    }

    // x to shared memory. The first loads go out before the copies of weights and are made use of after those.
    struct Staging {
        XSlice from;
        bool vectors;
        int warp, lane, count, items;  // blocks of a token, and of all
        uint2 values[AT_ONCE];

        __device__ __forceinline__ explicit Staging(const XSlice& from)
            : from(from), vectors(from.aligned(8)), warp(threadIdx.x / LANES), lane(threadIdx.x % LANES), count(blocks(from.columns)),
              items(from.tokens * count) {}
        template <bool VECTORS>
        __device__ __forceinline__ void load_as(uint2 (&to)[AT_ONCE], int first) const {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int item = first + i * WARPS, token = TOKENS == 1 ? 0 : item / count;
                const int column = (item - token * count) * BLOCK_COLS + lane * 4, at = from.first_column + column;
                const int there = item < items ? min(from.k - at, from.columns - column) : 0;
                to[i] = load(from.x + token * from.stride + at, there, VECTORS);
            }
        }
        __device__ __forceinline__ void load_from(uint2 (&to)[AT_ONCE], int first) const {
            if (vectors) load_as<true>(to, first);
            else load_as<false>(to, first);
        }
        __device__ __forceinline__ void begin(u8*, int) { load_from(values, warp); }
        __device__ __forceinline__ void end(u8* to, int row_bytes) {
#pragma unroll 1
            for (int first = warp; first < items; first += AT_ONCE * WARPS) {
                uint2 next[AT_ONCE] = {};
                if (__builtin_expect(first + AT_ONCE * WARPS < items, 0)) load_from(next, first + AT_ONCE * WARPS);
                auto token = [&](int i) { return TOKENS == 1 ? 0 : (first + i * WARPS) / count; };
                split(values, from.columns, [&](int i) { return first + i * WARPS < items ? to + token(i) * row_bytes : nullptr; },
                      [&](int i) { return first + i * WARPS - token(i) * count; }, lane);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) values[i] = next[i];
            }
        }
    };

    // As of halves.cuh; the lanes of a warp have a block's columns in order.
    template <int COUNT, class Column>
    static __device__ __forceinline__ void put(u8* row, int columns, Column column, uint2 (&v)[COUNT], int lane) {
        static_assert(BLOCK_COLS == 128, "of 2^7");
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
            if (column(j) >= columns) v[j] = make_uint2(0, 0);
        split(v, columns, [&](int j) { return column(j) >= 0 && (column(j) & ~127) < columns ? row : nullptr; },
              [&](int j) { return column(j) >> 7; }, lane);
    }
};

// ---- Weights --------------------------------------------------------------------------------------------------------

// A layout as integers has: Held, a lane's parameters of one tile (or of two, if WHOLE), read by hold<J>(held, params) from
// offset(lane) on; operands(codes, a), those of a tile's two products; and add<ROW>(part, held, rows, sum, unit): what the sum of
// products with codes and the sum of x itself make together, of row g or g + 8. (int4_lut16 has its own way of both.)
template <class L>
struct Integers;

struct FourBitIntegers {
    static __device__ __forceinline__ void operands(const uint4& codes, u32 (&a)[2][4]) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const u32 word = FourBit::word(codes, pair);
            a[pair / 2][pair % 2 * 2] = word & 0x0f0f0f0f;
            a[pair / 2][pair % 2 * 2 + 1] = word >> 4 & 0x0f0f0f0f;
        }
    }
    // `pair`: scale and offset.
    static __device__ __forceinline__ void add_pair(float& part, u32 pair, float sum, float unit) {
        part = fmaf(from_half((u16)pair), sum, part);
        part = fmaf(from_half((u16)(pair >> 16)), unit, part);
    }
};

// Where among a tile's groups, which are in order [g][subgroup][half][two rows], lies the one whose sums a lane gets first.
template <int SUBGROUPS>
__device__ __forceinline__ u32 group_of_sums(int lane) {
    const int first = lane % 4 / TOKENS % SPLITS * UNIT;
    return (lane / 4 * SUBGROUPS + first % 32 / (32 / SUBGROUPS)) * 2 + first / 32;
}

template <int G>
struct Integers<AffinePairs<G>> : FourBitIntegers {
    struct Held {
        uint2 pairs;
    };
    static __device__ __forceinline__ u32 offset(int lane) { return group_of_sums<AffinePairs<G>::SUBGROUPS>(lane) * 8; }
    template <int J>
    static __device__ __forceinline__ void hold(Held& held, u32 params) {
        held.pairs = read<uint2>(params + J * AffinePairs<G>::BYTES);
    }
    template <int ROW>
    static __device__ __forceinline__ void add(float& part, const Held& held, const NoRows&, float sum, float unit) {
        add_pair(part, ROW ? held.pairs.y : held.pairs.x, sum, unit);
    }
};

template <int G>
struct Integers<AffineWide<G>> : FourBitIntegers {
    struct Held {
        uint2 pairs;
    };
    static __device__ __forceinline__ u32 offset(int lane) { return lane / 4 * 8; }
    template <int J>
    static __device__ __forceinline__ void hold(Held& held, u32 params) {
        held.pairs = read<uint2>(params + J / AffineWide<G>::TILES * AffineWide<G>::BYTES);
    }
    template <int ROW>
    static __device__ __forceinline__ void add(float& part, const Held& held, const NoRows&, float sum, float unit) {
        add_pair(part, ROW ? held.pairs.y : held.pairs.x, sum, unit);
    }
};

template <int G>
struct Integers<AffineBytes<G>> : FourBitIntegers {
    using L = AffineBytes<G>;
    struct Held {
        u32 bytes;
    };
    static __device__ __forceinline__ u32 offset(int lane) { return group_of_sums<L::SUBGROUPS>(lane) * 4; }
    template <int J>
    static __device__ __forceinline__ void hold(Held& held, u32 params) {
        held.bytes = read<u32>(params + J * L::BYTES);
    }
    template <int ROW>
    static __device__ __forceinline__ void add(float& part, const Held& held, const typename L::Rows& rows, float sum, float unit) {
        const u32 bytes = permute(held.bytes, 0x64646464, ROW ? 0x4342 : 0x4140);
        add_pair(part, half_fma(half_sub(bytes, 0x64006400), rows.step[ROW], rows.base[ROW]), sum, unit);
    }
};

#ifdef LUT16_TABLES
template <>
struct Integers<Lut16> {
    struct Held {
        u32 tables;       // parameters of this lane's words
        u32 scales[SETS];  // of the groups whose sums this lane gets
    };
    static __device__ __forceinline__ u32 offset(int lane) { return group_of_sums<2>(lane) * 2; }
    template <int J>
    static __device__ __forceinline__ void hold(Held& held, u32 params) {
#pragma unroll
        for (int i = 0; i < SETS; ++i) held.scales[i] = read<u16>(params + J * Lut16::SCALE_BYTES + 2 * i);
    }
};
#endif

// ---- Products -------------------------------------------------------------------------------------------------------

struct Products : Digits {
    using Group = Integers<Layout>;

    // A lane's registers for two tiles of a strip, and of all strips that are multiplied at a time.
    struct OfStrip {
        uint4 codes[STAGE_TILES];
        typename Group::Held held[STAGE_TILES];
        u32 supers[2];
    };
    struct Pair {
        OfStrip strips[STRIPS];
    };

    u32 x, x_scales, x_units;  // of this lane's columns of the instruction, and of the sums it gets
    PairAt at;                 // what is this lane's of a stage
    u32 tables_of;             // int4_lut16: the parameters of its words
    u32 keep[2];               // whether this lane has x, in both halves of a tile
    u32 b[STAGE_TILES][4];     // x; zeros stay
    float sums[STRIPS][2];     // rows g and g + 8

    __device__ __forceinline__ Products(const PairAt& stage, u32 staged, int row_bytes, int tokens, int tiles, int lane)
        : at{keep_address(stage.codes + 16 * lane), keep_address(stage.params + Group::offset(lane)),
             keep_address(stage.supers + lane / 4 * 2)},
          tables_of(keep_address(stage.params + lane / 4 * 8 + lane % 4 / 2 * 4)) {
        // As an operand this lane holds columns of x for column n of the instruction; as a result it gets columns 2t and
        // 2t + 1. Column n is h (even) or l (odd) of a token, in the part of K that `keep` lets through.
        const int n = lane / 4, t = lane % 4;
        const int token = n / 2 % TOKENS, part = n / 2 / TOKENS % SPLITS, columns = tiles * TILE_COLS;
        x = staged + min(token, tokens - 1) * row_bytes + n % 2 * TILE_COLS + t * 16;
        const u32 row = staged + min(t % TOKENS, tokens - 1) * row_bytes;
        x_scales = row + scales_at(columns);
        x_units = row + units_at(columns) + t / TOKENS % SPLITS * 4;
        constexpr int PARTS_OF_HALF = UNITS > 1 ? UNITS / 2 : 1;
        if (VERSIONS == 2) {
            x += part / PARTS_OF_HALF * (2 * TILE_COLS);
            keep[0] = keep_address(t / (4 / PARTS_OF_HALF) == part % PARTS_OF_HALF);
        } else if (SPLITS > 1) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                keep[half] = keep_address(t / 2 == part % 2 && (SETS == 2 || part / 2 == half));
        }
#pragma unroll
        for (int j = 0; j < STAGE_TILES; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) b[j][i] = 0;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) sums[s][0] = sums[s][1] = 0.0f;
    }

    template <int J>
    __device__ __forceinline__ void load_tile(OfStrip& pair, u32 on) const {
        pair.codes[J] = read<uint4>(at.codes + on + J * Layout::CODE_BYTES);
        if (J == 0 || !WHOLE) Group::template hold<J>(pair.held[J], at.params + on);
#ifdef LUT16_TABLES
        pair.held[J].tables = read<u32>(tables_of + on + J * Lut16::SCALE_BYTES);
        if (J == 0) {
            pair.supers[0] = read<u16>(at.supers + on);
            pair.supers[1] = read<u16>(at.supers + on + 16);
        }
#endif
    }
    // The tiles that lie so far on.
    __device__ __forceinline__ void load(Pair& pair, u32 on, int) const {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s, on += BLOCK_STAGE_BYTES) {
            load_tile<0>(pair.strips[s], on);
            load_tile<1>(pair.strips[s], on);
        }
    }

    // Of tile j of two.
    __device__ __forceinline__ void load_x(int j, u32 tile) {
        const u32 from = x + (tile + j) * TILE_BYTES;
        u32(&v)[4] = b[j];
        if constexpr (TABLES) {
            read_if(keep[0], from, v[0], v[1]);
            read_if(keep[1], from + 8, v[2], v[3]);
        } else if constexpr (SPLITS > 2) {
            read_if(keep[0], from, v[0], v[1], v[2], v[3]);
        } else {
            const uint4 all = read<uint4>(from);
            v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
        }
    }

#ifdef LUT16_TABLES
    // L of one byte of parameters.
    template <int BYTE>
    static __device__ __forceinline__ int scale(u32 params) {
        return (int)(params << (26 - 8 * BYTE)) >> 26;
    }
    static __device__ __forceinline__ void prepare(int thread) { Lut16::prepare(thread, Lut16::SUM); }
    u32 tables_at = keep_address(shared_address(Lut16::half_tables()));

    template <int WORD>
    __device__ __forceinline__ void look_up(const uint4& words, u32 places, u32 (&one)[2], u32 (&other)[2]) const {
        const uint4 table = read<uint4>(tables_at + (WORD == 3 ? places >> 24 : permute(places, 0, 0x4440 + WORD)));
        const u32 codes = FourBit::word(words, WORD), upper = codes >> 16;
        one[0] = permute(table.x, table.y, codes);
        one[1] = permute(table.x, table.y, upper);
        other[0] = permute(table.z, table.w, inverted(codes));
        other[1] = permute(table.z, table.w, inverted(upper));
    }
    // ~x, as a product: the pipe of logic is the fuller one.
    u32 minus_one = opaque_minus_one();
    __device__ __forceinline__ u32 inverted(u32 x) const { return x * minus_one + minus_one; }
    // The sum of what both half tables give is the entry: both go through the tensor cores.
    template <int J>
    __device__ __forceinline__ void multiply_tile(const OfStrip& pair, int (&block)[4]) {
        const u32 places = pair.held[J].tables >> 2 & 0x30303030;
        u32 one[4][2], other[4][2];
        look_up<0>(pair.codes[J], places, one[0], other[0]);
        look_up<1>(pair.codes[J], places, one[1], other[1]);
        look_up<2>(pair.codes[J], places, one[2], other[2]);
        look_up<3>(pair.codes[J], places, one[3], other[3]);
        int d[SETS][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int(&s)[4] = d[half * (SETS - 1)];
            const int u = 2 * half, l = u + 1;
            tenpak::multiply<TABLES>(s, {one[u][0], one[l][0], one[u][1], one[l][1]}, b[J][u], b[J][l]);
            tenpak::multiply<TABLES>(s, {other[u][0], other[l][0], other[u][1], other[l][1]}, b[J][u], b[J][l]);
        }
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const int upper = scale<0>(pair.held[J].scales[set]), lower = scale<1>(pair.held[J].scales[set]);
            block[0] += d[set][0] * upper;
            block[1] += d[set][1] * upper;
            block[2] += d[set][2] * lower;
            block[3] += d[set][3] * lower;
        }
    }
    template <bool BOTH>
    __device__ __forceinline__ void multiply_pair(const OfStrip& pair, const Layout::Rows&, int, float s, float (&sums)[2]) {
        int block[4] = {};
        multiply_tile<0>(pair, block);
        if (BOTH) multiply_tile<1>(pair, block);
        sums[0] += from_half((u16)pair.supers[0]) * s * fmaf((float)block[0], 256.0f, (float)block[1]);
        sums[1] += from_half((u16)pair.supers[1]) * s * fmaf((float)block[2], 256.0f, (float)block[3]);
    }
#else
    static __device__ __forceinline__ void prepare(int) {}

    template <int J>
    __device__ __forceinline__ void multiply_tile(const OfStrip& pair, int (&d)[4]) const {
        u32 a[2][4];
        Group::operands(pair.codes[J], a);
        tenpak::multiply<TABLES>(d, a[0], b[J][0], b[J][1]);
        tenpak::multiply<TABLES>(d, a[1], b[J][2], b[J][3]);
    }
    template <int J>
    __device__ __forceinline__ void add_tile(float (&part)[2], const int (&d)[4], const OfStrip& pair, const Layout::Rows& rows,
                                             int tile) const {
        const float unit = read<float>(x_units + (WHOLE ? tile * 2 : (tile + J) * UNITS * 4));
        Group::template add<0>(part[0], pair.held[J], rows, (float)(d[0] * 256 + d[1]), unit);
        Group::template add<1>(part[1], pair.held[J], rows, (float)(d[2] * 256 + d[3]), unit);
    }
    template <bool BOTH>
    __device__ __forceinline__ void multiply_pair(const OfStrip& pair, const Layout::Rows& rows, int tile, float s, float (&sums)[2]) {
        int d[4] = {}, e[4] = {};
        multiply_tile<0>(pair, d);
        if (BOTH) {
            if (WHOLE) multiply_tile<1>(pair, d);
            else multiply_tile<1>(pair, e);
        }
        float part[2] = {0.0f, 0.0f};
        add_tile<0>(part, d, pair, rows, tile);
        if (BOTH && !WHOLE) add_tile<1>(part, e, pair, rows, tile);
        sums[0] = fmaf(s, part[0], sums[0]);
        sums[1] = fmaf(s, part[1], sums[1]);
    }
#endif

    template <bool BOTH>
    __device__ __forceinline__ void multiply_strips(const Pair& pair, const Layout::Rows (&rows)[STRIPS], int tile) {
        load_x(0, tile);
        if (BOTH) load_x(1, tile);
        const float s = read<float>(x_scales + tile * 2);
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) multiply_pair<BOTH>(pair.strips[i], rows[i], tile, s, sums[i]);
    }
    // Tiles `tile` (even) and tile + 1 of the slice's `count`.
    __device__ __forceinline__ void multiply(const Pair& pair, const Layout::Rows (&rows)[STRIPS], int tile, int count) {
        if (tile + 1 < count) multiply_strips<true>(pair, rows, tile);
        else if (tile < count) multiply_strips<false>(pair, rows, tile);
    }

    // This lane's: rows g and g + 8 of a strip.
    using Sum = float2;
    __device__ __forceinline__ Sum sum(int strip, int) const { return make_float2(sums[strip][0], sums[strip][1]); }
    // To y. Of a quad's lanes, each TOKENS-th has sums of one token, of other parts of K or the same.
    template <class Output>
    static __device__ __forceinline__ void store(const Output& out, const Sum& sum, int strip, int, int tokens, float low, float high,
                                                 int lane) {
        float upper = sum.x, lower = sum.y;
#pragma unroll
        for (int lanes = TOKENS; lanes < TOKENS * SPLITS; lanes *= 2) {
            upper += __shfl_xor_sync(~0u, upper, lanes);
            lower += __shfl_xor_sync(~0u, lower, lanes);
        }
        const int token = lane % TOKENS;
        if (token < tokens) out.store_rows(upper * low, lower * high, strip, token, lane % 4 / TOKENS, lane);
    }
};

}  // namespace tenpak
