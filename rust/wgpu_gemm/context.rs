//! One GPU: choosing its adapter, what it can do, and turning its failures into errors.

use super::batch::Batch;
use super::blocking::block_on;
use super::kernels::Config;
use super::weight::Weight;
use super::{ADAPTER_VARIABLE, AdapterInfo, Options, Power, Precision};
use crate::codec::Layout;
use crate::error::{Error, Kind, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// A device, and the kernels that were compiled for it.
#[derive(Debug)]
pub struct Context {
    /// Tells contexts apart: devices of two instances can compare as equal.
    pub(super) id: u64,
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) pipelines: Mutex<HashMap<Config, Arc<wgpu::ComputePipeline>>>,
    /// The least lanes of a subgroup.
    pub(super) lanes: u32,
    info: AdapterInfo,
    options: Options,
    /// Why the device is lost.
    lost: Arc<Mutex<Option<String>>>,
}

/// The GPUs that can be used, those of `Power::High` first; software renderers come last.
///
/// # Errors
/// None in this build; without the feature `gpu` always.
pub fn adapters() -> Result<Vec<AdapterInfo>> {
    Ok(all(Power::High).iter().map(info).collect())
}

fn all(power: Power) -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let mut adapters = block_on(instance.enumerate_adapters(backends));
    adapters.sort_by_key(|adapter| match (adapter.get_info().device_type, power) {
        (wgpu::DeviceType::DiscreteGpu, Power::High) | (wgpu::DeviceType::IntegratedGpu, Power::Low) => 0,
        (wgpu::DeviceType::IntegratedGpu, Power::High) | (wgpu::DeviceType::DiscreteGpu, Power::Low) => 1,
        (wgpu::DeviceType::VirtualGpu, _) => 2,
        (wgpu::DeviceType::Other, _) => 3,
        (wgpu::DeviceType::Cpu, _) => 4,
    });
    adapters
}

fn info(adapter: &wgpu::Adapter) -> AdapterInfo {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    AdapterInfo {
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        name: info.name,
        backend: info.backend.to_string().to_lowercase(),
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "cpu",
            wgpu::DeviceType::Other => "other",
        },
        half: features.contains(wgpu::Features::SHADER_F16),
        subgroups: features.contains(wgpu::Features::SUBGROUP),
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        binding_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
    }
}

