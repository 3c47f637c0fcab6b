//! What linear layers read, estimated from the weights alone: some tokens are pushed through the network.
//!
//! Some channels of a model's hidden state are far larger than others. That shows with any tokens: here they are drawn
//! as frequent as Zipf's law has them, in no order, and attention looks at all positions before alike. Only inputs that
//! come straight from a norm are reported: for the others the estimate gained nothing.

use crate::codec::simd::{Kernel, LANES, Level, Simd};
use crate::error::{Error, Result};
use crate::input::Model;
use rayon::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Tokens that are pushed through the network together.
const TOKENS: usize = 128;

/// Importance is the estimate to this power: an estimate is worth less than a measurement.
const POWER: f64 = 1.0;

/// The least importance, relative to the mean.
const LEAST: f64 = 1e-6;

/// Token `id` is as frequent as 1 / (id + this): tokenizers number tokens from frequent to rare (Zipf's law).
const ZIPF: f64 = 10.0;

/// Multiples of this, less whole numbers, lie evenly from 0 to 1 and in no order.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Outputs of a linear layer that one task computes, and inputs that it takes at a time, so that their weights and
/// tokens stay in a core's cache.
const OUTPUTS: usize = 64;
const INPUTS: usize = 256;

/// Outputs that are computed together, so that their inputs are loaded once.
const TOGETHER: usize = 4;

/// Sixteens of tokens that are computed together.
const SIXTEENS: usize = 2;

const _: () = assert!(OUTPUTS.is_multiple_of(TOGETHER) && TOKENS.is_multiple_of(SIXTEENS * LANES));

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

/// One positive number for each input column of every weight whose input comes straight from a norm, by the weight's
/// name; their mean is 1. Nothing for a family that is not known, a model that lacks a tensor or has one of another
/// shape, or one that is not finite.
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

/// One number for each token.
type Tokens = [f32; TOKENS];

/// Channels of all tokens.
#[derive(Clone)]
struct Batch(Vec<Tokens>);

impl Batch {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn add(&mut self, other: &Batch) {
        self.0.as_flattened_mut().iter_mut().zip(other.0.as_flattened()).for_each(|(a, b)| *a += b);
    }

    /// Themselves if they are numbers: what follows a weight that is none would hide it now and then.
    fn finite(self) -> Estimate<Self> {
        let finite = self.0.as_flattened().iter().all(|x| x.is_finite());
        if finite { Ok(self) } else { Err(Stop::Unknown) }
    }

