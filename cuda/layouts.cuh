// How packed weights lie in memory for every layout, and how one lane turns its codes into the A operand of a
// tensor-core instruction.
//
// A weight W [N, K] is cut into tiles of 16 rows x 64 columns, a strip of 16 rows being one run of memory along K.
// Lane l of a warp (g = l / 4, t = l % 4) owns four words of a tile, each eight consecutive weights of one row:
//
//     word 0: row g, columns 8t..8t+7           word 1: row g + 8, the same columns
//     word 2: row g, columns 32 + 8t..          word 3: row g + 8, the same columns
//
// The A fragment of mma.m16n8k16 (and of wgmma.m64k16, warp by warp) wants four pairs a lane: two rows, two pairs
// of columns. Since a product does not care in which order k runs, step 0 of each 32 columns takes columns 8t..8t+3
// of lane t and step 1 takes 8t+4..8t+7. So no shuffle is needed, and the activations' fragment for token g is x[g][32j + 8t ..
// 8t+7], sixteen bytes of row-major memory.
//
// Selected at compile time: -DLAYOUT=int4_g32_fp16 -DBF16=0, and for int4_lut16 and _lut32 also -DLUT16_TABLES=..., the
// layout's four tables of rust/codec/lut.rs as sixteen little-endian words.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BF16
#define BF16 0
#endif
#ifndef RAW
#define RAW 0
#endif

namespace tenpak {

constexpr int TILE_ROWS = 16;
constexpr int TILE_COLS = 64;
constexpr int LANES = 32;
constexpr int WORDS = 4;  // a lane's words of a tile

// ---- Copies to shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Weights are read once, so they pass L1 by.
__device__ __forceinline__ void copy_once(u32 to, const u8* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
template <class T>
__device__ __forceinline__ T read(const u8* from) {
    return *reinterpret_cast<const T*>(from);
}
// From an address in shared memory: kept as 32 bits, it is not made anew from a pointer in every loop.
template <class T>
__device__ __forceinline__ T read(u32 from);
template <>
__device__ __forceinline__ uint4 read<uint4>(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}
template <>
__device__ __forceinline__ uint2 read<uint2>(u32 from) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(from) : "memory");
    return v;
}
template <>
__device__ __forceinline__ u32 read<u32>(u32 from) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}
template <>
__device__ __forceinline__ u16 read<u16>(u32 from) {
    u16 v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
    return v;
}
template <>
__device__ __forceinline__ float read<float>(u32 from) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
    return v;
}
template <>
__device__ __forceinline__ float4 read<float4>(u32 from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void write(u32 to, const float4& v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// ---- Pairs of 16-bit floats ---------------------------------------------------------------------------------------

// (a & b) | c, one instruction.
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// (a & b) ^ c, one instruction.
__device__ __forceinline__ u32 and_xor(u32 a, u32 b, u32 c) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}
// Written as moves, they become operand modifiers of the HFMA2 that uses them.
__device__ __forceinline__ u32 low_twice(u32 pair) {
    u32 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(d) : "r"(pair));
    return d;
}
__device__ __forceinline__ u32 high_twice(u32 pair) {
    u32 d;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(d) : "r"(pair));
    return d;
}

__device__ __forceinline__ u32 half_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ u32 half_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 half_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 bfloat_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// A pair of FP16 as a pair of BF16.
__device__ __forceinline__ u32 to_bfloat(u32 pair) {
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high) : "r"(pair));
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// A float as the activations' type, and two of them as a pair.
__device__ __forceinline__ u16 narrow(float x) {
    u16 d;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
#endif
    return d;
}
__device__ __forceinline__ float widen(u16 x) {
#if BF16
    return __uint_as_float((u32)x << 16);
#else
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
#endif
}
__device__ __forceinline__ float from_half(u16 x) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}
// In the arithmetic of weights: the type of the activations.
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) { return BF16 ? bfloat_fma(a, b, c) : half_fma(a, b, c); }

// ---- Four-bit codes ----------------------------------------------------------------------------------------------

// A lane's sixteen bytes are transposed: word P in memory holds pair P, weights 2P and 2P + 1, of each of the four words
// drawn above, that of word I at nibbles I and I + 4. So a lane that wants one pair of every word, as wgmma's do
// (columns.cuh), reads one, and where in it a pair is, is known when the kernel is compiled.

