// What a weight's code and parameters are, and where they lie: in an artifact's parts (docs/format.md) and packed for
// products (layouts.cuh).
//
// Kernels that include this are compiled with --fmad=false, so that weights are those of the core, bit for bit.
// Selected at compile time: -DLAYOUT=int4_g32_fp16, and for int4_lut16 and _lut32 also -DLUT16_TABLES=..., the layout's
// four tables of rust/codec/lut.rs as sixteen little-endian words.
#pragma once
#include "floats.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace tenpak {

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLS = 64;
constexpr int RUN = 8;  // columns that one thread takes: a packed word of four-bit codes, never in two groups

// Matrices [batch, n, k]; rows are counted over all of them.
struct Shape {
    int n, k;
    __device__ __forceinline__ int strips() const { return (n + TILE_ROWS - 1) / TILE_ROWS; }
    __device__ __forceinline__ int tiles() const { return (k + TILE_COLS - 1) / TILE_COLS; }
    __device__ __forceinline__ int runs() const { return (k + RUN - 1) / RUN; }
};

// A run of columns of one row.
struct Place {
    u64 row;     // over all matrices
    int column;  // its first, a multiple of RUN

    __device__ __forceinline__ Place(u64 thread, Shape shape)
        : row(thread / shape.runs()), column((int)(thread % shape.runs()) * RUN) {}

    // Packed: strips of 16 rows, tiles of 64 columns, and in a tile lane and word as layouts.cuh says.
    __device__ __forceinline__ int in_matrix(Shape s) const { return (int)(row % s.n); }
    __device__ __forceinline__ u64 strip(Shape s) const { return row / s.n * s.strips() + in_matrix(s) / TILE_ROWS; }
    __device__ __forceinline__ u64 tile(Shape s) const { return strip(s) * s.tiles() + column / TILE_COLS; }
    __device__ __forceinline__ int lane(Shape s) const { return in_matrix(s) % 8 * 4 + column % 32 / RUN; }
    __device__ __forceinline__ int word(Shape s) const {
        return in_matrix(s) % TILE_ROWS / 8 + column % TILE_COLS / 32 * 2;
    }
};

// ---- Parameters of groups -----------------------------------------------------------------------------------------

// Bits of codes that are in words of their own, with the parameters of a tile (layouts.cuh).
template <class L>
constexpr int HIGH = L::CODE_BITS == 8 ? 0 : L::CODE_BITS - 4;
template <class L>
constexpr int GROUPS_BYTES = TILE_ROWS * TILE_COLS / L::GROUP * (int)sizeof(typename L::Param);
template <class L>
constexpr int TILE_BYTES = GROUPS_BYTES<L> + HIGH<L> * (TILE_ROWS * TILE_COLS / 8);

// The place among packed parameters of groups.
template <class L>
__device__ __forceinline__ u64 packed_group(const Place& at, Shape s) {
    constexpr int GROUP = L::GROUP;
    const int g = at.in_matrix(s) % 8;
    if constexpr (GROUP <= 32) {
        return at.tile(s) * (TILE_BYTES<L> / sizeof(typename L::Param)) + (g * (32 / GROUP) + at.column % 32 / GROUP) * 4 + at.word(s);
    } else {
        const int groups = (s.tiles() * TILE_COLS + GROUP - 1) / GROUP;
        return ((at.strip(s) * groups + at.column / GROUP) * 8 + g) * 2 + at.in_matrix(s) % TILE_ROWS / 8;
    }
}

// The parts of an artifact's tensor, in its layout's order.
struct Parts {
    const u8* codes;
    const u8* second;
    const u8* third;
    const u8* fourth;
    const u8* fifth;
};

template <class T>
__device__ __forceinline__ T element(const u8* part, u64 i) {
    return reinterpret_cast<const T*>(part)[i];
}

// A layout has: the type Param of the parameters of a group of GROUP, and RowParam of those of a row (of each ROW_RUN
// columns of it, if that is not 0), either of which may be Nothing; how to read them from parts, where each stands for
// REPEAT times as many weights; NATURAL, whether a packed word is a run of codes in order; and value(code, param,
// row_param), a weight as the core rebuilds it. One whose scales and offsets are packed times a power of two
// (`power_of` in tenpak/cuda/layouts.py) has Halves, the type, Param or RowParam, that is made of them as halves, and
// largest(halves), the largest magnitudes that a scale and an offset have under those; for others that is Unscaled.

struct Nothing {};
struct Unscaled {};

