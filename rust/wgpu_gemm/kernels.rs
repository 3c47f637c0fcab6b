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

/// Workgroups of a product of few tokens with tables, large ones, for each writes tables of its own: about as many as an
/// H200 has multiprocessors.
const TABLE_GROUPS: usize = 128;

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
    Few(Few),
    /// gemm.wgsl.
    Many { columns: u32, tokens: u32, half: bool },
}

/// How a product of few tokens is shared among threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Few {
    threads: u32,
    /// Quads that a thread computes together, and units of each that it reads before it uses the first.
    quads: u32,
    units: u32,
    tokens: u32,
    /// The least lanes of a subgroup; one where there are no subgroups.
    lanes: u32,
    /// Subgroups that share quads; without subgroups all threads do.
    split: u32,
    /// Copies of tables in workgroup memory; 0 where there are no tables.
    replicas: u32,
    /// Whether workgroup memory holds integers of sixteen bits.
    short: bool,
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

/// Whether so many tokens are for gemv.wgsl, which multiplies integers.
pub fn is_few(tokens: usize) -> bool {
    tokens <= FEW
}

impl Config {
    /// The kernel for `tokens` tokens times slabs of `quads` quads of `form`, whose rows have `octets`.
    pub fn choose(
        context: &Context,
        form: Form,
        quads: usize,
        octets: usize,
        tokens: usize,
        half: bool,
    ) -> Config {
        let limits = context.device.limits();
        let kernel = if is_few(tokens) {
            Kernel::Few(Few::choose(context, form, quads, octets, tokens as u32))
        } else {
            let tokens = (tokens as u32).next_power_of_two().clamp(16, 64);
            // The most columns that workgroup memory holds.
            let room = limits.max_compute_workgroup_storage_size - form.workgroup_bytes();
            let bytes = (TILE_ROWS as u32 + tokens) * if half { 2 } else { 4 };
            let columns = [64, 32, 16, 8].into_iter().find(|c| c * bytes <= room.min(16 << 10)).unwrap_or(8);
            Kernel::Many { columns, tokens, half }
        };
        Config { form, kernel }
    }

    /// Quads of a workgroup, where a slab has `quads`.
    pub fn per_group(self, quads: usize) -> usize {
        match self.kernel {
            Kernel::Few(few) if few.replicas == 0 => few.quads as usize,
            Kernel::Few(few) => quads.div_ceil(TABLE_GROUPS).max(few.quads as usize),
            Kernel::Many { .. } => TILE_ROWS / QUAD,
        }
    }

    /// Workgroups for `quads` quads of rows and `tokens` tokens.
    pub fn workgroups(self, quads: usize, tokens: usize) -> [u32; 3] {
        let at_once = match self.kernel {
            Kernel::Few(few) => few.tokens,
            Kernel::Many { tokens, .. } => tokens,
        };
        [quads.div_ceil(self.per_group(quads)) as u32, tokens.div_ceil(at_once as usize) as u32, 1]
    }

    fn source(self, magic: bool) -> String {
        let mut constants: Vec<Constant> = self.form.constants();
        let mut set = |name, value: u32| constants.push((name, value.to_string()));
        set("MAGIC", magic.into());
        let (kernel, extensions) = match self.kernel {
            Kernel::Few(few) => {
                let sums = few.quads * few.tokens;
                set("THREADS", few.threads);
                set("QUADS", few.quads);
                set("UNITS", few.units);
                set("LAST", few.units - 1);
                set("TOKENS", few.tokens);
                set("SPLIT", few.split);
                set("SUBGROUPS", (few.lanes > 1).into());
                set("SHARED", (few.split > 1).into());
                set("REPLICAS", few.replicas);
                set("SHORT", few.short.into());
                set("SUMS_PER_THREAD", sums);
                set("SUMS", sums * few.threads.div_ceil(few.lanes));
                ("gemv.wgsl", if few.short { "enable wgpu_int16;\n" } else { "" })
            }
            Kernel::Many { columns, tokens, half } => {
                set("COLUMNS", columns);
                set("TOKENS", tokens);
                set("THREADS", (TILE_ROWS / QUAD) as u32 * tokens / OCTET as u32);
                set("HALF", half.into());
                set("REPLICAS", 1);
                set("SHORT", 0);
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

impl Few {
    fn choose(context: &Context, form: Form, quads: usize, octets: usize, tokens: u32) -> Few {
        let limits = context.device.limits();
        let most = 1 << limits.max_compute_invocations_per_workgroup.ilog2();
        let tokens = tokens.next_power_of_two();
        let lanes = if context.subgroups() { context.lanes } else { 1 };
        let short = context.device.features().contains(wgpu::Features::SHADER_I16);
        let table = form.workgroup_bytes();
        if table == 0 || lanes == 1 {
            // Each thread takes two units or more, and a workgroup no fewer threads than a subgroup of most GPUs has.
            let threads = (octets as u32 / 2).next_power_of_two().clamp(32, 64).min(most);
            let (quads, replicas) = (if tokens == 1 { 1 } else { 2 }, u32::from(table > 0));
            return Few { threads, quads, units: 1, tokens, lanes, split: threads, replicas, short };
        }
        let together = 2;
        let room = limits.max_compute_workgroup_storage_size - table;
        let sums = |threads: u32| 16 * together * tokens * threads.div_ceil(lanes);
        let mut threads = most.min(1024);
        while sums(threads) > room {
            threads /= 2;
        }
        let replicas =
            [16, 8, 4, 2].into_iter().find(|r| (r - 1) * table <= room - sums(threads)).unwrap_or(1);
        // Subgroups of 32 lanes, as most GPUs have them; kernels are right with others.
        let (all, wanted) = (threads / 32, quads.div_ceil(TABLE_GROUPS) as u32);
        let mut split = 1;
        while split < all && all / (2 * split) * together >= wanted {
            split *= 2;
        }
        Few { threads, quads: together, units: 2, tokens, lanes, split, replicas, short }
    }
}