// The pair of word I as exact floats 0..15. Above its nibbles goes the exponent of 1024 (FP16) or 128 (BF16); what that
// added is subtracted at once, exactly: folded into the offset it would cost up to half a step.
template <int I>
__device__ __forceinline__ u32 code_pair(u32 pairs) {
    if constexpr (BF16) {
        // 1 * (128 + q) - 128. BF16's seven bits leave no room for 16 q.
        return bfloat_fma(and_or(pairs >> (4 * I), 0x000f000f, 0x43004300), 0x3f803f80, 0xc300c300);
    } else if constexpr (I % 2 == 0) {
        return half_sub(and_or(pairs >> (4 * I), 0x000f000f, 0x64006400), 0x64006400);
    } else {
        // (1024 + 16 q) / 16 - 64 saves a shift.
        return half_fma(and_or(pairs >> (4 * I - 4), 0x00f000f0, 0x64006400), 0x2c002c00, 0xd400d400);
    }
}

// q * s + o for that pair; `param` is in the activations' type.
template <int I>
__device__ __forceinline__ u32 affine_pair(u32 pairs, u32 param) {
    return fma_pair(code_pair<I>(pairs), low_twice(param), high_twice(param));
}
// ---- Four-bit codes as they lie -----------------------------------------------------------------------------------
//
// As an FP16 number a nibble is q times 2^-24 where it ends a half, and q times 2^-20 four bits higher (BF16: 2^-133, 2^-129):
// a pair of codes takes one instruction, which leaves nothing but them, and the product with the scale one more. A scale,
// packed to be below four, can take 2^14 (2^125) upon itself. What comes out is a weight over RAW_UNIT.
constexpr float RAW_UNIT = BF16 ? 256.0f : 1024.0f;

// Scale and offset for the pairs of word I, from packed ones.
template <int I>
__device__ __forceinline__ u32 raw_param(u32 param) {
    if constexpr (BF16) return bfloat_fma(to_bfloat(param), I % 2 ? 0x3b807c00 : 0x3b807e00, 0x80008000);
    else return half_mul(param, I % 2 ? 0x14006400 : 0x14007400);
}
// The pair of word I by what that gave.
template <int I>
__device__ __forceinline__ u32 raw_affine_pair(u32 pairs, u32 param) {
    return fma_pair((I < 2 ? pairs : pairs >> 8) & (I % 2 ? 0x00f000f0 : 0x000f000f), low_twice(param), high_twice(param));
}

// ---- Codes of five and six bits -----------------------------------------------------------------------------------
//
// BITS, four and HIGH, of each code. Of two rows, words I (even) and I + 1, the codes of one column are a number of 2 * BITS, the
// first row's lowest. Its low byte lies where their nibbles would, at byte I / 2 of half e of pair P's word. What is above it lies in
// HIGH words more of each lane, so that shifted by the place of P it ends byte I + e of its word: one PRMT then joins both for a pair.

// Pairs P of such a word, and P's place among them.
template <int HIGH>
constexpr int PLANE_PAIRS = 4 / HIGH;
template <int HIGH>
__device__ __forceinline__ int plane_shift(int pair) {
    return pair % PLANE_PAIRS<HIGH> * (2 * HIGH);
}
// Both rows' pair from its word and the shifted word of what is above.
template <int HALF>
__device__ __forceinline__ u32 joined(u32 pairs, u32 high) {
    return permute(pairs, high, HALF ? 0x7361 : 0x5240);
}
// How many bits up the codes of word I are then left: what is above the lower ten, or of BF16 seven, would be no longer a number.
template <int HIGH, int I>
constexpr int UP = I % 2 && HIGH == 1 && !BF16 ? 5 : 0;
template <int HIGH, int I>
__device__ __forceinline__ u32 codes_of(u32 joined) {
    constexpr int BITS = 4 + HIGH;
    constexpr u32 ONES = (1u << BITS) - 1, MASK = (ONES | ONES << 16) << UP<HIGH, I>;
    return (I % 2 && !UP<HIGH, I> ? joined >> BITS : joined) & MASK;
}
// As raw_param, of codes so many bits up.
template <int UP>
__device__ __forceinline__ u32 raw_param_of(u32 param) {
    if constexpr (BF16) return raw_param<0>(param);
    else return half_mul(param, 0x14007400 - 0x400 * UP);
}
// q * s + o, over RAW_UNIT by what that gave, and as it is.
template <int HIGH, int I>
__device__ __forceinline__ u32 raw_plane_pair(u32 joined, u32 param) {
    return fma_pair(codes_of<HIGH, I>(joined), low_twice(param), high_twice(param));
}
template <int HIGH, int I>
__device__ __forceinline__ u32 plane_pair(u32 joined, u32 param) {
    constexpr u32 ONE_OF = 0x3c003c00 - 0x04000400 * UP<HIGH, I>, MINUS = 0xe400e400 - 0x04000400 * UP<HIGH, I>;
    const u32 codes = codes_of<HIGH, I>(joined) | (BF16 ? 0x43004300 : 0x64006400);
    const u32 floats = BF16 ? bfloat_fma(codes, 0x3f803f80, 0xc300c300) : half_fma(codes, ONE_OF, MINUS);
    return fma_pair(floats, low_twice(param), high_twice(param));
}

