// One lane's part of the A operand of wgmma for tokens that lie in shared memory as they lie in global memory.
//
// layouts.cuh lets a lane keep the eight columns of its own words and has the tokens' columns put in that order, which
// needs a thread's hands. The copy engine can swizzle chunks of sixteen bytes but not look into them. So here the weights
// yield: of each chunk of eight columns a lane takes pair t = lane % 4. Word t of what lane 4g + chunk has in memory is
// that pair of all its rows, so that one ldmatrix gives a lane what it wants of four chunks; the copy engine then brings
// tokens with no thread's help. (int4_lut16, whose words are in order, reads all of its quad's.)
//
// Each layout has: PARAM_BYTES(tiles) of so many tiles of a strip (of two, the first being even), and params(weight, strip,
// k), where those of tile k begin, and params_of_strip(weight), how far from a strip's those of the next are; SUPER_BYTES,
// supers(weight, strip, k) and supers_of_strip(weight) alike; Tile, a lane's registers for one tile, read by
// load<J>(codes, params, supers, lane); rows(weight, strip, lane), its registers for one strip; operand<QUARTER>(tile, rows, lane,
// a), columns 16 * QUARTER .. 16 * QUARTER + 15: a[0] and a[1] are rows g and g + 8 of the first chunk, a[2] and a[3] of the
// second; and row_scale(rows, high), which multiplies the accumulators of rows g and g + 8.
#pragma once
#include "hopper.cuh"

namespace tenpak {

// Of each 512 bytes, sixteen of each lane, where a lane's lie: within 128 bytes, so that copies stay whole, and so that those
// of one chunk and eight rows, which are read together, meet all banks.
__device__ __forceinline__ int place_of(int lane) { return lane ^ lane / 8; }
// Where what this lane reads of four chunks begins: row lane % 8 of chunk lane / 8.
__device__ __forceinline__ u32 row_of_chunk(u32 codes, int lane) { return codes + 16 * place_of(lane % 8 * 4 + lane / 8); }

// Rows as layouts.cuh has them.
template <class Layout>
struct RowsOf {
    using Rows = typename Layout::Rows;
    static __device__ __forceinline__ Rows rows(const Weight& w, int strip, int lane) { return Layout::rows(w, strip, lane); }
    static __device__ __forceinline__ float row_scale(const Rows& rows, bool high) { return Layout::row_scale(rows, high); }
};

struct NoSupers {
    static constexpr int SUPER_BYTES = 0;
    static __device__ __forceinline__ const u8* supers(const Weight&, int, int) { return nullptr; }
    static __device__ __forceinline__ u32 supers_of_strip(const Weight&) { return 0; }
};

// For layouts with scale and offset, whose codes are taken as they lie.
template <class Layout, class Params>
struct AffineColumns : NoSupers {
    struct Tile {
        uint4 pairs;  // t of all four lanes' words, as layouts.cuh has them
        typename Params::Held params;
    };
    using Rows = typename Layout::Rows;
    static constexpr int PARAM_BYTES(int tiles) { return Params::BYTES * Params::units(tiles); }
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k) {
        return w.params + (size_t)(u32)(strip * Params::units(w.tiles) + Params::unit(k)) * Params::BYTES;
    }
    static __device__ __forceinline__ u32 params_of_strip(const Weight& w) { return Params::units(w.tiles) * Params::BYTES; }
    template <int J>
    static __device__ __forceinline__ Tile load(u32 codes, u32 params, u32, int lane) {
        Tile tile;
        tile.pairs = load_matrices(row_of_chunk(codes + J * FourBit::CODE_BYTES, lane));
        Params::load(tile.params, params + Params::unit(J) * Params::BYTES, lane);
        return tile;
    }
    static __device__ __forceinline__ Rows rows(const Weight& w, int strip, int lane) {
        Rows rows = Layout::rows(w, strip, lane);
        Params::scale(rows);
        return rows;
    }
    static __device__ __forceinline__ float row_scale(const Rows&, bool) { return RAW_UNIT; }
    template <int QUARTER>
    static __device__ __forceinline__ void operand(const Tile& tile, const Rows& rows, int lane, u32 (&a)[4]) {
        constexpr int UPPER = QUARTER / 2 * 2, LOWER = UPPER + 1, FIRST = QUARTER % 2 * 2, SECOND = FIRST + 1;
        const u32 first = FourBit::word(tile.pairs, FIRST), second = FourBit::word(tile.pairs, SECOND);
        a[0] = raw_affine_pair<UPPER>(first, Params::template raw<UPPER>(tile.params, rows, FIRST));
        a[1] = raw_affine_pair<LOWER>(first, Params::template raw<LOWER>(tile.params, rows, FIRST));
        a[2] = raw_affine_pair<UPPER>(second, Params::template raw<UPPER>(tile.params, rows, SECOND));
        a[3] = raw_affine_pair<LOWER>(second, Params::template raw<LOWER>(tile.params, rows, SECOND));
    }
};

