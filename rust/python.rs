//! The Python extension `tenpak._core`: takes slices, releases the interpreter, calls the core, wraps.
//!
//! Arrays come as contiguous buffers of bytes with a dtype's name and a shape, so that nothing here depends on
//! NumPy; reports and indexes go out as JSON. The package's Python modules make both pleasant.

mod artifact;
mod buffers;
mod cholesky;
mod delta;
mod kernels;
mod memory;
mod model;
mod progress;
mod wgpu;

use crate::calibration::{Calibration, Encoder, importance_of};
use crate::codec::{self, Codec, Factor, OutputError, Outputs, Per};
use crate::error::{Error, Kind};
use crate::input::{self, Model};
use crate::output::{self, Format};
use crate::pipeline::{self, CalibrationOptions, CompressOptions, DecompressOptions};
use crate::plan::{self, Choice};
use crate::runner;
use crate::tensor::{Dtype, Encoding, Rows, Tensor};
use buffers::{Bytes, BytesMut};
use cholesky::LAPACK;
use memory::MemoryModel;
use progress::Callback;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use regex::Regex;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// The class in `tenpak.errors` for each kind.
fn exception(kind: Kind) -> &'static str {
    match kind {
        Kind::Usage => "UsageError",
        Kind::Input => "InputError",
        Kind::Artifact => "ArtifactError",
        Kind::Unsupported => "UnsupportedError",
        Kind::Io => "StorageError",
        Kind::Interrupted => "InterruptedByUser",
    }
}

/// The one conversion of errors.
fn to_py(py: Python<'_>, error: Error) -> PyErr {
    let class = py.import("tenpak.errors").and_then(|m| m.getattr(exception(error.kind())));
    match class.and_then(|class| class.call1((error.to_string(),))) {
        Ok(value) => PyErr::from_value(value),
        Err(e) => e,
    }
}

/// Runs `work` on a pool of `threads` (0: one for each core), which is kept for the next call.
fn on_pool<T: Send>(threads: usize, work: impl FnOnce() -> crate::Result<T> + Send) -> crate::Result<T> {
    static POOLS: Mutex<Vec<(u32, usize, Arc<rayon::ThreadPool>)>> = Mutex::new(Vec::new());
    // A forked child has none of its parent's threads, so it must not have its pools either.
    let process = std::process::id();
    let pool = {
        let mut pools = POOLS.lock().unwrap_or_else(|e| e.into_inner());
        match pools.iter().find(|(p, n, _)| (*p, *n) == (process, threads)) {
            Some((_, _, pool)) => pool.clone(),
            None => {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let pool =
                    pool.map_err(|e| Error::new(Kind::Io, format!("cannot start {threads} threads: {e}")))?;
                let pool = Arc::new(pool);
                pools.push((process, threads, pool.clone()));
                pool
            }
        }
    };
    pool.install(work)
}

fn dtype_named(name: &str) -> crate::Result<Dtype> {
    Dtype::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Dtype::ALL.iter().map(|d| d.name()).collect();
        Error::usage(format!("unknown dtype {name:?}; choose one of {}", names.join(", ")))
    })
}

fn choice(name: &str) -> crate::Result<Choice> {
    if name == crate::artifact::KEEP { Ok(Choice::Keep) } else { Ok(Choice::Codec(codec::find(name)?)) }
}

fn pattern(regex: &str) -> crate::Result<Regex> {
    Regex::new(regex).map_err(|e| {
        let reason = e.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Error::usage(format!("the pattern {regex:?} is no regular expression: {reason}"))
    })
}

/// The codec table, a dictionary for each row.
#[pyfunction]
fn codecs(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let row = |codec: &Codec| {
        let layout = codec.layout;
        let parts = layout.parts.iter().map(|p| {
            let per = match p.per {
                Per::Weight(1) => "1 bit per weight".to_owned(),
                Per::Weight(bits) => format!("{bits} bits per weight"),
                Per::Run(n) => format!("per {n} weights"),
                Per::Row(n) => format!("{n} per row"),
            };
            (p.name, p.dtype.name(), per)
        });
        let dict = PyDict::new(py);
        dict.set_item("name", codec.name)?;
        dict.set_item("version", codec.version)?;
        dict.set_item("summary", codec.summary)?;
        dict.set_item("layout", layout.name)?;
        dict.set_item("encoder", codec.encoder)?;
        dict.set_item("group", layout.group)?;
        dict.set_item("code_bits", layout.code_bits)?;
        dict.set_item("bits_per_weight", layout.bits_per_weight())?;
        dict.set_item("row_parameters", layout.has_row_parameters())?;
        dict.set_item("rebuild", layout.rebuild)?;
        dict.set_item("parts", parts.collect::<Vec<_>>())?;
        Ok(dict)
    };
    codec::ALL.iter().map(row).collect()
}

