// Weights rebuilt as FP32, FP16 or BF16, with the core's bits: from an artifact's parts, and from packed weights.
//
// A thread takes eight columns of a row. -DOUT=32 (FP32), 16 (FP16) or 116 (BF16).
#include "weights.cuh"

namespace tenpak {

#if OUT == 32
using Out = float;
#else
using Out = u16;
#endif

struct Exponent {
    float factor;   // 2^exponent
    float largest;  // finite value of the output's type; levels may reach a little beyond the largest weight
};

__device__ __forceinline__ Out narrow(float x, Exponent e) {
    if (e.factor != 1.0f) {
        x *= e.factor;
        x = x < -e.largest ? -e.largest : x > e.largest ? e.largest : x;
    }
#if OUT == 32
    return x;
#elif OUT == 16
    return to_half(x);
#else
    const u32 bits = to_bits(x);  // finite: to nearest, ties to even
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// The run's weights to out [outer, k, inner], inner being 1 where rows are the array's own.
__device__ __forceinline__ void store(Out* out, const Place& at, Shape s, int inner, u64 codes, Layout::Param param,
                                      Layout::RowParam row_param, Exponent e) {
    Out* to = out + (at.row / inner * s.k + at.column) * inner + at.row % inner;
    for (int i = 0; i < RUN && at.column + i < s.k; ++i)
        to[(u64)i * inner] = narrow(Layout::value(code_of(codes, i), param, row_param), e);
}

}  // namespace tenpak

extern "C" __global__ void __launch_bounds__(256)
decode_parts(const unsigned char* first, const unsigned char* second, const unsigned char* third,
             const unsigned char* fourth, const unsigned char* fifth, void* out, unsigned long long rows, int k, int inner,
             float factor, float largest) {
    using namespace tenpak;
    const Shape shape{1, k};
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= rows * shape.runs()) return;
    const Place at(thread, shape);
    const Parts parts{first, second, third, fourth, fifth};
    Layout::Param param{};
    Layout::RowParam row_param{};
    if constexpr (HAS_PARAMS) param = Layout::param(parts, part_group<Layout>(at, shape));
    if constexpr (HAS_ROW_PARAMS) row_param = Layout::row_param(parts, part_row<Layout>(at, shape));
    store(static_cast<Out*>(out), at, shape, inner, part_codes(parts, at, shape), param, row_param, Exponent{factor, largest});
}

extern "C" __global__ void __launch_bounds__(256)
decode_packed(const unsigned int* codes, const unsigned char* params, const unsigned char* row_params, void* out,
              unsigned long long rows, int n, int k, float factor, float largest) {
    using namespace tenpak;
    const Shape shape{n, k};
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= rows * shape.runs()) return;
    const Place at(thread, shape);
    const PackedRun run(codes, params, row_params, at, shape);
    store(static_cast<Out*>(out), at, shape, 1, run.codes, run.param, run.row_param, Exponent{factor, largest});
}
