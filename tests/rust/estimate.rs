//! The estimate of what layers read is held against its formulas, written out in FP64 one element after another.

mod support;

use rayon::ThreadPoolBuilder;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tenpak::estimate::importance;
use tenpak::input::{Model, Sidecar, TensorInfo};
use tenpak::tensor::{Dtype, Encoding, Tensor};
use tenpak::{Error, Kind, Result};

const WIDTH: usize = 24;
const LAYERS: usize = 2;

/// A model that was never a file.
#[derive(Clone)]
struct InMemory {
    infos: Vec<TensorInfo>,
    bytes: Vec<Vec<u8>>,
    config: Option<Value>,
    /// Reading this tensor fails.
    unreadable: Option<String>,
}

impl InMemory {
    fn new(config: Value) -> Self {
        InMemory { infos: Vec::new(), bytes: Vec::new(), config: Some(config), unreadable: None }
    }

    /// Adds `middle` ± up to `spread`.
    fn put(&mut self, name: &str, shape: &[usize], dtype: Dtype, middle: f32, spread: f32) {
        let seed = self.infos.len() as u64 + 1;
        let len = shape.iter().product();
        let numbers: Vec<f32> =
            support::numbers(seed).take(len).map(|x| middle + x * 10.0 * spread).collect();
        let mut bytes = vec![0; len * dtype.size()];
        dtype.narrow(&numbers, &mut bytes).unwrap();
        let encoding = Encoding::Plain(dtype);
        self.infos.push(TensorInfo { name: name.to_owned(), shape: shape.to_vec(), encoding });
        self.bytes.push(bytes);
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.infos.iter().position(|t| t.name == name)
    }

    fn without(&self, name: &str) -> Self {
        let mut out = self.clone();
        let index = out.index(name).unwrap();
        out.infos.remove(index);
        out.bytes.remove(index);
        out
    }

    /// With that tensor's element `element` another one.
    fn with(&self, name: &str, element: usize, value: f32) -> Self {
        let mut out = self.clone();
        let index = out.index(name).unwrap();
        let Encoding::Plain(dtype) = out.infos[index].encoding else { unreachable!() };
        let at = element * dtype.size();
        dtype.narrow(&[value], &mut out.bytes[index][at..at + dtype.size()]).unwrap();
        out
    }

    /// With that tensor seen with another shape; it may get longer.
    fn reshaped(&self, name: &str, shape: &[usize]) -> Self {
        let mut out = self.clone();
        let index = out.index(name).unwrap();
        out.infos[index].shape = shape.to_vec();
        let len = out.infos[index].encoding.byte_len(shape.iter().product::<usize>() as u64).unwrap();
        out.bytes[index].resize(len as usize, 0);
        out
    }

    fn configured(&self, key: &str, value: Value) -> Self {
        let mut out = self.clone();
        out.config.as_mut().unwrap()[key] = value;
        out
    }

    fn widened(&self, name: &str) -> Vec<f64> {
        let index = self.index(name).unwrap();
        let mut out = vec![0f32; self.infos[index].shape.iter().product()];
        self.infos[index].encoding.widen(&self.bytes[index], 0, &mut out);
        out.into_iter().map(f64::from).collect()
    }
}

impl Model for InMemory {
    fn format(&self) -> &'static str {
        "memory"
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn read(&self, index: usize) -> Result<Tensor<'_>> {
        let TensorInfo { name, shape, encoding } = &self.infos[index];
        if self.unreadable.as_ref() == Some(name) {
            return Err(Error::input("the file has changed"));
        }
        Ok(Tensor { shape: shape.clone(), encoding: *encoding, bytes: Cow::Borrowed(&self.bytes[index]) })
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(Vec::new())
    }

    fn config(&self) -> Option<&Value> {
        self.config.as_ref()
    }

    fn paths(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}

// The models. Sizes are such that rows are no multiple of what is read at once, and the embedding has more rows than
// fit the least strips.

const VOCABULARY: usize = 4501;
const INNER: usize = 75;

