//! Writes down what a base with deltas on it gives: a model, or an artifact where it is quantised.

use super::apply::Trust;
use super::chain::{self, Content};
use super::report::MaterializeReport;
use super::stored::Stored;
use crate::artifact::{Entry, NewEntry, Writer};
use crate::error::{Error, Result};
use crate::input::{Model, Sidecar};
use crate::output::{self, Format, Item};
use crate::pipeline::{Progress, check_running, hex, named, pool, refuse_overwriting_input, supervised_on};
use crate::runner::Meter;
use rayon::ThreadPool;
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// How to materialise.
pub struct MaterializeOptions {
    /// `tenpak`, or the name of an output format; `None` for what the output's name says.
    pub format: Option<String>,
    /// Threads that restore; 0 for one on each core.
    pub threads: usize,
    /// How to write.
    pub output: output::Options,
}

/// The name of the format that is no output format of floats.
const TENPAK: &str = "tenpak";

/// Restores what `paths` (a base, then the deltas on it, the innermost first) give into `target`.
///
/// # Errors
/// As [`chain::open`]; an artifact error where the result is not what the last delta says; whatever is wrong with
/// the request or the file system. The target is then as it was.
pub fn materialize(
    paths: &[PathBuf],
    target: &Path,
    options: &MaterializeOptions,
    progress: Progress<'_>,
) -> Result<MaterializeReport> {
    let start = Instant::now();
    // All of the base is compared first, on as many threads as the rest.
    let unknown = |_: u64, _: u64| progress(0, 1);
    let pool = pool(options.threads)?;
    let mut chain = supervised_on(&pool, 0, &unknown, |_| chain::open(paths, Trust::Base))?;
    let identity = chain.identify()?;
    refuse_overwriting_input(target, &chain.content.paths())?;
    let extension = target.extension().is_some_and(|e| e.eq_ignore_ascii_case(TENPAK));
    let tenpak = options.format.as_deref().map_or(extension, |format| format == TENPAK);
    let mut report = match (chain.content, tenpak) {
        (Content::Stored(stored), true) => write_artifact(&*stored, target, options, &pool, progress)?,
        (Content::Model(_), true) => {
            return Err(Error::usage(format!(
                "{} cannot be a .tenpak file, for the result holds floats; write a .safetensors file or a folder, and \
                 compress that",
                target.display()
            )));
        }
        (content, false) => {
            let format = match &options.format {
                Some(name) => Format::from_name(name)?,
                None => Format::of(target),
            };
            write_model(&*content.into_model()?, format, target, options, &pool, progress)?
        }
    };
    report.result = hex(&identity);
    report.deltas = chain.depth as u64;
    report.seconds = start.elapsed().as_secs_f64();
    report.gigabytes_per_second = 1e-9 * report.bytes as f64 / report.seconds.max(1e-9);
    Ok(report)
}

