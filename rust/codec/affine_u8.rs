//! The layouts `intB_gN_u8`: codes of four to six bits, and one-byte scales and offsets that four FP16 numbers a
//! row map back. The bits of a code above the fourth lie in a part of their own.
//!
//! s = s0 + u·ds and o = o0 + v·do, with u and v the bytes. The search first fits every group of a row
//! freely, spreads the bytes over what it found, and then chooses them again with codes in view.

use super::affine::{STARTS, around, nearest, nearest_in_group, passes, per_weight, quantise_block, rebuild};
use super::feedback::{Group, Nearest, ROW_NUMBERS, feedback, store_bits};
use super::groups::{Block, Grid};
use super::range::{Range, RangeLanes};
use super::search::{best_offset, code, error, relative, search};
use super::simd::{Kernel, LANES, Level, Simd};
use super::trial::Step;
use super::{Calibrated, Layout, Part, Per, Strip};
use crate::tensor::Dtype;
use half::f16;

/// The largest byte.
const STEPS: f32 = 255.0;

/// The layout with groups of `G` and codes of `BITS`.
pub const fn layout<const G: usize, const BITS: u32>(name: &'static str, parts: &'static [Part]) -> Layout {
    Layout {
        name,
        group: Some(G),
        code_bits: BITS,
        parts,
        rebuild: "q*(s0 + u*ds) + (o0 + v*do)",
        // Steps are some 4,000 times smaller than weights.
        normal_from: 0.125,
        tables: None,
        decode: decode::<G, BITS>,
        under_rows: Some(encode_under_rows::<G, BITS>),
        calibrated: Some(Calibrated { search: encode::<G, BITS>, feedback: feedback::<AffineU8<G, BITS>> }),
    }
}

/// The parts of the layout with groups of `G` and codes of `BITS`, more than four.
pub const fn parts_with_high<const G: usize, const BITS: u32>() -> [Part; 5] {
    let [codes, scales, offsets, row_params] = parts::<G>();
    let high = Part { name: "high", dtype: Dtype::U8, per: Per::Weight(BITS - 4) };
    [codes, scales, offsets, row_params, high]
}

/// The parts of the layout with groups of `G` and codes of four bits.
pub const fn parts<const G: usize>() -> [Part; 4] {
    [
        Part { name: "codes", dtype: Dtype::U8, per: Per::Weight(4) },
        Part { name: "scales", dtype: Dtype::U8, per: Per::Run(G) },
        Part { name: "offsets", dtype: Dtype::U8, per: Per::Run(G) },
        Part { name: "row_params", dtype: Dtype::F16, per: Per::Row(4) },
    ]
}

/// A row's map from bytes to a parameter.
#[derive(Clone, Copy)]
struct Map {
    start: f16,
    step: f16,
}

impl Map {
    /// The map that covers `values` with 256 steps.
    fn covering(values: &[f32]) -> Map {
        let low = values.iter().copied().fold(f32::INFINITY, f32::min);
        let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if !(low.is_finite() && high.is_finite()) {
            return Map { start: f16::ZERO, step: f16::ZERO };
        }
        let start = f16::from_f32(low);
        let mut step = f16::from_f32((high - start.to_f32()).max(0.0) / STEPS);
        // Rounding must not leave the largest value out of reach.
        while start.to_f32() + STEPS * step.to_f32() < high && step < f16::MAX {
            step = f16::from_bits(step.to_bits() + 1);
        }
        Map { start, step }
    }

    /// The nearest bytes, as FP32.
    #[inline(always)]
    fn byte<S: Simd>(self, s: S, value: S::F) -> S::F {
        byte(s, self.lanes(s), value)
    }

    /// The parameters of bytes.
    #[inline(always)]
    fn value<S: Simd>(self, s: S, byte: S::F) -> S::F {
        value(s, self.lanes(s), byte)
    }

