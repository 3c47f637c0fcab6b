//! From a model to an artifact.

use super::calibrated::Calibrated;
use super::report::{CompressReport, Errors, TensorReport, gigabytes_per_second, groups, hex, mean, ratio};
use super::{Progress, check_running, named, refuse_overwriting_input, supervised};
use crate::artifact::{self, Finished, KEEP, NewEntry, WRITER, Writer};
use crate::calibration::{Calibration, Encoder};
use crate::codec::simd::Level;
use crate::codec::{Cholesky, Codec};
use crate::error::{Error, Kind, Result};
use crate::input::{Model, Sidecar, TensorInfo};
use crate::plan::{self, Action, Decision};
use crate::runner::{self, Meter, Outcome};
use crate::tensor::{Dtype, Rows, Tensor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::time::Instant;

/// How to compress.
pub struct CompressOptions<'a> {
    /// Which tensor gets which codec.
    pub plan: plan::Options,
    /// Threads that encode; 0 for one on each core.
    pub threads: usize,
    /// Whether an existing output may be replaced.
    pub force: bool,
    /// Statistics to heed, and how.
    pub calibration: Option<CalibrationOptions<'a>>,
    /// Without statistics: whether searches estimate what each layer's input is from the weights alone.
    pub estimate: bool,
}

/// How to heed statistics of layers' inputs.
#[derive(Clone, Copy)]
pub struct CalibrationOptions<'a> {
    /// The statistics.
    pub statistics: &'a Calibration,
    /// What to do with them.
    pub encoder: Encoder,
    /// From a library of linear algebra.
    pub cholesky: Cholesky<'a>,
}

/// What is known of every tensor before any is encoded.
struct Job<'a> {
    model: &'a dyn Model,
    decisions: Vec<Decision>,
    sidecars: Vec<Sidecar>,
    codec: &'a Codec,
    calibrated: Calibrated<'a>,
    notes: Vec<String>,
}

/// A tensor on its way to the writer.
struct Ready<'a> {
    index: usize,
    outcome: Option<Outcome>,
    parts: Parts<'a>,
}

enum Parts<'a> {
    Encoded(Vec<Vec<u8>>),
    Kept(Cow<'a, [u8]>),
}

/// Compresses `model` into `target`. The bytes do not depend on the number of threads.
///
/// # Errors
/// Whatever is wrong with the request, the model or the file system; the target is then as it was.
pub fn compress(
    model: &dyn Model,
    target: &Path,
    options: &CompressOptions<'_>,
    progress: Progress<'_>,
) -> Result<CompressReport> {
    let start = Instant::now();
    refuse_overwriting_input(target, &model.paths())?;
    let job = Job::new(model, options)?;
    let total = job.weights();
    let mut writer = Writer::create(target, options.force, job.bytes_at_least(), job.codec.name)?;
    let (outcomes, finished) = supervised(options.threads, total, progress, |meter| {
        let outcomes = job.encode_all(&mut writer, meter)?;
        job.write_rest(&mut writer)?;
        check_running(meter)?;
        Ok((outcomes, writer.finish()?))
    })?;
    Ok(job.report(Some(finished), finished.file_len, &outcomes, start))
}

/// What [`compress`] would write, to the byte, without encoding: weights are only looked through for their range.
///
/// # Errors
/// As [`compress`].
pub fn dry_run(
    model: &dyn Model,
    options: &CompressOptions<'_>,
    progress: Progress<'_>,
) -> Result<CompressReport> {
    let start = Instant::now();
    let job = Job::new(model, options)?;
    let file_len = supervised(options.threads, job.weights(), progress, |meter| job.file_len(meter))?;
    Ok(job.report(None, file_len, &vec![None; model.tensors().len()], start))
}

