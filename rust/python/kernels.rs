//! What CUDA kernels are made from: their sources, which travel in the extension, and the core's constants.

use super::to_py;
use crate::codec;
use crate::error::Error;
use pyo3::prelude::*;

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../cuda/", $name)))),*]
    };
}

static SOURCES: &[(&str, &str)] = sources![
    "activation.cuh",
    "append.cu",
    "attention.cu",
    "attention_prefill.cu",
    "boxes.cuh",
    "cache.cuh",
    "cluster.cuh",
    "columns.cuh",
    "decode.cu",
    "dense.cu",
    "embed.cu",
    "encode.cu",
    "engine.cuh",
    "experts.cuh",
    "few.cuh",
    "floats.cuh",
    "gate.cu",
    "halves.cuh",
    "hopper.cuh",
    "integers.cuh",
    "layouts.cuh",
    "newest.cuh",
    "norm.cu",
    "normed.cuh",
    "output.cuh",
    "overlap.cuh",
    "pack.cu",
    "product.cu",
    "reduce.cuh",
    "ring.cuh",
    "rows.cu",
    "sample.cu",
    "skinny.cu",
    "sums.cuh",
    "tiled.cu",
    "tokens.cuh",
    "warp.cuh",
    "weights.cuh",
    "wide.cu",
];

/// The text of a file of cuda/.
#[pyfunction]
pub fn cuda_source(py: Python<'_>, name: &str) -> PyResult<&'static str> {
    let found = SOURCES.iter().find(|(known, _)| *known == name);
    let names = || SOURCES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    found
        .map(|(_, text)| *text)
        .ok_or_else(|| to_py(py, Error::usage(format!("no CUDA source {name:?}; there are {}", names()))))
}

/// The tables that codes of a layout index, sixteen values each; none where it has none.
#[pyfunction]
pub fn tables(layout: &str) -> Vec<Vec<i8>> {
    let known = codec::ALL.iter().map(|codec| codec.layout).find(|known| known.name == layout);
    known.and_then(|layout| layout.tables).into_iter().flatten().map(|table| table.to_vec()).collect()
}

/// The exponent that a codec gives a tensor whose largest magnitude is that.
#[pyfunction]
pub fn exponent(py: Python<'_>, codec: &str, largest: f32) -> PyResult<i32> {
    let codec = codec::find(codec).map_err(|e| to_py(py, e))?;
    Ok(codec::Range::of(&[largest]).exponent(codec.layout.normal_from))
}
