// Attention of new tokens over the quantised cache, which is read once for all query heads of a group.
//
// Scores are the product of a tile's keys (16 rows: tokens) and the queries (8 columns: the heads of a group, times new
// tokens), output that of its values, transposed (16 rows: channels), and the probabilities. A token's scale and offset
// of keys multiply its scores, those of values its probabilities: no work for each element but to unpack it.
//
// Tiles of codes go round the warps of all blocks (splits) of a head, TILES at a time, and those that wait as FP16 one by
// one; a warp copies its own, STAGES - 1 ahead, and keeps its own sums. It moves the maximum that they are relative to
// only when a score passes it by 2^RISE, which is rare. The last block to arrive adds the splits (always in the same
// order, so results repeat) and leaves the counter at zero for the next launch.
//
// With -DAPPENDS=1 the one new token of each sequence is put into the cache in the same launch (newest.cuh): its query is
// normed and turned on its way in, the block that has the newest tile of a head stores its key and value, and the one that
// has a tile which is no longer among the newest quantises it first. Blocks of the same head, for more than eight columns,
// write the same bytes.
//
// Grid: x splits, y (kv head, eight columns), z sequences. -DBITS (of codes: 4, 8; or 16), -DBF16, -DWARPS, -DTILES,
// -DSTAGES (of codes at least 3), -DBLOCKS (of a multiprocessor, for the register budget).
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
constexpr int STAGE = TILES * Codes::BYTES;          // what a warp copies at a time
constexpr int PART = (DIM / 2 + 1) * COLUMNS;        // pairs of floats of a split's result: output, (maximum, sum)
static_assert(BITS == 16 || (STAGES >= 3 && STAGE >= Halves::CODES), "two stages hold an FP16 tile's keys and values");

// What columns 2t and 2t + 1 may see: tokens from `low` to below `high`.
struct Seen {
    int low[2], high[2];
};

struct State {
    float base[2], limit[2];  // exponents are scores less base, and at most limit, which is NOTHING before the first score
    float sum[2], shift[2];   // shift: what the values' offsets add to all channels
    float out[STEPS][4];
};

template <int BYTES>
__device__ __forceinline__ void copy(u32 to, const u8* from, int lane) {
#pragma unroll
    for (int c = 0; c < BYTES; c += 16 * LANES) {
        if (c + 16 * LANES <= BYTES || c + 16 * lane < BYTES) copy16(to + c + 16 * lane, from + c + 16 * lane);
    }
}
// Fewer, and zeros for the others: scales of tokens that are not there must be numbers.
template <int BYTES>
__device__ __forceinline__ void copy_part(u32 to, const u8* from, int there, int lane) {
#pragma unroll 1
    for (int c = 16 * lane; c < BYTES; c += 16 * LANES) copy16(to + c, c < there ? from + c : from, c < there);
}

