// How a new token comes into the cache: normed and turned, as FP16 into the ring, and by tiles, once they are no longer
// among the newest, as codes.
//
// By WARPS warps of a block. -DBITS (of codes: 4, 8; or 16), -DBF16.
#pragma once
#include "cache.cuh"

namespace tenpak {

using Codes = Record<BITS>;
using Halves = Record<16>;
constexpr int THREADS = WARPS * LANES;
constexpr float HALF_MAX = 65504.0f;

// Rows of tokens of one sequence and head.
struct Rows {
    u16* first;
    long long step;
    __device__ __forceinline__ u16* operator[](int token) const { return first + token * step; }
};

struct Rotary {
    const float* cosines;  // [positions, half], and as many sines behind them; null where nothing turns
    int half, positions;
    float eps;
};

// Element lane + 32 j of a token's vector; zeros beyond the head.
__device__ __forceinline__ void load(u16 (&raw)[PER_LANE], const u16* at, int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int d = lane + LANES * j;
        raw[j] = d < DIM ? at[d] : (u16)0;
    }
}

// Such a vector, normed and turned, if asked, in FP32; `line` is the warp's own.
__device__ __forceinline__ void prepare(float (&x)[PER_LANE], const u16 (&raw)[PER_LANE], const u16* norm, const Rotary& rotary,
                                        int position, float* line, int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) x[j] = from_activation<BF16>(raw[j]);
    if (norm) {
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) squares += x[j] * x[j];
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) squares += exchange(squares, mask);
        const float factor = 1.0f / sqrtf(squares / DIM + rotary.eps);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int d = lane + LANES * j;
            if (d < DIM) x[j] *= factor * from_activation<BF16>(norm[d]);
        }
    }
    if (rotary.cosines) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) line[lane + LANES * j] = x[j];
        __syncwarp();
        const float* cosines = rotary.cosines + (u64)min(position, rotary.positions - 1) * rotary.half;
        const float* sines = cosines + (u64)rotary.positions * rotary.half;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int d = lane + LANES * j, half = rotary.half;
            if (d < half) x[j] = x[j] * cosines[d] - line[d + half] * sines[d];
            else if (d < 2 * half) x[j] = x[j] * cosines[d - half] + line[d - half] * sines[d - half];
        }
    }
}

__device__ __forceinline__ float bounded(float x) { return fminf(fmaxf(x, -HALF_MAX), HALF_MAX); }

#if BITS != 16
// Codes of a token's vector, and its (scale, offset). The rule is tenpak.decoder.kv's `rounded`.
__device__ __forceinline__ u32 quantise(const float (&x)[PER_LANE], u8* codes, int lane) {
    float low = HALF_MAX, high = -HALF_MAX;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        if (lane + LANES * j < DIM) {
            low = fminf(low, x[j]);
            high = fmaxf(high, x[j]);
        }
    }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) {
        low = fminf(low, exchange(low, mask));
        high = fmaxf(high, exchange(high, mask));
    }
    constexpr float LEVELS = (1 << BITS) - 1, LEAST = -(1 << (BITS - 1));
    const float scale = from_half(to_half((high - low) / LEVELS));
    // Codes are centred, so the middle of the range is half a step above code 0.
    const float offset = from_half(to_half((high + low) / 2 + scale / 2)), divisor = scale > 0.0f ? scale : 1.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int d = lane + LANES * j;
        if (d < DIM) {
            codes[d] = (u8)(int)(fminf(fmaxf(rintf((x[j] - offset) / divisor), LEAST), -LEAST - 1) - LEAST);
        }
    }
    return to_half(scale) | (u32)to_half(offset) << 16;
}

// Word `w` of a tile's codes, from codes [TILE][DIM].
__device__ __forceinline__ u32 packed(const u8* codes, int w, bool value) {
    constexpr int LANE_BYTES = Codes::JOIN * Codes::PIECE;
    const int byte = w * 4, chunk = byte / (LANES * LANE_BYTES), lane = byte / LANE_BYTES % LANES;
    const int step = chunk * Codes::JOIN + byte % LANE_BYTES / Codes::PIECE, inside = byte % Codes::PIECE;
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 32 / BITS; ++i) {
        const int index = BITS == 8 ? inside + i : i < 4 ? 2 * i : 2 * (i - 4) + 1;
        const int row = lane / 4 + index / 2 % 2 * 8, column = lane % 4 * 2 + index % 2 + index / 4 * 8;
        const int token = value ? column : row, dim = step * 16 + (value ? row : column);
        word |= (u32)codes[token * DIM + dim] << (BITS * i);
    }
    return word;
}
#endif

