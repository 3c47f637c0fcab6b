//! Every instruction set writes the bytes of the plain min/max formula, whatever the weights.

use half::f16;
use tenpak::codec::simd::Level;
use tenpak::codec::{self, Codec, Strip};

/// Random bits.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 32) as u32
    }

    fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.bits()) * u64::from(n)) >> 32) as u32
    }

    /// Between -1 and 1.
    fn signed(&mut self) -> f32 {
        self.bits().cast_signed() as f32 / 2f32.powi(31)
    }
}

/// One group of each kind that encoders have got wrong or might.
fn group(kind: u32, n: usize, random: &mut Random) -> Vec<f32> {
    let one = |value: f32| vec![value; n];
    let sign = |random: &mut Random, x: f32| if random.below(2) == 0 { x } else { -x };
    match kind {
        0 => one(random.signed()),
        // Zeros of both signs, with and without other weights.
        1 => (0..n).map(|_| sign(random, 0.0)).collect(),
        2 => (0..n)
            .map(|_| if random.below(2) == 0 { random.signed().abs() } else { sign(random, 0.0) })
            .collect(),
        // Weights that lie halfway between codes, exactly or by one bit.
        3..=6 => {
            let scale = f16::from_bits(random.below(0x7000) as u16 + 1).to_f32();
            let steps = random.below(100) as f32;
            let offset = f16::from_f32(scale * sign(random, steps)).to_f32();
            let mut x: Vec<f32> = (0..n).map(|_| offset + scale * (random.below(31) as f32 / 2.0)).collect();
            x[random.below(n as u32) as usize] = offset;
            x[random.below(n as u32) as usize] = offset + 15.0 * scale;
            for x in &mut x {
                match random.below(4) {
                    0 => *x = x.next_up(),
                    1 => *x = x.next_down(),
                    _ => {}
                }
            }
            x
        }
        // Subnormals, of FP32 and of FP16.
        7 => (0..n).map(|_| f32::from_bits(random.below(1 << 24))).collect(),
        8 => (0..n).map(|_| random.signed() * 2f32.powi(-22)).collect(),
        // A small range far from zero, where FP16 offsets are coarse.
        9 => {
            let middle = random.signed() * 40000.0;
            (0..n).map(|_| middle + random.signed() * 0.01).collect()
        }
        // What FP16 cannot hold.
        10 => (0..n).map(|_| random.signed() * 2f32.powi(random.below(60).cast_signed())).collect(),
        11 => (0..n).map(|_| random.signed() * f32::MAX).collect(),
        // Any finite bits.
        12 => (0..n)
            .map(|_| random.bits())
            .map(f32::from_bits)
            .map(|x| if x.is_finite() { x } else { 1.0 })
            .collect(),
        // One outlier.
        13 => {
            let mut x: Vec<f32> = (0..n).map(|_| random.signed() * 1e-3).collect();
            x[random.below(n as u32) as usize] = random.signed() * 30.0;
            x
        }
        _ => {
            let size = 2f32.powi(random.below(30).cast_signed() - 20);
            (0..n).map(|_| random.signed() * size).collect()
        }
    }
}

const KINDS: u32 = 15;

/// Codes, scale and offset of a group.
fn plain(x: &[f32]) -> (Vec<u8>, [u8; 2], [u8; 2]) {
    // Of equal weights the last counts: zeros may differ in their signs.
    let low = x.iter().fold(x[0], |low, &x| if low < x { low } else { x });
    let high = x.iter().fold(x[0], |high, &x| if high > x { high } else { x });
    let (scale, offset) = (f16::from_f32((high - low) / 15.0), f16::from_f32(low));
    let code = |x: &f32| {
        let (scale, offset) = (scale.to_f32(), offset.to_f32());
        // NaN becomes 0.
        if scale > 0.0 { ((x - offset) / scale).clamp(0.0, 15.0).round_ties_even() as u8 } else { 0 }
    };
    let codes: Vec<u8> = x.iter().map(code).collect();
    (
        codes.chunks(2).map(|c| c[0] | c.get(1).unwrap_or(&0) << 4).collect(),
        scale.to_le_bytes(),
        offset.to_le_bytes(),
    )
}

