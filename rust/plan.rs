//! Which tensor gets which codec, along which axis, and why: everything is decided before any work starts.

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::input::{Model, TensorInfo};
use crate::tensor::{Dtype, Rows};
use regex::Regex;
use std::collections::HashMap;

/// What people can ask for a tensor.
#[derive(Clone, Copy)]
pub enum Choice {
    /// Leave it as it is.
    Keep,
    /// Quantise it.
    Codec(&'static Codec),
}

/// What people ask for.
pub struct Options {
    /// For the weights of linear layers.
    pub codec: &'static Codec,
    /// For embeddings and output heads.
    pub embeddings: Choice,
    /// Rules by name; the first that matches wins over everything else.
    pub rules: Vec<(Regex, Choice)>,
    /// Input dimensions by name, where they are not what the model's kind says.
    pub axes: Vec<(Regex, usize)>,
    /// Whether a weight that nothing asked to keep must not be left out.
    pub strict: bool,
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The weight of a linear layer, or a stack of them.
    Linear,
    /// An embedding, or an output head.
    Embedding,
    /// Norms, biases, buffers and all else, by the reason to keep them.
    Other(&'static str),
}

/// What happens to a tensor.
#[derive(Clone)]
pub enum Action {
    /// It is stored as it is, for this reason.
    Keep(&'static str),
    /// It is quantised.
    Encode(&'static Codec),
    /// It holds what tensor `.0` of the model holds, and is stored as a second name for it.
    Alias(usize),
}

/// The decision about one tensor.
#[derive(Clone)]
pub struct Decision {
    /// What happens.
    pub action: Action,
    /// The input dimension.
    pub axis: usize,
    /// What the tensor is for.
    pub role: Role,
}

const ASKED: &str = "asked for";
const SMALL: &str = "norm, bias or scalar";
const NOT_LINEAR: &str = "more than three dimensions";
const NO_WEIGHTS: &str = "not F32, F16 or BF16";
const ROUTER: &str = "router";
const CONVOLUTION: &str = "convolution";
const STATE_SPACE: &str = "state-space parameter";
const NO_GAIN: &str = "too small to gain anything";
const EMPTY: &str = "no elements";

/// Decides about every tensor of `model`.
///
/// # Errors
/// A usage error for a rule or an axis that cannot be; with `strict`, one that names the weights which would be
/// left out.
pub fn plan(model: &dyn Model, options: &Options) -> Result<Vec<Decision>> {
    let layouts = Layouts::of(model);
    let mut decisions =
        model.tensors().iter().map(|info| decide(info, &layouts, options)).collect::<Result<Vec<_>>>()?;
    find_tied(model, &mut decisions)?;
    if options.strict {
        refuse_left_out(model.tensors(), &decisions)?;
    }
    Ok(decisions)
}

/// What people have asked for in vain: a misspelt rule must not pass in silence.
pub fn notes(model: &dyn Model, options: &Options) -> Vec<String> {
    let unused = |pattern: &Regex| !model.tensors().iter().any(|info| pattern.is_match(&info.name));
    let rules = options.rules.iter().map(|(pattern, _)| ("rule", pattern));
    let axes = options.axes.iter().map(|(pattern, _)| ("input axis", pattern));
    rules
        .chain(axes)
        .filter(|(_, pattern)| unused(pattern))
        .map(|(what, pattern)| {
            format!(
                "the {what} for {:?} matches no tensor; --dry-run --tensors lists their names",
                pattern.as_str()
            )
        })
        .collect()
}

fn decide(info: &TensorInfo, layouts: &Layouts, options: &Options) -> Result<Decision> {
    let role = role(info);
    let axis = match options.axes.iter().find(|(pattern, _)| pattern.is_match(&info.name)) {
        Some((_, axis)) => *axis,
        None => layouts.axis(info),
    };
    let rule =
        options.rules.iter().find(|(pattern, _)| pattern.is_match(&info.name)).map(|(_, choice)| *choice);
    let is_weight = info.encoding.dtype().is_weight();
    let action = match rule {
        Some(Choice::Keep) => Action::Keep(ASKED),
        Some(Choice::Codec(codec)) if !is_weight => {
            return Err(Error::usage(format!(
                "a rule asks for {} for tensor {:?}, which is {}; only F32, F16 and BF16 can be quantised",
                codec.name,
                info.name,
                info.encoding.name()
            )));
        }
        // A codec may have parameters for each row all the same, and shapes are no measure of a file.
        Some(Choice::Codec(_)) if info.shape.contains(&0) => Action::Keep(EMPTY),
        Some(Choice::Codec(codec)) => Action::Encode(codec),
        None if !is_weight => Action::Keep(NO_WEIGHTS),
        None => match (role, options.embeddings) {
            (Role::Other(reason), _) => Action::Keep(reason),
            (Role::Embedding, Choice::Keep) => Action::Keep(ASKED),
            (Role::Embedding, Choice::Codec(codec)) => worthwhile(info, axis, codec)?,
            (Role::Linear, _) => worthwhile(info, axis, options.codec)?,
        },
    };
    if matches!(action, Action::Encode(_)) {
        Rows::new(&info.shape, axis).map_err(|e| e.at(format_args!("tensor {:?}", info.name)))?;
    }
    Ok(Decision { action, axis, role })
}

/// Quantises a tensor unless its parts would be as large as it is.
fn worthwhile(info: &TensorInfo, axis: usize, codec: &'static Codec) -> Result<Action> {
    let rows = Rows::new(&info.shape, axis).map_err(|e| e.at(format_args!("tensor {:?}", info.name)))?;
    let parts = codec.layout.part_bytes(rows.count() as u64, rows.cols as u64);
    let stored = parts.and_then(|p| p.iter().try_fold(0u64, |sum, n| sum.checked_add(*n)));
    let plain = rows.len() as u64 * info.encoding.dtype().size() as u64;
    Ok(if stored.is_some_and(|n| n < plain) { Action::Encode(codec) } else { Action::Keep(NO_GAIN) })
}

/// Modules that are embeddings or output heads, in the names that model families use.
const EMBEDDINGS: &[&str] = &[
    "embed_in",
    "embed_out",
    "embed_positions",
    "embed_tokens",
    "lm_head",
    "output",
    "per_layer_token_embd",
    "position_embd",
    "position_embeddings",
    "shared",
    "tok_embeddings",
    "token_embd",
    "token_type_embeddings",
    "word_embeddings",
    "wpe",
    "wte",
];

fn role(info: &TensorInfo) -> Role {
    let module = info.name.strip_suffix(".weight").unwrap_or(&info.name);
    let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
    let rank = info.shape.len();
    // `output` is a head at the top of a model and a linear layer inside it.
    if rank == 2 && EMBEDDINGS.contains(&last) && (last != "output" || parent.is_empty()) {
        return Role::Embedding;
    }
    match rank {
        // Experts' biases and norms by attention head have two dimensions.
        0 | 1 => Role::Other(SMALL),
        _ if last.contains("bias") || last.contains("norm") => Role::Other(SMALL),
        _ if is_router(&info.name) => Role::Other(ROUTER),
        _ if last == "A_log" => Role::Other(STATE_SPACE),
        3 if last.contains("conv") => Role::Other(CONVOLUTION),
        2 | 3 => Role::Linear,
        _ => Role::Other(NOT_LINEAR),
    }
}

/// Routers choose among experts: tiny, and sensitive.
fn is_router(name: &str) -> bool {
    ["router.weight", ".gate.weight", "ffn_gate_inp.weight", "router"].iter().any(|end| name.ends_with(end))
}

/// Which linear layers are held as [in, out].
struct Layouts {
    conv1d: bool,
    experts_in_out: bool,
}

/// Model types whose linear layers are `Conv1D`.
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer", "ctrl"];
/// The names of those layers.
const CONV1D_LAYERS: &[&str] = &["c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight"];
/// Model types whose stacked experts are [expert, in, out].
const EXPERTS_IN_OUT: &[&str] = &["gpt_oss", "llama4", "llama4_text", "dbrx"];

impl Layouts {
    fn of(model: &dyn Model) -> Layouts {
        let config = model.config();
        let model_type = config.and_then(|c| c.get("model_type")).and_then(|t| t.as_str());
        let text_type = config.and_then(|c| c.get("text_config")?.get("model_type")).and_then(|t| t.as_str());
        let is = |known: &[&str]| [model_type, text_type].iter().flatten().any(|t| known.contains(t));
        let conv1d = match model_type {
            Some(_) => is(CONV1D_MODELS),
            None => has_conv1d_biases(model.tensors()),
        };
        Layouts { conv1d, experts_in_out: is(EXPERTS_IN_OUT) }
    }

    fn axis(&self, info: &TensorInfo) -> usize {
        let last = info.shape.len().saturating_sub(1);
        let conv1d =
            self.conv1d && info.shape.len() == 2 && CONV1D_LAYERS.iter().any(|end| info.name.ends_with(end));
        let experts = self.experts_in_out && info.shape.len() == 3;
        if conv1d || experts { last - 1 } else { last }
    }
}

/// Without a config: whether the bias of some `c_attn` or `c_fc` is as long as the weight's second dimension
/// and not as its first.
fn has_conv1d_biases(tensors: &[TensorInfo]) -> bool {
    let shapes: HashMap<&str, &[usize]> =
        tensors.iter().map(|t| (t.name.as_str(), t.shape.as_slice())).collect();
    tensors.iter().any(|t| {
        let Some(module) = t.name.strip_suffix("weight") else { return false };
        let named = module.ends_with("c_attn.") || module.ends_with("c_fc.");
        let bias = shapes.get(format!("{module}bias").as_str());
        match (named, t.shape.as_slice(), bias) {
            (true, [first, second], Some([bias])) => bias == second && bias != first,
            _ => false,
        }
    })
}

/// Turns weights that equal an earlier one, byte for byte, into second names for it.
fn find_tied(model: &dyn Model, decisions: &mut [Decision]) -> Result<()> {
    // By their beginnings, too: models of many experts have tens of thousands of matrices of one shape, too many to
    // compare each with each.
    let mut alike: HashMap<_, Vec<usize>> = HashMap::new();
    for (i, info) in model.tensors().iter().enumerate() {
        // Norms and biases are often equal without being tied.
        if info.shape.len() < 2 || info.shape.contains(&0) {
            continue;
        }
        let earlier = alike.entry((&info.shape[..], info.encoding.name(), model.beginning(i)?)).or_default();
        for &j in earlier.iter() {
            if same_treatment(&decisions[i], &decisions[j]) && model.same(i, j)? {
                decisions[i].action = Action::Alias(j);
                break;
            }
        }
        if !matches!(decisions[i].action, Action::Alias(_)) {
            earlier.push(i);
        }
    }
    Ok(())
}

fn same_treatment(a: &Decision, b: &Decision) -> bool {
    a.axis == b.axis
        && match (&a.action, &b.action) {
            (Action::Keep(_), Action::Keep(_)) => true,
            (Action::Encode(a), Action::Encode(b)) => std::ptr::eq(*a, *b),
            _ => false,
        }
}

fn refuse_left_out(tensors: &[TensorInfo], decisions: &[Decision]) -> Result<()> {
    let left_out: Vec<&str> = tensors
        .iter()
        .zip(decisions)
        .filter(|(t, _)| t.shape.len() >= 2 && is_float(t.encoding.dtype()))
        .filter(|(_, d)| matches!(d.action, Action::Keep(reason) if reason != ASKED))
        .map(|(t, _)| t.name.as_str())
        .collect();
    if left_out.is_empty() {
        return Ok(());
    }
    let shown = left_out.iter().take(5).copied().collect::<Vec<_>>().join(", ");
    let more = left_out.len().saturating_sub(5);
    let and_more = if more > 0 { format!(" and {more} more") } else { String::new() };
    Err(Error::usage(format!(
        "--strict: {} would be left out: {shown}{and_more}; name a codec or `keep` for them with --rule",
        if left_out.len() == 1 { "one weight".to_owned() } else { format!("{} weights", left_out.len()) },
    )))
}

/// Masks and indexes are integers, and nothing that could be quantised.
fn is_float(dtype: Dtype) -> bool {
    dtype.is_weight() || matches!(dtype, Dtype::F64 | Dtype::F8_E4M3 | Dtype::F8_E5M2)
}
