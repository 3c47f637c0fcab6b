// Products of int4_lut16 with one or two tokens in the tensor cores' eight-bit instruction, mma.m16n8k32.
//
// What a table holds are eight-bit integers, and what a lane looks up are four at a time: as they are, they are operands.
// Making FP16 of them and scaling each would take twice the instructions, and those, not memory, would take the time.
//
// Activations become sixteen bits, x = (256 h + l) s with h and l of eight signed bits and one scale s for 128 columns
// of a token: their error is at most 2^-16 of the largest of those, less than what FP16 itself leaves. h and l of a token are
// two columns of the instruction's eight, and they are there once for each of four groups of 16 weights (two tokens:
// two groups), zero elsewhere, so that different lanes get the sums of different groups. A weight being d L T[t][q], those are
// multiplied by the integer L of their group, and every 128 columns added up in FP32. Nothing is rounded but x and
// those sums. (With four tokens a column has no room for groups, and FP16 is faster.) -DINTEGER: tokens, 1 or 2.
#pragma once
#include "tokens.cuh"

namespace tenpak {

constexpr int TOKENS = INTEGER;
static_assert(COLUMNS == 1 && (TOKENS == 1 || TOKENS == 2), "eight columns are h and l of four groups or two");

__device__ __forceinline__ void multiply(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Products {
    static constexpr int BLOCK_COLS = STAGE_TILES * TILE_COLS;  // columns of x that share a scale
    static constexpr float LARGEST = 32639.0f;                  // 256 * 127 + 127
    static constexpr int AT_ONCE = 4;                           // loads of x in flight

    struct Tile {
        uint4 codes;
        u32 tables;     // parameters of this lane's words
        u32 scales;     // of the groups whose sums this lane gets
        u16 supers[2];  // of rows g and g + 8
    };

    const u8* x;           // this lane's columns of the instruction
    const float* x_scales;
    u32 keep[2];           // 1 where they are not zero, for both halves of a tile: a factor, since the pipe of logic is busy
    int block[4];          // sums of up to two tiles: rows g and g + 8, of h and l
    float sums[2];         // rows g and g + 8

    // A row of x: for each tile 64 bytes of h and 64 of l, then the scales; rows begin 8 banks apart.
    static __device__ __forceinline__ int row_bytes(int tiles) {
        const int scales = (tiles + STAGE_TILES - 1) / STAGE_TILES * 4;
        return tiles * TILE_COLS * 2 + (scales + 95) / 128 * 128 + 32;
    }

    // Four neighbouring values; zeros beyond k.
    static __device__ __forceinline__ uint2 load(const XSlice& from, const u16* row, int column, bool vectors) {
        const int at = from.first_column + column, left = min(from.k - at, from.columns - column);
        uint2 v = make_uint2(0, 0);
        if (vectors) {
            if (left >= 4) v = __ldg(reinterpret_cast<const uint2*>(row + at));
        } else {
            // Rows that are not aligned: rare, so short rather than fast.
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
                const u32 next = i < left ? row[at + i] : 0;
                v.x = v.x >> 16 | v.y << 16;
                v.y = v.y >> 16 | next << 16;
            }
        }
        return v;
    }

    // One block's four columns of this lane as h and l.
    static __device__ __forceinline__ void split(u8* row, int scales_at, int block, const uint2& v, int columns, int lane) {
        const float values[4] = {widen((u16)v.x), widen((u16)(v.x >> 16)), widen((u16)v.y), widen((u16)(v.y >> 16))};
        // Compared as bits, NaN is the largest: it becomes the scale and so what is summed.
        u32 largest = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffff);
        largest = __reduce_max_sync(~0u, largest);
        const float most = __uint_as_float(largest), inverse = most > 1e-30f ? LARGEST / most : 0.0f;
        u32 high = 0, low = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int q = __float2int_rn(values[i] * inverse);
            low |= (q & 255) << (8 * i);
            high |= ((q + 128) >> 8 & 255) << (8 * i);
        }
        const int column = block * BLOCK_COLS + lane * 4;
        if (column < columns) {
            u8* to = row + column / TILE_COLS * (2 * TILE_COLS) + column % TILE_COLS;
            *reinterpret_cast<u32*>(to) = high;
            *reinterpret_cast<u32*>(to + TILE_COLS) = low;
        }
        if (lane == 0) *reinterpret_cast<float*>(row + scales_at + 4 * block) = most * (1.0f / LARGEST);
    }

    // x to shared memory. The first loads go out before the copies of weights and are made use of after those.
    struct Staging {
        XSlice from;
        bool vectors;
        int warp, lane, blocks;
        uint2 values[AT_ONCE];

        __device__ __forceinline__ explicit Staging(const XSlice& from)
            : from(from), vectors(from.aligned(8)), warp(threadIdx.x / LANES), lane(threadIdx.x % LANES),
              blocks((from.columns + BLOCK_COLS - 1) / BLOCK_COLS) {}
        __device__ __forceinline__ void load_from(int token, int first) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i)
                values[i] = load(from, from.x + token * from.stride, (first + i * WARPS) * BLOCK_COLS + lane * 4, vectors);
        }
        __device__ __forceinline__ void begin(u8*, int) { load_from(0, warp); }
        __device__ __forceinline__ void end(u8* to, int row_bytes) {
            int token = 0, first = warp;
            while (true) {
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (first + i * WARPS < blocks)
                        split(to + token * row_bytes, from.columns * 2, first + i * WARPS, values[i], from.columns, lane);
                first += AT_ONCE * WARPS;
                if (first >= blocks) {
                    first = warp;
                    if (++token == from.tokens) break;
                }
                load_from(token, first);
            }
        }
    };

    // As of halves.cuh; the lanes of a warp have a block's columns in order.
    static __device__ __forceinline__ void put(u8* row, int columns, int column, const uint2& v, int lane) {
        const int block = column >> 7;
        static_assert(BLOCK_COLS == 128, "of 2^7");
        if (block >= 0 && block * BLOCK_COLS < columns) split(row, columns * 2, block, v, columns, lane);
    }

    __device__ __forceinline__ Products(const u8* staged, int row_bytes, int tokens, int tiles, int lane) {
        // As an operand this lane holds columns of x for column n of the instruction; as a result it gets columns 2t and
        // 2t + 1. Column n is h (even) or l (odd) of a token, in the groups that `keep` lets through.
        const int n = lane / 4, t = lane % 4;
        const int token = TOKENS == 1 ? 0 : n / 2 % 2, sum_token = t % TOKENS;
        x = staged + min(token, tokens - 1) * row_bytes + n % 2 * TILE_COLS + t * 8 + (TOKENS == 1 ? n / 4 * 32 : 0);
        x_scales = reinterpret_cast<const float*>(staged + min(sum_token, tokens - 1) * row_bytes + tiles * (2 * TILE_COLS));
        if (TOKENS == 1) {
            const bool same = t / 2 == n / 2 % 2;
            keep[0] = same && n < 4;
            keep[1] = same && n >= 4;
        } else {
            keep[0] = keep[1] = t / 2 == n / 4;
        }
        // Unseen, they stay factors.
        asm("" : "+r"(keep[0]), "+r"(keep[1]));
    }

    __device__ __forceinline__ void clear() { sums[0] = sums[1] = 0.0f; }

    template <int J>
    static __device__ __forceinline__ Tile read_tile(const u8* stage, int lane) {
        const u8* params = stage + STAGE_TILES * Layout::CODE_BYTES;
        const u8* mine = params + J * Lut16::SCALE_BYTES + lane / 4 * 8;
        const int t = lane % 4;
        Tile tile;
        tile.codes = read<uint4>(stage + J * Layout::CODE_BYTES + 16 * lane);
        tile.tables = read<u32>(mine + t / 2 * 4);
        // One token: group t of the tile's four. Two: the same groups as the words'.
        tile.scales = TOKENS == 1 ? read<u16>(mine + t % 2 * 4 + t / 2 * 2) : tile.tables;
        if (J == 0) {
            const u8* supers = params + 2 * Lut16::SCALE_BYTES + lane / 4 * 2;
            tile.supers[0] = read<u16>(supers);
            tile.supers[1] = read<u16>(supers + 16);
        }
        return tile;
    }

    // L of one byte of parameters.
    template <int BYTE>
    static __device__ __forceinline__ int scale(u32 params) {
        return (int)(params << (26 - 8 * BYTE)) >> 26;
    }
    __device__ __forceinline__ void add_groups(const int (&d)[4], int upper, int lower) {
        block[0] += d[0] * upper;
        block[1] += d[1] * upper;
        block[2] += d[2] * lower;
        block[3] += d[3] * lower;
    }

    // The sum of what both half tables give is the entry: both go through the tensor cores.
    template <int HALF>
    static __device__ __forceinline__ void multiply_half(int (&d)[4], const u32 (&one)[4][2], const u32 (&other)[4][2], const uint2& b,
                                                         u32 keep) {
        constexpr int UPPER = 2 * HALF, LOWER = 2 * HALF + 1;
        const u32 x = b.x * keep, y = b.y * keep;
        tenpak::multiply(d, {one[UPPER][0], one[LOWER][0], one[UPPER][1], one[LOWER][1]}, x, y);
        tenpak::multiply(d, {other[UPPER][0], other[LOWER][0], other[UPPER][1], other[LOWER][1]}, x, y);
    }

    __device__ __forceinline__ void multiply_tile(const Tile& tile, int offset) {
        u32 one[4][2], other[4][2];
        Lut16::look_up<0>(tile.codes, tile.tables, one[0], other[0]);
        Lut16::look_up<1>(tile.codes, tile.tables, one[1], other[1]);
        Lut16::look_up<2>(tile.codes, tile.tables, one[2], other[2]);
        Lut16::look_up<3>(tile.codes, tile.tables, one[3], other[3]);
        int d[4] = {};
        multiply_half<0>(d, one, other, read<uint2>(x + offset), keep[0]);
        if constexpr (TOKENS == 1) {
            multiply_half<1>(d, one, other, read<uint2>(x + offset), keep[1]);
            add_groups(d, scale<0>(tile.scales), scale<1>(tile.scales));
        } else {
            add_groups(d, scale<0>(tile.scales), scale<1>(tile.scales));
            int e[4] = {};
            multiply_half<1>(e, one, other, read<uint2>(x + offset + TILE_COLS / 2), keep[1]);
            add_groups(e, scale<2>(tile.scales), scale<3>(tile.scales));
        }
    }

    __device__ __forceinline__ void multiply(const Tile& first, const Tile& second, const Layout::Rows&, int tile, int count) {
        if (tile >= count) return;
#pragma unroll
        for (int i = 0; i < 4; ++i) block[i] = 0;
        multiply_tile(first, tile * (2 * TILE_COLS));
        if (tile + 1 < count) multiply_tile(second, (tile + 1) * (2 * TILE_COLS));
        const float s = x_scales[tile / STAGE_TILES];
        sums[0] += from_half(first.supers[0]) * s * fmaf((float)block[0], 256.0f, (float)block[1]);
        sums[1] += from_half(first.supers[1]) * s * fmaf((float)block[2], 256.0f, (float)block[3]);
    }

    // As of halves.cuh: rows g and g + 8 times tokens 2t and 2t + 1.
    __device__ __forceinline__ float4 sum(int, int lane) const {
        float upper = sums[0], lower = sums[1];
#pragma unroll
        for (int lanes = TOKENS; lanes < 4; lanes *= 2) {
            upper += __shfl_xor_sync(~0u, upper, lanes);
            lower += __shfl_xor_sync(~0u, lower, lanes);
        }
        const int even = lane / 4 * 4 + lane % 2 * 2;
        return make_float4(__shfl_sync(~0u, upper, even), __shfl_sync(~0u, upper, even + 1),
                           __shfl_sync(~0u, lower, even), __shfl_sync(~0u, lower, even + 1));
    }
};

}  // namespace tenpak