// Each has BYTES for a unit; there are units(tiles), and tile k's is unit(k). raw<WORD>(held, rows, c) is raw_param of that
// word of lane c; scale(rows), once a strip, does what can be done for that beforehand.
struct PairsOnly {
    static __device__ __forceinline__ void scale(const NoRows&) {}
};
template <int GROUP>
struct PairsOfTile : PairsOnly {
    static constexpr int SUBGROUPS = 32 / GROUP, BYTES = AffinePairs<GROUP>::BYTES;
    struct Held {
        uint4 of[SUBGROUPS];
    };
    static __device__ __forceinline__ constexpr int units(int tiles) { return tiles; }
    static __device__ __forceinline__ constexpr int unit(int k) { return k; }
    static __device__ __forceinline__ void load(Held& held, u32 params, int lane) {
#pragma unroll
        for (int i = 0; i < SUBGROUPS; ++i) held.of[i] = read<uint4>(params + (lane / 4 * SUBGROUPS + i) * 16);
    }
    template <int WORD>
    static __device__ __forceinline__ u32 raw(const Held& held, const NoRows&, int c) {
        return raw_param<WORD>(FourBit::word(held.of[c * SUBGROUPS / 4], WORD));
    }
};

template <int GROUP>
struct PairsOfTiles : PairsOnly {
    static constexpr int TILES = AffineWide<GROUP>::TILES, BYTES = AffineWide<GROUP>::BYTES;
    struct Held {
        uint2 of;
    };
    static __device__ __forceinline__ constexpr int units(int tiles) { return (tiles + TILES - 1) / TILES; }
    static __device__ __forceinline__ constexpr int unit(int k) { return k / TILES; }
    static __device__ __forceinline__ void load(Held& held, u32 params, int lane) {
        held.of = read<uint2>(params + lane / 4 * 8);
    }
    template <int WORD>
    static __device__ __forceinline__ u32 raw(const Held& held, const NoRows&, int) {
        return raw_param<WORD>(WORD % 2 ? held.of.y : held.of.x);
    }
};

template <int GROUP, int HIGH = 0>
struct BytesOfTile {
    static constexpr int SUBGROUPS = 32 / GROUP, BYTES = AffineBytes<GROUP, HIGH>::BYTES;
    struct Held {
        uint2 of[SUBGROUPS];
    };
    static __device__ __forceinline__ constexpr int units(int tiles) { return tiles; }
    static __device__ __forceinline__ constexpr int unit(int k) { return k; }
    static __device__ __forceinline__ void load(Held& held, u32 params, int lane) {
#pragma unroll
        for (int i = 0; i < SUBGROUPS; ++i) held.of[i] = read<uint2>(params + (lane / 4 * SUBGROUPS + i) * 8);
    }
    // In FP16 the scale's u is multiplied by 2^14 ds (or 2^10 ds), and the offset's v 2^-10 by do, which may be too small
    // to be divided.
    using Rows = typename AffineBytes<GROUP, HIGH>::Rows;
    static __device__ __forceinline__ void scale(Rows& rows) {
        if (BF16) return;
        rows.base[0] = raw_param<0>(rows.base[0]);
        rows.base[1] = raw_param<1>(rows.base[1]);
        rows.step[0] = half_mul(rows.step[0], 0x3c007400);
        rows.step[1] = half_mul(rows.step[1], 0x3c006400);
    }
    template <int WORD, int AS_IN = WORD>  // BF16's codes lie as those of which word
    static __device__ __forceinline__ u32 raw(const Held& held, const Rows& rows, int c) {
        const uint2& p = held.of[c * SUBGROUPS / 4];
        const u32 bytes = permute(WORD < 2 ? p.x : p.y, BF16 ? 0x6464 : 0x3c64, WORD % 2 ? 0x5342 : 0x5140);
        // (1024 + u, 1 + v / 1024), or both above 1024.
        const u32 param = half_fma(half_sub(bytes, BF16 ? 0x64006400 : 0x3c006400), rows.step[WORD % 2], rows.base[WORD % 2]);
        return BF16 ? raw_param<AS_IN>(param) : param;
    }
};

