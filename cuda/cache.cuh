// How keys and values lie in the cache: tiles of 16 tokens of one head, in the order in which tensor cores take them.
//
// A tile has its keys' codes, its values' codes, and, if they are codes, (scale, offset) of each token's key and of each
// token's value, FP16 pairs. Keys are the 16 rows of a product with queries, values (transposed) the 16 rows of one with
// probabilities: a lane's eight elements of a step lie together. The newest tokens of a sequence wait as FP16 tiles in
// a ring until a tile is quantised: `quantised` says which, from the length alone. -DDIM (of a head), -DRECENT.
#pragma once
#include "warp.cuh"

namespace tenpak {

constexpr int TILE = 16;
constexpr int STEPS = DIM / 16;
static_assert(DIM % 16 == 0 && DIM <= 256 && RECENT % TILE == 0, "shapes that tiles have");

// Tokens at the start of a sequence of that length that are codes.
__device__ __forceinline__ int quantised(int length) { return length <= RECENT ? 0 : (length - RECENT) / TILE * TILE; }

template <int B>  // bits of an element
struct Record {
    static constexpr int PIECE = B;  // bytes of a lane's eight elements
    // Steps whose pieces lie together, so that a lane loads 16 bytes at once where the head is a multiple of that.
    static constexpr int JOIN = B == 16 ? 1 : B == 8 ? (STEPS % 2 ? 1 : 2) : STEPS % 4 == 0 ? 4 : STEPS % 2 ? 1 : 2;
    static constexpr int CODES = TILE * DIM * B / 8;
    static constexpr int PARAMS = 2 * CODES;
    static constexpr int BYTES = PARAMS + (B == 16 ? 0 : 2 * TILE * 4);
    static_assert(CODES % 16 == 0, "tiles are copied 16 bytes at a time");

    __device__ __forceinline__ static int piece(int step, int lane) {
        return ((step / JOIN) * LANES + lane) * JOIN * PIECE + step % JOIN * PIECE;
    }
};

// The place of an element in a tile's product: `row` of 16, `column` of 16. Element 2r + h of a lane is half h of word r.
struct Element {
    int lane, index;
    __device__ __forceinline__ Element(int row, int column)
        : lane(row % 8 * 4 + column % 8 / 2), index(2 * (row / 8 + column / 8 * 2) + column % 2) {}
};

// The byte of a half of FP16 keys or values.
__device__ __forceinline__ int half_at(bool value, int token, int dim) {
    const Element at = value ? Element(dim % 16, token) : Element(token, dim % 16);
    return Record<16>::piece(dim / 16, at.lane) + at.index * 2;
}

// The nibble of element 2r + h: masks then bring the two halves of word r into place at once.
__device__ __forceinline__ int nibble(int index) { return index / 2 + index % 2 * 4; }

// What a code as a tensor core sees it must be multiplied with: codes are not converted at all, since as the bits of a half
// they are subnormal numbers, multiples of 2^-24, which tensor cores multiply exactly. Those of four bits in rows 8 to 15
// lie four bits higher.
template <int B>
__device__ __forceinline__ constexpr float code_unit(bool upper_rows) {
    return B == 16 ? 1.0f : B == 4 && upper_rows ? 1048576.0f : 16777216.0f;
}

// A lane's eight elements of a step: halves, or codes (from 0 on) in units of 1 / code_unit.
template <int B>
__device__ __forceinline__ void unpack(const u32* words, u32 (&halves)[4]) {
    if constexpr (B == 16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) halves[i] = words[i];
    } else if constexpr (B == 8) {
        halves[0] = bytes_as_halves<false>(words[0]);
        halves[1] = bytes_as_halves<true>(words[0]);
        halves[2] = bytes_as_halves<false>(words[1]);
        halves[3] = bytes_as_halves<true>(words[1]);
    } else {
        constexpr u32 LOW = 0x000f000fu, HIGH = 0x00f000f0u;
        const u32 x = words[0], y = x >> 8;
        halves[0] = x & LOW;
        halves[1] = x & HIGH;
        halves[2] = y & LOW;
        halves[3] = y & HIGH;
    }
}

// x[j] is element lane + 32 j of a vector of DIM: multiplied by the orthonormal Hadamard matrix of the largest power of two
// that divides DIM, block by block.
constexpr int PER_LANE = (DIM + 31) / 32;
constexpr int BLOCK = DIM & -DIM;
__device__ __forceinline__ void hadamard(float (&x)[PER_LANE], int lane) {
#pragma unroll
    for (int bit = 1; bit < 32 && bit < BLOCK; bit *= 2) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const float other = exchange(x[j], bit);
            x[j] = lane & bit ? other - x[j] : other + x[j];
        }
    }
#pragma unroll
    for (int bit = 1; bit * 32 < BLOCK; bit *= 2) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            if ((j & bit) == 0) {
                const float a = x[j], b = x[j | bit];
                x[j] = a + b;
                x[j | bit] = a - b;
            }
        }
    }
    constexpr float NORM = BLOCK == 16 ? 0.25f : BLOCK == 32 ? 0.17677669529663687f : BLOCK == 64 ? 0.125f
                         : BLOCK == 128 ? 0.08838834764831845f : 0.0625f;
    static_assert(BLOCK >= 16 && BLOCK <= 256, "the norms above");
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) x[j] *= NORM;
}

}  // namespace tenpak