// A lane's words of a tile's high bits.
template <int HIGH>
struct Plane {
    u32 words[HIGH];
    template <class At>
    __device__ __forceinline__ void load(At from, int lane) {
#pragma unroll
        for (int i = 0; i < HIGH; ++i) words[i] = read<u32>(from + 4 * (i * LANES + lane));
    }
};
template <>
struct Plane<0> {
    template <class At>
    __device__ __forceinline__ void load(At, int) {}
};

// For the eight weights of word I.
template <int I>
__device__ __forceinline__ void affine(const uint4& codes, u32 param, u32 (&out)[4]) {
    if constexpr (RAW) {
        const u32 p = raw_param<I>(param);
        out[0] = raw_affine_pair<I>(codes.x, p);
        out[1] = raw_affine_pair<I>(codes.y, p);
        out[2] = raw_affine_pair<I>(codes.z, p);
        out[3] = raw_affine_pair<I>(codes.w, p);
        return;
    }
    const u32 p = BF16 ? to_bfloat(param) : param;
    out[0] = affine_pair<I>(codes.x, p);
    out[1] = affine_pair<I>(codes.y, p);
    out[2] = affine_pair<I>(codes.z, p);
    out[3] = affine_pair<I>(codes.w, p);
}

template <int I, int HIGH>
__device__ __forceinline__ void affine(const uint4& codes, const Plane<HIGH>& plane, u32 param, u32 (&out)[4]) {
    const u32 p = RAW ? raw_param_of<UP<HIGH, I>>(param) : BF16 ? to_bfloat(param) : param;
    const u32 pairs[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 both = joined<I / 2>(pairs[i], plane.words[i / PLANE_PAIRS<HIGH>] >> plane_shift<HIGH>(i));
        out[i] = RAW ? raw_plane_pair<HIGH, I>(both, p) : plane_pair<HIGH, I>(both, p);
    }
}

// ---- Layouts -----------------------------------------------------------------------------------------------------
//
// A warp copies two tiles' codes and parameters, as they lie in memory, to a stage in shared memory, and reads its
// lanes' parts from there. (Loads straight into registers would share the few scoreboards that the hardware has, so
// that waiting for the oldest tile means waiting for the newest.) Each layout has: CODE_BYTES of a tile and
// PARAM_BYTES of a stage; params(weight, strip, k, lane), where the parameters of tiles k (even) and k + 1 begin that
// this lane copies, params_step(stages, lane), how far those lie that many stages on, and copy_params(from, count, stage,
// lane), count being 1 or 2; Tile, a lane's registers for one tile, and tile<J>(codes, params, lane) of tile J of a stage; Rows, its registers for one
// strip, and rows(weight, strip, lane); fragment<WORD>(tile, rows): eight weights; and row_scale(rows, high), which
// multiplies the accumulators of rows g and g + 8.

struct Weight {
    const u8* codes;
    const u8* params;
    const u8* row_params;
    int tiles;   // of 64 columns in a strip
    int supers;  // super-scales of a row (int4_lut16)
};

struct NoRows {};

// Bytes that lie one after another.
struct ParamRun {
    const u8* from;
    u32 bytes;
};
struct NoSuperRun {
    static __device__ __forceinline__ ParamRun super_run(const Weight&, int, int, int) { return {nullptr, 0}; }
};

struct FourBit : NoSuperRun {
    static constexpr int CODE_BYTES = 16 * LANES;
    static __device__ __forceinline__ u32 word(const uint4& codes, int i) {
        return i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w;
    }
    static __device__ __forceinline__ float row_scale(const NoRows&, bool) { return 1.0f; }
};

