//! The min/max fit: the grid spans each group exactly. Fast, and what most tools mean by "4-bit".
//!
//! Rows of whole groups are one long run of groups, which [`encode`] takes a batch at a time without
//! transposing them: first the parameters of all groups, then all codes, so that no code waits for the
//! parameters of its own group. What it writes is what [`affine::encode`] writes, which takes everything else.

use super::Strip;
use super::affine::{self, Fit, MAX_CODE, per_weight, round_f16};
use super::groups::Weights;
use super::range::{LARGEST, Range, RangeLanes};
use super::simd::{Kernel, LANES, Level, Simd};

/// Weights in a batch: few enough that the second pass finds them in the first-level cache, together with
/// what it asks for.
const BATCH: usize = 512;

/// Sixteens of groups in a batch, at most.
const SIXTEENS: usize = BATCH / LANES / 8;

/// How many weights ahead of the codes memory is asked for.
const AHEAD: usize = 1024;

/// Encodes rows; their importance changes nothing.
pub fn encode<const G: usize>(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range {
    if strip.cols.is_multiple_of(G) {
        return level.run(Encode::<G> { groups: strip.data.as_chunks().0, parts });
    }
    affine::encode::<MinMax, G>(level, Strip { importance: None, ..strip }, parts)
}

struct Encode<'a, 'b, 'c, const G: usize> {
    groups: &'a [[f32; G]],
    parts: &'b mut [&'c mut [u8]],
}

impl<const G: usize> Kernel for Encode<'_, '_, '_, G> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        let [codes, scales, offsets] = self.parts else { unreachable!("the layout has three parts") };
        let mut batches = Batches::new(s);
        let mut odd = Range::default();
        let batched = self.groups.chunks(BATCH / G).zip(codes.chunks_mut(BATCH / 2));
        let parameters = scales.chunks_mut(BATCH / G * 2).zip(offsets.chunks_mut(BATCH / G * 2));
        for ((groups, codes), (scales, offsets)) in batched.zip(parameters) {
            let usual = groups.len() == BATCH / G
                && batches.encode::<G>(s, groups.as_chunks().0, codes, scales, offsets);
            if !usual {
                let strip = Strip { data: groups.as_flattened(), cols: G, importance: None };
                let parts = &mut [codes, scales, offsets];
                odd = odd.and(affine::Encode::<MinMax, G>::new(strip, parts).run(s));
            }
        }
        batches.finish(s).and(odd)
    }
}

/// The encoder of whole batches, and what it has seen.
struct Batches<S: Simd> {
    range: RangeLanes<S>,
    /// The sum of the weights that codes were computed from, less their offsets: finite if these are.
    sum: S::F,
    parameters: Parameters,
}

/// What the codes of a batch are computed with, one value for each group.
struct Parameters {
    offset: [[f32; LANES]; SIXTEENS],
    /// The scale, or infinity where it is 0.
    scale: [[f32; LANES]; SIXTEENS],
    /// 1 / scale, or 0 where the scale is 0.
    inverse: [[f32; LANES]; SIXTEENS],
    /// What `inverse` lacks; see [`Simd::div_by_f16`].
    rest: [[f32; LANES]; SIXTEENS],
}