    /// Start and step, for every lane.
    #[inline(always)]
    fn lanes<S: Simd>(self, s: S) -> [S::F; 2] {
        [s.splat(self.start.to_f32()), s.splat(self.step.to_f32())]
    }

    fn to_le_bytes(self) -> [u8; 4] {
        let (start, step) = (self.start.to_le_bytes(), self.step.to_le_bytes());
        [start[0], start[1], step[0], step[1]]
    }

    fn from_le_bytes(bytes: [u8; 4]) -> Map {
        let [a, b, c, d] = bytes;
        Map { start: f16::from_le_bytes([a, b]), step: f16::from_le_bytes([c, d]) }
    }

    /// The maps of scales and of offsets that a row keeps.
    fn of_row([a, b, c, d, e, f, g, h]: [u8; 8]) -> [Map; 2] {
        [Map::from_le_bytes([a, b, c, d]), Map::from_le_bytes([e, f, g, h])]
    }
}

/// The nearest bytes under the start and step of each lane, as FP32.
#[inline(always)]
fn byte<S: Simd>(s: S, [start, step]: [S::F; 2], value: S::F) -> S::F {
    let zero = s.splat(0.0);
    let divisor = s.select(s.lt(zero, step), step, s.splat(f32::INFINITY));
    let byte = s.round(s.div(s.sub(value, start), divisor));
    s.min(s.max(byte, zero), s.splat(STEPS))
}

/// The parameters of bytes under the start and step of each lane.
#[inline(always)]
fn value<S: Simd>(s: S, [start, step]: [S::F; 2], byte: S::F) -> S::F {
    s.add(s.mul(byte, step), start)
}

/// Encodes rows.
pub fn encode<const G: usize, const BITS: u32>(
    level: Level,
    strip: Strip<'_>,
    parts: &mut [&mut [u8]],
) -> Range {
    level.run(Encode::<G, BITS> { strip, given: false, parts })
}

/// Encodes rows whose maps from bytes to parameters are given.
fn encode_under_rows<const G: usize, const BITS: u32>(
    level: Level,
    strip: Strip<'_>,
    parts: &mut [&mut [u8]],
) -> Range {
    level.run(Encode::<G, BITS> { strip, given: true, parts })
}

struct Encode<'a, 'b, 'c, const G: usize, const BITS: u32> {
    strip: Strip<'a>,
    /// Whether the parts hold the rows' maps already.
    given: bool,
    parts: &'b mut [&'c mut [u8]],
}

impl<const G: usize, const BITS: u32> Kernel for Encode<'_, '_, '_, G, BITS> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        let [codes, scales, offsets, row_params, high @ ..] = self.parts else {
            unreachable!("the layout has four parts or five")
        };
        let mut range = RangeLanes::new(s);
        let cols = self.strip.cols;
        if cols == 0 {
            row_params.fill(0);
            return range.finish(s);
        }
        let groups = cols.div_ceil(G);
        let (mut free_scales, mut free_offsets) = (vec![0f32; groups], vec![0f32; groups]);
        let rows = self.strip.data.chunks_exact(cols).zip(codes.chunks_exact_mut(cols.div_ceil(2)));
        let parameters = scales.chunks_exact_mut(groups).zip(offsets.chunks_exact_mut(groups));
        for (r, (((data, codes), (scales, offsets)), params)) in
            rows.zip(parameters).zip(row_params.as_chunks_mut::<8>().0).enumerate()
        {
            let row = Row {
                strip: Strip { data, ..self.strip },
                grid: Grid::new(&Strip { data, ..self.strip }, G),
            };
            for block in row.grid.blocks() {
                let (scale, offset) = row.free::<S, G, BITS>(s, &block, &mut range);
                let (mut scale_lanes, mut offset_lanes) = ([0.0; LANES], [0.0; LANES]);
                s.store(scale, &mut scale_lanes);
                s.store(offset, &mut offset_lanes);
                for lane in 0..block.lanes {
                    let group = row.grid.index(&block, lane);
                    (free_scales[group], free_offsets[group]) = (scale_lanes[lane], offset_lanes[lane]);
                }
            }
            let maps = if self.given {
                Map::of_row(*params)
            } else {
                [Map::covering(&free_scales), Map::covering(&free_offsets)]
            };
            params[..4].copy_from_slice(&maps[0].to_le_bytes());
            params[4..].copy_from_slice(&maps[1].to_le_bytes());
            for block in row.grid.blocks() {
                let (u, v) = row.bytes::<S, G, BITS>(s, &block, maps, &free_scales, &free_offsets);
                row.grid.store_per_group(&low_bytes(s, u), &block, scales);
                row.grid.store_per_group(&low_bytes(s, v), &block, offsets);
                let (scale, offset) = (maps[0].value(s, u), maps[1].value(s, v));
                if BITS == 4 {
                    quantise_block::<S, G>(s, &row.grid, &block, data, scale, offset, codes);
                }
            }
            if let [high] = high {
                let per_row = high_bytes(cols, BITS);
                let high = &mut high[r * per_row..][..per_row];
                quantise_row::<S, G, BITS>(s, data, maps, [scales, offsets], codes, high);
            }
        }
        range.finish(s)
    }
}

