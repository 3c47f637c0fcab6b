// Weights on their way to shared memory, DEPTH steps of a block ahead of its products, also across the end of a strip.
//
// A step is two tiles of each warp, of STRIPS strips. With -DENGINE=1 (compute capability 9.0) the copy engine brings what all
// warps take, a few long runs of memory, asked for by COPIERS warps; else each warp copies its own tiles, sixteen bytes a
// lane. Either Ring has place(stages, warp), where a warp's tiles are in the first stage, and wait(), how far on those are that
// come next, once they are there; release() says that they are in registers.
#pragma once
#include "tokens.cuh"

namespace tenpak {

// Parts of K that the sums of a turn's strips are of: which is this block's, of how many, how many there are at most, and where
// these strips are among those that have several.
struct Parts {
    u32 mine;
    int count, most;
    int strip, strips;
};

// What a block multiplies, in order: STRIPS strips from strip(turn) on for each turn that it has, and of each the tiles from
// first_tile on, up to step end(turn). (How many turns there are takes a division, which is not made before the
// first copies.)
//
// With -DHEAD=1 what is left over when all blocks have `wholes` turns is cut along K: each block has `head` steps of it before its
// own turns, of one turn or the end of one and the beginning of the next. So there is no last turn for a few blocks only, and blocks
// wait for each other's sums while they go on.
struct Walk {
    int slices, strips, first, every;
    int first_tile, count;  // of this block's slice
    int steps;              // of a whole turn

    __device__ __forceinline__ Walk(int strips, int tiles, int slice)
        : slices(gridDim.y), strips(strips), first(blockIdx.x), every(gridDim.x), first_tile(blockIdx.y * slice),
          count(min(slice, tiles - first_tile)),
          steps(((count + STEP_TILES - 1) / STEP_TILES + UNROLL - 1) / UNROLL * UNROLL) {}
    // The `first` of `every` blocks that share the strips.
    __device__ __forceinline__ Walk(int strips, int tiles, int slice, int first, int every) : Walk(strips, tiles, slice) {
        this->first = first;
        this->every = every;
    }
#if HEAD
    int wholes, head;
    int heads, head_strip;     // turns that are parts, and the first one's strip
    int head_begin, head_end;  // its steps, counted on beyond its last

    // step_ratio: 2^32 / steps, rounded up.
    __device__ __forceinline__ Walk(int strips, int tiles, int slice, int wholes, int head, u32 step_ratio) : Walk(strips, tiles, slice) {
        const int begin = first * head, before = (int)((u64)(u32)begin * step_ratio >> 32);
        this->wholes = wholes;
        this->head = head;
        head_strip = (wholes * every + before) * STRIPS;
        head_begin = begin - before * steps;
        head_end = head_begin + head;
        heads = head_strip >= strips ? 0 : head_end > steps && head_strip + STRIPS < strips ? 2 : 1;
        if (!heads) head_begin = 0;
    }
    __device__ __forceinline__ bool has(int turn) const { return turn < heads + wholes; }
    __device__ __forceinline__ int strip(int turn) const {
        return turn < heads ? head_strip + turn * STRIPS : (first + (turn - heads) * every) * STRIPS;
    }
    __device__ __forceinline__ int end(int turn) const {
        return turn >= heads ? steps : turn ? head_end - steps : min(head_end, steps);
    }
    __device__ __forceinline__ Parts parts(int turn) const {
        if (turn >= heads) return {0, 1, 1, strip(turn), strips};
        const int before = wholes * every * STRIPS, begins = (strip(turn) - before) / STRIPS * steps, whose = begins / head;
        return {(u32)(first - whose), (begins + steps - 1) / head - whose + 1, (steps + head - 2) / head + 1, strip(turn) - before,
                strips - before};
    }
#else
    static constexpr int head_begin = 0;

    __device__ __forceinline__ bool has(int turn) const { return strip(turn) < strips; }
    __device__ __forceinline__ int strip(int turn) const { return (first + turn * every) * STRIPS; }
    __device__ __forceinline__ int end(int) const { return steps; }
    __device__ __forceinline__ Parts parts(int turn) const { return {blockIdx.y, slices, slices, strip(turn), strips}; }
#endif
    // One of a turn's; beyond the last the last again.
    __device__ __forceinline__ int strip(int turn, int i) const { return min(strip(turn) + i, strips - 1); }
};

#if ENGINE
// Each step is for one of GROUPS groups of warps, in turn.
struct Ring {
    static constexpr int PARAMS_AT = STEP_TILES * Layout::CODE_BYTES, SUPERS_AT = PARAMS_AT + SHARERS * Layout::PAIR_BYTES;
    static constexpr int BARRIERS = 2 * DEPTH;

    u32 stages, full, empty;
    int slot;
    u32 phase = 0;

