//! The search fit: least squares between weights and codes, from several starting scales.
//!
//! From each start s = (max - min) / (Q + r), o = min, with Q the largest code, codes are chosen and scale and offset refitted in
//! closed form, a few times over (Lloyd's algorithm on an affine grid). The best is kept by its squared
//! error after rounding to FP16, with min/max among the candidates. Starts and rounds are those that still
//! win something on Gaussian and on real weights.

use super::affine::{Fit, round_f16};
use super::groups::Weights;
use super::minmax::extent;
use super::range::RangeLanes;
use super::simd::Simd;

/// Starting widths r.
const STARTS: &[f32] = &[-2.0, -1.6, -1.2, -0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.4];

/// Rounds of choosing codes and refitting.
const ROUNDS: usize = 3;

/// Least squares from several starts.
pub struct Search;

impl Fit for Search {
    #[inline(always)]
    fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(
        s: S,
        x: &Weights<'_, G>,
        w: &[S::F; G],
        range: &mut RangeLanes<S>,
    ) -> (S::F, S::F) {
        let x = x.all(s);
        range.add(s, &x);
        let best = search::<S, G, WEIGHTED, true, 4>(s, &x, w);
        (best.scale, best.offset)
    }
}

/// Scale and offset of the smallest squared error.
#[derive(Clone, Copy)]
pub struct Best<S: Simd> {
    /// The scale.
    pub scale: S::F,
    /// The offset.
    pub offset: S::F,
    error: S::F,
}

/// Sums over a group that do not depend on the codes, of weights relative to the group's minimum.
#[derive(Clone, Copy)]
pub struct Fixed<S: Simd> {
    /// The minimum.
    pub low: S::F,
    w: S::F,
    x: S::F,
    xx: S::F,
}

/// Sums over a group that do: Σw·q, Σw·q², Σw·x·q.
#[derive(Clone, Copy)]
pub struct Coded<S: Simd> {
    q: S::F,
    qq: S::F,
    xq: S::F,
}

/// The largest code of so many bits.
pub const fn max_code(bits: u32) -> f32 {
    ((1 << bits) - 1) as f32
}

/// The search itself; `F16` says whether parameters must be exact in FP16.
#[inline(always)]
pub fn search<S: Simd, const G: usize, const WEIGHTED: bool, const F16: bool, const BITS: u32>(
    s: S,
    x: &[S::F; G],
    w: &[S::F; G],
) -> Best<S> {
    let zero = s.splat(0.0);
    let mut x = *x;
    let (fixed, range) = relative::<S, G, WEIGHTED>(s, &mut x, w);

    let scale = s.div(range, s.splat(max_code(BITS)));
    let (scale, offset, from_low) = stored::<S, F16>(s, fixed, scale, zero);
    let inverse = s.div(s.splat(1.0), scale);
    let coded = code::<S, G, WEIGHTED, BITS>(s, &x, w, inverse, s.mul(s.sub(zero, from_low), inverse));
    let mut best = Best { scale, offset, error: error(s, fixed, coded, scale, from_low) };

    let per_range = s.div(s.splat(1.0), range);
    for &r in STARTS {
        let (mut inverse, mut shift) = (s.mul(s.splat(max_code(BITS) + r), per_range), zero);
        let mut coded = code::<S, G, WEIGHTED, BITS>(s, &x, w, inverse, shift);
        for _ in 1..ROUNDS {
            let fit = Refit::new(s, fixed, coded);
            inverse = s.div(fit.d, fit.scale_d);
            shift = s.sub(zero, s.div(fit.offset_d, fit.scale_d));
            coded = code::<S, G, WEIGHTED, BITS>(s, &x, w, inverse, shift);
        }
        let fit = Refit::new(s, fixed, coded);
        let per_d = s.div(s.splat(1.0), fit.d);
        let (scale, offset, from_low) =
            stored::<S, F16>(s, fixed, s.mul(fit.scale_d, per_d), s.mul(fit.offset_d, per_d));
        let error = error(s, fixed, coded, scale, from_low);
        // A degenerate group makes NaN or infinity here, which never compares as better.
        let better = s.lt(error, best.error);
        best.error = s.select(better, error, best.error);
        best.scale = s.select(better, scale, best.scale);
        best.offset = s.select(better, offset, best.offset);
    }
    best
}

