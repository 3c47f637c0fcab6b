//! Inputs of few tokens as integers of three signed bytes, which GPUs multiply four at a time.
//!
//! Eight inputs share a scale: x = (65536 h + 256 m + l) s, with the largest of them as large as sums of eight products
//! allow in 32 bits. Those sums are exact; x is rounded by no more than 2^-22 of the largest of the eight, so that
//! products are as exact as sums in FP32 are.

use super::form::OCTET;

/// The largest integer of three balanced digits.
const MOST: i32 = 127 * (65536 + 256 + 1);

/// Words of an octet of inputs: h, m and l of two words each, the scale, and the inputs' sum.
pub const WORDS: usize = 8;

/// Writes rows of `cols` inputs as gemv.wgsl reads them: [tokens][2][octets][4].
///
/// `largest` is the largest magnitude of a code. `pairs`: codes come as those of even columns and those of odd ones,
/// and so do digits; in order otherwise.
pub fn pack(x: &[f32], cols: usize, largest: i32, pairs: bool) -> Vec<u32> {
    let octets = cols.div_ceil(OCTET);
    let most = MOST.min(i32::MAX / (OCTET as i32 * largest));
    let mut out = vec![0u32; x.len() / cols * octets * WORDS];
    for (row, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(octets * WORDS)) {
        let (first, second) = out.split_at_mut(octets * WORDS / 2);
        let halves = first.as_chunks_mut().0.iter_mut().zip(second.as_chunks_mut().0);
        for (x, (first, second)) in row.chunks(OCTET).zip(halves) {
            octet(x, most, pairs, first, second);
        }
    }
    out
}

/// Adding and then flipping these bits makes three bytes of a number its balanced digits.
const HALVES: i32 = 0x80_8080;

fn octet(x: &[f32], most: i32, pairs: bool, first: &mut [u32; 4], second: &mut [u32; 4]) {
    let mut padded = [0f32; OCTET];
    padded[..x.len()].copy_from_slice(x);
    let size = padded.iter().fold(0f32, |size, x| size.max(x.abs()));
    let inverse = most as f32 / size;
    if !padded.iter().all(|x| x.is_finite()) {
        // Sums with such an input are no numbers.
        *second = [0, 0, f32::NAN.to_bits(), f32::NAN.to_bits()];
    } else if inverse.is_finite() {
        let mut total = 0;
        for (i, x) in padded.iter().enumerate() {
            let scaled = x * inverse;
            let q = ((scaled + 0.5f32.copysign(scaled)) as i32).clamp(-most, most);
            total += q;
            let [low, middle, high, _] = ((q + HALVES) ^ HALVES).to_le_bytes().map(u32::from);
            let (word, byte) = if pairs { (i % 2, i / 2) } else { (i / 4, i % 4) };
            first[word] |= high << (8 * byte);
            first[2 + word] |= middle << (8 * byte);
            second[word] |= low << (8 * byte);
        }
        let scale = size / most as f32;
        second[2] = scale.to_bits();
        second[3] = (total as f32 * scale).to_bits();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The inputs that an octet stands for.
    fn rebuilt(words: &[u32], pairs: bool) -> Vec<f64> {
        let digit = |word: u32, byte: usize| f64::from((word >> (8 * byte)) as u8 as i8);
        let value = |i: usize| {
            let (word, byte) = if pairs { (i % 2, i / 2) } else { (i / 4, i % 4) };
            let digits = [words[word], words[2 + word], words[4 + word]].map(|word| digit(word, byte));
            (65536.0 * digits[0] + 256.0 * digits[1] + digits[2]) * f64::from(f32::from_bits(words[6]))
        };
        (0..OCTET).map(value).collect()
    }

    #[test]
    fn digits_rebuild_inputs() {
        for (largest, pairs) in [(15, true), (63, true), (128, false)] {
            for x in [[1.0, -1.0, 0.3, -0.999_999_9, 0.5, 1e-9, 0.0, 0.25], [3e30; 8], [-7e-25; 8], [0.0; 8]]
            {
                let words = pack(&x[..7], 7, largest, pairs);
                let size = x[..7].iter().fold(0f32, |size, x| size.max(x.abs()));
                let got = rebuilt(&words, pairs);
                for (got, x) in got.iter().zip(x[..7].iter().chain(&[0.0])) {
                    assert!((got - f64::from(*x)).abs() <= f64::from(size) * 2.5e-7, "{got} {x}");
                }
                let total = f64::from(f32::from_bits(words[7]));
                assert!((total - got.iter().sum::<f64>()).abs() <= f64::from(size) * 1e-6);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_no_number() {
        for x in [f32::NAN, f32::INFINITY] {
            assert!(f32::from_bits(pack(&[1.0, x], 2, 15, true)[7]).is_nan());
        }
        assert_eq!(pack(&[1e-40], 1, 15, true), [0; 8]);
    }
}
