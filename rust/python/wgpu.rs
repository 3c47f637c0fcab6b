//! Products through wgpu: arrays come as buffers of FP32, and the interpreter is free while the GPU works.

use super::buffers::{Bytes, BytesMut};
use super::to_py;
use crate::codec;
use crate::error::Error;
use crate::wgpu_gemm::{AdapterInfo, Context, Options, Power, Precision, Weight, adapters, block_on};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;

fn dictionary<'py>(py: Python<'py>, info: &AdapterInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &info.name)?;
    dict.set_item("backend", &info.backend)?;
    dict.set_item("kind", info.kind)?;
    dict.set_item("driver", &info.driver)?;
    dict.set_item("half", info.half)?;
    dict.set_item("subgroups", info.subgroups)?;
    dict.set_item("timestamps", info.timestamps)?;
    dict.set_item("binding_bytes", info.binding_bytes)?;
    Ok(dict)
}

/// Every adapter, a dictionary each.
#[pyfunction]
pub fn wgpu_adapters(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let all = py.detach(adapters).map_err(|e| to_py(py, e))?;
    all.iter().map(|info| dictionary(py, info)).collect()
}

/// An open adapter.
#[pyclass(frozen, module = "tenpak._core")]
pub struct WgpuContext(Arc<Context>);

/// A weight in its memory.
#[pyclass(frozen, module = "tenpak._core")]
pub struct WgpuWeight(Weight);

/// FP32 numbers of a buffer of bytes.
fn floats(bytes: &Bytes) -> Vec<f32> {
    bytes.as_slice().as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()
}

#[pymethods]
impl WgpuContext {
    #[new]
    fn new(
        py: Python<'_>,
        adapter: Option<String>,
        low_power: bool,
        full_precision: bool,
        binding_bytes: Option<u64>,
    ) -> PyResult<Self> {
        let options = Options {
            adapter,
            power: if low_power { Power::Low } else { Power::High },
            precision: if full_precision { Precision::Full } else { Precision::Auto },
            binding_bytes,
            without_subgroups: false,
        };
        let opened = py.detach(|| block_on(Context::new(options)));
        opened.map(|context| WgpuContext(Arc::new(context))).map_err(|e| to_py(py, e))
    }

    fn adapter<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        dictionary(py, self.0.adapter())
    }

    /// Uploads rows of a codec's parts.
    fn weight(
        &self,
        py: Python<'_>,
        codec: &str,
        parts: Vec<Bytes>,
        rows: usize,
        cols: usize,
        exponent: i32,
    ) -> PyResult<WgpuWeight> {
        let done = py.detach(|| {
            let parts: Vec<&[u8]> = parts.iter().map(Bytes::as_slice).collect();
            self.0.weight(codec::find(codec)?.layout, &parts, rows, cols, exponent)
        });
        done.map(WgpuWeight).map_err(|e| to_py(py, e))
    }

    /// y = x Wᵀ for each of some products, in one submission: inputs, tokens, weights and outputs.
    fn matmul(
        &self,
        py: Python<'_>,
        products: Vec<(Bytes, usize, Py<WgpuWeight>)>,
        mut outs: Vec<BytesMut>,
    ) -> PyResult<()> {
        let done = py.detach(|| {
            let mut batch = self.0.batch();
            for (x, tokens, weight) in &products {
                batch.matmul(&floats(x), *tokens, &weight.get().0)?;
            }
            for (y, out) in block_on(batch.submit())?.iter().zip(&mut outs) {
                let out = out.as_mut_slice();
                if out.len() != 4 * y.len() {
                    return Err(Error::usage(format!("out has {} bytes, not {}", out.len(), 4 * y.len())));
                }
                for (to, y) in out.as_chunks_mut().0.iter_mut().zip(y) {
                    *to = y.to_ne_bytes();
                }
            }
            Ok(())
        });
        done.map_err(|e| to_py(py, e))
    }

    /// Seconds of a product on the GPU's clock, one for each round.
    fn time(
        &self,
        py: Python<'_>,
        weights: Vec<Py<WgpuWeight>>,
        tokens: usize,
        rounds: usize,
    ) -> PyResult<Vec<f64>> {
        let done = py.detach(|| {
            let weights: Vec<&Weight> = weights.iter().map(|w| &w.get().0).collect();
            block_on(self.0.time(&weights, tokens, rounds))
        });
        done.map_err(|e| to_py(py, e))
    }
}

#[pymethods]
impl WgpuWeight {
    fn nbytes(&self) -> u64 {
        self.0.bytes()
    }

    fn slabs(&self) -> usize {
        self.0.slabs()
    }
}
