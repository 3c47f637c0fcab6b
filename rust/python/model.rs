//! A model of any input format as Python sees it: names and shapes, and weights read one at a time as FP32.

use super::buffers::BytesMut;
use super::{on_pool, to_py};
use crate::error::Error;
use crate::input;
use crate::runner;
use pyo3::prelude::*;
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::PathBuf;

/// An open model.
#[pyclass(frozen, module = "tenpak._core")]
pub struct Model {
    core: Box<dyn input::Model>,
    places: HashMap<String, usize>,
}

#[pymethods]
impl Model {
    #[new]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let core = py.detach(|| input::open(&path)).map_err(|e| to_py(py, e))?;
        let names = core.tensors().iter().enumerate();
        let places = names.map(|(place, tensor)| (tensor.name.clone(), place)).collect();
        Ok(Model { core, places })
    }

    /// The format's name, for people.
    fn format(&self) -> &'static str {
        self.core.format()
    }

    /// Each tensor's name, shape and spelling of its elements.
    fn tensors(&self) -> Vec<(String, Vec<usize>, &'static str)> {
        let tensors = self.core.tensors().iter();
        tensors.map(|t| (t.name.clone(), t.shape.clone(), t.encoding.name())).collect()
    }

    /// Writes a tensor into a buffer as FP32.
    fn read(&self, py: Python<'_>, name: &str, threads: usize, mut out: BytesMut) -> PyResult<()> {
        let done = py.detach(|| {
            let missing = || Error::usage(format!("there is no tensor {name:?} in this model"));
            let tensor = self.core.read(*self.places.get(name).ok_or_else(missing)?)?;
            on_pool(threads, || runner::widen_into(&tensor, out.as_mut_slice()))
        });
        done.map_err(|e| to_py(py, e))
    }

    /// BLAKE3 of all tensors, in hexadecimal.
    fn digest(&self, py: Python<'_>) -> PyResult<String> {
        let digest = py.detach(|| on_pool(0, || input::digest(&*self.core))).map_err(|e| to_py(py, e))?;
        Ok(digest.iter().map(|b| format!("{b:02x}")).collect())
    }

    /// What people should know of the model, a sentence each.
    fn notes(&self) -> Vec<String> {
        self.core.notes()
    }

    /// `config.json`, if the model has one.
    fn config(&self) -> Option<String> {
        self.core.config().map(ToString::to_string)
    }

    /// A file that travels with the weights, if it is there.
    fn sidecar(&self, py: Python<'_>, path: &str) -> PyResult<Option<Cow<'static, [u8]>>> {
        let files = py.detach(|| self.core.sidecars()).map_err(|e| to_py(py, e))?;
        Ok(files.into_iter().find(|f| f.path == path).map(|f| f.bytes.into()))
    }
}
