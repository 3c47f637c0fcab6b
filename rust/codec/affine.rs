//! The layouts `int4_gN_fp16`: four-bit codes, and an FP16 scale and offset for each group of N weights.
//!
//! `int4_g32_fp16` holds the numbers of GGUF's Q4_1 and of MLX's affine layout. How scale and offset are
//! chosen is a [`Fit`]; codes are then the nearest, whichever it was.

use super::feedback::{Group, Nearest, feedback};
use super::groups::{Block, Grid, Weights};
use super::half_floats::{narrow_f16, widen_f16};
use super::range::{Range, RangeLanes};
use super::search::{Search, max_code};
use super::simd::{Kernel, LANES, Level, Simd};
use super::trial::Step;
use super::{Calibrated, Layout, Part, Per, Strip};
use crate::tensor::Dtype;
use std::marker::PhantomData;

/// The largest code.
pub const MAX_CODE: f32 = 15.0;

/// A choice of scale and offset for sixteen groups at once.
pub trait Fit {
    /// Scale and offset, both exact in FP16, for the groups `x`, where weight j of every group has the
    /// importance `w[j]`. `WEIGHTED` says whether any importance differs from 1. Every weight is added to
    /// `range`.
    fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(
        s: S,
        x: &Weights<'_, G>,
        w: &[S::F; G],
        range: &mut RangeLanes<S>,
    ) -> (S::F, S::F);
}

/// The layout with groups of `G`.
pub const fn layout<const G: usize>(name: &'static str, parts: &'static [Part]) -> Layout {
    Layout {
        name,
        group: Some(G),
        code_bits: 4,
        parts,
        rebuild: "q*s + o",
        normal_from: 1.0 / 64.0,
        tables: None,
        decode: decode::<G>,
        under_rows: None,
        calibrated: Some(Calibrated { search: encode::<Search, G>, feedback: feedback::<Affine<G>> }),
    }
}

/// The parts of the layout with groups of `G`.
pub const fn parts<const G: usize>() -> [Part; 3] {
    [
        Part { name: "codes", dtype: Dtype::U8, per: Per::Weight(4) },
        Part { name: "scales", dtype: Dtype::F16, per: Per::Run(G) },
        Part { name: "offsets", dtype: Dtype::F16, per: Per::Run(G) },
    ]
}

/// Encodes rows with parameters chosen by `T`.
pub fn encode<T: Fit, const G: usize>(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range {
    level.run(Encode::<T, G>::new(strip, parts))
}

/// The kernel of [`encode`].
pub struct Encode<'a, 'b, 'c, T, const G: usize> {
    strip: Strip<'a>,
    parts: &'b mut [&'c mut [u8]],
    fit: PhantomData<T>,
}

impl<'a, 'b, 'c, T, const G: usize> Encode<'a, 'b, 'c, T, G> {
    /// Encodes `strip` into `parts`.
    pub fn new(strip: Strip<'a>, parts: &'b mut [&'c mut [u8]]) -> Self {
        Encode { strip, parts, fit: PhantomData }
    }
}

impl<T: Fit, const G: usize> Kernel for Encode<'_, '_, '_, T, G> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        let [codes, scales, offsets] = self.parts else { unreachable!("the layout has three parts") };
        let mut range = RangeLanes::new(s);
        let grid = Grid::new(&self.strip, G);
        let one = [s.splat(1.0); G];
        for block in grid.blocks() {
            let x = grid.weights::<S, G>(s, self.strip.data, &block);
            let (scale, offset) = if block.len == G && self.strip.importance.is_none() {
                T::fit::<S, G, false>(s, &x, &one, &mut range)
            } else {
                let w = grid.load_importance(s, self.strip.importance, &block);
                T::fit::<S, G, true>(s, &x, &w, &mut range)
            };
            let scales_f16 = s.narrow_f16(scale);
            let offsets_f16 = s.narrow_f16(offset);
            grid.store_per_group(&scales_f16.map(u16::to_le_bytes), &block, scales);
            grid.store_per_group(&offsets_f16.map(u16::to_le_bytes), &block, offsets);
            quantise_block::<S, G>(s, &grid, &block, self.strip.data, scale, offset, codes);
        }
        range.finish(s)
    }
}

/// Rounds to what FP16 holds.
#[inline(always)]
pub fn round_f16<S: Simd>(s: S, x: S::F) -> S::F {
    s.widen_f16(&s.narrow_f16(x))
}

