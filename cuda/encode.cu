// Min/max encoding to FP16 (scale, offset) pairs, byte-equal to rust/codec/minmax.rs.
//
// A thread takes a group, so that it can follow the core's order of comparisons: which of two zeros of different sign is
// an offset's depends on it. Compiled with --fmad=false. -DWIDTH, the weights of a group, and -DIN=32 (FP32), 16 (FP16) or
// 116 (BF16).
#include "weights.cuh"

namespace tenpak {

constexpr int GROUP = WIDTH;

__device__ __forceinline__ float weight(const void* data, u64 i) {
#if IN == 32
    return static_cast<const float*>(data)[i];
#elif IN == 16
    return from_half(static_cast<const u16*>(data)[i]);
#else
    return from_bits((u32)static_cast<const u16*>(data)[i] << 16);
#endif
}

}  // namespace tenpak

// data [outer, k, inner] to codes [rows, ceil(k / 2)], scales and offsets [rows, ceil(k / GROUP)] of rows = outer * inner,
// after a multiplication by `factor`. `range` takes the bits of the largest magnitude before it; what was written means
// nothing where that is not finite.
extern "C" __global__ void __launch_bounds__(128)
encode(const void* data, unsigned char* codes, unsigned short* scales, unsigned short* offsets, unsigned int* range,
       unsigned long long rows, int k, int inner, float factor) {
    using namespace tenpak;
    const u64 groups = (k + GROUP - 1) / GROUP, thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= rows * groups) return;
    // Neighbouring threads take neighbouring memory where rows are not the array's own.
    const u64 group = thread / inner % groups, outer = thread / inner / groups, row = outer * inner + thread % inner;
    const u64 start = (outer * k + group * GROUP) * inner + thread % inner;
    const int left = k - (int)group * GROUP, length = left < GROUP ? left : GROUP;

    float x[GROUP];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        // A shorter group is filled up with its first.
        x[i] = weight(data, start + (u64)(i < length ? i : 0) * inner);
        const u32 magnitude = to_bits(x[i]) & 0x7fffffff;
        if (magnitude > largest) largest = magnitude;
        x[i] *= factor;
    }
    if (largest > *static_cast<volatile unsigned int*>(range)) atomicMax(range, largest);

    float low = x[0], high = x[0];
#pragma unroll
    for (int i = 1; i < GROUP; ++i) {
        low = low < x[i] ? low : x[i];
        high = high > x[i] ? high : x[i];
    }
    const u16 scale = to_half((high - low) / 15.0f), offset = to_half(low);
    scales[row * groups + group] = scale;
    offsets[row * groups + group] = offset;

    // A scale of zero must not divide; infinity sends every code to zero.
    const float divisor = from_half(scale) > 0.0f ? from_half(scale) : from_bits(0x7f800000), origin = from_half(offset);
    u8* to = codes + row * ((k + 1) / 2) + group * (GROUP / 2);
#pragma unroll
    for (int i = 0; i < GROUP; i += 2) {
        u32 pair = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float q = (x[i + j] - origin) / divisor;
            q = q > 0.0f ? q : 0.0f;
            q = q < 15.0f ? q : 15.0f;
            if (i + j < length) pair |= (u32)rintf(q) << (4 * j);
        }
        if (i < length) to[i / 2] = (u8)pair;
    }
}
