// Puts new tokens into the cache: per-head norm and rotation of queries and keys in place, keys and values as FP16 into
// the ring, and tiles that are no longer among the newest into codes.
//
// Grid: x tiles of new tokens, y kv heads and then query heads, z sequences; WARPS warps. Of a kv head, block 0 quantises
// the tiles that are in the ring and then writes the newest there, since both may take the same places; the other blocks
// quantise tiles that are all new. -DBITS (of codes: 4, 8; or 16), -DBF16, -DDIM, -DRECENT.
#include "cache.cuh"
#include "overlap.cuh"

namespace tenpak {

using Codes = Record<BITS>;
using Halves = Record<16>;
constexpr int WARPS = 4;
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

// A new token's vector, lane + 32 j; normed and turned, if asked, also where it came from.
__device__ __forceinline__ void prepare(float (&x)[PER_LANE], u16* at, const u16* norm, const Rotary& rotary, int position,
                                        float* line, int lane) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
        const int d = lane + LANES * j;
        x[j] = d < DIM ? from_activation<BF16>(at[d]) : 0.0f;
    }
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
    if (norm || rotary.cosines) {
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int d = lane + LANES * j;
            if (d < DIM) at[d] = to_activation<BF16>(x[j]);
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

}  // namespace tenpak

// q, k, v: new tokens, FP16 or BF16, element (sequence, token, head, channel) at sequence · *_sequence + token · *_token +
// head · DIM + channel.
// counts: how many of the new tokens of a sequence are real, or null for all. rotary: cosines and sines, FP32
// [2, positions, half], or null. norms: weights [DIM] of the activations' type, or null. lengths: tokens before these.
extern "C" __global__ void __launch_bounds__(tenpak::THREADS)
    append(u16* q, u16* k, u16* v, u8* store, u8* ring, const int* lengths, const int* counts, const float* rotary,
           const u16* q_norm, const u16* k_norm, long long q_sequence, long long q_token, long long k_sequence,
           long long k_token, long long v_sequence, long long v_token, int tokens, int heads, int kv_heads, int capacity,
           int ring_tiles, int half, int positions, float eps) {
    using namespace tenpak;
    __shared__ float lines[WARPS][PER_LANE * LANES];
    let_next_begin();
    wait_for_previous();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, sequence = blockIdx.z;
    const int start = lengths[sequence], count = counts ? min(max(counts[sequence], 0), tokens) : tokens;
    const int total = start + count;
    const Rotary turn = {rotary, half, positions, eps};
    float x[PER_LANE];
    if ((int)blockIdx.y >= kv_heads) {
        const Rows rows = {q + sequence * q_sequence + (long long)(blockIdx.y - kv_heads) * DIM, q_token};
        const int end = min(count, ((int)blockIdx.x + 1) * TILE);
        for (int token = blockIdx.x * TILE + warp; token < end; token += WARPS)
            prepare(x, rows[token], q_norm, turn, start + token, lines[warp], lane);
        return;
    }
    const u64 pair = (u64)sequence * kv_heads + blockIdx.y;
    const Rows keys = {k + sequence * k_sequence + (long long)blockIdx.y * DIM, k_token};
    const Rows values = {v + sequence * v_sequence + (long long)blockIdx.y * DIM, v_token};
    u8* halves = ring + pair * ring_tiles * Halves::BYTES;
    const Rotary still = {nullptr, 0, 0, 0.0f};

    // A new token as the cache takes it.
    auto take = [&](bool value, int token) {
        const int at = token - start;
        if (value) prepare(x, values[at], nullptr, still, token, lines[warp], lane);
        else prepare(x, keys[at], k_norm, turn, token, lines[warp], lane);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) x[j] = bounded(x[j]);
#if BITS == 4
        if (!value) hadamard(x, lane);
#endif
    };
    auto keep = [&](int tile) {
        for (int row = warp; row < TILE; row += WARPS) {
            const int token = tile * TILE + row;
            if (token < start || token >= total || tile >= capacity) continue;
            for (int value = 0; value < 2; ++value) {
                take(value, token);
                u8* to = halves + (u64)(tile % ring_tiles) * Halves::BYTES + value * Halves::CODES;
#pragma unroll
                for (int j = 0; j < PER_LANE; ++j) {
                    const int d = lane + LANES * j;
                    if (d < DIM) *(u16*)(to + half_at(value, row, d)) = to_half(x[j]);
                }
            }
        }
    };
