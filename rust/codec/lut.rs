//! The layouts `int4_lutN`: codes that index one of four learned tables, a signed six-bit scale for each group of
//! N weights, and an FP16 super-scale for each sixteen groups. 4.5625 bits with groups of 16, 4.28125 with 32.
//!
//! A rebuilt weight is d·L·T\[t\]\[q\]. The tables were learned off line by tests/bench/learn_tables.py (those
//! that it learned for groups of 32 came within half a per cent of the same error); being uneven, they spend codes
//! where weights are, and a group takes the one that fits it, forwards or (with a negative scale) backwards.

use super::affine::{round_f16, widen};
use super::feedback::{Group, Nearest, feedback};
use super::groups::Grid;
use super::half_floats::widen_f16;
use super::range::{Range, RangeLanes};
use super::simd::{Kernel, LANES, Level, Simd};
use super::trial::Step;
use super::{Calibrated, Layout, Part, Per, Strip};
use crate::tensor::Dtype;

/// Groups under one super-scale: one in each lane.
const GROUPS: usize = LANES;

/// Four tables, ascending.
pub type Tables = [[i8; 16]; 4];

const TABLES: Tables = [
    [-126, -106, -88, -70, -53, -38, -24, -11, 1, 14, 28, 42, 57, 74, 95, 127],
    [-127, -103, -81, -61, -44, -30, -17, -4, 8, 21, 34, 48, 63, 79, 98, 119],
    [-127, -90, -64, -49, -36, -25, -14, -4, 6, 16, 26, 36, 47, 60, 75, 116],
    [-127, -76, -59, -45, -33, -22, -12, -2, 8, 19, 30, 42, 55, 69, 86, 120],
];

/// Bits of the scale's byte that hold L; the others hold t.
const SCALE_BITS: u32 = 6;

/// The range of L.
const SCALES: (f32, f32) = (-32.0, 31.0);

/// The layout with groups of `G`.
pub const fn layout<const G: usize>(name: &'static str, parts: &'static [Part]) -> Layout {
    Layout {
        name,
        group: Some(G),
        code_bits: 4,
        parts,
        rebuild: "d*L*T[t][q]",
        // Super-scales are some 4,000 times smaller than weights.
        normal_from: 0.125,
        tables: Some(&TABLES),
        decode: decode::<G>,
        under_rows: None,
        calibrated: Some(Calibrated { search: encode::<G>, feedback: feedback::<Lut<G>> }),
    }
}

/// The parts of the layout with groups of `G`.
pub const fn parts<const G: usize>() -> [Part; 3] {
    [
        Part { name: "codes", dtype: Dtype::U8, per: Per::Weight(4) },
        Part { name: "scales", dtype: Dtype::U8, per: Per::Run(G) },
        Part { name: "supers", dtype: Dtype::F16, per: Per::Run(G * GROUPS) },
    ]
}

/// Places of the largest weight in a table that the search tries, relative to the table's first value. The
/// scale is refitted for each, so that places in between gain little.
const SHIFTS: [f32; 5] = [-12.0, -6.0, 0.0, 6.0, 12.0];

/// What super-scales the search tries: those that give the group of the largest scale an L of 31.5, 31, 30.5 …
/// A larger L than there is, 31.5, stands for clamping that group a little.
const LARGEST_L: f32 = 31.5;
const L_STEP: f32 = 0.5;
const SUPERS: usize = 17;

/// Rounds of choosing scales and tables under a super-scale and refitting it.
const ROUNDS: usize = 1;

/// Encodes rows by searching tables, directions and scales; see the file's head and [`search`].
pub fn encode<const G: usize>(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range {
    level.run(Encode::<G> { strip, parts })
}

struct Encode<'a, 'b, 'c, const G: usize> {
    strip: Strip<'a>,
    parts: &'b mut [&'c mut [u8]],
}

