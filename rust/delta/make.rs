//! From a base and a fine-tune to a delta: tensors find what they are nearest to, and are coded against it.

use super::apply::{Trust, reference};
use super::chain::{self, Content};
use super::entry::{self, From, Method};
use super::report::{DeltaReport, TensorReport, methods};
use super::{Mode, bit1, exact, make_codes};
use crate::artifact::{DeltaRef, Finished, HexDigest, NewEntry, Writer};
use crate::error::{Error, Result};
use crate::input::{Model, Sidecar, TensorInfo, content_digest, digest_of, digests};
use crate::pipeline::{
    Progress, check_running, hex, named, plain, pool, refuse_overwriting_input, supervised_on,
};
use crate::runner::Meter;
use crate::tensor::{Dtype, Encoding};
use rayon::ThreadPool;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::time::Instant;

/// Rows shorter than this are not worth a scale of their own.
const MIN_BIT1_COLS: usize = 32;

/// Bytes of tensors that are coded at the same time: few tensors of a large model, many of a small one.
const BATCH: u64 = 32 << 20;

/// How to make a delta.
pub struct Options {
    /// How differences are coded.
    pub mode: Mode,
    /// Threads; 0 for one on each core.
    pub threads: usize,
    /// Whether an existing output may be replaced.
    pub force: bool,
}

/// Writes to `target` what makes `model` of `base` (a base, then the deltas on it). The bytes do not depend on the
/// number of threads.
///
/// # Errors
/// As [`chain::open`]; whatever is wrong with the request, the model or the file system. The target is then as it
/// was.
pub fn delta(
    base: &[PathBuf],
    model: &dyn Model,
    target: &Path,
    options: &Options,
    progress: Progress<'_>,
) -> Result<DeltaReport> {
    let start = Instant::now();
    let unknown = |_: u64, _: u64| progress(0, 1);
    let pool = pool(options.threads)?;
    let chain = supervised_on(&pool, 0, &unknown, |_| chain::open(base, Trust::Base))?;
    if chain.depth >= chain::MAX_DEPTH {
        return Err(Error::usage(format!(
            "the base has {} deltas on it already, the most allowed: materialise it first",
            chain.depth
        )));
    }
    let mut inputs = model.paths();
    inputs.extend(chain.content.paths());
    refuse_overwriting_input(target, &inputs)?;
    let made = match (options.mode, chain.content) {
        (Mode::Codes, Content::Stored(stored)) => {
            make_codes::make(&*stored, model, target, options, &pool, progress)?
        }
        (Mode::Codes, Content::Model(_)) => {
            return Err(Error::usage(
                "mode codes needs a quantised base: give a .tenpak file, or choose mode exact or bit1",
            ));
        }
        (_, content) => {
            make(&*content.into_model()?, chain.identity, model, target, options, &pool, progress)?
        }
    };
    Ok(made.report(options.mode, start))
}

/// A finished delta.
pub(super) struct Made {
    pub delta: DeltaRef,
    pub finished: Finished,
    pub tensors: Vec<TensorReport>,
    pub files: Vec<String>,
    pub input_bytes: u64,
    /// Σ(w - ŵ)², Σw², and of bit1 alone Σ(w - ŵ)² and Σ(w - base)².
    pub sums: [f64; 4],
}

impl Made {
    fn report(self, mode: Mode, start: Instant) -> DeltaReport {
        let weights = self.tensors.iter().filter(|t| t.method != ALIAS).map(|t| t.weights).sum::<u64>();
        let seconds = start.elapsed().as_secs_f64();
        let [error, norm, lost, change] = self.sums;
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        DeltaReport {
            mode: mode.name(),
            base: hex(&self.delta.base),
            result: hex(&self.delta.result),
            root: hex(&self.finished.root),
            methods: methods(&self.tensors),
            tensors: self.tensors,
            removed: self.delta.removed,
            files: self.files,
            files_of_base: self.delta.files.into_keys().collect(),
            weights,
            file_bytes: self.finished.file_len,
            input_bytes: self.input_bytes,
            ratio: ratio(self.finished.file_len as f64, self.input_bytes as f64),
            bits_per_weight: ratio(8.0 * self.finished.file_len as f64, weights as f64),
            relative_error: (norm > 0.0).then(|| error / norm),
            change_lost: (change > 0.0).then(|| lost / change),
            seconds,
            gigabytes_per_second: 1e-9 * self.input_bytes as f64 / seconds.max(1e-9),
        }
    }
}

