// What Hopper adds to engine.cuh's barriers: boxes of the copy engine, clusters, and products of a warpgroup.
//
// Apart from the kernels so that tests can put plain C++ in its place and run them on a CPU. sm_90a. -DTOKENS, the columns
// of a block's products.
#pragma once
#include "boxes.cuh"
#include "cluster.cuh"
#include "engine.cuh"

namespace tenpak {

// ---- Lanes and shared memory ----------------------------------------------------------------------------------------

// What the compiler does not ask for again in every loop, as it does for threadIdx and the addresses of shared arrays.
__device__ __forceinline__ int lane_of_warp() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// A pointer that is not put together anew for every use.
__device__ __forceinline__ const u8* keep_pointer(const u8* pointer) {
    const u8* kept;
    asm volatile("mov.b64 %0, %1;" : "=l"(kept) : "l"(pointer));
    return kept;
}

// Four 8 x 8 matrices of halves; lane l gives the address of row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of
// each.
__device__ __forceinline__ uint4 load_matrices(u32 row) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(row) : "memory");
    return v;
}

// ---- Order among threads -----------------------------------------------------------------------------------------------

// Among the 128 threads of one warpgroup.
__device__ __forceinline__ void group_barrier(int group) { asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory"); }

// Among all: those that multiply wait for the others, which go on.
__device__ __forceinline__ void wait_for_block(int threads) { asm volatile("bar.sync 0, %0;" :: "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive_at_block(int threads) { asm volatile("bar.arrive 0, %0;" :: "r"(threads) : "memory"); }

// Among those of all warpgroups that multiply.
__device__ __forceinline__ void consumers_barrier(int threads) { asm volatile("bar.sync 15, %0;" :: "r"(threads) : "memory"); }

// ---- Clusters of blocks -------------------------------------------------------------------------------------------------

// From an address in the cluster's shared memory.
__device__ __forceinline__ float4 read_there(u32 from) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
    return v;
}

// ---- Copies that barriers wait for ----------------------------------------------------------------------------------

// Up to MOST bytes, sixteen a lane and instruction; both are multiples of 16. Of each 512 bytes, this lane's are those at
// `lane`, which go to `place`; the first of them is `on` bytes from where all lanes begin.
template <int MOST>
__device__ __forceinline__ void copy_run(u32 to, const u8* from, u32 on, u32 bytes, int lane, int place) {
    from = keep_pointer(from + on);
    to += 16 * place;
#pragma unroll
    for (int at = 0; at < MOST; at += 16 * LANES) {
        if (at + 16 * lane < bytes)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to + at), "l"(from + at) : "memory");
    }
}
// This thread arrives once all that it has asked for by copy_run is there; the barrier's count has it already.
__device__ __forceinline__ void copies_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}
// ---- Registers --------------------------------------------------------------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

// ---- Matrices of 8 x 8 halves -------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 transpose8x8(u32 pair) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
    return d;
}
// Four of them to shared memory, transposed; lane l gives the address of row l % 8 of what is stored of matrix l / 8.
__device__ __forceinline__ void store_transposed(u32 row, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------

constexpr int SUMS = TOKENS / 2;  // of a thread, for 64 rows

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

// Rows of 128 bytes, swizzled; eight rows are 1024 bytes on.
// The lower half of what wgmma is told; the upper is the same for all.
__device__ __forceinline__ u32 descriptor(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
#define UPPER_DESCRIPTOR "0x40000040"  // 1 << 62 | 1024 / 16 << 32

#if BF16
#define WGMMA_TYPE ".f32.bf16.bf16"
#else
#define WGMMA_TYPE ".f32.f16.f16"
#endif
// Operands %0 to %127 and sums 0 to 127, eight at a time; those of a product are the first of them.
#define R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define R16 R8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R24 R16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define R32 R24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define R40 R32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define R48 R40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define R56 R48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define R64 R56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define R72 R64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define R80 R72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define R88 R80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define R96 R88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define R104 R96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define R112 R104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define R120 R112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define R128 R120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D8 D(0)
#define D16 D8, D(8)
#define D24 D16, D(16)
#define D32 D24, D(24)
#define D40 D32, D(32)
#define D48 D40, D(40)
#define D56 D48, D(48)
#define D64 D56, D(56)
#define D72 D64, D(64)
#define D80 D72, D(72)
#define D88 D80, D(80)
#define D96 D88, D(88)
#define D104 D96, D(96)
#define D112 D104, D(104)
#define D120 D112, D(112)
#define D128 D120, D(120)
// d += a b, under way until a wait: a is 64 x 16, sixteen rows a warp, as of mma.m16n8k16; b is 16 x COLUMNS, of which a thread has
// half as many sums; then come the numbers of the operands of a and b.
#define WGMMA(COLUMNS, SUMS, A0, A1, A2, A3, B)                                                                                   \
    __device__ __forceinline__ void wgmma(float (&d)[SUMS], const u32 (&a)[4], u32 b) {                                           \
        asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%" #B ", " UPPER_DESCRIPTOR "};\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS \
                     "k16" WGMMA_TYPE " {" R##SUMS "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, b, 1, 1, 1, 0;\n}"                  \
                     : D##SUMS                                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));                                                       \
    }
WGMMA(16, 8, 8, 9, 10, 11, 12)
WGMMA(32, 16, 16, 17, 18, 19, 20)
WGMMA(48, 24, 24, 25, 26, 27, 28)
WGMMA(64, 32, 32, 33, 34, 35, 36)
WGMMA(80, 40, 40, 41, 42, 43, 44)
WGMMA(96, 48, 48, 49, 50, 51, 52)
WGMMA(112, 56, 56, 57, 58, 59, 60)
WGMMA(128, 64, 64, 65, 66, 67, 68)
WGMMA(144, 72, 72, 73, 74, 75, 76)
WGMMA(160, 80, 80, 81, 82, 83, 84)
WGMMA(176, 88, 88, 89, 90, 91, 92)
WGMMA(192, 96, 96, 97, 98, 99, 100)
WGMMA(208, 104, 104, 105, 106, 107, 108)
WGMMA(224, 112, 112, 113, 114, 115, 116)
WGMMA(240, 120, 120, 121, 122, 123, 124)
WGMMA(256, 128, 128, 129, 130, 131, 132)
#undef D

// Makes the compiler keep `values` where wgmma, unseen, reads and writes them.
template <int N>
__device__ __forceinline__ void pin(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

}  // namespace tenpak
