//! How positions are scaled: `rope_scaling` for `config.json`.
//!
//! GGUF has Llama 3's scaling only as its result, one factor for each frequency (`rope_freqs.weight`). The numbers it
//! was computed from are found again here, and count only if they give every factor back.

use super::config::{Facts, Reason};
use serde_json::{Value, json};
use std::f64::consts::TAU;

/// How far a factor may be from what the numbers give: both sides computed it in FP32.
const CLOSE: f64 = 1e-4;

/// What all of Meta's models have.
const USUAL: Bands = Bands { low: 1.0, high: 4.0, original: 8192.0 };

/// Wavelengths shorter than `original / high` keep their frequency, those longer than `original / low` have it divided
/// by the factor, and it changes gradually in between.
#[derive(Clone, Copy)]
struct Bands {
    low: f64,
    high: f64,
    original: f64,
}

/// `rope_scaling`: null for none.
pub(super) fn scaling(facts: &Facts<'_>) -> Result<Value, Reason> {
    if ["rope_factors_long.weight", "rope_factors_short.weight"]
        .iter()
        .any(|name| facts.tensor(name).is_some())
    {
        return Err("positions are scaled by two lists of factors".to_owned());
    }
    if let Some(factors) = &facts.factors {
        let theta = facts.number_or("rope.freq_base", 10000.0)?;
        return llama3(factors, theta, facts.head_dim()?);
    }
    let legacy = facts.number_or("rope.scale_linear", 1.0)?;
    let factor = facts.number_or("rope.scaling.factor", legacy)?;
    let kind = facts.metadata.get::<String>(&facts.key("rope.scaling.type"));
    match kind.as_deref().unwrap_or(if legacy == 1.0 { "none" } else { "linear" }) {
        "none" => Ok(Value::Null),
        "linear" if factor == 1.0 => Ok(Value::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": factor })),
        "yarn" => Ok(json!({
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": facts.size("rope.scaling.original_context_length")?,
        })),
        other => Err(format!("rotary scaling {other:?} is not known")),
    }
}

fn llama3(factors: &[f32], theta: f64, head_dim: usize) -> Result<Value, Reason> {
    let bad = || "rope_freqs.weight holds no factors of Llama 3's scaling".to_owned();
    if factors.len() != head_dim / 2 || !factors.iter().all(|f| f.is_finite() && *f >= 1.0) {
        return Err(bad());
    }
    let points: Vec<(f64, f64)> = factors
        .iter()
        .enumerate()
        .map(|(i, f)| (TAU * theta.powf(2.0 * i as f64 / head_dim as f64), f64::from(*f)))
        .collect();
    let factor = points.iter().fold(1.0, |most: f64, (_, f)| most.max(*f));
    if factor == 1.0 {
        return Ok(Value::Null);
    }
    let fits =
        |bands: &Bands| points.iter().all(|(wave, f)| (bands.divisor(*wave, factor) / f - 1.0).abs() < CLOSE);
    let bands =
        [Some(USUAL), Bands::found(&points, factor)].into_iter().flatten().find(fits).ok_or_else(bad)?;
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": bands.low,
        "high_freq_factor": bands.high,
        "original_max_position_embeddings": bands.original as u64,
    }))
}

impl Bands {
    /// What the frequency of that wavelength is divided by.
    fn divisor(&self, wave: f64, factor: f64) -> f64 {
        let kept = ((self.original / wave - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - kept) / factor + kept)
    }

    /// The bands with `low` 1 (all three can be scaled together) on whose line the first and the last factor
    /// between 1 and `factor` lie.
    fn found(points: &[(f64, f64)], factor: f64) -> Option<Bands> {
        let between = || points.iter().filter(|(_, f)| *f > 1.0 && *f < factor);
        let line = |(wave, f): &(f64, f64)| (wave.recip(), (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor));
        let ((x0, y0), (x1, y1)) = (line(between().next()?), line(between().next_back()?));
        let slope = (y1 - y0) / (x1 - x0);
        let high = 1.0 + 1.0 / (slope * x0 - y0);
        let high = (high * 1e3).round() / 1e3;
        let original = (slope * (high - 1.0)).round();
        (high > 1.0 && (1.0..1e9).contains(&original)).then_some(Bands { low: 1.0, high, original })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_behind_factors_are_found() {
        for (bands, factor, theta, head_dim) in [
            (USUAL, 8.0, 500_000.0_f64, 128),
            (USUAL, 32.0, 500_000.0, 64),
            (Bands { low: 1.0, high: 8.0, original: 4096.0 }, 4.0, 500_000.0, 128),
            (Bands { low: 1.0, high: 3.5, original: 1024.0 }, 16.0, 10_000.0, 64),
        ] {
            let wave = |i: usize| TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            let mut factors: Vec<f32> =
                (0..head_dim / 2).map(|i| bands.divisor(wave(i), factor) as f32).collect();
            let found = llama3(&factors, theta, head_dim).unwrap();
            assert_eq!(found["factor"], factor);
            assert_eq!(found["high_freq_factor"], bands.high);
            assert_eq!(found["original_max_position_embeddings"], bands.original as u64);
            factors[head_dim / 4] *= 1.01;
            assert!(llama3(&factors, theta, head_dim).is_err());
        }
        assert_eq!(llama3(&[1.0; 32], 10_000.0, 64).unwrap(), Value::Null);
    }
}
