// Products of int4_lut16 with up to four tokens in the tensor cores' eight-bit instruction, mma.m16n8k32.
//
// What a table holds are eight-bit integers, and what a lane looks up are four at a time: as they are, they are operands.
// Making FP16 of them and scaling each would take twice the instructions, and those, not memory, would take the time.
//
// Activations become sixteen bits, x = (256 h + l) s with h and l of eight signed bits and one scale s for 128 columns
// of a token: their error is at most 2^-16 of the largest of those, less than what FP16 itself leaves. h and l of a token are
// two columns of the instruction, so there is room for four tokens. With fewer, a token's columns are there once for
// each group of 16 weights, zero elsewhere, so that the sums of two or four groups come from one instruction, in
// different lanes. A weight being d L T[t][q], sums are multiplied by the integer L of their group, and every 128
// columns added up in FP32. Nothing is rounded but x and those sums. -DINTEGER: tokens, 1, 2 or 4.
#pragma once
#include "tokens.cuh"

namespace tenpak {

constexpr int TOKENS = INTEGER;
static_assert(COLUMNS == 1 && (TOKENS == 1 || TOKENS == 2 || TOKENS == 4), "two columns of eight for each token");

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
        u32 tables;  // parameters of this lane's words
        uint2 scales;  // of the groups whose sums this lane gets
        u16 supers[2];  // of rows g and g + 8
    };

    const u8* x;           // this lane's columns of the instruction
    const float* x_scales;
    u32 keep[2];           // 1 where they are not zero, for products that spare the pipe of logic: of the first and the second half (1), of all (2), of two groups (4)
    int block[4];          // sums of up to two tiles: rows g and g + 8, of h and l
    float sums[2];         // rows g and g + 8

    // A row of x: for each tile 64 bytes of h and 64 of l, then the scales; rows begin 8 banks apart.
    static __device__ __forceinline__ int row_bytes(int tiles) {
        const int scales = (tiles + STAGE_TILES - 1) / STAGE_TILES * 4;
        return tiles * TILE_COLS * 2 + (scales + 95) / 128 * 128 + 32;
    }

    // Four neighbouring values; zeros beyond k.
    static __device__ __forceinline__ float4 load(const XSlice& from, const u16* row, int column, bool vectors) {
        u16 v[4] = {0, 0, 0, 0};
        const int at = from.first_column + column, end = min(from.k, from.first_column + from.columns);
        if (vectors && at + 4 <= end) {
            const uint2 both = *reinterpret_cast<const uint2*>(row + at);
            return make_float4(widen((u16)both.x), widen((u16)(both.x >> 16)), widen((u16)both.y), widen((u16)(both.y >> 16)));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (at + i < end) v[i] = row[at + i];
        return make_float4(widen(v[0]), widen(v[1]), widen(v[2]), widen(v[3]));
    }

    // One block's four columns of this lane as h and l.
    static __device__ __forceinline__ void split(u8* row, int scales_at, int block, const float4& v, int columns, int lane) {
        const float values[4] = {v.x, v.y, v.z, v.w};
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

    static __device__ __forceinline__ void stage(u8* to, int row_bytes, const XSlice& from) {
        const int warp = threadIdx.x / LANES, lane = threadIdx.x % LANES;
        const int blocks = (from.columns + BLOCK_COLS - 1) / BLOCK_COLS;
        const bool vectors = from.aligned(8);
        for (int token = 0; token < from.tokens; ++token) {
            for (int first = warp; first < blocks; first += AT_ONCE * WARPS) {
                float4 v[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    v[i] = load(from, from.x + token * from.stride, (first + i * WARPS) * BLOCK_COLS + lane * 4, vectors);
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (first + i * WARPS < blocks)
                        split(to + token * row_bytes, from.columns * 2, first + i * WARPS, v[i], from.columns, lane);
            }
        }
    }

    __device__ __forceinline__ Products(const u8* staged, int row_bytes, int tokens, int tiles, int lane) {
        // As an operand this lane holds columns of x for column n of the instruction; as a result it gets columns 2t and
        // 2t + 1. Column n is h (even) or l (odd) of a token, in the groups that `keep` lets through.
        const int n = lane / 4, t = lane % 4;
        const int token = TOKENS == 1 ? 0 : TOKENS == 2 ? n / 2 % 2 : n / 2;
        const int sum_token = t % TOKENS;
        x = staged + min(token, tokens - 1) * row_bytes + n % 2 * TILE_COLS + t * 8 + (TOKENS == 1 ? n / 4 * 32 : 0);
        x_scales = reinterpret_cast<const float*>(staged + min(sum_token, tokens - 1) * row_bytes + tiles * (2 * TILE_COLS));
        const bool same = t / 2 == n / 2 % 2;
        if (TOKENS == 1) {
            keep[0] = same && n < 4;
            keep[1] = same && n >= 4;
        } else if (TOKENS == 2) {
            keep[0] = keep[1] = t / 2 == n / 4;
        } else {
            keep[0] = t < 2;
            keep[1] = t >= 2;
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
        if (TOKENS == 4) {
            tile.scales = read<uint2>(mine);
            tile.tables = t / 2 ? tile.scales.y : tile.scales.x;
        } else {
            tile.tables = read<u32>(mine + t / 2 * 4);
            // One token: group t of the tile's four. Two: the same groups as the words'.
            tile.scales.x = TOKENS == 1 ? read<u16>(mine + t % 2 * 4 + t / 2 * 2) : tile.tables;
        }
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
    __device__ __forceinline__ void add_group(const int (&d)[4], int upper, int lower) {
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
        if constexpr (TOKENS == 1) {
            const uint2 b = read<uint2>(x + offset);
            int d[4] = {};
            multiply_half<0>(d, one, other, b, keep[0]);
            multiply_half<1>(d, one, other, b, keep[1]);
            add_group(d, scale<0>(tile.scales.x), scale<1>(tile.scales.x));
        } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 b = read<uint2>(x + offset + 32 * half);
#pragma unroll
                for (int i = 0; i < TOKENS / 2; ++i) {
                    const u32 params = i ? tile.scales.y : tile.scales.x;
                    int d[4] = {};
                    if (half) multiply_half<1>(d, one, other, b, keep[i]);
                    else multiply_half<0>(d, one, other, b, keep[i]);
                    if (half) add_group(d, scale<2>(params), scale<3>(params));
                    else add_group(d, scale<0>(params), scale<1>(params));
                }
            }
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