fn codecs() -> impl Iterator<Item = (&'static Codec, usize)> {
    codec::ALL.iter().filter(|c| c.encoder == "min/max").map(|c| (c, c.layout.group.unwrap()))
}

/// The bytes of a strip, and whether all its weights are finite.
fn encode(codec: &Codec, level: Level, data: &[f32], cols: usize) -> (Vec<Vec<u8>>, codec::Range) {
    let sizes = codec.layout.part_bytes((data.len() / cols) as u64, cols as u64).unwrap();
    let mut parts: Vec<Vec<u8>> = sizes.iter().map(|&n| vec![0xA5; n as usize]).collect();
    let mut slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
    let range = (codec.encode)(level, Strip { data, cols, importance: None }, &mut slices);
    (parts, range)
}

#[test]
fn bytes_are_those_of_the_plain_formula() {
    for (codec, n) in codecs() {
        let mut random = Random(n as u64);
        // Batches of one kind, so that most are taken whole, then batches of all kinds.
        for batch in 0..600 {
            let count = 1 + random.below(130) as usize;
            let groups: Vec<Vec<f32>> = (0..count)
                .map(|_| {
                    let kind = if batch < 500 { batch % KINDS } else { random.below(KINDS) };
                    group(kind, n, &mut random)
                })
                .collect();
            let data = groups.concat();
            let wanted: Vec<_> = groups.iter().map(|x| plain(x)).collect();
            for level in Level::available() {
                let (parts, range) = encode(codec, level, &data, n * count);
                let at = |g: usize| format!("{} {} batch {batch}: {:?}", codec.name, level.name(), groups[g]);
                assert_eq!(range, codec::Range::of(&data), "{} {} {batch}", codec.name, level.name());
                for (g, (codes, scale, offset)) in wanted.iter().enumerate() {
                    assert_eq!(parts[1][2 * g..][..2], *scale, "{}", at(g));
                    assert_eq!(parts[2][2 * g..][..2], *offset, "{}", at(g));
                    assert_eq!(parts[0][g * n / 2..][..n / 2], *codes, "{}", at(g));
                }
            }
        }
    }
}

#[test]
fn every_scale_rounds_as_division_does() {
    for (codec, n) in codecs() {
        let mut random = Random(7);
        for bits in 1..0x6800u16 {
            let scale = f16::from_bits(bits).to_f32();
            // The offset is a small negative multiple, so that the sums are exact; the halves are ties.
            let mut x: Vec<f32> = (0..n).map(|j| scale * ((j * 2 + 1) % 31) as f32 / 2.0 - scale).collect();
            (x[0], x[n - 1]) = (-scale, scale * 14.0);
            for x in &mut x[1..n - 1] {
                *x = [*x, x.next_up(), x.next_down()][random.below(3) as usize];
            }
            let data = x.repeat(32);
            let (codes, ..) = plain(&x);
            for level in Level::available() {
                let (parts, _) = encode(codec, level, &data, n);
                assert_eq!(parts[0][..n / 2], codes, "{} {} {scale}", codec.name, level.name());
            }
        }
    }
}

#[test]
fn no_weight_that_is_not_finite_is_missed() {
    for (codec, n) in codecs() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)] {
            for at in 0..64 * n {
                let mut random = Random(at as u64);
                let mut data: Vec<f32> = (0..64 * n).map(|_| random.signed()).collect();
                data[at] = bad;
                for level in Level::available() {
                    let (_, range) = encode(codec, level, &data, 8 * n);
                    assert!(!range.is_finite(), "{} {} {bad} at {at}", codec.name, level.name());
                }
            }
        }
    }
}
