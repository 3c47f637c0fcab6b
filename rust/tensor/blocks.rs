//! The block formats of GGUF, as ggml lays them out: each block holds its weights' codes and the scales for them.
//!
//! Every product and sum is rounded by itself, so that the weights equal those of ggml's scalar code bit for bit.

use half::f16;

/// The most weights in one block.
pub(super) const MOST: usize = 256;

/// A block format. `d` and `m` are FP16; q is a weight's code.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blocks {
    /// 32 four-bit codes; w = d·(q - 8).
    Q4_0,
    /// 32 four-bit codes; w = d·q + m.
    Q4_1,
    /// 32 five-bit codes; w = d·(q - 16).
    Q5_0,
    /// 32 five-bit codes; w = d·q + m.
    Q5_1,
    /// 32 signed bytes; w = d·q.
    Q8_0,
    /// 256 two-bit codes in 16 groups with four-bit scales s and minima n; w = d·s·q - m·n.
    Q2_K,
    /// 256 three-bit codes in 16 groups with six-bit scales s; w = d·(s - 32)·(q - 4).
    Q3_K,
    /// 256 four-bit codes in 8 groups with six-bit scales s and minima n; w = d·s·q - m·n.
    Q4_K,
    /// 256 five-bit codes in 8 groups with six-bit scales s and minima n; w = d·s·q - m·n.
    Q5_K,
    /// 256 six-bit codes in 16 groups with signed byte scales s; w = d·s·(q - 32).
    Q6_K,
    /// 32 four-bit codes of a fixed table t; w = d·t[q].
    IQ4_NL,
    /// 256 such codes in 8 groups with six-bit scales s; w = d·(s - 32)·t[q].
    IQ4_XS,
}

/// The values of the IQ4 formats' codes.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl Blocks {
    /// Every format.
    pub const ALL: &'static [Blocks] = &[
        Blocks::Q4_0,
        Blocks::Q4_1,
        Blocks::Q5_0,
        Blocks::Q5_1,
        Blocks::Q8_0,
        Blocks::Q2_K,
        Blocks::Q3_K,
        Blocks::Q4_K,
        Blocks::Q5_K,
        Blocks::Q6_K,
        Blocks::IQ4_NL,
        Blocks::IQ4_XS,
    ];

    /// Name, type number in GGUF files, weights and bytes of a block.
    const fn facts(self) -> (&'static str, u32, usize, usize) {
        match self {
            Blocks::Q4_0 => ("Q4_0", 2, 32, 2 + 16),
            Blocks::Q4_1 => ("Q4_1", 3, 32, 4 + 16),
            Blocks::Q5_0 => ("Q5_0", 6, 32, 2 + 4 + 16),
            Blocks::Q5_1 => ("Q5_1", 7, 32, 4 + 4 + 16),
            Blocks::Q8_0 => ("Q8_0", 8, 32, 2 + 32),
            Blocks::Q2_K => ("Q2_K", 10, 256, 16 + 64 + 4),
            Blocks::Q3_K => ("Q3_K", 11, 256, 32 + 64 + 12 + 2),
            Blocks::Q4_K => ("Q4_K", 12, 256, 4 + 12 + 128),
            Blocks::Q5_K => ("Q5_K", 13, 256, 4 + 12 + 32 + 128),
            Blocks::Q6_K => ("Q6_K", 14, 256, 128 + 64 + 16 + 2),
            Blocks::IQ4_NL => ("IQ4_NL", 20, 32, 2 + 16),
            Blocks::IQ4_XS => ("IQ4_XS", 23, 256, 2 + 2 + 4 + 128),
        }
    }

    /// The name shown to people.
    pub const fn name(self) -> &'static str {
        self.facts().0
    }

    /// The type number in GGUF files.
    pub const fn id(self) -> u32 {
        self.facts().1
    }

    /// Weights in a block.
    pub const fn weights(self) -> usize {
        self.facts().2
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        self.facts().3
    }

    /// Writes the weights of one block.
    ///
    /// # Panics
    /// If either slice is not of one block's length.
    pub(super) fn widen(self, block: &[u8], out: &mut [f32]) {
        assert_eq!((block.len(), out.len()), (self.bytes(), self.weights()));
        match self {
            Blocks::Q4_0 => {
                let d = half(block, 0);
                nibbles(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
            }
            Blocks::Q4_1 => {
                let (d, m) = (half(block, 0), half(block, 2));
                nibbles(&block[4..], out, |_, q| d * f32::from(q) + m);
            }
            Blocks::Q5_0 => {
                let d = half(block, 0);
                nibbles(&block[6..], out, |i, q| d * (f32::from(q | bit(&block[2..6], i) << 4) - 16.0));
            }
            Blocks::Q5_1 => {
                let (d, m) = (half(block, 0), half(block, 2));
                nibbles(&block[8..], out, |i, q| d * f32::from(q | bit(&block[4..8], i) << 4) + m);
            }
            Blocks::Q8_0 => {
                let d = half(block, 0);
                for (w, &q) in out.iter_mut().zip(&block[2..]) {
                    *w = d * f32::from(q.cast_signed());
                }
            }
            Blocks::Q2_K => q2_k(block, out),
            Blocks::Q3_K => q3_k(block, out),
            Blocks::Q4_K => q4_k(block, out),
            Blocks::Q5_K => q5_k(block, out),
            Blocks::Q6_K => q6_k(block, out),
            Blocks::IQ4_NL => {
                let d = half(block, 0);
                nibbles(&block[2..], out, |_, q| d * f32::from(IQ4[usize::from(q)]));
            }
            Blocks::IQ4_XS => iq4_xs(block, out),
        }
    }
}

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn bit(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 8] >> (i % 8) & 1
}

