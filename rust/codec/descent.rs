//! Coordinate descent on the squared error of a layer's outputs, e H eᵀ: one group at a time, scale, offset and codes
//! are chosen again given all other groups ([`super::trial`]), for a few rounds.

use super::factor::{BLOCK, Factor};
use super::feedback::{
    Codes, Column, Job, Nearest, ROWS, VECTORS, add_product, add_products, store_codes, vectors,
};
use super::simd::{LANES, Simd};
use super::trial::{Trial, Weights, Within};
use std::ops::Range;

/// Rounds over all columns. The first takes most of what can be had.
const ROUNDS: usize = 3;

/// Improves codes and parameters; `errors` are in the factor's order, those that are returned in the columns' own.
#[inline(always)]
pub fn improve<S: Simd, N: Nearest>(
    s: S,
    ready: &N::Ready<S>,
    job: &mut Job<'_, N>,
    errors: &[Column],
    codes: &mut [Codes],
) -> Vec<Column> {
    let mut own = vec![[0.0; ROWS]; errors.len()];
    for (e, &j) in errors.iter().zip(job.factor.order()) {
        own[j] = *e;
    }
    for _ in 0..ROUNDS {
        round(s, ready, job, &mut own, codes);
    }
    own
}

#[inline(always)]
fn round<S: Simd, N: Nearest>(
    s: S,
    ready: &N::Ready<S>,
    job: &mut Job<'_, N>,
    errors: &mut [Column],
    codes: &mut [Codes],
) {
    let factor: &Factor = job.factor;
    let cols = factor.cols();
    let mut gradient = [[0.0; ROWS]; BLOCK];
    for first in (0..cols).step_by(BLOCK) {
        let panel = factor.moment_panel(first / BLOCK);
        gradient.fill([0.0; ROWS]);
        add_products(s, errors, panel, &mut gradient);
        let block = Block { first, len: (cols - first).min(BLOCK), rows: &panel[first..] };
        for start in (0..block.len).step_by(N::GROUP) {
            let group = start..(start + N::GROUP).min(block.len);
            improve_group(s, ready, job, &block, group, errors, codes, &mut gradient);
        }
    }
}

/// Some columns of H that are next to each other.
struct Block<'a> {
    first: usize,
    len: usize,
    /// Their rows of the panel, from the first of them on.
    rows: &'a [[f32; BLOCK]],
}

/// Chooses scale, offset and codes of one group of the block; the gradient follows in the groups after it.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn improve_group<S: Simd, N: Nearest>(
    s: S,
    ready: &N::Ready<S>,
    job: &mut Job<'_, N>,
    block: &Block<'_>,
    group: Range<usize>,
    errors: &mut [Column],
    codes: &mut [Codes],
    gradient: &mut [Column; BLOCK],
) {
    let zero = s.splat(0.0);
    let number = (block.first + group.start) / N::GROUP;
    let columns = block.first + group.start..block.first + group.end;
    let within = Within::new(&block.rows[group.clone()], group.start);
    let mut changes = [[0.0; ROWS]; BLOCK];
    for v in 0..VECTORS {
        let mut w = [zero; BLOCK];
        let (e, g, codes_before) = ([zero; BLOCK], [zero; BLOCK], [s.splat_i(0); BLOCK]);
        let mut before = Trial { group: job.group(s, number, v), e, g, codes: codes_before };
        for (i, k) in columns.clone().enumerate() {
            w[i] = vectors(s, &job.weights[k])[v];
            before.e[i] = vectors(s, &errors[k])[v];
            before.g[i] = vectors(s, &gradient[group.start + i])[v];
            before.codes[i] = load_codes(s, &codes[k], v);
        }
        let best = Weights::new(w, within).best_trial::<N>(s, ready, &before);
        for (x, out) in [best.group.a, best.group.b].into_iter().zip(&mut job.parameters) {
            store_vector(s, x, &mut out[number], v);
        }
        for (i, k) in columns.clone().enumerate() {
            store_codes(s, best.codes[i], &mut codes[k], v);
            store_vector(s, best.e[i], &mut errors[k], v);
            store_vector(s, s.sub(best.e[i], before.e[i]), &mut changes[i], v);
        }
    }
    for (change, row) in changes.iter().zip(&block.rows[group.clone()]) {
        add_product(s, vectors(s, change), &row[group.end..block.len], &mut gradient[group.end..]);
    }
}

#[inline(always)]
fn store_vector<S: Simd>(s: S, x: S::F, column: &mut Column, v: usize) {
    s.store(x, &mut column.as_chunks_mut::<LANES>().0[v]);
}

#[inline(always)]
fn load_codes<S: Simd>(s: S, codes: &Codes, v: usize) -> S::I {
    let mut words = [0; LANES];
    for (word, code) in words.iter_mut().zip(&codes[v * LANES..]) {
        *word = u32::from(*code);
    }
    s.load_i(&words)
}
