//! What linear layers read, estimated from the weights alone: mean and variance of every channel are pushed through
//! the network, as if channels were independent (a mean-field approximation; after Poole et al. 2016).
//!
//! Some channels of a model's hidden state are far larger than others. That shows in its weights: in the embedding,
//! in the norms, in what layers write into the hidden state. Only inputs that come straight from a norm are reported:
//! for the others the estimate gained nothing.

use crate::error::{Error, Result};
use crate::input::Model;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Importance is the estimate to this power: an estimate is worth less than a measurement.
const POWER: f64 = 0.75;

/// The least importance, relative to the mean.
const LEAST: f64 = 1e-6;

/// What is left of the variance of values after attention has averaged over positions.
const ATTENTION: f64 = 0.3;

/// Token `id` is as frequent as 1 / (id + this): tokenizers number tokens from frequent to rare (Zipf's law).
const ZIPF: f64 = 10.0;

/// Rows that one task reads.
const ROWS: usize = 64;

/// Why there is no estimate.
enum Stop {
    /// The model is of a kind that is not known here, or lacks something.
    Unknown,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

type Estimate<T> = std::result::Result<T, Stop>;

/// One positive number for each input column of every weight whose input comes from a norm, by the weight's name; none
/// for a family that is not known, or a model that lacks a tensor.
///
/// # Errors
/// An input error if a file has changed since it was opened.
pub fn importance(model: &dyn Model) -> Result<BTreeMap<String, Vec<f32>>> {
    let names = model.tensors().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
    let mut network = Network { model, names, found: BTreeMap::new() };
    match network.walk() {
        Ok(()) => Ok(network.found),
        Err(Stop::Unknown) => Ok(BTreeMap::new()),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Mean and variance of some channels.
#[derive(Clone)]
struct Moments {
    mean: Vec<f64>,
    variance: Vec<f64>,
}

impl Moments {
    fn len(&self) -> usize {
        self.mean.len()
    }

    fn add(&mut self, other: &Moments) {
        self.mean.iter_mut().zip(&other.mean).for_each(|(a, b)| *a += b);
        self.variance.iter_mut().zip(&other.variance).for_each(|(a, b)| *a += b);
    }

    /// E[x²] of each channel.
    fn squares(&self) -> impl Iterator<Item = f64> + '_ {
        self.mean.iter().zip(&self.variance).map(|(m, v)| m * m + v)
    }

    /// After a norm with this weight, and with a bias if it subtracts the mean.
    fn normed(&self, weight: &[f64], bias: Option<&[f64]>) -> Moments {
        let n = self.len() as f64;
        let centre = if bias.is_some() { self.mean.iter().sum::<f64>() / n } else { 0.0 };
        let mut out = self.clone();
        out.mean.iter_mut().for_each(|m| *m -= centre);
        let scale = (out.squares().sum::<f64>() / n).sqrt().recip();
        for (j, (m, v)) in out.mean.iter_mut().zip(&mut out.variance).enumerate() {
            *m = *m * scale * weight[j] + bias.map_or(0.0, |b| b[j]);
            *v *= (scale * weight[j]).powi(2);
        }
        out
    }

    /// After a function of each channel, by quadrature over a normal distribution.
    fn through(&self, function: fn(f64) -> f64) -> Moments {
        // The trapezoidal rule is exact to many digits for what falls off so fast.
        let nodes: Vec<(f64, f64)> = (-16..=16)
            .map(|i| f64::from(i) * 0.25)
            .map(|x| (x, (-0.5 * x * x).exp() * 0.25 / std::f64::consts::TAU.sqrt()))
            .collect();
        let channels = self.mean.par_iter().zip(&self.variance);
        let moments = channels.map(|(mean, variance)| {
            let deviation = variance.sqrt();
            let (mut first, mut second) = (0.0, 0.0);
            for (x, weight) in &nodes {
                let y = function(mean + deviation * x);
                first += weight * y;
                second += weight * y * y;
            }
            (first, (second - first * first).max(0.0))
        });
        let (mean, variance) = moments.unzip();
        Moments { mean, variance }
    }

    /// The product of independent channels.
    fn times(&self, other: &Moments) -> Moments {
        let mean: Vec<f64> = self.mean.iter().zip(&other.mean).map(|(a, b)| a * b).collect();
        let squares = self.squares().zip(other.squares());
        let variance = squares.zip(&mean).map(|((a, b), m)| (a * b - m * m).max(0.0)).collect();
        Moments { mean, variance }
    }

    /// After attention: the values' means, and some of their variance, each head for all queries that share it.
    fn attended(&self, head: usize, repeats: usize) -> Moments {
        let repeat = |x: &[f64], scale: f64| -> Vec<f64> {
            x.chunks(head).flat_map(|h| h.repeat(repeats)).map(|x| x * scale).collect()
        };
        Moments { mean: repeat(&self.mean, 1.0), variance: repeat(&self.variance, ATTENTION) }
    }
}

/// A model whose hidden state is followed from layer to layer.
struct Network<'a> {
    model: &'a dyn Model,
    names: HashMap<&'a str, usize>,
    found: BTreeMap<String, Vec<f32>>,
}

/// How a weight is held.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    OutIn,
    InOut,
}