// With what codes of five and six bits have above their low byte: of all lanes of the quad, for this one wants their pair t.
template <int HIGH>
struct PlanesOfTile : BytesOfTile<32, HIGH> {
    using Base = BytesOfTile<32, HIGH>;
    using typename Base::Rows;
    struct Held : Base::Held {
        uint4 plane;
    };
    static __device__ __forceinline__ void load(Held& held, u32 params, int lane) {
        Base::load(held, params, lane);
        const int word = lane % 4 / PLANE_PAIRS<HIGH>;
        held.plane = read<uint4>(params + AffineBytes<32, HIGH>::STEP_BYTES + (word * LANES + lane / 4 * 4) * 4);
    }
    static __device__ __forceinline__ void scale(Rows& rows) {
        if (BF16) return;
        rows.base[0] = raw_param_of<0>(rows.base[0]);
        rows.base[1] = raw_param_of<UP<HIGH, 1>>(rows.base[1]);
        rows.step[0] = half_mul(rows.step[0], 0x3c007400);
        rows.step[1] = half_mul(rows.step[1], 0x3c007400 - 0x400 * UP<HIGH, 1>);
    }
};
template <int HIGH>
struct PlaneColumns : AffineColumns<AffineBytes<32, HIGH>, PlanesOfTile<HIGH>> {
    using Params = PlanesOfTile<HIGH>;
    using Base = AffineColumns<AffineBytes<32, HIGH>, Params>;
    using typename Base::Rows, typename Base::Tile;
    template <int QUARTER>
    static __device__ __forceinline__ void operand(const Tile& tile, const Rows& rows, int lane, u32 (&a)[4]) {
        constexpr int UPPER = QUARTER / 2 * 2, LOWER = UPPER + 1, FIRST = QUARTER % 2 * 2;
        const u32 upper = Params::template raw<UPPER, 0>(tile.params, rows, 0), lower = Params::template raw<LOWER, 0>(tile.params, rows, 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 high = FourBit::word(tile.params.plane, FIRST + i) >> plane_shift<HIGH>(lane % 4);
            const u32 both = joined<QUARTER / 2>(FourBit::word(tile.pairs, FIRST + i), high);
            a[2 * i] = raw_plane_pair<HIGH, UPPER>(both, upper);
            a[2 * i + 1] = raw_plane_pair<HIGH, LOWER>(both, lower);
        }
    }
};

// Codes in order, so that byte t is pair t, and two chunks of a row make one look-up: they are in one group.
//
// An entry + 128 as it lies ends a half, as codes of other layouts do: in FP16 it is 2^-24 of itself (BF16: 2^-133). One
// instruction takes the 128 away and multiplies by d L, which is rounded first, times a power of two that its pair has room for:
// d, packed to be below four, and L make at most 128. Codes are turned round by a product, since the pipe of logic is the fuller one.
struct Lut16Columns {
    static constexpr int SUPER_BYTES = Lut16::SUPER_BYTES;
    struct Tile {
        uint4 lanes[4];  // codes of this lane's quad
        // Of the first two chunks of each half, and the others: where half tables lie, a byte for each word; and of rows g and
        // g + 8 the scales of both halves, and -128 times those.
        u32 places[2], scales[2][2], biases[2][2];
    };
    struct Rows {
        u32 tables, selector, minus_one;
    };
    static constexpr int PARAM_BYTES(int tiles) { return tiles * Lut16::SCALE_BYTES; }
    static __device__ __forceinline__ const u8* params(const Weight& w, int strip, int k) {
        return w.params + (size_t)(u32)(strip * w.tiles + k) * Lut16::SCALE_BYTES;
    }
    static __device__ __forceinline__ u32 params_of_strip(const Weight& w) { return w.tiles * Lut16::SCALE_BYTES; }
    static __device__ __forceinline__ const u8* supers(const Weight& w, int strip, int k) {
        return w.row_params + (size_t)(u32)(strip * w.supers + k / Lut16::SUPER_TILES) * SUPER_BYTES;
    }
    static __device__ __forceinline__ u32 supers_of_strip(const Weight& w) { return w.supers * SUPER_BYTES; }
    static __device__ __forceinline__ Rows rows(const Weight&, int, int lane) {
        const u32 t = lane % 4;
        return {keep_address(shared_address(Lut16::tables())), keep_address(t | (4 + t) << 4), opaque_minus_one()};
    }
    static __device__ __forceinline__ float row_scale(const Rows&, bool) { return BF16 ? 8192.0f : 32768.0f; }
    template <int J>
    static __device__ __forceinline__ Tile load(u32 codes, u32 params, u32 supers, int lane) {
        Tile tile;
        const uint2 p = read<uint2>(params + J * Lut16::SCALE_BYTES + lane / 4 * 8);
        const u32 d = permute(read<u16>(supers + lane / 4 * 2), read<u16>(supers + lane / 4 * 2 + 16), 0x5410);
#pragma unroll
        for (int c = 0; c < 4; ++c) tile.lanes[c] = read<uint4>(codes + J * FourBit::CODE_BYTES + 16 * place_of(lane / 4 * 4 + c));
        // Times 2^9: at most 65504, times L.
        const u32 supers_here = half_mul(d, 0x60006000);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const u32 all = s ? p.y : p.x;
            tile.places[s] = all >> 2 & 0x30303030;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const u32 l = Lut16::levels(all, row);
                u32& scales = tile.scales[s][row];
                scales = half_mul(l, row ? high_twice(supers_here) : low_twice(supers_here));
                // Times 2^111 more; -128 as it lies.
                if constexpr (BF16) scales = bfloat_fma(to_bfloat(scales), 0x77007700, 0x80008000);
                tile.biases[s][row] = fma_pair(scales, 0x80808080, 0x80008000);
            }
        }
        return tile;
    }
    template <int WORD, int SUBGROUP>
    static __device__ __forceinline__ void row(const Tile& tile, const Rows& rows, u32& first, u32& second) {
        constexpr int CHUNK = 2 * SUBGROUP;
        const u32 codes = permute(FourBit::word(tile.lanes[CHUNK], WORD), FourBit::word(tile.lanes[CHUNK + 1], WORD), rows.selector);
        // Tables begin at a multiple of 256.
        const uint4 table = read<uint4>(permute(tile.places[SUBGROUP], rows.tables, 0x7650 + WORD));
        const u32 turned = codes * rows.minus_one + rows.minus_one;
        const u32 biased = permute(table.x, table.y, codes) ^ permute(table.z, table.w, turned);
        const u32 scales = tile.scales[SUBGROUP][WORD % 2], biases = tile.biases[SUBGROUP][WORD % 2];
        const u32 s = WORD < 2 ? low_twice(scales) : high_twice(scales), o = WORD < 2 ? low_twice(biases) : high_twice(biases);
        first = fma_pair(permute(biased, 0, 0x4140), s, o);
        second = fma_pair(permute(biased, 0, 0x4342), s, o);
    }
    template <int QUARTER>
    static __device__ __forceinline__ void operand(const Tile& tile, const Rows& rows, int, u32 (&a)[4]) {
        row<QUARTER / 2 * 2, QUARTER % 2>(tile, rows, a[0], a[2]);
        row<QUARTER / 2 * 2 + 1, QUARTER % 2>(tile, rows, a[1], a[3]);
    }
};

