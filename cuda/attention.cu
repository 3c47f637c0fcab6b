// Attention of new tokens over the quantised cache, which is read once for all query heads of a group.
//
// Scores are the product of a tile's keys (16 rows: tokens) and the queries (8 columns: the heads of a group, times new
// tokens), output that of its values, transposed (16 rows: channels), and the probabilities. A token's scale and offset
// of keys multiply its scores, those of values its probabilities: no work for each element but to unpack it. A warp
// copies its own tiles, STAGES in flight, and keeps its own maximum and sums; it moves the maximum only when a score
// passes it by 2^RISE, which is rare. The sequence is cut into splits; the last block to arrive at a group adds
// them (always in the same order, so results repeat) and leaves the counter at zero for the next launch.
//
// With -DAPPENDS=1 the one new token of each sequence is put into the cache in the same launch (newest.cuh): its query is
// normed and turned on its way in, the block that has the newest tile of a head stores its key and value, and the one that
// has a tile which is no longer among the newest quantises it first. Blocks of the same head, for more than eight columns,
// write the same bytes.
//
// Grid: x splits, y (kv head, eight columns), z sequences. -DBITS (of codes: 4, 8;
// or 16), -DBF16, -DWARPS, -DSTAGES, -DBLOCKS (of a multiprocessor, for the register budget).
#include "newest.cuh"
#include "overlap.cuh"
#ifndef APPENDS
#define APPENDS 0
#endif

namespace tenpak {

constexpr int COLUMNS = 8;
constexpr float RISE = 6.0f;
constexpr float NOTHING = -1e30f;
constexpr int Q_ROW = DIM + 8;        // halves: eight rows then meet different banks
constexpr int SUM_ROW = DIM + 4;      // floats, likewise
constexpr int SUMS = COLUMNS * SUM_ROW;
constexpr int PART = COLUMNS * DIM + 2 * COLUMNS;  // floats of a split's result: output, maxima, sums

// What columns 2t and 2t + 1 may see: tokens from `low` to below `high`.
struct Seen {
    int low[2], high[2];
};

struct State {
    float top[2], sum[2], shift[2];  // shift: what the values' offsets add to all channels
    float out[STEPS][4];
};

template <int B>
__device__ __forceinline__ void load_pieces(u32 (&words)[Record<B>::JOIN * B / 4], const u8* from) {
    constexpr int N = Record<B>::JOIN * B / 4;
    if constexpr (N == 4) {
        const Vector v = *(const Vector*)from;
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = v.words[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) words[i] = ((const u32*)from)[i];
    }
}

template <int B>
__device__ __forceinline__ void tile(State& state, const u8* record, int first, const u32 (&q)[STEPS][2],
                                     const float (&q_sum)[2], const Seen& seen, bool edge, int lane) {
    using R = Record<B>;
    const int row = lane / 4;
    float chains[2][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step += R::JOIN) {
        u32 words[R::JOIN * B / 4];
        load_pieces<B>(words, record + R::piece(step, lane));
#pragma unroll
        for (int i = 0; i < R::JOIN; ++i) {
            u32 a[4];
            unpack<B>(words + i * B / 4, a);
            multiply<false>(chains[(step + i) % 2], a, q[step + i][0], q[step + i][1]);
        }
    }
    float s[4], scale[2] = {1.0f, 1.0f}, offset[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = chains[0][i] + chains[1][i];
    if constexpr (B != 16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 key = ((const u32*)(record + R::PARAMS))[row + 8 * i];
            const u32 value = ((const u32*)(record + R::PARAMS))[TILE + row + 8 * i];
            // Offsets are of the middle code.
            constexpr float MIDDLE = 1 << (B - 1);
            const float key_scale = from_half((u16)key), key_unit = key_scale * code_unit<B>(i);
            const float key_offset = from_half((u16)(key >> 16)) - MIDDLE * key_scale;
            s[2 * i] = s[2 * i] * key_unit + key_offset * q_sum[0];
            s[2 * i + 1] = s[2 * i + 1] * key_unit + key_offset * q_sum[1];
            scale[i] = from_half((u16)value);
            offset[i] = from_half((u16)(value >> 16)) - MIDDLE * scale[i];
        }
    }
    if (edge) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = first + row + i / 2 * 8, column = i % 2;
            if (token < seen.low[column] || token >= seen.high[column]) s[i] = from_bits(0xff800000u)  /* -inf */;
        }
    }
    const float most[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
    if (any(most[0] > state.top[0] + RISE || most[1] > state.top[1] + RISE)) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            float top = most[column];
            top = fmaxf(top, exchange(top, 4));
            top = fmaxf(top, exchange(top, 8));
            top = fmaxf(top, exchange(top, 16));
            top = fmaxf(top, state.top[column]);
            const float factor = power_of_two(state.top[column] - top);
            state.top[column] = top;
            state.sum[column] *= factor;
            state.shift[column] *= factor;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                state.out[step][column] *= factor;
                state.out[step][column + 2] *= factor;
            }
        }
    }
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        p[i] = power_of_two(s[i] - state.top[i % 2]);
        state.sum[i % 2] += p[i];
        if constexpr (B != 16) {
            state.shift[i % 2] += p[i] * offset[i / 2];
            p[i] *= scale[i / 2];
        }
    }
    const u32 b0 = transpose(pack(p[0], p[1])), b1 = transpose(pack(p[2], p[3]));