impl<const G: usize> Kernel for Encode<'_, '_, '_, G> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        let [codes, scales, supers] = self.parts else { unreachable!("the layout has three parts") };
        let mut range = RangeLanes::new(s);
        let cols = self.strip.cols;
        if cols == 0 {
            return range.finish(s);
        }
        let of_super = G * GROUPS;
        let tables = Table::new(s);
        let rows = self.strip.data.chunks_exact(cols);
        let codes = codes.chunks_exact_mut(cols.div_ceil(2));
        let scales = scales.chunks_exact_mut(cols.div_ceil(G));
        let supers = supers.chunks_exact_mut(2 * cols.div_ceil(of_super));
        // What is missing of a last super-block, which weighs nothing.
        let (mut padded, mut weights) = (vec![0.0; of_super], vec![0.0; of_super]);
        for ((row, codes), (scales, supers)) in rows.zip(codes).zip(scales.zip(supers)) {
            let blocks = row.chunks(of_super).zip(codes.chunks_mut(of_super / 2));
            let parameters = scales.chunks_mut(GROUPS).zip(supers.as_chunks_mut::<2>().0);
            for (i, ((x, codes), (scales, d))) in blocks.zip(parameters).enumerate() {
                let importance = self.strip.importance.map(|w| &w[i * of_super..][..x.len()]);
                let fit = if x.len() == of_super {
                    super_block::<S, G>(s, &tables, x, importance, &mut range)
                } else {
                    padded[..x.len()].copy_from_slice(x);
                    match importance {
                        Some(w) => weights[..x.len()].copy_from_slice(w),
                        None => weights[..x.len()].fill(1.0),
                    }
                    super_block::<S, G>(s, &tables, &padded, Some(&weights), &mut range)
                };
                *d = fit.d.to_le_bytes();
                scales.copy_from_slice(&fit.scales[..scales.len()]);
                write_codes::<S, G>(s, &tables, x, &fit, codes);
            }
        }
        range.finish(s)
    }
}

/// The parameters of a super-block.
struct Fit {
    /// The super-scale's FP16 bits.
    d: u16,
    /// L and t of every group.
    scales: [u8; GROUPS],
}

#[inline(always)]
fn super_block<S: Simd, const G: usize>(
    s: S,
    tables: &[Table<S>; 4],
    data: &[f32],
    importance: Option<&[f32]>,
    range: &mut RangeLanes<S>,
) -> Fit {
    let strip = Strip { data, cols: G * GROUPS, importance };
    let grid = Grid::new(&strip, G);
    let block = grid.first();
    let x = grid.weights::<S, G>(s, data, &block).all(s);
    range.add(s, &x);
    if importance.is_none() {
        fit::<S, G, false>(s, tables, &x, &[s.splat(1.0); G])
    } else {
        fit::<S, G, true>(s, tables, &x, &grid.load_importance(s, importance, &block))
    }
}

/// One table, ready for look-ups.
#[derive(Clone, Copy)]
pub struct Table<S: Simd> {
    /// The values.
    values: S::F,
    /// For each ninth of a value's range the threshold in it and, in the lowest four bits, the code below.
    low: S::F,
    /// The same for the upper half.
    high: S::F,
}

/// Values are sorted into 32 buckets of this width, each of which holds at most one threshold.
const BUCKET: f32 = 9.0;

/// Adding this to a small number leaves it, rounded, in the lowest bits; 16 puts zero in the middle bucket.
const TO_BUCKET: f32 = 12_582_912.0 + 16.0;

const fn check(tables: &Tables) {
    let mut t = 0;
    while t < 4 {
        let mut i = 2;
        while i < 16 {
            let (a, b, c) = (tables[t][i - 2] as i32, tables[t][i - 1] as i32, tables[t][i] as i32);
            assert!(a < b && b < c, "tables ascend");
            assert!((b + c) - (a + b) > 2 * BUCKET as i32, "a bucket holds at most one threshold");
            i += 1;
        }
        // cuda/layouts.cuh looks a code up by its sign, and adds what it finds to -1.
        assert!(tables[t][7] < -1 && tables[t][8] >= 0, "half of a table is negative");
        t += 1;
    }
}

const _: () = {
    check(&TABLES);
};

/// The bits of each bucket's threshold and code.
const fn buckets(table: &[i8; 16]) -> [f32; 32] {
    let mut out = [0.0; 32];
    let mut b = 0;
    while b < 32 {
        let from = (b as f32 - 16.5) * BUCKET;
        let mut code = 0u32;
        // Beyond every value of the search, for buckets with nothing above them.
        let mut threshold = 4096.0;
        let mut i = 15;
        while i > 0 {
            let t = (table[i - 1] as f32 + table[i] as f32) * 0.5;
            if t >= from {
                threshold = t;
            } else {
                code += 1;
            }
            i -= 1;
        }
        out[b] = f32::from_bits(threshold.to_bits() & !15 | code);
        b += 1;
    }
    out
}

