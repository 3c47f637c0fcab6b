// The residual stream and the norms before each product: h += y, then out = norm(h) in the activations' type.
//
// One block a token; sums are FP32. A thread keeps its EACH elements in registers, and asks for the weights before it waits
// for h. -DTHREADS, -DEACH (threads times EACH: at least the width), -DBF16, -DCENTRED: 0 RMS norm, 1 layer norm.
#include "overlap.cuh"
#include "reduce.cuh"

// h [tokens, width]; y [tokens, width] to be added, or null; weight, and bias if centred, [width]; out [tokens, width].
extern "C" __global__ void __launch_bounds__(THREADS)
    normalise(float* h, const u16* y, const float* weight, const float* bias, u16* out, int width, float eps) {
    using namespace tenpak;
    let_next_begin();
    // Each thread comes back to its own elements only.
    float x[EACH], factors[EACH], terms[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int i = threadIdx.x + j * THREADS;
        factors[j] = i < width ? weight[i] : 0.0f;
        terms[j] = CENTRED && i < width ? bias[i] : 0.0f;
    }
    wait_for_previous();
    h += (u64)blockIdx.x * width;
    out += (u64)blockIdx.x * width;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int i = threadIdx.x + j * THREADS;
        x[j] = i < width ? h[i] : 0.0f;
    }
    if (y) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            const int i = threadIdx.x + j * THREADS;
            if (i < width) h[i] = x[j] += from_activation<BF16>(y[(u64)blockIdx.x * width + i]);
        }
    }
    float mean = 0.0f, sum = 0.0f;
    if (CENTRED) {
#pragma unroll
        for (int j = 0; j < EACH; ++j) sum += x[j];
        mean = block_sum(sum) / width;
        sum = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        x[j] -= mean;
        if ((int)threadIdx.x + j * THREADS < width) sum += x[j] * x[j];
    }
    const float factor = 1.0f / sqrtf(block_sum(sum) / width + eps);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int i = threadIdx.x + j * THREADS;
        if (i < width) out[i] = to_activation<BF16>(x[j] * factor * factors[j] + terms[j]);
    }
}