/// Bytes of the bits above the fourth, of so many codes.
const fn high_bytes(codes: usize, bits: u32) -> usize {
    (codes * (bits - 4) as usize).div_ceil(8)
}

/// Writes the nearest codes of a row whose parameters have been chosen.
#[inline(always)]
fn quantise_row<S: Simd, const G: usize, const BITS: u32>(
    s: S,
    data: &[f32],
    maps: [Map; 2],
    parameters: [&[u8]; 2],
    codes: &mut [u8],
    high: &mut [u8],
) {
    const { assert!(BITS == 4 || G.is_multiple_of(LANES)) };
    let vectors = data.chunks(LANES).zip(codes.chunks_mut(LANES / 2));
    for (v, ((x, codes), high)) in vectors.zip(high.chunks_mut(high_bytes(LANES, BITS))).enumerate() {
        let group = v * LANES / G;
        let value = |i: usize| maps[i].value(s, s.splat(f32::from(parameters[i][group])));
        let (scale, offset) = (value(0), value(1));
        // The offset itself stands for what is missing, so that unused bits are zero.
        let mut padded = [0.0; LANES];
        s.store(offset, &mut padded);
        padded[..x.len()].copy_from_slice(x);
        let (code, _) = nearest::<S, BITS>(s, s.load(&padded), scale, offset);
        let mut words = [0; LANES];
        s.store_i(code, &mut words);
        codes.copy_from_slice(&s.pack_nibbles(s.and(code, s.splat_i(15)))[..codes.len()]);
        let above = words.iter().rev().fold(0u32, |all, word| all << (BITS - 4) | word >> 4);
        high.copy_from_slice(&above.to_le_bytes()[..high.len()]);
    }
}

#[inline(always)]
fn low_bytes<S: Simd>(s: S, x: S::F) -> [[u8; 1]; LANES] {
    let mut words = [0; LANES];
    s.store_i(s.round_i(x), &mut words);
    words.map(|w| [w as u8])
}

#[derive(Clone, Copy)]
struct Row<'a> {
    strip: Strip<'a>,
    grid: Grid,
}

