//! Weights in the layout of a quantised base, as near to its scales, offsets, tables and codes as they can be without
//! losing what has changed.
//!
//! Nothing here knows a layout. Groups are encoded by the base's own encoder, under the numbers that the base has for
//! the row ([`Layout::under_rows`]): where a group's weights have moved little, the same parameters come out. To keep
//! the base's parameters on purpose, where that costs up to 5 % of squared error, would be wrong: having been fitted to
//! the base's weights, they keep these away from the middle between two codes, so that hardly any code would move, and
//! most of what a fine-tune has learned would be lost though no group's error says so (docs/delta.md has figures). Where
//! a row is the group, nothing is fitted that closely: it keeps its parameters if that costs 5 % or less, and which
//! codes are nearest is asked of the layout's decoder, one code after another.

use crate::codec::simd::Level;
use crate::codec::{Codec, Layout, Part, Per, Strip};
use crate::error::Result;
use crate::runner;
use crate::tensor::{Rows, Tensor};
use rayon::prelude::*;

/// How much more squared error than afresh a row may have under the base's numbers: 5 %.
const TOLERANCE: f64 = 1.05;

/// Weights that are looked at together: they fit a core's cache with all their parts.
const STRIP: usize = 1 << 15;

/// A tensor on its base's grid.
pub struct Recoded {
    /// The parts, in the layout's order.
    pub parts: Vec<Vec<u8>>,
    /// Units that have parameters of their own now, and all.
    pub fresh: u64,
    /// All units.
    pub units: u64,
    /// Codes that are not the base's.
    pub changed: u64,
    /// Σ(w - ŵ)² and Σw².
    pub error: f64,
    /// Σw².
    pub norm: f64,
}

/// Codes `tensor` near the parts `base`, which holds parts of rows that are as long; rows beyond its last
/// are encoded afresh. `importance` weighs columns, as in [`runner::Options`].
///
/// # Errors
/// As [`runner::encode_into`].
pub fn recode(
    tensor: &Tensor<'_>,
    axis: usize,
    exponent: i32,
    codec: &Codec,
    importance: Option<&[f32]>,
    base: &[&[u8]],
) -> Result<Recoded> {
    let rows = Rows::new(&tensor.shape, axis)?;
    let layout = codec.layout;
    let (count, cols) = (rows.count(), rows.cols);
    let mut out = Recoded {
        parts: layout.parts.iter().map(|p| runner::zeroed(count * p.row_bytes(cols))).collect(),
        fresh: 0,
        units: 0,
        changed: 0,
        error: 0.0,
        norm: 0.0,
    };
    if rows.is_empty() {
        return Ok(out);
    }
    let strip_rows = (STRIP / cols).max(if rows.inner > 1 { 32 } else { 1 });
    let mut strips: Vec<Vec<&mut [u8]>> = (0..count.div_ceil(strip_rows)).map(|_| Vec::new()).collect();
    for (part, bytes) in layout.parts.iter().zip(&mut out.parts) {
        for (strip, bytes) in strips.iter_mut().zip(bytes.chunks_mut(strip_rows * part.row_bytes(cols))) {
            strip.push(bytes);
        }
    }
    let job = Job { codec, layout, cols, importance, level: Level::detect(), unit: unit(layout) };
    let scale = 2f64.powi(-exponent) as f32;
    let done: Vec<Option<Sums>> = strips
        .par_iter_mut()
        .enumerate()
        .map_init(Vec::new, |weights, (i, parts)| {
            let first = i * strip_rows;
            let n = strip_rows.min(count - first);
            weights.resize(n * cols, 0f32);
            rows.gather(tensor, first, weights);
            weights.iter_mut().for_each(|w| *w *= scale);
            let base: Vec<&[u8]> = layout
                .parts
                .iter()
                .zip(base)
                .map(|(part, bytes)| {
                    let row = part.row_bytes(cols);
                    let start = (first * row).min(bytes.len());
                    &bytes[start..(start + n * row).min(bytes.len())]
                })
                .collect();
            job.strip(weights, &base, parts)
        })
        .collect();
    // Encoding says where the first weight is that is not finite.
    let Some(done) = done.into_iter().collect::<Option<Vec<_>>>() else {
        runner::exponent(tensor, axis, codec)?;
        return Err(crate::Error::input("only finite weights can be quantised"));
    };
    let unit = 4f64.powi(exponent);
    for sums in done {
        out.fresh += sums.fresh;
        out.units += sums.units;
        out.changed += sums.changed;
        out.error += sums.error * unit;
        out.norm += sums.norm * unit;
    }
    Ok(out)
}

