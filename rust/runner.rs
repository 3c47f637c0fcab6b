//! One tensor through one codec, strip by strip, on every thread of the current rayon pool.
//!
//! A strip is some whole rows, small enough for a core's cache; its bytes depend on nothing else, so the
//! result is the same for any number of threads.

mod buffer;
mod error_sums;
mod together;

pub use buffer::zeroed;

use crate::codec::simd::Level;
use crate::codec::{Codec, EXPONENTS, FEEDBACK_ROWS, Factor, OutputError, Outputs, Range, Strip};
use crate::error::{Error, Kind, Result};
use crate::tensor::{Dtype, Encoding, Rows, Tensor};
use error_sums::error_sums;
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Weights in a strip: 256 KiB of FP32, which fits a core's second-level cache with its parts.
const STRIP: usize = 1 << 16;

/// Rows of a transposed tensor are read a whole cache line of columns at a time.
const MIN_TRANSPOSED_ROWS: usize = 32;

/// How to encode.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// One positive weight per column for the layout's search, whatever the codec's encoder is; `None` means 1
    /// and the codec's encoder.
    pub importance: Option<&'a [f32]>,
    /// To choose codes again, column by column; layouts without error feedback pass it over.
    pub factor: Option<&'a Factor>,
    /// The second moment of the gradients of the layer's outputs, one for each row; then codes that are chosen again
    /// also make good what other rows have lost.
    pub outputs: Option<&'a Outputs>,
    /// Whether to measure the squared error.
    pub measure: bool,
    /// Where to count weights, and look for a request to stop.
    pub meter: Option<&'a Meter>,
}

/// Progress of work on other threads, and a way to stop it.
#[derive(Debug, Default)]
pub struct Meter {
    done: AtomicU64,
    stopped: AtomicBool,
}

impl Meter {
    /// Counts work.
    pub fn add(&self, amount: u64) {
        self.done.fetch_add(amount, Relaxed);
    }

    /// All that was counted.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Asks for the work to end soon.
    pub fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    /// Whether it was asked to end.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Relaxed)
    }
}

/// What encoding a tensor leaves beside its parts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// The parameter `exponent` of the index: rebuilt weights are multiplied by 2^exponent. It is 0 unless
    /// the largest magnitude lies outside what FP16 parameters express well.
    pub exponent: i32,
    /// Σ(w - ŵ)², where it was asked for.
    pub squared_error: f64,
    /// Σw², where it was asked for.
    pub squared_norm: f64,
    /// Squared errors of the layer's outputs, where there was a factor.
    pub output: Option<OutputError>,
}

/// A tensor's parts under a codec.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// The exponent and the error.
    pub outcome: Outcome,
    /// The parts, in the layout's order.
    pub parts: Vec<Vec<u8>>,
}

/// Writes all elements of `tensor` as FP32, little-endian.
///
/// # Errors
/// A usage error if its elements are no weights, or `out` is not 4 bytes for each of them.
pub fn widen_into(tensor: &Tensor<'_>, out: &mut [u8]) -> Result<()> {
    if !tensor.encoding.dtype().is_weight() {
        return Err(Error::usage(format!("{} elements cannot be read as F32", tensor.encoding.name())));
    }
    if out.len() != 4 * tensor.len() {
        return Err(Error::usage(format!("{} bytes do not hold shape {:?} as F32", out.len(), tensor.shape)));
    }
    out.par_chunks_mut(4 * STRIP).enumerate().try_for_each_init(
        || vec![0f32; STRIP],
        |scratch, (i, out)| {
            let weights = &mut scratch[..out.len() / 4];
            tensor.encoding.widen(&tensor.bytes, i * STRIP, weights);
            Dtype::F32.narrow(weights, out)
        },
    )
}

/// Encodes `tensor` with groups along `axis`; the same bytes for any number of threads.
///
/// `importance` holds one positive weight per column. `measure` asks for the squared error.
///
/// # Errors
/// An input error that names the index of the first NaN or infinity; a usage error for a wrong axis or
/// importance.
pub fn encode(
    tensor: &Tensor<'_>,
    axis: usize,
    codec: &Codec,
    importance: Option<&[f32]>,
    measure: bool,
) -> Result<Encoded> {
    let rows = Rows::new(&tensor.shape, axis)?;
    let sizes = codec.layout.parts.iter().map(|p| rows.count() * p.row_bytes(rows.cols));
    let mut parts: Vec<Vec<u8>> = sizes.map(zeroed).collect();
    let mut slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
    let options = Options { importance, measure, ..Options::default() };
    let outcome = encode_into(tensor, axis, codec, options, &mut slices)?;
    Ok(Encoded { outcome, parts })
}

