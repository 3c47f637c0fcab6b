//! The layouts `int4_gN_fp16`: four-bit codes, and an FP16 scale and offset for each group of N weights.
//!
//! `int4_g32_fp16` holds the numbers of GGUF's Q4_1 and of MLX's affine layout. How scale and offset are
//! chosen is a [`Fit`]; codes are then the nearest, whichever it was.

use super::groups::{Block, Grid};
use super::simd::{Kernel, LANES, Level, Simd};
use super::{Layout, Part, Per, Strip};
use crate::tensor::Dtype;
use std::marker::PhantomData;

/// The largest code.
pub const MAX_CODE: f32 = 15.0;

/// A choice of scale and offset for sixteen groups at once.
pub trait Fit {
    /// Scale and offset, both exact in FP16, for the groups `x`, where weight j of every group has the
    /// importance `w[j]`. `WEIGHTED` says whether any importance differs from 1.
    fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(s: S, x: &[S::F; G], w: &[S::F; G])
    -> (S::F, S::F);
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
        decode: decode::<G>,
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
pub fn encode<T: Fit, const G: usize>(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) {
    level.run(Encode::<T, G> { strip, parts, fit: PhantomData })
}

struct Encode<'a, 'b, 'c, T, const G: usize> {
    strip: Strip<'a>,
    parts: &'b mut [&'c mut [u8]],
    fit: PhantomData<T>,
}

impl<T: Fit, const G: usize> Kernel for Encode<'_, '_, '_, T, G> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [codes, scales, offsets] = self.parts else { unreachable!("the layout has three parts") };
        let grid = Grid::new(&self.strip, G);
        let one = [s.splat(1.0); G];
        for block in grid.blocks() {
            let full = block.len == G;
            let x: [S::F; G] = if full {
                grid.load(s, self.strip.data, &block)
            } else {
                grid.load_tail(s, self.strip.data, &block)
            };
            let (scale, offset) = if full && self.strip.importance.is_none() {
                T::fit::<S, G, false>(s, &x, &one)
            } else {
                let w = grid.load_importance(s, self.strip.importance, &block);
                T::fit::<S, G, true>(s, &x, &w)
            };
            let q = quantise(s, &x, scale, offset);
            grid.store_codes(s, &q, &block, codes);
            store_f16(s, &grid, &block, scale, scales);
            store_f16(s, &grid, &block, offset, offsets);
        }
    }
}

/// Writes one FP16 value for every group.
#[inline(always)]
pub fn store_f16<S: Simd>(s: S, grid: &Grid, block: &Block, value: S::F, out: &mut [u8]) {
    grid.store_per_group(&s.narrow_f16(value).map(u16::to_le_bytes), block, out);
}

/// Rounds to what FP16 holds.
#[inline(always)]
pub fn round_f16<S: Simd>(s: S, x: S::F) -> S::F {
    s.widen_f16(&s.narrow_f16(x))
}

/// The nearest codes: round((x - o) / s), clamped; 0 where the scale is 0.
#[inline(always)]
pub fn quantise<S: Simd, const G: usize>(s: S, x: &[S::F; G], scale: S::F, offset: S::F) -> [S::I; G] {
    let zero = s.splat(0.0);
    let flat = s.lt(zero, scale);
    // A scale of zero must not divide; infinity sends every code to zero.
    let scale = s.select(flat, scale, s.splat(f32::INFINITY));
    let top = s.splat(MAX_CODE);
    let mut q = [s.splat_i(0); G];
    for (q, &x) in q.iter_mut().zip(x) {
        *q = s.round_i(s.min(s.max(s.div(s.sub(x, offset), scale), zero), top));
    }
    q
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
                let groups = out.chunks_mut(G).zip(codes.chunks(G / 2));
                for (g, (out, codes)) in groups.enumerate() {
                    rebuild_group(s, codes, scales[g], offsets[g], out);
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

/// One group: q·scale + offset.
#[inline(always)]
pub fn rebuild_group<S: Simd>(s: S, codes: &[u8], scale: f32, offset: f32, out: &mut [f32]) {
    let (scale, offset) = (s.splat(scale), s.splat(offset));
    let rebuild = |codes: &[u8; LANES / 2]| s.add(s.mul(s.float(s.nibbles(codes)), scale), offset);
    for (out, codes) in out.chunks_mut(LANES).zip(codes.chunks(LANES / 2)) {
        if let (Some(out), Some(codes)) = (out.first_chunk_mut(), codes.first_chunk()) {
            s.store(rebuild(codes), out);
        } else {
            let mut padded = [0; LANES / 2];
            padded[..codes.len()].copy_from_slice(codes);
            let mut values = [0.0; LANES];
            s.store(rebuild(&padded), &mut values);
            out.copy_from_slice(&values[..out.len()]);
        }
    }
}
