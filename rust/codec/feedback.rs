//! Codes chosen one column at a time, each making good what the columns before it have lost ("gptq"), and then
//! improved together with their groups' parameters ([`super::descent`]).
//!
//! Parameters come from the search first, weighted with H_jj. Sixty-four rows go together, one in each lane of
//! four vectors, since rows do not depend on each other. Each row keeps what loses less of its outputs: this, or
//! what the search alone had chosen.

use super::descent;
use super::factor::{BLOCK, Factor};
use super::simd::{Kernel, LANES, Level, Simd};
use super::trial::Step;
use super::{Layout, Strip};
use std::marker::PhantomData;

/// Rows that go together.
pub const ROWS: usize = VECTORS * LANES;

/// Vectors of rows.
pub const VECTORS: usize = 4;

/// Columns that one pass over the errors serves; with four vectors they fill the registers.
pub const TILE: usize = 4;

/// Numbers that a layout may keep once a row.
pub const ROW_NUMBERS: usize = 4;

/// One number of every row.
pub type Column = [f32; ROWS];

/// One code of every row.
pub type Codes = [u8; ROWS];

/// The numbers that a layout needs to rebuild a group: a weight is a·u + b, where u belongs to its code.
#[derive(Clone, Copy)]
pub struct Group<S: Simd> {
    /// The scale.
    pub a: S::F,
    /// The offset, or which table u comes from.
    pub b: S::F,
    /// The unit of the scale, where it has one.
    pub unit: S::F,
    /// What the layout keeps once a row, where it does.
    pub row: [S::F; ROW_NUMBERS],
}

/// What error feedback must know of a layout.
pub trait Nearest {
    /// Weights that share parameters.
    const GROUP: usize;
    /// Whether b is added, and may be chosen again too.
    const OFFSET: bool;
    /// What look-ups need, loaded once.
    type Ready<S: Simd>: Copy;

    /// Loads it.
    fn ready<S: Simd>(s: S) -> Self::Ready<S>;

    /// Writes a, b and the unit of every group of `rows`: `[rows, groups]` each.
    fn parameters(parts: &[&[u8]], cols: usize, out: [&mut [f32]; 3]);

    /// Writes what the layout keeps once a row, `[rows]`; nothing where it keeps nothing.
    fn row_numbers(_parts: &[&[u8]], _out: &mut [[f32; ROW_NUMBERS]]) {}

    /// Stores the codes of one row again.
    fn store_codes(parts: &mut [&mut [u8]], row: usize, codes: &[u8]) {
        store_bits(parts[0], row, codes, 4, 0);
    }

    /// Stores a, b and the unit of every group of one row again, `[groups]` each.
    fn store_parameters(parts: &mut [&mut [u8]], cols: usize, row: usize, groups: [&[f32]; 3]);

    /// The nearest code, and the weight that it stands for, exactly as the layout rebuilds it.
    fn nearest<S: Simd>(s: S, ready: &Self::Ready<S>, x: S::F, group: Group<S>) -> (S::I, S::F);

    /// What a code stands for under a = 1 and without an offset.
    fn unscaled<S: Simd>(s: S, ready: &Self::Ready<S>, code: S::I, group: Group<S>) -> S::F;

    /// How many parameters around those of a group are tried besides them.
    const STARTS: usize;
    /// How often, from each of them, parameters and then codes are chosen again.
    const PASSES: usize;

    /// The parameters of start `number`, below [`Self::STARTS`].
    fn start<S: Simd>(s: S, number: usize, group: Group<S>) -> Group<S>;