// With scale and offset.
struct Affine : FourBit {
    static __device__ __forceinline__ float row_scale(const NoRows&, bool) { return RAW ? RAW_UNIT : 1.0f; }
};

// Parameters of BYTES a tile (or a stage) that follow each other in memory.
template <int BYTES>
struct Run {
    static __device__ __forceinline__ const u8* at(const u8* params, u32 first, int lane) {
        return params + (size_t)first * BYTES + 16 * lane;
    }
    static __device__ __forceinline__ void copy(const u8* from, int count, u32 stage, int lane) {
#pragma unroll
        for (int at = 0; at < 2 * BYTES; at += 16 * LANES)
            if (at + 16 * lane < count * BYTES) copy_once(stage + at + 16 * lane, from + at);
    }
};

// FP16 (scale, offset) for groups of 8, 16 and 32: per tile [g][group of 4 / SUBGROUPS lanes][word], sixteen bytes a lane.
template <int GROUP>
struct AffinePairs : Affine {
    static_assert(GROUP == 8 || GROUP == 16 || GROUP == 32, "a word must lie in one group, and a group in one half tile");
    static constexpr int SUBGROUPS = 32 / GROUP;
    static constexpr int BYTES = 8 * SUBGROUPS * 16, PARAM_BYTES = 2 * BYTES, PAIR_BYTES = PARAM_BYTES, SIZE = GROUP;
    static_assert(BYTES == TILE_ROWS * TILE_COLS / GROUP * 4, "four bytes a group");
    struct Tile {
        uint4 codes, params;
    };
    using Rows = NoRows;
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k, int lane) {
        return Run<BYTES>::at(w.params, strip * w.tiles + k, lane);
    }
    static __device__ __forceinline__ ParamRun param_run(const Weight& w, int strip, int k, int count) {
        return {w.params + (size_t)(u32)(strip * w.tiles + k) * BYTES, (u32)count * BYTES};
    }
    static __device__ __forceinline__ int params_step(int stages, int) { return stages * PARAM_BYTES; }
    static __device__ __forceinline__ void copy_params(const u8* from, int count, u32 stage, int lane) {
        Run<BYTES>::copy(from, count, stage, lane);
    }
    template <int J, class At>
    static __device__ __forceinline__ Tile tile(At codes, At params, At, int lane) {
        return {read<uint4>(codes + 16 * lane),
                read<uint4>(params + J * BYTES + (lane / 4 * SUBGROUPS + lane % 4 * SUBGROUPS / 4) * 16)};
    }
    static __device__ __forceinline__ Rows rows(const Weight&, int, int) { return {}; }
    template <int WORD>
    static __device__ __forceinline__ void fragment(const Tile& tile, const Rows&, u32 (&out)[4]) {
        affine<WORD>(tile.codes, word(tile.params, WORD), out);
    }
};

// FP16 (scale, offset) for groups of 64 and 128: [strip][group][g][row g, row g + 8], eight bytes a lane.
template <int GROUP>
struct AffineWide : Affine {
    static_assert(GROUP == 64 || GROUP == 128, "a group is one tile or two");
    static constexpr int TILES = GROUP / TILE_COLS;
    static constexpr int BYTES = TILE_ROWS * 4, PARAM_BYTES = 2 / TILES * BYTES, PAIR_BYTES = PARAM_BYTES, SIZE = GROUP;
    struct Tile {
        uint4 codes;
        uint2 params;
    };
    using Rows = NoRows;
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k, int lane) {
        return Run<BYTES>::at(w.params, strip * ((w.tiles + TILES - 1) / TILES) + k / TILES, lane);
    }
    static __device__ __forceinline__ ParamRun param_run(const Weight& w, int strip, int k, int count) {
        return {w.params + (size_t)(u32)(strip * ((w.tiles + TILES - 1) / TILES) + k / TILES) * BYTES,
                (u32)((count + TILES - 1) / TILES * BYTES)};
    }
    static __device__ __forceinline__ int params_step(int stages, int) { return stages * PARAM_BYTES; }
    static __device__ __forceinline__ void copy_params(const u8* from, int count, u32 stage, int lane) {
        Run<BYTES>::copy(from, TILES == 1 ? count : 1, stage, lane);
    }
    template <int J, class At>
    static __device__ __forceinline__ Tile tile(At codes, At params, At, int lane) {
        return {read<uint4>(codes + 16 * lane), read<uint2>(params + J / TILES * BYTES + lane / 4 * 8)};
    }
    static __device__ __forceinline__ Rows rows(const Weight&, int, int) { return {}; }
    template <int WORD>
    static __device__ __forceinline__ void fragment(const Tile& tile, const Rows&, u32 (&out)[4]) {
        affine<WORD>(tile.codes, WORD % 2 ? tile.params.y : tile.params.x, out);
    }
};

