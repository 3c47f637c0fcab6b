//! Which kernel computes a product, compiled once for each layout and configuration.

use super::context::Context;
use super::form::{Form, OCTET, QUAD};
use super::template::{Constant, expand};
use crate::error::Result;
use std::borrow::Cow;
use std::sync::Arc;

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!($name))),*]
    };
}

static SOURCES: &[(&str, &str)] = sources![
    "affine_bytes.wgsl",
    "affine_half.wgsl",
    "bytes.wgsl",
    "common.wgsl",
    "gemm.wgsl",
    "gemv.wgsl",
    "tables.wgsl",
];

/// Up to so many tokens a kernel for few is used.
const FEW: usize = 4;

/// Rows of a tile of gemm.wgsl.
const TILE_ROWS: usize = 64;

/// A kernel and its constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    form: Form,
    kernel: Kernel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kernel {
    /// gemv.wgsl.
    Few { threads: u32, quads: u32, units: u32, tokens: u32, subgroups: bool },
    /// gemm.wgsl.
    Many { columns: u32, tokens: u32, half: bool },
}

/// The variable that names a folder to read kernels from, so that one can edit them without a rebuild.
const FOLDER_VARIABLE: &str = "TENPAK_WGSL_DIR";

/// The text of a WGSL file of this folder.
fn source(name: &str) -> Cow<'static, str> {
    if let Some(folder) = std::env::var_os(FOLDER_VARIABLE)
        && let Ok(text) = std::fs::read_to_string(std::path::Path::new(&folder).join(name))
    {
        return text.into();
    }
    let known = SOURCES.iter().find(|(known, _)| *known == name);
    known.expect("a file of this folder").1.into()
}

/// Whether so many tokens are for gemv.wgsl, which computes in FP32 alone.
pub fn is_few(tokens: usize) -> bool {
    tokens <= FEW
}

impl Config {
    /// The kernel for `tokens` tokens times a weight of `form` with rows of `octets`.
    pub fn choose(context: &Context, form: Form, octets: usize, tokens: usize, half: bool) -> Config {
        let limits = context.device.limits();
        let room = limits.max_compute_workgroup_storage_size - form.workgroup_bytes();
        let kernel = if is_few(tokens) {
            let units = if octets >= 256 { 4 } else { 1 };
            // Each thread takes two rounds of units or more, and a workgroup no fewer than a subgroup of most GPUs.
            let threads = (octets as u32 / (2 * units)).next_power_of_two().clamp(32, 256);
            let threads = threads.min(1 << limits.max_compute_invocations_per_workgroup.ilog2());
            let subgroups = context.subgroups();
            let tokens = (tokens as u32).next_power_of_two();
            let quads = if tokens == 1 { 1 } else { 2 };
            Kernel::Few { threads, quads, units, tokens, subgroups }
        } else {
            let tokens = (tokens as u32).next_power_of_two().clamp(16, 64);
            // The most columns that workgroup memory holds.
            let bytes = (TILE_ROWS as u32 + tokens) * if half { 2 } else { 4 };
            let columns = [64, 32, 16, 8].into_iter().find(|c| c * bytes <= room.min(16 << 10)).unwrap_or(8);
            Kernel::Many { columns, tokens, half }
        };
        Config { form, kernel }
    }

    /// Workgroups for `quads` quads of rows and `tokens` tokens.
    pub fn workgroups(self, quads: usize, tokens: usize) -> [u32; 3] {
        let (per_group, at_once) = match self.kernel {
            Kernel::Few { quads, tokens, .. } => (quads as usize, tokens as usize),
            Kernel::Many { tokens, .. } => (TILE_ROWS / QUAD, tokens as usize),
        };
        [quads.div_ceil(per_group) as u32, tokens.div_ceil(at_once) as u32, 1]
    }

    fn source(self, magic: bool) -> String {
        let mut constants: Vec<Constant> = self.form.constants();
        let mut set = |name, value: u32| constants.push((name, value.to_string()));
        set("MAGIC", magic.into());
        let (kernel, extensions) = match self.kernel {
            Kernel::Few { threads, quads, units, tokens, subgroups } => {
                set("THREADS", threads);
                set("QUADS", quads);
                set("UNITS", units);
                set("TOKENS", tokens);
                set("LAST_UNIT", (units - 1) * threads);
                set("STEP", units * threads);
                set("SUBGROUPS", subgroups.into());
                set("SUMS_PER_THREAD", quads * tokens);
                // A subgroup has four lanes or more.
                set("SUMS", quads * tokens * if subgroups { threads.div_ceil(4) } else { threads });
                ("gemv.wgsl", "")
            }
            Kernel::Many { columns, tokens, half } => {
                set("COLUMNS", columns);
                set("TOKENS", tokens);
                set("THREADS", (TILE_ROWS / QUAD) as u32 * tokens / OCTET as u32);
                set("HALF", half.into());
                constants.push(("TILE", if half { "f16" } else { "f32" }.into()));
                ("gemm.wgsl", if half { "enable f16;\n" } else { "" })
            }
        };
        let text = ["common.wgsl", self.form.prelude(), kernel].map(source).join("\n");
        extensions.to_owned() + &expand(&text, &constants)
    }

    /// The compiled kernel.
    pub fn pipeline(self, context: &Context) -> Result<Arc<wgpu::ComputePipeline>> {
        let mut pipelines = context.pipelines.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(found) = pipelines.get(&self) {
            return Ok(found.clone());
        }
        let source = self.source(context.keeps_order());
        let pipeline = context.guarded("compile a kernel", || {
            let checks = wgpu::ShaderRuntimeChecks::unchecked();
            let source = wgpu::ShaderSource::Wgsl(source.into());
            let descriptor = wgpu::ShaderModuleDescriptor { label: None, source };
            // SAFETY: kernels read and write inside the sizes that `Batch::matmul` made their buffers for: quads and
            // tokens are clamped to the last, octets end at the row's, and all loops end.
            let module = unsafe { context.device.create_shader_module_trusted(descriptor, checks) };
            context.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: None,
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            })
        })?;
        let pipeline = Arc::new(pipeline);
        pipelines.insert(self, pipeline.clone());
        Ok(pipeline)
    }
}