impl Row<'_> {
    #[inline(always)]
    fn is_plain<const G: usize>(&self, block: &Block) -> bool {
        block.len == G && self.strip.importance.is_none()
    }

    /// Scales and offsets of a block, as FP32 and without regard to bytes.
    #[inline(always)]
    fn free<S: Simd, const G: usize, const BITS: u32>(
        &self,
        s: S,
        block: &Block,
        range: &mut RangeLanes<S>,
    ) -> (S::F, S::F) {
        let x = self.grid.weights::<S, G>(s, self.strip.data, block).all(s);
        range.add(s, &x);
        let best = if self.is_plain::<G>(block) {
            search::<S, G, false, false, BITS>(s, &x, &[s.splat(1.0); G])
        } else {
            let w = self.grid.load_importance(s, self.strip.importance, block);
            search::<S, G, true, false, BITS>(s, &x, &w)
        };
        (best.scale, best.offset)
    }

    /// The bytes of a block's scales and offsets, as FP32.
    #[inline(always)]
    fn bytes<S: Simd, const G: usize, const BITS: u32>(
        &self,
        s: S,
        block: &Block,
        maps: [Map; 2],
        free_scales: &[f32],
        free_offsets: &[f32],
    ) -> (S::F, S::F) {
        let x = self.grid.weights::<S, G>(s, self.strip.data, block).all(s);
        let (mut scale, mut offset) = ([0.0; LANES], [0.0; LANES]);
        for lane in 0..LANES {
            let group = self.grid.index(block, lane);
            (scale[lane], offset[lane]) = (free_scales[group], free_offsets[group]);
        }
        let free = (s.load(&scale), s.load(&offset));
        if self.is_plain::<G>(block) {
            choose::<S, G, false, BITS>(s, x, &[s.splat(1.0); G], maps, free)
        } else {
            let w = self.grid.load_importance(s, self.strip.importance, block);
            choose::<S, G, true, BITS>(s, x, &w, maps, free)
        }
    }
}

/// The best of three neighbouring scales, each with the offset that suits its codes.
#[inline(always)]
fn choose<S: Simd, const G: usize, const WEIGHTED: bool, const BITS: u32>(
    s: S,
    mut x: [S::F; G],
    w: &[S::F; G],
    [scales, offsets]: [Map; 2],
    (free_scale, free_offset): (S::F, S::F),
) -> (S::F, S::F) {
    let zero = s.splat(0.0);
    let (fixed, _) = relative::<S, G, WEIGHTED>(s, &mut x, w);
    let middle = scales.byte(s, free_scale);
    let mut best = s.splat(f32::INFINITY);
    let mut chosen = (middle, offsets.byte(s, free_offset));
    for step in [0.0, -1.0, 1.0] {
        let u = s.min(s.max(s.add(middle, s.splat(step)), zero), s.splat(STEPS));
        let scale = scales.value(s, u);
        let inverse = s.select(s.lt(zero, scale), s.div(s.splat(1.0), scale), zero);
        let mut v = offsets.byte(s, free_offset);
        for _ in 0..2 {
            let offset = s.sub(offsets.value(s, v), fixed.low);
            let coded = code::<S, G, WEIGHTED, BITS>(s, &x, w, inverse, s.mul(s.sub(zero, offset), inverse));
            // The error with the offset that was coded for, and with the one that suits the codes.
            let refit = offsets.byte(s, s.add(best_offset(s, fixed, coded, scale), fixed.low));
            for v in [v, refit] {
                let offset = s.sub(offsets.value(s, v), fixed.low);
                let error = error(s, fixed, coded, scale, offset);
                let better = s.lt(error, best);
                best = s.select(better, error, best);
                chosen = (s.select(better, u, chosen.0), s.select(better, v, chosen.1));
            }
            v = refit;
        }
    }
    chosen
}

fn decode<const G: usize, const BITS: u32>(level: Level, parts: &[&[u8]], cols: usize, out: &mut [f32]) {
    level.run(Decode::<G, BITS> { parts, cols, out })
}

struct Decode<'a, 'b, const G: usize, const BITS: u32> {
    parts: &'a [&'a [u8]],
    cols: usize,
    out: &'b mut [f32],
}

