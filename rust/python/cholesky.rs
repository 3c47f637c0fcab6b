//! Cholesky factors from NumPy's LAPACK.
//!
//! NumPy is there anyway, so this costs no build time, and its factors are fast; a Rust library of linear algebra
//! would double the time of a first build.

use crate::codec::Cholesky;
use crate::error::{Error, Kind, Result};
use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;

/// See [`crate::codec::Cholesky`].
pub const LAPACK: Cholesky<'static> = &lower_factor;

fn lower_factor(matrix: &mut [f64], n: usize) -> Result<bool> {
    Python::attach(|py| -> PyResult<bool> {
        // SAFETY: the memory is ours, of that length and writable; the view is released below, and that fails if
        // anything has kept a hold on it.
        let view = unsafe {
            let bytes = size_of_val(matrix).cast_signed();
            Bound::from_owned_ptr_or_err(
                py,
                ffi::PyMemoryView_FromMemory(matrix.as_mut_ptr().cast(), bytes, ffi::PyBUF_WRITE),
            )?
        };
        let found = py.import("tenpak.lapack")?.getattr("lower_factor")?.call1((&view, n))?.extract();
        view.call_method0("release")?;
        found
    })
    .map_err(|e| {
        let kind =
            Python::attach(
                |py| {
                    if e.is_instance_of::<PyMemoryError>(py) { Kind::Io } else { Kind::Unsupported }
                },
            );
        Error::new(kind, format!("NumPy could not factorise a second moment of {n} columns: {e}"))
    })
}