#pragma unroll
    for (int step = 0; step < STEPS; step += R::JOIN) {
        u32 words[R::JOIN * B / 4];
        load_pieces<B>(words, record + R::CODES + R::piece(step, lane));
#pragma unroll
        for (int i = 0; i < R::JOIN; ++i) {
            u32 a[4];
            unpack<B>(words + i * B / 4, a);
            multiply<false>(state.out[step + i], a, b0, b1);
        }
    }
}

}  // namespace tenpak

// q: new tokens' queries, FP16 or BF16, element (sequence, token, head, channel) at sequence · q_sequence +
// token · q_token + head · DIM + channel; out: [sequences, tokens, heads, DIM]. store: [sequences, kv_heads, capacity] tiles
// of codes; ring: [sequences, kv_heads, ring_tiles] FP16 tiles. lengths: tokens of each sequence before the new ones, whose
// keys are stored already; counts: how many of the new ones are real, or null for all. window: the last tokens that each
// sees, or 0 for all. scale: of scores, times log2(e). With -DAPPENDS=1: one new token, whose key and value, like its
// queries, are as `append` takes them.
extern "C" __global__ void __launch_bounds__(tenpak::THREADS, BLOCKS)
    attend(const u16* q, u16* out, u8* store, u8* ring, const int* lengths, const int* counts, float* partial,
           u32* counters, long long q_sequence, long long q_token, int tokens, int heads, int kv_heads, int capacity,
           int ring_tiles, int window, float scale
#if APPENDS
           , u16* k, u16* v, const float* rotary, const u16* q_norm, const u16* k_norm, long long k_sequence, long long v_sequence,
           int half, int positions, float eps
#endif
) {
    using namespace tenpak;
    let_next_begin();
    // What is appended here waits as late as it can: of what it reads before that, launches that it overlaps with write
    // nothing. The cache of its layer has been written by the launch like this of the step before, and lengths at the end of
    // that; each step begins with one that overlaps with nothing.
    if (!APPENDS) wait_for_previous();
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, sequence = blockIdx.z;
    const int group = heads / kv_heads, wanted = tokens * group, chunks = (wanted + COLUMNS - 1) / COLUMNS;
    const int kv_head = blockIdx.y / chunks, first_column = blockIdx.y % chunks * COLUMNS;
    const int columns = min(COLUMNS, wanted - first_column);
    const int before = lengths[sequence];
    const int total = before + (counts ? min(max(counts[sequence], 0), tokens) : tokens);
    constexpr int EACH = (COLUMNS + WARPS - 1) / WARPS;
    u16 raw[EACH][PER_LANE] = {};
    auto load_queries = [&]() {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (warp + i * WARPS >= columns) continue;
            const int at = first_column + warp + i * WARPS;
            load(raw[i], q + sequence * q_sequence + at / group * q_token + (long long)(kv_head * group + at % group) * DIM, lane);
        }
    };
    // Queries are on their way while lengths are.
    if (!APPENDS) load_queries();

    // This block's tiles, of those that any of its columns sees.
    const int oldest = before + first_column / group + 1, newest = before + (first_column + columns - 1) / group + 1;
    const int first_tile = window ? max(0, oldest - window) / TILE : 0;
    const int last_tile = min((min(newest, total) + TILE - 1) / TILE, capacity);
    const int codes = BITS == 16 ? last_tile : min(quantised(total) / TILE, last_tile);
    const int count = max(0, last_tile - first_tile);
    const int splits = min((int)gridDim.x, max(1, (count + WARPS - 1) / WARPS));
    const int each = max(1, (count + splits - 1) / splits), used = max(1, (count + each - 1) / each);
    const int split = blockIdx.x;
    if (split >= used) return;
    const int begin = first_tile + split * each + warp, end = min(first_tile + (split + 1) * each, last_tile);

    u8* memory = dynamic_shared();
    __shared__ u16 q_shared[COLUMNS * Q_ROW];
    __shared__ float q_sums[COLUMNS];
    __shared__ int last_arrived;
    const u64 pair = (u64)sequence * kv_heads + kv_head;
    const u8* source = BITS == 16 ? ring + pair * ring_tiles * Halves::BYTES : store + pair * capacity * Codes::BYTES;
    const int coded_end = min(end, codes);
    const int coded = begin < coded_end ? (coded_end - begin + WARPS - 1) / WARPS : 0;
    u8* stages = memory + warp * STAGES * Codes::BYTES;
    auto fetch = [&](int i) {
        if (i < coded) {
            const u8* from = source + (u64)(begin + i * WARPS) * Codes::BYTES;
            u8* to = stages + i % STAGES * Codes::BYTES;
#pragma unroll
            for (int c = 0; c < Codes::BYTES; c += 16 * LANES) {
                if (c + 16 * LANES <= Codes::BYTES || c + 16 * lane < Codes::BYTES)
                    copy16(to + c + 16 * lane, from + c + 16 * lane);
            }
        }
        commit();
    };
    auto fetch_first = [&]() {
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) fetch(i);
    };