// One-byte (scale, offset) on a line for each row: s = s0 + u*ds, o = o0 + v*do; eight bytes a lane, in the order of
// AffinePairs; row_params [Np][s0, ds, o0, do]. Of codes with HIGH bits more than four, those of a tile follow (Plane).
template <int GROUP, int HIGH = 0>
struct AffineBytes : Affine {
    static_assert(GROUP == 8 || GROUP == 16 || GROUP == 32, "a word must lie in one group, and a group in one half tile");
    static constexpr int SUBGROUPS = 32 / GROUP;
    static constexpr int STEP_BYTES = 8 * SUBGROUPS * 8, BYTES = STEP_BYTES + HIGH * 4 * LANES;
    static constexpr int PARAM_BYTES = 2 * BYTES, PAIR_BYTES = PARAM_BYTES, SIZE = GROUP;
    static_assert(STEP_BYTES == TILE_ROWS * TILE_COLS / GROUP * 2, "two bytes a group");
    struct Tile {
        uint4 codes;
        uint2 params;
        Plane<HIGH> plane;
    };
    struct Rows {
        u32 base[2], step[2];  // (s0, o0) and (ds, do) of rows g and g + 8
    };
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k, int lane) {
        return Run<BYTES>::at(w.params, strip * w.tiles + k, lane);
    }
    static __device__ __forceinline__ ParamRun param_run(const Weight& w, int strip, int k, int count) {
        return {w.params + (size_t)(u32)(strip * w.tiles + k) * BYTES, (u32)count * BYTES};
    }
    static __device__ __forceinline__ int params_step(int stages, int) { return stages * PARAM_BYTES; }
    static __device__ __forceinline__ void copy_params(const u8* from, int count, u32 stage, int lane) {
        Run<BYTES>::copy(from, count, stage, lane);
    }
    template <int J, class At>
    static __device__ __forceinline__ Tile tile(At codes, At params, At, int lane) {
        Tile tile{read<uint4>(codes + 16 * lane),
                  read<uint2>(params + J * BYTES + (lane / 4 * SUBGROUPS + lane % 4 * SUBGROUPS / 4) * 8), {}};
        tile.plane.load(params + J * BYTES + STEP_BYTES, lane);
        return tile;
    }
    static __device__ __forceinline__ Rows rows(const Weight& w, int strip, int lane) {
        Rows r;
        for (int i = 0; i < 2; ++i) {
            const uint2 p = __ldg(reinterpret_cast<const uint2*>(w.row_params) + strip * TILE_ROWS + lane / 4 + 8 * i);
            r.base[i] = permute(p.x, p.y, 0x5410);
            r.step[i] = permute(p.x, p.y, 0x7632);
        }
        return r;
    }
    template <int WORD>
    static __device__ __forceinline__ void fragment(const Tile& tile, const Rows& rows, u32 (&out)[4]) {
        const u32 bytes = permute(WORD < 2 ? tile.params.x : tile.params.y, 0x64646464, WORD % 2 ? 0x4342 : 0x4140);
        const u32 param = half_fma(half_sub(bytes, 0x64006400), rows.step[WORD % 2], rows.base[WORD % 2]);
        if constexpr (HIGH) affine<WORD>(tile.codes, tile.plane, param, out);
        else affine<WORD>(tile.codes, param, out);
    }
    static __device__ __forceinline__ float row_scale(const Rows&, bool) { return Affine::row_scale({}, false); }
};

#ifdef LUT16_TABLES
__constant__ const u32 LUT16_WORDS[16] = {LUT16_TABLES};
#endif

