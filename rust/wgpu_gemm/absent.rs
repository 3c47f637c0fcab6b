//! The names of this module in a build without the feature `gpu`: a context cannot be made.

use super::{AdapterInfo, Options};
use crate::codec::Layout;
use crate::error::{Error, Result};
use std::convert::Infallible;

fn absent() -> Error {
    Error::unsupported(
        "this build has no wgpu kernels; build with the Cargo feature gpu (for Python: maturin build --release --features python,gpu)",
    )
}

/// See the feature `gpu`.
///
/// # Errors
/// Always: this build has none.
pub fn adapters() -> Result<Vec<AdapterInfo>> {
    Err(absent())
}

/// A device; none can be made in this build.
#[derive(Debug)]
pub struct Context(Infallible);

/// A weight in GPU memory; none can be made in this build.
#[derive(Debug)]
pub struct Weight(Infallible);

/// Products for one submission; none can be made in this build.
#[derive(Debug)]
pub struct Batch<'a>(Infallible, std::marker::PhantomData<&'a Context>);

impl Context {
    /// Fails.
    ///
    /// # Errors
    /// Always: this build has no kernels.
    pub async fn new(_options: Options) -> Result<Context> {
        Err(absent())
    }

    /// What the adapter says of itself.
    pub fn adapter(&self) -> &AdapterInfo {
        match self.0 {}
    }

    /// Uploads a weight.
    ///
    /// # Errors
    /// Never called.
    pub fn weight(
        &self,
        _layout: &'static Layout,
        _parts: &[&[u8]],
        _rows: usize,
        _cols: usize,
        _exponent: i32,
    ) -> Result<Weight> {
        match self.0 {}
    }

    /// y = x Wᵀ.
    ///
    /// # Errors
    /// Never called.
    pub async fn matmul(&self, _x: &[f32], _tokens: usize, _weight: &Weight) -> Result<Vec<f32>> {
        match self.0 {}
    }

    /// An empty batch.
    pub fn batch(&self) -> Batch<'_> {
        match self.0 {}
    }

    /// Seconds of one product.
    ///
    /// # Errors
    /// Never called.
    pub async fn time(&self, _weights: &[&Weight], _tokens: usize, _rounds: usize) -> Result<Vec<f64>> {
        match self.0 {}
    }

    /// Gives the device back.
    pub fn close(&self) {
        match self.0 {}
    }
}

impl Weight {
    /// [out, in].
    pub fn shape(&self) -> (usize, usize) {
        match self.0 {}
    }

    /// The layout.
    pub fn layout(&self) -> &'static Layout {
        match self.0 {}
    }

    /// Bytes in GPU memory.
    pub fn bytes(&self) -> u64 {
        match self.0 {}
    }

    /// How many slabs of rows it is cut into.
    pub fn slabs(&self) -> usize {
        match self.0 {}
    }
}

impl Batch<'_> {
    /// Adds a product.
    ///
    /// # Errors
    /// Never called.
    pub fn matmul(&mut self, _x: &[f32], _tokens: usize, _weight: &Weight) -> Result<()> {
        match self.0 {}
    }

    /// Computes them all.
    ///
    /// # Errors
    /// Never called.
    pub async fn submit(self) -> Result<Vec<Vec<f32>>> {
        match self.0 {}
    }
}