fn gpt2(prefix: &str, activation: &str, dtype: Dtype) -> InMemory {
    let mut model = InMemory::new(json!({
        "model_type": "gpt2", "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "activation_function": activation,
    }));
    let mut put = |name: String, shape: &[usize], middle, spread| {
        model.put(&format!("{prefix}{name}"), shape, dtype, middle, spread);
    };
    put("wte.weight".into(), &[VOCABULARY, WIDTH], 0.02, 0.3);
    put("wpe.weight".into(), &[130, WIDTH], 0.0, 0.1);
    for layer in 0..LAYERS {
        for norm in ["ln_1", "ln_2"] {
            put(format!("h.{layer}.{norm}.weight"), &[WIDTH], 1.0, 0.8);
            put(format!("h.{layer}.{norm}.bias"), &[WIDTH], 0.0, 0.3);
        }
        for (name, input, out) in [
            ("attn.c_attn", WIDTH, 3 * WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", WIDTH, INNER),
            ("mlp.c_proj", INNER, WIDTH),
        ] {
            put(format!("h.{layer}.{name}.weight"), &[input, out], 0.0, 0.4);
            put(format!("h.{layer}.{name}.bias"), &[out], 0.0, 0.3);
        }
    }
    model
}

const HEADS: usize = 6;
const SHARED: usize = 2;
const HEAD: usize = 37;

fn llama(family: &str, activation: &str, biases: bool, dtype: Dtype) -> InMemory {
    let mut model = InMemory::new(json!({
        "model_type": family, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED, "head_dim": HEAD, "hidden_act": activation,
    }));
    model.put("model.embed_tokens.weight", &[VOCABULARY, WIDTH], dtype, 0.02, 0.3);
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            model.put(&format!("{at}.{norm}.weight"), &[WIDTH], dtype, 1.0, 0.8);
        }
        for (name, out) in [("q_proj", HEADS * HEAD), ("k_proj", SHARED * HEAD), ("v_proj", SHARED * HEAD)] {
            model.put(&format!("{at}.self_attn.{name}.weight"), &[out, WIDTH], dtype, 0.0, 0.4);
            if biases {
                model.put(&format!("{at}.self_attn.{name}.bias"), &[out], dtype, 0.0, 0.3);
            }
        }
        model.put(&format!("{at}.self_attn.o_proj.weight"), &[WIDTH, HEADS * HEAD], dtype, 0.0, 0.1);
        for name in ["gate_proj", "up_proj"] {
            model.put(&format!("{at}.mlp.{name}.weight"), &[INNER, WIDTH], dtype, 0.0, 0.4);
        }
        model.put(&format!("{at}.mlp.down_proj.weight"), &[WIDTH, INNER], dtype, 0.0, 0.3);
    }
    model.put("lm_head.weight", &[VOCABULARY, WIDTH], dtype, 0.0, 0.3);
    model
}

// The formulas.

const TOKENS: usize = 128;

/// Channels of each token.
type Batch = Vec<Vec<f64>>;

fn added(a: &Batch, b: &Batch) -> Batch {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect()
}

/// The rows of an embedding that `choose` picks for each token out of so many.
fn embedding(model: &InMemory, name: &str, choose: impl Fn(usize, usize) -> usize) -> Batch {
    let table = model.widened(name);
    let rows = table.len() / WIDTH;
    (0..TOKENS).map(|t| table[choose(t, rows) * WIDTH..][..WIDTH].to_vec()).collect()
}

/// Zipf's law, drawn at the multiples of the golden ratio.
fn frequent(t: usize, rows: usize) -> usize {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let frequency = |id: usize| 1.0 / (id as f64 + 10.0);
    let total: f64 = (0..rows).map(frequency).sum();
    let mut left = ((t as f64 + 0.5) * golden).fract() * total;
    (0..rows)
        .find(|id| {
            left -= frequency(*id);
            left <= 0.0
        })
        .unwrap_or(rows - 1)
}

fn spread(t: usize, rows: usize) -> usize {
    t * rows / TOKENS
}

fn normed(x: &Batch, weight: &[f64], bias: Option<&[f64]>) -> Batch {
    let token = |x: &Vec<f64>| {
        let n = x.len() as f64;
        let centre = if bias.is_some() { x.iter().sum::<f64>() / n } else { 0.0 };
        let scale = (x.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / n).sqrt();
        let bias = |j: usize| bias.map_or(0.0, |b| b[j]);
        x.iter().enumerate().map(|(j, x)| (x - centre) / scale * weight[j] + bias(j)).collect()
    };
    x.iter().map(token).collect()
}

