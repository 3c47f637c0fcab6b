//! From an artifact back to a model.

use super::report::{DecompressReport, gigabytes_per_second};
use super::{Progress, check_running, named, refuse_overwriting_input, supervised};
use crate::artifact::{ArtifactFile, Entry};
use crate::error::{Error, Result};
use crate::input::Sidecar;
use crate::output::{self, Format, Item};
use crate::tensor::Dtype;
use std::path::Path;
use std::sync::mpsc::{channel, sync_channel};
use std::time::Instant;

/// How to restore.
pub struct DecompressOptions {
    /// The output's format; `None` for what its name says.
    pub format: Option<Format>,
    /// The dtype of weights; `None` for each tensor's own.
    pub dtype: Option<Dtype>,
    /// Threads that decode; 0 for one on each core.
    pub threads: usize,
    /// How to write.
    pub output: output::Options,
}

/// Restores `artifact` into `target`.
///
/// # Errors
/// Whatever is wrong with the artifact, the request or the file system; the target is then as it was.
pub fn decompress(
    artifact: &ArtifactFile,
    target: &Path,
    options: &DecompressOptions,
    progress: Progress<'_>,
) -> Result<DecompressReport> {
    let start = Instant::now();
    refuse_overwriting_input(target, &[artifact.path().to_owned()])?;
    if artifact.delta().is_some() {
        let shown = artifact.path().display();
        return Err(Error::usage(format!(
            "{shown}: this file is a delta; `tenpak materialize --base BASE --delta {shown} --output MODEL` restores it"
        )));
    }
    let format = options.format.unwrap_or_else(|| Format::of(target));
    let mut entries: Vec<(&str, &Entry)> = artifact.tensors().iter().map(|e| (e.name.as_str(), e)).collect();
    for alias in artifact.aliases().keys() {
        entries.push((alias, artifact.find(alias)?));
    }
    let items = entries
        .iter()
        .map(|(name, entry)| {
            let dtype = match options.dtype {
                Some(dtype) if entry.dtype.is_weight() => dtype,
                _ => entry.dtype,
            };
            Ok(Item { name: (*name).to_owned(), dtype, shape: entry.extents().map_err(|e| named(e, name))? })
        })
        .collect::<Result<Vec<_>>>()?;
    let (mut sidecars, mut left_out) = (Vec::new(), Vec::new());
    for file in artifact.files() {
        if format == Format::Folder {
            let bytes = artifact.checked_part(&file.part, &file.path)?.to_vec();
            sidecars.push(Sidecar { path: file.path.clone(), bytes });
        } else {
            left_out.push(file.path.clone());
        }
    }

    let weights = entries.iter().map(|(_, e)| e.elements()).sum();
    let mut writer = output::create(format, target, &items, &sidecars, &options.output)?;
    let bytes = supervised(options.threads, weights, progress, |meter| {
        std::thread::scope(|scope| {
            // No room: a tensor is handed over when the one before it has been written.
            let (send, receive) = sync_channel::<Vec<u8>>(0);
            let (give_back, used) = channel();
            let written = scope.spawn(move || {
                let mut total = 0;
                for bytes in receive {
                    writer.write(&bytes)?;
                    total += bytes.len() as u64;
                    // Nobody needs it after the last tensor.
                    let _ = give_back.send(bytes);
                }
                Ok((writer, total))
            });
            let mut decoded = Ok(());
            for ((name, entry), item) in entries.iter().zip(&items) {
                let one = || {
                    check_running(meter)?;
                    let len = entry.elements().checked_mul(item.dtype.size() as u64);
                    let len = len
                        .and_then(|n| usize::try_from(n).ok())
                        .ok_or_else(|| named(Error::artifact("too large"), name))?;
                    let mut bytes: Vec<u8> = used.try_recv().unwrap_or_default();
                    if bytes.capacity() < len {
                        bytes = crate::runner::zeroed(len);
                    }
                    bytes.resize(len, 0);
                    artifact.decode(entry, item.dtype, &mut bytes)?;
                    meter.add(entry.elements());
                    Ok(bytes)
                };
                match one() {
                    // The writer hangs up only when it has failed; its own error says why.
                    Ok(bytes) => {
                        if send.send(bytes).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        decoded = Err(error);
                        break;
                    }
                }
            }
            drop(send);
            let written: Result<_> = written.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let (writer, total) = written?;
            decoded?;
            check_running(meter)?;
            writer.finish()?;
            Ok(total)
        })
    })?;
    let seconds = start.elapsed().as_secs_f64();
    Ok(DecompressReport {
        format: format.name(),
        tensors: entries.len() as u64,
        weights,
        bytes,
        files: sidecars.into_iter().map(|s| s.path).collect(),
        files_left_out: left_out,
        seconds,
        gigabytes_per_second: gigabytes_per_second(weights, seconds),
    })
}