// N tiles from `first` on, whose records lie one after another in shared memory.
template <int B, int N>
__device__ __forceinline__ void attend_to(State& state, u32 keys, u32 values, int first, const u32 (&q)[STEPS][2],
                                          const float (&q_sum)[2], const Seen& seen, bool edge, int lane) {
    using R = Record<B>;
    const int row = lane / 4;
    // A product waits for the one before it, unless there are two sums, or other tiles.
    constexpr int CHAINS = N == 1 ? 2 : 1;
    float chains[CHAINS][N][4] = {}, s[N][4];
#pragma unroll
    for (int step = 0; step < STEPS; step += R::JOIN) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            u32 words[R::JOIN * B / 4];
            read(words, keys + n * R::BYTES + R::piece(step, lane));
#pragma unroll
            for (int i = 0; i < R::JOIN; ++i) {
                u32 a[4];
                unpack<B>(words + i * B / 4, a);
                multiply<false>(chains[(step + i) % CHAINS][n], a, q[step + i][0], q[step + i][1]);
            }
        }
    }
    float scale[N][2], offset[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[n][i] = chains[0][n][i];
            if (CHAINS == 2) s[n][i] += chains[CHAINS - 1][n][i];
        }
        if constexpr (B == 16) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] -= state.base[i % 2];
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 key[1], value[1];
                read(key, keys + n * R::BYTES + R::PARAMS + 4 * (row + 8 * i));
                read(value, keys + n * R::BYTES + R::PARAMS + 4 * (TILE + row + 8 * i));
                // Offsets are of the middle code.
                constexpr float MIDDLE = 1 << (B - 1);
                const float key_scale = from_half((u16)key[0]), key_unit = key_scale * code_unit<B>(i);
                const float key_offset = from_half((u16)(key[0] >> 16)) - MIDDLE * key_scale;
                s[n][2 * i] = s[n][2 * i] * key_unit + (key_offset * q_sum[0] - state.base[0]);
                s[n][2 * i + 1] = s[n][2 * i + 1] * key_unit + (key_offset * q_sum[1] - state.base[1]);
                scale[n][i] = from_half((u16)value[0]);
                offset[n][i] = from_half((u16)(value[0] >> 16)) - MIDDLE * scale[n][i];
            }
        }
    }
    if (edge) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = (first + n) * TILE + row + i / 2 * 8, column = i % 2;
                if (token < seen.low[column] || token >= seen.high[column]) s[n][i] = from_bits(0xff800000u)  /* -inf */;
            }
        }
    }
    float most[2] = {s[0][0], s[0][1]};
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) most[i % 2] = fmaxf(most[i % 2], s[n][i]);
    }
    if (any(most[0] > state.limit[0] || most[1] > state.limit[1])) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            float rise = most[column];
            rise = fmaxf(rise, exchange(rise, 4));
            rise = fmaxf(rise, exchange(rise, 8));
            rise = fmaxf(rise, exchange(rise, 16));
            // Before the first score, what was seen has no weight; later the base only rises.
            const bool begins = state.limit[column] == NOTHING;
            if (begins ? rise <= NOTHING : rise <= 0.0f) continue;
            const float factor = begins ? 1.0f : power_of_two(-rise);
            state.base[column] += rise;
            state.limit[column] = RISE;
            state.sum[column] *= factor;
            state.shift[column] *= factor;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                state.out[step][column] *= factor;
                state.out[step][column + 2] *= factor;
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                s[n][column] -= rise;
                s[n][column + 2] -= rise;
            }
        }
    }
    u32 b[N][2];
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            p[i] = power_of_two(s[n][i]);
            state.sum[i % 2] += p[i];
            if constexpr (B != 16) {
                state.shift[i % 2] += p[i] * offset[n][i / 2];
                p[i] *= scale[n][i / 2];
            }
        }
        b[n][0] = transpose(pack(p[0], p[1]));
        b[n][1] = transpose(pack(p[2], p[3]));
    }
#pragma unroll
    for (int step = 0; step < STEPS; step += R::JOIN) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            u32 words[R::JOIN * B / 4];
            read(words, values + n * R::BYTES + R::piece(step, lane));