const BUCKETS: [[f32; 32]; 4] =
    [buckets(&TABLES[0]), buckets(&TABLES[1]), buckets(&TABLES[2]), buckets(&TABLES[3])];

impl<S: Simd> Table<S> {
    #[inline(always)]
    fn new(s: S) -> [Self; 4] {
        let mut out = [Table { values: s.splat(0.0), low: s.splat(0.0), high: s.splat(0.0) }; 4];
        for ((out, table), buckets) in out.iter_mut().zip(&TABLES).zip(&BUCKETS) {
            let (low, high) = buckets.split_at(LANES);
            out.values = s.load(&table.map(f32::from));
            out.low = s.load(low.first_chunk().expect("32 buckets"));
            out.high = s.load(high.first_chunk().expect("32 buckets"));
        }
        out
    }

    /// The codes of the values nearest to y, |y| < 139; only the lowest four bits mean something.
    #[inline(always)]
    fn code(&self, s: S, y: S::F) -> S::I {
        let bucket = s.bits(s.fma(y, s.splat(1.0 / BUCKET), s.splat(TO_BUCKET)));
        let threshold = s.lookup32(self.low, self.high, bucket);
        s.add_one_unless(s.lt(y, threshold), s.bits(threshold))
    }

    /// The codes of the values nearest to y.
    #[inline(always)]
    fn code_any(&self, s: S, y: S::F) -> S::I {
        self.code(s, s.min(s.max(y, s.splat(-BUCKET * 15.0)), s.splat(BUCKET * 15.0)))
    }
}

/// Σw·v·x and Σw·v² for the values v nearest to x·inverse, which may be anything only if `ANY`.
#[inline(always)]
fn sums<S: Simd, const G: usize, const WEIGHTED: bool, const ANY: bool>(
    s: S,
    table: &Table<S>,
    x: &[S::F; G],
    w: &[S::F; G],
    inverse: S::F,
) -> (S::F, S::F) {
    // Two sums of each, because one would wait for its own additions.
    let (mut vx, mut vv) = ([s.splat(0.0); 2], [s.splat(0.0); 2]);
    for (j, (&x, &w)) in x.iter().zip(w).enumerate() {
        let y = s.mul(x, inverse);
        let code = if ANY { table.code_any(s, y) } else { table.code(s, y) };
        let v = s.lookup16(table.values, code);
        let wv = if WEIGHTED { s.mul(w, v) } else { v };
        vx[j % 2] = s.fma(wv, x, vx[j % 2]);
        vv[j % 2] = s.fma(wv, v, vv[j % 2]);
    }
    (s.add(vx[0], vx[1]), s.add(vv[0], vv[1]))
}

/// Parameters for sixteen groups: first each group's own scale, then L and t under a common super-scale.
#[inline(always)]
fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(
    s: S,
    tables: &[Table<S>; 4],
    x: &[S::F; G],
    w: &[S::F; G],
) -> Fit {
    let (d, curvature) = search::<S, G, WEIGHTED>(s, tables, x, w);
    let mut d_super = f16_of(s, common(s, d, curvature));
    let mut choice = Choice { l: whole_scale(s, d, d_super), t: s.splat(0.0) };
    for round in 0..=ROUNDS {
        let (chosen, [vx, vv]) = choose::<S, G, WEIGHTED>(s, tables, x, w, choice.l, d_super);
        choice = chosen;
        if round == ROUNDS {
            break;
        }
        // The super-scale of the least squared error for these codes.
        let refit = sum(s, s.mul(choice.l, vx)) / sum(s, s.mul(s.mul(choice.l, choice.l), vv));
        if refit.is_finite() {
            d_super = f16_of(s, refit);
        }
    }
    let (mut l, mut t) = ([0.0; LANES], [0.0; LANES]);
    s.store(choice.l, &mut l);
    s.store(choice.t, &mut t);
    let mut scales = [0; LANES];
    for ((out, l), t) in scales.iter_mut().zip(l).zip(t) {
        *out = pack_scale(l, t);
    }
    Fit { d: s.narrow_f16(s.splat(d_super))[0], scales }
}