fn write_model(
    model: &dyn Model,
    format: Format,
    target: &Path,
    options: &MaterializeOptions,
    pool: &ThreadPool,
    progress: Progress<'_>,
) -> Result<MaterializeReport> {
    let infos = model.tensors();
    let items: Vec<Item> = infos
        .iter()
        .map(|t| Item { name: t.name.clone(), dtype: t.encoding.dtype(), shape: t.shape.clone() })
        .collect();
    let files = model.sidecars()?;
    let (sidecars, left_out): (Vec<Sidecar>, Vec<Sidecar>) =
        if format == Format::Folder { (files, Vec::new()) } else { (Vec::new(), files) };
    let weights = infos.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    let mut writer = output::create(format, target, &items, &sidecars, &options.output)?;
    let bytes = supervised_on(pool, weights, progress, |meter| {
        let restore = |i: usize, place: output::Place<'_>| {
            check_running(meter)?;
            let info = &infos[i];
            let restored = model.pieces(i, &|at, bytes| place(i, at, bytes));
            meter.add(info.shape.iter().product::<usize>() as u64);
            restored.map_err(|e| e.at(format_args!("restoring {:?}", info.name)))
        };
        let placed = writer.fill(&mut |place| {
            let done: Vec<Result<()>> =
                (0..infos.len()).into_par_iter().with_max_len(1).map(|i| restore(i, place)).collect();
            done.into_iter().collect()
        })?;
        if placed {
            check_running(meter)?;
            writer.finish()?;
            return Ok(
                items.iter().map(|i| i.shape.iter().product::<usize>() * i.dtype.size()).sum::<usize>()
                    as u64,
            );
        }
        std::thread::scope(|scope| {
            // No room: a tensor is handed over when the one before it has been written.
            let (send, receive) = sync_channel::<std::borrow::Cow<'_, [u8]>>(0);
            let written = scope.spawn(move || {
                let mut total = 0;
                for bytes in receive {
                    writer.write(&bytes)?;
                    total += bytes.len() as u64;
                }
                Ok((writer, total))
            });
            let mut restored = Ok(());
            for (i, info) in infos.iter().enumerate() {
                match check_running(meter).and_then(|()| model.read(i)) {
                    // The writer hangs up only when it has failed; its own error says why.
                    Ok(tensor) => {
                        meter.add(tensor.len() as u64);
                        if send.send(crate::pipeline::plain(tensor)).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        restored = Err(if matches!(error.kind(), crate::Kind::Interrupted) {
                            error
                        } else {
                            error.at(format_args!("restoring {:?}", info.name))
                        });
                        break;
                    }
                }
            }
            drop(send);
            let written: Result<_> = written.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let (writer, total) = written?;
            restored?;
            check_running(meter)?;
            writer.finish()?;
            Ok(total)
        })
    })?;
    Ok(report(format.name(), infos.len(), weights, bytes, &sidecars, &left_out))
}

fn write_artifact(
    stored: &dyn Stored,
    target: &Path,
    options: &MaterializeOptions,
    pool: &ThreadPool,
    progress: Progress<'_>,
) -> Result<MaterializeReport> {
    let (codec, program) = stored.about();
    let writer = Writer::create_as(target, options.output.force, codec, program)?;
    let weights = stored.entries().iter().map(Entry::elements).sum();
    let (bytes, files) = supervised_on(pool, weights, progress, |meter| write_stored(stored, writer, meter))?;
    Ok(report(TENPAK, stored.entries().len() + stored.aliases().len(), weights, bytes, &files, &[]))
}

/// Writes a quantised model, which takes its place if its root is what it should be.
pub(super) fn write_stored(
    stored: &dyn Stored,
    mut writer: Writer,
    meter: &Meter,
) -> Result<(u64, Vec<Sidecar>)> {
    let mut bytes = 0;
    for (i, entry) in stored.entries().iter().enumerate() {
        check_running(meter)?;
        let parts = stored.parts(i).map_err(|e| named(e, &entry.name))?;
        let names = entry.parts_in_order();
        let parts: Vec<(&str, &[u8])> =
            names.iter().zip(&parts).map(|((name, _), bytes)| (*name, &**bytes)).collect();
        bytes += parts.iter().map(|(_, p)| p.len() as u64).sum::<u64>();
        writer.tensor(NewEntry::like(entry), &parts)?;
        meter.add(entry.elements());
    }
    for (name, of) in stored.aliases() {
        writer.alias(name, of)?;
    }
    let files = stored.files()?;
    for file in &files {
        writer.file(&file.path, &file.bytes)?;
    }
    check_running(meter)?;
    let wanted = stored.root();
    writer.finish_if(|root| {
        if root == wanted {
            return Ok(());
        }
        Err(Error::artifact(format!(
            "the result's root is {}, and should be {}; copy the delta and its base again",
            hex(&root),
            hex(&wanted)
        )))
    })?;
    Ok((bytes, files))
}

fn report(
    format: &'static str,
    tensors: usize,
    weights: u64,
    bytes: u64,
    files: &[Sidecar],
    left_out: &[Sidecar],
) -> MaterializeReport {
    let names = |files: &[Sidecar]| files.iter().map(|f| f.path.clone()).collect();
    MaterializeReport {
        format,
        result: String::new(),
        deltas: 0,
        tensors: tensors as u64,
        weights,
        bytes,
        files: names(files),
        files_left_out: names(left_out),
        seconds: 0.0,
        gigabytes_per_second: 0.0,
    }
}