// Codes that index one of four tables of int8; a byte (L, t) for each 16 weights, four bytes a lane; FP16 super-scales
// d in row_params [strips][supers][16 rows]. A weight is d*L*T[t][q]. Nibbles lie in natural order: what is looked up
// are bytes, and PRMT pairs them.
//
// A code's bits 2 and 3 are exchanged. PRMT chooses among eight bytes by three bits of a nibble; where the fourth is
// set it gives the chosen byte's sign instead, eight times. So a byte of one half table and one of the other, found with
// the fourth bit turned round, make the entry together, if the bytes at the same place of both halves have the same sign:
// negative entries are 0..3 of each half, the others 4..7. By exclusive or, if where the sign is set one half's bytes
// are inverted; as a sum, if where it is set, which then is -1, all entries are larger by one.
struct Lut16 : FourBit {
    static constexpr int SUPER_TILES = 256 / TILE_COLS;
    static constexpr int SCALE_BYTES = TILE_ROWS * TILE_COLS / 16;
    static constexpr int SUPER_BYTES = TILE_ROWS * 2;
    static constexpr int PAIR_BYTES = 2 * SCALE_BYTES, PARAM_BYTES = PAIR_BYTES + SUPER_BYTES, SIZE = 16;
    struct Tile {
        uint4 codes;
        u32 params;
        u32 supers;  // of rows g and g + 8
    };
    using Rows = NoRows;
    static constexpr int SCALE_LANES = 2 * SCALE_BYTES / 16;  // those that copy L and t; the next two, d
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k, int lane) {
        const u8* scales = w.params + (size_t)(u32)(strip * w.tiles + k) * SCALE_BYTES;
        const u8* supers = w.row_params + (size_t)(u32)(strip * w.supers + k / SUPER_TILES) * SUPER_BYTES - 16 * SCALE_LANES;
        return (lane < SCALE_LANES ? scales : supers) + 16 * lane;
    }
    static __device__ __forceinline__ ParamRun param_run(const Weight& w, int strip, int k, int count) {
        return {w.params + (size_t)(u32)(strip * w.tiles + k) * SCALE_BYTES, (u32)count * SCALE_BYTES};
    }
    // k is a multiple of SUPER_TILES.
    static __device__ __forceinline__ ParamRun super_run(const Weight& w, int strip, int k, int count) {
        return {w.row_params + (size_t)(u32)(strip * w.supers + k / SUPER_TILES) * SUPER_BYTES,
                (u32)((count + SUPER_TILES - 1) / SUPER_TILES * SUPER_BYTES)};
    }
    // An even number of stages.
    static __device__ __forceinline__ int params_step(int stages, int lane) {
        return lane < SCALE_LANES ? stages * 2 * SCALE_BYTES : stages * 2 / SUPER_TILES * SUPER_BYTES;
    }
    static __device__ __forceinline__ void copy_params(const u8* from, int count, u32 stage, int lane) {
        if (lane < PARAM_BYTES / 16 && (count == 2 || lane >= SCALE_LANES || lane < SCALE_LANES / 2))
            copy_once(stage + 16 * lane, from);
    }
    template <int J, class At>
    static __device__ __forceinline__ Tile tile(At codes, At params, At supers, int lane) {
        return {read<uint4>(codes + 16 * lane), read<u32>(params + J * SCALE_BYTES + (lane / 4 * 2 + lane % 4 / 2) * 4),
                permute(read<u16>(supers + lane / 4 * 2), read<u16>(supers + lane / 4 * 2 + 16), 0x5410)};
    }
    static __device__ __forceinline__ Rows rows(const Weight&, int, int) { return {}; }

    // Half tables in shared memory, (x, y) and (z, w), filled once by each block.
    // Of entries, which must not be -1, the second half backwards; of entries + 128; of those, the second half backwards.
    enum Form { SUM, BIASED_XOR, BACKWARDS_XOR };
    static __device__ __forceinline__ const u8* tables() { return reinterpret_cast<const u8*>(half_tables()); }
    // Word `thread` of all half tables: of the first half's entries 0..3 or 8..11, or of the second's 4..7 or 12..15.
    static __device__ __forceinline__ u32 half_table(int thread, Form form) {
#ifdef LUT16_TABLES
        const int place = thread % 4;
        const u32 entries = LUT16_WORDS[thread - place + place / 2 + place % 2 * 2];
        // The second half table backwards, for codes that are turned round as a whole.
        const u32 backwards = permute(LUT16_WORDS[thread - place + (place == 2 ? 3 : 1)], 0, 0x0123);
        if (form == SUM) {
            if (place < 2) return place % 2 ? entries : entries + 0x01010101;
            return backwards + (place == 2 ? 0 : 0x01010101);
        }
        if (form == BACKWARDS_XOR && place >= 2) return backwards ^ (place == 2 ? 0x7f7f7f7f : 0x80808080);
        return entries ^ (place == 3 ? 0x7f7f7f7f : 0x80808080);
#else
        return 0;
#endif
    }
    static __device__ __forceinline__ void prepare(int thread, Form form) {
        if (thread < 16) half_tables()[thread] = half_table(thread, form);
    }
    static __device__ __forceinline__ u32* half_tables() {
        alignas(256) __shared__ uint4 words[4];
        return reinterpret_cast<u32*>(words);
    }
    // What the half tables give for a word's weights 0..3 and 4..7.
    template <int WORD>
    static __device__ __forceinline__ void look_up(const uint4& words, u32 params, u32 (&first)[2], u32 (&second)[2]) {
        const u32 codes = word(words, WORD), turned = codes ^ 0x88888888;
        const uint4 table = read<uint4>(tables() + ((WORD ? params >> (8 * WORD + 2) : params >> 2) & 0x30));
        first[0] = permute(table.x, table.y, codes);
        first[1] = permute(table.x, table.y, codes >> 16);
        second[0] = permute(table.z, table.w, turned);
        second[1] = permute(table.z, table.w, turned >> 16);
    }
    // L of two groups of a row as halves, from L + 32 above 1024; or of the row eight below.
    static __device__ __forceinline__ u32 levels(u32 params, bool below) {
        return half_sub(and_xor(below ? params >> 8 : params, 0x003f003f, 0x64206420), 0x64206420);
    }
    template <int WORD>
    static __device__ __forceinline__ void fragment(const Tile& tile, const Rows&, u32 (&out)[4]) {
        u32 one[2], other[2];
        look_up<WORD>(tile.codes, tile.params, one, other);
        const u32 first = one[0] ^ other[0], second = one[1] ^ other[1];
        const u32 l = levels(tile.params, WORD % 2);
        const u32 scales = half_mul(l, WORD % 2 ? high_twice(tile.supers) : low_twice(tile.supers));
        const u32 s = WORD < 2 ? low_twice(scales) : high_twice(scales);
        const u32 pairs[4] = {permute(first, 0x64646464, 0x4140), permute(first, 0x64646464, 0x4342),
                              permute(second, 0x64646464, 0x4140), permute(second, 0x64646464, 0x4342)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 weight = half_mul(half_sub(pairs[i], 0x64806480), s);
            out[i] = BF16 ? to_bfloat(weight) : weight;
        }
    }
};

