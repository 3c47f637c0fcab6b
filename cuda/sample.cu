// The next token from the scores of all: what tenpak.sampling says, on the GPU.
//
// A token's distance to the likeliest, over the temperature and in steps of 2^-20, orders the tokens, the lower index first
// among equals; its weight is an integer, so that sums do not depend on their order. Each choice (the k likeliest, those
// that hold the part p, the token drawn) asks which token a running sum over that order first passes a number at. That is
// found in three histograms, each over some bits of the distance, and nothing is sorted.
//
// One cluster of blocks of THREADS, each with a part of the tokens. Each block adds up the histograms of all.
#include "cluster.cuh"
#include "overlap.cuh"
#include "reduce.cuh"

namespace tenpak {

constexpr int BITS = 26, LEVEL = 9, BINS = 1 << LEVEL;  // of a distance; of each histogram, from the highest on
constexpr float STEPS = 1048576.0f;          // of a distance of 1
constexpr float UNIT = 1099511627776.0f;     // the weight of the likeliest, 2^40
constexpr float LOG2E = 1.4426950408889634f;

// As tenpak.cuda.sampling fills it.
struct How {
    float inverse_temperature;  // 0: always the likeliest
    int top_k;                  // 0: all
    double top_p;
    u64 seed;
};

// Calls take(i, all[i]) for this thread's elements, with AT_ONCE reads under way.
constexpr int AT_ONCE = 8;
template <class Take>
__device__ __forceinline__ void for_each(const float* all, int count, Take take) {
    for (int first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
        float x[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int i = first + j * THREADS;
            x[j] = i < count ? all[i] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            const int i = first + j * THREADS;
            if (i < count) take(i, x[j]);
        }
    }
}

// This block's.
struct Scores {
    const float* all;
    int count;
    float top, inverse_temperature;

    __device__ __forceinline__ u32 distance(float score) const {
        return (u32)fminf((top - score) * inverse_temperature * STEPS, (float)((BINS - 1) << (BITS - LEVEL)));
    }
    // Calls take(i, distance) for this thread's tokens.
    template <class Take>
    __device__ __forceinline__ void for_distances(Take take) const {
        for_each(all, count, [&](int i, float score) { take(i, distance(score)); });
    }
    __device__ __forceinline__ u64 weight(u32 distance) const {
        return (u64)(power_of_two((float)distance * (-LOG2E / STEPS)) * UNIT);
    }
};

// Where a running sum first passes a number: at the `equal`-th (from 0) of the tokens with that distance; `before` is what
// all nearer ones sum to.
struct Found {
    u32 distance;
    u64 before, equal;
};

// Shared memory adds 32 bits by itself, 64 only by trying; every wrap of the lower half is one thread's to carry.
__device__ __forceinline__ void add_to(u64* bin, u64 x) {
    u32* const halves = (u32*)bin;
    const u32 low = (u32)x, before = atomicAdd(halves, low), high = (u32)(x >> 32) + (before + low < low);
    if (high) atomicAdd(halves + 1, high);
}

// What the threads of a cluster add up, in the order of blocks and threads.
struct Together {
    u64* bins;     // [2][BINS]: one is filled while a slow block reads the other
    int turn = 0;  // the one that is not in use

    // What comes before this thread's x, and the sum of all.
    __device__ __forceinline__ u64 sum_before(u64 x, u64& total) {
        __shared__ u64 sums[2][CLUSTER];
        const int rank = cluster_rank();
        u64 before = block_sum_before(x, total);
        turn ^= 1;
        if (threadIdx.x < CLUSTER) *in_block(&sums[turn][rank], threadIdx.x) = total;
        cluster_sync();
        total = 0;
#pragma unroll
        for (int i = 0; i < CLUSTER; ++i) {
            if (i < rank) before += sums[turn][i];
            total += sums[turn][i];
        }
        return before;
    }

