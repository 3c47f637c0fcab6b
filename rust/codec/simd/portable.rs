//! The reference: plain loops over sixteen lanes, which compilers turn into whatever the target has.

use super::{LANES, Lanes, Simd};
use half::f16;

/// Plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

#[inline(always)]
fn each<T: Copy + Default, U: Copy>(a: [U; LANES], f: impl Fn(U) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i]);
    }
    out
}

#[inline(always)]
fn both<T: Copy + Default, U: Copy, V: Copy>(
    a: [U; LANES],
    b: [V; LANES],
    f: impl Fn(U, V) -> T,
) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for i in 0..LANES {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Simd for Portable {
    type F = Lanes;
    type I = [u32; LANES];
    type M = [bool; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &Lanes) -> Lanes {
        *x
    }
    #[inline(always)]
    fn store(self, x: Lanes, out: &mut Lanes) {
        *out = x;
    }
    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        let mut out = c;
        for i in 0..LANES {
            out[i] = a[i].mul_add(b[i], c[i]);
        }
        out
    }
    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        both(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Lanes) -> Lanes {
        each(a, f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        each(a, f32::round_ties_even)
    }
    #[inline(always)]
    fn lt(self, a: Lanes, b: Lanes) -> Self::M {
        both(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn select(self, m: Self::M, a: Lanes, b: Lanes) -> Lanes {
        let mut out = b;
        for i in 0..LANES {
            out[i] = if m[i] { a[i] } else { b[i] };
        }
        out
    }
    #[inline(always)]
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I {
        let mut out = b;
        for i in 0..LANES {
            out[i] = if m[i] { a[i] } else { b[i] };
        }
        out
    }

    #[inline(always)]
    fn splat_i(self, x: u32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn load_i(self, x: &[u32; LANES]) -> Self::I {
        *x
    }
    #[inline(always)]
    fn store_i(self, x: Self::I, out: &mut [u32; LANES]) {
        *out = x;
    }
    #[inline(always)]
    fn bits(self, x: Lanes) -> Self::I {
        each(x, f32::to_bits)
    }
    #[inline(always)]
    fn round_i(self, x: Lanes) -> Self::I {
        each(x, |x| (x.round_ties_even() as i32).cast_unsigned())
    }
    #[inline(always)]
    fn float(self, x: Self::I) -> Lanes {
        each(x, |x| x.cast_signed() as f32)
    }
    #[inline(always)]
    fn or_shl<const N: u32>(self, a: Self::I, b: Self::I) -> Self::I {
        both(a, b, |a, b| a | b << N)
    }
    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        both(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn max_u(self, a: Self::I, b: Self::I) -> Self::I {
        both(a, b, u32::max)
    }
    #[inline(always)]
    fn add_one_unless(self, m: Self::M, a: Self::I) -> Self::I {
        both(m, a, |m, a| a + u32::from(!m))
    }

    #[inline(always)]
    fn lookup16(self, table: Lanes, index: Self::I) -> Lanes {
        each(index, |i| table[(i & 15) as usize])
    }
    #[inline(always)]
    fn lookup32(self, low: Lanes, high: Lanes, index: Self::I) -> Lanes {
        each(index, |i| if i & 16 == 0 { low[(i & 15) as usize] } else { high[(i & 15) as usize] })
    }

    #[inline(always)]
    fn narrow_f16(self, x: Lanes) -> [u16; LANES] {
        each(x, |x| f16::from_f32(x).to_bits())
    }
    #[inline(always)]
    fn widen_f16(self, x: &[u16; LANES]) -> Lanes {
        each(*x, |x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> Self::I {
        let mut out = [0; LANES];
        for (i, &b) in bytes.iter().enumerate() {
            out[2 * i] = u32::from(b & 15);
            out[2 * i + 1] = u32::from(b >> 4);
        }
        out
    }
    #[inline(always)]
    fn pack_nibbles(self, x: Self::I) -> [u8; LANES / 2] {
        let mut out = [0; LANES / 2];
        for (out, pair) in out.iter_mut().zip(x.as_chunks::<2>().0) {
            *out = (pair[0] | pair[1] << 4) as u8;
        }
        out
    }
    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; LANES]) -> Lanes {
        each(*bytes, |b| f32::from(b.cast_signed()))
    }

    #[inline(always)]
    fn prefetch(self, _: *const f32) {}

    #[inline(always)]
    fn transpose8(self, runs: [&[f32; 8]; LANES]) -> [Lanes; 8] {
        let mut out = [[0.0; LANES]; 8];
        for (lane, run) in runs.iter().enumerate() {
            for (j, &x) in run.iter().enumerate() {
                out[j][lane] = x;
            }
        }
        out
    }

    #[inline(always)]
    fn all(self, m: Self::M) -> bool {
        m.iter().all(|&m| m)
    }
}
