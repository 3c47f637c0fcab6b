//! Which statistics help which tensor, and what is derived from them, at most once for layers that share an
//! input.

use super::compress::CalibrationOptions;
use super::report::hex;
use crate::calibration::Encoder;
use crate::codec::{Factor, Outputs, SEARCH};
use crate::error::{Error, Kind, Result};
use crate::estimate;
use crate::input::{self, Model};
use crate::plan::{Action, Decision};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

const NO_STATISTICS: &str = "no statistics";
const NO_MOMENT: &str = "diag: the statistics hold diagonals only";
const FEW_TOKENS: &str = "diag: fewer tokens than columns were seen";

/// Factors that are kept: files list a layer's weights so that two inputs may alternate.
const KEPT: usize = 2;

/// The encoder's name where the inputs' mean squares are estimated from the weights alone.
const ESTIMATED: &str = "search, inputs estimated";

/// The statistics' part in a run, or that of their estimate.
pub struct Calibrated<'a> {
    options: Option<CalibrationOptions<'a>>,
    /// The importance of the columns of those weights whose input can be estimated.
    estimates: BTreeMap<String, Vec<f32>>,
    /// For each tensor that the layout's calibrated encoders can help.
    help: Vec<Option<Treatment>>,
    factors: Mutex<VecDeque<(usize, Arc<Factor>)>>,
    notes: Vec<String>,
}

/// What helps one tensor.
#[derive(Clone, Copy)]
enum Treatment {
    Nothing(&'static str),
    Input { input: usize, encoder: Encoder, why_not: Option<&'static str> },
    Estimate,
}

/// What encoding a tensor takes from the statistics.
#[derive(Default)]
pub struct Help {
    /// For the search.
    pub importance: Option<Vec<f32>>,
    /// For error feedback.
    pub factor: Option<Arc<Factor>>,
    /// For error feedback among rows.
    pub outputs: Option<Outputs>,
}

impl<'a> Calibrated<'a> {
    /// Finds the statistics of every tensor that is to be quantised, or estimates them where there are none and
    /// `estimate` asks for it.
    ///
    /// # Errors
    /// A usage error where the statistics are of another model.
    pub fn new(
        options: Option<CalibrationOptions<'a>>,
        estimate: bool,
        model: &dyn Model,
        decisions: &[Decision],
    ) -> Result<Self> {
        let mut out = Calibrated {
            options,
            estimates: BTreeMap::new(),
            help: vec![None; decisions.len()],
            factors: Mutex::default(),
            notes: Vec::new(),
        };
        let Some(options) = options else {
            if estimate {
                out.estimate(model, decisions)?;
            }
            return Ok(out);
        };
        let (mut wanted, mut without) = (0, 0);
        for (i, (info, decision)) in model.tensors().iter().zip(decisions).enumerate() {
            let Action::Encode(codec) = decision.action else { continue };
            if codec.layout.calibrated.is_none() {
                continue;
            }
            wanted += 1;
            let Some(index) = options.statistics.find(&info.name) else {
                without += 1;
                out.help[i] = Some(Treatment::Nothing(NO_STATISTICS));
                continue;
            };
            let input = options.statistics.input(index);
            let cols = info.shape.get(decision.axis).copied().unwrap_or(1);
            if input.cols != cols {
                return Err(Error::usage(format!(
                    "the statistics for tensor {:?} are of {} inputs, but it has {cols}; they are of another model",
                    info.name, input.cols
                )));
            }
            let why_not = if options.encoder == Encoder::Diag {
                None
            } else if !options.statistics.has_moment(index) {
                Some(NO_MOMENT)
            } else if input.tokens < cols as u64 {
                Some(FEW_TOKENS)
            } else {
                None
            };
            let encoder = if why_not.is_some() { Encoder::Diag } else { options.encoder };
            out.help[i] = Some(Treatment::Input { input: index, encoder, why_not });
        }
        if wanted > 0 && wanted == without {
            let known = options.statistics.weights().min().unwrap_or("nothing").to_owned();
            return Err(Error::usage(format!(
                "the statistics know none of the {wanted} tensors to quantise (they know {known:?}, for example); \
                 they are of another model"
            )));
        }
        let known = options.statistics.model();
        if !known.is_empty() && wanted > 0 && known != hex(&input::digest(model)?) {
            out.notes.push(
                "the statistics were gathered with another model; they may suit this one less".to_owned(),
            );
        }
        if without > 0 {
            out.notes
                .push(format!("{without} of {wanted} tensors have no statistics and were not calibrated"));
        }
        Ok(out)
    }

    /// Estimates what searches can heed; codecs that do not search are what they say.
    fn estimate(&mut self, model: &dyn Model, decisions: &[Decision]) -> Result<()> {
        let searches = |d: &Decision| matches!(d.action, Action::Encode(codec) if codec.encoder == SEARCH);
        if !decisions.iter().any(searches) {
            return Ok(());
        }
        self.estimates = estimate::importance(model)?;
        for ((help, info), decision) in self.help.iter_mut().zip(model.tensors()).zip(decisions) {
            let cols = info.shape.get(decision.axis).copied();
            if searches(decision) && self.estimates.get(&info.name).map(Vec::len) == cols && cols.is_some() {
                *help = Some(Treatment::Estimate);
            }
        }
        Ok(())
    }

    /// The encoder of tensor `index`, where statistics decide it.
    pub fn encoder(&self, index: usize) -> Option<&'static str> {
        match self.help[index] {
            Some(Treatment::Input { encoder, .. }) => Some(encoder.name()),
            Some(Treatment::Estimate) => Some(ESTIMATED),
            _ => None,
        }
    }

    /// Why tensor `index` got less than was asked for.
    pub fn why_not(&self, index: usize) -> Option<&'static str> {
        match self.help[index] {
            Some(Treatment::Nothing(reason)) => Some(reason),
            Some(Treatment::Input { why_not, .. }) => why_not,
            Some(Treatment::Estimate) | None => None,
        }
    }

