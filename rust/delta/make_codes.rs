//! From a quantised base and a fine-tune in floats to a delta of codes.

use super::apply::reference;
use super::codes::recode;
use super::entry::{self, Method};
use super::exact;
use super::make::{ALIAS, Made, Options, Ready, elements, split_files, tensor_report, write_while_coding};
use super::recoded::{DATA, difference, digest, places};
use super::report::TensorReport;
use super::stored::Stored;
use crate::artifact::{DeltaRef, Entry, Finished, NewEntry, WRITER, Writer};
use crate::codec::{self, Codec, SEARCH};
use crate::error::Result;
use crate::estimate;
use crate::input::{Model, TensorInfo, content_digest};
use crate::pipeline::{Progress, check_running, named, plain, supervised_on};
use crate::plan::{self, Action, Choice};
use crate::runner::{self, Meter};
use crate::tensor::{Encoding, Rows, Tensor};
use rayon::ThreadPool;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// What is known before any tensor is coded.
struct Job<'a> {
    base: &'a dyn Stored,
    places: HashMap<String, usize>,
    model: &'a dyn Model,
    decisions: Vec<plan::Decision>,
    /// The importance of the columns of weights whose input can be estimated, as in compressing.
    importance: BTreeMap<String, Vec<f32>>,
}

