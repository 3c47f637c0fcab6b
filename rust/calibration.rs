//! Statistics of the inputs of linear layers, from the `.safetensors` file that `tenpak calibrate` writes.
//!
//! Layers that read the same input share its statistics. An input NAME has the tensors `NAME.diagonal`
//! ([in], E[x_j²]) and, unless only diagonals were gathered, `NAME.second_moment` ([in, in], E[x xᵀ]), both
//! FP32. A weight NAME.weight may have `NAME.output_moment` ([out, out], E[g gᵀ] of the gradients of the layer's
//! outputs). The metadata key `tenpak.calibration` holds JSON that says which weights read which input.

use crate::error::{Error, Result};
use crate::input::{Model, Safetensors};
use crate::tensor::{Dtype, Encoding};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The metadata's key.
const KEY: &str = "tenpak.calibration";

/// The version that is read.
const VERSION: u32 = 1;

/// How far below the mean an importance may lie: a column that never was seen must still count for something.
const LEAST_IMPORTANCE: f32 = 1e-6;

/// What is done with the statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// Squared errors are weighted with E[x_j²] in the search.
    Diag,
    /// Then codes are chosen again with error feedback.
    Gptq,
}

impl Encoder {
    /// Both.
    pub const ALL: [Encoder; 2] = [Encoder::Gptq, Encoder::Diag];

    /// The name that people type.
    pub const fn name(self) -> &'static str {
        match self {
            Encoder::Diag => "diag",
            Encoder::Gptq => "gptq",
        }
    }

    /// The encoder of that name.
    ///
    /// # Errors
    /// A usage error that lists the names there are.
    pub fn from_name(name: &str) -> Result<Encoder> {
        Encoder::ALL.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            let names = Encoder::ALL.map(Encoder::name).join(", ");
            Error::usage(format!("unknown encoder {name:?}; choose one of {names}"))
        })
    }
}

/// Turns mean squares into importance: each over their mean, and never quite 0. What is no mean square stays.
pub fn importance_of(mean_squares: &mut [f32]) {
    let mean = mean_squares.iter().map(|&h| f64::from(h)).sum::<f64>() / mean_squares.len().max(1) as f64;
    for h in mean_squares.iter_mut().filter(|h| **h >= 0.0) {
        *h = if mean > 0.0 { ((f64::from(*h) / mean) as f32).max(LEAST_IMPORTANCE) } else { 1.0 };
    }
}

