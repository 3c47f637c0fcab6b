// The instructions that products of few tokens are made of: those of tensor cores, reads and copies that some lanes do without,
// and barriers of a part of a block.
//
// Apart from what uses them so that tests can put plain C++ in their place and run it on a CPU.
#pragma once
#include "engine.cuh"

namespace tenpak {

// d += a b: sixteen rows of weights times eight tokens, of sixteen columns, in the activations' type.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Of 32 columns of eight-bit integers; those of a are SIGNED or not.
template <bool SIGNED>
__device__ __forceinline__ void multiply(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Values stay as they are where `wanted` is zero.
__device__ __forceinline__ void read_if(u32 wanted, u32 from, u32& x, u32& y) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %3, 0;\n@wanted ld.shared.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(x), "+r"(y) : "r"(from), "r"(wanted) : "memory");
}
__device__ __forceinline__ void read_if(u32 wanted, u32 from, u32& x, u32& y, u32& z, u32& w) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %5, 0;\n@wanted ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "+r"(x), "+r"(y), "+r"(z), "+r"(w) : "r"(from), "r"(wanted) : "memory");
}
__device__ __forceinline__ void write(u32 to, const float2& v) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(to), "f"(v.x), "f"(v.y) : "memory");
}
// Sixteen bytes, of which so many are there; the others become zeros.
__device__ __forceinline__ void copy_or_zeros(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One of a block's barriers, for OF of its threads.
template <int OF>
__device__ __forceinline__ void wait_at_barrier(int barrier) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "n"(OF) : "memory");
}
// And not before `made`, which is not zero: what is to be made while the others are waited for.
template <int OF>
__device__ __forceinline__ void wait_at_barrier_after(u64 made, int barrier) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u64 p, %2, 0;\n@p bar.sync %0, %1;\n}" :: "r"(barrier), "n"(OF), "l"(made) : "memory");
}

}  // namespace tenpak
