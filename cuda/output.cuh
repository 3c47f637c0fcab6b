// What becomes of a strip's sums: scale, bias, function and gates, in the type that is wanted. -DOUTPUT, -DACTIVATION, -DGATED.
#pragma once
#include "activation.cuh"
#include "layouts.cuh"
#ifndef OUTPUT
#define OUTPUT 0
#endif
#ifndef GATED
#define GATED 0
#endif

namespace tenpak {

#if OUTPUT == 0
using Out = u16;
#else
using Out = float;
#endif

struct Output {
    Out* y;
    const u16* bias;
    int n;
    float scale;

    __device__ __forceinline__ float finished(float sum, int row) const {
        return sum * scale + (bias ? widen(bias[row]) : 0.0f);
    }
    static __device__ __forceinline__ void put(Out& to, float x) {
#if OUTPUT == 0
        to = narrow(x);
#elif OUTPUT == 1
        to = x;
#else
        // Past L1, which may hold what was there before a kernel that this one overlaps with: only threads that wait for
        // it see to that.
        to = __ldcg(&to) + x;
#endif
    }
    // A token's rows g and g + 8 of the strip, which several lanes have: lane `which` of them, 0 or 1, stores that row; gated, the first.
    __device__ __forceinline__ void store_rows(float upper, float lower, int strip, int token, int which, int lane) const {
        const int row = strip * TILE_ROWS + lane / 4 + (GATED ? 0 : which * 8);
#if GATED
        if (which == 0 && row + 8 < n)
            put(y[(size_t)token * (n / 2) + strip * 8 + lane / 4], activate(finished(upper, row)) * finished(lower, row + 8));
#else
        if (which < 2 && row < n) put(y[(size_t)token * n + row], activate(finished(which ? lower : upper, row)));
#endif
    }
    // One lane's four sums: rows g and g + 8 of the strip, tokens 2t and 2t + 1.
    __device__ __forceinline__ void store(const float4& sum, int strip, int token, int tokens, float low, float high, int lane) const {
        const int row = strip * TILE_ROWS + lane / 4;
#if BOXED
        token += lane % 4;
        constexpr int NEXT = 4;
#else
        token += lane % 4 * 2;
        constexpr int NEXT = 1;
#endif
        const float v[4] = {sum.x * low, sum.y * low, sum.z * high, sum.w * high};
#if GATED
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (row + 8 >= n || token + i * NEXT >= tokens) continue;
            put(y[(size_t)(token + i * NEXT) * (n / 2) + strip * 8 + lane / 4],
                activate(finished(v[i], row)) * finished(v[2 + i], row + 8));
        }
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + i / 2 * 8, m = token + i % 2 * NEXT;
            if (r < n && m < tokens) put(y[(size_t)m * n + r], activate(finished(v[i], r)));
        }
#endif
    }
};

}  // namespace tenpak