/// As [`encode`], into memory that the caller has: every byte of every part is written. Memory that was
/// in use before is several times faster than fresh pages.
///
/// # Errors
/// As [`encode`]; and a usage error for parts of the wrong size.
pub fn encode_into(
    tensor: &Tensor<'_>,
    axis: usize,
    codec: &Codec,
    options: Options<'_>,
    parts: &mut [&mut [u8]],
) -> Result<Outcome> {
    let rows = Rows::new(&tensor.shape, axis)?;
    check(tensor, &rows, options.importance)?;
    if let Some(factor) = options.factor.filter(|f| f.cols() != rows.cols) {
        return Err(Error::usage(format!(
            "the second moment has {} columns, the tensor {}",
            factor.cols(),
            rows.cols
        )));
    }
    if let Some(outputs) = options.outputs.filter(|o| o.factor.cols() != rows.count()) {
        return Err(Error::usage(format!(
            "the second moment of the outputs has {} columns, the tensor {} rows",
            outputs.factor.cols(),
            rows.count()
        )));
    }
    let wanted = codec.layout.part_bytes(rows.count() as u64, rows.cols as u64);
    let given: Vec<u64> = parts.iter().map(|p| p.len() as u64).collect();
    if wanted.as_ref() != Some(&given) {
        return Err(Error::usage(format!(
            "parts of {given:?} bytes do not fit shape {:?} as {}",
            tensor.shape, codec.name
        )));
    }
    let job = Job { tensor, rows, codec, options, level: Level::detect() };
    let (outcome, range) = job.run(0, parts);
    if options.meter.is_some_and(Meter::is_stopped) {
        return Err(Error::new(Kind::Interrupted, "interrupted"));
    }
    if !range.is_finite() {
        return Err(first_non_finite(tensor));
    }
    match range.exponent(codec.layout.normal_from) {
        0 => Ok(outcome),
        exponent => Ok(job.run(exponent, parts).0),
    }
}

/// The exponent that [`encode`] would choose, without encoding.
///
/// # Errors
/// As [`encode`].
pub fn exponent(tensor: &Tensor<'_>, axis: usize, codec: &Codec) -> Result<i32> {
    let rows = Rows::new(&tensor.shape, axis)?;
    check(tensor, &rows, None)?;
    let job = Job { tensor, rows, codec, options: Options::default(), level: Level::detect() };
    let strips: Vec<usize> = (0..rows.count()).step_by(job.strip_rows()).collect();
    let range = strips
        .par_iter()
        .map_init(Vec::new, |scratch, &first| {
            let n = job.strip_rows().min(rows.count() - first);
            Range::of(job.weights(first, n, scratch))
        })
        .reduce(Range::default, Range::and);
    if !range.is_finite() {
        return Err(first_non_finite(tensor));
    }
    Ok(range.exponent(codec.layout.normal_from))
}

fn check(tensor: &Tensor<'_>, rows: &Rows, importance: Option<&[f32]>) -> Result<()> {
    if !tensor.encoding.dtype().is_weight() {
        return Err(Error::usage(format!(
            "{} holds no weights; only F32, F16 and BF16 can be quantised",
            tensor.encoding.name()
        )));
    }
    if tensor.encoding.byte_len(rows.len() as u64) != Some(tensor.bytes.len() as u64) {
        return Err(Error::usage(format!(
            "{} bytes do not hold a {} tensor of shape {:?}",
            tensor.bytes.len(),
            tensor.encoding.name(),
            tensor.shape
        )));
    }
    let Some(w) = importance else { return Ok(()) };
    if w.len() != rows.cols {
        return Err(Error::usage(format!("importance has {} weights for {} columns", w.len(), rows.cols)));
    }
    match w.iter().position(|w| !(w.is_finite() && *w > 0.0)) {
        Some(i) => Err(Error::usage(format!("importance[{i}] is {}; it must be positive", w[i]))),
        None => Ok(()),
    }
}

