//! What linear layers read, estimated from the weights alone: mean and variance of every channel are pushed through
//! the network, as if channels were independent (a mean-field approximation; after Poole et al. 2016).
//!
//! Some channels of a model's hidden state are far larger than others. That shows in its weights: in the embedding,
//! in the norms, in what layers write into the hidden state. Only inputs that come straight from a norm are reported:
//! for the others the estimate gained nothing.

use crate::codec::simd::{Kernel, Level, Simd};
use crate::error::{Error, Result};
use crate::input::Model;
use crate::tensor::Tensor;
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

/// The least and the most parts that a matrix is read in: small ones are not worth a task, and each has its sums in
/// memory. Neither depends on the number of threads, so that sums do not.
const LEAST_ROWS: usize = 64;
const MOST_STRIPS: usize = 64;

/// Rows that are summed in FP32 before their sum is added in FP64.
const ROWS_IN_FP32: usize = 64;

/// Rows that are added at once, so that sums are loaded and stored less often.
const ROWS_AT_ONCE: usize = 4;

/// The positive nodes and their weights of Gauss-Hermite quadrature with 15 nodes, for the standard normal
/// distribution (`numpy.polynomial.hermite_e.hermegauss(15)`, weights divided by their sum); 0 is the fifteenth.
const NODES: [(f64, f64); 7] = [
    (0.799_129_068_324_548, 0.232_462_293_609_732_25),
    (1.606_710_069_028_729_7, 0.089_417_795_399_844_37),
    (2.432_436_827_009_758, 0.017_365_774_492_137_616),
    (3.289_082_424_398_766_4, 0.001_567_357_503_549_956),
    (4.196_207_711_269_015_5, 5.642_146_405_189_029e-5),
    (5.190_093_591_304_781, 5.975_419_597_920_599e-7),
    (6.363_947_888_829_839, 8.589_649_899_633_252e-10),
];