/// The super-scale under which whole multiples come nearest to the scales `d` that groups would have alone: a
/// group's error grows by its curvature, Σw·v², times the square of what its scale is off.
#[inline(always)]
fn common<S: Simd>(s: S, d: S::F, curvature: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(s.abs(d), &mut lanes);
    let largest = lanes.iter().fold(0f32, |m, d| m.max(*d));
    let (mut best, mut least) = (largest / SCALES.1, f32::INFINITY);
    for i in 0..SUPERS {
        let d_super = largest / (LARGEST_L - i as f32 * L_STEP);
        let off = s.sub(d, s.mul(s.splat(d_super), whole_scale(s, d, d_super)));
        let error = sum(s, s.mul(curvature, s.mul(off, off)));
        if error < least {
            (best, least) = (d_super, error);
        }
    }
    best
}

/// The sum of all lanes, in their order.
#[inline(always)]
fn sum<S: Simd>(s: S, x: S::F) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(x, &mut lanes);
    lanes.iter().sum()
}

/// The scale of each group that, alone, leaves the least error: for every table, both directions and
/// several places of the largest weight; and Σw·v² for it.
#[inline(always)]
fn search<S: Simd, const G: usize, const WEIGHTED: bool>(
    s: S,
    tables: &[Table<S>; 4],
    x: &[S::F; G],
    w: &[S::F; G],
) -> (S::F, S::F) {
    let zero = s.splat(0.0);
    let mut largest = x[0];
    for &x in &x[1..] {
        largest = s.select(s.lt(s.abs(largest), s.abs(x)), x, largest);
    }
    let per_largest = divide_lanes(s, s.splat(1.0), largest);
    let (mut best, mut best_d, mut best_vv) = (zero, zero, zero);
    for (table, values) in tables.iter().zip(&TABLES) {
        for sign in [1.0, -1.0] {
            for shift in SHIFTS {
                let place = sign * (f32::from(values[0]) + shift);
                let (vx, vv) =
                    sums::<S, G, WEIGHTED, false>(s, table, x, w, s.mul(s.splat(place), per_largest));
                let d = s.div(vx, vv);
                let gain = s.mul(d, vx);
                let better = s.lt(best, gain);
                best = s.select(better, gain, best);
                best_d = s.select(better, d, best_d);
                best_vv = s.select(better, vv, best_vv);
            }
        }
    }
    (best_d, best_vv)
}

/// L and t of every group, as FP32.
#[derive(Clone, Copy)]
struct Choice<S: Simd> {
    l: S::F,
    t: S::F,
}

/// The best of L - 1, L, L + 1 and all tables under a super-scale, with Σw·v·x and Σw·v².
#[inline(always)]
fn choose<S: Simd, const G: usize, const WEIGHTED: bool>(
    s: S,
    tables: &[Table<S>; 4],
    x: &[S::F; G],
    w: &[S::F; G],
    l: S::F,
    d_super: f32,
) -> (Choice<S>, [S::F; 2]) {
    let zero = s.splat(0.0);
    let mut best = s.splat(f32::INFINITY);
    let mut choice = Choice { l, t: zero };
    let mut kept = [zero; 2];
    for (t, table) in tables.iter().enumerate() {
        for step in [0.0, -1.0, 1.0] {
            let l = clamp_scale(s, s.add(l, s.splat(step)));
            let scale = s.mul(s.splat(d_super), l);
            let inverse = divide_lanes(s, s.splat(1.0), scale);
            let (vx, vv) = sums::<S, G, WEIGHTED, true>(s, table, x, w, inverse);
            // Σw(x - scale·v)² less Σw·x², which is the same for all.
            let error = s.mul(scale, s.sub(s.mul(scale, vv), s.mul(s.splat(2.0), vx)));
            let better = s.lt(error, best);
            best = s.select(better, error, best);
            choice.l = s.select(better, l, choice.l);
            choice.t = s.select(better, s.splat(t as f32), choice.t);
            kept[0] = s.select(better, vx, kept[0]);
            kept[1] = s.select(better, vv, kept[1]);
        }
    }
    (choice, kept)
}

/// a / b, or 0 where b is 0.
#[inline(always)]
fn divide_lanes<S: Simd>(s: S, a: S::F, b: S::F) -> S::F {
    s.select(s.lt(s.splat(0.0), s.abs(b)), s.div(a, b), s.splat(0.0))
}

