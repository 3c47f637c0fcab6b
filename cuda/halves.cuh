// Products of weights and tokens in the tensor cores' FP16 or BF16 instruction, mma.m16n8k16, for few tokens.
//
// Weights become the type of the activations, and tokens are the instruction's 8 columns, so that eight cost what one
// does. -DCOLUMNS, tiles of 8 tokens.
#pragma once
#include "tokens.cuh"

namespace tenpak {

constexpr int TOKENS = 8 * COLUMNS;
// Independent sums for the two halves of a tile: a chain of dependent products would be all latency.
constexpr int CHAINS = COLUMNS <= 2 ? 2 : 1;

struct Products {
    // A lane's registers for two tiles.
    struct Pair {
        Layout::Tile tiles[STRIPS][STAGE_TILES];
    };

    PairAt at;
    u32 x[COLUMNS];  // this lane's tokens, from its first columns on
    float sums[STRIPS][CHAINS][COLUMNS][4];

    // A row of x in shared memory is longer by 64 bytes: eight lanes that read two rows then meet all 32 banks.
    static __device__ __forceinline__ int row_bytes(int tiles) { return tiles * TILE_COLS * 2 + 64; }

    // x to shared memory: by asynchronous copies, which go first, so that they are there first; or, where weights are on
    // their way before x is written, through registers, so that nobody waits for those weights.
    struct Staging {
        static constexpr int AT_ONCE = 8;  // loads of x in flight
        XSlice from;

        __device__ __forceinline__ explicit Staging(const XSlice& from) : from(from) {}
        __device__ __forceinline__ void begin(u8* to, int row_bytes) {
            const bool vectors = from.aligned(16);
            for (int row = 0; row < from.tokens; ++row) {
                const u16* values = from.x + row * from.stride + from.first_column;
                u8* line = to + row * row_bytes;
                if (vectors && OVERLAP) {
                    for (int first = threadIdx.x * 8; first < from.columns; first += AT_ONCE * THREADS * 8) {
                        uint4 v[AT_ONCE];
#pragma unroll
                        for (int i = 0; i < AT_ONCE; ++i) {
                            const int c = first + i * THREADS * 8;
                            v[i] = make_uint4(0, 0, 0, 0);
                            if (c < from.columns && from.first_column + c < from.k) v[i] = __ldcg(reinterpret_cast<const uint4*>(values + c));
                        }
#pragma unroll
                        for (int i = 0; i < AT_ONCE; ++i) {
                            const int c = first + i * THREADS * 8;
                            if (c < from.columns) *reinterpret_cast<uint4*>(line + 2 * c) = v[i];
                        }
                    }
                } else if (vectors) {
                    for (int c = threadIdx.x * 8; c < from.columns; c += THREADS * 8) {
                        const int bytes = from.first_column + c < from.k ? 16 : 0;
                        copy_or_zeros(shared_address(line + 2 * c), bytes ? values + c : from.x, bytes);
                    }
                } else {
                    for (int c = threadIdx.x; c < from.columns; c += THREADS)
                        reinterpret_cast<u16*>(line)[c] = from.first_column + c < from.k ? values[c] : (u16)0;
                }
            }
        }
        __device__ __forceinline__ void end(u8*, int) {}
    };

    // COUNT times four neighbouring values of a token, from column(j) of the slice's on.
    template <int COUNT, class Column>
    static __device__ __forceinline__ void put(u8* row, int columns, Column column, uint2 (&v)[COUNT], int) {
#pragma unroll
        for (int j = 0; j < COUNT; ++j)
            if ((u32)column(j) < (u32)columns) *reinterpret_cast<uint2*>(row + 2 * column(j)) = v[j];
    }