/// Weights of a unit; `None` for a whole row.
fn unit(layout: &Layout) -> Option<usize> {
    let runs = layout.parts.iter().filter_map(|p| if let Per::Run(n) = p.per { Some(n) } else { None });
    // Numbers of a row that groups depend on can only be kept where the layout can encode under them.
    runs.max().filter(|_| layout.under_rows.is_some() || !layout.has_row_parameters())
}

#[derive(Default)]
struct Sums {
    fresh: u64,
    units: u64,
    changed: u64,
    error: f64,
    norm: f64,
}

struct Job<'a> {
    codec: &'a Codec,
    layout: &'static Layout,
    cols: usize,
    importance: Option<&'a [f32]>,
    level: Level,
    /// See [`unit`].
    unit: Option<usize>,
}

impl Job<'_> {
    /// Codes rows: those that the base has, with its parameters. `None` where a weight is not finite.
    fn strip(&self, weights: &[f32], base: &[&[u8]], out: &mut [&mut [u8]]) -> Option<Sums> {
        let cols = self.cols;
        let parts = self.layout.parts;
        let strip = Strip { data: weights, cols, importance: self.importance };
        let encode = match self.layout.calibrated {
            Some(calibrated) if self.importance.is_some() => calibrated.search,
            _ => self.codec.encode,
        };
        // Afresh first: these are the parts of rows that the base lacks, and the measure for those that it has.
        if !encode(self.level, strip, out).is_finite() {
            return None;
        }
        let afresh = self.decode(out, weights.len());
        let common = parts.iter().zip(base).map(|(part, bytes)| bytes.len() / part.row_bytes(cols).max(1));
        let common = common.min().unwrap_or(0);
        let mut under: Vec<Vec<u8>> = out.iter().map(|part| part.to_vec()).collect();
        if let Some(encode) = self.layout.under_rows {
            for ((part, under), base) in parts.iter().zip(&mut under).zip(base) {
                if matches!(part.per, Per::Row(_)) {
                    under[..base.len()].copy_from_slice(base);
                }
            }
            let mut slices: Vec<&mut [u8]> = under.iter_mut().map(Vec::as_mut_slice).collect();
            encode(self.level, strip, &mut slices);
        }
        let rebuilt = self.decode(&under, weights.len());
        let mut sums = Sums::default();
        for (row, w) in weights.chunks_exact(cols).enumerate() {
            let at = row * cols..(row + 1) * cols;
            let bytes = |part: &Part| row * part.row_bytes(cols)..(row + 1) * part.row_bytes(cols);
            let mut new: Vec<&mut [u8]> =
                parts.iter().zip(out.iter_mut()).map(|(part, out)| &mut out[bytes(part)]).collect();
            let units = self.unit.map_or(1, |unit| cols.div_ceil(unit)) as u64;
            sums.units += units;
            sums.norm += squared(w, &vec![0.0; cols], None);
            if row >= common {
                sums.fresh += units;
                sums.changed += cols as u64;
                sums.error += squared(w, &afresh[at], None);
                continue;
            }
            let old: Vec<&[u8]> = parts.iter().zip(base).map(|(part, base)| &base[bytes(part)]).collect();
            let under: Vec<&[u8]> =
                parts.iter().zip(&under).map(|(part, under)| &under[bytes(part)]).collect();
            let before = codes_of(self.layout, &old, cols);
            let (row, fresh) = self.row(w, &afresh[at.clone()], &rebuilt[at], &old, &under, &mut new);
            sums.fresh += fresh;
            sums.changed += row.codes.iter().zip(&before).filter(|(a, b)| a != b).count() as u64;
            sums.error += squared(w, &row.rebuilt, None);
        }
        Some(sums)
    }

    /// Codes one row that the base has as `old`. `new` holds it as encoded afresh, which stands for `afresh`, and
    /// `under` as encoded under its old numbers, which stands for `rebuilt`. Returns it with its new units.
    fn row(
        &self,
        w: &[f32],
        afresh: &[f32],
        rebuilt: &[f32],
        old: &[&[u8]],
        under: &[&[u8]],
        new: &mut [&mut [u8]],
    ) -> (Row, u64) {
        let (cols, importance) = (self.cols, self.importance);
        let unit = self.unit.unwrap_or(cols);
        if squared(w, rebuilt, importance) > TOLERANCE * squared(w, afresh, importance) {
            // The row's old numbers no longer suit it: it stays as encoded afresh.
            let fresh: Vec<&[u8]> = new.iter().map(|p| &**p).collect();
            return (Row::of(self, &fresh, afresh), cols.div_ceil(unit) as u64);
        }
        if self.unit.is_none() {
            let row = Row::on_grid(self, w, old);
            let kept = squared(w, &row.rebuilt, importance) <= TOLERANCE * squared(w, afresh, importance);
            return if kept {
                (self.store(row, old, new), 0)
            } else {
                (self.store(Row::of(self, under, rebuilt), under, new), 1)
            };
        }
        let moved = (0..cols).step_by(unit).filter(|start| {
            self.layout.parts.iter().zip(old).zip(under).any(|((part, old), under)| {
                let Per::Run(n) = part.per else { return false };
                let size = part.dtype.size();
                let bytes = start / n * size..((start + unit).min(cols)).div_ceil(n) * size;
                old[bytes.clone()] != under[bytes]
            })
        });
        let moved = moved.count() as u64;
        (self.store(Row::of(self, under, rebuilt), under, new), moved)
    }

    /// Writes a row with the parameters of `from`.
    fn store(&self, row: Row, from: &[&[u8]], out: &mut [&mut [u8]]) -> Row {
        for ((part, from), to) in self.layout.parts.iter().zip(from).zip(out.iter_mut()) {
            if !matches!(part.per, Per::Weight(_)) {
                to.copy_from_slice(from);
            }
        }
        store_codes(self.layout, &row.codes, out);
        row
    }

    fn decode(&self, parts: &[impl AsRef<[u8]>], len: usize) -> Vec<f32> {
        let mut out = vec![0f32; len];
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        (self.layout.decode)(self.level, &parts, self.cols, &mut out);
        out
    }
}

