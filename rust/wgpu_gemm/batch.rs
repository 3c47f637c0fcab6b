//! Products that go to the GPU in one submission.

use super::context::Context;
use super::digits;
use super::form::{OCTET, QUAD};
use super::kernels::{Config, is_few};
use super::weight::Weight;
use crate::error::{Error, Kind, Result};
use std::sync::mpsc;

/// Products that wait to be submitted, in order.
#[derive(Debug)]
pub struct Batch<'a> {
    context: &'a Context,
    encoder: Option<wgpu::CommandEncoder>,
    results: Vec<Pending>,
}

/// A product's result: buffers to be mapped, which follow each other, or nothing but zeros.
#[derive(Debug)]
struct Pending {
    elements: usize,
    buffers: Vec<wgpu::Buffer>,
}

/// The head of common.wgsl.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Sizes {
    tokens: u32,
    rows: u32,
    first_row: u32,
    slab_rows: u32,
    octets: u32,
    quads: u32,
    groups: u32,
    supers: u32,
    scale: f32,
    input_scale: f32,
    per_group: u32,
    padding: u32,
    tables: [[u8; 16]; 4],
}

/// One kernel on one slab.
struct Dispatch {
    pipeline: std::sync::Arc<wgpu::ComputePipeline>,
    bindings: wgpu::BindGroup,
    workgroups: [u32; 3],
}

const WHAT: &str = "multiply";

impl<'a> Batch<'a> {
    pub(super) fn new(context: &'a Context) -> Batch<'a> {
        Batch { context, encoder: None, results: Vec::new() }
    }

    /// Adds y = x Wᵀ for x [tokens, in].
    ///
    /// # Errors
    /// Usage: x does not fit the weight, or the weight is another device's. Unsupported: one token's inputs or
    /// outputs are more than a binding holds. Io: the GPU is lost or out of memory.
    pub fn matmul(&mut self, x: &[f32], tokens: usize, weight: &Weight) -> Result<()> {
        let (rows, cols) = (weight.rows, weight.cols);
        if tokens.checked_mul(cols) != Some(x.len()) {
            return Err(Error::usage(format!(
                "x holds {} numbers; {tokens} tokens times a weight of {rows} x {cols} take {tokens} x {cols}",
                x.len()
            )));
        }
        let elements =
            tokens.checked_mul(rows).ok_or_else(|| Error::usage(format!("{tokens} tokens are too many")))?;
        let mut buffers = Vec::new();
        if elements > 0 && cols > 0 {
            let at_once = tokens_at_once(self.context, weight)?;
            for x in x.chunks(at_once.saturating_mul(cols)) {
                buffers.push(self.product(x, x.len() / cols, weight)?);
            }
        }
        self.results.push(Pending { elements, buffers });
        Ok(())
    }

    /// Encodes one product and the copy of its result to a buffer that can be mapped.
    fn product(&mut self, x: &[f32], tokens: usize, weight: &Weight) -> Result<wgpu::Buffer> {
        let context = self.context;
        let size = (4 * tokens * weight.rows) as u64;
        let (inputs, outputs, mapped) = context.guarded(WHAT, || {
            let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
            let mapped = buffer(context, size, usage);
            (inputs(context, x, weight), outputs(context, size), mapped)
        })?;
        let dispatches =
            dispatches(context, &inputs, &outputs, tokens, weight, half_scale(context, x, tokens, weight))?;
        let device = &context.device;
        let encoder = self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()));
        context.guarded(WHAT, || {
            run(&mut encoder.begin_compute_pass(&Default::default()), &dispatches);
            encoder.copy_buffer_to_buffer(&outputs, 0, &mapped, 0, size);
        })?;
        Ok(mapped)
    }

    /// Computes them all; results come in the order in which products were added.
    ///
    /// # Errors
    /// Io: the GPU is lost or out of memory.
    pub async fn submit(mut self) -> Result<Vec<Vec<f32>>> {
        let context = self.context;
        context.check(WHAT)?;
        if let Some(encoder) = self.encoder.take() {
            context.guarded(WHAT, || context.queue.submit([encoder.finish()]))?;
        }
        let buffers: Vec<&wgpu::Buffer> = self.results.iter().flat_map(|pending| &pending.buffers).collect();
        let mut bytes = read(context, &buffers)?.into_iter();
        let result = |pending: &Pending| {
            let mut y = Vec::with_capacity(pending.elements);
            for bytes in bytes.by_ref().take(pending.buffers.len()) {
                y.extend_from_slice(&bytes);
            }
            // A weight of no columns: sums of nothing.
            y.resize(pending.elements, 0.0);
            y
        };
        Ok(self.results.iter().map(result).collect())
    }
}