/// What a weight's statistics are called by.
fn stem(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// An open file of statistics.
pub struct Calibration {
    file: Safetensors,
    model: String,
    inputs: Vec<Input>,
    by_weight: HashMap<String, usize>,
    /// The tensors of the outputs' second moments, and how many outputs they are of.
    outputs: HashMap<String, (usize, usize)>,
}

/// One input of one or several layers.
#[derive(Debug)]
pub struct Input {
    /// Columns of the weights that read it.
    pub cols: usize,
    /// Tokens that were seen.
    pub tokens: u64,
    /// Tokens whose gradients were.
    output_tokens: u64,
    diagonal: usize,
    moment: Option<usize>,
}

#[derive(Deserialize)]
struct Metadata {
    version: u32,
    #[serde(default)]
    model: String,
    inputs: BTreeMap<String, MetadataInput>,
}

#[derive(Deserialize)]
struct MetadataInput {
    tokens: u64,
    #[serde(default)]
    output_tokens: u64,
    weights: Vec<String>,
}

impl Calibration {
    /// Opens and validates a file; no statistics are read.
    ///
    /// # Errors
    /// An I/O error, or an input error for a file that holds no statistics or contradicts itself.
    pub fn open(path: &Path) -> Result<Calibration> {
        Calibration::of(Safetensors::open(path)?)
            .map_err(|e| e.at(format_args!("statistics {}", path.display())))
    }

    fn of(file: Safetensors) -> Result<Calibration> {
        let text = file.metadata(KEY).ok_or_else(|| {
            Error::input("the file holds no statistics; make them with `tenpak calibrate`".to_owned())
        })?;
        let metadata: Metadata =
            serde_json::from_str(text).map_err(|e| Error::input(format!("metadata {KEY}: {e}")))?;
        if metadata.version != VERSION {
            return Err(Error::unsupported(format!(
                "version {} of statistics is not known; this build reads version {VERSION}",
                metadata.version
            )));
        }
        let tensors: HashMap<&str, usize> =
            file.tensors().iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let (mut inputs, mut by_weight, mut outputs) = (Vec::new(), HashMap::new(), HashMap::new());
        for (name, input) in metadata.inputs {
            let find = |name: &str, kind: &str, rank: usize| {
                let Some(&i) = tensors.get(format!("{name}.{kind}").as_str()) else { return Ok(None) };
                let info = &file.tensors()[i];
                let square = info.shape.len() == rank && info.shape.iter().all(|n| *n == info.shape[0]);
                if !square || info.encoding != Encoding::Plain(Dtype::F32) {
                    return Err(Error::input(format!(
                        "tensor {:?} is {} of shape {:?}, not F32 of {rank} equal dimensions",
                        info.name,
                        info.encoding.name(),
                        info.shape
                    )));
                }
                Ok(Some((i, info.shape[0])))
            };
            let Some((diagonal, cols)) = find(&name, "diagonal", 1)? else {
                return Err(Error::input(format!("tensor {:?} is missing", format!("{name}.diagonal"))));
            };
            let moment = find(&name, "second_moment", 2)?;
            if let Some((_, found)) = moment.filter(|m| m.1 != cols) {
                return Err(Error::input(format!(
                    "{name:?} has a diagonal of {cols} numbers and a second moment of {found} columns"
                )));
            }
            for weight in input.weights {
                if let Some(found) = find(stem(&weight), "output_moment", 2)? {
                    outputs.insert(weight.clone(), found);
                }
                if by_weight.insert(weight.clone(), inputs.len()).is_some() {
                    return Err(Error::input(format!("weight {weight:?} reads two inputs")));
                }
            }
            inputs.push(Input {
                cols,
                tokens: input.tokens,
                output_tokens: input.output_tokens,
                diagonal,
                moment: moment.map(|m| m.0),
            });
        }
        Ok(Calibration { model: metadata.model, inputs, by_weight, outputs, file })
    }

    /// The digest of the model that the statistics are of, in hexadecimal; empty where it is not known.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Names of all weights with statistics.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        self.by_weight.keys().map(String::as_str)
    }

    /// The number of the input that a weight reads.
    pub fn find(&self, weight: &str) -> Option<usize> {
        self.by_weight.get(weight).copied()
    }

    /// What is known of input `index`.
    pub fn input(&self, index: usize) -> &Input {
        &self.inputs[index]
    }

    /// Whether input `index` has a second moment.
    pub fn has_moment(&self, index: usize) -> bool {
        self.inputs[index].moment.is_some()
    }

    /// The importance of each column: E[x_j²] over its mean, and never quite 0.
    ///
    /// # Errors
    /// An input error where a mean square is NaN, infinite or negative.
    pub fn importance(&self, index: usize) -> Result<Vec<f32>> {
        let mut diagonal = self.floats(self.inputs[index].diagonal)?;
        if let Some(j) = diagonal.iter().position(|h| !(h.is_finite() && *h >= 0.0)) {
            let name = &self.file.tensors()[self.inputs[index].diagonal].name;
            return Err(Error::input(format!(
                "statistics {}: tensor {name:?} is {} at [{j}]; gather the statistics again",
                self.file.path().display(),
                diagonal[j]
            )));
        }
        importance_of(&mut diagonal);
        Ok(diagonal)
    }

    /// The second moment, `[cols, cols]`; `None` where only diagonals were gathered.
    ///
    /// # Errors
    /// An input error if the file has changed.
    pub fn moment(&self, index: usize) -> Result<Option<Vec<f32>>> {
        self.inputs[index].moment.map(|i| self.floats(i)).transpose()
    }

    /// The second moment of the gradients of a weight's outputs, `[rows, rows]`, with their number and that of the
    /// tokens it is a mean of; `None` where it was not gathered.
    ///
    /// # Errors
    /// An input error if the file has changed.
    pub fn output_moment(&self, weight: &str) -> Result<Option<(Vec<f32>, usize, u64)>> {
        let (Some(&(tensor, rows)), Some(input)) = (self.outputs.get(weight), self.find(weight)) else {
            return Ok(None);
        };
        Ok(Some((self.floats(tensor)?, rows, self.inputs[input].output_tokens)))
    }

    fn floats(&self, tensor: usize) -> Result<Vec<f32>> {
        let tensor = self.file.read(tensor)?;
        let mut out = vec![0f32; tensor.len()];
        tensor.encoding.widen(&tensor.bytes, 0, &mut out);
        Ok(out)
    }
}