/// One row: its codes, and what they stand for.
struct Row {
    codes: Vec<u8>,
    rebuilt: Vec<f32>,
}

impl Row {
    /// A row that is coded already.
    fn of(job: &Job<'_>, parts: &[&[u8]], rebuilt: &[f32]) -> Row {
        Row { codes: codes_of(job.layout, parts, job.cols), rebuilt: rebuilt.to_vec() }
    }

    /// The nearest codes under the parameters of `parts`, whose own codes win where two are as near.
    fn on_grid(job: &Job<'_>, w: &[f32], parts: &[&[u8]]) -> Row {
        let cols = job.cols;
        let mut parameters: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
        let mut value = vec![0f32; cols];
        let mut row = Row::of(job, parts, &job.decode(parts, cols));
        for code in 0..1usize << job.layout.code_bits {
            let mut shift = 0;
            for (part, bytes) in job.layout.parts.iter().zip(&mut parameters) {
                if let Per::Weight(bits) = part.per {
                    bytes.fill(repeated((code >> shift) as u8, bits));
                    shift += bits;
                }
            }
            let slices: Vec<&[u8]> = parameters.iter().map(Vec::as_slice).collect();
            (job.layout.decode)(job.level, &slices, cols, &mut value);
            for (((w, v), best), chosen) in w.iter().zip(&value).zip(&mut row.rebuilt).zip(&mut row.codes) {
                let nearer = (w - v).abs() < (w - *best).abs();
                *best = if nearer { *v } else { *best };
                *chosen = if nearer { code as u8 } else { *chosen };
            }
        }
        row
    }
}