/// A tensor of the result, and how the delta holds it.
struct Coded {
    /// In the artifact that comes out.
    result: NewEntry,
    result_parts: Vec<(&'static str, Vec<u8>)>,
    /// In the delta.
    entry: NewEntry,
    /// None where they are those of the result.
    parts: Option<Vec<(&'static str, Vec<u8>)>>,
    report: TensorReport,
    /// Σ(w - ŵ)² and Σw².
    loss: [f64; 2],
}

/// Writes the delta; see [`super::make::delta`].
pub(super) fn make(
    base: &dyn Stored,
    model: &dyn Model,
    target: &Path,
    options: &Options,
    pool: &ThreadPool,
    progress: Progress<'_>,
) -> Result<Made> {
    let (codec, _) = base.about();
    // For weights that the base does not have; a base of several codecs was asked for by one name.
    let preferred = codec::find(codec).unwrap_or(&codec::ALL[0]);
    let asked = plan::Options {
        codec: preferred,
        embeddings: Choice::Codec(preferred),
        rules: Vec::new(),
        axes: Vec::new(),
        strict: false,
    };
    let decisions = plan::plan(model, &asked)?;
    let weights = model.tensors().iter().map(elements).sum();
    let mut writer = Writer::create_delta(target, options.force, options.mode.name(), codec)?;
    supervised_on(pool, weights, progress, |meter| {
        let importance = estimate::importance(model)?;
        let job = Job { base, places: places(base), model, decisions, importance };
        let mut result = Writer::nowhere(codec, WRITER)?;
        let mut made = job.code_all(&mut writer, &mut result, meter)?;
        let mut files = model.sidecars()?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        for file in &files {
            result.file(&file.path, &file.bytes)?;
        }
        let (files_of_base, own) = split_files(files, &base.files()?);
        for file in &own {
            writer.file(&file.path, &file.bytes)?;
            made.files.push(file.path.clone());
        }
        let kept: HashSet<&str> = model.tensors().iter().map(|t| t.name.as_str()).collect();
        let mut removed: Vec<String> =
            job.places.keys().filter(|name| !kept.contains(name.as_str())).cloned().collect();
        removed.sort();
        check_running(meter)?;
        made.delta = DeltaRef {
            base: base.root(),
            files: files_of_base,
            mode: options.mode.name().to_owned(),
            removed,
            result: result.finish()?.root,
        };
        made.finished = writer.finish_delta(made.delta.clone())?;
        Ok(made)
    })
}

impl Job<'_> {
    fn code_all(&self, writer: &mut Writer, result: &mut Writer, meter: &Meter) -> Result<Made> {
        let infos = self.model.tensors();
        let mut tensors = Vec::with_capacity(infos.len());
        let mut aliases = Vec::new();
        let (mut sums, mut input_bytes) = ([0.0; 4], 0);
        write_while_coding(writer, infos.len(), |i| {
            check_running(meter)?;
            let info = &infos[i];
            input_bytes += elements(info) * info.encoding.dtype().size() as u64;
            meter.add(elements(info));
            if let Action::Alias(of) = self.decisions[i].action {
                aliases.push((i, of));
                tensors.push(TensorReport {
                    method: ALIAS.to_owned(),
                    base: Some(infos[of].name.clone()),
                    ..tensor_report(info)
                });
                return Ok(None);
            }
            let coded = self.code(i).map_err(|e| named(e, &info.name))?;
            let slices: Vec<(&str, &[u8])> =
                coded.result_parts.iter().map(|(name, part)| (*name, part.as_slice())).collect();
            result.tensor(coded.result, &slices)?;
            for (sum, more) in sums.iter_mut().zip(coded.loss) {
                *sum += more;
            }
            let parts = coded.parts.unwrap_or(coded.result_parts);
            let bytes = parts.iter().map(|(_, part)| part.len() as u64).sum();
            tensors.push(TensorReport { bytes, ..coded.report });
            Ok(Some(Ready { entry: coded.entry, parts }))
        })?;
        for (alias, of) in aliases {
            writer.alias(&infos[alias].name, &infos[of].name)?;
            result.alias(&infos[alias].name, &infos[of].name)?;
        }
        let delta = DeltaRef {
            base: [0; 32],
            files: BTreeMap::new(),
            mode: String::new(),
            removed: Vec::new(),
            result: [0; 32],
        };
        let finished = Finished { root: [0; 32], file_len: 0 };
        Ok(Made { delta, finished, tensors, files: Vec::new(), input_bytes, sums })
    }

    fn code(&self, index: usize) -> Result<Coded> {
        let info = &self.model.tensors()[index];
        let tensor = self.model.read(index)?;
        let from = self.places.get(&info.name).map(|&i| (i, &self.base.entries()[i]));
        match from {
            Some((i, entry)) if self.on_grid(info, entry)? => self.recode(info, tensor, i, entry),
            Some((i, entry)) if entry.is_kept() => self.keep(info, tensor, Some((i, entry))),
            _ => match self.decisions[index].action {
                Action::Encode(codec) => self.afresh(info, &tensor, codec, self.decisions[index].axis),
                _ => self.keep(info, tensor, None),
            },
        }
    }

    /// Whether a tensor can be coded with the parameters of an entry of the base.
    fn on_grid(&self, info: &TensorInfo, entry: &Entry) -> Result<bool> {
        if entry.known_codec().is_none() || !info.encoding.dtype().is_weight() {
            return Ok(false);
        }
        let axis = entry.axis as usize;
        let old = Rows::new(&entry.extents()?, axis)?;
        let lies_alike = entry.shape.len() == info.shape.len()
            && Rows::new(&info.shape, axis).is_ok_and(|new| {
                // With rows that are columns of a tensor, one row more moves all of them.
                new.cols == old.cols
                    && (new.inner == old.inner || new.inner > 1 && new.outer == 1 && old.outer == 1)
            });
        Ok(lies_alike && old.cols > 0)
    }

    fn help(&self, info: &TensorInfo, codec: &Codec, cols: usize) -> Option<&[f32]> {
        let importance = self.importance.get(&info.name)?;
        (codec.encoder == SEARCH && importance.len() == cols).then_some(importance.as_slice())
    }

    fn recode(&self, info: &TensorInfo, tensor: Tensor<'_>, index: usize, entry: &Entry) -> Result<Coded> {
        let codec = entry.known_codec().expect("on_grid has seen it");
        let axis = entry.axis as usize;
        let rows = Rows::new(&info.shape, axis)?;
        let base = self.base.parts(index)?;
        let slices: Vec<&[u8]> = base.iter().map(|p| &**p).collect();
        let code = |importance| recode(&tensor, axis, entry.exponent(), codec, importance, &slices);
        let mut recoded = code(None)?;
        if let Some(importance) = self.help(info, codec, rows.cols) {
            // Whether the base's encoder heeded an estimate, its file does not say; the codes do.
            let weighted = code(Some(importance))?;
            if weighted.changed < recoded.changed {
                recoded = weighted;
            }
        }
        let b3 = digest(&recoded.parts);
        let same = recoded.changed == 0
            && entry.dtype == info.encoding.dtype()
            && entry.shape.iter().map(|&n| n as usize).eq(info.shape.iter().copied())
            && recoded.parts.iter().zip(&slices).all(|(new, old)| new == old);
        let (method, parts) = if same {
            (Method::Same, Vec::new())
        } else {
            (Method::Codes, vec![(DATA, difference(codec, rows, &base, &recoded.parts))])
        };
        let about = [
            ("changed", recoded.changed.into()),
            ("fresh_groups", recoded.fresh.into()),
            ("groups", recoded.units.into()),
        ];
        let mut delta_entry = self.entry(method, info, b3, Some(&entry.name), &about);
        delta_entry.axis = entry.axis;
        let names = codec.layout.parts.iter().map(|p| p.name);
        Ok(Coded {
            result: quantised(info, codec, axis, entry.exponent()),
            result_parts: names.zip(recoded.parts).collect(),
            entry: delta_entry,
            parts: Some(parts),
            report: TensorReport {
                method: method.name().to_owned(),
                base: Some(entry.name.clone()),
                changed: recoded.changed,
                relative_error: (recoded.norm > 0.0).then(|| recoded.error / recoded.norm),
                fresh_groups: Some(recoded.fresh),
                groups: Some(recoded.units),
                ..tensor_report(info)
            },
            loss: [recoded.error, recoded.norm],
        })
    }

    fn keep(&self, info: &TensorInfo, tensor: Tensor<'_>, from: Option<(usize, &Entry)>) -> Result<Coded> {
        let dtype = info.encoding.dtype();
        let bytes = plain(tensor).into_owned();
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        let b3 = content_digest(&bytes);
        let from = from.filter(|(_, e)| e.dtype == dtype || e.dtype.is_weight() && dtype.is_weight());
        let base = match from {
            Some((i, _)) => Some(self.base.parts(i)?.swap_remove(0)),
            None => None,
        };
        let same = from
            .zip(base.as_ref())
            .is_some_and(|((_, e), base)| e.dtype == dtype && e.shape == shape && **base == bytes);
        let name = from.map(|(_, e)| e.name.as_str());
        let (method, parts, changed) = if same {
            (Method::Same, Vec::new(), 0)
        } else {
            let old = match from.zip(base) {
                Some(((_, e), bytes)) => reference(
                    Tensor { shape: e.extents()?, encoding: Encoding::Plain(e.dtype), bytes },
                    dtype,
                )?,
                None => Cow::Borrowed(&[][..]),
            };
            let coded = exact::encode(&old, &bytes, dtype)?;
            (Method::Exact, vec![("data", coded.data)], coded.changed)
        };
        Ok(Coded {
            result: NewEntry::kept(&info.name, shape, dtype),
            result_parts: vec![("data", bytes)],
            entry: self.entry(method, info, b3, name, &[("changed", changed.into())]),
            parts: Some(parts),
            report: TensorReport {
                method: method.name().to_owned(),
                base: name.map(str::to_owned),
                changed,
                ..tensor_report(info)
            },
            loss: [0.0; 2],
        })
    }

    fn afresh(&self, info: &TensorInfo, tensor: &Tensor<'_>, codec: &Codec, axis: usize) -> Result<Coded> {
        let rows = Rows::new(&info.shape, axis)?;
        let importance = self.help(info, codec, rows.cols);
        let encoded = runner::encode(tensor, axis, codec, importance, true)?;
        let entry = quantised(info, codec, axis, encoded.outcome.exponent);
        let names = codec.layout.parts.iter().map(|p| p.name);
        let loss = [encoded.outcome.squared_error, encoded.outcome.squared_norm];
        Ok(Coded {
            result: entry.clone(),
            result_parts: names.zip(encoded.parts).collect(),
            entry,
            parts: None,
            report: TensorReport {
                method: codec.name.to_owned(),
                changed: elements(info),
                relative_error: (loss[1] > 0.0).then(|| loss[0] / loss[1]),
                ..tensor_report(info)
            },
            loss,
        })
    }

    fn entry(
        &self,
        method: Method,
        info: &TensorInfo,
        b3: [u8; 32],
        base: Option<&str>,
        about: &[(&str, serde_json::Value)],
    ) -> NewEntry {
        let mut entry = entry::entry(method, &info.name, &info.shape, info.encoding.dtype(), b3, None, about);
        if let Some(base) = base {
            // The base's root says what its tensors hold: no digest of theirs is needed.
            entry.params.insert("base".to_owned(), base.into());
        }
        entry
    }
}

fn quantised(info: &TensorInfo, codec: &Codec, axis: usize, exponent: i32) -> NewEntry {
    let exponent = (exponent != 0).then(|| ("exponent".to_owned(), exponent.into()));
    NewEntry {
        name: info.name.clone(),
        shape: info.shape.iter().map(|&n| n as u64).collect(),
        dtype: info.encoding.dtype(),
        codec: codec.name.to_owned(),
        codec_version: codec.version,
        axis: axis as u32,
        params: exponent.into_iter().collect(),
    }
}
