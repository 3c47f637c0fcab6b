//! Progress callbacks, signals, and the exceptions that either raises.

use super::to_py;
use crate::error::{Error, Kind, Result};
use pyo3::prelude::*;
use std::sync::Mutex;

/// A Python callable of weights done and in all, or none; signals are looked at either way.
pub struct Callback {
    callable: Option<Py<PyAny>>,
    raised: Mutex<Option<PyErr>>,
}

impl Callback {
    /// Around a callable.
    pub fn new(callable: Option<Py<PyAny>>) -> Self {
        Callback { callable, raised: Mutex::new(None) }
    }

    /// Calls it; what it raises is kept for [`Callback::finish`].
    pub fn call(&self, done: u64, total: u64) -> Result<()> {
        let called = Python::attach(|py| {
            py.check_signals()?;
            match &self.callable {
                Some(callable) => callable.call1(py, (done, total)).map(drop),
                None => Ok(()),
            }
        });
        called.map_err(|raised| {
            *self.raised.lock().unwrap_or_else(|e| e.into_inner()) = Some(raised);
            Error::new(Kind::Interrupted, "interrupted")
        })
    }

    /// The work's result, or what a call raised.
    pub fn finish<T>(self, py: Python<'_>, result: Result<T>) -> PyResult<T> {
        let raised = self.raised.into_inner().unwrap_or_else(|e| e.into_inner());
        result.map_err(|error| raised.unwrap_or_else(|| to_py(py, error)))
    }
}
