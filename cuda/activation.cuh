// The functions between a decoder's two layers of an MLP. -DACTIVATION: 0 none, 1 SiLU, 2 GELU by tanh, 3 GELU, 4 ReLU.
#pragma once

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

namespace tenpak {

__device__ __forceinline__ float activate(float x) {
#if ACTIVATION == 1
    return x / (1.0f + expf(-x));
#elif ACTIVATION == 2
    return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
#elif ACTIVATION == 3
    return 0.5f * x * (1.0f + erff(0.7071067811865476f * x));
#elif ACTIVATION == 4
    return fmaxf(x, 0.0f);
#else
    return x;
#endif
}

}  // namespace tenpak