/// The weight of node 0.
const MIDDLE: f64 = 0.318_259_518_259_518_15;

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

    /// Themselves if they are numbers: what follows a weight that is none would hide it now and then.
    fn finite(self) -> Estimate<Self> {
        let finite = self.mean.iter().chain(&self.variance).all(|x| x.is_finite());
        if finite { Ok(self) } else { Err(Stop::Unknown) }
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
        let channels = self.mean.par_iter().zip(&self.variance);
        let moments = channels.map(|(mean, variance)| {
            let deviation = variance.sqrt();
            let y = function(*mean);
            let (mut first, mut second) = (MIDDLE * y, MIDDLE * y * y);
            for (x, weight) in NODES {
                let (low, high) = (function(mean - deviation * x), function(mean + deviation * x));
                first += weight * (low + high);
                second += weight * (low * low + high * high);
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
        let mut state = self.embedding("model.embed_tokens.weight", width, true)?;
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

    fn report(&mut self, name: String, input: &Moments, held: Held) -> Estimate<()> {
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

    /// The outputs and the inputs of a weight, none of them zero.
    fn extents(&self, name: &str, held: Held) -> Estimate<(usize, usize)> {
        match (&self.model.tensors()[self.find(name)?].shape[..], held) {
            (&[out, input], Held::OutIn) | (&[input, out], Held::InOut) if out > 0 && input > 0 => {
                Ok((out, input))
            }
            _ => Err(Stop::Unknown),
        }
    }

    /// Mean and variance over the rows of an embedding, frequent tokens or all positions alike.
    fn embedding(&self, name: &str, width: usize, tokens: bool) -> Estimate<Moments> {
        let (rows, cols) = self.extents(name, Held::OutIn)?;
        if cols != width {
            return Err(Stop::Unknown);
        }
        let frequency = |row: usize| if tokens { (row as f64 + ZIPF).recip() } else { 1.0 };
        let total: f64 = (0..rows).map(frequency).sum();
        let probability = |row: usize| (frequency(row) / total) as f32;
        let mut moments = self.column_sums(name, 0..width, |row| (probability(row), probability(row)))?;
        let squares = moments.variance.iter_mut().zip(&moments.mean);
        squares.for_each(|(s, m)| *s = (*s - m * m).max(0.0));
        moments.finite()
    }

    /// A linear layer with `out` outputs: `NAME.weight` and perhaps `NAME.bias`.
    fn linear(&self, name: &str, x: &Moments, out: usize, held: Held) -> Estimate<Moments> {
        self.linear_part(name, x, out, 0..out, held)
    }

    /// The outputs `kept` of such a layer.
    fn linear_part(
        &self,
        name: &str,
        x: &Moments,
        out: usize,
        kept: Range<usize>,
        held: Held,
    ) -> Estimate<Moments> {
        let weight = format!("{name}.weight");
        if self.extents(&weight, held)? != (out, x.len()) {
            return Err(Stop::Unknown);
        }
        let mean: Vec<f32> = x.mean.iter().map(|m| *m as f32).collect();
        let variance: Vec<f32> = x.variance.iter().map(|v| *v as f32).collect();
        let mut moments = match held {
            Held::OutIn => self.row_sums(&weight, kept.clone(), &mean, &variance)?,
            Held::InOut => self.column_sums(&weight, kept.clone(), |row| (mean[row], variance[row]))?,
        };
        let bias = format!("{name}.bias");
        if self.names.contains_key(bias.as_str()) {
            let bias = self.vector(&bias, out)?;
            moments.mean.iter_mut().zip(&bias[kept]).for_each(|(m, b)| *m += b);
        }
        moments.finite()
    }

    /// Σ w·m and Σ w²·v over each of the rows `kept`.
    fn row_sums(&self, name: &str, kept: Range<usize>, m: &[f32], v: &[f32]) -> Estimate<Moments> {
        let level = Level::detect();
        let strips = self.strips(name, kept, |tensor, rows| {
            let mut row = vec![0f32; m.len()];
            let sums = rows.map(|r| {
                tensor.encoding.widen(&tensor.bytes, r * m.len(), &mut row);
                level.run(DotProducts { w: &row, m, v })
            });
            sums.collect::<Vec<_>>()
        })?;
        let (mean, variance) = strips.into_iter().flatten().unzip();
        Ok(Moments { mean, variance })
    }

    /// Σ a·w and Σ b·w² over all rows, for each of the columns `kept`; `factors` are a and b of a row.
    fn column_sums(
        &self,
        name: &str,
        kept: Range<usize>,
        factors: impl Fn(usize) -> (f32, f32) + Sync,
    ) -> Estimate<Moments> {
        let (all_rows, cols) = self.extents(name, Held::OutIn)?;
        let (n, level) = (kept.len(), Level::detect());
        let strips = self.strips(name, 0..all_rows, |tensor, rows| {
            let mut total = [vec![0f64; n], vec![0f64; n]];
            let mut sums = [vec![0f32; n], vec![0f32; n]];
            let mut some = vec![0f32; n * ROWS_AT_ONCE];
            for row in rows.clone().step_by(ROWS_AT_ONCE) {
                // Rows past the last one count as zeros.
                let mut ab = [(0f32, 0f32); ROWS_AT_ONCE];
                let present = row..rows.end.min(row + ROWS_AT_ONCE);
                if present.len() < ROWS_AT_ONCE {
                    some.fill(0.0);
                }
                for ((w, ab), r) in some.chunks_exact_mut(n).zip(&mut ab).zip(present.clone()) {
                    tensor.encoding.widen(&tensor.bytes, r * cols + kept.start, w);
                    *ab = factors(r);
                }
                level.run(AddRows { sums: &mut sums, w: &some, ab });
                if present.end == rows.end || (present.end - rows.start).is_multiple_of(ROWS_IN_FP32) {
                    for (total, sums) in total.iter_mut().flatten().zip(sums.iter_mut().flatten()) {
                        *total += f64::from(std::mem::take(sums));
                    }
                }
            }
            total
        })?;
        let mut out = Moments { mean: vec![0.0; n], variance: vec![0.0; n] };
        for [mean, variance] in strips {
            out.add(&Moments { mean, variance });
        }
        Ok(out)
    }

    /// Calls `work` with strips of some rows, on many threads; results are in order, so that sums over them do not
    /// depend on the threads.
    fn strips<T: Send>(
        &self,
        name: &str,
        rows: Range<usize>,
        work: impl Fn(&Tensor<'_>, Range<usize>) -> T + Sync,
    ) -> Estimate<Vec<T>> {
        let tensor = self.model.read(self.find(name)?)?;
        let strip = rows.len().div_ceil(MOST_STRIPS).next_multiple_of(ROWS_AT_ONCE).max(LEAST_ROWS);
        let firsts: Vec<usize> = rows.clone().step_by(strip).collect();
        let results = firsts.into_par_iter().map(|first| work(&tensor, first..rows.end.min(first + strip)));
        Ok(results.collect())
    }
}

/// Σ w·m and Σ w²·v of a row. Written without the traits' operations, it gives the same on every level.
struct DotProducts<'a> {
    w: &'a [f32],
    m: &'a [f32],
    v: &'a [f32],
}

impl Kernel for DotProducts<'_> {
    type Output = (f64, f64);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (f64, f64) {
        const LANES: usize = 16;
        let (mut means, mut variances) = ([0f32; LANES], [0f32; LANES]);
        let (w, w_rest) = self.w.as_chunks::<LANES>();
        let (m, m_rest) = self.m.as_chunks::<LANES>();
        let (v, v_rest) = self.v.as_chunks::<LANES>();
        for ((w, m), v) in w.iter().zip(m).zip(v) {
            for i in 0..LANES {
                means[i] += w[i] * m[i];
                variances[i] += w[i] * w[i] * v[i];
            }
        }
        for (i, ((w, m), v)) in w_rest.iter().zip(m_rest).zip(v_rest).enumerate() {
            means[i] += w * m;
            variances[i] += w * w * v;
        }
        (means.into_iter().map(f64::from).sum(), variances.into_iter().map(f64::from).sum())
    }
}

/// Adds a·w and b·w² of some rows, one after another in `w`, to the sums of their columns; the same on every level.
struct AddRows<'a> {
    sums: &'a mut [Vec<f32>; 2],
    w: &'a [f32],
    ab: [(f32, f32); ROWS_AT_ONCE],
}

impl Kernel for AddRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let [first, second] = self.sums;
        let n = first.len();
        let (w0, rest) = self.w.split_at(n);
        let (w1, rest) = rest.split_at(n);
        let (w2, w3) = rest.split_at(n);
        let [(a0, b0), (a1, b1), (a2, b2), (a3, b3)] = self.ab;
        let rows = w0.iter().zip(w1).zip(w2.iter().zip(w3));
        for ((first, second), ((w0, w1), (w2, w3))) in first.iter_mut().zip(second).zip(rows) {
            *first += (a0 * w0 + a1 * w1) + (a2 * w2 + a3 * w3);
            *second += (b0 * w0 * w0 + b1 * w1 * w1) + (b2 * w2 * w2 + b3 * w3 * w3);
        }
    }
}
