// Tokens to hidden states: rows of the embedding, quantised or not, and where positions are learnt, theirs on top.
//
// A thread takes eight columns of a token. The embedding is packed under -DLAYOUT, or plain: -DIN=16 (FP16), 32 (FP32).
#include "overlap.cuh"
#include "weights.cuh"

// tokens [count]; the embedding [vocab, width], whose codes are its elements where it is plain; positions FP32
// [most, width] or null; lengths: tokens before these; h [count, width].
extern "C" __global__ void __launch_bounds__(128)
    embed(const int* tokens, const unsigned int* codes, const unsigned char* params, const unsigned char* row_params,
          const float* positions, const int* lengths, float* h, int vocab, int width, int most, float factor) {
    using namespace tenpak;
    let_next_begin();
    wait_for_previous();
    const int token = blockIdx.y, run = blockIdx.x * 128 + threadIdx.x;
    const Shape shape{vocab, width};
    if (run >= shape.runs()) return;
    // What is no token (of scores that were not finite) is told by who chose it; here it must only not be read.
    const int row = tokens[token] < 0 || tokens[token] >= vocab ? 0 : tokens[token];
    const Place at((u64)row * shape.runs() + run, shape);
    const int position = lengths[0] + token;
    const float* learnt = positions ? positions + (u64)(position < most ? position : most - 1) * width : nullptr;
#ifdef LAYOUT
    const PackedRun packed(codes, params, row_params, at, shape);
#endif
    for (int i = 0; i < RUN && at.column + i < width; ++i) {
        const int column = at.column + i;
#ifdef LAYOUT
        float x = packed.value(i) * factor;
#elif IN == 16
        float x = from_half(element<u16>((const u8*)codes, (u64)row * width + column)) * factor;
#else
        float x = element<float>((const u8*)codes, (u64)row * width + column) * factor;
#endif
        h[(u64)token * width + column] = x + (learnt ? learnt[column] : 0.0f);
    }
}