/// Writes the nearest codes of a block: round((x - o) / s), clamped; 0 where the scale is 0.
#[inline(always)]
pub fn quantise_block<S: Simd, const G: usize>(
    s: S,
    grid: &Grid,
    block: &Block,
    data: &[f32],
    scale: S::F,
    offset: S::F,
    codes: &mut [u8],
) {
    // A scale of zero must not divide; infinity sends every code to zero.
    let scale = s.select(s.lt(s.splat(0.0), scale), scale, s.splat(f32::INFINITY));
    let (mut scales, mut offsets) = ([0.0; LANES], [0.0; LANES]);
    s.store(scale, &mut scales);
    s.store(offset, &mut offsets);
    if let Some((data, codes)) = grid.together(block, data, codes) {
        let vectors = data.as_chunks().0.iter().zip(codes.as_chunks_mut().0);
        for (v, (x, codes)) in vectors.enumerate() {
            let (scale, offset) = (per_weight::<S, G>(s, &scales, v), per_weight::<S, G>(s, &offsets, v));
            *codes = quantise(s, x, scale, offset);
        }
        return;
    }
    for lane in 0..block.lanes {
        let (scale, offset) = (s.splat(scales[lane]), s.splat(offsets[lane]));
        let (x, codes) = grid.group(block, lane, data, codes);
        for (x, codes) in x.chunks(LANES).zip(codes.chunks_mut(LANES / 2)) {
            // The offset itself stands for what is missing, so that unused nibbles are zero.
            let mut padded = [offsets[lane]; LANES];
            padded[..x.len()].copy_from_slice(x);
            codes.copy_from_slice(&quantise(s, &padded, scale, offset)[..codes.len()]);
        }
    }
}

#[inline(always)]
fn quantise<S: Simd>(s: S, x: &[f32; LANES], scale: S::F, offset: S::F) -> [u8; LANES / 2] {
    let q = s.div(s.sub(s.load(x), offset), scale);
    s.pack_nibbles(s.round_i(s.min(s.max(q, s.splat(0.0)), s.splat(MAX_CODE))))
}

/// Rebuilds rows.
pub fn decode<const G: usize>(level: Level, parts: &[&[u8]], cols: usize, out: &mut [f32]) {
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
        let [codes, scales, offsets] = self.parts else { unreachable!("the layout has three parts") };
        let per_row = self.cols.div_ceil(G);
        let rows = self.out.chunks_mut(self.cols.max(1));
        for (r, out) in rows.enumerate() {
            let codes = &codes[r * self.cols.div_ceil(2)..][..self.cols.div_ceil(2)];
            let scales = &scales[r * per_row * 2..][..per_row * 2];
            let offsets = &offsets[r * per_row * 2..][..per_row * 2];
            let batches = out.chunks_mut(G * LANES).zip(codes.chunks(G * LANES / 2));
            for ((out, codes), (scales, offsets)) in
                batches.zip(scales.chunks(2 * LANES).zip(offsets.chunks(2 * LANES)))
            {
                let scales = widen(s, scales);
                let offsets = widen(s, offsets);
                for (v, (out, codes)) in out.chunks_mut(LANES).zip(codes.chunks(LANES / 2)).enumerate() {
                    rebuild(
                        s,
                        codes,
                        per_weight::<S, G>(s, &scales, v),
                        per_weight::<S, G>(s, &offsets, v),
                        out,
                    );
                }
            }
        }
    }
}

/// Up to sixteen FP16 values.
#[inline(always)]
pub fn widen<S: Simd>(s: S, bytes: &[u8]) -> [f32; LANES] {
    let mut halves = [0u16; LANES];
    for (h, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
        *h = u16::from_le_bytes([b[0], b[1]]);
    }
    let mut out = [0.0; LANES];
    s.store(s.widen_f16(&halves), &mut out);
    out
}

/// The parameters of the sixteen weights in vector `v` of a run of sixteen groups of `G`.
#[inline(always)]
pub fn per_weight<S: Simd, const G: usize>(s: S, parameters: &[f32; LANES], v: usize) -> S::F {
    const { assert!(G == LANES / 2 || G.is_multiple_of(LANES)) };
    if G >= LANES {
        return s.splat(parameters[v * LANES / G]);
    }
    s.splat_halves(parameters[2 * v], parameters[2 * v + 1])
}

/// Up to sixteen weights: q·scale + offset.
#[inline(always)]
pub fn rebuild<S: Simd>(s: S, codes: &[u8], scale: S::F, offset: S::F, out: &mut [f32]) {
    if let (Some(out), Some(codes)) = (out.first_chunk_mut(), codes.first_chunk()) {
        return s.store(s.add(s.mul(s.float(s.nibbles(codes)), scale), offset), out);
    }
    let mut padded = [0; LANES / 2];
    padded[..codes.len()].copy_from_slice(codes);
    let mut values = [0.0; LANES];
    s.store(s.add(s.mul(s.float(s.nibbles(&padded)), scale), offset), &mut values);
    out.copy_from_slice(&values[..out.len()]);
}