    /// Parameters near to a + α and b + β that can be stored, where `step` has its least at α and β.
    fn storable<S: Simd>(s: S, step: &Step<S>, group: Group<S>) -> Group<S>;
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
    let groups = cols.div_ceil(N::GROUP);
    let mut rebuilt = vec![0f32; strip.data.len()];
    let mut parameters = [(); 3].map(|()| vec![0f32; strip.rows() * groups]);
    let mut row_numbers = vec![[0f32; ROW_NUMBERS]; strip.rows()];
    {
        let parts: Vec<&[u8]> = parts.iter().map(|p| &**p).collect();
        (layout.decode)(level, &parts, cols, &mut rebuilt);
        N::parameters(&parts, cols, parameters.each_mut().map(Vec::as_mut_slice));
        N::row_numbers(&parts, &mut row_numbers);
    }
    let done = level.run(Job::<N> {
        factor,
        weights: columns(strip.data, cols),
        rebuilt: columns(&rebuilt, cols),
        parameters: parameters.map(|p| columns(&p, groups)),
        row: columns(row_numbers.as_flattened(), ROW_NUMBERS),
        layout: PhantomData,
    });
    let mut total = OutputError::default();
    let mut row_codes = Vec::with_capacity(cols);
    let mut row_parameters = [(); 3].map(|()| vec![0f32; groups]);
    for r in 0..strip.rows() {
        total.norm += done.norm[r];
        total.before += done.before[r];
        total.error += done.after[r].min(done.before[r]);
        // Not so where either is NaN.
        if done.after[r] < done.before[r] {
            row_codes.clear();
            row_codes.extend(done.codes.iter().map(|column| column[r]));
            N::store_codes(parts, r, &row_codes);
            for (row, all) in row_parameters.iter_mut().zip(&done.parameters) {
                row.iter_mut().zip(all).for_each(|(out, column)| *out = column[r]);
            }
            N::store_parameters(parts, cols, r, row_parameters.each_ref().map(Vec::as_slice));
        }
    }
    total
}

/// Stores bits `shift .. shift + bits` of the codes of one row, low bits first; 8 is a multiple of `bits`.
pub fn store_bits(part: &mut [u8], row: usize, codes: &[u8], bits: usize, shift: u32) {
    let per_byte = 8 / bits;
    let row_bytes = codes.len().div_ceil(per_byte);
    for (byte, codes) in part[row * row_bytes..][..row_bytes].iter_mut().zip(codes.chunks(per_byte)) {
        let bits_of = |code: u8| (code >> shift) & (u8::MAX >> (8 - bits));
        // A code of eight bits leaves nothing of the byte before it.
        let shifted = |byte: u8| byte.checked_shl(bits as u32).unwrap_or(0);
        *byte = codes.iter().rev().fold(0, |byte, code| shifted(byte) | bits_of(*code));
    }
}

/// Rows of `cols` numbers as columns.
fn columns(rows: &[f32], cols: usize) -> Vec<Column> {
    let mut out = vec![[0.0; ROWS]; cols];
    for (r, row) in rows.chunks_exact(cols).enumerate() {
        for (column, x) in out.iter_mut().zip(row) {
            column[r] = *x;
        }
    }
    out
}

/// At most [`ROWS`] rows of a layer; columns are in their own order.
pub struct Job<'a, N> {
    /// The second moment of the layer's input.
    pub factor: &'a Factor,
    /// The weights.
    pub weights: Vec<Column>,
    rebuilt: Vec<Column>,
    /// a, b and the unit of each group.
    pub parameters: [Vec<Column>; 3],
    /// What the layout keeps once a row.
    row: Vec<Column>,
    layout: PhantomData<N>,
}

/// What became of them.
pub struct Done {
    codes: Vec<Codes>,
    parameters: [Vec<Column>; 3],
    norm: [f64; ROWS],
    before: [f64; ROWS],
    after: [f64; ROWS],
}

impl<N> Job<'_, N> {
    /// The parameters of a group, for one vector of rows.
    #[inline(always)]
    pub fn group<S: Simd>(&self, s: S, group: usize, v: usize) -> Group<S> {
        let [a, b, unit] = self.parameters.each_ref().map(|p| vectors(s, &p[group])[v]);
        Group { a, b, unit, row: std::array::from_fn(|i| vectors(s, &self.row[i])[v]) }
    }
}

impl<N: Nearest> Kernel for Job<'_, N> {
    type Output = Done;

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) -> Done {
        let ready = N::ready(s);
        let mut errors = vec![[0.0; ROWS]; self.weights.len()];
        let mut codes = vec![[0; ROWS]; self.weights.len()];
        let mut given = self.weights.clone();
        let mut traces = [[0.0; ROWS]; 3];
        // One loop and not three calls: each would compile for every layout and instruction set.
        for (stage, trace) in traces.iter_mut().enumerate() {
            if stage == 1 {
                for (e, rebuilt) in given.iter_mut().zip(&self.rebuilt) {
                    e.iter_mut().zip(rebuilt).for_each(|(e, r)| *e -= r);
                }
            } else if stage == 2 {
                sweep(s, self.factor, &mut errors, |j, fed| {
                    let w = vectors(s, &self.weights[j]);
                    std::array::from_fn(|v| {
                        let group = self.group(s, j / N::GROUP, v);
                        let (code, rebuilt) = N::nearest(s, &ready, s.add(w[v], fed[v]), group);
                        store_codes(s, code, &mut codes[j], v);
                        s.sub(w[v], rebuilt)
                    })
                });
                given = descent::improve(s, &ready, &mut self, &errors, &mut codes);
            }
            *trace = sweep(s, self.factor, &mut errors, |j, _| vectors(s, &given[j]));
        }
        let [norm, before, after] = traces;
        Done { codes, parameters: self.parameters, norm, before, after }
    }
}

