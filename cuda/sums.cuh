// Barriers of warps' sums in shared memory: whether a buffer has been written, and whether it has been read.
//
// In shared memory and not the block's own: nobody waits for more than is needed, and compute-sanitizer's racecheck follows them.
#pragma once
#include "engine.cuh"

namespace tenpak {

// WRITERS warps write a buffer, of BUFFERS in turn, and READERS read it.
template <int BUFFERS, int WRITERS, int READERS>
struct SumsBarriers {
    static constexpr int BARRIERS = 2 * BUFFERS;
    u32 at;
    u32 phases = 0;  // a bit for each buffer: of its next use

    __device__ __forceinline__ explicit SumsBarriers(u32 at) : at(at) {}
    // By one thread.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < BUFFERS; ++i) {
            barrier_init(at + 8 * i, WRITERS * ARRIVALS);
            barrier_init(at + 8 * (BUFFERS + i), READERS * ARRIVALS);
        }
    }
    // Before this warp writes, and after it has.
    __device__ __forceinline__ void wait_until_read(int buffer) const { barrier_wait(at + 8 * (BUFFERS + buffer), ~(phases >> buffer) & 1); }
    __device__ __forceinline__ void written(int buffer, int lane) const { warp_arrives(at + 8 * buffer, lane); }
    // Before it reads, and after it has.
    __device__ __forceinline__ void wait_until_written(int buffer) const { barrier_wait(at + 8 * buffer, phases >> buffer & 1); }
    __device__ __forceinline__ void read(int buffer, int lane) const { warp_arrives(at + 8 * (BUFFERS + buffer), lane); }
    // That it has had its part in this use.
    __device__ __forceinline__ void next(int buffer) { phases ^= 1 << buffer; }
};

}  // namespace tenpak