fn first_non_finite(tensor: &Tensor<'_>) -> Error {
    let mut chunk = vec![0f32; STRIP.min(tensor.len())];
    for start in (0..tensor.len()).step_by(STRIP) {
        let n = STRIP.min(tensor.len() - start);
        tensor.encoding.widen(&tensor.bytes, start, &mut chunk[..n]);
        if let Some(i) = chunk[..n].iter().position(|x| !x.is_finite()) {
            let mut rest = start + i;
            let mut index = vec![0; tensor.shape.len()];
            for (i, extent) in index.iter_mut().zip(&tensor.shape).rev() {
                *i = rest % extent;
                rest /= extent;
            }
            return Error::input(format!(
                "{} at index {index:?}; only finite weights can be quantised (use the rule `NAME=keep` to \
                 leave the tensor as it is)",
                chunk[i]
            ));
        }
    }
    unreachable!("the range says that a weight is not finite")
}

struct Job<'a> {
    tensor: &'a Tensor<'a>,
    rows: Rows,
    codec: &'a Codec,
    options: Options<'a>,
    level: Level,
}

impl Job<'_> {
    fn strip_rows(&self) -> usize {
        if self.options.factor.is_some() {
            return FEEDBACK_ROWS;
        }
        let least = if self.rows.inner > 1 { MIN_TRANSPOSED_ROWS } else { 1 };
        (STRIP / self.rows.cols.max(1)).max(least)
    }

    /// Rows `first .. first + n` as FP32: the tensor's own memory where it can be, or `scratch`.
    fn weights<'s>(&'s self, first: usize, n: usize, scratch: &'s mut Vec<f32>) -> &'s [f32] {
        let cols = self.rows.cols;
        if self.rows.inner == 1
            && self.tensor.encoding == Encoding::Plain(Dtype::F32)
            && let Some(weights) = as_f32(&self.tensor.bytes[first * cols * 4..(first + n) * cols * 4])
        {
            return weights;
        }
        scratch.resize(n * cols, 0.0);
        self.rows.gather(self.tensor, first, scratch);
        scratch
    }

    fn run(&self, exponent: i32, parts: &mut [&mut [u8]]) -> (Outcome, Range) {
        if self.rows.is_empty() {
            parts.iter_mut().for_each(|p| p.fill(0));
            return Sums::default().outcome(exponent);
        }
        if let (Some(outputs), Some(_), Some(_)) =
            (self.options.outputs, self.options.factor, self.codec.layout.calibrated)
        {
            return self.run_together(outputs, exponent, parts);
        }
        let (count, cols) = (self.rows.count(), self.rows.cols);
        let strip_rows = self.strip_rows();
        let mut strips: Vec<Vec<&mut [u8]>> =
            (0..count.div_ceil(strip_rows)).map(|_| Vec::with_capacity(parts.len())).collect();
        for (part, bytes) in self.codec.layout.parts.iter().zip(parts) {
            for (strip, bytes) in strips.iter_mut().zip(bytes.chunks_mut(strip_rows * part.row_bytes(cols))) {
                strip.push(bytes);
            }
        }
        let done: Vec<Sums> = strips
            .par_iter_mut()
            .enumerate()
            .map_init(Scratch::default, |scratch, (i, parts)| {
                let first = i * strip_rows;
                let n = strip_rows.min(count - first);
                if !self.go_on(n, exponent) {
                    return Sums::default();
                }
                self.strip(first, n, exponent, parts, scratch)
            })
            .collect();
        // In the order of the strips, so that the sums do not depend on the threads.
        let mut total = Sums::default();
        done.iter().for_each(|strip| total.add(strip));
        total.outcome(exponent)
    }

    /// Counts `rows` rows, which are next, unless it was asked to stop.
    fn go_on(&self, rows: usize, exponent: i32) -> bool {
        match self.options.meter {
            Some(meter) if meter.is_stopped() => return false,
            // Each weight is counted once, whether or not it takes a second pass.
            Some(meter) if exponent == 0 => meter.add((rows * self.rows.cols) as u64),
            _ => {}
        }
        true
    }

    fn strip(
        &self,
        first: usize,
        n: usize,
        exponent: i32,
        parts: &mut [&mut [u8]],
        scratch: &mut Scratch,
    ) -> Sums {
        // Its memory comes back below.
        let mut own = std::mem::take(&mut scratch.weights);
        let weights = self.weights(first, n, &mut own);
        let scaled;
        let data = if exponent == 0 {
            weights
        } else {
            let factor = power_of_two(-exponent);
            scaled = weights.iter().map(|w| w * factor).collect::<Vec<_>>();
            &scaled
        };
        let sums = self.encode_strip(data, data, exponent, parts, scratch);
        scratch.weights = own;
        sums
    }

    /// Encodes the rows `data` of a strip, whose errors are counted from `exact`; `scratch.rebuilt` is what they became
    /// where that is measured, or other rows are to know it.
    fn encode_strip(
        &self,
        data: &[f32],
        exact: &[f32],
        exponent: i32,
        parts: &mut [&mut [u8]],
        scratch: &mut Scratch,
    ) -> Sums {
        let strip = Strip { data, cols: self.rows.cols, importance: self.options.importance };
        let layout = self.codec.layout;
        let encode = match layout.calibrated {
            Some(calibrated) if strip.importance.is_some() => calibrated.search,
            _ => self.codec.encode,
        };
        let mut sums = Sums { range: encode(self.level, strip, parts), ..Sums::default() };
        if !sums.range.is_finite() {
            return sums;
        }
        let unit = f64::from(power_of_two(exponent)) * f64::from(power_of_two(exponent));
        if let (Some(factor), Some(calibrated)) = (self.options.factor, layout.calibrated) {
            let OutputError { error, before, norm } =
                (calibrated.feedback)(self.level, layout, factor, strip, parts);
            sums.output = Some(OutputError { error: error * unit, before: before * unit, norm: norm * unit });
        }
        if self.options.measure || self.options.outputs.is_some() {
            let parts: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
            scratch.rebuilt.resize(data.len(), 0.0);
            (layout.decode)(self.level, &parts, self.rows.cols, &mut scratch.rebuilt);
            [sums.error, sums.norm] = error_sums(exact, &scratch.rebuilt).map(|sum| sum * unit);
        }
        sums
    }
}

