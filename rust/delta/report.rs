//! What making and applying deltas did, in numbers that people and programs read.

use serde::Serialize;

/// What happened to one tensor.
#[derive(Clone, Debug, Serialize)]
pub struct TensorReport {
    /// The name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Its elements' dtype.
    pub dtype: &'static str,
    /// `same`, `exact`, `bit1`, `codes`, `keep`, `alias`, or a codec's name for what is quantised afresh.
    pub method: String,
    /// The tensor of the base that it is coded against, or the one of the result that it is an alias of.
    pub base: Option<String>,
    /// Elements.
    pub weights: u64,
    /// Elements (in mode `codes`: codes) that are not as in the base.
    pub changed: u64,
    /// ‖new - old‖ / ‖new‖, estimated from a sample of the elements.
    pub relative_change: Option<f64>,
    /// Σ(w - ŵ)² / Σw² of what is coded with loss.
    pub relative_error: Option<f64>,
    /// Σ(w - ŵ)² / Σ(w - base)² of what is coded as bit1: the part of the change that is lost.
    pub change_lost: Option<f64>,
    /// Groups that were quantised afresh, in mode `codes`.
    pub fresh_groups: Option<u64>,
    /// All groups, in mode `codes`.
    pub groups: Option<u64>,
    /// Bytes in the delta, padding left out.
    pub bytes: u64,
}

/// Tensors that are coded in the same way.
#[derive(Clone, Debug, Serialize)]
pub struct MethodReport {
    /// See [`TensorReport::method`].
    pub method: String,
    /// How many.
    pub tensors: u64,
    /// Their elements.
    pub weights: u64,
    /// Elements that are not as in the base.
    pub changed: u64,
    /// Their bytes in the delta.
    pub bytes: u64,
}

/// What making a delta did.
#[derive(Clone, Debug, Serialize)]
pub struct DeltaReport {
    /// `exact`, `codes` or `bit1`.
    pub mode: &'static str,
    /// The base's identity, in hexadecimal.
    pub base: String,
    /// The result's identity.
    pub result: String,
    /// The delta's own root.
    pub root: String,
    /// Every tensor of the result.
    pub tensors: Vec<TensorReport>,
    /// Totals by method, the largest first.
    pub methods: Vec<MethodReport>,
    /// Tensors of the base that the result lacks.
    pub removed: Vec<String>,
    /// Files that the delta holds.
    pub files: Vec<String>,
    /// Files that the result has from the base.
    pub files_of_base: Vec<String>,
    /// Elements of all tensors, aliases counted once.
    pub weights: u64,
    /// Bytes of the delta.
    pub file_bytes: u64,
    /// Bytes of the fine-tune's tensors.
    pub input_bytes: u64,
    /// Bytes of the delta over those of the tensors.
    pub ratio: f64,
    /// Bits of the delta per weight.
    pub bits_per_weight: f64,
    /// Σ(w - ŵ)² / Σw² of all that is coded with loss.
    pub relative_error: Option<f64>,
    /// Σ(w - ŵ)² / Σ(w - base)² of all that is coded as bit1.
    pub change_lost: Option<f64>,
    /// Wall-clock seconds, opening the input left out.
    pub seconds: f64,
    /// The fine-tune's bytes a second.
    pub gigabytes_per_second: f64,
}

/// What materialising did.
#[derive(Clone, Debug, Serialize)]
pub struct MaterializeReport {
    /// The output's format.
    pub format: &'static str,
    /// The result's identity, which has been checked.
    pub result: String,
    /// Deltas that were applied.
    pub deltas: u64,
    /// Tensors written, aliases among them.
    pub tensors: u64,
    /// Their elements.
    pub weights: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Names of files that were restored.
    pub files: Vec<String>,
    /// Names of files that the output's format has no place for.
    pub files_left_out: Vec<String>,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Bytes written a second.
    pub gigabytes_per_second: f64,
}

/// Totals by method.
pub(super) fn methods(tensors: &[TensorReport]) -> Vec<MethodReport> {
    let mut methods: Vec<MethodReport> = Vec::new();
    for tensor in tensors {
        let found = methods.iter().position(|m| m.method == tensor.method).unwrap_or_else(|| {
            let method = tensor.method.clone();
            methods.push(MethodReport { method, tensors: 0, weights: 0, changed: 0, bytes: 0 });
            methods.len() - 1
        });
        let method = &mut methods[found];
        method.tensors += 1;
        method.weights += tensor.weights;
        method.changed += tensor.changed;
        method.bytes += tensor.bytes;
    }
    methods.sort_by_key(|m| std::cmp::Reverse((m.bytes, m.weights)));
    methods
}