    /// The mean over tokens of x² of each channel.
    fn squares(&self) -> impl Iterator<Item = f64> + '_ {
        let square = |x: &f32| f64::from(*x) * f64::from(*x);
        self.0.iter().map(move |channel| channel.iter().map(square).sum::<f64>() / TOKENS as f64)
    }

    /// After a norm with this weight, and with a bias if it subtracts the mean.
    fn normed(&self, weight: &[f32], bias: Option<&[f32]>) -> Batch {
        let n = self.len() as f64;
        let (mut centre, mut squares) = ([0f64; TOKENS], [0f64; TOKENS]);
        if bias.is_some() {
            for channel in &self.0 {
                centre.iter_mut().zip(channel).for_each(|(c, x)| *c += f64::from(*x));
            }
        }
        let centre = centre.map(|c| (c / n) as f32);
        for channel in &self.0 {
            for ((square, x), centre) in squares.iter_mut().zip(channel).zip(&centre) {
                *square += f64::from(x - centre) * f64::from(x - centre);
            }
        }
        let scale = squares.map(|s| (s / n).sqrt().recip() as f32);
        let channel = |(j, x): (usize, &Tokens)| {
            let bias = bias.map_or(0.0, |b| b[j]);
            std::array::from_fn(|t| (x[t] - centre[t]) * scale[t] * weight[j] + bias)
        };
        Batch(self.0.iter().enumerate().map(channel).collect())
    }

    /// After a function of each channel.
    fn through(mut self, function: fn(f32) -> f32) -> Batch {
        self.0.par_iter_mut().for_each(|channel| channel.iter_mut().for_each(|x| *x = function(*x)));
        self
    }

    fn times(mut self, other: &Batch) -> Batch {
        self.0.as_flattened_mut().iter_mut().zip(other.0.as_flattened()).for_each(|(a, b)| *a *= b);
        self
    }

    /// After attention: the mean of the values of a position and all before, each head for all queries that share it.
    fn attended(&self, head: usize, repeats: usize) -> Batch {
        let mean = |channel: &Tokens| {
            let mut sum = 0f64;
            let mut out = *channel;
            for (t, x) in out.iter_mut().enumerate() {
                sum += f64::from(*x);
                *x = (sum / (t + 1) as f64) as f32;
            }
            out
        };
        let means: Vec<Tokens> = self.0.iter().map(mean).collect();
        Batch(means.chunks(head).flat_map(|head| head.repeat(repeats)).collect())
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
        let mut state = self.rows(&format!("{prefix}wte.weight"), width, tokens)?;
        state.add(&self.rows(&format!("{prefix}wpe.weight"), width, positions)?);
        for layer in 0..layers {
            let at = format!("{prefix}h.{layer}");
            let norm = |network: &Self, name: &str, state: &Batch| {
                let weight = network.vector(&format!("{at}.{name}.weight"), width)?;
                let bias = network.vector(&format!("{at}.{name}.bias"), width)?;
                Ok::<_, Stop>(state.normed(&weight, Some(&bias)))
            };
            let x = norm(self, "ln_1", &state)?;
            self.report(format!("{at}.attn.c_attn.weight"), &x, Held::InOut)?;
            // Queries, keys, values.
            let values = 2 * width..3 * width;
            let values =
                self.linear_part(&format!("{at}.attn.c_attn"), &x, 3 * width, values, Held::InOut)?;
            let mixed = values.attended(width, 1);
            state.add(&self.linear(&format!("{at}.attn.c_proj"), &mixed, width, Held::InOut)?);
            let x = norm(self, "ln_2", &state)?;
            self.report(format!("{at}.mlp.c_fc.weight"), &x, Held::InOut)?;
            let (inner, _) = self.extents(&format!("{at}.mlp.c_fc.weight"), Held::InOut)?;
            let hidden = self.linear(&format!("{at}.mlp.c_fc"), &x, inner, Held::InOut)?;
            let hidden = hidden.through(function);
            state.add(&self.linear(&format!("{at}.mlp.c_proj"), &hidden, width, Held::InOut)?);
        }
        Ok(())
    }

    fn walk_llama(&mut self) -> Estimate<()> {
        let (width, layers) = (self.count("hidden_size")?, self.count("num_hidden_layers")?);
        let heads = self.count("num_attention_heads")?;
        let shared = self.count("num_key_value_heads").unwrap_or(heads);
        let function = self.function("hidden_act")?;
        let mut state = self.rows("model.embed_tokens.weight", width, tokens)?;
        for layer in 0..layers {
            let at = format!("model.layers.{layer}");
            let x = state.normed(&self.vector(&format!("{at}.input_layernorm.weight"), width)?, None);
            for name in ["q_proj", "k_proj", "v_proj"] {
                self.report(format!("{at}.self_attn.{name}.weight"), &x, Held::OutIn)?;
            }
            let (values, _) = self.extents(&format!("{at}.self_attn.v_proj.weight"), Held::OutIn)?;
            let (_, mixed) = self.extents(&format!("{at}.self_attn.o_proj.weight"), Held::OutIn)?;
            let (head, repeats) = (values / shared, heads / shared);
            // Before anything is as long as a config says.
            if values != head * shared || heads != repeats * shared || head.checked_mul(heads) != Some(mixed)
            {
                return Err(Stop::Unknown);
            }
            let values = self.linear(&format!("{at}.self_attn.v_proj"), &x, values, Held::OutIn)?;
            let mixed = values.attended(head, repeats);
            state.add(&self.linear(&format!("{at}.self_attn.o_proj"), &mixed, width, Held::OutIn)?);
            let norm = self.vector(&format!("{at}.post_attention_layernorm.weight"), width)?;
            let x = state.normed(&norm, None);
            for name in ["gate_proj", "up_proj"] {
                self.report(format!("{at}.mlp.{name}.weight"), &x, Held::OutIn)?;
            }
            let (inner, _) = self.extents(&format!("{at}.mlp.gate_proj.weight"), Held::OutIn)?;
            let gate = self.linear(&format!("{at}.mlp.gate_proj"), &x, inner, Held::OutIn)?;
            let up = self.linear(&format!("{at}.mlp.up_proj"), &x, inner, Held::OutIn)?;
            let hidden = gate.through(function).times(&up);
            state.add(&self.linear(&format!("{at}.mlp.down_proj"), &hidden, width, Held::OutIn)?);
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

    fn function(&self, key: &str) -> Estimate<fn(f32) -> f32> {
        Ok(match self.text(key)? {
            "silu" | "swish" => |x| x / (1.0 + (-x).exp()),
            "relu" => |x| x.max(0.0),
            // The exact one differs from this by less than the estimate does from the truth.
            "gelu" | "gelu_new" | "gelu_pytorch_tanh" => {
                |x| x / (1.0 + (-1.595_769 * (x + 0.044_715 * x * x * x)).exp())
            }
            _ => return Err(Stop::Unknown),
        })
    }

    fn report(&mut self, name: String, input: &Batch, held: Held) -> Estimate<()> {
        if self.extents(&name, held)?.1 != input.len() {
            return Err(Stop::Unknown);
        }
        let powered: Vec<f64> = input.squares().map(|s| s.powf(POWER)).collect();
        let mean = powered.iter().sum::<f64>() / powered.len() as f64;
        if !mean.is_finite() || mean <= 0.0 {
            return Err(Stop::Unknown);
        }
        let importance = powered.iter().map(|p| (p / mean).max(LEAST) as f32).collect();
        self.found.insert(name, importance);
        Ok(())
    }

    fn find(&self, name: &str) -> Estimate<usize> {
        let index = *self.names.get(name).ok_or(Stop::Unknown)?;
        let is_weight = self.model.tensors()[index].encoding.dtype().is_weight();
        if is_weight { Ok(index) } else { Err(Stop::Unknown) }
    }

    fn vector(&self, name: &str, len: usize) -> Estimate<Vec<f32>> {
        let index = self.find(name)?;
        if self.model.tensors()[index].shape != [len] {
            return Err(Stop::Unknown);
        }
        let tensor = self.model.read(index)?;
        let mut out = vec![0f32; len];
        tensor.encoding.widen(&tensor.bytes, 0, &mut out);
        Ok(out)
    }

    /// The outputs and the inputs of a weight, none of them zero.
    fn extents(&self, name: &str, held: Held) -> Estimate<(usize, usize)> {
        match (&self.model.tensors()[self.find(name)?].shape[..], held) {
            (&[out, input], Held::OutIn) | (&[input, out], Held::InOut) if out > 0 && input > 0 => {
                Ok((out, input))
            }
            _ => Err(Stop::Unknown),
        }
    }

    /// Rows of an embedding, one for each token; `choose` picks one out of so many for a token's number.
    fn rows(&self, name: &str, width: usize, choose: fn(usize) -> Vec<usize>) -> Estimate<Batch> {
        let (rows, cols) = self.extents(name, Held::OutIn)?;
        if cols != width {
            return Err(Stop::Unknown);
        }
        let tensor = self.model.read(self.find(name)?)?;
        let (mut out, mut row) = (vec![[0f32; TOKENS]; width], vec![0f32; width]);
        for (t, chosen) in choose(rows).into_iter().enumerate() {
            tensor.encoding.widen(&tensor.bytes, chosen * width, &mut row);
            out.iter_mut().zip(&row).for_each(|(channel, x)| channel[t] = *x);
        }
        Batch(out).finite()
    }

    /// A linear layer with `out` outputs: `NAME.weight` and perhaps `NAME.bias`.
    fn linear(&self, name: &str, x: &Batch, out: usize, held: Held) -> Estimate<Batch> {
        self.linear_part(name, x, out, 0..out, held)
    }

    /// The outputs `kept` of such a layer.
    fn linear_part(
        &self,
        name: &str,
        x: &Batch,
        out: usize,
        kept: Range<usize>,
        held: Held,
    ) -> Estimate<Batch> {
        let weight = format!("{name}.weight");
        if self.extents(&weight, held)? != (out, x.len()) {
            return Err(Stop::Unknown);
        }
        let tensor = self.model.read(self.find(&weight)?)?;
        let (width, level) = (x.len(), Level::detect());
        // Every sum is over inputs in their order, whatever the threads.
        let firsts: Vec<usize> = kept.clone().step_by(OUTPUTS).collect();
        let sums = firsts.into_par_iter().map(|first| {
            let outputs = first..kept.end.min(first + OUTPUTS);
            let mut sums = [[0f32; TOKENS]; OUTPUTS];
            // Zero where there are fewer outputs.
            let mut w = [0f32; OUTPUTS * INPUTS];
            for (i, x) in x.0.chunks(INPUTS).enumerate() {
                let inputs = i * INPUTS..i * INPUTS + x.len();
                let steps = match held {
                    Held::OutIn => {
                        for (o, w) in outputs.clone().zip(w.chunks_exact_mut(INPUTS)) {
                            let start = o * width + inputs.start;
                            tensor.encoding.widen(&tensor.bytes, start, &mut w[..inputs.len()]);
                        }
                        (INPUTS, 1)
                    }
                    Held::InOut => {
                        for (j, w) in inputs.clone().zip(w.chunks_exact_mut(OUTPUTS)) {
                            tensor.encoding.widen(
                                &tensor.bytes,
                                j * out + outputs.start,
                                &mut w[..outputs.len()],
                            );
                        }
                        (1, OUTPUTS)
                    }
                };
                level.run(MultiplyAdd { w: &w, steps, x, sums: &mut sums });
            }
            sums[..outputs.len()].to_vec()
        });
        let mut y = Batch(sums.collect::<Vec<_>>().concat());
        let bias = format!("{name}.bias");
        if self.names.contains_key(bias.as_str()) {
            let bias = self.vector(&bias, out)?;
            y.0.iter_mut().zip(&bias[kept]).for_each(|(channel, b)| channel.iter_mut().for_each(|x| *x += b));
        }
        y.finite()
    }
}

/// What token each is, of so many, frequent ones more often.
fn tokens(rows: usize) -> Vec<usize> {
    let mut total = 0.0;
    let sums: Vec<f64> = (0..rows)
        .map(|id| {
            total += (id as f64 + ZIPF).recip();
            total
        })
        .collect();
    let drawn = (0..TOKENS).map(|t| ((t as f64 + 0.5) * GOLDEN).fract() * total);
    drawn.map(|at| sums.partition_point(|sum| *sum < at).min(rows - 1)).collect()
}

/// Where each token is, of so many positions.
fn positions(rows: usize) -> Vec<usize> {
    (0..TOKENS).map(|t| (t as u128 * rows as u128 / TOKENS as u128) as usize).collect()
}

/// Adds products of weights and inputs to the sums of outputs.
struct MultiplyAdd<'a> {
    w: &'a [f32],
    /// From an output's weight to the next output's, and to the next input's.
    steps: (usize, usize),
    x: &'a [Tokens],
    sums: &'a mut [Tokens; OUTPUTS],
}

