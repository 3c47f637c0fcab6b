//! Weights on the grid of a quantised base: its scales, offsets and tables, wherever they serve as well as new ones.
//!
//! Nothing here knows a layout: which weights a code can stand for is asked of the layout's own decoder, one code
//! after another. A unit is the weights that share the parameters of the longest run (a whole row where there is no
//! run); a unit that would lose more than [`TOLERANCE`] against encoding it afresh gets new parameters. Where these
//! are bytes that a row's own numbers map to values, the bytes near the base's are tried, for a row is kept.

use crate::codec::simd::Level;
use crate::codec::{Codec, Layout, Per, Strip};
use crate::error::Result;
use crate::runner;
use crate::tensor::{Dtype, Rows, Tensor};
use rayon::prelude::*;

/// How much more squared error than afresh a unit may have: 5 %.
const TOLERANCE: f64 = 1.05;

/// Weights that are looked at together: they fit a core's cache with all their parts.
const STRIP: usize = 1 << 15;

/// How far from the base's bytes parameters are looked for.
const REACH: i32 = 2;

/// Rounds of that, each around the best of the one before.
const ROUNDS: usize = 2;

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

/// Codes `tensor` with the parameters of `base`, which holds parts of rows that are as long; rows beyond its last
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
    let job = Job { codec, layout, cols, importance, level: Level::detect(), shape: Shape::of(layout) };
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

/// What a layout's parts say of its parameters.
#[derive(Clone, Copy)]
struct Shape {
    /// Weights of a unit; `None` for a whole row.
    unit: Option<usize>,
    /// Whether a unit's parameters mean something only with those of its row.
    nested: bool,
}

impl Shape {
    fn of(layout: &Layout) -> Shape {
        let mut runs = layout.parts.iter().filter(|p| matches!(p.per, Per::Run(_)));
        let unit = runs.clone().filter_map(|p| if let Per::Run(n) = p.per { Some(n) } else { None }).max();
        // What is neither the row's nor a byte of each unit can only be chosen with the whole row.
        let bytes = runs.all(|p| Some(p.per) == unit.map(Per::Run) && p.dtype == Dtype::U8);
        let unit = unit.filter(|_| bytes || !layout.has_row_parameters());
        Shape { unit, nested: unit.is_some() && layout.has_row_parameters() }
    }
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
    shape: Shape,
}