/// The instruction set in use, and all that this machine has.
#[pyfunction]
fn simd() -> (&'static str, Vec<&'static str>) {
    let all = codec::simd::Level::available().into_iter().map(codec::simd::Level::name).collect();
    (codec::simd::Level::detect().name(), all)
}

/// The exit code of each exception class.
#[pyfunction]
fn exit_codes() -> Vec<(&'static str, i32)> {
    Kind::ALL.iter().map(|&kind| (exception(kind), kind.exit_code())).collect()
}

/// Name, dtype, rows and elements per row of a codec's parts for a shape.
#[pyfunction]
fn part_shapes(
    py: Python<'_>,
    codec: &str,
    shape: Vec<usize>,
    axis: usize,
) -> PyResult<Vec<(&'static str, &'static str, usize, usize)>> {
    let shapes = || {
        let rows = Rows::new(&shape, axis)?;
        let parts = codec::find(codec)?.layout.parts.iter();
        Ok(parts.map(|p| (p.name, p.dtype.name(), rows.count(), p.per_row(rows.cols))).collect())
    };
    shapes().map_err(|e| to_py(py, e))
}

/// Exponent, squared error, squared norm; and the outputs' squared errors after and before error feedback, and their
/// squared norm.
type EncodeOutcome = (i32, f64, f64, Option<(f64, f64, f64)>);

/// Encodes an array into the buffers of its parts.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn encode(
    py: Python<'_>,
    data: Bytes,
    dtype: &str,
    shape: Vec<usize>,
    axis: usize,
    codec: &str,
    mut importance: Option<Vec<f32>>,
    second_moment: Option<Bytes>,
    output_moment: Option<Bytes>,
    tokens: Option<u64>,
    measure: bool,
    threads: usize,
    mut parts: Vec<BytesMut>,
) -> PyResult<EncodeOutcome> {
    let done = py.detach(|| {
        let tensor =
            Tensor { shape, encoding: Encoding::Plain(dtype_named(dtype)?), bytes: data.as_slice().into() };
        let codec = codec::find(codec)?;
        let rows = Rows::new(&tensor.shape, axis)?;
        let floats = |moment: &Bytes| -> Vec<f32> {
            moment.as_slice().as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()
        };
        let outputs = output_moment.as_ref().map(|m| Outputs::new(&floats(m), rows.count(), tokens, LAPACK));
        let outputs = outputs.transpose()?;
        let factor = match &second_moment {
            Some(moment) => {
                let (floats, cols) = (floats(moment), rows.cols);
                let factor = Factor::new(&floats, cols, tokens, LAPACK)?;
                importance.get_or_insert_with(|| floats.iter().step_by(cols + 1).copied().collect());
                Some(factor)
            }
            None => None,
        };
        if let Some(importance) = &mut importance {
            importance_of(importance);
        }
        let options = runner::Options {
            importance: importance.as_deref(),
            factor: factor.as_ref(),
            outputs: outputs.as_ref(),
            measure,
            meter: None,
        };
        let mut parts: Vec<&mut [u8]> = parts.iter_mut().map(BytesMut::as_mut_slice).collect();
        on_pool(threads, || runner::encode_into(&tensor, axis, codec, options, &mut parts))
    });
    let output = |o: OutputError| (o.error, o.before, o.norm);
    done.map(|o| (o.exponent, o.squared_error, o.squared_norm, o.output.map(output)))
        .map_err(|e| to_py(py, e))
}

/// Rebuilds an array from the buffers of its parts.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn decode(
    py: Python<'_>,
    codec: &str,
    exponent: i32,
    shape: Vec<usize>,
    axis: usize,
    parts: Vec<Bytes>,
    dtype: &str,
    threads: usize,
    mut out: BytesMut,
) -> PyResult<()> {
    let done = py.detach(|| {
        let parts: Vec<&[u8]> = parts.iter().map(Bytes::as_slice).collect();
        let (codec, dtype) = (codec::find(codec)?, dtype_named(dtype)?);
        on_pool(threads, || runner::decode(codec, exponent, &shape, axis, &parts, dtype, out.as_mut_slice()))
    });
    done.map_err(|e| to_py(py, e))
}

/// A model to compress: a path, or named arrays.
#[derive(FromPyObject)]
enum Source {
    Path(PathBuf),
    Arrays(Vec<(String, String, Vec<usize>, Bytes)>),
}