struct Magnitudes {
    float scale, offset;
};
__device__ __forceinline__ float larger(float x, float y) {
    x = x < 0.0f ? -x : x;
    y = y < 0.0f ? -y : y;
    return x < y ? y : x;
}

template <int GROUP_>
struct AffinePairs {
    static constexpr int GROUP = GROUP_, CODE_BITS = 4, ROW_RUN = 0, REPEAT = 1;
    static constexpr bool NATURAL = false;
    using Param = u32;
    using RowParam = Nothing;
    using Halves = Param;
    static __device__ __forceinline__ Magnitudes largest(Halves p) {
        return {larger(from_half((u16)p), 0.0f), larger(from_half((u16)(p >> 16)), 0.0f)};
    }
    static __device__ __forceinline__ RowParam row_param(const Parts&, u64) { return {}; }
    static __device__ __forceinline__ Param param(const Parts& parts, u64 i) {
        return element<u16>(parts.second, i) | (u32)element<u16>(parts.third, i) << 16;
    }
    static __device__ __forceinline__ float value(int code, Param p, RowParam) {
        return code * from_half((u16)p) + from_half((u16)(p >> 16));
    }
};

template <int GROUP_, int CODE_BITS_ = 4>
struct AffineBytes {
    static constexpr int GROUP = GROUP_, CODE_BITS = CODE_BITS_, ROW_RUN = 0, REPEAT = 1;
    static constexpr bool NATURAL = false;
    using Param = u16;
    using RowParam = u64;  // s0, ds, o0, do
    using Halves = RowParam;
    static __device__ __forceinline__ Magnitudes largest(Halves r) {
        const float scale = from_half((u16)r), offset = from_half((u16)(r >> 32));
        return {larger(scale, 255.0f * from_half((u16)(r >> 16)) + scale),
                larger(offset, 255.0f * from_half((u16)(r >> 48)) + offset)};
    }
    static __device__ __forceinline__ Param param(const Parts& parts, u64 i) {
        return parts.second[i] | parts.third[i] << 8;
    }
    static __device__ __forceinline__ RowParam row_param(const Parts& parts, u64 i) {
        return element<u64>(parts.fourth, i);
    }
    static __device__ __forceinline__ float value(int code, Param p, RowParam r) {
        const float scale = (p & 255) * from_half((u16)(r >> 16)) + from_half((u16)r);
        const float offset = (p >> 8) * from_half((u16)(r >> 48)) + from_half((u16)(r >> 32));
        return code * scale + offset;
    }
};

#ifdef LUT16_TABLES
__constant__ const u32 LUT16_WORDS[16] = {LUT16_TABLES};
#endif

template <int REPEAT_>
struct Lut16 {
    static constexpr int GROUP = 16, CODE_BITS = 4, ROW_RUN = 256, REPEAT = REPEAT_;
    static constexpr bool NATURAL = true;
    using Param = u8;
    using RowParam = u16;  // d
    using Halves = RowParam;
    static __device__ __forceinline__ Magnitudes largest(Halves d) { return {larger(from_half(d), 0.0f), 0.0f}; }
    static __device__ __forceinline__ Param param(const Parts& parts, u64 i) { return parts.second[i]; }
    static __device__ __forceinline__ RowParam row_param(const Parts& parts, u64 i) { return element<u16>(parts.third, i); }
    static __device__ __forceinline__ float value(int code, Param p, RowParam d) {
#ifdef LUT16_TABLES
        const int l = (p & 63) - (p & 32) * 2;
        const signed char entry = (signed char)(LUT16_WORDS[p >> 6 << 2 | code >> 2] >> (code % 4 * 8));
        return from_half(d) * l * entry;
#else
        return 0.0f;
#endif
    }
};