/// Σ i·(w - ŵ)².
fn squared(w: &[f32], rebuilt: &[f32], importance: Option<&[f32]>) -> f64 {
    let errors = w.iter().zip(rebuilt).map(|(w, r)| f64::from(w - r).powi(2));
    match importance {
        None => errors.sum(),
        Some(importance) => errors.zip(importance).map(|(e, i)| e * f64::from(*i)).sum(),
    }
}

/// A byte that holds a code of `bits` bits as often as it can.
fn repeated(code: u8, bits: u32) -> u8 {
    let code = code & (u8::MAX >> (8 - bits));
    (0..8).step_by(bits as usize).fold(0, |byte, shift| byte | code << shift)
}

/// The codes of whole rows, whichever parts hold their bits; the first part holds the lowest.
pub fn codes_of(layout: &Layout, parts: &[&[u8]], cols: usize) -> Vec<u8> {
    let mut codes: Vec<u8> = Vec::new();
    let mut shift = 0;
    for (part, bytes) in layout.parts.iter().zip(parts) {
        let Per::Weight(bits) = part.per else { continue };
        let row_bytes = part.row_bytes(cols);
        codes.resize(bytes.len().checked_div(row_bytes).unwrap_or(0) * cols, 0);
        let per_byte = (8 / bits) as usize;
        for (bytes, codes) in bytes.chunks_exact(row_bytes.max(1)).zip(codes.chunks_exact_mut(cols.max(1))) {
            for (byte, codes) in bytes.iter().zip(codes.chunks_mut(per_byte)) {
                for (i, code) in codes.iter_mut().enumerate() {
                    *code |= ((byte >> (i as u32 * bits)) & (u8::MAX >> (8 - bits))) << shift;
                }
            }
        }
        shift += bits;
    }
    codes
}

/// Stores the codes of one row.
fn store_codes(layout: &Layout, codes: &[u8], out: &mut [&mut [u8]]) {
    let mut shift = 0;
    for (part, bytes) in layout.parts.iter().zip(out) {
        if let Per::Weight(bits) = part.per {
            crate::codec::store_bits(bytes, 0, codes, bits as usize, shift);
            shift += bits;
        }
    }
}

/// Stores the codes of whole rows of `cols` in parts that hold zeros for them.
pub fn codes_at(layout: &Layout, codes: &[u8], cols: usize, out: &mut [Vec<u8>]) {
    let mut shift = 0;
    for (part, bytes) in layout.parts.iter().zip(out) {
        if let Per::Weight(bits) = part.per {
            let rows = bytes.chunks_mut(part.row_bytes(cols).max(1));
            rows.zip(codes.chunks(cols.max(1)))
                .for_each(|(bytes, codes)| crate::codec::store_bits(bytes, 0, codes, bits as usize, shift));
            shift += bits;
        }
    }
}

/// Stores the codes of whole rows of `cols`.
pub fn store_all_codes(layout: &Layout, codes: &[u8], cols: usize, out: &mut [Vec<u8>]) {
    let mut shift = 0;
    for (part, bytes) in layout.parts.iter().zip(out) {
        if let Per::Weight(bits) = part.per {
            let rows = bytes.par_chunks_mut(part.row_bytes(cols).max(1));
            rows.zip(codes.par_chunks(cols.max(1)))
                .for_each(|(bytes, codes)| crate::codec::store_bits(bytes, 0, codes, bits as usize, shift));
            shift += bits;
        }
    }
}
