//! Making and applying deltas from Python.

use super::buffers::BytesMut;
use super::progress::Callback;
use super::{Source, json, on_pool, to_py};
use crate::delta::{self, MaterializeOptions, Mode, Trust};
use crate::error::Error;
use crate::input::Model;
use crate::output;
use crate::pipeline::{hex, named, plain};
use pyo3::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

/// Makes a delta; returns the report as JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn make_delta(
    py: Python<'_>,
    base: Vec<PathBuf>,
    source: Source,
    target: PathBuf,
    mode: &str,
    threads: usize,
    force: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let callback = Callback::new(progress);
    let done = py.detach(|| {
        let mode = Mode::from_name(mode).map_err(|e| Error::usage(e.to_string()))?;
        let model = source.open()?;
        let options = delta::Options { mode, threads, force };
        delta::delta(&base, &*model, &target, &options, &|done, total| callback.call(done, total))
    });
    callback.finish(py, done).map(|report| json(&report))
}

/// Restores what a base with deltas on it gives; returns the report as JSON.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub fn materialize(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    target: PathBuf,
    format: Option<String>,
    threads: usize,
    force: bool,
    shard_bytes: Option<u64>,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let callback = Callback::new(progress);
    let done = py.detach(|| {
        let defaults = output::Options::default();
        let output = output::Options { force, shard_bytes: shard_bytes.unwrap_or(defaults.shard_bytes) };
        let options = MaterializeOptions { format, threads, output };
        delta::materialize(&paths, &target, &options, &|done, total| callback.call(done, total))
    });
    callback.finish(py, done).map(|report| json(&report))
}

/// A base with deltas on it, of which single tensors are restored when they are read.
#[pyclass(frozen, module = "tenpak._core")]
pub struct DeltaModel {
    model: Box<dyn Model>,
    places: HashMap<String, usize>,
    identity: String,
}

#[pymethods]
impl DeltaModel {
    #[new]
    fn open(py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<Self> {
        let opened = py.detach(|| {
            let chain = delta::open(&paths, Trust::Nothing)?;
            let identity = chain.identity.map_or(String::new(), |digest| hex(&digest));
            Ok((chain.content.into_model()?, identity))
        });
        let (model, identity) = opened.map_err(|e| to_py(py, e))?;
        let places = model.tensors().iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(DeltaModel { model, places, identity })
    }

    /// The result's identity, in hexadecimal.
    fn identity(&self) -> &str {
        &self.identity
    }

    /// Each tensor's name, shape and dtype.
    fn tensors(&self) -> Vec<(String, Vec<usize>, &'static str)> {
        let tensors = self.model.tensors().iter();
        tensors.map(|t| (t.name.clone(), t.shape.clone(), t.encoding.dtype().name())).collect()
    }

    /// Restores a tensor into a buffer, in its own dtype.
    fn read(&self, py: Python<'_>, name: &str, threads: usize, mut out: BytesMut) -> PyResult<()> {
        let done = py.detach(|| {
            let index = *self
                .places
                .get(name)
                .ok_or_else(|| Error::usage(format!("there is no tensor {name:?} in this delta")))?;
            on_pool(threads, || {
                let bytes = plain(self.model.read(index)?);
                let out = out.as_mut_slice();
                if out.len() != bytes.len() {
                    return Err(named(Error::usage(format!("it has {} bytes", bytes.len())), name));
                }
                out.copy_from_slice(&bytes);
                Ok(())
            })
        });
        done.map_err(|e| to_py(py, e))
    }

    /// The files that come with the result.
    fn files(&self, py: Python<'_>) -> PyResult<Vec<(String, Cow<'static, [u8]>)>> {
        let files = py.detach(|| self.model.sidecars()).map_err(|e| to_py(py, e))?;
        Ok(files.into_iter().map(|f| (f.path, f.bytes.into())).collect())
    }
}
