// One token times a weight that is not quantised: a warp for each row, the row's halves of a warp's loads in order.
//
// -DIN=16 (FP16) or 32 (FP32), -DBF16 (of x), -DOUTPUT: 0 the activations' type, 1 FP32, 2 added to FP32.
#include "overlap.cuh"
#include "warp.cuh"

namespace tenpak {

#if IN == 32
using In = float;
__device__ __forceinline__ float value(In x) { return x; }
#else
using In = u16;
__device__ __forceinline__ float value(In x) { return from_half(x); }
#endif
constexpr int WARPS = 8;
constexpr int AT_ONCE = 16 / sizeof(In);

struct alignas(16) Values {
    In of[AT_ONCE];
};

}  // namespace tenpak

// w [n, k], x [k], bias [n] or null, y [n].
extern "C" __global__ void __launch_bounds__(tenpak::WARPS * 32)
    product(const tenpak::In* w, const u16* x, void* y, const u16* bias, int n, int k) {
    using namespace tenpak;
    let_next_begin();
    wait_for_previous();
    const int row = blockIdx.x * WARPS + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    if (row >= n) return;
    const In* weights = w + (u64)row * k;
    float sum = 0.0f;
    int column = 0;
    if (k % AT_ONCE == 0) {
#pragma unroll 4
        for (column = lane * AT_ONCE; column < k; column += LANES * AT_ONCE) {
            const Values v = *(const Values*)(weights + column);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) sum += value(v.of[i]) * from_activation<BF16>(x[column + i]);
        }
    } else {
        for (column = lane; column < k; column += LANES) sum += value(weights[column]) * from_activation<BF16>(x[column]);
    }
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) sum += exchange(sum, mask);
    if (lane) return;
    if (bias) sum += from_activation<BF16>(bias[row]);
#if OUTPUT == 0
    ((u16*)y)[row] = to_activation<BF16>(sum);
#elif OUTPUT == 1
    ((float*)y)[row] = sum;
#else
    ((float*)y)[row] += sum;
#endif
}