/// Tokens whose inputs and outputs fit a binding.
fn tokens_at_once(context: &Context, weight: &Weight) -> Result<usize> {
    if weight.context != context.id {
        return Err(Error::usage("the weight is on another device; upload it to this one"));
    }
    let bytes = 4 * weight.rows.max(OCTET * weight.octets());
    match context.binding_bytes() as usize / bytes {
        0 => Err(Error::unsupported(format!(
            "one token of a weight of {} x {} takes {bytes} bytes, more than the {} that {} binds at once",
            weight.rows,
            weight.cols,
            context.binding_bytes(),
            context.adapter().name
        ))),
        // Workgroups of one dimension are as many for tokens as for rows.
        tokens => Ok(tokens.min(1 << 15)),
    }
}

/// What inputs are multiplied by so that products can be computed in half precision; `None` where they cannot.
///
/// A power of two, with which no sum of eight products overflows and as little as possible is lost below.
fn half_scale(context: &Context, x: &[f32], tokens: usize, weight: &Weight) -> Option<f32> {
    if !context.half() || is_few(tokens) || !(1.0 / 256.0..16384.0).contains(&weight.largest) {
        return None;
    }
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let most = (32768.0 / largest).min(32768.0 / 8.0 / weight.largest / largest);
    let scale = most.log2().floor().exp2();
    // NaN and infinity are for FP32 to carry on.
    (scale.is_normal() && x.iter().all(|x| x.is_finite())).then_some(scale)
}

fn buffer(context: &Context, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    context.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size,
        usage,
        mapped_at_creation: false,
    })
}

/// Inputs in GPU memory, each token's padded with zeros to whole octets; digits of them where they are few.
fn inputs(context: &Context, x: &[f32], weight: &Weight) -> wgpu::Buffer {
    let padded = OCTET * weight.octets();
    let size = (4 * x.len() / weight.cols * padded) as u64;
    let inputs = buffer(context, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST);
    if is_few(x.len() / weight.cols) {
        let digits = digits::pack(x, weight.cols, weight.form.largest_code(), weight.form.in_pairs());
        context.queue.write_buffer(&inputs, 0, bytemuck::cast_slice(&digits));
    } else if padded == weight.cols {
        context.queue.write_buffer(&inputs, 0, bytemuck::cast_slice(x));
    } else {
        let mut copy = vec![0f32; x.len() / weight.cols * padded];
        for (to, from) in copy.chunks_exact_mut(padded).zip(x.chunks_exact(weight.cols)) {
            to[..weight.cols].copy_from_slice(from);
        }
        context.queue.write_buffer(&inputs, 0, bytemuck::cast_slice(&copy));
    }
    inputs
}

fn outputs(context: &Context, size: u64) -> wgpu::Buffer {
    buffer(context, size, wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC)
}

/// A kernel for each slab of a weight.
fn dispatches(
    context: &Context,
    inputs: &wgpu::Buffer,
    outputs: &wgpu::Buffer,
    tokens: usize,
    weight: &Weight,
    half_scale: Option<f32>,
) -> Result<Vec<Dispatch>> {
    let octets = weight.octets();
    // Slabs have as many rows as the first, but for the last.
    let quads = weight.slabs.first().map_or(0, |slab| slab.rows.div_ceil(QUAD));
    let config = Config::choose(context, weight.form, quads, octets, tokens, half_scale.is_some());
    let pipeline = config.pipeline(context)?;
    let (groups, supers) = weight.form.groups(weight.cols);
    let input_scale = half_scale.unwrap_or(1.0);
    let slabs = weight.slabs.iter().map(|slab| {
        let quads = slab.rows.div_ceil(QUAD);
        let sizes = Sizes {
            tokens: tokens as u32,
            rows: weight.rows as u32,
            first_row: slab.first_row as u32,
            slab_rows: slab.rows as u32,
            octets: octets as u32,
            quads: quads as u32,
            groups: groups as u32,
            supers: supers as u32,
            scale: weight.scale / input_scale,
            input_scale,
            per_group: config.per_group(quads) as u32,
            padding: 0,
            tables: weight.form.tables(),
        };
        context.guarded(WHAT, || {
            let uniform = buffer(
                context,
                size_of::<Sizes>() as u64,
                wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            );
            context.queue.write_buffer(&uniform, 0, bytemuck::bytes_of(&sizes));
            let shared = [(0, &uniform), (1, inputs), (2, outputs)];
            let weights = slab.buffers.iter().map(|(binding, buffer)| (*binding, buffer));
            let entry = |(binding, buffer)| {
                let buffer: &wgpu::Buffer = buffer;
                wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() }
            };
            let entries: Vec<_> = shared.into_iter().chain(weights).map(entry).collect();
            let bindings = context.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.get_bind_group_layout(0),
                entries: &entries,
            });
            Dispatch { pipeline: pipeline.clone(), bindings, workgroups: config.workgroups(quads, tokens) }
        })
    });
    slabs.collect()
}

