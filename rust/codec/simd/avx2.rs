//! Sixteen lanes in two 256-bit registers.
//!
//! SAFETY, for the whole file: every method is reached only through [`run`], whose caller has checked that
//! the processor has AVX2, FMA and F16C. Loads and stores are unaligned and stay inside the array
//! references that they are given.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::{Kernel, LANES, Lanes, Simd};
use std::arch::x86_64::*;

/// AVX2; private to this folder, so that only [`run`] makes one.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// Compiles `kernel` for AVX2 and runs it.
///
/// # Safety
/// The processor must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// The eight lanes of a table of sixteen or more that `index` names, where bits 3 and up choose the part.
#[inline(always)]
fn lookup_part(parts: &[__m256], index: __m256i) -> __m256 {
    unsafe {
        let mut out = _mm256_permutevar8x32_ps(parts[0], index);
        if parts.len() == 2 {
            // Bit 3 becomes the sign that blends read.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
            out = _mm256_blendv_ps(out, _mm256_permutevar8x32_ps(parts[1], index), upper);
        }
        out
    }
}

#[inline(always)]
fn transpose8x8(r: [__m256; 8]) -> [__m256; 8] {
    unsafe {
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut u = t;
        for i in 0..2 {
            let b = 4 * i;
            u[b] = _mm256_shuffle_ps::<0x44>(t[b], t[b + 2]);
            u[b + 1] = _mm256_shuffle_ps::<0xEE>(t[b], t[b + 2]);
            u[b + 2] = _mm256_shuffle_ps::<0x44>(t[b + 1], t[b + 3]);
            u[b + 3] = _mm256_shuffle_ps::<0xEE>(t[b + 1], t[b + 3]);
        }
        let mut out = u;
        for i in 0..4 {
            out[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
        }
        out
    }
}

/// The extents of four runs, of their halves: `[l]` and `[l + 4]` belong to run l.
#[inline(always)]
fn half_extents<const N: usize>(runs: &[[f32; N]; 4]) -> (__m256, __m256) {
    const { assert!(N.is_multiple_of(8)) };
    unsafe {
        let (mut low, mut high) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
        for (l, run) in runs.iter().enumerate() {
            // Eight neighbours load together, so that nothing is transposed before it is eight values.
            let (first, rest) = run.as_chunks::<8>().0.split_first().expect("a run is not empty");
            (low[l], high[l]) = (_mm256_loadu_ps(first.as_ptr()), _mm256_loadu_ps(first.as_ptr()));
            for x in rest {
                let x = _mm256_loadu_ps(x.as_ptr());
                (low[l], high[l]) = (_mm256_min_ps(low[l], x), _mm256_max_ps(high[l], x));
            }
        }
        for i in [0, 2] {
            let (l, h) = ([low[i], low[i + 1]], [high[i], high[i + 1]]);
            low[i] = _mm256_min_ps(_mm256_unpacklo_ps(l[0], l[1]), _mm256_unpackhi_ps(l[0], l[1]));
            high[i] = _mm256_max_ps(_mm256_unpacklo_ps(h[0], h[1]), _mm256_unpackhi_ps(h[0], h[1]));
        }
        let (l, h) = ([low[0], low[2]], [high[0], high[2]]);
        (
            _mm256_min_ps(_mm256_shuffle_ps::<0x44>(l[0], l[1]), _mm256_shuffle_ps::<0xEE>(l[0], l[1])),
            _mm256_max_ps(_mm256_shuffle_ps::<0x44>(h[0], h[1]), _mm256_shuffle_ps::<0xEE>(h[0], h[1])),
        )
    }
}

/// [`Simd::extents`]; AVX-512 uses it too, because runs of eight are halves of its registers.
#[inline(always)]
pub fn extents<const N: usize>(runs: &[[f32; N]; LANES]) -> (F, F) {
    unsafe {
        let (mut low, mut high) = ([_mm256_setzero_ps(); 2], [_mm256_setzero_ps(); 2]);
        for (i, eight) in runs.as_chunks::<8>().0.iter().enumerate() {
            let fours = eight.as_chunks::<4>().0;
            let (l0, h0) = half_extents(&fours[0]);
            let (l1, h1) = half_extents(&fours[1]);
            low[i] =
                _mm256_min_ps(_mm256_permute2f128_ps::<0x20>(l0, l1), _mm256_permute2f128_ps::<0x31>(l0, l1));
            high[i] =
                _mm256_max_ps(_mm256_permute2f128_ps::<0x20>(h0, h1), _mm256_permute2f128_ps::<0x31>(h0, h1));
        }
        (low, high)
    }
}

/// The nearest codes of 32 weights, low + 16·high of each two in a 16-bit word; words of two neighbouring
/// vectors of four weights alternate between the 128-bit halves.
#[inline(always)]
fn byte_pairs(a: F, b: F) -> __m256i {
    unsafe {
        let a = _mm256_packs_epi32(_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1]));
        let b = _mm256_packs_epi32(_mm256_cvtps_epi32(b[0]), _mm256_cvtps_epi32(b[1]));
        let bytes = _mm256_min_epu8(_mm256_packus_epi16(a, b), _mm256_set1_epi8(15));
        _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001))
    }
}

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type M = F;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &Lanes) -> F {
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut Lanes) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), x[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn min(self, a: F, b: F) -> F {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn abs(self, a: F) -> F {
        unsafe {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        }
    }
    #[inline(always)]
    fn round(self, a: F) -> F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { [_mm256_round_ps::<NEAREST>(a[0]), _mm256_round_ps::<NEAREST>(a[1])] }
    }
    #[inline(always)]
    fn lt(self, a: F, b: F) -> F {
        unsafe { [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])] }
    }
    #[inline(always)]
    fn select(self, m: F, a: F, b: F) -> F {
        unsafe { [_mm256_blendv_ps(b[0], a[0], m[0]), _mm256_blendv_ps(b[1], a[1], m[1])] }
    }
    #[inline(always)]
    fn select_i(self, m: F, a: I, b: I) -> I {
        unsafe {
            let blend = |i: usize| {
                _mm256_castps_si256(_mm256_blendv_ps(
                    _mm256_castsi256_ps(b[i]),
                    _mm256_castsi256_ps(a[i]),
                    m[i],
                ))
            };
            [blend(0), blend(1)]
        }
    }

    #[inline(always)]
    fn splat_i(self, x: u32) -> I {
        unsafe { [_mm256_set1_epi32(x.cast_signed()); 2] }
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> I {
        unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x[8..].as_ptr().cast())] }
    }
    #[inline(always)]
    fn store_i(self, x: I, out: &mut [u32; LANES]) {
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(out[8..].as_mut_ptr().cast(), x[1]);
        }
    }
    #[inline(always)]
    fn bits(self, x: F) -> I {
        unsafe { [_mm256_castps_si256(x[0]), _mm256_castps_si256(x[1])] }
    }
    #[inline(always)]
    fn round_i(self, x: F) -> I {
        unsafe { [_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1])] }
    }
    #[inline(always)]
    fn float(self, x: I) -> F {
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }
    #[inline(always)]
    fn or_shl<const N: u32>(self, a: I, b: I) -> I {
        unsafe {
            let n = _mm_cvtsi32_si128(N.cast_signed());
            [
                _mm256_or_si256(a[0], _mm256_sll_epi32(b[0], n)),
                _mm256_or_si256(a[1], _mm256_sll_epi32(b[1], n)),
            ]
        }
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }
    #[inline(always)]
    fn max_u(self, a: I, b: I) -> I {
        unsafe { [_mm256_max_epu32(a[0], b[0]), _mm256_max_epu32(a[1], b[1])] }
    }
    #[inline(always)]
    fn add_one_unless(self, m: F, a: I) -> I {
        unsafe {
            // A true condition is -1, so 1 + m is one exactly where m is false.
            let one = _mm256_set1_epi32(1);
            let add = |i: usize| _mm256_add_epi32(a[i], _mm256_add_epi32(one, _mm256_castps_si256(m[i])));
            [add(0), add(1)]
        }
    }

    #[inline(always)]
    fn lookup16(self, table: F, index: I) -> F {
        [lookup_part(&table, index[0]), lookup_part(&table, index[1])]
    }
    #[inline(always)]
    fn lookup32(self, low: F, high: F, index: I) -> F {
        let one = |index: __m256i| unsafe {
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(index));
            _mm256_blendv_ps(lookup_part(&low, index), lookup_part(&high, index), upper)
        };
        [one(index[0]), one(index[1])]
    }

    #[inline(always)]
    fn narrow_f16(self, x: F) -> [u16; LANES] {
        unsafe {
            let halves = [
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]),
            ];
            std::mem::transmute::<[__m128i; 2], [u16; LANES]>(halves)
        }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> F {
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(x[8..].as_ptr().cast())),
            ]
        }
    }
    #[inline(always)]
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> I {
        unsafe {
            let packed = _mm_loadl_epi64(bytes.as_ptr().cast());
            let low = _mm_and_si128(packed, _mm_set1_epi8(15));
            let high = _mm_and_si128(_mm_srli_epi16::<4>(packed), _mm_set1_epi8(15));
            let codes = _mm_unpacklo_epi8(low, high);
            [_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(codes))]
        }
    }
    #[inline(always)]
    fn pack_nibbles(self, x: I) -> [u8; LANES / 2] {
        unsafe {
            // Packing works in 128-bit halves: the middle two quarters change places.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(x[0], x[1]));
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            // Each pair of bytes becomes low + 16·high.
            let pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
            _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs)).to_le_bytes()
        }
    }
    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; LANES]) -> F {
        unsafe {
            let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
            self.float([_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))])
        }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn transpose8(self, runs: [&[f32; 8]; LANES]) -> [F; 8] {
        unsafe {
            let mut out = [[_mm256_setzero_ps(); 2]; 8];
            for half in 0..2 {
                let mut r = [_mm256_setzero_ps(); 8];
                for (l, r) in r.iter_mut().enumerate() {
                    *r = _mm256_loadu_ps(runs[half * 8 + l].as_ptr());
                }
                for (out, t) in out.iter_mut().zip(transpose8x8(r)) {
                    out[half] = t;
                }
            }
            out
        }
    }

    #[inline(always)]
    fn splat_halves(self, a: f32, b: f32) -> F {
        unsafe { [_mm256_set1_ps(a), _mm256_set1_ps(b)] }
    }
    #[inline(always)]
    fn all(self, m: F) -> bool {
        unsafe { _mm256_movemask_ps(_mm256_and_ps(m[0], m[1])) == 0xFF }
    }
    #[inline(always)]
    fn extents<const N: usize>(self, runs: &[[f32; N]; LANES]) -> (F, F) {
        extents(runs)
    }
    #[inline(always)]
    fn div_by_f16(self, a: F, _b: F, high: F, low: F) -> F {
        self.fma(a, high, self.mul(a, low))
    }
    #[inline(always)]
    fn pack_nearest(self, x: [F; 4]) -> [u8; 2 * LANES] {
        unsafe {
            let packed = _mm256_packus_epi16(byte_pairs(x[0], x[1]), byte_pairs(x[2], x[3]));
            // Packing works in 128-bit halves: words of two codes now alternate between them.
            let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
                0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,
            ));
            let packed = _mm256_shuffle_epi8(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed), order);
            std::mem::transmute::<__m256i, [u8; 2 * LANES]>(packed)
        }
    }
}
