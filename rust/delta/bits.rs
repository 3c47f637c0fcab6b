//! Bits in a row: how they are packed, eight bytes of elements at a time, and read again.

use crate::codec::simd::Level;

/// Moves bits together and apart. Every implementation gives the same.
pub trait Pack: Copy {
    /// The bits of `x` under `mask`, moved together, the lowest first.
    fn gather(self, x: u64, mask: u64) -> u64;

    /// The lowest bits of `x`, moved to where `mask` has ones: undoes [`Pack::gather`].
    fn scatter(self, x: u64, mask: u64) -> u64;

    /// `table[i]` for each byte `i` (below 16).
    fn look_up(self, table: &[u8; 16], bytes: u64) -> u64;
}

/// A computation that runs on any implementation; marked `#[inline(always)]`, it compiles once for each.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Runs it.
    fn run<P: Pack>(self, pack: P) -> Self::Output;
}

/// Runs a kernel with the widest instructions that `level` allows.
pub fn run<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level {
        // SAFETY: the level says that the processor has AVX-512, and the guard asks for the rest.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 if x86::has_bmi2() => unsafe { x86::run_avx512(kernel) },
        // SAFETY: as above, with AVX2.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 if x86::has_bmi2() => unsafe { x86::run_avx2(kernel) },
        _ => kernel.run(Portable),
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
struct Portable;

const fn ones(n: u32) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

impl Pack for Portable {
    #[inline(always)]
    fn gather(self, x: u64, mut mask: u64) -> u64 {
        // Masks are a few runs of ones.
        let (mut out, mut n) = (0, 0);
        while mask != 0 {
            let start = mask.trailing_zeros();
            let run = (mask >> start).trailing_ones();
            out |= (x >> start & ones(run)) << n;
            n += run;
            mask &= !(ones(run) << start);
        }
        out
    }

    #[inline(always)]
    fn scatter(self, x: u64, mut mask: u64) -> u64 {
        let (mut out, mut n) = (0, 0);
        while mask != 0 {
            let start = mask.trailing_zeros();
            let run = (mask >> start).trailing_ones();
            out |= (x >> n & ones(run)) << start;
            n += run;
            mask &= !(ones(run) << start);
        }
        out
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: u64) -> u64 {
        u64::from_le_bytes(bytes.to_le_bytes().map(|b| table[usize::from(b & 15)]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Pack};
    use std::arch::x86_64::{
        _mm_cvtsi64_si128, _mm_cvtsi128_si64, _mm_loadu_si128, _mm_shuffle_epi8, _pdep_u64, _pext_u64,
    };

    /// PEXT and PDEP; made only where the processor has BMI2.
    #[derive(Clone, Copy)]
    pub struct Bmi2(());

    /// Whether PEXT is there and more than a loop: AMD's processors before Zen 3 are slow at it.
    pub fn has_bmi2() -> bool {
        is_x86_feature_detected!("bmi2")
            && (is_x86_feature_detected!("vaes") || !is_x86_feature_detected!("sse4a"))
    }

    impl Pack for Bmi2 {
        #[inline(always)]
        fn gather(self, x: u64, mask: u64) -> u64 {
            // SAFETY: the processor has BMI2.
            unsafe { _pext_u64(x, mask) }
        }

        #[inline(always)]
        fn scatter(self, x: u64, mask: u64) -> u64 {
            // SAFETY: the processor has BMI2.
            unsafe { _pdep_u64(x, mask) }
        }

        #[inline(always)]
        fn look_up(self, table: &[u8; 16], bytes: u64) -> u64 {
            // SAFETY: the processor has AVX2, so SSSE3 too, and the table has sixteen bytes.
            unsafe {
                let table = _mm_loadu_si128(table.as_ptr().cast());
                _mm_cvtsi128_si64(_mm_shuffle_epi8(table, _mm_cvtsi64_si128(bytes.cast_signed())))
                    .cast_unsigned()
            }
        }
    }

    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    pub fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Bmi2(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    pub fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Bmi2(()))
    }
}

/// Bits on their way out, up to 56 at a time.
pub struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
    waiting: u64,
    count: u32,
}

impl<'a> Writer<'a> {
    /// Bytes that must be free behind the last bit.
    pub const ROOM: usize = 8;

    /// Writes to the start of `out`.
    #[inline(always)]
    pub fn new(out: &'a mut [u8]) -> Self {
        Writer { out, at: 0, waiting: 0, count: 0 }
    }

    /// Appends `bits`, of which the lowest `count` (at most 56) may be ones.
    #[inline(always)]
    pub fn put(&mut self, bits: u64, count: u32) {
        self.waiting |= bits << self.count;
        // An array and no slice: eight bytes are no reason to call a function.
        *self.out[self.at..].first_chunk_mut().expect("room for a word") = self.waiting.to_le_bytes();
        let all = self.count + count;
        self.at += (all >> 3) as usize;
        self.waiting >>= all & !7;
        self.count = all & 7;
    }

    /// The bytes that are used.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.at + usize::from(self.count > 0)
    }
}

/// Bits from byte `bit / 8` on: at least 56, zeros beyond the end.
#[inline(always)]
pub fn read(bytes: &[u8], bit: usize) -> u64 {
    let at = bit >> 3;
    let word = match bytes.get(at..at + 8) {
        Some(word) => u64::from_le_bytes(word.try_into().expect("eight bytes")),
        None => last(bytes, at),
    };
    word >> (bit & 7)
}

#[cold]
fn last(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    let rest = bytes.get(at..).unwrap_or_default();
    let n = rest.len().min(8);
    word[..n].copy_from_slice(&rest[..n]);
    u64::from_le_bytes(word)
}
