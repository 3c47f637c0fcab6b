//! The min/max fit: the grid spans each group exactly. Fast, and what most tools mean by "4-bit".

use super::affine::{Fit, MAX_CODE, round_f16};
use super::simd::Simd;

/// s = (max - min) / 15 and o = min, both rounded to FP16 before codes are chosen.
pub struct MinMax;

impl Fit for MinMax {
    #[inline(always)]
    fn fit<S: Simd, const G: usize, const WEIGHTED: bool>(
        s: S,
        x: &[S::F; G],
        _: &[S::F; G],
    ) -> (S::F, S::F) {
        let (low, high) = extent(s, x);
        (round_f16(s, s.div(s.sub(high, low), s.splat(MAX_CODE))), round_f16(s, low))
    }
}

/// The smallest and the largest weight of every group.
#[inline(always)]
pub fn extent<S: Simd, const G: usize>(s: S, x: &[S::F; G]) -> (S::F, S::F) {
    let (mut low, mut high) = (x[0], x[0]);
    for &x in &x[1..] {
        low = s.min(low, x);
        high = s.max(high, x);
    }
    (low, high)
}