#if APPENDS
    __shared__ float lines[WARPS][PER_LANE * LANES];
    __shared__ float angles[DIM];     // of this position: cosines, and as many sines behind them
    __shared__ u16 weights[2][DIM];   // of the norms of queries and of keys
    const Rotary turn = {rotary ? angles : nullptr, half, 1, eps};
    const Newest appended = {{k + sequence * k_sequence + (long long)kv_head * DIM, 0},
                             {v + sequence * v_sequence + (long long)kv_head * DIM, 0},
                             k_norm ? weights[1] : nullptr,
                             turn,
                             before,
                             before + 1,
                             capacity,
                             ring_tiles,
                             store + pair * capacity * Codes::BYTES,
                             ring + pair * ring_tiles * Halves::BYTES,
                             false};
    const bool takes = split == used - 1;
#if BITS != 16
    static_assert(RECENT >= TILE, "a tile that is quantised has no new token");
    const int due = quantised(before) / TILE, due_in = max(0, due - first_tile) / each;
    // Its codes are copied next, by cp.async: that reads as other loads of the block do (in the generic proxy), after the
    // barrier which ends this.
    if (quantised(before + 1) / TILE > due && split == due_in)
        appended.settle(due, *(Newest::Settling*)memory, lines[warp], warp, lane);
#endif
    // Copies of FP16 tiles would be of the newest as it was.
    if (BITS != 16 || !takes) fetch_first();
    // What turns and norms the token is here before the token is.
    if (rotary) {
        const float* cosines = rotary + (u64)min(before, positions - 1) * half;
        for (int i = threadIdx.x; i < 2 * half; i += THREADS)
            angles[i] = i < half ? cosines[i] : cosines[(u64)positions * half + i - half];
    }
    for (int d = threadIdx.x; d < DIM; d += THREADS) {
        if (q_norm) weights[0][d] = q_norm[d];
        if (k_norm) weights[1][d] = k_norm[d];
    }
    __syncthreads();
    wait_for_previous();
    load_queries();
    // The last warps take the key and the value, each one, for the first have queries.
    static_assert(WARPS >= 2, "key and value have a warp each");
    if (takes && warp >= WARPS - 2 && before / TILE < capacity) {
        const bool value = warp == WARPS - 1;
        u16 newest_raw[PER_LANE];
        load(newest_raw, value ? appended.values[0] : appended.keys[0], lane);
        appended.put(newest_raw, value, before, lines[warp], lane);
    }
    if (BITS == 16 && takes) {
        __syncthreads();
        fetch_first();
    }