/// Makes weights relative to their group's minimum, so that sums do not cancel; returns the sums and the
/// groups' ranges.
#[inline(always)]
pub fn relative<S: Simd, const G: usize, const WEIGHTED: bool>(
    s: S,
    x: &mut [S::F; G],
    w: &[S::F; G],
) -> (Fixed<S>, S::F) {
    let (low, high) = extent(s, x);
    let zero = s.splat(0.0);
    let mut fixed = Fixed { low, w: zero, x: zero, xx: zero };
    for (x, &w) in x.iter_mut().zip(w) {
        *x = s.sub(*x, low);
        let wx = if WEIGHTED { s.mul(w, *x) } else { *x };
        fixed.x = s.add(fixed.x, wx);
        fixed.xx = s.fma(wx, *x, fixed.xx);
        fixed.w = s.add(fixed.w, w);
    }
    (fixed, s.sub(high, low))
}

/// The offset of the least squared error for given codes and scale, relative to the minimum.
#[inline(always)]
pub fn best_offset<S: Simd>(s: S, fixed: Fixed<S>, coded: Coded<S>, scale: S::F) -> S::F {
    s.div(s.sub(fixed.x, s.mul(scale, coded.q)), fixed.w)
}

/// Sums for the nearest codes on the grid of step 1/inverse that starts at -shift/inverse.
#[inline(always)]
pub fn code<S: Simd, const G: usize, const WEIGHTED: bool, const BITS: u32>(
    s: S,
    x: &[S::F; G],
    w: &[S::F; G],
    inverse: S::F,
    shift: S::F,
) -> Coded<S> {
    let (zero, top) = (s.splat(0.0), s.splat(max_code(BITS)));
    let mut sums = Coded::<S> { q: zero, qq: zero, xq: zero };
    // Weights and importance do not fit the registers together; importance is better read where it is used than
    // moved in and out with everything else.
    let w = if WEIGHTED { std::hint::black_box(w) } else { w };
    for (&x, &w) in x.iter().zip(w) {
        let q = s.round(s.min(s.max(s.fma(x, inverse, shift), zero), top));
        let wq = if WEIGHTED { s.mul(w, q) } else { q };
        sums.q = s.add(sums.q, wq);
        sums.qq = s.fma(wq, q, sums.qq);
        sums.xq = s.fma(wq, x, sums.xq);
    }
    sums
}

/// The closed-form refit, before its division: scale = scale_d / d, offset = offset_d / d.
struct Refit<S: Simd> {
    d: S::F,
    scale_d: S::F,
    offset_d: S::F,
}

impl<S: Simd> Refit<S> {
    #[inline(always)]
    fn new(s: S, fixed: Fixed<S>, coded: Coded<S>) -> Self {
        Refit {
            d: s.sub(s.mul(fixed.w, coded.qq), s.mul(coded.q, coded.q)),
            scale_d: s.sub(s.mul(fixed.w, coded.xq), s.mul(fixed.x, coded.q)),
            offset_d: s.sub(s.mul(coded.qq, fixed.x), s.mul(coded.q, coded.xq)),
        }
    }
}

/// Σw(x - scale·q - offset)², expanded.
#[inline(always)]
pub fn error<S: Simd>(s: S, fixed: Fixed<S>, coded: Coded<S>, scale: S::F, offset: S::F) -> S::F {
    let two = s.splat(2.0);
    let scale_part = s.sub(s.mul(scale, coded.qq), s.mul(two, coded.xq));
    let offset_part = s.sub(s.mul(offset, fixed.w), s.mul(two, fixed.x));
    let cross = s.mul(s.mul(two, scale), s.mul(offset, coded.q));
    s.add(s.fma(scale, scale_part, s.fma(offset, offset_part, fixed.xx)), cross)
}

/// Scale and offset as they are stored, and the stored offset relative to the minimum.
#[inline(always)]
fn stored<S: Simd, const F16: bool>(s: S, fixed: Fixed<S>, scale: S::F, offset: S::F) -> (S::F, S::F, S::F) {
    let offset = s.add(offset, fixed.low);
    if F16 {
        let offset = round_f16(s, offset);
        (round_f16(s, scale), offset, s.sub(offset, fixed.low))
    } else {
        (scale, offset, s.sub(offset, fixed.low))
    }
}