impl<const G: usize, const BITS: u32> Kernel for Decode<'_, '_, G, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [codes, scales, offsets, row_params, high @ ..] = self.parts else {
            unreachable!("the layout has four parts or five")
        };
        let cols = self.cols;
        if cols == 0 {
            return;
        }
        let rows = self.out.chunks_exact_mut(cols).zip(codes.chunks_exact(cols.div_ceil(2)));
        let parameters = scales.chunks_exact(cols.div_ceil(G)).zip(offsets.chunks_exact(cols.div_ceil(G)));
        for (r, (((out, codes), (scales, offsets)), params)) in
            rows.zip(parameters).zip(row_params.as_chunks::<8>().0).enumerate()
        {
            let maps = Map::of_row(*params);
            let per_row = high_bytes(cols, BITS);
            let high = high.first().map_or(&[][..], |high| &high[r * per_row..][..per_row]);
            let batches = out.chunks_mut(G * LANES).zip(codes.chunks(G * LANES / 2));
            for (n, ((out, codes), (scales, offsets))) in
                batches.zip(scales.chunks(LANES).zip(offsets.chunks(LANES))).enumerate()
            {
                let scales = values(s, maps[0], scales);
                let offsets = values(s, maps[1], offsets);
                for (v, (out, codes)) in out.chunks_mut(LANES).zip(codes.chunks(LANES / 2)).enumerate() {
                    let scale = per_weight::<S, G>(s, &scales, v);
                    let offset = per_weight::<S, G>(s, &offsets, v);
                    if BITS == 4 {
                        rebuild(s, codes, scale, offset, out);
                    } else {
                        let high = &high[high_bytes((n * G + v) * LANES, BITS)..];
                        rebuild_with_high::<S, BITS>(s, codes, high, scale, offset, out);
                    }
                }
            }
        }
    }
}

/// Up to sixteen weights: q·scale + offset, where the lowest four bits of q lie apart from those above; `high` may
/// go on beyond them.
#[inline(always)]
fn rebuild_with_high<S: Simd, const BITS: u32>(
    s: S,
    codes: &[u8],
    high: &[u8],
    scale: S::F,
    offset: S::F,
    out: &mut [f32],
) {
    let mut low = [0; LANES / 2];
    low[..codes.len()].copy_from_slice(codes);
    let mut bytes = [0; 4];
    let n = high.len().min(high_bytes(LANES, BITS));
    bytes[..n].copy_from_slice(&high[..n]);
    let (above, mask) = (u32::from_le_bytes(bytes), (1 << (BITS - 4)) - 1);
    let above: [u32; LANES] = std::array::from_fn(|i| above >> (i as u32 * (BITS - 4)) & mask);
    let q = s.float(s.or_shl::<4>(s.nibbles(&low), s.load_i(&above)));
    let mut values = [0.0; LANES];
    s.store(s.add(s.mul(q, scale), offset), &mut values);
    out.copy_from_slice(&values[..out.len()]);
}

/// Up to sixteen parameters.
#[inline(always)]
fn values<S: Simd>(s: S, map: Map, bytes: &[u8]) -> [f32; LANES] {
    let mut words = [0; LANES];
    for (word, &byte) in words.iter_mut().zip(bytes) {
        *word = u32::from(byte);
    }
    let mut out = [0.0; LANES];
    s.store(map.value(s, s.float(s.load_i(&words))), &mut out);
    out
}

/// The rule for one weight, with a group's scale and offset.
pub struct AffineU8<const G: usize, const BITS: u32>;

impl<const G: usize, const BITS: u32> Nearest for AffineU8<G, BITS> {
    const GROUP: usize = G;
    const OFFSET: bool = true;
    type Ready<S: Simd> = ();

    #[inline(always)]
    fn ready<S: Simd>(_: S) {}

