// The norm before a product, made by each of its blocks: the residual stream, FP32, becomes activations in shared memory.
//
// Every block reads a token's whole row, which lies in L2, and adds up its squares for itself: that takes less than a launch of
// its own would, which everybody had to wait for. A thread takes EACH times four neighbouring columns, and has asked for their
// weights before the previous kernel has ended. -DNORM: 1 RMS norm, 2 layer norm; -DEACH.
#pragma once
#include "tokens.cuh"

namespace tenpak {

// The barrier of those who multiply, apart from others that a block has.
constexpr int SUMMED = 3;

// The same sum in all threads that multiply.
__device__ __forceinline__ float sum_of_threads(float x, float* parts) {
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) x += __shfl_xor_sync(~0u, x, mask);
    // What was summed last has been read.
    wait_at_barrier<THREADS>(SUMMED);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = x;
    wait_at_barrier<THREADS>(SUMMED);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += parts[i];
    return sum;
}

// Products is what multiplies: it has put(row, columns, column, values, lane), several times four values of one token.
template <class Products>
struct NormedStaging {
    XSlice from;
    float eps;
    float4 factors[EACH], terms[EACH];

    __device__ __forceinline__ static int column(int j) { return ((int)threadIdx.x + j * THREADS) * 4; }

    // weight and bias (or null) [k], k being a multiple of four.
    __device__ __forceinline__ NormedStaging(const XSlice& from, const float* weight, const float* bias, float eps)
        : from(from), eps(eps) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const bool there = column(j) < from.k;
            const float4 zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            factors[j] = there ? *reinterpret_cast<const float4*>(weight + column(j)) : zeros;
            terms[j] = NORM == 2 && there && bias ? *reinterpret_cast<const float4*>(bias + column(j)) : zeros;
        }
    }

    __device__ __forceinline__ void stage(u8* to, int row_bytes) {
        __shared__ float parts[WARPS];
        for (int token = 0; token < from.tokens; ++token) {
            const float* row = reinterpret_cast<const float*>(from.x) + token * from.stride;
            float4 x[EACH];
            float sum = 0.0f, mean = 0.0f;
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                // Past L1, which a kernel that this one overlaps with may have filled.
                x[j] = column(j) < from.k ? __ldcg(reinterpret_cast<const float4*>(row + column(j)))
                                          : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            if (NORM == 2) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) sum += x[j].x + x[j].y + x[j].z + x[j].w;
                mean = sum_of_threads(sum, parts) / from.k;
                sum = 0.0f;
            }
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                x[j] = make_float4(x[j].x - mean, x[j].y - mean, x[j].z - mean, x[j].w - mean);
                if (column(j) < from.k) sum += x[j].x * x[j].x + x[j].y * x[j].y + x[j].z * x[j].z + x[j].w * x[j].w;
            }
            const float factor = 1.0f / sqrtf(sum_of_threads(sum, parts) / from.k + eps);
            constexpr int AT_ONCE = EACH < 4 ? EACH : 4;
#pragma unroll
            for (int first = 0; first < EACH; first += AT_ONCE) {
                uint2 values[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    const int j = min(first + i, EACH - 1);
                    const float4 f = factors[j], t = terms[j];
                    values[i].x = narrow(x[j].x * factor * f.x + t.x) | (u32)narrow(x[j].y * factor * f.y + t.y) << 16;
                    values[i].y = narrow(x[j].z * factor * f.z + t.z) | (u32)narrow(x[j].w * factor * f.w + t.w) << 16;
                }
                Products::put(to + token * row_bytes, from.columns, [&](int i) { return column(min(first + i, EACH - 1)) - from.first_column; },
                              values, threadIdx.x % LANES);
            }
        }
    }
};

}  // namespace tenpak
