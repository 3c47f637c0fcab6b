//! The tensors' descriptions: names, types and shapes, each checked, and where in the file their data lie.

use super::super::TensorInfo;
use super::super::check::{self, duplicate, quoted, sized};
use super::super::source::Source;
use super::cursor::Cursor;
use crate::error::{Error, Result};
use crate::tensor::{Blocks, Dtype, Encoding};
use std::ops::Range;

/// The format's own limit.
const MAX_DIMS: u32 = 4;

/// Types of plain elements, by their numbers.
const PLAIN: &[(u32, Dtype)] = &[
    (0, Dtype::F32),
    (1, Dtype::F16),
    (24, Dtype::I8),
    (25, Dtype::I16),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::F64),
    (30, Dtype::BF16),
];

/// Types that are not read, for messages.
const UNREAD: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

/// What a type number means.
fn encoding(id: u32) -> Result<Encoding> {
    if let Some((_, dtype)) = PLAIN.iter().find(|(known, _)| *known == id) {
        return Ok(Encoding::Plain(*dtype));
    }
    if let Some(blocks) = Blocks::ALL.iter().find(|b| b.id() == id) {
        return Ok(Encoding::Blocks(*blocks));
    }
    let name = UNREAD.iter().find(|(known, _)| *known == id).map_or("unknown", |(_, name)| name);
    let known: Vec<_> = Blocks::ALL.iter().map(|b| b.name()).collect();
    Err(Error::unsupported(format!(
        "type {name} ({id}) is not read; these are: F32, F16, BF16, {} (start from the F16 or BF16 file)",
        known.join(", ")
    )))
}

/// A tensor's description as it is written.
pub(super) struct Raw<'a> {
    name: &'a str,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

/// Reads `count` descriptions.
pub(super) fn descriptions<'a>(cursor: &mut Cursor<'a>, count: u64) -> Result<Vec<Raw<'a>>> {
    let mut raw = Vec::new();
    for i in 0..count {
        let name = cursor.text(&format!("the name of tensor {i}"))?;
        let what = format!("the description of tensor {}", quoted(name));
        let dims = cursor.u32(&what)?;
        if dims > MAX_DIMS {
            return Err(
                cursor.error(format_args!("{what} has {dims} dimensions; at most {MAX_DIMS} are allowed"))
            );
        }
        let dims = (0..dims).map(|_| cursor.u64(&what)).collect::<Result<_>>()?;
        raw.push(Raw { name, dims, kind: cursor.u32(&what)?, offset: cursor.u64(&what)? });
    }
    Ok(raw)
}

/// Each tensor, and its bytes in the file.
pub(super) type Placed = (Vec<TensorInfo>, Vec<Range<usize>>);

/// Checks names, types and shapes, and finds each tensor's bytes.
pub(super) fn place(source: &Source, end: usize, alignment: u64, raw: Vec<Raw<'_>>) -> Result<Placed> {
    if let Some(name) = duplicate(raw.iter().map(|t| t.name)) {
        return Err(source.error(format_args!("the tensor {} stands twice", quoted(name))));
    }
    let start = (end as u64).next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(raw.len());
    let mut data = Vec::with_capacity(raw.len());
    for t in raw {
        let at = |e: Error| e.at(format_args!("{}: tensor {}", source.path().display(), quoted(t.name)));
        let (info, bytes) = describe(&t).map_err(at)?;
        let outside = || {
            at(Error::input(format!(
                "{bytes} bytes at offset {} reach beyond the {} bytes of data; the file is cut short or damaged",
                t.offset,
                (source.len() as u64).saturating_sub(start)
            )))
        };
        if !t.offset.is_multiple_of(alignment) {
            return Err(at(Error::input(format!(
                "offset {} is no multiple of the alignment, {alignment}",
                t.offset
            ))));
        }
        if bytes == 0 {
            data.push(0..0);
            tensors.push(info);
            continue;
        }
        let from = start.checked_add(t.offset).ok_or_else(outside)?;
        let to = from.checked_add(bytes).filter(|&to| to <= source.len() as u64).ok_or_else(outside)?;
        // Both are at most the file's length, which is a length in memory.
        data.push(from as usize..to as usize);
        tensors.push(info);
    }
    let mut order: Vec<usize> = (0..data.len()).filter(|&i| !data[i].is_empty()).collect();
    order.sort_by_key(|&i| data[i].start);
    for pair in order.windows(2) {
        let (a, b) = (&data[pair[0]], &data[pair[1]]);
        if b.start < a.end {
            return Err(source.error(format_args!(
                "tensor {}: its data at byte {} overlap those of tensor {}, which end at byte {}",
                quoted(&tensors[pair[1]].name),
                b.start,
                quoted(&tensors[pair[0]].name),
                a.end
            )));
        }
    }
    Ok((tensors, data))
}

fn describe(t: &Raw<'_>) -> Result<(TensorInfo, u64)> {
    check::check_name(t.name)?;
    let encoding = encoding(t.kind)?;
    // The fastest dimension comes first in the file, and last here.
    let shape: Vec<u64> = t.dims.iter().rev().copied().collect();
    let block = encoding.block().0 as u64;
    let row = shape.last().copied().unwrap_or(1);
    if !row.is_multiple_of(block) {
        return Err(Error::input(format!(
            "rows of {row} weights are no whole number of {} blocks",
            encoding.name()
        )));
    }
    let (shape, bytes) = sized(&shape, encoding)?;
    Ok((TensorInfo { name: t.name.to_string(), shape, encoding }, bytes))
}