#if BITS == 16
    const int tile = start / TILE + blockIdx.x;
    if (tile * TILE < total) keep(tile);
#else
    __shared__ u8 codes[2][TILE * DIM];
    __shared__ u32 params[2][TILE];
    auto settle = [&](int tile) {
        for (int row = warp; row < TILE; row += WARPS) {
            const int token = tile * TILE + row;
            for (int value = 0; value < 2; ++value) {
                if (token >= start) {
                    take(value, token);
                } else {
                    const u8* from = halves + (u64)(tile % ring_tiles) * Halves::BYTES + value * Halves::CODES;
#pragma unroll
                    for (int j = 0; j < PER_LANE; ++j) {
                        const int d = lane + LANES * j;
                        x[j] = d < DIM ? from_half(*(const u16*)(from + half_at(value, row, d))) : 0.0f;
                    }
                }
                const u32 line = quantise(x, codes[value] + row * DIM, lane);
                if (lane == 0) params[value][row] = line;
            }
        }
        __syncthreads();
        if (tile < capacity) {
            u32* to = (u32*)(store + (pair * capacity + tile) * Codes::BYTES);
            constexpr int WORDS = Codes::CODES / 4;
            for (int w = threadIdx.x; w < 2 * WORDS; w += THREADS) {
                const bool value = w >= WORDS;
                to[w] = packed(codes[value], value ? w - WORDS : w, value);
            }
            if (threadIdx.x < 2 * TILE) to[2 * WORDS + threadIdx.x] = params[threadIdx.x / TILE][threadIdx.x % TILE];
        }
        __syncthreads();
    };
    const int first = quantised(start) / TILE, settled = quantised(total) / TILE, fresh = (start + TILE - 1) / TILE;
    if (blockIdx.x == 0) {
        for (int tile = first; tile < min(settled, fresh); ++tile) settle(tile);
        for (int tile = max(settled, start / TILE); tile * TILE < total; ++tile) keep(tile);
    } else {
        const int tile = max(fresh, first) + blockIdx.x - 1;
        if (tile < settled) settle(tile);
    }
#endif
}

// Adds the new tokens to the lengths, up to `most`.
extern "C" __global__ void __launch_bounds__(1024) advance(int* lengths, const int* counts, int tokens, int sequences, int most) {
    tenpak::let_next_begin();
    tenpak::wait_for_previous();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < sequences) lengths[i] = min(lengths[i] + (counts ? min(max(counts[i], 0), tokens) : tokens), most);
}

#if BITS != 16
// Brings tokens back from codes to FP16 that are among the newest after sequences became shorter: lengths `before` and
// `after`.
// Grid: x kv heads, y sequences.
extern "C" __global__ void __launch_bounds__(tenpak::THREADS)
    restore(const u8* store, u8* ring, const int* before, const int* after, int kv_heads, int capacity, int ring_tiles) {
    using namespace tenpak;
    const u64 pair = (u64)blockIdx.y * kv_heads + blockIdx.x;
    const int codes = min(quantised(before[blockIdx.y]) / TILE, capacity), end = after[blockIdx.y];
    for (int tile = quantised(end) / TILE; tile < codes && tile * TILE < end; ++tile) {
        const u8* from = store + (pair * capacity + tile) * Codes::BYTES;
        u8* to = ring + (pair * ring_tiles + tile % ring_tiles) * Halves::BYTES;
        for (int i = threadIdx.x; i < 2 * TILE * DIM; i += THREADS) {
            const bool value = i >= TILE * DIM;
            const int token = i / DIM % TILE, dim = i % DIM;
            const Element at = value ? Element(dim % 16, token) : Element(token, dim % 16);
            const u8* piece = from + value * Codes::CODES + Codes::piece(dim / 16, at.lane);
            const int code = BITS == 8 ? piece[at.index] : piece[nibble(at.index) / 2] >> (nibble(at.index) % 2 * 4) & 15;
            const u32 line = ((const u32*)(from + Codes::PARAMS))[value * TILE + token];
            const float x = (code - (1 << (BITS - 1))) * from_half((u16)line) + from_half((u16)(line >> 16));
            *(u16*)(to + value * Halves::CODES + half_at(value, token, dim)) = to_half(bounded(x));
        }
    }
}
#endif