    // Adds each token's weight (or 1, if COUNTED) to a bin, if its distance shifted by `from` is `prefix`: that of the
    // next bits, down to bit `shift`. Bin t of the cluster's is thread t's.
    template <bool COUNTED>
    __device__ __forceinline__ u64 fill(const Scores& scores, int from, u32 prefix, int shift) {
        turn ^= 1;
        u64* const mine = bins + turn * BINS;
        for (int i = threadIdx.x; i < BINS; i += THREADS) mine[i] = 0;
        __syncthreads();
        scores.for_distances([&](int, u32 distance) {
            if (distance >> from != prefix) return;
            const u64 x = COUNTED ? 1ull : scores.weight(distance);
            if (x) add_to(mine + (distance >> shift & ((1u << (from - shift)) - 1)), x);
        });
        cluster_sync();
        u64 sum = 0;
        if (threadIdx.x < BINS) {
#pragma unroll
            for (int block = 0; block < CLUSTER; ++block) sum += in_block(mine, block)[threadIdx.x];
        }
        return sum;
    }

    // The first bin at which `before` plus the running sum passes `target(total)`; `before` becomes the sum before it.
    template <class Target>
    __device__ __forceinline__ u32 find_bin(u64 bin, u64& before, Target target) {
        __shared__ u32 found;
        __shared__ u64 found_before;
        u64 total;
        const u64 sum = before + block_sum_before(bin, total);
        const u64 wanted = target(total);
        if (sum <= wanted && sum + bin > wanted) {
            found = threadIdx.x;
            found_before = sum;
        }
        __syncthreads();
        before = found_before;
        return found;
    }

    template <bool COUNTED>
    __device__ __forceinline__ u64 fill_upper(const Scores& scores) {
        return fill<COUNTED>(scores, BITS, 0, BITS - LEVEL);
    }

    // `upper`: this thread's bin of the uppermost bits; `target` is given the total, and must stay below it.
    template <bool COUNTED, class Target>
    __device__ __forceinline__ Found find(const Scores& scores, u64 upper, Target target) {
        u64 before = 0, wanted = 0;
        u32 distance = find_bin(upper, before, [&](u64 total) { return wanted = target(total); });
        for (int known = BITS - LEVEL; known > 0;) {
            const int shift = max(known - LEVEL, 0);
            const u64 bin = fill<COUNTED>(scores, known, distance, shift);
            distance = distance << (known - shift) | find_bin(bin, before, [=](u64) { return wanted; });
            known = shift;
        }
        return {distance, before, (wanted - before) / (COUNTED ? 1ull : scores.weight(distance))};
    }
};
static_assert(THREADS >= BINS, "a thread for each bin");

// The number from 0 to below 2^64 that decides the token at a position: NumPy's Philox with key (seed, 0) and counter
// (position, 0, 0, 0), Philox 4x64 with ten rounds (Salmon et al. 2011).
__device__ __forceinline__ u64 chance(u64 seed, u64 position) {
    constexpr u64 M0 = 0xd2e7470ee14c6c93ull, M1 = 0xca5a826395121157ull;
    u64 c0 = position + 1, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u64 high0 = __umul64hi(M0, c0), low0 = M0 * c0, high1 = __umul64hi(M1, c2), low1 = M1 * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9e3779b97f4a7c15ull;
        k1 += 0xbb67ae8584caa73bull;
    }
    return c0;
}

// A token that may be the likeliest: the highest score, of equal ones the first; a score that is NaN or +infinity, at place
// -1, wins over all.
struct Best {
    float score;
    int place;

    __device__ __forceinline__ void take(float other, int where) {
        if (where < 0 || (place >= 0 && (other > score || (other == score && where < place)))) {
            score = other;
            place = where;
        }
    }
    __device__ __forceinline__ void take_of_warp() {
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2)
            take(exchange(score, mask), (int)to_bits(exchange(from_bits((u32)place), mask)));
    }
};