    __device__ __forceinline__ Products(const PairAt& at, u32 staged, int row_bytes, int tokens, int, int lane) : at(at) {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            x[column] = staged + min(column * 8 + lane / 4, tokens - 1) * row_bytes + lane % 4 * 16;
    }
#if BOXED
    // x in boxes of 64 columns, swizzled by 128 bytes. Column g of a product is token g / 2 + g % 2 * 4, so that eight lanes read both
    // halves of lines.
    __device__ __forceinline__ Products(const PairAt& at, u32 staged, int lane) : at(at) {
        const int token = lane / 8 + lane / 4 % 2 * 4;
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
            x[column] = staged + (column * 8 + token) * (TILE_COLS * 2) + (lane % 4 ^ token) * 16;
    }
#endif
    static __device__ __forceinline__ void prepare(int thread) {
#ifdef LUT16_TABLES
        Lut16::prepare(thread, Lut16::BIASED_XOR);
#endif
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s)
#pragma unroll
            for (int chain = 0; chain < CHAINS; ++chain)
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[s][chain][column][i] = 0.0f;
    }

    // The tiles that lie so far on.
    __device__ __forceinline__ void load(Pair& pair, u32 on, int lane) const {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s, on += BLOCK_STAGE_BYTES) {
            pair.tiles[s][0] = Layout::template tile<0>(at.codes + on, at.params + on, at.supers + on, lane);
            pair.tiles[s][1] = Layout::template tile<1>(at.codes + Layout::CODE_BYTES + on, at.params + on, at.supers + on, lane);
        }
    }

    // Half a tile times its columns of x, for all tokens.
    template <int J, int HALF>
    __device__ __forceinline__ void multiply_half(const Pair& pair, const Layout::Rows (&rows)[STRIPS], int offset) {
        uint4 b[COLUMNS];
#pragma unroll
#if BOXED
        for (int column = 0; column < COLUMNS; ++column) b[column] = read<uint4>((x[column] ^ 64 * HALF) + offset + J * (TOKENS * TILE_COLS * 2));
#else
        for (int column = 0; column < COLUMNS; ++column) b[column] = read<uint4>(x[column] + offset + J * (TILE_COLS * 2) + 64 * HALF);
#endif
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            u32 a[2][4];
            fragments<HALF>(pair.tiles[s][J], rows[s], a);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                tenpak::multiply(sums[s][HALF % CHAINS][column], a[0], b[column].x, b[column].y);
                tenpak::multiply(sums[s][HALF % CHAINS][column], a[1], b[column].z, b[column].w);
            }
        }
    }

    // Tiles `tile` (even) and tile + 1 of the slice's `count`.
    __device__ __forceinline__ void multiply(const Pair& pair, const Layout::Rows (&rows)[STRIPS], int tile, int count) {
        const int offset = tile * (TILE_COLS * 2);
        if (tile < count) {
            multiply_half<0, 0>(pair, rows, offset);
            multiply_half<0, 1>(pair, rows, offset);
        }
        if (tile + 1 < count) {
            multiply_half<1, 0>(pair, rows, offset);
            multiply_half<1, 1>(pair, rows, offset);
        }
    }

    // One or two tiles times columns of x that lie so far on.
    __device__ __forceinline__ void multiply_at(const Pair& pair, const Layout::Rows (&rows)[STRIPS], int on, bool both) {
        multiply_half<0, 0>(pair, rows, on);
        multiply_half<0, 1>(pair, rows, on);
        if (both) {
            multiply_half<1, 0>(pair, rows, on);
            multiply_half<1, 1>(pair, rows, on);
        }
    }

    // Rows g and g + 8 of a strip times tokens 2t and 2t + 1 of a column.
    using Sum = float4;
    __device__ __forceinline__ Sum sum(int part, int) const {
        const float(&s)[4] = sums[part / COLUMNS][0][part % COLUMNS];
        float4 total = make_float4(s[0], s[1], s[2], s[3]);
        if (CHAINS == 2) {
            const float(&other)[4] = sums[part / COLUMNS][CHAINS - 1][part % COLUMNS];
            add(total, make_float4(other[0], other[1], other[2], other[3]));
        }
        return total;
    }
    template <class Output>
    static __device__ __forceinline__ void store(const Output& out, const Sum& sum, int strip, int token, int tokens, float low,
                                                 float high, int lane) {
        out.store(sum, strip, token, tokens, low, high, lane);
    }
};

}  // namespace tenpak
