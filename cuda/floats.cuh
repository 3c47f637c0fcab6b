// FP16 and BF16 to FP32 and back, rounded to nearest even as the core rounds.
//
// Apart from weights.cuh so that tests can put plain C++ in its place and run those kernels on a CPU.
#pragma once

namespace tenpak {

__device__ __forceinline__ float from_half(unsigned short x) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}
__device__ __forceinline__ unsigned short to_half(float x) {
    unsigned short d;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
__device__ __forceinline__ float from_bits(unsigned int x) { return __uint_as_float(x); }
__device__ __forceinline__ unsigned int to_bits(float x) { return __float_as_uint(x); }

}  // namespace tenpak