/// The rule for one weight, with a group's scale and offset.
pub struct Affine<const G: usize>;

impl<const G: usize> Nearest for Affine<G> {
    const GROUP: usize = G;
    const OFFSET: bool = true;
    type Ready<S: Simd> = ();

    #[inline(always)]
    fn ready<S: Simd>(_: S) {}

    fn parameters(parts: &[&[u8]], _cols: usize, [scales, offsets, _]: [&mut [f32]; 3]) {
        widen_f16(parts[1], scales);
        widen_f16(parts[2], offsets);
    }

    fn store_parameters(parts: &mut [&mut [u8]], _cols: usize, row: usize, groups: [&[f32]; 3]) {
        for (part, values) in parts[1..3].iter_mut().zip(groups) {
            let bytes = 2 * values.len();
            narrow_f16(values, &mut part[row * bytes..][..bytes]);
        }
    }

    #[inline(always)]
    fn nearest<S: Simd>(s: S, (): &(), x: S::F, group: Group<S>) -> (S::I, S::F) {
        nearest_in_group::<S, 4>(s, x, group)
    }

    #[inline(always)]
    fn unscaled<S: Simd>(s: S, (): &(), code: S::I, _: Group<S>) -> S::F {
        s.float(code)
    }

    const STARTS: usize = STARTS.len();
    const PASSES: usize = passes(G);

    #[inline(always)]
    fn start<S: Simd>(s: S, number: usize, group: Group<S>) -> Group<S> {
        let (a, b) = around::<S, 4>(s, number, group);
        Group { a: round_f16(s, a), b: round_f16(s, b), ..group }
    }

    #[inline(always)]
    fn storable<S: Simd>(s: S, step: &Step<S>, group: Group<S>) -> Group<S> {
        let [scale, offset] = step.both(s);
        let (a, b) = (round_f16(s, s.add(group.a, scale)), round_f16(s, s.add(group.b, offset)));
        // Codes go upwards; a scale that would turn them round is no better one.
        let upwards = s.lt(s.splat(0.0), a);
        Group { a: s.select(upwards, a, group.a), b: s.select(upwards, b, group.b), ..group }
    }
}

/// Grids to try around a group's: by how many steps they reach further at both ends, and lie higher.
pub const STARTS: &[(f32, f32)] =
    &[(-0.75, 0.0), (0.75, 0.0), (0.0, 0.25), (0.0, -0.25), (0.0, 0.5), (0.0, -0.5)];

/// How often each is refitted: the second time gains a third of what the first does.
/// Large groups, whose passes take longer, gain less.
pub const fn passes(group: usize) -> usize {
    if group < 32 { 2 } else { 1 }
}

/// Scale and offset of start `number`.
#[inline(always)]
pub fn around<S: Simd, const BITS: u32>(s: S, number: usize, group: Group<S>) -> (S::F, S::F) {
    let (further, higher) = STARTS[number];
    let scale = s.mul(group.a, s.splat(1.0 + 2.0 * further / max_code(BITS)));
    (scale, s.fma(group.a, s.splat(higher - further), group.b))
}

/// The nearest code, 0 where the scale is 0, and the weight that it stands for.
#[inline(always)]
pub fn nearest<S: Simd, const BITS: u32>(s: S, x: S::F, scale: S::F, offset: S::F) -> (S::I, S::F) {
    let divisor = s.select(s.lt(s.splat(0.0), scale), scale, s.splat(f32::INFINITY));
    rebuilt::<S, BITS>(s, s.div(s.sub(x, offset), divisor), scale, offset)
}

/// The same with one division for all weights of a group, which may round a tie otherwise.
#[inline(always)]
pub fn nearest_in_group<S: Simd, const BITS: u32>(s: S, x: S::F, group: Group<S>) -> (S::I, S::F) {
    let zero = s.splat(0.0);
    let inverse = s.select(s.lt(zero, group.a), s.div(s.splat(1.0), group.a), zero);
    rebuilt::<S, BITS>(s, s.mul(s.sub(x, group.b), inverse), group.a, group.b)
}

#[inline(always)]
fn rebuilt<S: Simd, const BITS: u32>(s: S, q: S::F, scale: S::F, offset: S::F) -> (S::I, S::F) {
    let code = s.round_i(s.min(s.max(q, s.splat(0.0)), s.splat(max_code(BITS))));
    (code, s.add(s.mul(s.float(code), scale), offset))
}