/// `in_out`: how the weight is held.
fn linear(model: &InMemory, name: &str, x: &Batch, in_out: bool) -> Batch {
    let weight = model.widened(&format!("{name}.weight"));
    let bias = format!("{name}.bias");
    let bias = model.index(&bias).map(|_| model.widened(&bias));
    let token = |x: &Vec<f64>| {
        let n = weight.len() / x.len();
        let w = |o: usize, i: usize| if in_out { weight[i * n + o] } else { weight[o * x.len() + i] };
        let output = |o: usize| {
            (0..x.len()).map(|i| w(o, i) * x[i]).sum::<f64>() + bias.as_ref().map_or(0.0, |b| b[o])
        };
        (0..n).map(output).collect()
    };
    x.iter().map(token).collect()
}

/// Each position reads the mean of all values up to its own.
fn attended(values: &Batch) -> Batch {
    let mean = |t: usize, j: usize| values[..=t].iter().map(|v| v[j]).sum::<f64>() / (t + 1) as f64;
    (0..TOKENS).map(|t| (0..values[t].len()).map(|j| mean(t, j)).collect()).collect()
}

fn through(x: &Batch, activation: &str) -> Batch {
    let f = |x: &f64| match activation {
        "relu" => x.max(0.0),
        "silu" => x / (1.0 + (-x).exp()),
        _ => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    };
    x.iter().map(|token| token.iter().map(f).collect()).collect()
}

fn times(a: &Batch, b: &Batch) -> Batch {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).collect()).collect()
}

fn columns(x: &Batch, chosen: impl Iterator<Item = usize> + Clone) -> Batch {
    x.iter().map(|token| chosen.clone().map(|j| token[j]).collect()).collect()
}

fn relative(x: &Batch) -> Vec<f64> {
    let square = |j: usize| x.iter().map(|token| token[j].powi(2)).sum::<f64>();
    let squares: Vec<f64> = (0..x[0].len()).map(square).collect();
    let mean = squares.iter().sum::<f64>() / squares.len() as f64;
    squares.iter().map(|s| (s / mean).max(1e-6)).collect()
}

type Expected = BTreeMap<String, Vec<f64>>;

fn expected_gpt2(model: &InMemory, prefix: &str, activation: &str) -> Expected {
    let mut out = Expected::new();
    let tokens = embedding(model, &format!("{prefix}wte.weight"), frequent);
    let mut state = added(&tokens, &embedding(model, &format!("{prefix}wpe.weight"), spread));
    for layer in 0..LAYERS {
        let at = format!("{prefix}h.{layer}");
        let norm = |name: &str, state: &Batch| {
            let [weight, bias] = ["weight", "bias"].map(|part| model.widened(&format!("{at}.{name}.{part}")));
            normed(state, &weight, Some(&bias))
        };
        let x = norm("ln_1", &state);
        out.insert(format!("{at}.attn.c_attn.weight"), relative(&x));
        let values = linear(model, &format!("{at}.attn.c_attn"), &x, true);
        let mixed = attended(&columns(&values, 2 * WIDTH..3 * WIDTH));
        state = added(&state, &linear(model, &format!("{at}.attn.c_proj"), &mixed, true));
        let x = norm("ln_2", &state);
        out.insert(format!("{at}.mlp.c_fc.weight"), relative(&x));
        let hidden = through(&linear(model, &format!("{at}.mlp.c_fc"), &x, true), activation);
        state = added(&state, &linear(model, &format!("{at}.mlp.c_proj"), &hidden, true));
    }
    out
}