impl Network<'_> {
    fn walk(&mut self) -> Estimate<()> {
        match self.text("model_type")? {
            "gpt2" => self.walk_gpt2(),
            "llama" | "mistral" | "qwen2" | "qwen3" => self.walk_llama(),
            _ => Err(Stop::Unknown),
        }
    }

    fn walk_gpt2(&mut self) -> Estimate<()> {
        let prefix = if self.names.contains_key("wte.weight") { "" } else { "transformer." };
        let (width, layers) = (self.count("n_embd")?, self.count("n_layer")?);
        let function = self.function("activation_function")?;
        let tokens = self.embedding(&format!("{prefix}wte.weight"), width, true)?;
        let mut state = self.embedding(&format!("{prefix}wpe.weight"), width, false)?;
        state.add(&tokens);
        for layer in 0..layers {
            let at = format!("{prefix}h.{layer}");
            let norm = |network: &Self, name: &str, state: &Moments| {
                let weight = network.vector(&format!("{at}.{name}.weight"), width)?;
                let bias = network.vector(&format!("{at}.{name}.bias"), width)?;
                Ok::<_, Stop>(state.normed(&weight, Some(&bias)))
            };
            let x = norm(self, "ln_1", &state)?;
            self.report(format!("{at}.attn.c_attn.weight"), &x);
            let values = self.linear(&format!("{at}.attn.c_attn"), &x, 2 * width..3 * width, Held::InOut)?;
            let mixed = values.attended(width, 1);
            state.add(&self.linear(&format!("{at}.attn.c_proj"), &mixed, 0..width, Held::InOut)?);
            let x = norm(self, "ln_2", &state)?;
            self.report(format!("{at}.mlp.c_fc.weight"), &x);
            let inner = self.outputs(&format!("{at}.mlp.c_fc.weight"), Held::InOut)?;
            let hidden = self.linear(&format!("{at}.mlp.c_fc"), &x, 0..inner, Held::InOut)?.through(function);
            state.add(&self.linear(&format!("{at}.mlp.c_proj"), &hidden, 0..width, Held::InOut)?);
        }
        Ok(())
    }

    fn walk_llama(&mut self) -> Estimate<()> {
        let (width, layers) = (self.count("hidden_size")?, self.count("num_hidden_layers")?);
        let heads = self.count("num_attention_heads")?;
        let shared = self.count("num_key_value_heads").unwrap_or(heads);
        let function = self.function("hidden_act")?;
        let mut state = self.embedding("model.embed_tokens.weight", width, true)?;
        for layer in 0..layers {
            let at = format!("model.layers.{layer}");
            let x = state.normed(&self.vector(&format!("{at}.input_layernorm.weight"), width)?, None);
            for name in ["q_proj", "k_proj", "v_proj"] {
                self.report(format!("{at}.self_attn.{name}.weight"), &x);
            }
            let values = self.outputs(&format!("{at}.self_attn.v_proj.weight"), Held::OutIn)?;
            if shared == 0 || heads % shared != 0 || values % shared != 0 {
                return Err(Stop::Unknown);
            }
            let mixed = self.linear(&format!("{at}.self_attn.v_proj"), &x, 0..values, Held::OutIn)?;
            let mixed = mixed.attended(values / shared, heads / shared);
            state.add(&self.linear(&format!("{at}.self_attn.o_proj"), &mixed, 0..width, Held::OutIn)?);
            let norm = self.vector(&format!("{at}.post_attention_layernorm.weight"), width)?;
            let x = state.normed(&norm, None);
            for name in ["gate_proj", "up_proj"] {
                self.report(format!("{at}.mlp.{name}.weight"), &x);
            }
            let inner = self.outputs(&format!("{at}.mlp.gate_proj.weight"), Held::OutIn)?;
            let gate = self.linear(&format!("{at}.mlp.gate_proj"), &x, 0..inner, Held::OutIn)?;
            let up = self.linear(&format!("{at}.mlp.up_proj"), &x, 0..inner, Held::OutIn)?;
            let hidden = gate.through(function).times(&up);
            state.add(&self.linear(&format!("{at}.mlp.down_proj"), &hidden, 0..width, Held::OutIn)?);
        }
        Ok(())
    }

    fn text(&self, key: &str) -> Estimate<&str> {
        self.model.config().and_then(|c| c.get(key)?.as_str()).ok_or(Stop::Unknown)
    }

    fn count(&self, key: &str) -> Estimate<usize> {
        let number = self.model.config().and_then(|c| c.get(key)?.as_u64());
        number.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0).ok_or(Stop::Unknown)
    }

    fn function(&self, key: &str) -> Estimate<fn(f64) -> f64> {
        Ok(match self.text(key)? {
            "silu" | "swish" => |x| x / (1.0 + (-x).exp()),
            "relu" => |x| x.max(0.0),
            // The exact one differs from this by less than the estimate does from the truth.
            "gelu" | "gelu_new" | "gelu_pytorch_tanh" => {
                |x| 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh())
            }
            _ => return Err(Stop::Unknown),
        })
    }

    fn report(&mut self, name: String, input: &Moments) {
        let powered: Vec<f64> = input.squares().map(|s| s.powf(POWER)).collect();
        let mean = powered.iter().sum::<f64>() / powered.len() as f64;
        let importance: Vec<f32> = powered.iter().map(|p| (p / mean).max(LEAST) as f32).collect();
        // A network that overflows has no estimate; `max` has turned NaN into the least.
        if mean.is_finite() && mean > 0.0 && importance.iter().all(|i| i.is_finite()) {
            self.found.insert(name, importance);
        }
    }

    fn find(&self, name: &str) -> Estimate<usize> {
        let index = *self.names.get(name).ok_or(Stop::Unknown)?;
        let is_weight = self.model.tensors()[index].encoding.dtype().is_weight();
        if is_weight { Ok(index) } else { Err(Stop::Unknown) }
    }

    fn vector(&self, name: &str, len: usize) -> Estimate<Vec<f64>> {
        let index = self.find(name)?;
        if self.model.tensors()[index].shape != [len] {
            return Err(Stop::Unknown);
        }
        let tensor = self.model.read(index)?;
        let mut out = vec![0f32; len];
        tensor.encoding.widen(&tensor.bytes, 0, &mut out);
        Ok(out.into_iter().map(f64::from).collect())
    }

    /// The number of outputs of a weight.
    fn outputs(&self, name: &str, held: Held) -> Estimate<usize> {
        let shape = &self.model.tensors()[self.find(name)?].shape;
        match (shape.as_slice(), held) {
            ([out, _], Held::OutIn) | ([_, out], Held::InOut) => Ok(*out),
            _ => Err(Stop::Unknown),
        }
    }

    /// Mean and variance over the rows of an embedding, frequent tokens or all positions alike.
    fn embedding(&self, name: &str, width: usize, tokens: bool) -> Estimate<Moments> {
        let index = self.find(name)?;
        let [rows, cols] = self.model.tensors()[index].shape[..] else { return Err(Stop::Unknown) };
        if cols != width || rows == 0 {
            return Err(Stop::Unknown);
        }
        let frequency = |row: usize| if tokens { (row as f64 + ZIPF).recip() } else { 1.0 };
        let total: f64 = (0..rows).map(frequency).sum();
        let sums = self.strips(index, rows, width, |first, weights| {
            let mut sums = [vec![0f64; width], vec![0f64; width]];
            for (i, row) in weights.chunks_exact(width).enumerate() {
                let p = frequency(first + i) / total;
                let [means, squares] = &mut sums;
                for ((mean, square), &w) in means.iter_mut().zip(squares).zip(row) {
                    let w = f64::from(w);
                    *mean += p * w;
                    *square += p * w * w;
                }
            }
            sums
        })?;
        let [mean, square] = add_up(sums, width);
        let variance = square.iter().zip(&mean).map(|(s, m)| (s - m * m).max(0.0)).collect();
        Ok(Moments { mean, variance })
    }

    /// Some outputs of a linear layer, `NAME.weight` and perhaps `NAME.bias`.
    fn linear(&self, name: &str, x: &Moments, outputs: Range<usize>, held: Held) -> Estimate<Moments> {
        let index = self.find(&format!("{name}.weight"))?;
        let [rows, cols] = self.model.tensors()[index].shape[..] else { return Err(Stop::Unknown) };
        let (out, input) = if held == Held::OutIn { (rows, cols) } else { (cols, rows) };
        if input != x.len() || outputs.end > out || cols == 0 {
            return Err(Stop::Unknown);
        }
        let mean: Vec<f32> = x.mean.iter().map(|m| *m as f32).collect();
        let variance: Vec<f32> = x.variance.iter().map(|v| *v as f32).collect();
        let mut moments = if held == Held::OutIn {
            let rows = self.strips(index, outputs.end, cols, |_, weights| {
                weights.chunks_exact(cols).map(|row| dot_products(row, &mean, &variance)).collect::<Vec<_>>()
            })?;
            let (mean, variance) = rows.into_iter().flatten().skip(outputs.start).unzip();
            Moments { mean, variance }
        } else {
            let sums = self.strips(index, rows, cols, |first, weights| {
                let mut sums = [vec![0f32; outputs.len()], vec![0f32; outputs.len()]];
                for (i, row) in weights.chunks_exact(cols).enumerate() {
                    let (m, v) = (mean[first + i], variance[first + i]);
                    let [means, variances] = &mut sums;
                    for ((mean, variance), &w) in means.iter_mut().zip(variances).zip(&row[outputs.clone()]) {
                        *mean += w * m;
                        *variance += w * w * v;
                    }
                }
                sums.map(|s| s.into_iter().map(f64::from).collect::<Vec<_>>())
            })?;
            let [mean, variance] = add_up(sums, outputs.len());
            Moments { mean, variance }
        };
        let bias = format!("{name}.bias");
        if self.names.contains_key(bias.as_str()) {
            let bias = self.vector(&bias, out)?;
            moments.mean.iter_mut().zip(&bias[outputs]).for_each(|(m, b)| *m += b);
        }
        Ok(moments)
    }

    /// Calls `work` with the first row and the weights of each strip, on many threads; results are in order, so that
    /// sums over them do not depend on the threads.
    fn strips<T: Send>(
        &self,
        index: usize,
        rows: usize,
        cols: usize,
        work: impl Fn(usize, &[f32]) -> T + Sync,
    ) -> Estimate<Vec<T>> {
        let tensor = self.model.read(index)?;
        let firsts: Vec<usize> = (0..rows).step_by(ROWS).collect();
        let strip = |scratch: &mut Vec<f32>, &first: &usize| {
            scratch.resize(ROWS.min(rows - first) * cols, 0.0);
            tensor.encoding.widen(&tensor.bytes, first * cols, scratch);
            work(first, scratch)
        };
        Ok(firsts.par_iter().map_init(Vec::new, strip).collect())
    }
}

/// Σ w·m and Σ w²·v.
fn dot_products(w: &[f32], m: &[f32], v: &[f32]) -> (f64, f64) {
    const LANES: usize = 16;
    let (mut means, mut variances) = ([0f32; LANES], [0f32; LANES]);
    let mut add = |w: &[f32], m: &[f32], v: &[f32]| {
        for (((mean, variance), w), (m, v)) in
            means.iter_mut().zip(&mut variances).zip(w).zip(m.iter().zip(v))
        {
            *mean += w * m;
            *variance += w * w * v;
        }
    };
    for ((w, m), v) in w.chunks(LANES).zip(m.chunks(LANES)).zip(v.chunks(LANES)) {
        add(w, m, v);
    }
    let sum = |lanes: [f32; LANES]| lanes.into_iter().map(f64::from).sum();
    (sum(means), sum(variances))
}

fn add_up(strips: Vec<[Vec<f64>; 2]>, len: usize) -> [Vec<f64>; 2] {
    let mut total = [vec![0f64; len], vec![0f64; len]];
    for strip in strips {
        for (total, strip) in total.iter_mut().zip(strip) {
            total.iter_mut().zip(strip).for_each(|(t, s)| *t += s);
        }
    }
    total
}
