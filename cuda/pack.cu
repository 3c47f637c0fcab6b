// An artifact's parts to packed weights, once when a weight is put on the GPU.
//
// Scales and offsets are packed times a power of two, which is chosen by the largest of them.
//
// A thread takes eight columns of a row. Outputs are filled beforehand with what padding is: codes that stand for zero
// under parameters that are zero.
#include "weights.cuh"

// The largest magnitudes of scales and of offsets, as bits of FP32, to found[0] and found[1], which are zero before.
// Grid: threads for batch * n rows of ceil(k / 8) runs.
extern "C" __global__ void __launch_bounds__(256)
largest(const unsigned char* first, const unsigned char* second, const unsigned char* third, const unsigned char* fourth,
        const unsigned char* fifth, unsigned int* found, unsigned long long rows, int n, int k) {
    using namespace tenpak;
    const Shape shape{n, k};
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= rows * shape.runs()) return;
    const Magnitudes here = largest_of<Layout>(Parts{first, second, third, fourth, fifth}, Place(thread, shape), shape);
    // Most see that another has found as much, for what is volatile does not stay in L1.
    const volatile unsigned int* seen = found;
    if (to_bits(here.scale) > seen[0]) atomicMax(found, to_bits(here.scale));
    if (to_bits(here.offset) > seen[1]) atomicMax(found + 1, to_bits(here.offset));
}

// Grid: threads for batch * n rows of ceil(k / 8) runs. `params` and `row_params` are null where the layout has none.
// factor: what scales and offsets are multiplied by, a power of two.
extern "C" __global__ void __launch_bounds__(256)
pack(const unsigned char* first, const unsigned char* second, const unsigned char* third, const unsigned char* fourth,
     const unsigned char* fifth, unsigned int* codes, unsigned char* params, unsigned char* row_params,
     unsigned long long rows, int n, int k, float factor) {
    using namespace tenpak;
    const Shape shape{n, k};
    const u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread >= rows * shape.runs()) return;
    const Place at(thread, shape);
    const Parts parts{first, second, third, fourth, fifth};

    const u64 given = part_codes(parts, at, shape);
    u32* word = codes + packed_word(at, shape);
    if constexpr (HIGH<Layout>) {
        for (int i = 0; i < RUN; ++i) {
            const PlacesOfCode place(at, shape, i);
            const u32 code = (u32)code_of(given, i) << place.before;
            atomicOr(word + word_of(i), (code & 255) << place.low);
            atomicOr(reinterpret_cast<u32*>(params) + place.plane, code >> 8 << place.high);
        }
    } else if constexpr (Layout::CODE_BITS == 4) {
        u32 packed[4] = {};
        for (int i = 0; i < RUN; ++i)
            packed[word_of(i)] |= (u32)exchanged(code_of(given, i)) << (4 * nibble_of(at, shape, i));
        if constexpr (Layout::NATURAL) {
            *word = packed[0];
        } else {
            for (int i = 0; i < 4; ++i) atomicOr(word + i, packed[i]);
        }
    } else {
        const u64 biased = given ^ 0x8080808080808080ull;
        for (int i = 0; i < RUN / 2; ++i) pair_of_bytes(codes, at, shape, i) = (u16)(biased >> (16 * i));
    }
    if constexpr (HAS_PARAMS) {
        if (at.column % Layout::GROUP == 0)
            reinterpret_cast<Layout::Param*>(params)[packed_group<Layout>(at, shape)] =
                scaled<Layout>(Layout::param(parts, part_group<Layout>(at, shape)), factor);
    }
    if constexpr (HAS_ROW_PARAMS) {
        constexpr int EVERY = Layout::ROW_RUN;
        if (EVERY == 0 ? at.column == 0 : at.column % EVERY == 0)
            reinterpret_cast<Layout::RowParam*>(row_params)[packed_row<Layout>(at, shape)] =
                scaled<Layout>(Layout::row_param(parts, part_row<Layout>(at, shape)), factor);
    }
}