/// What stands for the method of a second name.
pub(super) const ALIAS: &str = "alias";

/// A tensor on its way to the writer.
pub(super) struct Ready {
    pub entry: NewEntry,
    pub parts: Vec<(&'static str, Vec<u8>)>,
}

impl Ready {
    fn write(self, writer: &mut Writer) -> Result<()> {
        let parts: Vec<(&str, &[u8])> = self.parts.iter().map(|(name, p)| (*name, p.as_slice())).collect();
        writer.tensor(self.entry, &parts)
    }
}

/// Sidecars that the base has too, by their digests, and those that it has not.
pub(super) fn split_files(
    files: Vec<Sidecar>,
    base: &[Sidecar],
) -> (BTreeMap<String, HexDigest>, Vec<Sidecar>) {
    let (same, own): (Vec<Sidecar>, Vec<Sidecar>) = files.into_iter().partition(|f| base.contains(f));
    (same.into_iter().map(|f| (f.path, HexDigest(content_digest(&f.bytes)))).collect(), own)
}

/// The base's tensors, and how to find one.
struct Base<'a> {
    model: &'a dyn Model,
    digests: Vec<[u8; 32]>,
    names: HashMap<&'a str, usize>,
    contents: HashMap<(Dtype, [u8; 32]), usize>,
}

impl<'a> Base<'a> {
    fn new(model: &'a dyn Model) -> Result<Self> {
        let infos = model.tensors();
        let digests = digests(model)?;
        let names = infos.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let mut contents = HashMap::new();
        for (i, (info, digest)) in infos.iter().zip(&digests).enumerate() {
            if let Encoding::Plain(dtype) = info.encoding {
                contents.entry((dtype, *digest)).or_insert(i);
            }
        }
        Ok(Base { model, digests, names, contents })
    }

    fn from(&self, index: usize) -> From {
        From { name: self.model.tensors()[index].name.clone(), b3: self.digests[index] }
    }

    /// The tensor of the same name, if it holds the same elements: to compare is quicker than to hash.
    fn unchanged(&self, info: &TensorInfo, bytes: &[u8]) -> Result<Option<usize>> {
        let Some(&i) = self.names.get(info.name.as_str()) else { return Ok(None) };
        let alike = self.model.tensors()[i].encoding == info.encoding && *self.model.read(i)?.bytes == *bytes;
        Ok(alike.then_some(i))
    }

    /// The tensor that holds the same elements: that of the same name first.
    fn same(&self, info: &TensorInfo, digest: [u8; 32]) -> Option<usize> {
        let dtype = info.encoding.dtype();
        let named = self.names.get(info.name.as_str()).copied().filter(|&i| {
            self.digests[i] == digest && self.model.tensors()[i].encoding == Encoding::Plain(dtype)
        });
        named.or_else(|| self.contents.get(&(dtype, digest)).copied())
    }

    /// The tensor of the same name, if its elements lie as those of `info` do: the same number of them in any
    /// shape, or rows of the same length.
    fn like(&self, info: &TensorInfo) -> Option<usize> {
        let index = *self.names.get(info.name.as_str())?;
        let base = &self.model.tensors()[index];
        let (from, to) = (base.encoding.dtype(), info.encoding.dtype());
        let count = |shape: &[usize]| shape.iter().product::<usize>();
        let lies_alike = count(&base.shape) == count(&info.shape)
            || !info.shape.is_empty() && base.shape.get(1..) == info.shape.get(1..);
        (lies_alike && (from == to || from.is_weight() && to.is_weight())).then_some(index)
    }
}

