//! Sixteen lanes in one 512-bit register.
//!
//! SAFETY, for the whole file: every method is reached only through [`run`], whose caller has checked that
//! the processor has AVX-512 F, BW, DQ and VL, FMA and F16C. Loads and stores are unaligned and stay
//! inside the array references that they are given.
#![allow(clippy::undocumented_unsafe_blocks)]

use super::{Kernel, LANES, Lanes, Simd};
use std::arch::x86_64::*;

/// AVX-512; private to this folder, so that only [`run`] makes one.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Compiles `kernel` for AVX-512 and runs it.
///
/// # Safety
/// The processor must have the features named.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type M = __mmask16;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &Lanes) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut Lanes) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn lt(self, a: __m512, b: __m512) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) }
    }
    #[inline(always)]
    fn select(self, m: __mmask16, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(m, b, a) }
    }
    #[inline(always)]
    fn select_i(self, m: __mmask16, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_mask_blend_epi32(m, b, a) }
    }

    #[inline(always)]
    fn splat_i(self, x: u32) -> __m512i {
        unsafe { _mm512_set1_epi32(x.cast_signed()) }
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> __m512i {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }
    #[inline(always)]
    fn store_i(self, x: __m512i, out: &mut [u32; LANES]) {
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), x) }
    }
    #[inline(always)]
    fn bits(self, x: __m512) -> __m512i {
        unsafe { _mm512_castps_si512(x) }
    }
    #[inline(always)]
    fn round_i(self, x: __m512) -> __m512i {
        unsafe { _mm512_cvtps_epi32(x) }
    }
    #[inline(always)]
    fn float(self, x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    fn or_shl<const N: u32>(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, _mm512_slli_epi32::<N>(b)) }
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    fn max_u(self, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_max_epu32(a, b) }
    }
    #[inline(always)]
    fn add_one_unless(self, m: __mmask16, a: __m512i) -> __m512i {
        unsafe { _mm512_mask_add_epi32(a, !m, a, _mm512_set1_epi32(1)) }
    }

    #[inline(always)]
    fn lookup16(self, table: __m512, index: __m512i) -> __m512 {
        unsafe { _mm512_permutexvar_ps(index, table) }
    }
    #[inline(always)]
    fn lookup32(self, low: __m512, high: __m512, index: __m512i) -> __m512 {
        unsafe { _mm512_permutex2var_ps(low, index, high) }
    }

    #[inline(always)]
    fn narrow_f16(self, x: __m512) -> [u16; LANES] {
        unsafe {
            let halves = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            std::mem::transmute::<__m256i, [u16; LANES]>(halves)
        }
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> __m512i {
        unsafe {
            let packed = _mm_loadl_epi64(bytes.as_ptr().cast());
            let low = _mm_and_si128(packed, _mm_set1_epi8(15));
            let high = _mm_and_si128(_mm_srli_epi16::<4>(packed), _mm_set1_epi8(15));
            _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high))
        }
    }
    #[inline(always)]
    fn pack_nibbles(self, x: __m512i) -> [u8; LANES / 2] {
        unsafe {
            // Each pair of bytes becomes low + 16·high.
            let pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8(x), _mm_set1_epi16(0x1001));
            _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs)).to_le_bytes()
        }
    }
    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; LANES]) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn prefetch(self, at: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn transpose8(self, runs: [&[f32; 8]; LANES]) -> [__m512; 8] {
        unsafe {
            // Runs l and l + 8 share a register, so 8 x 8 transposes of the halves put run l into lane l.
            let mut r = [_mm512_setzero_ps(); 8];
            for (l, r) in r.iter_mut().enumerate() {
                let low = _mm512_castps256_ps512(_mm256_loadu_ps(runs[l].as_ptr()));
                *r = _mm512_insertf32x8::<1>(low, _mm256_loadu_ps(runs[l + 8].as_ptr()));
            }
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            let mut u = t;
            for i in 0..2 {
                let b = 4 * i;
                u[b] = _mm512_shuffle_ps::<0x44>(t[b], t[b + 2]);
                u[b + 1] = _mm512_shuffle_ps::<0xEE>(t[b], t[b + 2]);
                u[b + 2] = _mm512_shuffle_ps::<0x44>(t[b + 1], t[b + 3]);
                u[b + 3] = _mm512_shuffle_ps::<0xEE>(t[b + 1], t[b + 3]);
            }
            let low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            let high = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
            let mut out = u;
            for i in 0..4 {
                out[i] = _mm512_permutex2var_ps(u[i], low, u[i + 4]);
                out[i + 4] = _mm512_permutex2var_ps(u[i], high, u[i + 4]);
            }
            out
        }
    }

    #[inline(always)]
    fn splat_halves(self, a: f32, b: f32) -> __m512 {
        unsafe { _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(a), _mm512_set1_ps(b)) }
    }
    #[inline(always)]
    fn all(self, m: __mmask16) -> bool {
        m == 0xFFFF
    }
    #[inline(always)]
    fn extents<const N: usize>(self, runs: &[[f32; N]; LANES]) -> (__m512, __m512) {
        let join = |x: [__m256; 2]| unsafe { _mm512_insertf32x8::<1>(_mm512_castps256_ps512(x[0]), x[1]) };
        let (low, high) = super::avx2::extents(runs);
        (join(low), join(high))
    }
    #[inline(always)]
    fn div_by_f16(self, a: __m512, _b: __m512, high: __m512, low: __m512) -> __m512 {
        self.fma(a, high, self.mul(a, low))
    }
    #[inline(always)]
    fn pack_nearest(self, x: [__m512; 4]) -> [u8; 2 * LANES] {
        unsafe {
            let words = |a, b| _mm512_packs_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let bytes = _mm512_packus_epi16(words(x[0], x[1]), words(x[2], x[3]));
            let bytes = _mm512_min_epu8(bytes, _mm512_set1_epi8(15));
            // Each pair of bytes becomes low + 16·high.
            let pairs = _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001)));
            // Packing works in 128-bit quarters: each now holds four codes of every vector.
            let order = _mm256_setr_epi16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            std::mem::transmute::<__m256i, [u8; 2 * LANES]>(_mm256_permutexvar_epi16(order, pairs))
        }
    }
}