impl<S: Simd> Batches<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let lanes = [[0.0; LANES]; SIXTEENS];
        let parameters = Parameters { offset: lanes, scale: lanes, inverse: lanes, rest: lanes };
        Batches { range: RangeLanes::new(s), sum: s.splat(0.0), parameters }
    }

    /// Encodes a batch, unless it holds a group that needs more care: a minimum of 0, whose sign the extents
    /// leave open, or a weight that FP16 offsets cannot take.
    #[inline(always)]
    fn encode<const G: usize>(
        &mut self,
        s: S,
        groups: &[[[f32; G]; LANES]],
        codes: &mut [u8],
        scales: &mut [u8],
        offsets: &mut [u8],
    ) -> bool {
        let zero = s.splat(0.0);
        let p = &mut self.parameters;
        let mut usual = true;
        for (i, sixteen) in groups.iter().enumerate() {
            let (low, high) = s.extents(sixteen);
            let largest = s.max(s.abs(low), s.abs(high));
            usual &= s.all(s.lt(largest, s.splat(LARGEST))) & s.all(s.lt(zero, s.abs(low)));
            self.range.add(s, &[largest]);
            let scale_f16 = s.narrow_f16(s.div(s.sub(high, low), s.splat(MAX_CODE)));
            let offset_f16 = s.narrow_f16(low);
            write(&scale_f16, &mut scales[i * 2 * LANES..]);
            write(&offset_f16, &mut offsets[i * 2 * LANES..]);
            let scale = s.widen_f16(&scale_f16);
            let some = s.lt(zero, scale);
            let inverse = s.div(s.splat(1.0), scale);
            let rest = s.mul(s.sub(zero, s.fma(inverse, scale, s.splat(-1.0))), inverse);
            s.store(s.widen_f16(&offset_f16), &mut p.offset[i]);
            s.store(s.select(some, scale, s.splat(f32::INFINITY)), &mut p.scale[i]);
            s.store(s.select(some, inverse, zero), &mut p.inverse[i]);
            s.store(s.select(some, rest, zero), &mut p.rest[i]);
        }
        if !usual {
            return false;
        }
        // In registers, as `self` may not be.
        let mut sum = self.sum;
        let codes = codes.chunks_exact_mut(LANES * G / 2);
        for ((i, sixteen), codes) in groups.iter().enumerate().zip(codes) {
            let fours = sixteen.as_flattened().as_chunks().0.as_chunks::<4>().0;
            for (v, (x, codes)) in fours.iter().zip(codes.as_chunks_mut().0).enumerate() {
                let mut q = [zero; 4];
                for (j, (x, q)) in x.iter().zip(&mut q).enumerate() {
                    s.prefetch(x.as_ptr().wrapping_add(AHEAD));
                    let offset = per_weight::<S, G>(s, &p.offset[i], 4 * v + j);
                    let scale = per_weight::<S, G>(s, &p.scale[i], 4 * v + j);
                    let inverse = per_weight::<S, G>(s, &p.inverse[i], 4 * v + j);
                    let rest = per_weight::<S, G>(s, &p.rest[i], 4 * v + j);
                    let x = s.sub(s.load(x), offset);
                    sum = s.add(sum, x);
                    *q = s.div_by_f16(x, scale, inverse, rest);
                }
                *codes = s.pack_nearest(q);
            }
        }
        self.sum = sum;
        true
    }

    /// The range of all batches.
    #[inline(always)]
    fn finish(mut self, s: S) -> Range {
        // Anything but zero comes from a weight that is not finite, and is NaN.
        self.range.add(s, &[s.sub(self.sum, self.sum)]);
        self.range.finish(s)
    }
}

/// Stores FP16 values at the start of `out`.
#[inline(always)]
fn write(halves: &[u16; LANES], out: &mut [u8]) {
    out[..2 * LANES].copy_from_slice(halves.map(u16::to_le_bytes).as_flattened());
}

/// s = (max - min) / 15 and o = min, both rounded to FP16 before codes are chosen.
pub struct MinMax;

impl Fit for MinMax {
    #[inline(always)]
    fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(
        s: S,
        x: &Weights<'_, G>,
        _: &[S::F; G],
        range: &mut RangeLanes<S>,
    ) -> (S::F, S::F) {
        let first = x.eight(s, 0);
        range.add(s, &first);
        let (mut low, mut high) = extent(s, &first);
        for c in 1..G / 8 {
            let eight = x.eight(s, c);
            range.add(s, &eight);
            let (l, h) = extent(s, &eight);
            (low, high) = (s.min(low, l), s.max(high, h));
        }
        (round_f16(s, s.div(s.sub(high, low), s.splat(MAX_CODE))), round_f16(s, low))
    }
}

/// The smallest and the largest weight of every group.
#[inline(always)]
pub fn extent<S: Simd>(s: S, x: &[S::F]) -> (S::F, S::F) {
    let (mut low, mut high) = (x[0], x[0]);
    for &x in &x[1..] {
        low = s.min(low, x);
        high = s.max(high, x);
    }
    (low, high)
}
