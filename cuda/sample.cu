// The next token from the scores of all: what tenpak.sampling says, on the GPU.
//
// A token's distance to the likeliest, over the temperature and in steps of 2^-20, orders the tokens, the lower index first
// among equals; its weight is an integer, so that sums do not depend on their order. Each choice (the k likeliest, those
// that hold the part p, the token drawn) asks which token a running sum over that order first passes a number at. That is
// found in two histograms, over the upper and the lower half of the distance, and nothing is sorted.
//
// One block of THREADS.
#include "overlap.cuh"
#include "reduce.cuh"

namespace tenpak {

constexpr int HALF = 13, BINS = 1 << HALF;   // a distance has two halves
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

struct Scores {
    const float* all;
    int count;
    float top, inverse_temperature;

    __device__ __forceinline__ u32 distance(float score) const {
        return (u32)fminf((top - score) * inverse_temperature * STEPS, (float)(BINS - 1) * BINS);
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

// Adds each token's weight (or 1, if COUNTED) to the bin that `bin` gives for its distance, if that is not below 0.
template <bool COUNTED, class Bin>
__device__ __forceinline__ void fill(const Scores& scores, u64* bins, Bin bin) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    scores.for_distances([&](int, u32 distance) {
        const int at = bin(distance);
        if (at >= 0) add_to(bins + at, COUNTED ? 1ull : scores.weight(distance));
    });
    __syncthreads();
}

// The first bin at which `before` plus the running sum passes `target(total)`; `before` becomes the sum before it.
template <class Target>
__device__ __forceinline__ int find_bin(const u64* bins, u64& before, Target target) {
    __shared__ int found;
    __shared__ u64 sum_before;
    constexpr int EACH = BINS / THREADS;
    u64 mine = 0, total;
#pragma unroll
    for (int i = 0; i < EACH; ++i) mine += bins[threadIdx.x * EACH + i];
    u64 sum = before + block_sum_before(mine, total);
    const u64 wanted = target(total);
    if (sum <= wanted && sum + mine > wanted) {
        int i = threadIdx.x * EACH;
        while (sum + bins[i] <= wanted) sum += bins[i++];
        found = i;
        sum_before = sum;
    }
    __syncthreads();
    const int bin = found;
    before = sum_before;
    __syncthreads();
    return bin;
}

// `target` is given the total, and must stay below it.
template <bool COUNTED, class Target>
__device__ __forceinline__ Found find(const Scores& scores, u64* bins, Target target) {
    u64 before = 0, wanted = 0;
    fill<COUNTED>(scores, bins, [](u32 distance) { return (int)(distance >> HALF); });
    const int upper = find_bin(bins, before, [&](u64 total) { return wanted = target(total); });
    fill<COUNTED>(scores, bins, [=](u32 d) { return (int)(d >> HALF) == upper ? (int)(d & (BINS - 1)) : -1; });
    const int lower = find_bin(bins, before, [=](u64) { return wanted; });
    const u32 distance = (u32)upper << HALF | (u32)lower;
    return {distance, before, (wanted - before) / (COUNTED ? 1ull : scores.weight(distance))};
}

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

// The likeliest token, of equal ones the first; -1 where a score is NaN or +infinity. Where there is room for them the
// scores are `kept` for what comes after.
__device__ __forceinline__ int likeliest(const float* scores, int count, float* kept, float& top) {
    __shared__ float tops[WARPS];
    __shared__ int places[WARPS];
    float best = from_bits(0xff800000u);
    int place = count;
    bool broken = false;
    for_each(scores, count, [&](int i, float x) {
        if (kept) kept[i] = x;
        broken |= !(x < from_bits(0x7f800000u));
        if (x > best || (x == best && i < place)) {
            best = x;
            place = i;
        }
    });
    if (broken) place = -1;
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) {
        const float other = exchange(best, mask);
        const int where = (int)to_bits(exchange(from_bits((u32)place), mask));
        // A broken score wins over all.
        if (where < 0 || (place >= 0 && (other > best || (other == best && where < place)))) {
            best = other;
            place = where;
        }
    }
    if (threadIdx.x % LANES == 0) {
        tops[threadIdx.x / LANES] = best;
        places[threadIdx.x / LANES] = place;
    }
    __syncthreads();
    for (int i = 0; i < WARPS; ++i) {
        const float other = tops[i];
        const int where = places[i];
        if (where < 0 || (place >= 0 && (other > best || (other == best && where < place)))) {
            best = other;
            place = where;
        }
    }
    top = best;
    return place;
}

}  // namespace tenpak

// scores [count], which shared memory has `room` for behind the bins, or 0; lengths: tokens before the one that is chosen;
// token: the choice, -1 where a score is not finite.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const float* scores, int count, const void* options, const int* lengths, int* token, int room) {
    using namespace tenpak;
    let_next_begin();
    wait_for_previous();
    u64* bins = (u64*)dynamic_shared();
    const How how = *(const How*)options;
    float top;
    float* const kept_scores = room ? (float*)(bins + BINS) : nullptr;
    const int first = likeliest(scores, count, kept_scores, top);
    if (first < 0 || how.inverse_temperature == 0.0f) {
        if (threadIdx.x == 0) *token = first;
        return;
    }
    const Scores all = {room ? kept_scores : scores, count, top, how.inverse_temperature};
    // What all considered tokens weigh; 0 as long as all are.
    u64 kept = 0;
    if (how.top_k > 0 && how.top_k < count) {
        const Found last = find<true>(all, bins, [=](u64) { return (u64)how.top_k - 1; });
        const u64 weight = all.weight(last.distance);
        u64 nearer = 0, total;
        all.for_distances([&](int, u32 distance) {
            if (distance < last.distance) nearer += all.weight(distance);
        });
        block_sum_before(nearer, total);
        kept = total + (last.equal + 1) * weight;
    }
    if (how.top_p < 1.0) {
        const Found last = find<false>(all, bins, [&](u64 total) {
            if (!kept) kept = total;
            // The token that reaches the part p is still considered.
            const u64 wanted = (u64)ceil(how.top_p * (double)kept);
            return (wanted > kept ? kept : wanted < 1 ? 1 : wanted) - 1;
        });
        const u64 reached = last.before + (last.equal + 1) * all.weight(last.distance);
        kept = reached < kept ? reached : kept;
    }
    const u64 number = chance(how.seed, (u64)lengths[0]);
    const Found drawn = find<false>(all, bins, [=](u64 total) { return __umul64hi(number, kept ? kept : total); });

    // Nearly always one token has that distance.
    u64 mine = 0, total;
    int only = 0;
    all.for_distances([&](int i, u32 distance) {
        if (distance != drawn.distance) return;
        ++mine;
        only = i;
    });
    block_sum_before(mine, total);
    if (total == 1) {
        if (mine) *token = only;
        return;
    }
    // Else the equal-th of them, in the order of tokens.
    const int each = (count + THREADS - 1) / THREADS, from = threadIdx.x * each, to = min(from + each, count);
    mine = 0;
    for (int i = from; i < to; ++i) mine += all.distance(all.all[i]) == drawn.distance;
    u64 place = block_sum_before(mine, total);
    if (place <= drawn.equal && place + mine > drawn.equal) {
        for (int i = from; i < to; ++i) {
            if (all.distance(all.all[i]) != drawn.distance) continue;
            if (place++ == drawn.equal) *token = i;
        }
    }
}
