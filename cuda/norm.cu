// The residual stream and the norms before each product: h += y, then out = norm(h) in the activations' type.
//
// One block a token; sums are FP32. -DTHREADS, -DBF16, -DCENTRED: 0 RMS norm, 1 layer norm.
#include "overlap.cuh"
#include "reduce.cuh"

// h [tokens, width]; y [tokens, width] to be added, or null; weight, and bias if centred, [width]; out [tokens, width].
extern "C" __global__ void __launch_bounds__(THREADS)
    normalise(float* h, const u16* y, const float* weight, const float* bias, u16* out, int width, float eps) {
    using namespace tenpak;
    let_next_begin();
    wait_for_previous();
    h += (u64)blockIdx.x * width;
    out += (u64)blockIdx.x * width;
    // Each thread comes back to its own elements only.
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float x = h[i];
        if (y) h[i] = x += from_activation<BF16>(y[(u64)blockIdx.x * width + i]);
        sum += CENTRED ? x : x * x;
    }
    float mean = 0.0f;
    if (CENTRED) {
        mean = block_sum(sum) / width;
        sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += THREADS) sum += (h[i] - mean) * (h[i] - mean);
    }
    const float factor = 1.0f / sqrtf(block_sum(sum) / width + eps);
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float x = (h[i] - mean) * factor * weight[i];
        if (CENTRED) x += bias[i];
        out[i] = to_activation<BF16>(x);
    }
}
