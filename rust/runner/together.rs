//! A tensor whose rows make good what others have lost: step by step, each of which knows the errors of all before it.

use super::{Job, Outcome, Scratch, Sums, power_of_two};
use crate::codec::{Column, FEEDBACK_ROWS, Outputs, Range, owed};
use rayon::prelude::*;

/// Columns whose errors lie together.
const RUN: usize = FEEDBACK_ROWS;

impl Job<'_> {
    /// As [`Job::run`], under the second moment of the outputs' gradients.
    pub fn run_together(
        &self,
        outputs: &Outputs,
        exponent: i32,
        parts: &mut [&mut [u8]],
    ) -> (Outcome, Range) {
        let (count, cols) = (self.rows.count(), self.rows.cols);
        let weights = self.all_weights(exponent);
        // Of each run of columns the errors of all rows, in the factor's order.
        let mut errors = vec![vec![[0f32; RUN]; count]; cols.div_ceil(RUN)];
        let Outputs { factor, step } = outputs;
        let mut total = Sums::default();
        for first in (0..count).step_by(*step) {
            let rows = first..(first + step).min(count);
            errors.par_iter_mut().for_each(|errors| owed(self.level, factor, rows.clone(), errors));
            let starts: Vec<usize> = rows.step_by(FEEDBACK_ROWS).collect();
            let done: Vec<Strip> = starts
                .par_iter()
                .map_init(Scratch::default, |scratch, &first| {
                    let last = (first + FEEDBACK_ROWS).min(count);
                    self.strip_together(
                        &factor.order()[first..last],
                        first,
                        exponent,
                        &weights,
                        &errors,
                        scratch,
                    )
                })
                .collect();
            for (strip, &first) in done.iter().zip(&starts) {
                total.add(&strip.sums);
                self.keep(strip, &factor.order()[first..], parts);
                for (r, row) in strip.errors.chunks_exact(cols).enumerate() {
                    for (errors, run) in errors.iter_mut().zip(row.chunks(RUN)) {
                        errors[first + r][..run.len()].copy_from_slice(run);
                    }
                }
            }
        }
        total.outcome(exponent)
    }

    /// All weights as they are encoded.
    fn all_weights(&self, exponent: i32) -> Vec<f32> {
        let mut weights = vec![0f32; self.rows.len()];
        let strip = FEEDBACK_ROWS * self.rows.cols;
        let factor = power_of_two(-exponent);
        weights.par_chunks_mut(strip).enumerate().for_each(|(i, out)| {
            self.rows.gather(self.tensor, i * FEEDBACK_ROWS, out);
            if exponent != 0 {
                out.iter_mut().for_each(|w| *w *= factor);
            }
        });
        weights
    }

    /// Encodes the rows `order`, the first of which is number `first` of the factor's.
    fn strip_together(
        &self,
        order: &[usize],
        first: usize,
        exponent: i32,
        weights: &[f32],
        errors: &[Vec<Column>],
        scratch: &mut Scratch,
    ) -> Strip {
        let cols = self.rows.cols;
        let row = |r: usize| &weights[r * cols..][..cols];
        if !self.go_on(order.len(), exponent) {
            return Strip::default();
        }
        let exact: Vec<f32> = order.iter().flat_map(|&r| row(r)).copied().collect();
        let mut wanted = exact.clone();
        for (r, wanted) in wanted.chunks_exact_mut(cols).enumerate() {
            for (wanted, errors) in wanted.chunks_mut(RUN).zip(errors) {
                wanted.iter_mut().zip(&errors[first + r]).for_each(|(w, e)| *w -= e);
            }
        }
        let sizes = self.codec.layout.parts.iter().map(|part| order.len() * part.row_bytes(cols));
        let mut parts: Vec<Vec<u8>> = sizes.map(|n| vec![0; n]).collect();
        let mut slices: Vec<&mut [u8]> = parts.iter_mut().map(Vec::as_mut_slice).collect();
        let sums = self.encode_strip(&wanted, &exact, exponent, &mut slices, scratch);
        let errors = exact.iter().zip(&scratch.rebuilt).map(|(w, rebuilt)| w - rebuilt).collect();
        Strip { sums, parts, errors }
    }

    /// Puts the rows of a strip where they belong.
    fn keep(&self, strip: &Strip, order: &[usize], parts: &mut [&mut [u8]]) {
        for ((layout, from), to) in self.codec.layout.parts.iter().zip(&strip.parts).zip(parts) {
            let bytes = layout.row_bytes(self.rows.cols);
            for (from, &row) in from.chunks_exact(bytes.max(1)).zip(order) {
                to[row * bytes..][..bytes].copy_from_slice(from);
            }
        }
    }
}

/// What became of a strip.
#[derive(Default)]
struct Strip {
    sums: Sums,
    parts: Vec<Vec<u8>>,
    errors: Vec<f32>,
}