impl Job<'_> {
    /// Codes rows: those that the base has on its grid. `None` where a weight is not finite.
    fn strip(&self, weights: &[f32], base: &[&[u8]], out: &mut [&mut [u8]]) -> Option<Sums> {
        let cols = self.cols;
        let strip = Strip { data: weights, cols, importance: self.importance };
        let encode = match self.layout.calibrated {
            Some(calibrated) if self.importance.is_some() => calibrated.search,
            _ => self.codec.encode,
        };
        // Afresh first: these are the parts of rows that the base lacks, and the measure for those it has.
        if !encode(self.level, strip, out).is_finite() {
            return None;
        }
        let common = self.layout.parts.iter().zip(base).map(|(part, bytes)| bytes.len() / part.row_bytes(cols).max(1));
        let common = common.min().unwrap_or(0);
        let mut sums = Sums::default();
        let mut afresh = vec![0f32; weights.len()];
        {
            let parts: Vec<&[u8]> = out.iter().map(|p| &**p).collect();
            (self.layout.decode)(self.level, &parts, cols, &mut afresh);
        }
        for (row, (w, afresh)) in weights.chunks_exact(cols).zip(afresh.chunks_exact(cols)).enumerate() {
            let row_of = |i: usize, bytes: usize| i * bytes..(i + 1) * bytes;
            let mut new: Vec<&mut [u8]> = self
                .layout
                .parts
                .iter()
                .zip(out.iter_mut())
                .map(|(part, bytes)| &mut bytes[row_of(row, part.row_bytes(cols))])
                .collect();
            if row >= common {
                let units = self.shape.unit.map_or(1, |unit| cols.div_ceil(unit)) as u64;
                sums.units += units;
                sums.fresh += units;
                sums.changed += cols as u64;
                sums.error += squared(w, afresh, None);
            } else {
                let old: Vec<&[u8]> = self
                    .layout
                    .parts
                    .iter()
                    .zip(base)
                    .map(|(part, bytes)| &bytes[row_of(row, part.row_bytes(cols))])
                    .collect();
                self.row(w, afresh, &old, &mut new, &mut sums);
            }
            sums.norm += w.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
        }
        Some(sums)
    }

    /// Codes one row of the base's; `new` holds it as encoded afresh.
    fn row(&self, w: &[f32], afresh: &[f32], old: &[&[u8]], new: &mut [&mut [u8]], sums: &mut Sums) {
        let unit = self.shape.unit.unwrap_or(self.cols);
        let codes = codes_of(self.layout, old, self.cols);
        let mut kept = Row::on_grid(self, w, old, codes.clone());
        let ranges = || (0..self.cols).step_by(unit).map(|at| at..(at + unit).min(self.cols));
        let over = |error: f64, range: &std::ops::Range<usize>| {
            error > TOLERANCE * squared(&w[range.clone()], &afresh[range.clone()], self.weights(range))
        };
        let failing: Vec<_> =
            ranges().filter(|range| over(kept.error(w, range, self.weights(range)), range)).collect();
        sums.units += ranges().count() as u64;
        sums.fresh += failing.len() as u64;
        if self.shape.unit.is_none() && !failing.is_empty() {
            // The row's parameters are new, and its codes with them: it is as encoded afresh.
            let fresh: Vec<&[u8]> = new.iter().map(|p| &**p).collect();
            kept.codes = codes_of(self.layout, &fresh, self.cols);
            kept.rebuilt.copy_from_slice(afresh);
        } else if self.shape.nested && !failing.is_empty() {
            self.search(w, &failing, &over, &mut kept);
            kept.store_parameters(self, new);
        } else {
            let fresh: Vec<&[u8]> = new.iter().map(|p| &**p).collect();
            let codes = codes_of(self.layout, &fresh, self.cols);
            for range in &failing {
                kept.codes[range.clone()].copy_from_slice(&codes[range.clone()]);
                kept.rebuilt[range.clone()].copy_from_slice(&afresh[range.clone()]);
                for ((part, fresh), kept) in self.layout.parts.iter().zip(&fresh).zip(&mut kept.parameters) {
                    if let Per::Run(n) = part.per {
                        let size = part.dtype.size();
                        let bytes = range.start / n * size..range.end.div_ceil(n) * size;
                        kept[bytes.clone()].copy_from_slice(&fresh[bytes]);
                    }
                }
            }
            kept.store_parameters(self, new);
        }
        store_codes(self.layout, &kept.codes, new);
        sums.changed += kept.codes.iter().zip(&codes).filter(|(a, b)| a != b).count() as u64;
        sums.error += squared(w, &kept.rebuilt, None);
    }

    fn weights(&self, range: &std::ops::Range<usize>) -> Option<&[f32]> {
        self.importance.map(|i| &i[range.clone()])
    }

    /// New parameters for failing units: the bytes near the base's, under the row's own numbers.
    fn search(
        &self,
        w: &[f32],
        failing: &[std::ops::Range<usize>],
        over: &dyn Fn(f64, &std::ops::Range<usize>) -> bool,
        kept: &mut Row,
    ) {
        let unit = self.shape.unit.expect("nested layouts have runs");
        let movable: Vec<usize> =
            (0..self.layout.parts.len()).filter(|&i| matches!(self.layout.parts[i].per, Per::Run(_))).collect();
        let mut failing = failing.to_vec();
        for _ in 0..ROUNDS {
            if failing.is_empty() {
                return;
            }
            // Units of one row, side by side, are a shorter row of the same numbers.
            let gather = |from: &[f32]| -> Vec<f32> {
                failing.iter().flat_map(|range| from[range.clone()].iter().copied()).collect()
            };
            let packed = gather(w);
            let importance = self.importance.map(gather);
            let centre: Vec<Vec<u8>> = self
                .layout
                .parts
                .iter()
                .zip(&kept.parameters)
                .map(|(part, bytes)| match part.per {
                    Per::Run(_) => failing.iter().map(|range| bytes[range.start / unit]).collect(),
                    _ => bytes.clone(),
                })
                .collect();
            let job = Job { cols: packed.len(), importance: importance.as_deref(), ..*self };
            let steps = (2 * REACH + 1) as usize;
            for place in 0..steps.pow(movable.len() as u32) {
                let mut moved = centre.clone();
                let mut left = place;
                for &part in &movable {
                    let step = (left % steps) as i32 - REACH;
                    left /= steps;
                    moved[part].iter_mut().for_each(|b| *b = (i32::from(*b) + step).clamp(0, 255) as u8);
                }
                let slices: Vec<&[u8]> = moved.iter().map(Vec::as_slice).collect();
                let tried = Row::on_grid(&job, &packed, &slices, Vec::new());
                let mut start = 0;
                for (i, range) in failing.iter().enumerate() {
                    let here = start..start + range.len();
                    start = here.end;
                    let before = kept.error(w, range, self.weights(range));
                    if tried.error(&packed, &here, job.weights(&here)) < before {
                        kept.codes[range.clone()].copy_from_slice(&tried.codes[here.clone()]);
                        kept.rebuilt[range.clone()].copy_from_slice(&tried.rebuilt[here]);
                        for &part in &movable {
                            kept.parameters[part][range.start / unit] = moved[part][i];
                        }
                    }
                }
            }
            failing.retain(|range| over(kept.error(w, range, self.weights(range)), range));
        }
    }
}

/// One row under some parameters: the nearest codes, and what they stand for.
struct Row {
    /// The parts; codes among them mean nothing.
    parameters: Vec<Vec<u8>>,
    codes: Vec<u8>,
    rebuilt: Vec<f32>,
}

impl Row {
    /// The nearest codes; where two are as near, the one in `codes`, if there are any.
    fn on_grid(job: &Job<'_>, w: &[f32], parts: &[&[u8]], codes: Vec<u8>) -> Row {
        let cols = job.cols;
        let mut parameters: Vec<Vec<u8>> = job
            .layout
            .parts
            .iter()
            .zip(parts)
            .map(|(part, bytes)| match part.per {
                Per::Weight(_) => vec![0; part.row_bytes(cols)],
                _ => bytes.to_vec(),
            })
            .collect();
        let mut value = vec![0f32; cols];
        let mut row = Row { parameters: Vec::new(), codes, rebuilt: vec![f32::INFINITY; cols] };
        if row.codes.is_empty() {
            row.codes.resize(cols, 0);
        } else {
            (job.layout.decode)(job.level, parts, cols, &mut row.rebuilt);
        }
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
        row.parameters = parameters;
        row
    }

    fn error(&self, w: &[f32], range: &std::ops::Range<usize>, importance: Option<&[f32]>) -> f64 {
        squared(&w[range.clone()], &self.rebuilt[range.clone()], importance)
    }

    fn store_parameters(&self, job: &Job<'_>, out: &mut [&mut [u8]]) {
        for ((part, from), to) in job.layout.parts.iter().zip(&self.parameters).zip(out) {
            if !matches!(part.per, Per::Weight(_)) {
                to.copy_from_slice(from);
            }
        }
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