struct EightBit {
    static constexpr int GROUP = RUN, CODE_BITS = 8, ROW_RUN = 0, REPEAT = 1;
    static constexpr bool NATURAL = true;
    using Param = Nothing;
    using Halves = Unscaled;
    static __device__ __forceinline__ Param param(const Parts&, u64) { return {}; }
    using RowParam = u32;  // an FP32 scale
    static __device__ __forceinline__ RowParam row_param(const Parts& parts, u64 i) { return element<u32>(parts.second, i); }
    static __device__ __forceinline__ float value(int code, Param, RowParam scale) { return code * from_bits(scale); }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

using int4_g8_fp16 = AffinePairs<8>;
using int4_g16_fp16 = AffinePairs<16>;
using int4_g32_fp16 = AffinePairs<32>;
using int4_g64_fp16 = AffinePairs<64>;
using int4_g128_fp16 = AffinePairs<128>;
using int4_g8_u8 = AffineBytes<8>;
using int4_g16_u8 = AffineBytes<16>;
using int5_g32_u8 = AffineBytes<32, 5>;
using int6_g32_u8 = AffineBytes<32, 6>;
using int4_lut16 = Lut16<1>;
using int4_lut32 = Lut16<2>;
using int8_sym = EightBit;

#ifdef LAYOUT
using Layout = LAYOUT;
constexpr bool HAS_PARAMS = !same<Layout::Param, Nothing>;
constexpr bool HAS_ROW_PARAMS = !same<Layout::RowParam, Nothing>;

// ---- Parameters of rows -------------------------------------------------------------------------------------------

template <class L>
__device__ __forceinline__ u64 part_row(const Place& at, Shape s) {
    constexpr int RUN_OF_PART = L::ROW_RUN * L::REPEAT;
    if constexpr (L::ROW_RUN == 0) return at.row;
    else return at.row * ((s.k + RUN_OF_PART - 1) / RUN_OF_PART) + at.column / RUN_OF_PART;
}
// The place among a part's groups.
template <class L>
__device__ __forceinline__ u64 part_group(const Place& at, Shape s) {
    constexpr int GROUP_OF_PART = L::GROUP * L::REPEAT;
    return at.row * ((s.k + GROUP_OF_PART - 1) / GROUP_OF_PART) + at.column / GROUP_OF_PART;
}
template <class L>
__device__ __forceinline__ u64 packed_row(const Place& at, Shape s) {
    if constexpr (L::ROW_RUN == 0) return at.strip(s) * TILE_ROWS + at.in_matrix(s) % TILE_ROWS;
    else {
        const int runs = (s.k + L::ROW_RUN - 1) / L::ROW_RUN;
        return (at.strip(s) * runs + at.column / L::ROW_RUN) * TILE_ROWS + at.in_matrix(s) % TILE_ROWS;
    }
}

// Of the scale and offset that an artifact has for a group, or for a row, by the first run of it.
template <class L>
__device__ __forceinline__ Magnitudes largest_of(const Parts& parts, const Place& at, Shape s) {
    Magnitudes found{0.0f, 0.0f};
    if constexpr (same<typename L::Halves, typename L::Param>) {
        if (at.column % L::GROUP == 0) found = L::largest(L::param(parts, part_group<L>(at, s)));
    } else if constexpr (!same<typename L::Halves, Unscaled>) {
        constexpr int EVERY = L::ROW_RUN;
        if (EVERY == 0 ? at.column == 0 : at.column % EVERY == 0) found = L::largest(L::row_param(parts, part_row<L>(at, s)));
    }
    return found;
}
// Parameters as they are packed: halves times a power of two, or the bits that were given.
template <class L, class P>
__device__ __forceinline__ P scaled(P given, float factor) {
    if constexpr (!same<P, typename L::Halves>) {
        return given;
    } else {
        if (factor == 1.0f) return given;
        P product = 0;
        for (int at = 0; at < 8 * (int)sizeof(P); at += 16)
            product |= (P)to_half(from_half((u16)(given >> at)) * factor) << at;
        return product;
    }
}

// ---- Codes --------------------------------------------------------------------------------------------------------

// Where column i of a run of four-bit codes lies: which word after the run's first, and which nibble of that.
__device__ __forceinline__ int word_of(int i) { return Layout::NATURAL ? 0 : i / 2; }
__device__ __forceinline__ int nibble_of(const Place& at, Shape s, int i) {
    return Layout::NATURAL ? i : at.word(s) + i % 2 * 4;
}

// A code as it is packed, or one as it was: codes into tables have bits 2 and 3 exchanged (layouts.cuh says why).
__device__ __forceinline__ int exchanged(int code) {
    if constexpr (same<Layout, int4_lut16> || same<Layout, int4_lut32>) return (code & 3) | (code & 4) << 1 | (code & 8) >> 1;
    else return code;
}

// A run's BITS each of a part, in natural order; 0 beyond the row's end.
template <int BITS>
__device__ __forceinline__ u64 part_bits(const u8* part, const Place& at, Shape s) {
    const u64 row_bytes = ((u64)s.k * BITS + 7) / 8;
    const u8* row = part + at.row * row_bytes;
    u64 bits = 0;
    for (int i = 0; i < BITS; ++i) {
        const u64 byte = (u64)at.column / RUN * BITS + i;
        if (byte < row_bytes) bits |= (u64)row[byte] << (8 * i);
    }
    return bits;
}
// The run's codes as an artifact has them, four bits each in natural order or eight bits each.
__device__ __forceinline__ u64 part_codes(const Parts& parts, const Place& at, Shape s) {
    constexpr int BITS = HIGH<Layout>;
    if constexpr (BITS == 0) return part_bits<Layout::CODE_BITS>(parts.codes, at, s);
    const u64 low = part_bits<4>(parts.codes, at, s), high = part_bits<BITS>(parts.fifth, at, s);
    u64 codes = 0;
    for (int i = 0; i < RUN; ++i)
        codes |= (low >> (4 * i) & 15 | (high >> (BITS * i) & ((1 << BITS) - 1)) << 4) << (8 * i);
    return codes;
}

// Code i of those.
__device__ __forceinline__ int code_of(u64 codes, int i) {
    if constexpr (Layout::CODE_BITS == 4) return (int)(codes >> (4 * i)) & 15;
    else return (signed char)(codes >> (8 * i));
}

// The first of the run's packed words. Where codes are not natural, pairs of four runs share four, and those of eight bits
// pairs of two runs.
__device__ __forceinline__ u64 packed_word(const Place& at, Shape s) {
    const int lane = at.lane(s), word = at.word(s);
    if constexpr (Layout::CODE_BITS != 8) return at.tile(s) * 128 + lane * 4 + (Layout::NATURAL ? word : 0);
    else return at.tile(s) * 256 + word / 2 * 128 + lane * 4;
}
// Pair i of a run of eight-bit codes.
__device__ __forceinline__ u16& pair_of_bytes(void* codes, const Place& at, Shape s, int i) {
    return static_cast<u16*>(codes)[2 * (packed_word(at, s) + i) + at.word(s) % 2];
}

// Where column i of a run of codes of five or six bits lies: from bit `low` of its packed word on, up to the end of that byte, and
// then from bit `high` of a word among parameters on. Another row's code is before it in that byte, or behind it.
struct PlacesOfCode {
    static constexpr int BITS = Layout::CODE_BITS, PAIRS = HIGH<Layout> == 1 ? 4 : 2;
    u64 plane;
    int before, low, high;