    __device__ __forceinline__ Ring(u32 stages, u32 barriers, int first = 0)
        : stages(stages), full(barriers), empty(barriers + 8 * DEPTH), slot(first) {}
    static __device__ __forceinline__ PairAt place(u32 stages, int warp) {
        constexpr int SUPER_BYTES = Layout::PARAM_BYTES - Layout::PAIR_BYTES;
        static_assert(STAGE_TILES == 2 && (SHARERS % 2 == 0 || SUPER_BYTES == 0), "two warps' tiles have one super-scale");
        return {stages + warp * STAGE_TILES * Layout::CODE_BYTES, stages + PARAMS_AT + warp * Layout::PAIR_BYTES,
                stages + SUPERS_AT + warp / 2 * SUPER_BYTES};
    }
    // By one thread.
    static __device__ __forceinline__ void init(u32 barriers) {
        for (int i = 0; i < DEPTH; ++i) {
            barrier_init(barriers + 8 * i, COPIERS);
            barrier_init(barriers + 8 * (DEPTH + i), SHARERS * ARRIVALS);
        }
    }
    __device__ __forceinline__ void advance(int by) {
        slot += by;
        if (slot >= DEPTH) {
            slot -= DEPTH;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ u32 wait() const {
        barrier_wait(full + 8 * slot, phase);
        return slot * STRIPS * BLOCK_STAGE_BYTES;
    }
    __device__ __forceinline__ void release(int lane) {
        warp_arrives(empty + 8 * slot, lane);
        advance(GROUPS);
    }

    // One step's copies, once its stage is empty: those of one copier, a warp.
    __device__ __forceinline__ void copy(const Walk& walk, const Weight& weight, int turn, int step, int copier) {
        barrier_wait(empty + 8 * slot, phase ^ 1);
        const int tile = walk.first_tile + step * STEP_TILES, here = min(STEP_TILES, walk.first_tile + walk.count - tile);
        const u32 barrier = full + 8 * slot;
        // Of each strip, codes are for one and parameters for another, if there is another.
        auto mine = [&](int piece) { return COPIERS == 1 || piece % COPIERS == copier; };
        const u32 of_codes = here * Layout::CODE_BYTES, of_params = Layout::param_run(weight, 0, tile, here).bytes;
        const u32 of_supers = Layout::super_run(weight, 0, tile, here).bytes;
        u32 bytes = 0;
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) bytes += (mine(2 * i) ? of_codes : 0) + (mine(2 * i + 1) ? of_params + of_supers : 0);
        if (elected()) {
            barrier_expect(barrier, bytes);
#pragma unroll
            for (int i = 0; i < STRIPS; ++i) {
                const u32 to = stages + (slot * STRIPS + i) * BLOCK_STAGE_BYTES;
                const int strip = walk.strip(turn, i);
                if (mine(2 * i))
                    copy_bulk_once(to, weight.codes + (size_t)(u32)(strip * weight.tiles + tile) * Layout::CODE_BYTES, of_codes, barrier);
                if (mine(2 * i + 1)) {
                    if (Layout::PAIR_BYTES) copy_bulk_once(to + PARAMS_AT, Layout::param_run(weight, strip, tile, here).from, of_params, barrier);
                    if (Layout::PARAM_BYTES > Layout::PAIR_BYTES)
                        copy_bulk_once(to + SUPERS_AT, Layout::super_run(weight, strip, tile, here).from, of_supers, barrier);
                }
            }
        }
        advance(1);
    }
};
#else
static_assert(STRIPS == 1 && GROUPS == 1, "several strips, and groups, need the copy engine");

struct Ring {
    u32 stages;
    Walk walk;
    Weight weight;
    Source source;
    int warp, lane, turn_ahead, left, steps_left;
    int slot = 0;

    __device__ __forceinline__ Ring(u32 all_stages, const Walk& walk, const Weight& weight, int warp, int lane)
        : stages(all_stages + warp * (DEPTH * STAGE_BYTES)), walk(walk), weight(weight),
          source(weight, walk.first, walk.first_tile + STAGE_TILES * warp, lane), warp(warp), lane(lane), turn_ahead(0),
          left(walk.count - STAGE_TILES * warp), steps_left(walk.steps) {
#pragma unroll 1
        for (int first = 0; first < DEPTH; first += UNROLL) {
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) copy_ahead(first + i);
            turn();
        }
    }
    static __device__ __forceinline__ PairAt place(u32 all_stages, int warp) {
        const u32 codes = all_stages + warp * (DEPTH * STAGE_BYTES), params = codes + STAGE_TILES * Layout::CODE_BYTES;
        return {codes, params, params + Layout::PAIR_BYTES};
    }
    // From `source`, and how many tiles there are from there to the end of the slice.
    __device__ __forceinline__ void copy_ahead(int to) {
        if (left > 0) source.copy(left > 1 ? 2 : 1, stages + to * STAGE_BYTES, lane);
        commit_copies();
        source.advance(WARPS, lane);
        left -= STEP_TILES;
    }
    // After each UNROLL of those.
    __device__ __forceinline__ void turn() {
        if ((steps_left -= UNROLL) > 0) return;
        ++turn_ahead;
        steps_left = walk.steps;
        source = Source(weight, walk.strip(turn_ahead), walk.first_tile + STAGE_TILES * warp, lane);
        left = walk.has(turn_ahead) ? walk.count - STAGE_TILES * warp : 0;
    }
    // Of the next UNROLL steps, the one `i` after the next.
    __device__ __forceinline__ u32 wait(int i) const {
        wait_for_copies<DEPTH - 1>();
        __syncwarp();
        return (slot + i) * STAGE_BYTES;
    }
    __device__ __forceinline__ void release(int i) {
        __syncwarp();
        copy_ahead(slot + i);
    }
    // After UNROLL steps.
    __device__ __forceinline__ void next() {
        turn();
        slot = slot + UNROLL == DEPTH ? 0 : slot + UNROLL;
    }
};
#endif

}  // namespace tenpak