fn make(
    base: &dyn Model,
    identity: Option<[u8; 32]>,
    model: &dyn Model,
    target: &Path,
    options: &Options,
    pool: &ThreadPool,
    progress: Progress<'_>,
) -> Result<Made> {
    let infos: Vec<TensorInfo> = model
        .tensors()
        .iter()
        .map(|t| TensorInfo { encoding: Encoding::Plain(t.encoding.dtype()), ..t.clone() })
        .collect();
    let weights: u64 = infos.iter().map(elements).sum();
    let mut writer = Writer::create_delta(target, options.force, options.mode.name(), options.mode.name())?;
    supervised_on(pool, weights, progress, |meter| {
        let base = Base::new(base)?;
        let job = Job { base: &base, model, infos: &infos, mode: options.mode };
        let mut made = job.code_all(&mut writer, meter)?;
        let (files, own) = split_files(model.sidecars()?, &base.model.sidecars()?);
        for file in &own {
            writer.file(&file.path, &file.bytes)?;
            made.files.push(file.path.clone());
        }
        let kept: std::collections::HashSet<&str> = infos.iter().map(|t| t.name.as_str()).collect();
        let mut removed: Vec<String> = base.model.tensors().iter().map(|t| t.name.clone()).collect();
        removed.retain(|name| !kept.contains(name.as_str()));
        removed.sort();
        made.delta = DeltaRef {
            base: identity.unwrap_or_else(|| digest_of(base.model.tensors(), &base.digests)),
            files,
            mode: options.mode.name().to_owned(),
            removed,
            result: made.delta.result,
        };
        check_running(meter)?;
        made.finished = writer.finish_delta(made.delta.clone())?;
        Ok(made)
    })
}

fn write_all(writer: &mut Writer, tensors: Vec<Ready>) -> Result<()> {
    tensors.into_iter().try_for_each(|ready| ready.write(writer))
}

/// Hands over what `code` makes of each tensor, one after another, while another thread writes the one before.
pub(super) fn write_while_coding(
    writer: &mut Writer,
    count: usize,
    mut code: impl FnMut(usize) -> Result<Option<Ready>>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Ready>(0);
        let written = scope
            .spawn(move || -> Result<()> { receive.into_iter().try_for_each(|ready| ready.write(writer)) });
        let mut coded = Ok(());
        for i in 0..count {
            match code(i) {
                Ok(None) => {}
                // The writer hangs up only when it has failed; its own error says why.
                Ok(Some(ready)) => {
                    if send.send(ready).is_err() {
                        break;
                    }
                }
                Err(error) => {
                    coded = Err(error);
                    break;
                }
            }
        }
        drop(send);
        written.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        coded
    })
}

/// What a tensor holds: dtype, shape and digest.
type Elements<'a> = (Dtype, &'a [usize], [u8; 32]);

struct Job<'a> {
    base: &'a Base<'a>,
    model: &'a dyn Model,
    infos: &'a [TensorInfo],
    mode: Mode,
}

