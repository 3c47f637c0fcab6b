//! The `.safetensors` output: a header as the official library writes it, then the tensors as they come.

use super::{Fill, Item, ModelWriter, Progress, order};
use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// One metadata key only: with more, the official library's own order would not be reproducible.
const METADATA: &str = r#""__metadata__":{"format":"pt"}"#;

/// A file under construction.
pub(super) struct Writer {
    file: AtomicFile,
    progress: Progress,
    /// Bytes before the first item.
    header: u64,
    /// Each item's place in the file.
    rank: Vec<usize>,
    /// The place that is written next.
    next: usize,
    /// Items that came before their place was due; see [`order`].
    early: BTreeMap<usize, Vec<u8>>,
}

impl Writer {
    /// Into the file that `open` makes for so many bytes.
    pub fn create(items: &[Item], open: impl FnOnce(u64) -> Result<AtomicFile>) -> Result<Self> {
        let order = order::aligned(items)?;
        let (header, data) = header(items, &order)?;
        let mut file = open(header.len() as u64 + data)?;
        file.put(&header)?;
        let mut rank = vec![0; items.len()];
        for (place, &i) in order.iter().enumerate() {
            rank[i] = place;
        }
        let header = header.len() as u64;
        Ok(Writer { file, progress: Progress::new(items), header, rank, next: 0, early: BTreeMap::new() })
    }

    /// Makes room for all items; returns where each of them starts.
    pub fn stretch(&mut self) -> Result<Vec<u64>> {
        let mut order: Vec<usize> = (0..self.rank.len()).collect();
        order.sort_by_key(|&i| self.rank[i]);
        let (mut starts, mut end) = (vec![0; order.len()], self.header);
        for i in order {
            starts[i] = end;
            end += self.progress.items[i].byte_len()?;
        }
        self.file.stretch(end)?;
        Ok(starts)
    }

    /// Writes bytes of the file, which has been stretched.
    pub fn place(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.place(at, bytes)
    }

    /// All items have been placed.
    pub fn complete(&mut self) {
        self.progress.complete();
    }

    pub fn commit(self) -> Result<()> {
        self.progress.check_done()?;
        self.file.commit()
    }
}

impl ModelWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let place = self.rank[self.progress.take(bytes)?];
        if place != self.next {
            self.early.insert(place, bytes.to_vec());
            return Ok(());
        }
        self.file.put(bytes)?;
        self.next += 1;
        while let Some(bytes) = self.early.remove(&self.next) {
            self.file.put(&bytes)?;
            self.next += 1;
        }
        Ok(())
    }

    fn fill(&mut self, fill: Fill<'_>) -> Result<bool> {
        let starts = self.stretch()?;
        fill(&|item, at, bytes| self.place(starts[item] + at as u64, bytes))?;
        self.complete();
        Ok(true)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.commit()
    }
}

/// The header with its length in front, and the length of the data.
fn header(items: &[Item], order: &[usize]) -> Result<(Vec<u8>, u64)> {
    let mut text = format!("{{{METADATA}");
    let mut end = 0u64;
    for &i in order {
        let item = &items[i];
        if item.name == "__metadata__" {
            return Err(Error::usage("a tensor named \"__metadata__\" cannot be written to safetensors"));
        }
        let begin = end;
        end = begin
            .checked_add(item.byte_len()?)
            .ok_or_else(|| Error::usage("the tensors are too large for one safetensors file"))?;
        let name = serde_json::Value::from(item.name.as_str());
        let shape = serde_json::Value::from(item.shape.clone());
        text += &format!(
            r#",{name}:{{"dtype":"{}","shape":{shape},"data_offsets":[{begin},{end}]}}"#,
            item.dtype.name()
        );
    }
    text.push('}');
    // Spaces to a multiple of eight, so that the data are aligned in the file.
    let len = text.len().next_multiple_of(8);
    text.extend(std::iter::repeat_n(' ', len - text.len()));
    let mut bytes = (len as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    Ok((bytes, end))
}