impl Context {
    /// Opens an adapter.
    ///
    /// # Errors
    /// Unsupported: there is no adapter, or none of that name (the sentence lists those there are). Io: the driver
    /// refuses.
    pub async fn new(options: Options) -> Result<Context> {
        let mut found = all(options.power);
        let variable = std::env::var(ADAPTER_VARIABLE).ok().filter(|name| !name.is_empty());
        let chosen = match options.adapter.clone().or(variable) {
            _ if found.is_empty() => None,
            None => Some(found.swap_remove(0)),
            Some(name) => {
                let wanted = name.to_lowercase();
                let infos: Vec<_> = found.iter().map(info).collect();
                let fits = |i: &AdapterInfo| i.name.to_lowercase().contains(&wanted) || i.backend == wanted;
                let place = infos.iter().position(fits).ok_or_else(|| {
                    let names: Vec<_> = infos.iter().map(|i| format!("{} ({})", i.name, i.backend)).collect();
                    Error::unsupported(format!(
                        "no adapter is called {name:?}; there are {}",
                        names.join(", ")
                    ))
                })?;
                Some(found.swap_remove(place))
            }
        };
        let adapter = chosen.ok_or_else(|| {
            Error::unsupported(
                "no GPU can be reached through Vulkan, Metal or DX12; install its driver, or for tests a software \
                 one (Debian: mesa-vulkan-drivers)",
            )
        })?;
        let lanes = adapter.get_info().subgroup_min_size.max(4);
        let info = info(&adapter);
        let wanted = wgpu::Features::SHADER_F16
            | wgpu::Features::SHADER_I16
            | wgpu::Features::SUBGROUP
            | wgpu::Features::TIMESTAMP_QUERY;
        let opened = adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("tenpak"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        });
        let (device, queue) =
            opened.await.map_err(|e| Error::new(Kind::Io, format!("{} cannot be opened: {e}", info.name)))?;
        let lost = Arc::new(Mutex::new(None));
        let note = lost.clone();
        device.set_device_lost_callback(move |reason, message| {
            let message = if message.is_empty() { format!("{reason:?}").to_lowercase() } else { message };
            *note.lock().unwrap_or_else(|e| e.into_inner()) = Some(message);
        });
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let id = OPENED.fetch_add(1, Relaxed);
        Ok(Context { id, device, queue, pipelines: Mutex::default(), lanes, info, options, lost })
    }

    /// What the adapter says of itself.
    pub fn adapter(&self) -> &AdapterInfo {
        &self.info
    }

    /// Uploads a weight [rows, cols] from its parts under `layout`, which `tenpak::runner::encode` or an artifact
    /// gives; `exponent` is the index's.
    ///
    /// # Errors
    /// Usage: parts of the wrong size. Unsupported: a layout without kernels, or rows that no binding holds. Io: the
    /// GPU is lost or out of memory.
    pub fn weight(
        &self,
        layout: &'static Layout,
        parts: &[&[u8]],
        rows: usize,
        cols: usize,
        exponent: i32,
    ) -> Result<Weight> {
        Weight::new(self, layout, parts, rows, cols, exponent)
    }

    /// y = x Wᵀ for x [tokens, in]: [tokens, out].
    ///
    /// # Errors
    /// Usage: x does not fit the weight, or the weight is another device's. Io: the GPU is lost or out of memory.
    pub async fn matmul(&self, x: &[f32], tokens: usize, weight: &Weight) -> Result<Vec<f32>> {
        let mut batch = self.batch();
        batch.matmul(x, tokens, weight)?;
        Ok(batch.submit().await?.pop().unwrap_or_default())
    }

    /// An empty batch, whose products go to the GPU in one submission.
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(self)
    }

    /// Seconds on the GPU's clock of a product with each of `weights` in turn, on average, for each of `rounds`.
    ///
    /// # Errors
    /// Unsupported: the adapter has no timestamps. Otherwise as [`Context::matmul`].
    pub async fn time(&self, weights: &[&Weight], tokens: usize, rounds: usize) -> Result<Vec<f64>> {
        if !self.info.timestamps {
            return Err(Error::unsupported(format!("{} has no timestamps", self.info.name)));
        }
        super::batch::time(self, weights, tokens, rounds)
    }

    /// Gives the device back at once; everything after this fails as on a lost device.
    pub fn close(&self) {
        self.device.destroy();
        // The callback runs when the device is next polled, if at all.
        let mut lost = self.lost.lock().unwrap_or_else(|e| e.into_inner());
        lost.get_or_insert_with(|| "it was closed".to_owned());
    }

    /// The most bytes of a binding.
    pub(super) fn binding_bytes(&self) -> u64 {
        self.options.binding_bytes.map_or(self.info.binding_bytes, |limit| limit.min(self.info.binding_bytes))
    }

    pub(super) fn subgroups(&self) -> bool {
        self.info.subgroups && !self.options.without_subgroups
    }

    pub(super) fn half(&self) -> bool {
        self.info.half && self.options.precision == Precision::Auto
    }

    /// Whether compilers keep floating-point arithmetic as it is written; Metal's may reorder it.
    pub(super) fn keeps_order(&self) -> bool {
        self.info.backend == "vulkan"
    }

    /// Calls `work`, and makes an error of what the device says of it.
    pub(super) fn guarded<T>(&self, what: &str, work: impl FnOnce() -> T) -> Result<T> {
        self.check(what)?;
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let done = work();
        let errors = [validation, internal, memory].map(|scope| block_on(scope.pop()));
        self.check(what)?;
        match errors.into_iter().flatten().next() {
            None => Ok(done),
            Some(error) => Err(self.failure(what, &error)),
        }
    }

    fn failure(&self, what: &str, error: &wgpu::Error) -> Error {
        let name = &self.info.name;
        let text = match error {
            wgpu::Error::OutOfMemory { .. } => format!("cannot {what}: {name} is out of memory"),
            other => {
                let text = other.to_string();
                format!("cannot {what} on {name}: {}", text.split_whitespace().collect::<Vec<_>>().join(" "))
            }
        };
        Error::new(Kind::Io, text)
    }

    /// Whether the device is still there.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        match &*self.lost.lock().unwrap_or_else(|e| e.into_inner()) {
            None => Ok(()),
            Some(reason) => {
                let name = &self.info.name;
                Err(Error::new(
                    Kind::Io,
                    format!("cannot {what}: the device {name} is lost ({reason}); open it again"),
                ))
            }
        }
    }

    /// Waits until the GPU has done everything so far.
    pub(super) fn wait(&self, what: &str) -> Result<()> {
        let waited = self.device.poll(wgpu::PollType::wait_indefinitely());
        self.check(what)?;
        waited
            .map(drop)
            .map_err(|e| Error::new(Kind::Io, format!("cannot {what} on {}: {e}", self.info.name)))
    }

    /// Sends waiting copies on, and waits for them.
    pub(super) fn flush(&self, what: &str) -> Result<()> {
        self.guarded(what, || self.queue.submit([]))?;
        self.wait(what)
    }
}
