//! The min/max fit: the grid spans each group exactly. Fast, and what most tools mean by "4-bit".

use super::affine::{Fit, MAX_CODE, round_f16};
use super::groups::Weights;
use super::range::RangeLanes;
use super::simd::Simd;

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