#else
    fetch_first();
#endif

    // Queries, scaled, as halves; turned where keys are.
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int column = warp + i * WARPS;
        if (column >= COLUMNS) continue;
        float x[PER_LANE], sum = 0.0f;
#if APPENDS
        prepare(x, raw[i], q_norm ? weights[0] : nullptr, turn, before, lines[warp], lane);
        // As `append` writes it back.
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) x[j] = from_activation<BF16>(to_activation<BF16>(x[j])) * scale;
#else
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) x[j] = from_activation<BF16>(raw[i][j]) * scale;
#endif
        if constexpr (BITS == 4) hadamard(x, lane);
#pragma unroll
        for (int j = 0; j < PER_LANE; ++j) {
            const int d = lane + LANES * j;
            const u16 half = to_half(x[j]);
            sum += from_half(half);
            if (d < DIM) q_shared[column * Q_ROW + d] = half;
        }
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) sum += exchange(sum, mask);
        if (lane == 0) q_sums[column] = sum;
    }
    __syncthreads();
    u32 query[STEPS][2];
    const int row = lane / 4, pair_of = lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const u16* from = q_shared + row * Q_ROW + step * 16 + pair_of;
        query[step][0] = *(const u32*)from;
        query[step][1] = *(const u32*)(from + 8);
    }
    const float q_sum[2] = {q_sums[pair_of], q_sums[pair_of + 1]};

    Seen seen;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        seen.high[i] = before + (first_column + min(pair_of + i, columns - 1)) / group + 1;
        seen.low[i] = window ? max(0, seen.high[i] - window) : 0;
    }
    const int all_from = window ? max(0, newest - window) : 0, all_to = oldest;

    State state = {{NOTHING, NOTHING}};
    for (int i = 0; i < coded; ++i) {
        wait<STAGES - 2>();
        __syncwarp();
        fetch(i + STAGES - 1);
        const int first = (begin + i * WARPS) * TILE;
        tile<BITS>(state, stages + i % STAGES * Codes::BYTES, first, query, q_sum, seen,
                   first < all_from || first + TILE > all_to, lane);
    }
    if constexpr (BITS != 16) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.out[step][i] *= code_unit<BITS>(i / 2);
        }
        const u8* halves = ring + pair * ring_tiles * Halves::BYTES;
        for (int t = begin + coded * WARPS; t < end; t += WARPS) {
            tile<16>(state, halves + (u64)(t % ring_tiles) * Halves::BYTES, t * TILE, query, q_sum, seen, true, lane);
        }
    }

    // The warps' results meet in the memory of the stages.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int mask = 4; mask < LANES; mask *= 2) {
            state.sum[i] += exchange(state.sum[i], mask);
            state.shift[i] += exchange(state.shift[i], mask);
        }
    }
    wait<0>();
    __syncthreads();
    float* sums = (float*)memory;             // [WARPS][COLUMNS][SUM_ROW]
    float* tops = sums + WARPS * SUMS;        // [WARPS][COLUMNS]
    float* totals = tops + WARPS * COLUMNS;   // [WARPS][COLUMNS]
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[warp * SUMS + (pair_of + i % 2) * SUM_ROW + step * 16 + row + i / 2 * 8] =
                state.out[step][i] + state.shift[i % 2];
        }
    }
    if (row == 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            tops[warp * COLUMNS + pair_of + i] = state.top[i];
            totals[warp * COLUMNS + pair_of + i] = state.sum[i];
        }
    }
    __syncthreads();
    // Output d and d + 1 of column c of all warps, weighed by how far below the highest maximum each one's is; also the
    // highest maximum and the sum. Each thread weighs for itself, which is faster than to wait for one that does.
    auto mix = [&](int c, int d, float& top, float& total) {
        float2 sum = {0.0f, 0.0f};
        top = NOTHING;
        total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w * COLUMNS + c]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = power_of_two(tops[w * COLUMNS + c] - top);
            const float2 x = *(const float2*)(sums + w * SUMS + c * SUM_ROW + d);
            sum.x += x.x * factor;
            sum.y += x.y * factor;
            total += totals[w * COLUMNS + c] * factor;
        }
        return sum;
    };
    auto write = [&]() {
        for (int i = threadIdx.x * 2; i < columns * DIM; i += 2 * THREADS) {
            const int c = i / DIM, at = first_column + c;
            const u64 line = ((u64)sequence * tokens + at / group) * heads + kv_head * group + at % group;
            float top, total;
            const float2 x = mix(c, i % DIM, top, total);
            // A token that is not real may have seen nothing.
            const float factor = total > 0.0f ? 1.0f / total : 0.0f;
            *(u32*)(out + line * DIM + i % DIM) = pack<BF16>(x.x * factor, x.y * factor);
        }
    };
    if (used == 1) {
        write();
        return;
    }
    const u64 place = (u64)sequence * gridDim.y + blockIdx.y;
    float* parts = partial + place * gridDim.x * PART;
    float* mine = parts + split * PART;
    for (int i = threadIdx.x * 2; i < columns * DIM; i += 2 * THREADS) {
        float top, total;
        *(float2*)(mine + i) = mix(i / DIM, i % DIM, top, total);
        if (i % DIM == 0) {
            mine[COLUMNS * DIM + i / DIM] = top;
            mine[COLUMNS * DIM + COLUMNS + i / DIM] = total;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last_arrived = atomicAdd(counters + place, 1u) == (u32)(used - 1);
        __threadfence();
    }
    __syncthreads();
    if (!last_arrived) return;
    if (threadIdx.x == 0) counters[place] = 0;

    // Each warp adds some of the splits, then the warps' results meet as before.
    float4 line[COLUMNS][(DIM + 127) / 128];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int k = 0; k < (DIM + 127) / 128; ++k) line[c][k] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    float top = NOTHING, sum = 0.0f;  // of column lane % COLUMNS
