//! Codes chosen one column at a time, each making good what the columns before it have lost ("gptq").
//!
//! A group's parameters are fixed before: they come from the search, weighted with H_jj. Sixty-four rows go
//! together, one in each lane of four vectors, since rows do not depend on each other. Each row keeps the codes
//! that lose less of its outputs: these, or those of the search alone.

use super::factor::{BLOCK, Factor};
use super::simd::{Kernel, LANES, Level, Simd};
use super::{Layout, Strip};
use std::marker::PhantomData;

/// Rows that go together.
pub const ROWS: usize = VECTORS * LANES;

const VECTORS: usize = 4;

/// Columns of the factor that one pass over the errors serves; with four vectors they fill the registers.
const TILE: usize = 4;

/// One weight of every row.
type Column = [f32; ROWS];

/// A layout's rule for one weight, given two parameters of its group.
pub trait Nearest {
    /// Weights that share parameters.
    const GROUP: usize;
    /// What look-ups need, loaded once.
    type Ready<S: Simd>: Copy;

    /// Loads it.
    fn ready<S: Simd>(s: S) -> Self::Ready<S>;

    /// The two parameters of every group of `rows`: `[rows, groups]`.
    fn parameters(parts: &[&[u8]], cols: usize, a: &mut [f32], b: &mut [f32]);

    /// The nearest code, and the weight that it stands for, exactly as the layout rebuilds it.
    fn nearest<S: Simd>(s: S, ready: &Self::Ready<S>, x: S::F, a: S::F, b: S::F) -> (S::I, S::F);
}

/// Σ over rows of ΔHΔᵀ and WHWᵀ: squared errors of the layer's outputs, and their squared norm.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutputError {
    /// tr(ΔHΔᵀ) of what was kept.
    pub error: f64,
    /// tr(ΔHΔᵀ) of the codes as they were.
    pub before: f64,
    /// tr(WHWᵀ).
    pub norm: f64,
}

/// Chooses the codes of at most [`ROWS`] rows again; `parts` hold what a search has chosen.
pub fn feedback<N: Nearest>(
    level: Level,
    layout: &Layout,
    factor: &Factor,
    strip: Strip<'_>,
    parts: &mut [&mut [u8]],
) -> OutputError {
    assert!(strip.rows() <= ROWS && strip.cols == factor.cols());
    if strip.data.is_empty() {
        return OutputError::default();
    }
    let cols = strip.cols;
    let mut rebuilt = vec![0f32; strip.data.len()];
    let groups = cols.div_ceil(N::GROUP);
    let mut parameters = [vec![0f32; strip.rows() * groups], vec![0f32; strip.rows() * groups]];
    {
        let parts: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
        (layout.decode)(level, &parts, cols, &mut rebuilt);
        let [a, b] = &mut parameters;
        N::parameters(&parts, cols, a, b);
    }
    let columns = |rows: &[f32], cols: usize, order: &mut dyn Iterator<Item = usize>| -> Vec<Column> {
        let column = |j: usize| {
            let mut out = [0.0; ROWS];
            for (out, row) in out.iter_mut().zip(rows.chunks_exact(cols)) {
                *out = row[j];
            }
            out
        };
        order.map(column).collect()
    };
    let order = factor.order();
    let job = Job::<N> {
        factor,
        weights: columns(strip.data, cols, &mut order.iter().copied()),
        rebuilt: columns(&rebuilt, cols, &mut order.iter().copied()),
        parameters: parameters.map(|p| columns(&p, groups, &mut (0..groups))),
        layout: PhantomData,
    };
    let done = level.run(job);
    let mut total = OutputError::default();
    for (r, codes) in parts[0].chunks_exact_mut(cols.div_ceil(2)).enumerate() {
        total.norm += done.norm[r];
        total.before += done.before[r];
        if done.after[r] < done.before[r] {
            total.error += done.after[r];
            codes.fill(0);
            for (code, &j) in done.codes.iter().zip(order) {
                codes[j / 2] |= code[r] << (4 * (j % 2));
            }
        } else {
            total.error += done.before[r];
        }
    }
    total
}

struct Job<'a, N> {
    factor: &'a Factor,
    /// Columns in the factor's order.
    weights: Vec<Column>,
    rebuilt: Vec<Column>,
    /// Two for each group, in the layout's order.
    parameters: [Vec<Column>; 2],
    layout: PhantomData<N>,
}

struct Done {
    /// In the factor's order.
    codes: Vec<[u8; ROWS]>,
    norm: [f64; ROWS],
    before: [f64; ROWS],
    after: [f64; ROWS],
}

