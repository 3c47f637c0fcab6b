//! How a layout of the codec table lies in GPU memory, and which prelude reads it there.
//!
//! Rows come in fours and columns in eights (see common.wgsl), the last of each padded. What a layout is made of is
//! read from the table's parts, never from its name.

use super::template::Constant;
use crate::codec::{Layout, Part, Per, Tables};
use crate::error::{Error, Result};
use crate::tensor::Dtype;
use half::f16;

/// Rows of a unit.
pub const QUAD: usize = 4;
/// Columns of a unit.
pub const OCTET: usize = 8;

/// A family of layouts, which share a prelude.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Family {
    /// Four-bit codes, FP16 scale and offset.
    AffineHalf { group: usize },
    /// Codes of four bits and more, one-byte scale and offset on a line for each row.
    AffineBytes { group: usize, high_bits: usize },
    /// Four-bit codes into tables.
    Tables { group: usize, run: usize, tables: &'static Tables },
    /// Bytes under a scale for each row.
    Bytes,
}

/// A layout's form in GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    family: Family,
}

/// One storage buffer: its binding and its bytes for a row of quads, that is for four rows.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The binding in every prelude.
    pub binding: u32,
    /// Bytes of four rows.
    pub bytes: usize,
}

/// The first binding of weights: sizes, inputs and outputs come before.
pub const FIRST_BINDING: u32 = 3;

impl Form {
    /// The form of a layout.
    ///
    /// # Errors
    /// Unsupported: a layout whose parts no prelude reads.
    pub fn of(layout: &Layout) -> Result<Form> {
        let kinds: Vec<(Dtype, Per)> = layout.parts.iter().map(|p| (p.dtype, p.per)).collect();
        let family = match kinds[..] {
            [(Dtype::U8, Per::Weight(4)), (Dtype::F16, Per::Run(group)), (Dtype::F16, Per::Run(same))]
                if group == same =>
            {
                Family::AffineHalf { group }
            }
            [
                (Dtype::U8, Per::Weight(4)),
                (Dtype::U8, Per::Run(group)),
                (Dtype::U8, Per::Run(same)),
                (Dtype::F16, Per::Row(4)),
                ref high @ ..,
            ] if group == same => match *high {
                [] => Family::AffineBytes { group, high_bits: 0 },
                // Codes of seven bits are the largest that signed bytes hold.
                [(Dtype::U8, Per::Weight(bits @ 1..=3))] => {
                    Family::AffineBytes { group, high_bits: bits as usize }
                }
                _ => return Err(unknown(layout)),
            },
            [(Dtype::U8, Per::Weight(4)), (Dtype::U8, Per::Run(group)), (Dtype::F16, Per::Run(run))] => {
                Family::Tables { group, run, tables: layout.tables.ok_or_else(|| unknown(layout))? }
            }
            [(Dtype::I8, Per::Weight(8)), (Dtype::F32, Per::Row(1))] => Family::Bytes,
            _ => return Err(unknown(layout)),
        };
        match family {
            Family::AffineHalf { group }
            | Family::AffineBytes { group, .. }
            | Family::Tables { group, .. }
                if group % OCTET != 0 =>
            {
                Err(unknown(layout))
            }
            _ => Ok(Form { family }),
        }
    }