/// What one strip adds to the outcome.
#[derive(Default)]
struct Sums {
    range: Range,
    error: f64,
    norm: f64,
    output: Option<OutputError>,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.range = self.range.and(other.range);
        self.error += other.error;
        self.norm += other.norm;
        if let Some(other) = other.output {
            let output = self.output.get_or_insert_default();
            output.error += other.error;
            output.before += other.before;
            output.norm += other.norm;
        }
    }

    fn outcome(self, exponent: i32) -> (Outcome, Range) {
        let Sums { range, error, norm, output } = self;
        (Outcome { exponent, squared_error: error, squared_norm: norm, output }, range)
    }
}

#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    rebuilt: Vec<f32>,
}

/// Rebuilds a tensor of `shape` into `out` as `dtype` (FP32, FP16 or BF16), row-major.
///
/// # Errors
/// A usage error where a size does not fit, or the axis or the exponent does not exist.
pub fn decode(
    codec: &Codec,
    exponent: i32,
    shape: &[usize],
    axis: usize,
    parts: &[&[u8]],
    dtype: Dtype,
    out: &mut [u8],
) -> Result<()> {
    let rows = Rows::new(shape, axis)?;
    let layout = codec.layout;
    if !EXPONENTS.contains(&exponent) {
        return Err(Error::usage(format!("exponent {exponent} lies outside {EXPONENTS:?}")));
    }
    if !dtype.is_weight() {
        return Err(Error::usage(format!(
            "weights cannot be rebuilt as {}; use F32, F16 or BF16",
            dtype.name()
        )));
    }
    let wanted = layout.part_bytes(rows.count() as u64, rows.cols as u64);
    let given: Vec<u64> = parts.iter().map(|p| p.len() as u64).collect();
    if wanted.as_ref() != Some(&given) || out.len() != rows.len() * dtype.size() {
        return Err(Error::usage(format!(
            "parts of {given:?} bytes and an output of {} bytes do not fit shape {shape:?} as {}",
            out.len(),
            codec.name
        )));
    }
    if rows.is_empty() {
        return Ok(());
    }

    let level = Level::detect();
    let strip_rows = (STRIP / rows.cols).max(1);
    let strip_parts = |first: usize, n: usize| -> Vec<&[u8]> {
        let row_bytes = layout.parts.iter().map(|part| part.row_bytes(rows.cols));
        parts.iter().zip(row_bytes).map(|(bytes, row)| &bytes[first * row..(first + n) * row]).collect()
    };
    let largest = dtype.largest();
    let rebuild = |first: usize, n: usize, weights: &mut [f32]| {
        (layout.decode)(level, &strip_parts(first, n), rows.cols, weights);
        if exponent != 0 {
            let factor = power_of_two(exponent);
            // The levels of a group may reach a little beyond the largest weight that the dtype holds.
            weights.iter_mut().for_each(|w| *w = (*w * factor).clamp(-largest, largest));
        }
    };

    if rows.inner == 1 {
        let strip_bytes = strip_rows * rows.cols * dtype.size();
        out.par_chunks_mut(strip_bytes).enumerate().try_for_each_init(Vec::new, |scratch, (i, out)| {
            let n = out.len() / dtype.size();
            if dtype == Dtype::F32
                && let Some(weights) = as_f32_mut(out)
            {
                rebuild(i * strip_rows, n / rows.cols, weights);
                return Ok(());
            }
            scratch.resize(n, 0.0);
            rebuild(i * strip_rows, n / rows.cols, scratch);
            dtype.narrow(scratch, out)
        })
    } else {
        transposed(&rows, dtype, out, rebuild)
    }
}