// Eight bits and one FP32 scale a row, which multiplies the accumulators. Two planes of sixteen bytes a lane: words 0
// and 1, then 2 and 3, biased by 128. Word P of a plane is pair P of both.
struct EightBit : NoSuperRun {
    static constexpr int CODE_BYTES = 2 * 16 * LANES;
    static constexpr int PARAM_BYTES = 0, PAIR_BYTES = 0, SIZE = 0;
    struct Tile {
        uint4 low, high;
    };
    struct Rows {
        float scale[2];
    };
    static __device__ __forceinline__ const u8* params(const Weight&, int, int, int) { return nullptr; }
    static __device__ __forceinline__ ParamRun param_run(const Weight&, int, int, int) { return {nullptr, 0}; }
    static __device__ __forceinline__ int params_step(int, int) { return 0; }
    static __device__ __forceinline__ void copy_params(const u8*, int, u32, int) {}
    template <int J, class At>
    static __device__ __forceinline__ Tile tile(At codes, At, At, int lane) {
        return {read<uint4>(codes + 16 * lane), read<uint4>(codes + 16 * (LANES + lane))};
    }
    static __device__ __forceinline__ Rows rows(const Weight& w, int strip, int lane) {
        const float* p = reinterpret_cast<const float*>(w.row_params) + strip * TILE_ROWS + lane / 4;
        return {{__ldg(p), __ldg(p + 8)}};
    }
    // Two of four bytes as exact floats -128..127.
    template <int HIGH>
    static __device__ __forceinline__ u32 byte_pair(u32 bytes) {
        if constexpr (BF16) {
            // BF16 holds seven bits below its leading one: bit 7 goes into what is subtracted, 128 or 256.
            const u32 spread = permute(bytes, 0, HIGH ? 0x4342 : 0x4140);
            return bfloat_fma(and_or(spread, 0x007f007f, 0x43004300), 0x3f803f80, and_xor(spread, 0x00800080, 0xc380c380));
        } else {
            return half_sub(permute(bytes, 0x64646464, HIGH ? 0x4342 : 0x4140), 0x64806480);
        }
    }
    template <int WORD>
    static __device__ __forceinline__ void fragment(const Tile& tile, const Rows&, u32 (&out)[4]) {
        const uint4& plane = WORD < 2 ? tile.low : tile.high;
        out[0] = byte_pair<WORD % 2>(plane.x);
        out[1] = byte_pair<WORD % 2>(plane.y);
        out[2] = byte_pair<WORD % 2>(plane.z);
        out[3] = byte_pair<WORD % 2>(plane.w);
    }
    static __device__ __forceinline__ float row_scale(const Rows& rows, bool high) { return rows.scale[high]; }
};