struct EightBitColumns : NoSupers, RowsOf<EightBit> {
    struct Tile {
        uint4 pairs[2];  // of each half: t of all four lanes' words
    };
    static constexpr int PARAM_BYTES(int) { return 0; }
    static __device__ __forceinline__ const u8* params(const Weight&, int, int) { return nullptr; }
    static __device__ __forceinline__ u32 params_of_strip(const Weight&) { return 0; }
    template <int J>
    static __device__ __forceinline__ Tile load(u32 codes, u32, u32, int lane) {
        const u32 at = row_of_chunk(codes + J * EightBit::CODE_BYTES, lane);
        return {{load_matrices(at), load_matrices(at + 16 * LANES)}};
    }
    template <int QUARTER>
    static __device__ __forceinline__ void operand(const Tile& tile, const EightBit::Rows&, int, u32 (&a)[4]) {
        constexpr int FIRST = QUARTER % 2 * 2;
        const u32 first = FourBit::word(tile.pairs[QUARTER / 2], FIRST), second = FourBit::word(tile.pairs[QUARTER / 2], FIRST + 1);
        a[0] = EightBit::byte_pair<0>(first);
        a[1] = EightBit::byte_pair<1>(first);
        a[2] = EightBit::byte_pair<0>(second);
        a[3] = EightBit::byte_pair<1>(second);
    }
};

template <class Layout>
struct ColumnsOf;
template <int GROUP>
struct ColumnsOf<AffinePairs<GROUP>> {
    using Type = AffineColumns<AffinePairs<GROUP>, PairsOfTile<GROUP>>;
};
template <int GROUP>
struct ColumnsOf<AffineWide<GROUP>> {
    using Type = AffineColumns<AffineWide<GROUP>, PairsOfTiles<GROUP>>;
};
template <int GROUP>
struct ColumnsOf<AffineBytes<GROUP>> {
    using Type = AffineColumns<AffineBytes<GROUP>, BytesOfTile<GROUP>>;
};
template <int HIGH>
struct ColumnsOf<AffineBytes<32, HIGH>> {
    using Type = PlaneColumns<HIGH>;
};
template <>
struct ColumnsOf<Lut16> {
    using Type = Lut16Columns;
};
template <>
struct ColumnsOf<EightBit> {
    using Type = EightBitColumns;
};
using Columns = ColumnsOf<Layout>::Type;

}  // namespace tenpak
