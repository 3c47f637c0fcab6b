//! How an input spells its elements: plain dtypes, and the GGUF block formats that are widened on reading.

use super::Dtype;
use half::{bf16, f16};

/// The weights in one block of every GGUF block format here.
const BLOCK: usize = 32;

/// An element encoding that [`Encoding::widen`] can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// One element after another.
    Plain(Dtype),
    /// GGUF: FP16 scale d, 32 signed bytes q; w = d·q.
    Q8_0,
    /// GGUF: FP16 scale d, 16 bytes of nibbles (low half first); w = d·(q - 8).
    Q4_0,
    /// GGUF: FP16 scale d and minimum m, 16 bytes of nibbles; w = d·q + m.
    Q4_1,
}

impl Encoding {
    /// The dtype that a reader of the original would see: FP32 for the block formats.
    pub const fn dtype(self) -> Dtype {
        match self {
            Encoding::Plain(d) => d,
            _ => Dtype::F32,
        }
    }

    /// The name shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::Plain(d) => d.name(),
            Encoding::Q8_0 => "Q8_0",
            Encoding::Q4_0 => "Q4_0",
            Encoding::Q4_1 => "Q4_1",
        }
    }

    /// Elements and bytes of the smallest unit.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Encoding::Plain(d) => (1, d.size()),
            Encoding::Q8_0 => (BLOCK, 2 + BLOCK),
            Encoding::Q4_0 => (BLOCK, 2 + BLOCK / 2),
            Encoding::Q4_1 => (BLOCK, 4 + BLOCK / 2),
        }
    }

    /// The bytes that `elements` take, or `None` where they end inside a block or overflow.
    pub fn byte_len(self, elements: u64) -> Option<u64> {
        let (n, bytes) = self.block();
        if !elements.is_multiple_of(n as u64) {
            return None;
        }
        (elements / n as u64).checked_mul(bytes as u64)
    }

    /// Writes elements `start .. start + out.len()` of `bytes` as FP32.
    ///
    /// # Panics
    /// If the range lies outside `bytes` or the encoding is no weight dtype.
    pub fn widen(self, bytes: &[u8], start: usize, out: &mut [f32]) {
        match self {
            Encoding::Plain(Dtype::F32) => {
                let src = &bytes[start * 4..(start + out.len()) * 4];
                for (o, b) in out.iter_mut().zip(src.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Encoding::Plain(Dtype::F16) => {
                crate::codec::widen_f16(&bytes[start * 2..(start + out.len()) * 2], out);
            }
            Encoding::Plain(Dtype::BF16) => {
                let src = &bytes[start * 2..(start + out.len()) * 2];
                for (o, b) in out.iter_mut().zip(src.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Encoding::Plain(other) => panic!("{} is not a weight dtype", other.name()),
            _ => self.widen_blocks(bytes, start, out),
        }
    }

    fn widen_blocks(self, bytes: &[u8], start: usize, out: &mut [f32]) {
        let size = self.block().1;
        let mut block = [0f32; BLOCK];
        let mut done = 0;
        while done < out.len() {
            let at = start + done;
            let b = &bytes[at / BLOCK * size..][..size];
            let d = f16::from_le_bytes([b[0], b[1]]).to_f32();
            match self {
                Encoding::Q8_0 => {
                    for (w, &q) in block.iter_mut().zip(&b[2..]) {
                        *w = d * f32::from(q.cast_signed());
                    }
                }
                Encoding::Q4_0 => {
                    for (i, &q) in b[2..].iter().enumerate() {
                        block[i] = d * (f32::from(q & 15) - 8.0);
                        block[i + BLOCK / 2] = d * (f32::from(q >> 4) - 8.0);
                    }
                }
                Encoding::Q4_1 => {
                    let m = f16::from_le_bytes([b[2], b[3]]).to_f32();
                    for (i, &q) in b[4..].iter().enumerate() {
                        block[i] = d * f32::from(q & 15) + m;
                        block[i + BLOCK / 2] = d * f32::from(q >> 4) + m;
                    }
                }
                Encoding::Plain(_) => unreachable!("plain encodings have no blocks"),
            }
            let from = at % BLOCK;
            let n = (BLOCK - from).min(out.len() - done);
            out[done..done + n].copy_from_slice(&block[from..from + n]);
            done += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_widen_from_any_start() {
        let mut bytes = Vec::new();
        for b in 0..3u8 {
            bytes.extend(f16::from_f32(0.5 + f32::from(b)).to_le_bytes());
            bytes.extend(f16::from_f32(-1.0).to_le_bytes());
            bytes.extend((0..16).map(|i| i * 7 + b));
        }
        let mut all = vec![0f32; 96];
        Encoding::Q4_1.widen(&bytes, 0, &mut all);
        assert_eq!(all[0], -1.0);
        assert_eq!(all[1], 0.5 * 7.0 - 1.0);
        assert_eq!(all[16 + 3], 0.5 * f32::from((3 * 7u8) >> 4) - 1.0);
        for start in 0..96 {
            let mut part = vec![0f32; 96 - start];
            Encoding::Q4_1.widen(&bytes, start, &mut part);
            assert_eq!(part, all[start..]);
        }
        assert_eq!(Encoding::Q4_1.byte_len(96), Some(60));
        assert_eq!(Encoding::Q4_1.byte_len(95), None);
    }
}
