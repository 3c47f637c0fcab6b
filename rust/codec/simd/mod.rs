//! Sixteen FP32 lanes on every machine, and the choice of the widest instructions that it has.
//!
//! A kernel is written once against [`Simd`], usually with one group of weights in each lane. Every
//! operation here is correctly rounded (multiply-add is always fused), so all implementations give the
//! same bits; `Portable` is the reference and is what NEON compiles from, being part of its baseline.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub use portable::Portable;

use std::sync::OnceLock;

/// Lanes of every vector.
pub const LANES: usize = 16;

/// Sixteen FP32 values, one after another.
pub type Lanes = [f32; LANES];

/// The operations that kernels need. `F` holds FP32 lanes, `I` holds 32-bit integers, `M` a condition.
#[allow(clippy::missing_safety_doc)]
pub trait Simd: Copy {
    /// FP32 lanes.
    type F: Copy;
    /// 32-bit integer lanes.
    type I: Copy;
    /// One condition per lane.
    type M: Copy;

    /// The same value in every lane.
    fn splat(self, x: f32) -> Self::F;
    /// Reads sixteen values.
    fn load(self, x: &Lanes) -> Self::F;
    /// Writes sixteen values.
    fn store(self, x: Self::F, out: &mut Lanes);
    /// a + b
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a - b
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b, correctly rounded
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// a < b ? a : b
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a > b ? a : b
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// |a|
    fn abs(self, a: Self::F) -> Self::F;
    /// The nearest whole number, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// a < b
    fn lt(self, a: Self::F, b: Self::F) -> Self::M;
    /// m ? a : b
    fn select(self, m: Self::M, a: Self::F, b: Self::F) -> Self::F;
    /// m ? a : b
    fn select_i(self, m: Self::M, a: Self::I, b: Self::I) -> Self::I;

    /// The same integer in every lane.
    fn splat_i(self, x: u32) -> Self::I;
    /// Reads sixteen integers.
    fn load_i(self, x: &[u32; LANES]) -> Self::I;
    /// Writes sixteen integers.
    fn store_i(self, x: Self::I, out: &mut [u32; LANES]);
    /// The bits of an FP32 value.
    fn bits(self, x: Self::F) -> Self::I;
    /// The nearest integer, ties to even; the value must fit.
    fn round_i(self, x: Self::F) -> Self::I;
    /// An integer as FP32; it must be below 2^24.
    fn float(self, x: Self::I) -> Self::F;
    /// a | b << n
    fn or_shl<const N: u32>(self, a: Self::I, b: Self::I) -> Self::I;
    /// a & b
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// The larger of two unsigned integers.
    fn max_u(self, a: Self::I, b: Self::I) -> Self::I;
    /// m ? a : a + 1
    fn add_one_unless(self, m: Self::M, a: Self::I) -> Self::I;

    /// Values `table[index & 15]`.
    fn lookup16(self, table: Self::F, index: Self::I) -> Self::F;
    /// Values `table[index & 31]`, where the table lies in two vectors.
    fn lookup32(self, low: Self::F, high: Self::F, index: Self::I) -> Self::F;

    /// Rounds to FP16, ties to even; too large becomes infinite.
    fn narrow_f16(self, x: Self::F) -> [u16; LANES];
    /// Widens FP16.
    fn widen_f16(self, x: &[u16; LANES]) -> Self::F;
    /// Widens the sixteen nibbles of eight bytes, low nibbles first.
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> Self::I;
    /// Packs sixteen integers below 16 into eight bytes, low nibbles first.
    fn pack_nibbles(self, x: Self::I) -> [u8; LANES / 2];
    /// Widens sixteen signed bytes.
    fn signed_bytes(self, bytes: &[u8; LANES]) -> Self::F;

    /// Asks for the cache line at `at`, which need not be memory of ours.
    fn prefetch(self, at: *const f32);

    /// Sixteen runs of eight values, each in its lane: result `[j]` holds value j of every run.
    fn transpose8(self, runs: [&[f32; 8]; LANES]) -> [Self::F; 8];

    /// `a` in the first eight lanes, `b` in the others.
    #[inline(always)]
    fn splat_halves(self, a: f32, b: f32) -> Self::F {
        let mut lanes = [a; LANES];
        lanes[LANES / 2..].fill(b);
        self.load(&lanes)
    }
    /// Whether the condition holds in every lane.
    fn all(self, m: Self::M) -> bool;
    /// The smallest and the largest value of every run of `N`, a multiple of eight, each in its lane. Any NaN
    /// may be passed over, and a zero may have the sign of any zero of its run.
    #[inline(always)]
    fn extents<const N: usize>(self, runs: &[[f32; N]; LANES]) -> (Self::F, Self::F) {
        const { assert!(N.is_multiple_of(8)) };
        let at = |c: usize| self.transpose8(std::array::from_fn(|l| &runs[l].as_chunks().0[c]));
        let first = at(0)[0];
        (0..N / 8).flat_map(at).fold((first, first), |(low, high), x| (self.min(low, x), self.max(high, x)))
    }
    /// a / b, correctly rounded, where `b` is in FP16 and above zero, `high` is 1 / b and `low` is what
    /// `high` lacks, (1 - high · b) · high, and where neither a / b nor a · low is near underflow or
    /// overflow.
    ///
    /// Instructions that multiply faster than they divide take a · (high + low), whose relative error is
    /// below 2^-46 before it is rounded. A quotient by eleven bits is either an FP32 value or further than
    /// 2^-36 from where rounding changes, so both round to the same value.
    #[inline(always)]
    fn div_by_f16(self, a: Self::F, b: Self::F, _high: Self::F, _low: Self::F) -> Self::F {
        self.div(a, b)
    }
    /// Rounds 64 values to whole numbers, ties to even, clamps these to 0..=15 and packs them as nibbles, low
    /// ones first. Magnitudes are below 2^31; NaN gives any nibble.
    #[inline(always)]
    fn pack_nearest(self, x: [Self::F; 4]) -> [u8; 2 * LANES] {
        let mut out = [0; 2 * LANES];
        for (out, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
            let clamped = self.min(self.max(x, self.splat(0.0)), self.splat(15.0));
            *out = self.pack_nibbles(self.round_i(clamped));
        }
        out
    }
}

/// A computation that runs on any implementation.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Runs it; implementations mark this `#[inline(always)]`, so that it compiles once for each
    /// instruction set.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust; NEON where the compiler has it.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// The name shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "aarch64")]
            Level::Portable => "neon",
            #[cfg(not(target_arch = "aarch64"))]
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// What this machine can run, narrowest first.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
            {
                levels.push(Level::Avx2);
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    levels.push(Level::Avx512);
                }
            }
        }
        levels
    }

    /// The widest that this machine has, or the one that `TENPAK_SIMD` names.
    pub fn detect() -> Level {
        static LEVEL: OnceLock<Level> = OnceLock::new();
        *LEVEL.get_or_init(|| {
            let levels = Level::available();
            let wanted = std::env::var("TENPAK_SIMD").ok();
            let named = levels.iter().copied().find(|l| Some(l.name()) == wanted.as_deref());
            named.unwrap_or(levels[levels.len() - 1])
        })
    }

    /// Runs `kernel` with these instructions.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Level::Portable => kernel.run(Portable),
            // SAFETY: `available` lists a level only where the processor has its features, and no other
            // code makes one.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::run(kernel) },
        }
    }
}
