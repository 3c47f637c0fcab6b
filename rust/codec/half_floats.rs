//! FP16 to FP32 and back, at the speed of the machine.

use half::f16;
use half::slice::HalfFloatSliceExt;

const CHUNK: usize = 256;

/// Widens little-endian FP16; `bytes` is twice as long as `out`.
pub fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; CHUNK];
    for (out, bytes) in out.chunks_mut(CHUNK).zip(bytes.chunks(2 * CHUNK)) {
        for (h, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
            *h = f16::from_le_bytes([b[0], b[1]]);
        }
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

/// Rounds to little-endian FP16, ties to even; `bytes` is twice as long as `values`.
pub fn narrow_f16(values: &[f32], bytes: &mut [u8]) {
    let mut halves = [f16::ZERO; CHUNK];
    for (values, bytes) in values.chunks(CHUNK).zip(bytes.chunks_mut(2 * CHUNK)) {
        halves[..values.len()].convert_from_f32_slice(values);
        for (h, b) in halves.iter().zip(bytes.chunks_exact_mut(2)) {
            b.copy_from_slice(&h.to_le_bytes());
        }
    }
}