// The cluster's, with `count` of the scores in this block, from `first` on. Where there is room for them the scores are `kept`
// for what comes after; `bests` has room for one a warp.
__device__ __forceinline__ Best likeliest(const float* scores, int first, int count, float* kept, Best* bests) {
    constexpr int ALL = CLUSTER * WARPS;
    const int lane = threadIdx.x % LANES;
    Best best = {from_bits(0xff800000u), 0x7fffffff};
    for_each(scores, count, [&](int i, float x) {
        if (kept) kept[i] = x;
        best.take(x, x < from_bits(0x7f800000u) ? first + i : -1);
    });
    best.take_of_warp();
    for (int i = lane; i < CLUSTER; i += LANES)
        *in_block(&bests[cluster_rank() * WARPS + threadIdx.x / LANES], i) = best;
    cluster_sync();
    for (int i = lane; i < ALL; i += LANES) best.take(bests[i].score, bests[i].place);
    best.take_of_warp();
    return best;
}

}  // namespace tenpak

// scores [count], of which shared memory has `room` for this block's behind the bins, or 0; lengths: tokens before the one that
// is chosen; token: the choice, -1 where a score is not finite.
extern "C" __global__ void __launch_bounds__(THREADS) IN_CLUSTERS
    sample(const float* scores, int count, const void* options, const int* lengths, int* token, int room) {
    using namespace tenpak;
    let_next_begin();
    // All blocks have begun.
    cluster_sync();
    wait_for_previous();
    Together all = {(u64*)dynamic_shared()};
    const How how = *(const How*)options;
    const int part = (count + CLUSTER - 1) / CLUSTER, first = min(cluster_rank() * part, count), here = min(part, count - first);
    float* const kept_scores = room ? (float*)(all.bins + 2 * BINS) : nullptr;
    const Best best = likeliest(scores + first, first, here, kept_scores, (Best*)all.bins);
    if (best.place < 0 || how.inverse_temperature == 0.0f) {
        if (cluster_rank() == 0 && threadIdx.x == 0) *token = best.place;
        return;
    }
    const Scores own = {room ? kept_scores : scores + first, here, best.score, how.inverse_temperature};
    // What all considered tokens weigh; 0 as long as all are.
    u64 kept = 0;
    if (how.top_k > 0 && how.top_k < count) {
        const Found last = all.find<true>(own, all.fill_upper<true>(own), [=](u64) { return (u64)how.top_k - 1; });
        const u64 weight = own.weight(last.distance);
        u64 nearer = 0, total;
        own.for_distances([&](int, u32 distance) {
            if (distance < last.distance) nearer += own.weight(distance);
        });
        all.sum_before(nearer, total);
        kept = total + (last.equal + 1) * weight;
    }
    const u64 upper = all.fill_upper<false>(own);
    if (how.top_p < 1.0) {
        const Found last = all.find<false>(own, upper, [&](u64 total) {
            if (!kept) kept = total;
            // The token that reaches the part p is still considered.
            const u64 wanted = (u64)ceil(how.top_p * (double)kept);
            return (wanted > kept ? kept : wanted < 1 ? 1 : wanted) - 1;
        });
        const u64 reached = last.before + (last.equal + 1) * own.weight(last.distance);
        kept = reached < kept ? reached : kept;
    }
    const u64 number = chance(how.seed, (u64)lengths[0]);
    const Found drawn =
        all.find<false>(own, upper, [=](u64 total) { return __umul64hi(number, kept ? kept : total); });

    // Nearly always one token has that distance.
    u64 mine = 0, total;
    int only = 0;
    own.for_distances([&](int i, u32 distance) {
        if (distance != drawn.distance) return;
        ++mine;
        only = i;
    });
    all.sum_before(mine, total);
    if (total == 1) {
        if (mine) *token = first + only;
        return;
    }
    // Else the equal-th of them, in the order of tokens.
    const int each = (here + THREADS - 1) / THREADS, from = threadIdx.x * each, to = min(from + each, here);
    mine = 0;
    for (int i = from; i < to; ++i) mine += own.distance(own.all[i]) == drawn.distance;
    u64 place = all.sum_before(mine, total);
    if (place <= drawn.equal && place + mine > drawn.equal) {
        for (int i = from; i < to; ++i) {
            if (own.distance(own.all[i]) != drawn.distance) continue;
            if (place++ == drawn.equal) *token = first + i;
        }
    }
}