impl<N: Nearest> Kernel for Job<'_, N> {
    type Output = Done;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Done {
        let ready = N::ready(s);
        let mut errors = vec![[0.0; ROWS]; self.weights.len()];
        let norm = sweep(s, self.factor, &mut errors, |k, _| vectors(s, &self.weights[k]));
        let before = sweep(s, self.factor, &mut errors, |k, _| {
            let (w, rebuilt) = (vectors(s, &self.weights[k]), vectors(s, &self.rebuilt[k]));
            std::array::from_fn(|v| s.sub(w[v], rebuilt[v]))
        });
        let mut codes = vec![[0; ROWS]; self.weights.len()];
        let after = sweep(s, self.factor, &mut errors, |k, fed| {
            let group = self.factor.order()[k] / N::GROUP;
            let (a, b) = (vectors(s, &self.parameters[0][group]), vectors(s, &self.parameters[1][group]));
            let w = vectors(s, &self.weights[k]);
            std::array::from_fn(|v| {
                let (code, rebuilt) = N::nearest(s, &ready, s.add(w[v], fed[v]), a[v], b[v]);
                let mut lanes = [0; LANES];
                s.store_i(code, &mut lanes);
                for (out, lane) in codes[k][v * LANES..].iter_mut().zip(lanes) {
                    *out = lane as u8 & 15;
                }
                s.sub(w[v], rebuilt)
            })
        });
        Done { codes, norm, before, after }
    }
}

#[inline(always)]
fn vectors<S: Simd>(s: S, column: &Column) -> [S::F; VECTORS] {
    let (lanes, _) = column.as_chunks::<LANES>();
    std::array::from_fn(|v| s.load(&lanes[v]))
}

#[inline(always)]
fn store<S: Simd>(s: S, x: [S::F; VECTORS], column: &mut Column) {
    for (x, lanes) in x.into_iter().zip(column.as_chunks_mut::<LANES>().0) {
        s.store(x, lanes);
    }
}

/// Goes through all columns in order: `choose` is told what column k should make good, Σ e_i U_ik, and gives its
/// own error e_k. Returns e H eᵀ of every row.
#[inline(always)]
fn sweep<S: Simd>(
    s: S,
    factor: &Factor,
    errors: &mut [Column],
    mut choose: impl FnMut(usize, [S::F; VECTORS]) -> [S::F; VECTORS],
) -> [f64; ROWS] {
    let mut totals = [0f64; ROWS];
    let mut fed = [[0.0; ROWS]; BLOCK];
    for first in (0..factor.cols()).step_by(BLOCK) {
        let panel = factor.panel(first / BLOCK);
        let (before, within) = panel.split_at(first);
        fed.fill([0.0; ROWS]);
        // A block of errors stays in the first-level cache while it serves every column of the panel.
        for (errors, factor) in errors.chunks_exact(BLOCK).zip(before.chunks_exact(BLOCK)) {
            for (t, fed) in fed.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                add_products(s, errors, factor, t * TILE, fed);
            }
        }
        let mut sums = [s.splat(0.0); VECTORS];
        for (j, row) in within.iter().enumerate() {
            let k = first + j;
            let due = vectors(s, &fed[j]);
            let e = choose(k, due);
            store(s, e, &mut errors[k]);
            let (pivot, added) = (s.splat(factor.pivots()[k]), s.splat(-factor.added()[k]));
            for v in 0..VECTORS {
                let left = s.add(e[v], due[v]);
                sums[v] = s.fma(s.mul(pivot, left), left, sums[v]);
                sums[v] = s.fma(s.mul(added, e[v]), e[v], sums[v]);
            }
            for (u, fed) in row[j + 1..within.len()].iter().zip(&mut fed[j + 1..]) {
                let sum = vectors(s, fed);
                store(s, std::array::from_fn(|v| s.fma(e[v], s.splat(*u), sum[v])), fed);
            }
        }
        let mut lanes = [0.0; ROWS];
        store(s, sums, &mut lanes);
        for (total, sum) in totals.iter_mut().zip(lanes) {
            *total += f64::from(sum);
        }
    }
    totals
}

/// Adds Σ e_i U_ik for the columns k of one tile, over the rows i of one block.
#[inline(always)]
fn add_products<S: Simd>(
    s: S,
    errors: &[Column],
    factor: &[[f32; BLOCK]],
    first: usize,
    out: &mut [Column; TILE],
) {
    let mut sums: [[S::F; VECTORS]; TILE] = std::array::from_fn(|c| vectors(s, &out[c]));
    for (e, u) in errors.iter().zip(factor) {
        let e = vectors(s, e);
        let u = u[first..].first_chunk::<TILE>().expect("tiles divide panels");
        for (sums, &u) in sums.iter_mut().zip(u) {
            let u = s.splat(u);
            for (sum, e) in sums.iter_mut().zip(e) {
                *sum = s.fma(e, u, *sum);
            }
        }
    }
    for (sums, out) in sums.into_iter().zip(out) {
        store(s, sums, out);
    }
}
