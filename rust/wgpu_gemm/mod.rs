//! Products with quantised weights on any GPU that Vulkan, Metal or DX12 reach, through `wgpu` and WGSL.
//!
//! ```no_run
//! # async fn example(x: Vec<f32>, w_packed: Vec<u8>, scales: Vec<f32>, offsets: Vec<f32>, m: usize, n: usize, k: usize)
//! # -> tenpak::Result<()> {
//! use tenpak::wgpu_gemm::G8GemmContext;
//!
//! let ctx = G8GemmContext::new().await?;
//! let y = ctx.gemm(&x, &w_packed, &scales, &offsets, m, n, k).await?;
//! # Ok(()) }
//! ```
//!
//! [`G8GemmContext`] uploads the weight with every call. [`Context`] keeps weights of every layout of the codec table
//! in GPU memory ([`Weight`]), and a [`Batch`] puts many products into one submission.
//!
//! Without the Cargo feature `gpu` all names exist, and making a context fails with a sentence that says so. No runtime
//! is needed: a future that this module returns does its waiting when it is polled, so [`block_on`] will do.

#[cfg(feature = "gpu")]
mod batch;
mod blocking;
#[cfg(feature = "gpu")]
mod context;
#[cfg(feature = "gpu")]
mod digits;
#[cfg(feature = "gpu")]
mod form;
mod g8;
#[cfg(feature = "gpu")]
mod kernels;
#[cfg(feature = "gpu")]
mod template;
#[cfg(feature = "gpu")]
mod weight;

#[cfg(not(feature = "gpu"))]
mod absent;

#[cfg(not(feature = "gpu"))]
pub use absent::{Batch, Context, Weight, adapters};
#[cfg(feature = "gpu")]
pub use batch::Batch;
pub use blocking::block_on;
#[cfg(feature = "gpu")]
pub use context::{Context, adapters};
pub use g8::G8GemmContext;
#[cfg(feature = "gpu")]
pub use weight::Weight;

/// What an adapter says of itself.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// The GPU's name.
    pub name: String,
    /// `vulkan`, `metal` or `dx12`.
    pub backend: String,
    /// `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: &'static str,
    /// The driver and its version.
    pub driver: String,
    /// Whether shaders have half-precision arithmetic.
    pub half: bool,
    /// Whether shaders have subgroup operations.
    pub subgroups: bool,
    /// Whether the GPU's own clock can be read.
    pub timestamps: bool,
    /// The most bytes of a weight that one binding holds; larger weights are cut into slabs of rows.
    pub binding_bytes: u64,
}

/// Which GPU to choose where no name is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Power {
    /// The fastest: a discrete one before an integrated one.
    #[default]
    High,
    /// The most frugal: an integrated one before a discrete one.
    Low,
}

/// What products of many tokens are computed in; inputs, outputs and long sums are FP32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Half precision for products and sums of eight, where the adapter has it and no such sum can overflow.
    #[default]
    Auto,
    /// FP32 throughout.
    Full,
}

/// How to open a [`Context`].
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A part of the adapter's name or backend, in any case; the variable `TENPAK_WGPU_ADAPTER` where it is `None`.
    pub adapter: Option<String>,
    /// Which adapter to take where neither names one.
    pub power: Power,
    /// What products are computed in.
    pub precision: Precision,
    /// A limit on bindings below the adapter's own, which forces slabs; for tests.
    pub binding_bytes: Option<u64>,
    /// To leave subgroup operations unused although the adapter has them; for tests.
    pub without_subgroups: bool,
}

/// The variable that names an adapter.
pub const ADAPTER_VARIABLE: &str = "TENPAK_WGPU_ADAPTER";