impl Source {
    fn open(self) -> crate::Result<Box<dyn Model>> {
        match self {
            Source::Path(path) => input::open(&path),
            Source::Arrays(arrays) => Ok(Box::new(MemoryModel::new(arrays)?)),
        }
    }
}

/// Compresses a model; returns the report as JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn compress(
    py: Python<'_>,
    source: Source,
    target: PathBuf,
    codec: &str,
    embeddings: &str,
    rules: Vec<(String, String)>,
    axes: Vec<(String, usize)>,
    threads: usize,
    force: bool,
    strict: bool,
    dry_run: bool,
    calibration: Option<(PathBuf, String)>,
    estimate: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let callback = Callback::new(progress);
    let done = py.detach(|| {
        let plan = plan::Options {
            codec: codec::find(codec)?,
            embeddings: choice(embeddings)?,
            rules: rules.iter().map(|(r, c)| Ok((pattern(r)?, choice(c)?))).collect::<crate::Result<_>>()?,
            axes: axes.iter().map(|(r, axis)| Ok((pattern(r)?, *axis))).collect::<crate::Result<_>>()?,
            strict,
        };
        let model = source.open()?;
        let calibration = match &calibration {
            Some((path, encoder)) => Some((Calibration::open(path)?, Encoder::from_name(encoder)?)),
            None => None,
        };
        let calibration = calibration.as_ref().map(|(statistics, encoder)| CalibrationOptions {
            statistics,
            encoder: *encoder,
            cholesky: LAPACK,
        });
        let options = CompressOptions { plan, threads, force, calibration, estimate };
        let progress = |done, total| callback.call(done, total);
        if dry_run {
            pipeline::dry_run(&*model, &options, &progress)
        } else {
            pipeline::compress(&*model, &target, &options, &progress)
        }
    });
    callback.finish(py, done).map(|report| json(&report))
}

/// Restores an artifact; returns the report as JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn decompress(
    py: Python<'_>,
    source: PathBuf,
    target: PathBuf,
    format: Option<&str>,
    dtype: Option<&str>,
    threads: usize,
    force: bool,
    shard_bytes: Option<u64>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let callback = Callback::new(progress);
    let done = py.detach(|| {
        let defaults = output::Options::default();
        let options = DecompressOptions {
            format: format.map(Format::from_name).transpose()?,
            dtype: dtype.map(dtype_named).transpose()?,
            threads,
            output: output::Options { force, shard_bytes: shard_bytes.unwrap_or(defaults.shard_bytes) },
        };
        let artifact = crate::ArtifactFile::open(&source)?;
        pipeline::decompress(&artifact, &target, &options, &|done, total| callback.call(done, total))
    });
    callback.finish(py, done).map(|report| json(&report))
}

fn json(report: &impl serde::Serialize) -> String {
    serde_json::to_string(report).expect("reports have string keys")
}

/// The format that a path's name asks `decompress` for.
#[pyfunction]
fn output_format(path: PathBuf) -> &'static str {
    Format::of(Path::new(&path)).name()
}

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add_class::<artifact::ArtifactFile>()?;
    m.add_class::<delta::DeltaModel>()?;
    m.add_class::<model::Model>()?;
    m.add_class::<wgpu::WgpuContext>()?;
    m.add_class::<wgpu::WgpuWeight>()?;
    m.add_function(wrap_pyfunction!(codecs, m)?)?;
    m.add_function(wrap_pyfunction!(compress, m)?)?;
    m.add_function(wrap_pyfunction!(decode, m)?)?;
    m.add_function(wrap_pyfunction!(decompress, m)?)?;
    m.add_function(wrap_pyfunction!(encode, m)?)?;
    m.add_function(wrap_pyfunction!(exit_codes, m)?)?;
    m.add_function(wrap_pyfunction!(kernels::cuda_source, m)?)?;
    m.add_function(wrap_pyfunction!(kernels::exponent, m)?)?;
    m.add_function(wrap_pyfunction!(kernels::tables, m)?)?;
    m.add_function(wrap_pyfunction!(delta::make_delta, m)?)?;
    m.add_function(wrap_pyfunction!(delta::materialize, m)?)?;
    m.add_function(wrap_pyfunction!(output_format, m)?)?;
    m.add_function(wrap_pyfunction!(part_shapes, m)?)?;
    m.add_function(wrap_pyfunction!(artifact::replace_parts, m)?)?;
    m.add_function(wrap_pyfunction!(simd, m)?)?;
    m.add_function(wrap_pyfunction!(wgpu::wgpu_adapters, m)?)?;
    Ok(())
}