/// Codes of four bits, all low halves before all high ones; `weight` is given a weight's place and code.
fn nibbles(codes: &[u8], out: &mut [f32], weight: impl Fn(usize, u8) -> f32) {
    let middle = out.len() / 2;
    for (i, &byte) in codes[..middle].iter().enumerate() {
        out[i] = weight(i, byte & 15);
        out[i + middle] = weight(i + middle, byte >> 4);
    }
}

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, m) = (half(block, 80), half(block, 82));
    for (g, group) in out.chunks_exact_mut(16).enumerate() {
        let (scale, minimum) = (d * f32::from(scales[g] & 15), m * f32::from(scales[g] >> 4));
        let (from, shift) = (g / 8 * 32 + g % 2 * 16, g % 8 / 2 * 2);
        for (w, &q) in group.iter_mut().zip(&codes[from..]) {
            *w = scale * f32::from(q >> shift & 3) - minimum;
        }
    }
}

fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, codes, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    for (g, group) in out.chunks_exact_mut(16).enumerate() {
        let low = if g < 8 { scales[g] & 15 } else { scales[g - 8] >> 4 };
        let scale = low | (scales[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
        let scale = d * (f32::from(scale) - 32.0);
        let (half_group, shift) = (g % 2 * 16, g % 8 / 2 * 2);
        let codes = &codes[g / 8 * 32 + half_group..];
        for (l, w) in group.iter_mut().enumerate() {
            let q = codes[l] >> shift & 3 | (high[half_group + l] >> (g / 2) & 1) << 2;
            *w = scale * (f32::from(q) - 4.0);
        }
    }
}

/// Scale and minimum of group `g` of 8, six bits each.
fn scale_and_minimum(packed: &[u8], g: usize) -> (f32, f32) {
    let (scale, minimum) = if g < 4 {
        (packed[g] & 63, packed[g + 4] & 63)
    } else {
        (packed[g + 4] & 15 | packed[g - 4] >> 6 << 4, packed[g + 4] >> 4 | packed[g] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let codes = &block[16..];
    for (g, group) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], g);
        let (scale, minimum, shift) = (d * scale, m * minimum, g % 2 * 4);
        for (w, &q) in group.iter_mut().zip(&codes[g / 2 * 32..]) {
            *w = scale * f32::from(q >> shift & 15) - minimum;
        }
    }
}

fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    let (high, codes) = (&block[16..48], &block[48..]);
    for (g, group) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], g);
        let (scale, minimum, shift) = (d * scale, m * minimum, g % 2 * 4);
        for ((w, &q), &h) in group.iter_mut().zip(&codes[g / 2 * 32..]).zip(high) {
            *w = scale * f32::from(q >> shift & 15 | (h >> g & 1) << 4) - minimum;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (g, group) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[g].cast_signed());
        let (at, quarter) = (g / 8, g % 8 / 2);
        let low = &low[at * 64 + quarter % 2 * 32 + g % 2 * 16..];
        let high = &high[at * 32 + g % 2 * 16..];
        for ((w, &l), &h) in group.iter_mut().zip(low).zip(high) {
            let q = l >> (quarter / 2 * 4) & 15 | (h >> (quarter * 2) & 3) << 4;
            *w = scale * (f32::from(q) - 32.0);
        }
    }
}

fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (g, group) in out.chunks_exact_mut(32).enumerate() {
        let scale = u16::from(block[4 + g / 2] >> (g % 2 * 4) & 15) | (high >> (2 * g) & 3) << 4;
        let scale = d * (f32::from(scale) - 32.0);
        nibbles(&block[8 + g * 16..], group, |_, q| scale * f32::from(IQ4[usize::from(q)]));
    }
}
