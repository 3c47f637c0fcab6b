// What stands between the layers of an MLP, for many tokens; for few the product does it at its end (skinny.cu).
//
// -DACTIVATION, -DBF16, -DGATED: 0 no gates, 1 y's outputs come in sixteens, eight gates and then the eight that they
// multiply, 2 y's are gates and `others` what they multiply.
#include "activation.cuh"
#include "overlap.cuh"
#include "warp.cuh"

// y [tokens, inner] (in turns: [tokens, 2 · inner]) to out [tokens, inner]; `count` elements of out.
extern "C" __global__ void __launch_bounds__(256)
    gate(const u16* y, const u16* others, u16* out, unsigned long long count) {
    using namespace tenpak;
    let_next_begin();
    wait_for_previous();
    const u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= count) return;
    const u64 from = GATED == 1 ? i / 8 * 16 + i % 8 : i;
    float x = activate(from_activation<BF16>(y[from]));
    if (GATED) x *= from_activation<BF16>(GATED == 1 ? y[from + 8] : others[i]);
    out[i] = to_activation<BF16>(x);
}
