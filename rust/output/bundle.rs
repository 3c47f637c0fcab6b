//! The JSON bundle output, in its long form: one tensor a line, numbers with the shortest digits that give them back.

use super::{Item, ModelWriter, Options, Progress};
use crate::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::input::MAX_BUNDLE_BYTES;
use crate::tensor::{Dtype, Encoding};
use serde_json::Value;
use std::path::Path;

/// Weights turned to text at a time.
const CHUNK: usize = 16_384;

/// A bundle under construction.
pub(super) struct Writer {
    file: AtomicFile,
    progress: Progress,
    shown: String,
}

impl Writer {
    pub fn create(path: &Path, items: &[Item], options: &Options) -> Result<Self> {
        let shown = path.display().to_string();
        // A digit and a comma for each number: the true length comes out while writing.
        let mut least = 0u64;
        for item in items {
            dtype_name(item).map_err(|e| e.at(&shown))?;
            least = least.saturating_add(item.byte_len()? / item.dtype.size() as u64 * 2);
        }
        if least > MAX_BUNDLE_BYTES {
            return Err(too_long(&shown));
        }
        let mut file = AtomicFile::create(path, options.force, least)?;
        file.put(br#"{"format":"tenpak-bundle","version":1,"tensors":["#)?;
        Ok(Writer { file, progress: Progress::new(items), shown })
    }
}

impl ModelWriter for Writer {
    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let index = self.progress.take(bytes)?;
        let item = &self.progress.items[index];
        let head = format!(
            "{}\n{{\"name\":{},\"shape\":{},\"dtype\":\"{}\",\"data\":[",
            if index > 0 { "," } else { "" },
            Value::from(item.name.as_str()),
            Value::from(item.shape.clone()),
            dtype_name(item)?
        );
        self.file.put(head.as_bytes())?;
        let mut text = Vec::new();
        let mut values = vec![0f32; CHUNK];
        let size = item.dtype.size();
        for (c, chunk) in bytes.chunks(CHUNK * size).enumerate() {
            let values = &mut values[..chunk.len() / size];
            Encoding::Plain(item.dtype).widen(chunk, 0, values);
            text.clear();
            for (i, &value) in values.iter().enumerate() {
                if !value.is_finite() {
                    return Err(Error::input(format!(
                        "{}: element {} of tensor {:?} is {value}, which JSON cannot hold; write safetensors or a folder",
                        self.shown,
                        c * CHUNK + i,
                        item.name
                    )));
                }
                if c + i > 0 {
                    text.push(b',');
                }
                number(value, &mut text);
            }
            self.file.put(&text)?;
            if self.file.written() > MAX_BUNDLE_BYTES {
                return Err(too_long(&self.shown));
            }
        }
        self.file.put(b"]}")
    }

    fn finish(mut self: Box<Self>) -> Result<()> {
        self.progress.check_done()?;
        self.file.put(b"\n]}\n")?;
        self.file.commit()
    }
}

/// Appends the shortest digits that give `value` back, without a fraction of nothing but zero. Minus zero
/// keeps its fraction: to many JSON readers `-0` is the integer zero.
fn number(value: f32, text: &mut Vec<u8>) {
    serde_json::to_writer(&mut *text, &value).expect("a finite number is JSON, and memory takes it");
    if text.ends_with(b".0") && !text.ends_with(b"-0.0") {
        text.truncate(text.len() - 2);
    }
}

fn dtype_name(item: &Item) -> Result<&'static str> {
    match item.dtype {
        Dtype::F32 => Ok("f32"),
        Dtype::F16 => Ok("f16"),
        Dtype::BF16 => Ok("bf16"),
        other => Err(Error::unsupported(format!(
            "tensor {:?} is {}, but a JSON bundle holds F32, F16 and BF16 only; write safetensors or a folder",
            item.name,
            other.name()
        ))),
    }
}

fn too_long(shown: &str) -> Error {
    Error::usage(format!(
        "{shown}: more than {} MiB of JSON, which would not be read back; write safetensors or a folder",
        MAX_BUNDLE_BYTES >> 20
    ))
}