// The tiles of one sequence and kv head that new tokens change: tokens from `start` to below `total`.
struct Newest {
    Rows keys, values;
    const u16* k_norm;
    Rotary turn;
    int start, total, capacity, ring_tiles;
    u8 *store, *halves;  // this head's tiles of codes, and its ring
    bool in_place;       // whether keys are written back, normed and turned

    // A new token's vector, loaded before, as the cache takes it.
    __device__ __forceinline__ void take(float (&x)[PER_LANE], const u16 (&raw)[PER_LANE], bool value, int token, float* line,
                                         int lane) const {
        const Rotary still = {nullptr, 0, 0, 0.0f};
        if (value) {
            prepare(x, raw, nullptr, still, token, line, lane);
        } else {
            prepare(x, raw, k_norm, turn, token, line, lane);
            if (in_place && (k_norm || turn.cosines)) {
#pragma unroll
                for (int j = 0; j < PER_LANE; ++j) {
                    const int d = lane + LANES * j;
                    if (d < DIM) keys[token - start][d] = to_activation<BF16>(x[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) x[j] = bounded(x[j]);
#if BITS == 4
        if (!value) hadamard(x, lane);
#endif
    }

    // A new token's key or value, loaded before, into the ring.
    __device__ __forceinline__ void put(const u16 (&raw)[PER_LANE], bool value, int token, float* line, int lane) const {
        float x[PER_LANE];
        take(x, raw, value, token, line, lane);
        u8* to = halves + (u64)(token / TILE % ring_tiles) * Halves::BYTES + value * Halves::CODES;
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int d = lane + LANES * j;
            if (d < DIM) *(u16*)(to + half_at(value, token % TILE, d)) = to_half(x[j]);
        }
    }

    // A tile's new tokens into the ring.
    __device__ __forceinline__ void keep(int tile, float* line, int warp, int lane) const {
        for (int row = warp; row < TILE; row += WARPS) {
            const int token = tile * TILE + row;
            if (token < start || token >= total || tile >= capacity) continue;
            u16 raw[2][PER_LANE];
            load(raw[0], keys[token - start], lane);
            load(raw[1], values[token - start], lane);
            put(raw[0], false, token, line, lane);
            put(raw[1], true, token, line, lane);
        }
    }

#if BITS != 16
    // Shared memory in which a tile is quantised.
    struct Settling {
        u8 codes[2][TILE * DIM];
        u32 params[2][TILE];
    };
    // A tile of tokens, in the ring or new, to codes; by all threads, which then all may read it.
    __device__ __forceinline__ void settle(int tile, Settling& room, float* line, int warp, int lane) const {
        for (int row = warp; row < TILE; row += WARPS) {
            const int token = tile * TILE + row;
            for (int value = 0; value < 2; ++value) {
                float x[PER_LANE];
                if (token >= start) {
                    u16 raw[PER_LANE];
                    load(raw, value ? values[token - start] : keys[token - start], lane);
                    take(x, raw, value, token, line, lane);
                } else {
                    const u8* from = halves + (u64)(tile % ring_tiles) * Halves::BYTES + value * Halves::CODES;
#pragma unroll
                    for (int j = 0; j < PER_LANE; ++j) {
                        const int d = lane + LANES * j;
                        x[j] = d < DIM ? from_half(*(const u16*)(from + half_at(value, row, d))) : 0.0f;
                    }
                }
                const u32 params = quantise(x, room.codes[value] + row * DIM, lane);
                if (lane == 0) room.params[value][row] = params;
            }
        }
        __syncthreads();
        if (tile < capacity) {
            u32* to = (u32*)(store + (u64)tile * Codes::BYTES);
            constexpr int WORDS = Codes::CODES / 4;
            for (int w = threadIdx.x; w < 2 * WORDS; w += THREADS) {
                const bool value = w >= WORDS;
                to[w] = packed(room.codes[value], value ? w - WORDS : w, value);
            }
            if (threadIdx.x < 2 * TILE) to[2 * WORDS + threadIdx.x] = room.params[threadIdx.x / TILE][threadIdx.x % TILE];
        }
        __syncthreads();
    }
#endif
};

}  // namespace tenpak