fn expected_llama(model: &InMemory, activation: &str) -> Expected {
    let mut out = Expected::new();
    let mut state = embedding(model, "model.embed_tokens.weight", frequent);
    for layer in 0..LAYERS {
        let at = format!("model.layers.{layer}");
        let norm =
            |name: &str, state: &Batch| normed(state, &model.widened(&format!("{at}.{name}.weight")), None);
        let x = norm("input_layernorm", &state);
        for name in ["q_proj", "k_proj", "v_proj"] {
            out.insert(format!("{at}.self_attn.{name}.weight"), relative(&x));
        }
        let values = linear(model, &format!("{at}.self_attn.v_proj"), &x, false);
        let queries = (0..HEADS).flat_map(|h| (0..HEAD).map(move |i| h / (HEADS / SHARED) * HEAD + i));
        let mixed = attended(&columns(&values, queries));
        state = added(&state, &linear(model, &format!("{at}.self_attn.o_proj"), &mixed, false));
        let x = norm("post_attention_layernorm", &state);
        for name in ["gate_proj", "up_proj"] {
            out.insert(format!("{at}.mlp.{name}.weight"), relative(&x));
        }
        let gate = through(&linear(model, &format!("{at}.mlp.gate_proj"), &x, false), activation);
        let hidden = times(&gate, &linear(model, &format!("{at}.mlp.up_proj"), &x, false));
        state = added(&state, &linear(model, &format!("{at}.mlp.down_proj"), &hidden, false));
    }
    out
}

fn agree(model: &InMemory, expected: &Expected, case: &str) {
    let found = importance(model).unwrap();
    assert!(found.keys().eq(expected.keys()), "{case}: {:?}", found.keys());
    for (name, expected) in expected {
        let found = &found[name];
        assert_eq!(found.len(), expected.len(), "{case}: {name}");
        for (j, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(*f) / e - 1.0).abs() < 2e-5, "{case}: {name}, column {j}: {f} is not {e}");
        }
    }
    let spread = |x: &Vec<f64>| {
        x.iter().copied().fold(0.0, f64::max) / x.iter().copied().fold(f64::INFINITY, f64::min)
    };
    assert!(expected.values().all(|x| spread(x) > 1.5), "{case}: nothing to tell apart");
}

#[test]
fn gpt2_follows_its_formulas() {
    for (prefix, activation, dtype) in [
        ("", "gelu_new", Dtype::F32),
        ("transformer.", "gelu", Dtype::F16),
        ("transformer.", "relu", Dtype::BF16),
    ] {
        let model = gpt2(prefix, activation, dtype);
        agree(&model, &expected_gpt2(&model, prefix, activation), activation);
    }
}

#[test]
fn the_llama_family_follows_its_formulas() {
    for (family, activation, biases, dtype) in [
        ("llama", "silu", false, Dtype::F16),
        ("mistral", "gelu", false, Dtype::F32),
        ("qwen2", "silu", true, Dtype::BF16),
        ("qwen3", "silu", false, Dtype::F32),
    ] {
        let model = llama(family, activation, biases, dtype);
        agree(&model, &expected_llama(&model, activation), family);
    }
}

#[test]
fn columns_that_are_always_zero_get_the_least_importance() {
    let norm = "model.layers.1.input_layernorm.weight";
    let model = llama("llama", "silu", false, Dtype::F32).with(norm, 5, 0.0);
    let found = importance(&model).unwrap();
    assert_eq!(found["model.layers.1.self_attn.q_proj.weight"][5], 1e-6);
    agree(&model, &expected_llama(&model, "silu"), "zero");
}

#[test]
fn other_families_have_no_estimate() {
    let model = llama("llama", "silu", false, Dtype::F32);
    let none = |model: &InMemory, case: &str| assert!(importance(model).unwrap().is_empty(), "{case}");
    assert!(!importance(&model).unwrap().is_empty());
    none(&InMemory { config: None, ..model.clone() }, "no config");
    none(&InMemory { config: Some(json!(["model_type"])), ..model.clone() }, "a list");
    for key in ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"] {
        none(&model.configured(key, Value::Null), key);
        none(&model.configured(key, json!("phi3")), key);
        none(&model.configured(key, json!(-1)), key);
    }
}

/// What a config says must not be believed before it is seen in the tensors.
#[test]
fn configs_that_cannot_be_have_no_estimate() {
    let big = 1u64 << 62;
    let llama = llama("llama", "silu", false, Dtype::F32);
    for key in ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"] {
        for n in [0, 5, big, big + 2, u64::MAX] {
            let model = llama.configured(key, json!(n));
            assert!(importance(&model).unwrap().is_empty(), "{key} {n}");
        }
    }
    let both =
        llama.configured("num_attention_heads", json!(big)).configured("num_key_value_heads", json!(1));
    assert!(importance(&both).unwrap().is_empty());
    let gpt2 = gpt2("", "relu", Dtype::F32);
    for key in ["n_embd", "n_layer"] {
        for n in [0, 5, big, u64::MAX] {
            assert!(importance(&gpt2.configured(key, json!(n))).unwrap().is_empty(), "{key} {n}");
        }
    }
}

