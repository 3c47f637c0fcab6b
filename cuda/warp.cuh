// What a warp does together: products of tensor cores, transposes, exchanges, and copies that it need not wait for.
//
// Apart from the kernels so that tests can put plain C++ in its place and run them on a CPU.
#pragma once
#include "floats.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace tenpak {

constexpr int LANES = 32;

struct alignas(16) Vector {
    u32 words[4];
};

// Where copies to it begin 16 bytes off a line, each takes four times as long to write.
__device__ __forceinline__ u8* dynamic_shared() {
    extern __shared__ __align__(128) Vector memory[];
    return (u8*)memory;
}

// What the compiler does not ask for again in every loop, as it does for threadIdx and the addresses of shared arrays.
__device__ __forceinline__ int lane_of_warp() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 at;
    asm volatile("mov.u32 %0, %1;" : "=r"(at) : "r"((u32)__cvta_generic_to_shared(p)));
    return at;
}
__device__ __forceinline__ void read(u32 (&words)[1], u32 at) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(at) : "memory");
}
__device__ __forceinline__ void read(u32 (&words)[2], u32 at) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at) : "memory");
}
__device__ __forceinline__ void read(u32 (&words)[4], u32 at) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(at)
                 : "memory");
}

// d += a b: a is 16 x 16, b is 16 x 8, d is 16 x 8 in FP32. Lane 4g + t holds of a rows g and g + 8, columns 2t, 2t + 1
// (words 0, 1) and 2t + 8, 2t + 9 (words 2, 3); of b rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g; of d rows g and
// g + 8, columns 2t and 2t + 1.
template <bool BRAIN>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (BRAIN) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// An 8 x 8 matrix of halves whose row g, columns 2t and 2t + 1 lane 4g + t holds, transposed.
__device__ __forceinline__ u32 transpose(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Four 8 x 8 matrices of halves from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// 16 bytes from global to shared memory, in the background; zeros where `there` is false.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool there = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy16(void* to, const void* from, bool there = true) {
    copy16((u32)__cvta_generic_to_shared(to), from, there);
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Adds one to a counter, after all that the block stored before its last barrier and before all that it reads after the
// next; what it was.
__device__ __forceinline__ u32 arrive_at(u32* counter) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float from_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// From the lane that many below; its own value where there is none.
__device__ __forceinline__ u64 from_lane_below(u64 x, int step) { return __shfl_up_sync(0xffffffffu, x, step); }
__device__ __forceinline__ bool any(bool x) { return __any_sync(0xffffffffu, x); }

// Bytes 0 and 1 (or 2 and 3) of x, each the lower byte of a half.
template <bool UPPER>
__device__ __forceinline__ u32 bytes_as_halves(u32 x) {
    return __byte_perm(x, 0, UPPER ? 0x4342 : 0x4140);
}
// Two floats as halves, `low` in the lower one.
template <bool BRAIN = false>
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 d;
    if constexpr (BRAIN) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    }
    return d;
}
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Activations: FP16, or with BRAIN BF16.
template <bool BRAIN>
__device__ __forceinline__ float from_activation(u16 x) {
    if constexpr (BRAIN) return from_bits((u32)x << 16);
    return from_half(x);
}
template <bool BRAIN>
__device__ __forceinline__ u16 to_activation(float x) {
    return (u16)pack<BRAIN>(x, 0.0f);
}

}  // namespace tenpak