    /// Advice for the user.
    pub fn notes(&self) -> Vec<String> {
        let few = self.help.iter().flatten();
        let few = few.filter(|k| matches!(k, Treatment::Input { why_not: Some(FEW_TOKENS), .. })).count();
        let few = (few > 0).then(|| {
            format!("{few} tensors saw fewer tokens than they have columns and were encoded with diag; give more text")
        });
        self.notes.iter().cloned().chain(few).collect()
    }

    /// What the encoding of tensor `index` takes.
    ///
    /// # Errors
    /// An input error for statistics that cannot be.
    pub fn help(&self, index: usize, name: &str) -> Result<Help> {
        if let Some(Treatment::Estimate) = self.help[index] {
            return Ok(Help { importance: self.estimates.get(name).cloned(), ..Help::default() });
        }
        let (Some(options), Some(Treatment::Input { input, encoder, .. })) = (self.options, self.help[index])
        else {
            return Ok(Help::default());
        };
        let importance = Some(options.statistics.importance(input)?);
        if encoder != Encoder::Gptq {
            return Ok(Help { importance, ..Help::default() });
        }
        let factor = Some(self.factor(input)?);
        let outputs = match options.statistics.output_moment(name)? {
            // No layer but this one has these outputs.
            Some((moment, rows, tokens)) => {
                Some(Outputs::new(&moment, rows, Some(tokens), options.cholesky)?)
            }
            None => None,
        };
        Ok(Help { importance, factor, outputs })
    }

    fn factor(&self, input: usize) -> Result<Arc<Factor>> {
        let options = self.options.as_ref().expect("only statistics have inputs");
        let mut kept = self.factors.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((_, factor)) = kept.iter().find(|(i, _)| *i == input) {
            return Ok(factor.clone());
        }
        // Before the next one is made, so that no more than these are in memory.
        kept.truncate(KEPT - 1);
        let moment = options.statistics.moment(input)?;
        let moment = moment.ok_or_else(|| Error::new(Kind::Input, "the statistics hold diagonals only"))?;
        let about = options.statistics.input(input);
        let factor = Arc::new(Factor::new(&moment, about.cols, Some(about.tokens), options.cholesky)?);
        kept.push_front((input, factor.clone()));
        Ok(factor)
    }
}