/// A coded tensor, and what came out of it.
struct Coded {
    method: Method,
    from: Option<From>,
    parts: Vec<(&'static str, Vec<u8>)>,
    changed: u64,
    relative_change: Option<f64>,
    /// Σ(w - ŵ)², Σw² and Σ(w - base)², where there is a loss.
    loss: Option<[f64; 3]>,
    /// What the tensor's elements hash to, and what the result's do.
    digest: [u8; 32],
    b3: [u8; 32],
}

impl Job<'_> {
    fn code_all(&self, writer: &mut Writer, meter: &Meter) -> Result<Made> {
        let mut digests = Vec::with_capacity(self.infos.len());
        let mut reports: Vec<TensorReport> = Vec::with_capacity(self.infos.len());
        // Tied tensors, which are stored once.
        let mut stored: HashMap<Elements<'_>, (usize, [u8; 32])> = HashMap::new();
        let mut aliases: Vec<(usize, usize)> = Vec::new();
        let (mut sums, mut input_bytes) = ([0.0; 4], 0);
        let mut before: Vec<Ready> = Vec::new();
        for batch in self.batches() {
            let code = |i: usize| {
                check_running(meter)?;
                let info = &self.infos[i];
                let at =
                    |e: Error| if e.kind() == crate::Kind::Interrupted { e } else { named(e, &info.name) };
                let coded = self.code(info, &plain(self.model.read(i)?)).map_err(at)?;
                meter.add(elements(info));
                Ok(coded)
            };
            let (written, coded) = rayon::join(
                || write_all(writer, std::mem::take(&mut before)),
                || batch.clone().into_par_iter().with_max_len(1).map(code).collect::<Vec<Result<Coded>>>(),
            );
            written?;
            for (i, coded) in batch.zip(coded) {
                let (info, coded) = (&self.infos[i], coded?);
                let dtype = info.encoding.dtype();
                input_bytes += elements(info) * dtype.size() as u64;
                let key = (dtype, info.shape.as_slice(), coded.digest);
                if coded.method != Method::Same
                    && let Some(&(of, b3)) = stored.get(&key)
                {
                    aliases.push((i, of));
                    digests.push(b3);
                    reports.push(TensorReport {
                        method: ALIAS.to_owned(),
                        base: Some(self.infos[of].name.clone()),
                        ..tensor_report(info)
                    });
                    continue;
                }
                if info.shape.len() >= 2 && elements(info) > 0 {
                    stored.insert(key, (i, coded.b3));
                }
                digests.push(coded.b3);
                if let Some([error, norm, change]) = coded.loss {
                    for (sum, more) in sums.iter_mut().zip([error, norm, error, change]) {
                        *sum += more;
                    }
                }
                let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
                reports.push(TensorReport {
                    method: coded.method.name().to_owned(),
                    base: coded.from.as_ref().map(|from| from.name.clone()),
                    changed: coded.changed,
                    relative_change: coded.relative_change,
                    relative_error: coded.loss.map(|[error, norm, _]| ratio(error, norm)),
                    change_lost: coded.loss.map(|[error, _, change]| ratio(error, change)),
                    bytes: coded.parts.iter().map(|(_, part)| part.len() as u64).sum(),
                    ..tensor_report(info)
                });
                let mut about = vec![("changed", coded.changed.into())];
                if let Some(change) = coded.relative_change {
                    about.push(("relative_change", format!("{change:.2e}").into()));
                }
                let from = coded.from.as_ref();
                let entry =
                    entry::entry(coded.method, &info.name, &info.shape, dtype, coded.b3, from, &about);
                before.push(Ready { entry, parts: coded.parts });
            }
        }
        write_all(writer, before)?;
        for (alias, of) in aliases {
            writer.alias(&self.infos[alias].name, &self.infos[of].name)?;
        }
        let result = digest_of(self.infos, &digests);
        let delta = DeltaRef {
            base: [0; 32],
            files: BTreeMap::new(),
            mode: String::new(),
            removed: Vec::new(),
            result,
        };
        let finished = Finished { root: [0; 32], file_len: 0 };
        Ok(Made { delta, finished, tensors: reports, files: Vec::new(), input_bytes, sums })
    }

    /// Tensors that are coded at the same time, while those before them are written.
    fn batches(&self) -> Vec<Range<usize>> {
        let mut batches: Vec<Range<usize>> = Vec::new();
        let mut bytes = BATCH;
        for (i, info) in self.infos.iter().enumerate() {
            if bytes >= BATCH {
                batches.push(i..i);
                bytes = 0;
            }
            bytes += elements(info) * info.encoding.dtype().size() as u64;
            batches.last_mut().expect("one was pushed").end = i + 1;
        }
        batches
    }

    fn code(&self, info: &TensorInfo, bytes: &[u8]) -> Result<Coded> {
        let dtype = info.encoding.dtype();
        let same = |i: usize| Coded {
            method: Method::Same,
            from: Some(self.base.from(i)),
            parts: Vec::new(),
            changed: 0,
            relative_change: None,
            loss: None,
            digest: self.base.digests[i],
            b3: self.base.digests[i],
        };
        if let Some(i) = self.base.unchanged(info, bytes)? {
            return Ok(same(i));
        }
        let found = self.base.like(info);
        if found.is_none()
            && let Some(i) = self.base.same(info, content_digest(bytes))
        {
            return Ok(same(i));
        }
        let old = found.map(|i| reference(self.base.model.read(i)?, dtype)).transpose()?;
        let old = old.as_deref().unwrap_or_default();
        let relative_change = relative_change(old, bytes, dtype);
        let coded = exact::encode(old, bytes, dtype)?;
        if let Some(i) = self.base.same(info, coded.digest) {
            return Ok(same(i));
        }
        let lossless = Coded {
            method: Method::Exact,
            from: found.map(|i| self.base.from(i)),
            parts: vec![("data", coded.data)],
            changed: coded.changed,
            relative_change,
            loss: None,
            digest: coded.digest,
            b3: coded.digest,
        };
        if self.mode != Mode::Bit1 || old.len() != bytes.len() {
            return Ok(lossless);
        }
        Ok(match bit1_of(old, bytes, dtype, &info.shape)? {
            Some((parts, loss, b3)) if bytes_of(&parts) < bytes_of(&lossless.parts) => {
                Coded { method: Method::Bit1, parts, loss: Some(loss), b3, ..lossless }
            }
            _ => lossless,
        })
    }
}

