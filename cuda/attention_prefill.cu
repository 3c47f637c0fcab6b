// Causal attention of a prompt over its own keys and values, fresh from their projections.
//
// A block takes 64 queries of one head, a warp 16 of them; keys and values pass through shared memory KEYS tokens at a
// time, the next ones being copied while these are multiplied. Scores stay in registers: what a lane holds of them is what it
// must hold of the probabilities for the second product (Dao 2023, FlashAttention-2, arXiv:2307.08691).
//
// Grid: x tiles of queries, the longest first; y heads; z sequences. -DDIM, -DBF16.
#include "warp.cuh"

namespace tenpak {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * LANES;
constexpr int QUERIES = 16 * WARPS;
constexpr int KEYS = DIM <= 128 ? 64 : 32;  // at a time: with 32 the widest heads fit in 99 KiB
constexpr int STEPS = DIM / 16;
constexpr int ROW = DIM + 8;  // halves: eight rows of 16 bytes then meet all banks
constexpr float NOTHING = -1e30f;

template <int COUNT>
__device__ __forceinline__ void stage(u16* to, const u16* from, long long step, int first, int tokens) {
    for (int i = threadIdx.x; i < COUNT * (DIM / 8); i += THREADS) {
        const int row = i / (DIM / 8), column = i % (DIM / 8) * 8;
        const int token = min(first + row, tokens - 1);
        copy16(to + row * ROW + column, from + token * step + column, first + row < tokens);
    }
}

}  // namespace tenpak

// q, k, v: element (sequence, token, head, channel) at sequence · *_sequence + token · *_token + head · DIM + channel; all
// 16-byte aligned. out: [sequences, tokens, heads, DIM]. window: the last tokens that each sees, or 0 for all. scale: of
// scores, times log2(e).
extern "C" __global__ void __launch_bounds__(tenpak::THREADS)
    attention_prefill(const u16* q, const u16* k, const u16* v, u16* out, long long q_sequence, long long q_token,
                      long long k_sequence, long long k_token, long long v_sequence, long long v_token, int tokens, int heads,
                      int kv_heads, int window, float scale) {
    using namespace tenpak;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, row = lane / 4, pair = lane % 4 * 2;
    const int head = blockIdx.y, kv_head = head / (heads / kv_heads), sequence = blockIdx.z;
    const int first_query = ((int)gridDim.x - 1 - (int)blockIdx.x) * QUERIES;
    q += sequence * q_sequence + (long long)head * DIM;
    k += sequence * k_sequence + (long long)kv_head * DIM;
    v += sequence * v_sequence + (long long)kv_head * DIM;

    u16* q_shared = (u16*)dynamic_shared();  // [QUERIES][ROW]
    u16* k_shared = q_shared + QUERIES * ROW;    // [2][KEYS][ROW]
    u16* v_shared = k_shared + 2 * KEYS * ROW;   // [2][KEYS][ROW]
    const int end = min(first_query + QUERIES, tokens), lowest = window ? max(0, first_query + 1 - window) : 0;
    const int begin_tile = lowest / KEYS, end_tile = (end + KEYS - 1) / KEYS;
    stage<QUERIES>(q_shared, q, q_token, first_query, tokens);
    stage<KEYS>(k_shared, k, k_token, begin_tile * KEYS, tokens);
    stage<KEYS>(v_shared, v, v_token, begin_tile * KEYS, tokens);
    commit();

    // Queries stay in registers where there is room for them.
    constexpr bool KEPT = DIM <= 128;
    u32 query[KEPT ? STEPS : 1][4];
    float output[STEPS * 2][4] = {}, top[2] = {NOTHING, NOTHING}, sum[2] = {};
    for (int tile = begin_tile; tile < end_tile; ++tile) {
        const int buffer = (tile - begin_tile) % 2;
        if (tile + 1 < end_tile) {
            stage<KEYS>(k_shared + (1 - buffer) * KEYS * ROW, k, k_token, (tile + 1) * KEYS, tokens);
            stage<KEYS>(v_shared + (1 - buffer) * KEYS * ROW, v, v_token, (tile + 1) * KEYS, tokens);
        }
        commit();
        wait<1>();
        __syncthreads();
        const u16* keys = k_shared + buffer * KEYS * ROW;
        const u16* values = v_shared + buffer * KEYS * ROW;

        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 (&a)[4] = query[KEPT ? step : 0];
            if (!KEPT || tile == begin_tile)
                load_matrices(a, q_shared + (warp * 16 + lane % 16) * ROW + step * 16 + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                u32 b[4];
                load_matrices(b, keys + (n * 16 + lane % 8 + lane / 16 * 8) * ROW + step * 16 + lane / 8 % 2 * 8);
                multiply<BF16>(s[2 * n], a, b[0], b[1]);
                multiply<BF16>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        const int first_row = first_query + warp * 16 + row;
        const bool edge = (tile + 1) * KEYS > first_query + warp * 16 + 1 ||
                          (window && tile * KEYS <= first_query + warp * 16 + 15 - window);
        float most[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] *= scale;
                if (edge) {
                    const int at = first_row + i / 2 * 8, token = tile * KEYS + n * 8 + pair + i % 2;
                    if (token > at || (window && token <= at - window)) s[n][i] = from_bits(0xff800000u);  // -inf
                }
                most[i / 2] = fmaxf(most[i / 2], s[n][i]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            most[i] = fmaxf(most[i], exchange(most[i], 1));
            most[i] = fmaxf(most[i], exchange(most[i], 2));
            const float factor = power_of_two(top[i] - most[i]);
            top[i] = most[i];
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < STEPS * 2; ++n) {
                output[n][2 * i] *= factor;
                output[n][2 * i + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = power_of_two(s[n][i] - top[i / 2]);
                sum[i / 2] += s[n][i];
            }
        }
#pragma unroll
        for (int m = 0; m < KEYS / 16; ++m) {
            const u32 a[4] = {pack<BF16>(s[2 * m][0], s[2 * m][1]), pack<BF16>(s[2 * m][2], s[2 * m][3]),
                              pack<BF16>(s[2 * m + 1][0], s[2 * m + 1][1]), pack<BF16>(s[2 * m + 1][2], s[2 * m + 1][3])};
#pragma unroll
            for (int n = 0; n < STEPS; ++n) {
                u32 b[4];
                load_transposed(b, values + (m * 16 + lane % 16) * ROW + n * 16 + lane / 16 * 8);
                multiply<BF16>(output[2 * n], a, b[0], b[1]);
                multiply<BF16>(output[2 * n + 1], a, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sum[i] += exchange(sum[i], 1);
        sum[i] += exchange(sum[i], 2);
        const int at = first_query + warp * 16 + row + i * 8;
        if (at >= tokens) continue;
        u16* line = out + (((u64)sequence * tokens + at) * heads + head) * DIM + pair;
#pragma unroll
        for (int n = 0; n < STEPS * 2; ++n) {
            *(u32*)(line + n * 8) = pack<BF16>(output[n][2 * i] / sum[i], output[n][2 * i + 1] / sum[i]);
        }
    }
}