#pragma unroll 2
    for (int s = warp; s < used; s += WARPS) {
        const float* from = parts + s * PART;
        float split_top = NOTHING, split_sum = 0.0f;
        if (lane % COLUMNS < columns) {
            split_top = __ldcg(from + COLUMNS * DIM + lane % COLUMNS);
            split_sum = __ldcg(from + COLUMNS * DIM + COLUMNS + lane % COLUMNS);
        }
        float4 x[COLUMNS][(DIM + 127) / 128];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int k = 0; k < (DIM + 127) / 128; ++k) {
                x[c][k] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (c < columns && k * 128 + lane * 4 < DIM)
                    x[c][k] = __ldcg((const float4*)(from + c * DIM + k * 128 + lane * 4));
            }
        }
        const float higher = fmaxf(top, split_top);
        const float keep = power_of_two(top - higher), take = power_of_two(split_top - higher);
        top = higher;
        sum = sum * keep + split_sum * take;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const float kept = from_lane(keep, c), taken = from_lane(take, c);
#pragma unroll
            for (int k = 0; k < (DIM + 127) / 128; ++k) {
                line[c][k].x = line[c][k].x * kept + x[c][k].x * taken;
                line[c][k].y = line[c][k].y * kept + x[c][k].y * taken;
                line[c][k].z = line[c][k].z * kept + x[c][k].z * taken;
                line[c][k].w = line[c][k].w * kept + x[c][k].w * taken;
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int k = 0; k < (DIM + 127) / 128; ++k) {
            if (k * 128 + lane * 4 < DIM) *(float4*)(sums + warp * SUMS + c * SUM_ROW + k * 128 + lane * 4) = line[c][k];
        }
    }
    if (lane < COLUMNS) {
        tops[warp * COLUMNS + lane] = top;
        totals[warp * COLUMNS + lane] = sum;
    }
    __syncthreads();
    write();
}
