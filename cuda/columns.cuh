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

// What the four lanes of this one's quad have.
struct QuadCodes {
    uint4 lanes[4];

    __device__ __forceinline__ void load(u32 codes, int lane) {
#pragma unroll
        for (int c = 0; c < 4; ++c) lanes[c] = read<uint4>(codes + 16 * place_of(lane / 4 * 4 + c));
    }
    template <int WORD>
    __device__ __forceinline__ u32 word(int c) const {
        return FourBit::word(lanes[c], WORD);
    }
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
struct Lut16Columns : RowsOf<Lut16> {
    static constexpr int SUPER_BYTES = Lut16::SUPER_BYTES;
    struct Tile {
        QuadCodes codes;
        u32 params[2];  // of the first two chunks of each half, and the others
        u32 supers;
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
    template <int J>
    static __device__ __forceinline__ Tile load(u32 codes, u32 params, u32 supers, int lane) {
        Tile tile;
        tile.codes.load(codes + J * FourBit::CODE_BYTES, lane);
        const uint2 p = read<uint2>(params + J * Lut16::SCALE_BYTES + lane / 4 * 8);
        tile.params[0] = p.x;
        tile.params[1] = p.y;
        tile.supers = permute(read<u16>(supers + lane / 4 * 2), read<u16>(supers + lane / 4 * 2 + 16), 0x5410);
        return tile;
    }
    template <int WORD, int SUBGROUP>
    static __device__ __forceinline__ void row(const Tile& tile, u32 selector, u32& first, u32& second) {
        const u32 params = tile.params[SUBGROUP];
        const u32 codes = permute(tile.codes.word<WORD>(2 * SUBGROUP), tile.codes.word<WORD>(2 * SUBGROUP + 1), selector);
        const uint4 table = read<uint4>(Lut16::tables() + ((WORD ? params >> (8 * WORD + 2) : params >> 2) & 0x30));
        const u32 biased = permute(table.x, table.y, codes) ^ permute(table.z, table.w, codes ^ 0x8888);
        // As Lut16::fragment has it.
        const u32 l = half_sub(and_xor(WORD % 2 ? params >> 8 : params, 0x003f003f, 0x64206420), 0x64206420);
        const u32 scales = half_mul(l, WORD % 2 ? high_twice(tile.supers) : low_twice(tile.supers));
        const u32 s = WORD < 2 ? low_twice(scales) : high_twice(scales);
        first = half_mul(half_sub(permute(biased, 0x64646464, 0x4140), 0x64806480), s);
        second = half_mul(half_sub(permute(biased, 0x64646464, 0x4342), 0x64806480), s);
        if constexpr (BF16) {
            first = to_bfloat(first);
            second = to_bfloat(second);
        }
    }
    template <int QUARTER>
    static __device__ __forceinline__ void operand(const Tile& tile, const NoRows&, int lane, u32 (&a)[4]) {
        const u32 t = lane % 4, selector = t | (4 + t) << 4;
        row<QUARTER / 2 * 2, QUARTER % 2>(tile, selector, a[0], a[2]);
        row<QUARTER / 2 * 2 + 1, QUARTER % 2>(tile, selector, a[1], a[3]);
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
