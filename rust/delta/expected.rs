//! Which code each weight of the base would have under other parameters, and how far from the next one it would lie.
//!
//! Where a group's parameters have moved, most of its codes follow from that alone: the base's weight lies somewhere
//! between two of the new values, and is likely to be coded as the nearer one, the more so the nearer it is. Both sides
//! of a delta know the base's weights and the new parameters, and decode the same bits from them.

use super::codes::codes_at;
use crate::codec::simd::Level;
use crate::codec::{Layout, Per};
use rayon::prelude::*;

/// Steps between two codes by which contexts differ.
const STEPS: u8 = 16;

/// The context of a weight that is one of the new values.
const EXACT: u8 = STEPS;

/// The context of a weight beyond the lowest or the highest of them.
const BEYOND: u8 = STEPS + 1;

/// The context of a weight that the base does not have.
const NEW: u8 = STEPS + 2;

/// Weights that are looked at together: they fit a core's cache with all their parts.
const STRIP: usize = 1 << 14;

/// For every weight, row by row.
pub struct Expected {
    /// The code that it would have; 0 where the base has no such weight.
    pub codes: Vec<u8>,
    /// What decides how likely that is; below [`super::rans::CONTEXTS`].
    pub contexts: Vec<u8>,
}

/// What the weights that `base` holds would be under the parameters among `parts`, in whose order and layout both are.
/// Rows have `cols` weights; those of `parts` beyond the base's last have no expectation.
pub fn expected(layout: &Layout, cols: usize, rows: usize, base: &[&[u8]], parts: &[&[u8]]) -> Expected {
    let mut out = Expected { codes: vec![0; rows * cols], contexts: vec![NEW; rows * cols] };
    if cols == 0 {
        return out;
    }
    let there = layout.parts.iter().zip(base).map(|(part, bytes)| bytes.len() / part.row_bytes(cols).max(1));
    let common = there.min().unwrap_or(0).min(rows);
    let strip = (STRIP / cols).max(1);
    let level = Level::detect();
    let codes = out.codes[..common * cols].par_chunks_mut(strip * cols);
    let contexts = out.contexts[..common * cols].par_chunks_mut(strip * cols);
    codes.zip(contexts).enumerate().for_each(|(i, (codes, contexts))| {
        let of_strip = |all: &[&[u8]]| -> Vec<Vec<u8>> {
            let n = codes.len() / cols;
            let rows = layout.parts.iter().zip(all).map(|(part, bytes)| {
                let row = part.row_bytes(cols);
                bytes[i * strip * row..(i * strip + n) * row].to_vec()
            });
            rows.collect()
        };
        let mut grid = Grid { layout, cols, level, parts: of_strip(parts) };
        let mut weights = vec![0f32; codes.len()];
        let base = of_strip(base);
        (layout.decode)(level, &slices(&base), cols, &mut weights);
        grid.place(&weights, codes, contexts);
    });
    out
}

fn slices(parts: &[Vec<u8>]) -> Vec<&[u8]> {
    parts.iter().map(Vec::as_slice).collect()
}

/// The values that rows can have under their parameters.
struct Grid<'a> {
    layout: &'a Layout,
    cols: usize,
    level: Level,
    parts: Vec<Vec<u8>>,
}

impl Grid<'_> {
    /// The value of a code for every weight.
    fn values(&mut self, codes: &[u8], out: &mut [f32]) {
        for (part, bytes) in self.layout.parts.iter().zip(&mut self.parts) {
            if matches!(part.per, Per::Weight(_)) {
                bytes.fill(0);
            }
        }
        codes_at(self.layout, codes, self.cols, &mut self.parts);
        (self.layout.decode)(self.level, &slices(&self.parts), self.cols, out);
    }

    /// Finds between which values each weight lies, by halving: values grow with their codes, or fall.
    fn place(&mut self, weights: &[f32], codes: &mut [u8], contexts: &mut [u8]) {
        let n = weights.len();
        let most = u8::MAX >> (8 - self.layout.code_bits);
        let [mut first, mut last, mut value] = [vec![0f32; n], vec![0f32; n], vec![0f32; n]];
        let mut tried = vec![0u8; n];
        self.values(&tried, &mut first);
        tried.fill(most);
        self.values(&tried, &mut last);
        codes.fill(0);
        for bit in (0..self.layout.code_bits).rev() {
            tried.iter_mut().zip(&*codes).for_each(|(tried, code)| *tried = code | 1 << bit);
            self.values(&tried, &mut value);
            for i in 0..n {
                let falls = last[i] < first[i];
                let reached = if falls { value[i] >= weights[i] } else { value[i] <= weights[i] };
                codes[i] = if reached { tried[i] } else { codes[i] };
            }
        }
        tried.iter_mut().zip(&*codes).for_each(|(tried, code)| *tried = most.min(code + 1));
        self.values(&tried, &mut last);
        self.values(codes, &mut value);
        for i in 0..n {
            let (low, high) = (value[i], last[i]);
            // One operation of FP32 after the other, each correctly rounded: the same everywhere. NaN becomes 0.
            let between = (weights[i] - low) / (high - low);
            let step = (between * f32::from(STEPS)) as u8;
            contexts[i] = if weights[i] == low {
                EXACT
            } else if codes[i] == most || between < 0.0 {
                BEYOND
            } else {
                let step = step.min(STEPS - 1);
                codes[i] += u8::from(step >= STEPS / 2);
                step
            };
        }
    }
}