    __device__ __forceinline__ PlacesOfCode(const Place& at, Shape s, int i)
        : plane((at.tile(s) * TILE_BYTES<Layout> + GROUPS_BYTES<Layout>) / 4 + i / 2 / PAIRS * 32 + at.lane(s)),
          before(at.word(s) % 2 * BITS), low(8 * (at.word(s) / 2 + i % 2 * 2)),
          high(8 * (at.word(s) / 2 * 2 + i % 2) + i / 2 % PAIRS * (8 / PAIRS)) {}
};

// What rebuilds a run of a packed weight: its codes, in order, and their parameters.
struct PackedRun {
    u64 codes = 0;
    Layout::Param param{};
    Layout::RowParam row_param{};

    __device__ __forceinline__ PackedRun(const u32* all_codes, const u8* params, const u8* row_params, const Place& at, Shape s) {
        const u32* word = all_codes + packed_word(at, s);
        if constexpr (HIGH<Layout>) {
            for (int i = 0; i < RUN; ++i) {
                const PlacesOfCode place(at, s, i);
                const u32 low = word[word_of(i)] >> place.low & 255, high = element<u32>(params, place.plane) >> place.high << 8;
                codes |= (u64)((high | low) >> place.before & ((1 << place.BITS) - 1)) << (8 * i);
            }
        } else if constexpr (Layout::CODE_BITS == 4) {
            for (int i = 0; i < RUN; ++i) codes |= (u64)exchanged(word[word_of(i)] >> (4 * nibble_of(at, s, i)) & 15) << (4 * i);
        } else {
            for (int i = 0; i < RUN / 2; ++i) codes |= (u64)pair_of_bytes((void*)all_codes, at, s, i) << (16 * i);
            codes ^= 0x8080808080808080ull;
        }
        if constexpr (HAS_PARAMS) param = element<Layout::Param>(params, packed_group<Layout>(at, s));
        if constexpr (HAS_ROW_PARAMS) row_param = element<Layout::RowParam>(row_params, packed_row<Layout>(at, s));
    }
    __device__ __forceinline__ float value(int i) const { return Layout::value(code_of(codes, i), param, row_param); }
};
#endif

}  // namespace tenpak