using int4_g8_fp16 = AffinePairs<8>;
using int4_g16_fp16 = AffinePairs<16>;
using int4_g32_fp16 = AffinePairs<32>;
using int4_g64_fp16 = AffineWide<64>;
using int4_g128_fp16 = AffineWide<128>;
using int4_g8_u8 = AffineBytes<8>;
using int4_g16_u8 = AffineBytes<16>;
using int5_g32_u8 = AffineBytes<32, 1>;
using int6_g32_u8 = AffineBytes<32, 2>;
using int4_lut16 = Lut16;
using int4_lut32 = Lut16;  // packed with each parameter twice
using int8_sym = EightBit;

#ifdef LAYOUT
using Layout = LAYOUT;

constexpr int STAGE_TILES = 2;
constexpr int STAGE_BYTES = STAGE_TILES * Layout::CODE_BYTES + Layout::PARAM_BYTES;
static_assert(STAGE_BYTES % 16 == 0, "stages are copied in pieces of 16 bytes");

// What a lane copies to a stage, from tile k (even) of a strip on.
struct Source {
    const u8 *codes, *params;

    __device__ __forceinline__ Source(const Weight& w, int strip, int k, int lane)
        : codes(w.codes + (size_t)(u32)(strip * w.tiles + k) * Layout::CODE_BYTES + 16 * lane),
          params(Layout::params(w, strip, k, lane)) {}

    // To the stage so many further in the same strip; an even number of them.
    __device__ __forceinline__ void advance(int stages, int lane) {
        codes += stages * STAGE_TILES * Layout::CODE_BYTES;
        params += Layout::params_step(stages, lane);
    }
    // The tile, and the one after it if count is 2, by the lanes of one warp.
    __device__ __forceinline__ void copy(int count, u32 stage, int lane) const {
#pragma unroll
        for (int at = 0; at < STAGE_TILES * Layout::CODE_BYTES; at += 16 * LANES)
            if (at < Layout::CODE_BYTES || count == 2) copy_once(stage + at + 16 * lane, codes + at);
        Layout::copy_params(params, count, stage + STAGE_TILES * Layout::CODE_BYTES, lane);
    }
};
__device__ __forceinline__ void copy_stage(const Weight& w, int strip, int k, int count, u32 stage, int lane) {
    Source(w, strip, k, lane).copy(count, stage, lane);
}
template <int J>
__device__ __forceinline__ Layout::Tile read_stage(const u8* stage, int lane) {
    const u8* params = stage + STAGE_TILES * Layout::CODE_BYTES;
    return Layout::template tile<J>(stage + J * Layout::CODE_BYTES, params, params + Layout::PAIR_BYTES, lane);
}

// The A operands of the two steps of columns 32*HALF..32*HALF+31: a[step][row g, row g+8, row g, row g+8].
template <int HALF>
__device__ __forceinline__ void fragments(const Layout::Tile& tile, const Layout::Rows& rows, u32 (&a)[2][4]) {
    u32 upper[4], lower[4];
    Layout::template fragment<2 * HALF>(tile, rows, upper);
    Layout::template fragment<2 * HALF + 1>(tile, rows, lower);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
        a[step][0] = upper[2 * step];
        a[step][1] = lower[2 * step];
        a[step][2] = upper[2 * step + 1];
        a[step][3] = lower[2 * step + 1];
    }
}
#endif

}  // namespace tenpak
