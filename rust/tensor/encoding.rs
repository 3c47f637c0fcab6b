//! How an input spells its elements: plain dtypes, and the GGUF block formats that are widened on reading.

use super::{Blocks, Dtype, blocks};
use half::bf16;

/// An element encoding that [`Encoding::widen`] can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// One element after another.
    Plain(Dtype),
    /// Block after block of a GGUF format.
    Blocks(Blocks),
}

impl Encoding {
    /// The dtype that a reader of the original would see: FP32 for the block formats.
    pub const fn dtype(self) -> Dtype {
        match self {
            Encoding::Plain(d) => d,
            Encoding::Blocks(_) => Dtype::F32,
        }
    }

    /// The name shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::Plain(d) => d.name(),
            Encoding::Blocks(b) => b.name(),
        }
    }

    /// Elements and bytes of the smallest unit.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Encoding::Plain(d) => (1, d.size()),
            Encoding::Blocks(b) => (b.weights(), b.bytes()),
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
            Encoding::Blocks(format) => widen_blocks(format, bytes, start, out),
        }
    }
}

fn widen_blocks(format: Blocks, bytes: &[u8], start: usize, out: &mut [f32]) {
    let (weights, size) = (format.weights(), format.bytes());
    let mut whole = [0f32; blocks::MOST];
    let whole = &mut whole[..weights];
    let mut done = 0;
    while done < out.len() {
        let at = start + done;
        let from = at % weights;
        let n = (weights - from).min(out.len() - done);
        let block = &bytes[at / weights * size..][..size];
        if n == weights {
            format.widen(block, &mut out[done..done + n]);
        } else {
            format.widen(block, whole);
            out[done..done + n].copy_from_slice(&whole[from..from + n]);
        }
        done += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn blocks_widen_from_any_start() {
        let mut bytes = Vec::new();
        for b in 0..3u8 {
            bytes.extend(f16::from_f32(0.5 + f32::from(b)).to_le_bytes());
            bytes.extend(f16::from_f32(-1.0).to_le_bytes());
            bytes.extend((0..16).map(|i| i * 7 + b));
        }
        let mut all = vec![0f32; 96];
        Encoding::Blocks(Blocks::Q4_1).widen(&bytes, 0, &mut all);
        assert_eq!(all[0], -1.0);
        assert_eq!(all[1], 0.5 * 7.0 - 1.0);
        assert_eq!(all[16 + 3], 0.5 * f32::from((3 * 7u8) >> 4) - 1.0);
        for start in 0..96 {
            let mut part = vec![0f32; 96 - start];
            Encoding::Blocks(Blocks::Q4_1).widen(&bytes, start, &mut part);
            assert_eq!(part, all[start..]);
        }
        assert_eq!(Encoding::Blocks(Blocks::Q4_1).byte_len(96), Some(60));
        assert_eq!(Encoding::Blocks(Blocks::Q4_1).byte_len(95), None);
    }
}