    fn parameters(parts: &[&[u8]], cols: usize, [scales, offsets, _]: [&mut [f32]; 3]) {
        let groups = cols.div_ceil(G);
        for (row, params) in parts[3].as_chunks::<8>().0.iter().enumerate() {
            let maps = Map::of_row(*params);
            let groups = row * groups..(row + 1) * groups;
            for ((map, bytes), out) in maps.iter().zip(&parts[1..3]).zip([&mut *scales, &mut *offsets]) {
                for (out, &byte) in out[groups.clone()].iter_mut().zip(&bytes[groups.clone()]) {
                    *out = f32::from(byte) * map.step.to_f32() + map.start.to_f32();
                }
            }
        }
    }

    fn row_numbers(parts: &[&[u8]], out: &mut [[f32; ROW_NUMBERS]]) {
        for (out, params) in out.iter_mut().zip(parts[3].as_chunks::<8>().0) {
            let [scales, offsets] = Map::of_row(*params);
            *out = [scales.start, scales.step, offsets.start, offsets.step].map(f16::to_f32);
        }
    }

    fn store_parameters(parts: &mut [&mut [u8]], _cols: usize, row: usize, groups: [&[f32]; 3]) {
        let maps = Map::of_row(parts[3].as_chunks::<8>().0[row]);
        for ((map, part), values) in maps.iter().zip(&mut parts[1..3]).zip(groups) {
            let bytes = &mut part[row * values.len()..][..values.len()];
            for (byte, value) in bytes.iter_mut().zip(values) {
                // The value is a byte's, rounded once, so that dividing finds the byte again.
                let (start, step) = (map.start.to_f32(), map.step.to_f32());
                *byte = if step > 0.0 { ((value - start) / step).round_ties_even() as u8 } else { 0 };
            }
        }
    }

    fn store_codes(parts: &mut [&mut [u8]], row: usize, codes: &[u8]) {
        store_bits(parts[0], row, codes, 4, 0);
        if let [_, _, _, _, high] = parts {
            store_bits(high, row, codes, BITS as usize - 4, 4);
        }
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, (): &(), x: S::F, group: Group<S>) -> (S::I, S::F) {
        nearest_in_group::<S, BITS>(s, x, group)
    }

    #[inline(always)]
    fn unscaled<S: Simd>(s: S, (): &(), code: S::I, _: Group<S>) -> S::F {
        s.float(code)
    }

    const STARTS: usize = STARTS.len();
    const PASSES: usize = passes(G);

    #[inline(always)]
    fn start<S: Simd>(s: S, number: usize, group: Group<S>) -> Group<S> {
        let (a, b) = around::<S, BITS>(s, number, group);
        let [scales, offsets] = [[group.row[0], group.row[1]], [group.row[2], group.row[3]]];
        Group { a: value(s, scales, byte(s, scales, a)), b: value(s, offsets, byte(s, offsets, b)), ..group }
    }

    /// The best of the scales around the best one, each with the offset that suits it.
    #[inline(always)]
    fn storable<S: Simd>(s: S, step: &Step<S>, group: Group<S>) -> Group<S> {
        let zero = s.splat(0.0);
        let [scales, offsets] = [[group.row[0], group.row[1]], [group.row[2], group.row[3]]];
        let [best_scale, _] = step.both(s);
        let middle = byte(s, scales, s.add(group.a, best_scale));
        let (mut least, mut chosen) = (zero, group);
        for away in [0.0, -1.0, 1.0] {
            let u = s.min(s.max(s.add(middle, s.splat(away)), zero), s.splat(STEPS));
            let a = value(s, scales, u);
            let best_offset = step.offset(s, s.sub(a, group.a));
            let b = value(s, offsets, byte(s, offsets, s.add(group.b, best_offset)));
            let change = step.change(s, s.sub(a, group.a), s.sub(b, group.b));
            // Codes go upwards: a scale that is not positive keeps what there is.
            let change = s.select(s.lt(zero, a), change, zero);
            let better = s.lt(change, least);
            least = s.select(better, change, least);
            chosen.a = s.select(better, a, chosen.a);
            chosen.b = s.select(better, b, chosen.b);
        }
        chosen
    }
}
