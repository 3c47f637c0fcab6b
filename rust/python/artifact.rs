//! An open artifact as Python sees it: its index as JSON, its bytes as a buffer, decoding into arrays.

use super::buffers::{Bytes, BytesMut};
use super::progress::Callback;
use super::{dtype_named, on_pool, to_py};
use crate::ArtifactFile as Core;
use crate::artifact::{self, Entry, Limits, PartRef};
use crate::delta;
use crate::tensor::Rows;
use pyo3::ffi;
use pyo3::prelude::*;
use serde_json::{Value, json};
use std::ffi::c_int;
use std::path::PathBuf;

/// Whether an entry is coded in a way of deltas that this build knows.
fn of_delta(file: &Core, entry: &Entry) -> bool {
    file.delta().is_some() && delta::Method::of(entry).is_ok()
}

/// An open artifact; a buffer over the whole file, read-only.
#[pyclass(frozen, module = "tenpak._core")]
pub struct ArtifactFile(Core);

#[pymethods]
impl ArtifactFile {
    #[new]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let opened = py.detach(|| Core::open_with(&path, &Limits::default()));
        opened.map(ArtifactFile).map_err(|e| to_py(py, e))
    }

    /// The index and what follows from it, as JSON.
    fn index(&self) -> String {
        let part = |p: &PartRef| json!({"off": p.off, "len": p.len});
        let tensors: Vec<Value> = self
            .0
            .tensors()
            .iter()
            .map(|e| {
                let known = e.known_codec();
                let rows = e.extents().ok().and_then(|shape| Rows::new(&shape, e.axis as usize).ok());
                let parts: Vec<Value> = e
                    .parts_in_order()
                    .into_iter()
                    .map(|(name, p)| {
                        let declared = known.and_then(|c| c.layout.parts.iter().find(|d| d.name == name));
                        let (dtype, shape) = match (declared, &rows) {
                            (Some(d), Some(rows)) => {
                                (d.dtype.name(), vec![rows.count(), d.per_row(rows.cols)])
                            }
                            _ if e.is_kept() => {
                                (e.dtype.name(), e.shape.iter().map(|&n| n as usize).collect())
                            }
                            _ => ("U8", vec![p.len as usize]),
                        };
                        json!({"name": name, "dtype": dtype, "shape": shape, "at": part(p)})
                    })
                    .collect();
                json!({
                    "name": e.name, "shape": e.shape, "dtype": e.dtype.name(), "codec": e.codec,
                    "codec_version": e.codec_version, "axis": e.axis, "params": e.params, "parts": parts,
                    "exponent": e.exponent(), "known": known.is_some() || e.is_kept() || of_delta(&self.0, e),
                })
            })
            .collect();
        let files: Vec<Value> =
            self.0.files().iter().map(|f| json!({"path": f.path, "at": part(&f.part)})).collect();
        json!({
            "version": self.0.version(), "codec": self.0.codec(), "writer": self.0.writer(),
            "root": self.0.root().iter().map(|b| format!("{b:02x}")).collect::<String>(),
            "file_len": self.0.file_len(), "index_len": self.0.index_len(),
            "tensors": tensors, "aliases": self.0.aliases(), "files": files, "delta": self.0.delta(),
        })
        .to_string()
    }

    /// The name of the tensor that a name or alias stands for.
    fn resolve(&self, py: Python<'_>, name: &str) -> PyResult<String> {
        self.0.find(name).map(|e| e.name.clone()).map_err(|e| to_py(py, e))
    }

    /// Rebuilds a tensor into a buffer, after checking its bytes.
    fn decode(
        &self,
        py: Python<'_>,
        name: &str,
        dtype: &str,
        threads: usize,
        mut out: BytesMut,
    ) -> PyResult<()> {
        let done = py.detach(|| {
            let (entry, dtype) = (self.0.find(name)?, dtype_named(dtype)?);
            on_pool(threads, || self.0.decode(entry, dtype, out.as_mut_slice()))
        });
        done.map_err(|e| to_py(py, e))
    }

    /// Checks a part or a file by its place in the index, so that its bytes may be used.
    fn check(&self, py: Python<'_>, name: &str, part: Option<&str>) -> PyResult<()> {
        let done = py.detach(|| {
            let found = match part {
                Some(part) => self.0.find(name)?.parts.get(part),
                None => self.0.files().iter().find(|f| f.path == name).map(|f| &f.part),
            };
            let missing = || crate::Error::usage(format!("{name:?} has no part {part:?}"));
            self.0.checked_part(found.ok_or_else(missing)?, name).map(drop)
        });
        done.map_err(|e| to_py(py, e))
    }

    /// In a delta: how the chunks of a tensor are coded, how many in each way, and their bytes.
    fn chunk_kinds(&self, py: Python<'_>, name: &str) -> PyResult<Vec<(&'static str, u64, u64)>> {
        let kinds = py.detach(|| delta::chunk_kinds(&self.0, self.0.find(name)?));
        kinds.map_err(|e| to_py(py, e))
    }

    /// Checks every byte; returns tensors, parts, files and bytes.
    fn verify(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<(usize, usize, usize, u64)> {
        let callback = Callback::new(progress);
        let done = py.detach(|| self.0.verify(&|done, total| callback.call(done, total)));
        callback.finish(py, done).map(|r| (r.tensors, r.parts, r.files, r.bytes))
    }

    /// The whole file, for zero-copy views.
    ///
    /// # Safety
    /// Called by Python with a valid view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let bytes = slf.get().0.bytes();
        let (start, len) = (bytes.as_ptr().cast_mut().cast(), bytes.len() as isize);
        // SAFETY: the bytes live as long as the object, to which the view takes a reference; it is read-only.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, 1, flags) };
        if filled == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }
}

/// Writes an artifact again with some parts, by the names of tensor and part, replaced; returns its root in
/// hexadecimal and its bytes.
#[pyfunction]
pub fn replace_parts(
    py: Python<'_>,
    source: PathBuf,
    target: PathBuf,
    parts: Vec<(String, String, Bytes)>,
    force: bool,
) -> PyResult<(String, u64)> {
    let done = py.detach(|| {
        let parts = parts.iter().map(|(tensor, part, b)| ((tensor.clone(), part.clone()), b.as_slice()));
        artifact::replaced(&Core::open(&source)?, &target, force, &parts.collect())
    });
    let finished = done.map_err(|e| to_py(py, e))?;
    Ok((finished.root.iter().map(|b| format!("{b:02x}")).collect(), finished.file_len))
}
