//! What a run did, in numbers that people and programs read.

use serde::Serialize;

/// What happened to one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// How the source spells it.
    pub source: &'static str,
    /// The codec's name, `keep`, or `alias`.
    pub codec: String,
    /// Why it was kept, or which tensor it is an alias of.
    pub reason: Option<String>,
    /// The input dimension.
    pub axis: usize,
    /// Elements.
    pub weights: u64,
    /// Bytes in the artifact, padding left out.
    pub bytes: u64,
    /// Σ(w - ŵ)² / Σw², for quantised tensors that were really encoded.
    pub relative_error: Option<f64>,
    /// How codes were chosen, for quantised tensors.
    pub encoder: Option<&'static str>,
    /// Why statistics were heeded less than was asked for, or not at all.
    pub uncalibrated: Option<String>,
    /// tr(ΔHΔᵀ) / tr(WHWᵀ), where there was error feedback: the squared error of the layer's outputs.
    pub output_error: Option<f64>,
    /// The same without the feedback.
    pub output_error_before: Option<f64>,
}

/// Tensors with the same fate.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// The codec's name, `keep`, or `alias`.
    pub codec: String,
    /// Why they were kept.
    pub reason: Option<String>,
    /// How many.
    pub tensors: u64,
    /// Their elements.
    pub weights: u64,
    /// Their bytes in the artifact, padding left out.
    pub bytes: u64,
    /// 8 · bytes / weights.
    pub bits_per_weight: Option<f64>,
    /// Σ(w - ŵ)² / Σw² over all of them.
    pub relative_error: Option<f64>,
}

/// What compressing did.
#[derive(Clone, Debug, Serialize)]
pub struct CompressReport {
    /// The input's format.
    pub format: &'static str,
    /// The codec that was asked for.
    pub codec: String,
    /// Whether nothing was written.
    pub dry_run: bool,
    /// The artifact's identity, in hexadecimal; empty for a dry run.
    pub root: String,
    /// Every tensor of the input, in its order.
    pub tensors: Vec<TensorReport>,
    /// Totals by codec, then by reason for what was kept.
    pub groups: Vec<Group>,
    /// Names of embedded files.
    pub files: Vec<String>,
    /// Elements of all tensors, aliases counted once.
    pub weights: u64,
    /// Bytes of the artifact.
    pub file_bytes: u64,
    /// Bits per weight of what was quantised.
    pub quantised_bits_per_weight: Option<f64>,
    /// Bits per weight of the whole file.
    pub file_bits_per_weight: Option<f64>,
    /// How much smaller the file is than all weights in FP32.
    pub compression_fp32: Option<f64>,
    /// How much smaller the file is than all weights in FP16.
    pub compression_fp16: Option<f64>,
    /// Σ(w - ŵ)² / Σw² of everything that was quantised.
    pub relative_error: Option<f64>,
    /// The mean of tr(ΔHΔᵀ) / tr(WHWᵀ) over tensors with error feedback.
    pub output_error: Option<f64>,
    /// The same before the feedback.
    pub output_error_before: Option<f64>,
    /// Wall-clock seconds, opening the input left out.
    pub seconds: f64,
    /// Weights a second, as FP32: 4e-9 · weights / seconds.
    pub gigabytes_per_second: f64,
    /// Instruction set in use.
    pub simd: &'static str,
    /// Advice for the user.
    pub notes: Vec<String>,
}

/// What restoring did.
#[derive(Clone, Debug, Serialize)]
pub struct DecompressReport {
    /// The output's format.
    pub format: &'static str,
    /// Tensors written, aliases among them.
    pub tensors: u64,
    /// Their elements.
    pub weights: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Names of embedded files that were restored.
    pub files: Vec<String>,
    /// Names of embedded files that the output's format has no place for.
    pub files_left_out: Vec<String>,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Weights a second, as FP32: 4e-9 · weights / seconds.
    pub gigabytes_per_second: f64,
}

/// Sums that become a ratio.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Errors {
    pub error: f64,
    pub norm: f64,
}

impl Errors {
    pub fn relative(self) -> f64 {
        if self.norm > 0.0 { self.error / self.norm } else { 0.0 }
    }
}

/// Collects groups in the order in which they first appear.
pub(super) fn groups(tensors: &[TensorReport], errors: &[Option<Errors>]) -> Vec<Group> {
    let mut groups: Vec<(Group, Option<Errors>)> = Vec::new();
    for (tensor, errors) in tensors.iter().zip(errors) {
        let reason = if tensor.codec == "keep" { tensor.reason.clone() } else { None };
        let position = groups.iter().position(|(g, _)| g.codec == tensor.codec && g.reason == reason);
        let position = position.unwrap_or_else(|| {
            groups.push((
                Group {
                    codec: tensor.codec.clone(),
                    reason,
                    tensors: 0,
                    weights: 0,
                    bytes: 0,
                    bits_per_weight: None,
                    relative_error: None,
                },
                None,
            ));
            groups.len() - 1
        });
        let (group, sums) = &mut groups[position];
        group.tensors += 1;
        group.weights += tensor.weights;
        group.bytes += tensor.bytes;
        if let Some(e) = errors {
            let sums = sums.get_or_insert_default();
            sums.error += e.error;
            sums.norm += e.norm;
        }
    }
    let mut groups: Vec<Group> = groups
        .into_iter()
        .map(|(group, sums)| Group {
            bits_per_weight: ratio(8 * group.bytes, group.weights).filter(|_| group.codec != "alias"),
            relative_error: sums.map(Errors::relative),
            ..group
        })
        .collect();
    // What was quantised first, then what was kept, then aliases; each from many weights to few.
    groups.sort_by_key(|g| {
        let fate = ["keep", "alias"].iter().position(|c| *c == g.codec).map_or(0, |i| i + 1);
        (fate, std::cmp::Reverse(g.weights))
    });
    groups
}

/// A digest for people.
pub(crate) fn hex(digest: &[u8; 32]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// The mean of those that there are.
pub(super) fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.flatten().collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

pub(super) fn ratio(a: u64, b: u64) -> Option<f64> {
    (b > 0).then(|| a as f64 / b as f64)
}

pub(super) fn gigabytes_per_second(weights: u64, seconds: f64) -> f64 {
    4e-9 * weights as f64 / seconds.max(1e-9)
}
