//! A weight in GPU memory, cut into slabs of rows that an adapter's bindings hold.

use super::context::Context;
use super::form::{Form, OCTET, QUAD};
use crate::codec::Layout;
use crate::error::{Error, Result};
use std::fmt;

/// Workgroups that one dimension of a dispatch may have in every implementation.
const MAX_GROUPS: usize = 65535;

/// A quantised weight [out, in] in GPU memory.
pub struct Weight {
    pub(super) form: Form,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// What rebuilt weights are multiplied by.
    pub(super) scale: f32,
    /// The largest magnitude of a rebuilt weight before that and before row scales.
    pub(super) largest: f32,
    pub(super) slabs: Vec<Slab>,
    layout: &'static Layout,
    bytes: u64,
    /// The context that holds it.
    pub(super) context: u64,
}

/// Some rows of a weight.
#[derive(Debug)]
pub(super) struct Slab {
    pub first_row: usize,
    pub rows: usize,
    /// Bindings and their buffers.
    pub buffers: Vec<(u32, wgpu::Buffer)>,
}

impl Weight {
    /// [out, in].
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// The layout.
    pub fn layout(&self) -> &'static Layout {
        self.layout
    }

    /// Bytes in GPU memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many slabs of rows it is cut into.
    pub fn slabs(&self) -> usize {
        self.slabs.len()
    }

    /// Packs and uploads.
    pub(super) fn new(
        context: &Context,
        layout: &'static Layout,
        parts: &[&[u8]],
        rows: usize,
        cols: usize,
        exponent: i32,
    ) -> Result<Weight> {
        let form = Form::of(layout)?;
        let wanted = layout.part_bytes(rows as u64, cols as u64);
        let given: Vec<u64> = parts.iter().map(|p| p.len() as u64).collect();
        if wanted.as_deref() != Some(&given[..]) {
            let names: Vec<_> = layout.parts.iter().map(|p| p.name).collect();
            let wanted = wanted.map_or("more bytes than there are".into(), |w| format!("{w:?} bytes"));
            return Err(Error::usage(format!(
                "parts of {given:?} bytes are no {} weight of {rows} x {cols}: {} take {wanted}",
                layout.name,
                names.join(", ")
            )));
        }
        let scale = exp2(exponent)?;
        let sizes = form.buffers(cols);
        let limit = context.binding_bytes();
        let widest = sizes.iter().map(|b| b.bytes).max().unwrap_or(0);
        let quads = rows.div_ceil(QUAD);
        if cols > 0 && rows > 0 && widest as u64 > limit {
            return Err(Error::unsupported(format!(
                "four rows of {cols} weights take {widest} bytes, more than the {limit} that {} binds at once",
                context.adapter().name
            )));
        }
        let at_once = ((limit / widest.max(1) as u64) as usize).clamp(1, MAX_GROUPS).min(quads.max(1));
        let mut weight = Weight {
            form,
            rows,
            cols,
            scale,
            largest: 0.0,
            slabs: Vec::new(),
            layout,
            bytes: 0,
            context: context.id,
        };
        if cols == 0 {
            return Ok(weight);
        }
        for first in (0..quads).step_by(at_once) {
            let here = at_once.min(quads - first);
            let mut packed: Vec<Vec<u8>> = sizes.iter().map(|b| vec![0; b.bytes * here]).collect();
            let first_row = first * QUAD;
            weight.largest = weight.largest.max(form.pack(layout, parts, rows, cols, first_row, &mut packed));
            let what = "upload a weight";
            let buffers = context.guarded(what, || {
                let upload = |(size, bytes): (&super::form::Buffer, &Vec<u8>)| {
                    let buffer = context.device.create_buffer(&wgpu::BufferDescriptor {
                        label: Some(layout.name),
                        size: bytes.len() as u64,
                        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
                        mapped_at_creation: false,
                    });
                    context.queue.write_buffer(&buffer, 0, bytes);
                    (size.binding, buffer)
                };
                sizes.iter().zip(&packed).map(upload).collect::<Vec<_>>()
            })?;
            // Bytes that wait to be copied are not kept beside the next slab's.
            context.flush(what)?;
            weight.bytes += packed.iter().map(|p| p.len() as u64).sum::<u64>();
            weight.slabs.push(Slab { first_row, rows: (rows - first_row).min(here * QUAD), buffers });
        }
        Ok(weight)
    }

    pub(super) fn octets(&self) -> usize {
        self.cols.div_ceil(OCTET)
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weight({}, {} x {}, {} bytes)", self.layout.name, self.rows, self.cols, self.bytes)
    }
}

/// 2^exponent, as far as FP32 goes.
fn exp2(exponent: i32) -> Result<f32> {
    let scale = f64::from(exponent).exp2() as f32;
    if scale.is_finite() && scale > 0.0 {
        return Ok(scale);
    }
    Err(Error::unsupported(format!(
        "an exponent of {exponent} is beyond FP32, in which products are computed"
    )))
}