#pragma unroll
            for (int i = 0; i < R::JOIN; ++i) {
                u32 a[4];
                unpack<B>(words + i * B / 4, a);
                multiply<false>(state.out[step + i], a, b[n][0], b[n][1]);
            }
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
    attend(const u16* q, u16* out, u8* store, u8* ring, const int* lengths, const int* counts, float2* partial,
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
    const int lane = lane_of_warp(), warp = threadIdx.x / LANES, sequence = blockIdx.z, split = blockIdx.x;
    // Lengths and queries are asked for before copies fill the way.
    const int before = lengths[sequence];
    const int group = heads / kv_heads, wanted = tokens * group, chunks = (wanted + COLUMNS - 1) / COLUMNS;
    const int kv_head = blockIdx.y / chunks, first_column = blockIdx.y % chunks * COLUMNS;
    const int columns = min(COLUMNS, wanted - first_column);
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
    if (!APPENDS) load_queries();

    u8* memory = dynamic_shared();
    const u32 stages = shared_address(memory) + warp * STAGES * STAGE;
    auto after = [&](u32 stage) { return stage == stages + (STAGES - 1) * STAGE ? stages : stage + STAGE; };
    const u64 pair = (u64)sequence * kv_heads + kv_head;
    u8* halves = ring + pair * ring_tiles * Halves::BYTES;
    u8* coded = BITS == 16 ? halves : store + pair * capacity * Codes::BYTES;
    auto copy_codes = [&](u32 to, int tile, int end) {
        const u8* from = coded + (u64)tile * Codes::BYTES;
        if (tile + TILES <= end) copy<STAGE>(to, from, lane);
        else copy_part<STAGE>(to, from, (end - tile) * Codes::BYTES, lane);
    };
    const int step = gridDim.x * WARPS * TILES;
    int first = (split * WARPS + warp) * TILES;
    // Without a window this warp's first tiles do not depend on the length, which is still on its way.
    const bool early = !APPENDS && window == 0 && first < capacity;
    if (early) {
        copy_codes(stages, first, capacity);
        commit();
    }

    // The tiles that any of this block's columns sees; from `recent` on they are FP16.
    const int total = before + (counts ? min(max(counts[sequence], 0), tokens) : tokens);
    const int oldest = before + first_column / group + 1, newest = before + (first_column + columns - 1) / group + 1;
    const int first_tile = window ? max(0, oldest - window) / TILE : 0;
    const int last_tile = min((min(newest, total) + TILE - 1) / TILE, capacity);
    const int codes = BITS == 16 ? last_tile : min(quantised(total) / TILE, last_tile), recent = max(first_tile, codes);
    const int count = max(0, last_tile - first_tile);
    const int used = max(1, min((int)gridDim.x, (count + WARPS * TILES - 1) / (WARPS * TILES))), warps = used * WARPS;
    if (split >= used) {
        wait<0>();
        return;
    }
    first += first_tile;

    // Copies to the stages in turn: this warp's codes, then its FP16 tiles, in each two stages.
    int coming = early ? first + step : first;
    int newer = recent + (split * WARPS + warp + warps - (recent - first_tile) % warps) % warps, coming_newer = newer, part = 0;
    u32 place = early ? after(stages) : stages;
    auto fetch_newer = [&]() {
        if (BITS != 16 && coming_newer < last_tile) {
            copy<Halves::CODES>(place, halves + (u64)(coming_newer % ring_tiles) * Halves::BYTES + part * Halves::CODES, lane);
            coming_newer += part * warps;
            part ^= 1;
        }
        commit();
        place = after(place);
    };
    auto fetch = [&]() {
        if (coming >= codes) {
            fetch_newer();
            return;
        }
        copy_codes(place, coming, codes);
        coming += step;
        commit();
        place = after(place);
    };

    __shared__ u16 q_shared[COLUMNS * Q_ROW];
    __shared__ float q_sums[COLUMNS];
    __shared__ int last_arrived;
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
                             halves,
                             false};
    // Which split has a tile.
    const int new_tile = max(0, before / TILE - first_tile);
    const bool takes = split == (BITS == 16 ? new_tile / (WARPS * TILES) % (int)gridDim.x : new_tile % warps / WARPS);
#if BITS != 16
    static_assert(RECENT >= TILE, "a tile that is quantised has no new token");
    const int due = quantised(before) / TILE, due_in = max(0, due - first_tile) / (WARPS * TILES) % (int)gridDim.x;
    // Its codes are copied next, by cp.async: that reads as other loads of the block do (in the generic proxy), after the
    // barrier which ends this.
    if (quantised(before + 1) / TILE > due && split == due_in)
        appended.settle(due, *(Newest::Settling*)memory, lines[warp], warp, lane);
#endif
    // Copies of FP16 tiles may be of the newest as it was.
    int fetched = 0;
    for (; fetched < STAGES - 1 && (BITS == 16 ? !takes : coming < codes); ++fetched) fetch();
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
#else
    const int fetched = early;
#endif

    // Queries, scaled, as halves; turned where keys are.
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int column = warp + i * WARPS;
        if (column >= COLUMNS) continue;
        float x[PER_LANE] = {}, sum = 0.0f;
        // Columns that there are not are zeros; the new key and value are their warps' work.
        if (column < columns) {
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
        }
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

    // Now, so that neither queries nor what is appended waits for the copies.
    for (int i = fetched; i < STAGES - 1; ++i) fetch();

    State state = {{}, {NOTHING, NOTHING}};
    Seen seen_codes = seen;