/// L for scales `d` under a super-scale.
#[inline(always)]
fn whole_scale<S: Simd>(s: S, d: S::F, d_super: f32) -> S::F {
    clamp_scale(s, s.round(divide_lanes(s, d, s.splat(d_super))))
}

#[inline(always)]
fn clamp_scale<S: Simd>(s: S, l: S::F) -> S::F {
    s.min(s.max(l, s.splat(SCALES.0)), s.splat(SCALES.1))
}

#[inline(always)]
fn f16_of<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(round_f16(s, s.splat(x)), &mut lanes);
    lanes[0]
}

/// The byte of L and t.
#[inline(always)]
fn pack_scale(l: f32, t: f32) -> u8 {
    (l as i32 as u8 & ((1 << SCALE_BITS) - 1)) | (t as u8) << SCALE_BITS
}

/// L and t of a scale's byte.
#[inline(always)]
fn unpack_scale(byte: u8) -> (f32, usize) {
    // Shifting up and back down carries the sign of L.
    let l = (byte << (8 - SCALE_BITS)).cast_signed() >> (8 - SCALE_BITS);
    (f32::from(l), usize::from(byte >> SCALE_BITS))
}

/// Writes the nearest codes of a super-block of `x.len()` weights.
#[inline(always)]
fn write_codes<S: Simd, const G: usize>(
    s: S,
    tables: &[Table<S>; 4],
    x: &[f32],
    fit: &Fit,
    codes: &mut [u8],
) {
    let d = half::f16::from_bits(fit.d).to_f32();
    let groups = x.chunks(G).zip(codes.chunks_mut(G / 2));
    for ((x, codes), scale) in groups.zip(fit.scales) {
        let (l, t) = unpack_scale(scale);
        let scale = d * l;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (x, codes) in x.chunks(LANES).zip(codes.chunks_mut(LANES / 2)) {
            let mut padded = [0.0; LANES];
            padded[..x.len()].copy_from_slice(x);
            let code = tables[t].code_any(s, s.mul(s.load(&padded), s.splat(inverse)));
            let packed = s.pack_nibbles(s.and(code, s.splat_i(15)));
            codes.copy_from_slice(&packed[..codes.len()]);
            if !x.len().is_multiple_of(2) {
                // The last nibble of an odd row is zero, so that equal weights give equal bytes.
                codes[x.len() / 2] &= 15;
            }
        }
    }
}

fn decode<const G: usize>(level: Level, parts: &[&[u8]], cols: usize, out: &mut [f32]) {
    level.run(Decode::<G> { parts, cols, out })
}

struct Decode<'a, 'b, const G: usize> {
    parts: &'a [&'a [u8]],
    cols: usize,
    out: &'b mut [f32],
}

impl<const G: usize> Kernel for Decode<'_, '_, G> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [codes, scales, supers] = self.parts else { unreachable!("the layout has three parts") };
        let cols = self.cols;
        if cols == 0 {
            return;
        }
        let values = Table::new(s).map(|t| t.values);
        let codes = codes.chunks_exact(cols.div_ceil(2));
        let scales = scales.chunks_exact(cols.div_ceil(G));
        let supers = supers.chunks_exact(2 * cols.div_ceil(G * GROUPS));
        for ((out, codes), (scales, supers)) in
            self.out.chunks_exact_mut(cols).zip(codes).zip(scales.zip(supers))
        {
            // Sixteen super-scales are widened at a time.
            let runs = out.chunks_mut(G * GROUPS * LANES).zip(codes.chunks(G * GROUPS * LANES / 2));
            let parameters = scales.chunks(GROUPS * LANES).zip(supers.chunks(2 * LANES));
            for ((out, codes), (scales, supers)) in runs.zip(parameters) {
                let supers = widen(s, supers);
                let vectors = out.chunks_mut(LANES).zip(codes.chunks(LANES / 2));
                for (v, (out, codes)) in vectors.enumerate() {
                    let g = v * LANES / G;
                    let (l, t) = unpack_scale(scales[g]);
                    let scale = s.splat(supers[g / GROUPS] * l);
                    if let (Some(out), Some(codes)) = (out.first_chunk_mut(), codes.first_chunk()) {
                        s.store(s.mul(scale, s.lookup16(values[t], s.nibbles(codes))), out);
                        continue;
                    }
                    let mut padded = [0; LANES / 2];
                    padded[..codes.len()].copy_from_slice(codes);
                    let mut rebuilt = [0.0; LANES];
                    s.store(s.mul(scale, s.lookup16(values[t], s.nibbles(&padded))), &mut rebuilt);
                    out.copy_from_slice(&rebuilt[..out.len()]);
                }
            }
        }
    }
}