fn bytes_of(parts: &[(&'static str, Vec<u8>)]) -> usize {
    parts.iter().map(|(_, part)| part.len()).sum()
}

/// Parts, losses and digest of the result.
type Bit1 = (Vec<(&'static str, Vec<u8>)>, [f64; 3], [u8; 32]);

fn bit1_of(old: &[u8], new: &[u8], dtype: Dtype, shape: &[usize]) -> Result<Option<Bit1>> {
    if !dtype.is_weight() || shape.len() < 2 || bit1::rows(shape).1 < MIN_BIT1_COLS {
        return Ok(None);
    }
    let Some(bit1::Encoded { signs, scales }) = bit1::encode(old, new, dtype, shape) else { return Ok(None) };
    let mut rebuilt = crate::runner::zeroed(new.len());
    bit1::decode(&signs, &scales, old, dtype, shape, &mut rebuilt)?;
    let mut loss = [0f64; 3];
    each_chunk(dtype, [new, &rebuilt, old], |[new, rebuilt, old]| {
        loss[0] += f64::from(new - rebuilt).powi(2);
        loss[1] += f64::from(new).powi(2);
        loss[2] += f64::from(new - old).powi(2);
    });
    let b3 = content_digest(&rebuilt);
    Ok(Some((vec![("signs", signs), ("scales", scales)], loss, b3)))
}

/// Calls `f` with the values at every place of three tensors.
fn each_chunk(dtype: Dtype, tensors: [&[u8]; 3], mut f: impl FnMut([f32; 3])) {
    const CHUNK: usize = 1 << 12;
    let mut values = [[0f32; CHUNK]; 3];
    let count = tensors[0].len() / dtype.size();
    for start in (0..count).step_by(CHUNK) {
        let n = CHUNK.min(count - start);
        for (values, bytes) in values.iter_mut().zip(tensors) {
            Encoding::Plain(dtype).widen(bytes, start, &mut values[..n]);
        }
        (0..n).for_each(|i| f([values[0][i], values[1][i], values[2][i]]));
    }
}

/// ‖new - old‖ / ‖new‖ over runs of elements in regular places; `None` where that means nothing.
fn relative_change(old: &[u8], new: &[u8], dtype: Dtype) -> Option<f64> {
    const RUN: usize = 64;
    const RUNS: usize = 16;
    if !dtype.is_weight() || old.is_empty() {
        return None;
    }
    let count = old.len().min(new.len()) / dtype.size();
    let (mut change, mut norm) = (0f64, 0f64);
    let [mut a, mut b] = [[0f32; RUN]; 2];
    for start in (0..count).step_by((count / RUNS).max(RUN)) {
        let n = RUN.min(count - start);
        Encoding::Plain(dtype).widen(old, start, &mut a[..n]);
        Encoding::Plain(dtype).widen(new, start, &mut b[..n]);
        for (old, new) in a[..n].iter().zip(&b[..n]) {
            change += (f64::from(*new) - f64::from(*old)).powi(2);
            norm += f64::from(*new).powi(2);
        }
    }
    (norm > 0.0 && change.is_finite() && norm.is_finite()).then(|| (change / norm).sqrt())
}

pub(super) fn elements(info: &TensorInfo) -> u64 {
    info.shape.iter().map(|&n| n as u64).product()
}

pub(super) fn tensor_report(info: &TensorInfo) -> TensorReport {
    TensorReport {
        name: info.name.clone(),
        shape: info.shape.clone(),
        dtype: info.encoding.dtype().name(),
        method: String::new(),
        base: None,
        weights: elements(info),
        changed: 0,
        relative_change: None,
        relative_error: None,
        change_lost: None,
        fresh_groups: None,
        groups: None,
        bytes: 0,
    }
}