impl Kernel for MultiplyAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (to_output, to_input) = self.steps;
        for (o, sums) in self.sums.as_chunks_mut::<TOGETHER>().0.iter_mut().enumerate() {
            let w = &self.w[o * TOGETHER * to_output..];
            for part in (0..TOKENS / LANES).step_by(SIXTEENS) {
                let mut sum = [[s.splat(0.0); SIXTEENS]; TOGETHER];
                for (sum, tokens) in sum.iter_mut().zip(&*sums) {
                    *sum = std::array::from_fn(|i| s.load(&tokens.as_chunks().0[part + i]));
                }
                for (j, x) in self.x.iter().enumerate() {
                    let x: [S::F; SIXTEENS] = std::array::from_fn(|i| s.load(&x.as_chunks().0[part + i]));
                    for (r, sum) in sum.iter_mut().enumerate() {
                        let w = s.splat(w[r * to_output + j * to_input]);
                        for (sum, x) in sum.iter_mut().zip(x) {
                            *sum = s.fma(w, x, *sum);
                        }
                    }
                }
                for (sum, tokens) in sum.iter().zip(&mut *sums) {
                    for (i, sum) in sum.iter().enumerate() {
                        s.store(*sum, &mut tokens.as_chunks_mut().0[part + i]);
                    }
                }
            }
        }
    }
}