/// The rule for one weight, with its group's scale d·L and table t.
pub struct Lut<const G: usize>;

impl<const G: usize> Nearest for Lut<G> {
    const GROUP: usize = G;
    const OFFSET: bool = false;
    type Ready<S: Simd> = [Table<S>; 4];

    #[inline(always)]
    fn ready<S: Simd>(s: S) -> [Table<S>; 4] {
        Table::new(s)
    }

    fn parameters(parts: &[&[u8]], cols: usize, [scales, tables, units]: [&mut [f32]; 3]) {
        let mut supers = vec![0f32; parts[2].len() / 2];
        widen_f16(parts[2], &mut supers);
        let (groups, per_row) = (cols.div_ceil(G), cols.div_ceil(G * GROUPS));
        for (i, &byte) in parts[1].iter().enumerate() {
            let (row, group) = (i / groups, i % groups);
            let (l, t) = unpack_scale(byte);
            units[i] = supers[row * per_row + group / GROUPS];
            scales[i] = units[i] * l;
            tables[i] = t as f32;
        }
    }

    fn store_parameters(parts: &mut [&mut [u8]], _cols: usize, row: usize, groups: [&[f32]; 3]) {
        let [scales, tables, units] = groups;
        let bytes = &mut parts[1][row * scales.len()..][..scales.len()];
        for (byte, ((scale, table), unit)) in bytes.iter_mut().zip(scales.iter().zip(tables).zip(units)) {
            // The scale is unit times L, rounded once, so that dividing finds L again.
            let l = if *unit == 0.0 { 0.0 } else { (scale / unit).round_ties_even() };
            *byte = pack_scale(l, *table);
        }
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, tables: &[Table<S>; 4], x: S::F, group: Group<S>) -> (S::I, S::F) {
        let y = s.mul(x, divide_lanes(s, s.splat(1.0), group.a));
        let mut code = tables[0].code_any(s, y);
        for (i, table) in tables.iter().enumerate().skip(1) {
            let before = s.lt(group.b, s.splat(i as f32));
            code = s.select_i(before, code, table.code_any(s, y));
        }
        let code = s.and(code, s.splat_i(15));
        (code, s.mul(group.a, Self::unscaled(s, tables, code, group)))
    }

    #[inline(always)]
    fn unscaled<S: Simd>(s: S, tables: &[Table<S>; 4], code: S::I, group: Group<S>) -> S::F {
        let mut value = s.lookup16(tables[0].values, code);
        for (i, table) in tables.iter().enumerate().skip(1) {
            let before = s.lt(group.b, s.splat(i as f32));
            value = s.select(before, value, s.lookup16(table.values, code));
        }
        value
    }

    // The other tables, and scales a step down and up.
    const STARTS: usize = TABLES.len() + 1;
    const PASSES: usize = 1;

    #[inline(always)]
    fn start<S: Simd>(s: S, number: usize, group: Group<S>) -> Group<S> {
        if number < TABLES.len() - 1 {
            let (b, tables) = (s.add(group.b, s.splat((number + 1) as f32)), s.splat(TABLES.len() as f32));
            return Group { b: s.select(s.lt(b, tables), b, s.sub(b, tables)), ..group };
        }
        let l = s.round(divide_lanes(s, group.a, group.unit));
        let l = clamp_scale(s, s.add(l, s.splat(if number == TABLES.len() { -1.0 } else { 1.0 })));
        Group { a: s.mul(group.unit, l), ..group }
    }

    #[inline(always)]
    fn storable<S: Simd>(s: S, step: &Step<S>, group: Group<S>) -> Group<S> {
        let a = s.add(group.a, step.scale(s));
        let l = clamp_scale(s, s.round(divide_lanes(s, a, group.unit)));
        Group { a: s.mul(group.unit, l), ..group }
    }
}