#pragma unroll
    for (int i = 0; i < 2; ++i) seen_codes.high[i] = min(seen.high[i], codes * TILE);
    u32 stage = stages;
    for (bool nothing = early && first >= codes; nothing || first < codes;) {
        wait<STAGES - 2>();
        __syncwarp();
        fetch();
        if (!nothing) {
            const bool edge = first * TILE < all_from || (first + TILES) * TILE > min(all_to, codes * TILE);
            attend_to<BITS, TILES>(state, stage, stage + Codes::CODES, first, query, q_sum, seen_codes, edge, lane);
            first += step;
        }
        nothing = false;
        stage = after(stage);
    }
    if constexpr (BITS != 16) {
        // Codes were in units.
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) state.out[step][i] *= code_unit<BITS>(i / 2);
        }
        for (; newer < last_tile; newer += warps) {
            wait<STAGES - 3>();
            __syncwarp();
            fetch_newer();
            attend_to<16, 1>(state, stage, after(stage), newer, query, q_sum, seen, true, lane);
            __syncwarp();
            fetch_newer();
            stage = after(after(stage));
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
    for (int i = 0; i < 2; ++i) {
        if (pair_of + i >= columns) continue;
        float* line = sums + warp * SUMS + (pair_of + i) * SUM_ROW + row;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            line[step * 16] = state.out[step][i] + state.shift[i];
            line[step * 16 + 8] = state.out[step][i + 2] + state.shift[i];
        }
        if (row == 0) {
            tops[warp * COLUMNS + pair_of + i] = state.limit[i] == NOTHING ? NOTHING : state.base[i];
            totals[warp * COLUMNS + pair_of + i] = state.sum[i];
        }
    }
    __syncthreads();
    // Two outputs, divided by the sum of what weighs them.
    auto write = [&](int p, float2 x, float total) {
        const int at = first_column + p / (DIM / 2);
        const u64 to = ((u64)sequence * tokens + at / group) * heads + kv_head * group + at % group;
        // A token that is not real may have seen nothing.
        const float factor = total > 0.0f ? 1.0f / total : 0.0f;
        *(u32*)(out + to * DIM + p % (DIM / 2) * 2) = pack<BF16>(x.x * factor, x.y * factor);
    };
    const u64 row_of_all = (u64)sequence * gridDim.y + blockIdx.y;
    float2* parts = partial + row_of_all * gridDim.x * PART;
    // A pair of outputs of all warps, weighed by how far below the highest maximum each one's is. Each thread weighs for
    // itself, which is faster than to wait for one that does.
    for (int p = threadIdx.x; p < columns * (DIM / 2); p += THREADS) {
        const int c = p / (DIM / 2);
        float2 sum = {0.0f, 0.0f};
        float top = NOTHING, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w * COLUMNS + c]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = power_of_two(tops[w * COLUMNS + c] - top);
            const float2 x = *(const float2*)(sums + w * SUMS + c * SUM_ROW + p % (DIM / 2) * 2);
            sum.x += x.x * factor;
            sum.y += x.y * factor;
            total += totals[w * COLUMNS + c] * factor;
        }
        if (used == 1) {
            write(p, sum, total);
        } else {
            __stcg(parts + split * PART + p, sum);
            if (p % (DIM / 2) == 0) __stcg(parts + split * PART + COLUMNS * (DIM / 2) + c, float2{top, total});
        }
    }
    if (used == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) last_arrived = arrive_at(counters + row_of_all) == (u32)(used - 1);
    __syncthreads();
    if (!last_arrived) return;
    if (threadIdx.x == 0) counters[row_of_all] = 0;

    // Two lanes take four outputs, each of every other split, eight at once: as many reads are under way.
    for (int at = warp * LANES; at < columns * (DIM / 2); at += THREADS) {
        const int four = (at + lane) / 2, c = four / (DIM / 4);
        const bool there = c < columns;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        float top = NOTHING, total = 0.0f;
        for (int s = lane % 2; s < used; s += 16) {
            float4 x[8];
            float2 weight[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                x[i] = {0.0f, 0.0f, 0.0f, 0.0f};
                weight[i] = {NOTHING, 0.0f};
                if (!there || s + 2 * i >= used) continue;
                const float2* part = parts + (s + 2 * i) * PART;
                x[i] = __ldcg((const float4*)part + four);
                weight[i] = __ldcg(part + COLUMNS * (DIM / 2) + c);
            }
            float higher = top;
#pragma unroll
            for (int i = 0; i < 8; ++i) higher = fmaxf(higher, weight[i].x);
            const float keep = power_of_two(top - higher);
            top = higher;
            sum = {sum.x * keep, sum.y * keep, sum.z * keep, sum.w * keep};
            total *= keep;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float factor = power_of_two(weight[i].x - top);
                sum = {sum.x + x[i].x * factor, sum.y + x[i].y * factor, sum.z + x[i].z * factor, sum.w + x[i].w * factor};
                total += weight[i].y * factor;
            }
        }
        const float higher = fmaxf(top, exchange(top, 1)), factor = power_of_two(top - higher);
        sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
        total *= factor;
        sum = {sum.x + exchange(sum.x, 1), sum.y + exchange(sum.y, 1), sum.z + exchange(sum.z, 1), sum.w + exchange(sum.w, 1)};
        total += exchange(total, 1);
        if (there) write(2 * four + lane % 2, lane % 2 ? float2{sum.z, sum.w} : float2{sum.x, sum.y}, total);
    }
}