    /// The prelude's file.
    pub fn prelude(self) -> &'static str {
        match self.family {
            Family::AffineHalf { .. } => "affine_half.wgsl",
            Family::AffineBytes { .. } => "affine_bytes.wgsl",
            Family::Tables { .. } => "tables.wgsl",
            Family::Bytes => "bytes.wgsl",
        }
    }

    /// The prelude's constants.
    pub fn constants(self) -> Vec<Constant> {
        match self.family {
            Family::AffineHalf { group } => vec![("GROUP", group.to_string())],
            Family::AffineBytes { group, high_bits } => {
                vec![("GROUP", group.to_string()), ("HIGH_BITS", high_bits.to_string())]
            }
            Family::Tables { group, run, .. } => {
                vec![("GROUP", group.to_string()), ("SUPER", run.to_string())]
            }
            Family::Bytes => vec![],
        }
    }

    /// The tables that codes index, sixteen signed bytes each; zeros where there are none.
    pub fn tables(self) -> [[u8; 16]; 4] {
        match self.family {
            Family::Tables { tables, .. } => tables.map(|table| table.map(|value| value as u8)),
            _ => [[0; 16]; 4],
        }
    }

    /// The largest magnitude of a code, or of what it stands for in a table.
    pub fn largest_code(self) -> i32 {
        match self.family {
            Family::AffineHalf { .. } => 15,
            Family::AffineBytes { high_bits, .. } => (16 << high_bits) - 1,
            Family::Tables { .. } | Family::Bytes => 128,
        }
    }

    /// Whether the prelude's bytes are those of even columns, then those of odd ones.
    pub fn in_pairs(self) -> bool {
        matches!(self.family, Family::AffineHalf { .. } | Family::AffineBytes { .. })
    }

    /// Bytes of workgroup memory that one copy of the prelude's tables takes.
    pub fn workgroup_bytes(self) -> u32 {
        if matches!(self.family, Family::Tables { .. }) { 2048 } else { 0 }
    }

    /// Parameters of a row of `cols` weights: groups, and super-groups.
    pub fn groups(self, cols: usize) -> (usize, usize) {
        match self.family {
            Family::AffineHalf { group } | Family::AffineBytes { group, .. } => (cols.div_ceil(group), 0),
            Family::Tables { group, run, .. } => (cols.div_ceil(group), cols.div_ceil(run)),
            Family::Bytes => (0, 0),
        }
    }

    /// The storage buffers for rows of `cols` weights.
    pub fn buffers(self, cols: usize) -> Vec<Buffer> {
        let octets = cols.div_ceil(OCTET);
        let (groups, supers) = self.groups(cols);
        let sizes: &[usize] = match self.family {
            Family::AffineHalf { .. } => &[16 * octets, 16 * groups],
            Family::AffineBytes { high_bits: 0, .. } => &[16 * octets, 8 * groups, 64],
            Family::AffineBytes { high_bits, .. } => &[16 * octets, 8 * groups, 64, 4 * high_bits * octets],
            Family::Tables { .. } => &[16 * octets, 4 * groups, 8 * supers],
            Family::Bytes => {
                return vec![Buffer { binding: 3, bytes: 32 * octets }, Buffer { binding: 5, bytes: 16 }];
            }
        };
        sizes.iter().zip(FIRST_BINDING..).map(|(&bytes, binding)| Buffer { binding, bytes }).collect()
    }

    /// Writes the quads from row `first` on into `out`, one slice a buffer, which hold zeros; `parts` are those of
    /// the whole weight, [rows, cols]. Returns the largest magnitude that a rebuilt weight can have.
    pub fn pack(
        self,
        layout: &Layout,
        parts: &[&[u8]],
        rows: usize,
        cols: usize,
        first: usize,
        out: &mut [Vec<u8>],
    ) -> f32 {
        let sizes = self.buffers(cols);
        let quads = out[0].len() / sizes[0].bytes.max(1);
        let row = |part: usize, row: usize| -> &[u8] {
            let bytes = Part::row_bytes(&layout.parts[part], cols);
            &parts[part][row * bytes..][..bytes]
        };
        let mut largest = 0f32;
        for quad in 0..quads {
            for r in 0..QUAD {
                let from = first + quad * QUAD + r;
                if from >= rows {
                    break;
                }
                let mut to: Vec<&mut [u8]> = out
                    .iter_mut()
                    .zip(&sizes)
                    .map(|(out, size)| &mut out[quad * size.bytes..][..size.bytes])
                    .collect();
                match self.family {
                    Family::AffineHalf { .. } => {
                        interleave(row(0, from), to[0], r, 4, 16);
                        interleave_pairs(row(1, from), row(2, from), 2, to[1], r);
                        for (s, o) in
                            row(1, from).as_chunks::<2>().0.iter().zip(row(2, from).as_chunks::<2>().0)
                        {
                            let (s, o) = (f16::from_le_bytes(*s).to_f32(), f16::from_le_bytes(*o).to_f32());
                            largest = largest.max(o.abs()).max((15.0 * s + o).abs());
                        }
                    }
                    Family::AffineBytes { high_bits, .. } => {
                        interleave(row(0, from), to[0], r, 4, 16);
                        interleave(row(1, from), to[1], r, 1, 8);
                        interleave(row(2, from), &mut to[1][4..], r, 1, 8);
                        let line: Vec<f32> = row(3, from)
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| f16::from_le_bytes(*b).to_f32())
                            .collect();
                        to[2][16 * r..][..16].copy_from_slice(bytemuck::cast_slice(&line));
                        if high_bits > 0 {
                            interleave(row(4, from), to[3], r, high_bits, QUAD * high_bits);
                        }
                        let codes = ((16 << high_bits) - 1) as f32;
                        let [s0, ds, o0, d_o] = [line[0], line[1], line[2], line[3]];
                        let bound = |start: f32, step: f32| start.abs().max((start + 255.0 * step).abs());
                        largest = largest.max(codes * bound(s0, ds) + bound(o0, d_o));
                    }
                    Family::Tables { .. } => {
                        interleave(row(0, from), to[0], r, 4, 16);
                        interleave(row(1, from), to[1], r, 1, 4);
                        interleave(row(2, from), to[2], r, 2, 8);
                        let supers = row(2, from)
                            .as_chunks::<2>()
                            .0
                            .iter()
                            .map(|b| f16::from_le_bytes(*b).to_f32().abs());
                        largest = supers.fold(largest, |largest, d| largest.max(d * 32.0 * 128.0));
                    }
                    Family::Bytes => {
                        interleave(row(0, from), to[0], r, 4, 16);
                        to[1][4 * r..][..4].copy_from_slice(row(1, from));
                        // Row scales are applied to sums.
                        largest = 128.0;
                    }
                }
            }
        }
        largest
    }
}

/// Copies runs of `run` bytes to every `step` bytes, as the `r`th of their row.
fn interleave(from: &[u8], to: &mut [u8], r: usize, run: usize, step: usize) {
    for (from, to) in from.chunks(run).zip(to.chunks_mut(step)) {
        // A last run may be shorter, and so may its step where `to` starts inside one.
        to[r * run..][..from.len()].copy_from_slice(from);
    }
}

/// Writes pairs of elements of `size` bytes, four rows' pairs beside each other.
fn interleave_pairs(first: &[u8], second: &[u8], size: usize, to: &mut [u8], r: usize) {
    for ((a, b), to) in first.chunks(size).zip(second.chunks(size)).zip(to.chunks_mut(2 * QUAD * size)) {
        to[2 * r * size..][..size].copy_from_slice(a);
        to[(2 * r + 1) * size..][..size].copy_from_slice(b);
    }
}

fn unknown(layout: &Layout) -> Error {
    Error::unsupported(format!("the layout {} has no kernels in WGSL; decode it to an array", layout.name))
}
