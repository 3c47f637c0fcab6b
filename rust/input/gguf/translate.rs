//! A GGUF file as the Hugging Face model that it was made from: names, arrangement, config and tokenizer.
//!
//! Where that is not possible the tensors keep their GGUF names, and a sentence says why.

use super::super::source::Source;
use super::super::{Sidecar, TensorInfo, check};
use super::config::{self, Facts, Reason};
use super::family::{self, Family};
use super::metadata::Metadata;
use super::order::Order;
use super::tensors::Placed;
use super::tokenizer;
use crate::tensor::{Dtype, Encoding};
use serde_json::Value;
use std::ops::Range;

/// The embedded file that keeps the key-value metadata.
pub(super) const METADATA: &str = "gguf_metadata.json";

/// Factors of the rotation's frequencies: part of the config in Hugging Face models.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The most factors that are read.
const MAX_FACTORS: usize = 4096;

/// What a file is, in Hugging Face terms as far as possible.
pub(super) struct Translated {
    pub tensors: Vec<TensorInfo>,
    pub data: Vec<Range<usize>>,
    /// Each tensor as it lies in the file.
    pub stored: Vec<TensorInfo>,
    /// How each lies in the file.
    pub orders: Vec<Order>,
    pub config: Option<Value>,
    pub sidecars: Vec<Sidecar>,
    pub notes: Vec<String>,
}

/// Translates what it can.
pub(super) fn translate(source: &Source, metadata: &Metadata<'_>, placed: Placed) -> Translated {
    let mut out = Translated {
        tensors: Vec::new(),
        data: Vec::new(),
        stored: Vec::new(),
        orders: Vec::new(),
        config: None,
        sidecars: Vec::new(),
        notes: Vec::new(),
    };
    let shown = source.path().display();
    match model(source, metadata, &placed) {
        Ok((tensors, kept, orders, config)) => {
            out.data = kept.iter().map(|&i| placed.1[i].clone()).collect();
            out.stored = kept.iter().map(|&i| placed.0[i].clone()).collect();
            (out.tensors, out.orders) = (tensors, orders);
            out.sidecars.push(file("config.json", &config));
            let generation = config::generation(metadata);
            if generation.as_object().is_some_and(|o| !o.is_empty()) {
                out.sidecars.push(file("generation_config.json", &generation));
            }
            out.config = Some(config);
        }
        Err(reason) => {
            out.notes.push(format!(
                "{shown}: tensors keep their GGUF names and the model cannot be run: {reason}"
            ));
            out.orders = vec![Order::Same; placed.0.len()];
            out.stored.clone_from(&placed.0);
            (out.tensors, out.data) = placed;
        }
    }
    let mut without: &[&str] = &[];
    if let Some(config) = &out.config {
        match tokenizer::tokenizer(metadata) {
            Ok(made) => {
                let positions =
                    ["max_position_embeddings", "n_positions"].iter().find_map(|k| config.get(*k)?.as_u64());
                let settings = tokenizer::config(metadata, positions);
                out.sidecars.push(Sidecar { path: "tokenizer.json".to_owned(), bytes: made.tokenizer });
                out.sidecars.push(file("tokenizer_config.json", &settings));
                out.notes.extend(made.note.map(|note| format!("{shown}: {note}")));
                without = tokenizer::REPEATED;
            }
            Err(reason) => out.notes.push(format!("{shown}: there is no tokenizer: {reason}")),
        }
    }
    out.sidecars.push(Sidecar { path: METADATA.to_owned(), bytes: metadata.json(without) });
    out
}

fn file(path: &str, value: &Value) -> Sidecar {
    let bytes = serde_json::to_vec_pretty(value).expect("a value is always JSON, and memory takes it");
    Sidecar { path: path.to_owned(), bytes }
}

/// Tensors under Hugging Face names, their places in the file's list, how they lie, and the config.
type Model = (Vec<TensorInfo>, Vec<usize>, Vec<Order>, Value);

fn model(source: &Source, metadata: &Metadata<'_>, (tensors, data): &Placed) -> Result<Model, Reason> {
    let family = family(metadata)?;
    let factors = tensors
        .iter()
        .position(|t| t.name == ROPE_FACTORS)
        .map(|i| factors(&tensors[i], &source[data[i].clone()]))
        .transpose()?;
    let facts = Facts { family, metadata, tensors, factors };
    let config = config::config(&facts)?;
    let (layers, head_dim) = (facts.size("block_count")?, facts.head_dim()?);
    let (mut out, mut kept, mut orders) = (Vec::new(), Vec::new(), Vec::new());
    for (i, info) in tensors.iter().enumerate().filter(|(_, t)| t.name != ROPE_FACTORS) {
        let shown = check::quoted(&info.name);
        let (name, order) = family
            .translate(&info.name, layers, head_dim)
            .ok_or_else(|| format!("tensor {shown} is none of its architecture, {}", family.architecture))?;
        let arranged = order.arranged(&TensorInfo { name, ..info.clone() }).ok_or_else(|| {
            format!("tensor {shown} of shape {:?} has no heads of {head_dim} rows", info.shape)
        })?;
        out.push(arranged);
        kept.push(i);
        orders.push(order);
    }
    Ok((out, kept, orders, config))
}

fn family(metadata: &Metadata<'_>) -> Result<&'static Family, Reason> {
    let name: String = metadata.get("general.architecture").ok_or("general.architecture is missing")?;
    let known = || family::ALL.iter().map(|f| f.architecture).collect::<Vec<_>>().join(", ");
    family::ALL
        .iter()
        .find(|f| f.architecture == name)
        .ok_or_else(|| format!("its architecture is {}; {} can be run", check::quoted(&name), known()))
}

fn factors(info: &TensorInfo, bytes: &[u8]) -> Result<Vec<f32>, Reason> {
    match (&info.shape[..], info.encoding) {
        (&[n], Encoding::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16)) if n <= MAX_FACTORS => {
            let mut out = vec![0f32; n];
            info.encoding.widen(bytes, 0, &mut out);
            Ok(out)
        }
        _ => Err(format!("{ROPE_FACTORS} is no list of factors")),
    }
}
