//! `config.json` and `generation_config.json`, from a GGUF file's metadata and the tensors it has.

use super::super::TensorInfo;
use super::family::Family;
use super::metadata::Metadata;
use super::rope;
use serde_json::{Map, Value, json};

/// A sentence that says why a model cannot be translated.
pub(super) type Reason = String;

/// What the metadata say of an architecture's shape.
pub(super) struct Facts<'a> {
    pub family: &'static Family,
    pub metadata: &'a Metadata<'a>,
    /// Under their GGUF names.
    pub tensors: &'a [TensorInfo],
    /// What each frequency of the rotation is divided by (`rope_freqs.weight`).
    pub factors: Option<Vec<f32>>,
}

impl Facts<'_> {
    /// `<architecture>.<key>`.
    pub fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.family.architecture)
    }

    /// A size that must be there.
    pub fn size(&self, key: &str) -> Result<usize, Reason> {
        let key = self.key(key);
        match self.metadata.get::<u32>(&key) {
            Some(n) if n > 0 => Ok(n as usize),
            _ => Err(self.no_size(&key)),
        }
    }

    /// A size, or what it is where it is not there.
    fn size_or(&self, key: &str, default: usize) -> Result<usize, Reason> {
        if self.metadata.has(&self.key(key)) { self.size(key) } else { Ok(default) }
    }

    fn no_size(&self, key: &str) -> Reason {
        let what = if self.metadata.has(key) { "is no positive number" } else { "is missing" };
        format!("{key} {what}")
    }

    /// A positive number that must be there.
    fn number(&self, key: &str) -> Result<f64, Reason> {
        let key = self.key(key);
        self.metadata.get::<f64>(&key).filter(|x| *x > 0.0).ok_or_else(|| self.no_size(&key))
    }

    /// The same, or what it is where it is not there.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, Reason> {
        if self.metadata.has(&self.key(key)) { self.number(key) } else { Ok(default) }
    }

    /// Elements of a head.
    pub fn head_dim(&self) -> Result<usize, Reason> {
        let (width, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let head_dim = self.size_or("attention.key_length", width / heads)?;
        if head_dim == 0 || head_dim % 2 == 1 {
            return Err(format!("heads of {head_dim} elements cannot be rotated"));
        }
        if self.size_or("attention.value_length", head_dim)? != head_dim {
            return Err("keys and values are of different lengths".to_owned());
        }
        Ok(head_dim)
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|t| t.name == name)
    }

    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    /// The extent of a matrix that says how many tokens or positions there are.
    fn rows(&self, name: &str, width: usize) -> Result<usize, Reason> {
        match self.tensor(name).map(|t| &t.shape[..]) {
            Some(&[rows, cols]) if cols == width => Ok(rows),
            Some(shape) => Err(format!("{name} is {shape:?}, and the model is {width} wide")),
            None => Err(format!("there is no tensor {name}")),
        }
    }
}

/// `config.json`.
pub(super) fn config(facts: &Facts<'_>) -> Result<Value, Reason> {
    let width = facts.size("embedding_length")?;
    let vocab = facts.rows("token_embd.weight", width)?;
    let mut config =
        if facts.family.model_type == "gpt2" { gpt2(facts, width)? } else { llama(facts, width)? };
    let end = ends(facts.metadata);
    let id = |role: &str| special(facts.metadata, role);
    let common = [
        ("architectures", json!([facts.family.class])),
        ("model_type", json!(facts.family.model_type)),
        ("vocab_size", json!(vocab)),
        ("tie_word_embeddings", json!(!facts.has("output.weight"))),
        ("bos_token_id", json!(id("bos"))),
        ("eos_token_id", one_or_list(&end)),
        ("pad_token_id", json!(id("padding"))),
    ];
    config.extend(common.map(|(key, value)| (key.to_owned(), value)));
    config.retain(|_, value| !value.is_null());
    Ok(Value::Object(config))
}

/// `generation_config.json`: which tokens begin and end a text.
pub(super) fn generation(metadata: &Metadata<'_>) -> Value {
    let mut out = Map::new();
    let values = [
        ("bos_token_id", json!(special(metadata, "bos"))),
        ("eos_token_id", one_or_list(&ends(metadata))),
        ("pad_token_id", json!(special(metadata, "padding"))),
    ];
    out.extend(values.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_owned(), v)));
    Value::Object(out)
}

/// The token of that role, if the metadata name one.
pub(super) fn special(metadata: &Metadata<'_>, role: &str) -> Option<u32> {
    metadata.get(&format!("tokenizer.ggml.{role}_token_id"))
}

/// Every token that ends a text or a turn.
fn ends(metadata: &Metadata<'_>) -> Vec<u32> {
    let mut out: Vec<u32> = Vec::new();
    for id in ["eos", "eot", "eom"].iter().filter_map(|role| special(metadata, role)) {
        if !out.contains(&id) {
            out.push(id);
        }
    }
    out
}

fn one_or_list(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        _ => json!(ids),
    }
}

fn gpt2(facts: &Facts<'_>, width: usize) -> Result<Map<String, Value>, Reason> {
    let positions = facts.rows("position_embd.weight", width)?;
    Ok(object(json!({
        "activation_function": "gelu_new",
        "layer_norm_epsilon": facts.number("attention.layer_norm_epsilon")?,
        "n_ctx": positions,
        "n_embd": width,
        "n_head": facts.size("attention.head_count")?,
        "n_inner": facts.size_or("feed_forward_length", 4 * width)?,
        "n_layer": facts.size("block_count")?,
        "n_positions": positions,
    })))
}

fn llama(facts: &Facts<'_>, width: usize) -> Result<Map<String, Value>, Reason> {
    if facts.metadata.get::<u64>(&facts.key("expert_count")).is_some_and(|n| n > 0) {
        return Err("mixtures of experts cannot be run".to_owned());
    }
    let heads = facts.size("attention.head_count")?;
    let head_dim = facts.head_dim()?;
    if facts.size_or("rope.dimension_count", head_dim)? != head_dim {
        return Err("only a part of each head is rotated".to_owned());
    }
    let biases = ["attn_q", "attn_k", "attn_v", "attn_output"].map(|m| facts.has(&format!("blk.0.{m}.bias")));
    let attention_bias = match (facts.family.model_type, biases) {
        ("qwen2", [true, true, true, false]) | ("llama" | "qwen3", [false, false, false, false]) => false,
        ("llama" | "qwen3", [true, true, true, true]) => true,
        _ => return Err("only some projections of attention have a bias".to_owned()),
    };
    let mut config = object(json!({
        "attention_bias": attention_bias,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": facts.size("feed_forward_length")?,
        "max_position_embeddings": facts.size("context_length")?,
        "mlp_bias": facts.has("blk.0.ffn_up.bias"),
        "num_attention_heads": heads,
        "num_hidden_layers": facts.size("block_count")?,
        "num_key_value_heads": facts.size_or("attention.head_count_kv", heads)?,
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon")?,
        "rope_theta": facts.number_or("rope.freq_base", 10000.0)?,
        "rope_scaling": rope::scaling(facts)?,
    }));
    if facts.family.model_type != "llama" {
        config.remove("mlp_bias");
    }
    if facts.family.model_type == "qwen2" {
        config.remove("attention_bias");
    }
    Ok(config)
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(map) = value else { unreachable!("written as an object") };
    map
}
