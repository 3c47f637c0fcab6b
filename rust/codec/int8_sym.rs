//! The layout `int8_sym`: signed bytes, and one FP32 scale for each row. Eight bits, practically lossless.

use super::range::{Range, RangeLanes};
use super::simd::{Kernel, LANES, Level, Simd};
use super::{Layout, Part, Per, Strip};
use crate::tensor::Dtype;

const MAX_CODE: f32 = 127.0;

/// The layout.
pub static INT8_SYM: Layout = Layout {
    name: "int8_sym",
    group: None,
    code_bits: 8,
    parts: &[
        Part { name: "codes", dtype: Dtype::I8, per: Per::Weight(8) },
        Part { name: "scales", dtype: Dtype::F32, per: Per::Row(1) },
    ],
    rebuild: "q*s",
    // FP32 scales do not care, but a scale must not be subnormal.
    normal_from: f32::MIN_POSITIVE * 1024.0,
    tables: None,
    decode,
    under_rows: None,
    calibrated: None,
};

/// Rounds to nearest: s = max|x| / 127, q = round(x / s).
pub fn encode(level: Level, strip: Strip<'_>, parts: &mut [&mut [u8]]) -> Range {
    let [codes, scales] = parts else { unreachable!("the layout has two parts") };
    let mut range = Range::default();
    if strip.cols == 0 {
        scales.fill(0);
        return range;
    }
    let rows = strip.data.chunks_exact(strip.cols).zip(codes.chunks_exact_mut(strip.cols));
    for ((row, codes), scale) in rows.zip(scales.chunks_exact_mut(4)) {
        let row_range = level.run(EncodeRow { row, codes });
        scale.copy_from_slice(&(row_range.largest() / MAX_CODE).to_le_bytes());
        range = range.and(row_range);
    }
    range
}

struct EncodeRow<'a, 'b> {
    row: &'a [f32],
    codes: &'b mut [u8],
}

impl Kernel for EncodeRow<'_, '_> {
    type Output = Range;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Range {
        let (chunks, tail) = self.row.as_chunks::<LANES>();
        let (code_chunks, code_tail) = self.codes.as_chunks_mut::<LANES>();
        let mut range = RangeLanes::new(s);
        for x in chunks {
            range.add(s, &[s.load(x)]);
        }
        let range = range.finish(s).and(Range::of(tail));
        let scale = range.largest() / MAX_CODE;
        // A row of zeros has scale 0; infinity keeps its codes at 0.
        let divisor = if scale > 0.0 { scale } else { f32::INFINITY };
        for (x, q) in chunks.iter().zip(code_chunks) {
            let mut words = [0u32; LANES];
            s.store_i(s.round_i(s.div(s.load(x), s.splat(divisor))), &mut words);
            for (q, word) in q.iter_mut().zip(words) {
                *q = word as u8;
            }
        }
        for (x, q) in tail.iter().zip(code_tail) {
            *q = ((x / divisor).round_ties_even() as i8).cast_unsigned();
        }
        range
    }
}

fn decode(level: Level, parts: &[&[u8]], cols: usize, out: &mut [f32]) {
    let [codes, scales] = parts else { unreachable!("the layout has two parts") };
    if cols == 0 {
        return;
    }
    let rows = out.chunks_exact_mut(cols).zip(codes.chunks_exact(cols));
    for ((out, codes), scale) in rows.zip(scales.chunks_exact(4)) {
        let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
        level.run(DecodeRow { codes, scale, out });
    }
}

struct DecodeRow<'a, 'b> {
    codes: &'a [u8],
    scale: f32,
    out: &'b mut [f32],
}

impl Kernel for DecodeRow<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (codes, code_tail) = self.codes.as_chunks::<LANES>();
        let (out, out_tail) = self.out.as_chunks_mut::<LANES>();
        let scale = s.splat(self.scale);
        for (codes, out) in codes.iter().zip(out) {
            s.store(s.mul(s.signed_bytes(codes), scale), out);
        }
        for (q, out) in code_tail.iter().zip(out_tail) {
            *out = f32::from(q.cast_signed()) * self.scale;
        }
    }
}
