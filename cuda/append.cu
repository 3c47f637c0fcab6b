// Puts new tokens into the cache: per-head norm and rotation of queries and keys in place, keys and values as FP16 into
// the ring, and tiles that are no longer among the newest into codes.
//
// Grid: x tiles of new tokens, y kv heads and then query heads, z sequences; WARPS warps. Of a kv head, block 0 quantises
// the tiles that are in the ring and then writes the newest there, since both may take the same places; the other blocks
// quantise tiles that are all new. -DBITS (of codes: 4, 8; or 16), -DBF16, -DDIM, -DRECENT.
#define WARPS 4
#include "newest.cuh"
#include "overlap.cuh"

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
    if ((int)blockIdx.y >= kv_heads) {
        if (!q_norm && !rotary) return;
        const Rows rows = {q + sequence * q_sequence + (long long)(blockIdx.y - kv_heads) * DIM, q_token};
        const int end = min(count, ((int)blockIdx.x + 1) * TILE);
        for (int token = blockIdx.x * TILE + warp; token < end; token += WARPS) {
            u16 raw[PER_LANE];
            float x[PER_LANE];
            load(raw, rows[token], lane);
            prepare(x, raw, q_norm, turn, start + token, lines[warp], lane);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                const int d = lane + LANES * j;
                if (d < DIM) rows[token][d] = to_activation<BF16>(x[j]);
            }
        }
        return;
    }
    const u64 pair = (u64)sequence * kv_heads + blockIdx.y;
    const Newest newest = {{k + sequence * k_sequence + (long long)blockIdx.y * DIM, k_token},
                           {v + sequence * v_sequence + (long long)blockIdx.y * DIM, v_token},
                           k_norm,
                           turn,
                           start,
                           total,
                           capacity,
                           ring_tiles,
                           store + pair * capacity * Codes::BYTES,
                           ring + pair * ring_tiles * Halves::BYTES,
                           true};
#if BITS == 16
    const int tile = start / TILE + blockIdx.x;
    if (tile * TILE < total) newest.keep(tile, lines[warp], warp, lane);
#else
    __shared__ Newest::Settling room;
    const int first = quantised(start) / TILE, settled = quantised(total) / TILE, fresh = (start + TILE - 1) / TILE;
    if (blockIdx.x == 0) {
        for (int tile = first; tile < min(settled, fresh); ++tile) newest.settle(tile, room, lines[warp], warp, lane);
        for (int tile = max(settled, start / TILE); tile * TILE < total; ++tile) newest.keep(tile, lines[warp], warp, lane);
    } else {
        const int tile = max(fresh, first) + blockIdx.x - 1;
        if (tile < settled) newest.settle(tile, room, lines[warp], warp, lane);
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