/// Rebuilds a tensor whose rows are columns: each thread fills a run of input positions, which lie
/// together in memory, from every row of one outer index.
fn transposed(
    rows: &Rows,
    dtype: Dtype,
    out: &mut [u8],
    rebuild: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Result<()> {
    let (cols, inner) = (rows.cols, rows.inner);
    let band = (STRIP / cols).clamp(1, inner).max(MIN_TRANSPOSED_ROWS.min(inner));
    for (outer, out) in out.chunks_mut(cols * inner * dtype.size()).enumerate() {
        // Bands of rows are rebuilt in parallel and narrowed; then each is copied to its place.
        let bands: Vec<usize> = (0..inner).step_by(band).collect();
        for some in bands.chunks(rayon::current_num_threads().max(1)) {
            let narrowed: Vec<Vec<u8>> = some
                .par_iter()
                .map(|&first| {
                    let n = band.min(inner - first);
                    let mut weights = vec![0f32; n * cols];
                    rebuild(outer * inner + first, n, &mut weights);
                    let mut turned = vec![0f32; n * cols];
                    for (r, row) in weights.chunks_exact(cols).enumerate() {
                        for (c, &w) in row.iter().enumerate() {
                            turned[c * n + r] = w;
                        }
                    }
                    let mut bytes = vec![0; n * cols * dtype.size()];
                    dtype.narrow(&turned, &mut bytes).map(|()| bytes)
                })
                .collect::<Result<_>>()?;
            for (&first, bytes) in some.iter().zip(&narrowed) {
                let n = band.min(inner - first) * dtype.size();
                for (line, bytes) in out.chunks_exact_mut(inner * dtype.size()).zip(bytes.chunks_exact(n)) {
                    line[first * dtype.size()..][..n].copy_from_slice(bytes);
                }
            }
        }
    }
    Ok(())
}

/// 2^exponent, for exponents from -127 to 127.
fn power_of_two(exponent: i32) -> f32 {
    // The double holds every one of these; the smallest is subnormal in FP32, and exact.
    2f64.powi(exponent) as f32
}

/// Bytes as FP32, where alignment and byte order allow it.
fn as_f32(bytes: &[u8]) -> Option<&[f32]> {
    // SAFETY: every bit pattern is an f32.
    let (head, weights, tail) = unsafe { bytes.align_to::<f32>() };
    (cfg!(target_endian = "little") && head.is_empty() && tail.is_empty()).then_some(weights)
}

fn as_f32_mut(bytes: &mut [u8]) -> Option<&mut [f32]> {
    // SAFETY: every bit pattern is an f32, and every f32 is four bytes.
    let (head, weights, tail) = unsafe { bytes.align_to_mut::<f32>() };
    (cfg!(target_endian = "little") && head.is_empty() && tail.is_empty()).then_some(weights)
}

/// A tensor that borrows FP32 weights, for callers that hold no bytes.
pub fn tensor_of<'a>(shape: &[usize], weights: &'a [f32]) -> Tensor<'a> {
    // SAFETY: f32 has no padding, and the lifetime is that of the slice.
    let bytes = unsafe { std::slice::from_raw_parts(weights.as_ptr().cast(), size_of_val(weights)) };
    Tensor { shape: shape.to_vec(), encoding: Encoding::Plain(Dtype::F32), bytes: Cow::Borrowed(bytes) }
}