/// A column's vectors.
#[inline(always)]
pub fn vectors<S: Simd>(s: S, column: &Column) -> [S::F; VECTORS] {
    let (lanes, _) = column.as_chunks::<LANES>();
    std::array::from_fn(|v| s.load(&lanes[v]))
}

/// Writes a column's vectors.
#[inline(always)]
pub fn store<S: Simd>(s: S, x: [S::F; VECTORS], column: &mut Column) {
    for (x, lanes) in x.into_iter().zip(column.as_chunks_mut::<LANES>().0) {
        s.store(x, lanes);
    }
}

/// Writes the codes of one vector of rows.
#[inline(always)]
pub fn store_codes<S: Simd>(s: S, code: S::I, column: &mut Codes, v: usize) {
    let mut lanes = [0; LANES];
    s.store_i(code, &mut lanes);
    for (out, lane) in column[v * LANES..].iter_mut().zip(lanes) {
        *out = lane as u8;
    }
}

/// Goes through all columns in the factor's order: `choose` is told what column j should make good, the sum of
/// e_i U_ik over those before it, and gives its own error. Returns e H eᵀ of every row; `errors` is scratch, in
/// the factor's order.
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
        add_products(s, errors, before, &mut fed);
        let mut sums = [s.splat(0.0); VECTORS];
        for (j, row) in within.iter().enumerate() {
            let k = first + j;
            let due = vectors(s, &fed[j]);
            let e = choose(factor.order()[k], due);
            store(s, e, &mut errors[k]);
            let (pivot, added) = (s.splat(factor.pivots()[k]), s.splat(-factor.added()[k]));
            for v in 0..VECTORS {
                let left = s.add(e[v], due[v]);
                sums[v] = s.fma(s.mul(pivot, left), left, sums[v]);
                sums[v] = s.fma(s.mul(added, e[v]), e[v], sums[v]);
            }
            add_product(s, e, &row[j + 1..within.len()], &mut fed[j + 1..]);
        }
        let mut lanes = [0.0; ROWS];
        store(s, sums, &mut lanes);
        for (total, sum) in totals.iter_mut().zip(lanes) {
            *total += f64::from(sum);
        }
    }
    totals
}

/// Adds e·m_k to every column k of `out`.
#[inline(always)]
pub fn add_product<S: Simd>(s: S, e: [S::F; VECTORS], matrix_row: &[f32], out: &mut [Column]) {
    for (m, out) in matrix_row.iter().zip(out) {
        let sum = vectors(s, out);
        store(s, std::array::from_fn(|v| s.fma(e[v], s.splat(*m), sum[v])), out);
    }
}

/// Adds Σ e_i m_ik to every column k of `out`, over the rows i of `matrix`.
#[inline(always)]
pub fn add_products<S: Simd>(s: S, errors: &[Column], matrix: &[[f32; BLOCK]], out: &mut [Column; BLOCK]) {
    // A block of errors stays in the first-level cache while it serves every column.
    for (errors, matrix) in errors.chunks(BLOCK).zip(matrix.chunks(BLOCK)) {
        for (t, out) in out.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            let mut sums: [[S::F; VECTORS]; TILE] = std::array::from_fn(|c| vectors(s, &out[c]));
            for (e, m) in errors.iter().zip(matrix) {
                let e = vectors(s, e);
                let m: &[f32; TILE] = &m.as_chunks().0[t];
                for (sums, &m) in sums.iter_mut().zip(m) {
                    let m = s.splat(m);
                    for (sum, e) in sums.iter_mut().zip(e) {
                        *sum = s.fma(e, m, *sum);
                    }
                }
            }
            for (sums, out) in sums.into_iter().zip(out) {
                store(s, sums, out);
            }
        }
    }
}