impl<'a> Job<'a> {
    fn new(model: &'a dyn Model, options: &CompressOptions<'a>) -> Result<Self> {
        let decisions = plan::plan(model, &options.plan)?;
        let calibrated = Calibrated::new(options.calibration, options.estimate, model, &decisions)?;
        let notes = plan::notes(model, &options.plan);
        Ok(Job {
            model,
            decisions,
            sidecars: model.sidecars()?,
            codec: options.plan.codec,
            calibrated,
            notes,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo, &Decision)> {
        self.model.tensors().iter().zip(&self.decisions).enumerate().map(|(i, (info, d))| (i, info, d))
    }

    /// Elements that must be stored: aliases are not.
    fn weights(&self) -> u64 {
        let stored = self.tensors().filter(|(_, _, d)| !matches!(d.action, Action::Alias(_)));
        stored.map(|(_, info, _)| elements(info)).sum()
    }

    /// Names and sizes of a tensor's parts.
    fn parts(&self, info: &TensorInfo, decision: &Decision) -> Result<Vec<(&'static str, u64)>> {
        match decision.action {
            Action::Alias(_) => Ok(Vec::new()),
            Action::Keep(_) => Ok(vec![("data", elements(info) * info.encoding.dtype().size() as u64)]),
            Action::Encode(codec) => {
                let rows = Rows::new(&info.shape, decision.axis)?;
                let sizes = codec.layout.part_bytes(rows.count() as u64, rows.cols as u64);
                let sizes = sizes.ok_or_else(|| named(Error::input("too large"), &info.name))?;
                Ok(codec.layout.parts.iter().map(|p| p.name).zip(sizes).collect())
            }
        }
    }

    /// Bytes of all parts and files: a lower bound that is known at once, for the check of free space.
    fn bytes_at_least(&self) -> u64 {
        let parts = self.tensors().filter_map(|(_, info, d)| self.parts(info, d).ok()).flatten();
        parts.map(|(_, n)| n).chain(self.sidecars.iter().map(|s| s.bytes.len() as u64)).sum()
    }

    fn entry(&self, info: &TensorInfo, decision: &Decision, exponent: i32) -> NewEntry {
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        let dtype = info.encoding.dtype();
        let Action::Encode(codec) = decision.action else { return NewEntry::kept(&info.name, shape, dtype) };
        let mut params = BTreeMap::new();
        if exponent != 0 {
            params.insert("exponent".to_owned(), exponent.into());
        }
        NewEntry {
            name: info.name.clone(),
            shape,
            dtype,
            codec: codec.name.to_owned(),
            codec_version: codec.version,
            axis: decision.axis as u32,
            params,
        }
    }

    fn aliases(&self) -> BTreeMap<String, String> {
        let tensors = self.model.tensors();
        self.tensors()
            .filter_map(|(_, info, d)| match d.action {
                Action::Alias(of) => Some((info.name.clone(), tensors[of].name.clone())),
                _ => None,
            })
            .collect()
    }

    /// Encodes every tensor while another thread writes the one before.
    fn encode_all(&self, writer: &mut Writer, meter: &Meter) -> Result<Vec<Option<Outcome>>> {
        std::thread::scope(|scope| {
            // No room: a tensor is handed over when the one before it has been written.
            let (send, receive) = sync_channel::<Ready<'_>>(0);
            let (give_back, used) = channel();
            let written = scope.spawn(move || self.write_all(writer, receive, &give_back));
            let mut encoded = Ok(());
            for (index, ..) in self.tensors() {
                match self.encode(index, meter, &used) {
                    Ok(None) => {}
                    // The writer hangs up only when it has failed; its own error says why.
                    Ok(Some(ready)) => {
                        if send.send(ready).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        encoded = Err(error);
                        break;
                    }
                }
            }
            drop(send);
            let outcomes = written.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            encoded.map(|()| outcomes)
        })
    }

    fn encode(
        &self,
        index: usize,
        meter: &Meter,
        used: &Receiver<Vec<Vec<u8>>>,
    ) -> Result<Option<Ready<'a>>> {
        check_running(meter)?;
        let (info, decision) = (&self.model.tensors()[index], &self.decisions[index]);
        let tensor = match decision.action {
            Action::Alias(_) => return Ok(None),
            _ => self.model.read(index)?,
        };
        let Action::Encode(codec) = decision.action else {
            meter.add(elements(info));
            return Ok(Some(Ready { index, outcome: None, parts: Parts::Kept(plain(tensor)) }));
        };
        // Memory that was written before is several times faster than fresh pages.
        let mut parts = used.try_recv().unwrap_or_default();
        let sizes = self.parts(info, decision)?;
        parts.resize_with(sizes.len(), Vec::new);
        for (part, (_, size)) in parts.iter_mut().zip(sizes) {
            if part.capacity() < size as usize {
                *part = runner::zeroed(size as usize);
            }
            part.resize(size as usize, 0);
        }
        let mut slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
        let at = |e: Error| if e.kind() == Kind::Interrupted { e } else { named(e, &info.name) };
        let help = self.calibrated.help(index, &info.name).map_err(at)?;
        let options = runner::Options {
            importance: help.importance.as_deref(),
            factor: help.factor.as_deref(),
            outputs: help.outputs.as_ref(),
            measure: true,
            meter: Some(meter),
        };
        let outcome = runner::encode_into(&tensor, decision.axis, codec, options, &mut slices).map_err(at)?;
        Ok(Some(Ready { index, outcome: Some(outcome), parts: Parts::Encoded(parts) }))
    }

    fn write_all(
        &self,
        writer: &mut Writer,
        receive: Receiver<Ready<'_>>,
        give_back: &Sender<Vec<Vec<u8>>>,
    ) -> Result<Vec<Option<Outcome>>> {
        let mut outcomes = vec![None; self.decisions.len()];
        for Ready { index, outcome, parts } in receive {
            let (info, decision) = (&self.model.tensors()[index], &self.decisions[index]);
            let entry = self.entry(info, decision, outcome.map_or(0, |o| o.exponent));
            outcomes[index] = outcome;
            match parts {
                Parts::Kept(bytes) => writer.tensor(entry, &[("data", &bytes)])?,
                Parts::Encoded(parts) => {
                    let Action::Encode(codec) = decision.action else { unreachable!("only encoded tensors") };
                    let names = codec.layout.parts.iter().map(|p| p.name);
                    let named: Vec<(&str, &[u8])> = names.zip(parts.iter().map(Vec::as_slice)).collect();
                    writer.tensor(entry, &named)?;
                    // Nobody needs them after the last tensor.
                    let _ = give_back.send(parts);
                }
            }
        }
        Ok(outcomes)
    }

    fn write_rest(&self, writer: &mut Writer) -> Result<()> {
        for (name, of) in self.aliases() {
            writer.alias(&name, &of)?;
        }
        for sidecar in &self.sidecars {
            writer.file(&sidecar.path, &sidecar.bytes)?;
        }
        Ok(())
    }

    fn file_len(&self, meter: &Meter) -> Result<u64> {
        let mut tensors = Vec::new();
        for (index, info, decision) in self.tensors() {
            check_running(meter)?;
            let exponent = match decision.action {
                Action::Alias(_) => continue,
                Action::Keep(_) => 0,
                Action::Encode(codec) => runner::exponent(&self.model.read(index)?, decision.axis, codec)
                    .map_err(|e| named(e, &info.name))?,
            };
            meter.add(elements(info));
            tensors.push((self.entry(info, decision, exponent), self.parts(info, decision)?));
        }
        let files: Vec<_> = self.sidecars.iter().map(|s| (s.path.as_str(), s.bytes.len() as u64)).collect();
        artifact::file_len(self.codec.name, WRITER, tensors, self.aliases(), &files)
    }

    fn report(
        &self,
        finished: Option<Finished>,
        file_bytes: u64,
        outcomes: &[Option<Outcome>],
        start: Instant,
    ) -> CompressReport {
        let errors: Vec<Option<Errors>> = outcomes
            .iter()
            .map(|o| o.map(|o| Errors { error: o.squared_error, norm: o.squared_norm }))
            .collect();
        let tensors: Vec<TensorReport> = self
            .tensors()
            .map(|(i, info, decision)| {
                let (codec, reason) = match decision.action {
                    Action::Keep(reason) => (KEEP, Some(reason.to_owned())),
                    Action::Encode(codec) => (codec.name, None),
                    Action::Alias(of) => ("alias", Some(self.model.tensors()[of].name.clone())),
                };
                let bytes = self.parts(info, decision).unwrap_or_default().iter().map(|p| p.1).sum();
                let output = outcomes[i].and_then(|o| o.output);
                let of_norm = |error: f64, norm: f64| Errors { error, norm }.relative();
                TensorReport {
                    name: info.name.clone(),
                    shape: info.shape.clone(),
                    source: info.encoding.name(),
                    codec: codec.to_owned(),
                    reason,
                    axis: decision.axis,
                    weights: elements(info),
                    bytes,
                    relative_error: errors[i].map(Errors::relative),
                    encoder: match decision.action {
                        Action::Encode(codec) => Some(self.calibrated.encoder(i).unwrap_or(codec.encoder)),
                        _ => None,
                    },
                    uncalibrated: self.calibrated.why_not(i).map(str::to_owned),
                    output_error: output.map(|o| of_norm(o.error, o.norm)),
                    output_error_before: output.map(|o| of_norm(o.before, o.norm)),
                }
            })
            .collect();
        let quantised = tensors.iter().filter(|t| t.codec != KEEP && t.codec != "alias");
        let (bytes, quantised) = quantised.fold((0, 0), |(b, w), t| (b + t.bytes, w + t.weights));
        let sums = errors
            .iter()
            .flatten()
            .fold(Errors::default(), |s, e| Errors { error: s.error + e.error, norm: s.norm + e.norm });
        let weights = self.weights();
        let seconds = start.elapsed().as_secs_f64();
        CompressReport {
            format: self.model.format(),
            codec: self.codec.name.to_owned(),
            dry_run: finished.is_none(),
            root: finished.map(|f| hex(&f.root)).unwrap_or_default(),
            groups: groups(&tensors, &errors),
            output_error: mean(tensors.iter().map(|t| t.output_error)),
            output_error_before: mean(tensors.iter().map(|t| t.output_error_before)),
            tensors,
            files: self.sidecars.iter().map(|s| s.path.clone()).collect(),
            weights,
            file_bytes,
            quantised_bits_per_weight: ratio(8 * bytes, quantised),
            file_bits_per_weight: ratio(8 * file_bytes, weights),
            compression_fp32: ratio(4 * weights, file_bytes),
            compression_fp16: ratio(2 * weights, file_bytes),
            relative_error: (finished.is_some() && quantised > 0).then(|| sums.relative()),
            seconds,
            gigabytes_per_second: gigabytes_per_second(weights, seconds),
            simd: Level::detect().name(),
            notes: self
                .model
                .notes()
                .into_iter()
                .chain(self.notes.clone())
                .chain(self.calibrated.notes())
                .collect(),
        }
    }
}

fn elements(info: &TensorInfo) -> u64 {
    info.shape.iter().map(|&n| n as u64).product()
}

/// A tensor's bytes in its own dtype; GGUF's blocks become FP32.
pub(crate) fn plain(tensor: Tensor<'_>) -> Cow<'_, [u8]> {
    if matches!(tensor.encoding, crate::tensor::Encoding::Plain(_)) {
        return tensor.bytes;
    }
    const CHUNK: usize = 1 << 16;
    let mut bytes = runner::zeroed(tensor.len() * Dtype::F32.size());
    let mut chunk = vec![0f32; CHUNK];
    for (i, out) in bytes.chunks_mut(CHUNK * 4).enumerate() {
        let values = &mut chunk[..out.len() / 4];
        tensor.encoding.widen(&tensor.bytes, i * CHUNK, values);
        for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *out = value.to_le_bytes();
        }
    }
    Cow::Owned(bytes)
}