fn run(pass: &mut wgpu::ComputePass<'_>, dispatches: &[Dispatch]) {
    for dispatch in dispatches {
        let [x, y, z] = dispatch.workgroups;
        pass.set_pipeline(&dispatch.pipeline);
        pass.set_bind_group(0, &dispatch.bindings, &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Waits for the GPU and copies what buffers hold.
fn read<T: bytemuck::Pod>(context: &Context, buffers: &[&wgpu::Buffer]) -> Result<Vec<Vec<T>>> {
    let (sender, receiver) = mpsc::channel();
    context.guarded(WHAT, || {
        for buffer in buffers {
            let sender = sender.clone();
            buffer.map_async(wgpu::MapMode::Read, .., move |mapped| drop(sender.send(mapped)));
        }
    })?;
    context.wait(WHAT)?;
    let failed = |e: &dyn std::fmt::Display| {
        Error::new(Kind::Io, format!("cannot {WHAT} on {}: {e}", context.adapter().name))
    };
    for _ in buffers {
        receiver.try_recv().map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    }
    let copy = |buffer: &&wgpu::Buffer| {
        let view = buffer.get_mapped_range(..).map_err(|e| failed(&e))?;
        Ok(bytemuck::pod_collect_to_vec(&view[..]))
    };
    buffers.iter().map(copy).collect()
}

/// See [`Context::time`].
pub(super) fn time(context: &Context, weights: &[&Weight], tokens: usize, rounds: usize) -> Result<Vec<f64>> {
    let mut kept = Vec::new();
    // Products write to the same outputs, so that each waits for the one before it, as layers do.
    let most = weights.iter().map(|weight| weight.rows).max().unwrap_or(0);
    let shared = context.guarded(WHAT, || outputs(context, (4 * tokens * most) as u64))?;
    for weight in weights {
        if tokens > tokens_at_once(context, weight)? || tokens == 0 || weight.slabs.is_empty() {
            return Err(Error::usage(format!("{tokens} tokens cannot be timed at once")));
        }
        // Anything but zeros, which some GPUs multiply with less power.
        let x: Vec<f32> =
            (0..tokens * weight.cols).map(|i| (i * 2_654_435_761 % 1021) as f32 / 1021.0 - 0.5).collect();
        let inputs = context.guarded(WHAT, || inputs(context, &x, weight))?;
        let half = half_scale(context, &x, tokens, weight);
        kept.extend(dispatches(context, &inputs, &shared, tokens, weight, half)?);
    }
    let device = &context.device;
    let mut seconds = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let bytes = 2 * size_of::<u64>() as u64;
        let mapped = context.guarded(WHAT, || {
            let kind = wgpu::QueryType::Timestamp;
            let queries =
                device.create_query_set(&wgpu::QuerySetDescriptor { label: None, ty: kind, count: 2 });
            let mut encoder = device.create_command_encoder(&Default::default());
            run(
                &mut encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &queries,
                        beginning_of_pass_write_index: Some(0),
                        end_of_pass_write_index: Some(1),
                    }),
                }),
                &kept,
            );
            let resolved =
                buffer(context, bytes, wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
            let mapped = buffer(context, bytes, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
            encoder.resolve_query_set(&queries, 0..2, &resolved, 0);
            encoder.copy_buffer_to_buffer(&resolved, 0, &mapped, 0, bytes);
            context.queue.submit([encoder.finish()]);
            mapped
        })?;
        let times: Vec<u64> = read(context, &[&mapped])?.concat();
        let ticks = times[1].wrapping_sub(times[0]) as f64;
        seconds.push(ticks * f64::from(context.queue.get_timestamp_period()) * 1e-9 / weights.len() as f64);
    }
    Ok(seconds)
}