/// The tensors without which there is no estimate, and whether they are read.
fn needed(model: &InMemory) -> Vec<(String, bool)> {
    let names = model.infos.iter().map(|t| t.name.clone());
    let needed = names.filter(|n| n != "lm_head.weight" && !n.ends_with("c_proj.bias"));
    needed.map(|n| (n.clone(), !n.contains("q_proj") && !n.contains("k_proj"))).collect()
}

#[test]
fn a_tensor_that_is_missing_or_strange_leaves_no_estimate() {
    for model in [gpt2("transformer.", "relu", Dtype::F32), llama("llama", "silu", false, Dtype::F32)] {
        let none = |model: &InMemory, case: &str| assert!(importance(model).unwrap().is_empty(), "{case}");
        for (name, read) in needed(&model) {
            let index = model.index(&name).unwrap();
            let shape = &model.infos[index].shape;
            if !name.ends_with(".bias") || name.contains("ln_") {
                none(&model.without(&name), &name);
            }
            let mut odd = model.clone();
            odd.infos[index].encoding = Encoding::Plain(Dtype::I32);
            none(&odd, &name);
            none(&model.reshaped(&name, &[&shape[..], &[1]].concat()), &name);
            // One input more than there is, and none.
            let input = if name.contains(".c_") { 0 } else { shape.len() - 1 };
            for inputs in [shape[input] + 1, 0] {
                let mut other = shape.clone();
                other[input] = inputs;
                none(&model.reshaped(&name, &other), &name);
            }
            if read {
                // Of embeddings the first token's row is read; the last element is among the values of c_attn.
                let last = match &name[..] {
                    n if n.ends_with("wpe.weight") => WIDTH - 1,
                    n if n.contains("wte") || n.contains("embed") => frequent(0, VOCABULARY) * WIDTH + 1,
                    _ => shape.iter().product::<usize>() - 1,
                };
                for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    none(&model.with(&name, last, value), &name);
                }
            }
        }
        for layer in 0..LAYERS {
            for name in ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"] {
                let name = format!("model.layers.{layer}.{name}.weight");
                let Some(index) = model.index(&name) else { continue };
                let shape = &model.infos[index].shape;
                none(&model.reshaped(&name, &[shape[0] + 1, shape[1]]), &name);
                none(&model.reshaped(&name, &[0, shape[1]]), &name);
            }
            for name in ["attn.c_attn", "attn.c_proj", "mlp.c_proj"] {
                let name = format!("transformer.h.{layer}.{name}.weight");
                let Some(index) = model.index(&name) else { continue };
                let shape = &model.infos[index].shape;
                none(&model.reshaped(&name, &[shape[0], shape[1] + 1]), &name);
            }
        }
    }
}

#[test]
fn what_does_not_matter_is_not_read() {
    let model = llama("llama", "silu", false, Dtype::F32);
    let expected = importance(&model).unwrap();
    for name in ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"] {
        let unread = InMemory { unreadable: Some(name.to_owned()), ..model.clone() };
        assert_eq!(importance(&unread).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_an_error() {
    for model in [gpt2("", "gelu_new", Dtype::F16), llama("llama", "silu", false, Dtype::F32)] {
        for (name, _) in needed(&model).into_iter().filter(|(_, read)| *read) {
            let unreadable = InMemory { unreadable: Some(name.clone()), ..model.clone() };
            assert_eq!(importance(&unreadable).unwrap_err().kind(), Kind::Input, "{name}");
        }
    }
}

#[test]
fn threads_do_not_show_in_the_result() {
    for model in [gpt2("", "gelu_new", Dtype::F16), llama("qwen2", "silu", true, Dtype::F16)] {
        let bits = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| importance(&model)).unwrap();
            assert!(!found.is_empty());
            found.into_iter().map(|(n, x)| (n, x.into_iter().map(f32::to_bits).collect::<Vec<_>>()))
        };
        let one: Vec<_> = bits(1).collect();
        for threads in [2, 5] {
            assert!(bits(threads).eq(one.iter().cloned()), "{threads} threads");
        }
    }
}
