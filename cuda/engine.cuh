// Barriers in shared memory that count bytes and copies, and bulk copies that end at them (compute capability 9.0).
#pragma once
#include "layouts.cuh"
#ifndef RACECHECK
#define RACECHECK 0
#endif

namespace tenpak {

// What the compiler does not ask for again in every loop, as it does for the addresses of shared arrays.
__device__ __forceinline__ u32 keep_address(u32 address) {
    u32 kept;
    asm volatile("mov.u32 %0, %1;" : "=r"(kept) : "r"(address));
    return kept;
}

// -1, of which the compiler does not know that a product with it is a difference. (Blocks have one row of threads.)
__device__ __forceinline__ u32 opaque_minus_one() {
    u32 rows;
    asm volatile("mov.u32 %0, %%ntid.y;" : "=r"(rows));
    return 0 - rows;
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count));
}
// After the barriers' initialization, before anyone uses them.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// At barriers in shared memory a lane arrives for its warp. With -DRACECHECK=1 each does, for that is what compute-sanitizer's
// racecheck follows.
constexpr int ARRIVALS = RACECHECK ? LANES : 1;
__device__ __forceinline__ void lane_arrives(u32 barrier, int lane) {
    if (RACECHECK || lane == 0) barrier_arrive(barrier);
}
__device__ __forceinline__ void warp_arrives(u32 barrier, int lane) {
    __syncwarp();
    lane_arrives(barrier, lane);
}
// And the phase does not end before so many bytes have been copied.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#else
        "again: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
#endif
        "@!done bra again;\n}" :: "r"(barrier), "r"(parity) : "memory");
}

// True in one lane of a warp whose lanes are all here. What the others know, too, then stays in uniform registers, and to ask for
// a copy takes a few instructions; under any other condition it takes a loop over lanes.
__device__ __forceinline__ bool elected() {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
    return yes;
}

// What other blocks have stored, and all that they had stored before it.
__device__ __forceinline__ u32 load_acquire(const u32* at) {
    u32 seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(at) : "memory");
    return seen;
}
// After all that this thread, and those that met it at a barrier, have stored.
__device__ __forceinline__ void add_release(u32* at, u32 value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(at), "r"(value) : "memory");
}

// From global to shared memory, in the background; addresses and `bytes` are multiples of 16, and a copy to a place that is none
// of 32 takes longer.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// What is read once: L2 need not keep it.
__device__ __forceinline__ void copy_bulk_once(u32 to, const void* from, u32 bytes, u32 barrier) {
    constexpr u64 EVICT_FIRST = 0x12f0000000000000;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST) : "memory");
}

}  // namespace tenpak
