//! The triangular factor of a layer's second moment, in the form that error feedback reads.
//!
//! H = E[x xᵀ] of a layer's input, its columns in order of falling H_jj, is written H = U D Uᵀ with U unit upper
//! triangular. What column k should make good of the errors e of the columns before it is then Σ e_i U_ik (the
//! LDLQ form of GPTQ: QuIP, Chee et al. 2023; it takes one Cholesky factor and no inverse), and the squared
//! error of a row's outputs is Σ D_k (e_k + Σ e_i U_ik)².

use crate::error::{Error, Result};

/// Columns in a panel of the factor.
pub const BLOCK: usize = 64;

/// Damping, and the step by which it is raised until the factor exists, in units of the mean of H_jj.
const DAMPING: f64 = 0.01;

/// Damping in units of each H_jj, for as many tokens as columns; fewer for more. Products of columns that few tokens
/// gave are mostly noise, and this trusts them less.
const DAMPING_BY_TOKENS: f64 = 2.0;

/// Raises of the damping after which a matrix is no second moment: its eigenvalues are at least -|H|.
const MOST_RAISES: usize = 100;

/// Replaces a symmetric matrix of n rows by its lower Cholesky factor, in FP64 and row-major, and says whether
/// there is one. What stands above the diagonal means nothing, before and after.
pub type Cholesky<'a> = &'a (dyn Fn(&mut [f64], usize) -> Result<bool> + Sync);

/// U and D of a second moment.
pub struct Factor {
    cols: usize,
    order: Vec<usize>,
    pivots: Vec<f32>,
    added: Vec<f32>,
    panels: Vec<f32>,
    moment: Vec<f32>,
}

impl Factor {
    /// Factorises `moment`, `[cols, cols]` and symmetric, with damping on its diagonal; `tokens` is how many it is a
    /// mean of, where that is known.
    ///
    /// # Errors
    /// An input error where it holds NaN, infinity or a negative diagonal, or where no damping makes it positive
    /// definite; whatever `cholesky` fails with.
    pub fn new(moment: &[f32], cols: usize, tokens: Option<u64>, cholesky: Cholesky<'_>) -> Result<Factor> {
        Factor::dealt(moment, cols, 1, tokens, cholesky)
    }

    /// The same, its columns dealt out in turn to so many `hands`, which follow one another: those of one hand are then
    /// as little alike as those of all.
    ///
    /// # Errors
    /// As [`Factor::new`].
    pub fn dealt(
        moment: &[f32],
        cols: usize,
        hands: usize,
        tokens: Option<u64>,
        cholesky: Cholesky<'_>,
    ) -> Result<Factor> {
        if cols.checked_mul(cols) != Some(moment.len()) {
            return Err(Error::usage(format!(
                "a second moment of {} numbers does not fit {cols} columns; it must be [{cols}, {cols}]",
                moment.len()
            )));
        }
        if let Some(i) = moment.iter().position(|h| !h.is_finite()) {
            return Err(Error::input(format!(
                "the second moment is {} at [{}, {}]; gather the statistics again",
                moment[i],
                i / cols,
                i % cols
            )));
        }
        let diagonal: Vec<f32> = (0..cols).map(|j| moment[j * cols + j]).collect();
        if let Some(j) = diagonal.iter().position(|h| *h < 0.0) {
            return Err(Error::input(format!(
                "the second moment is {} at [{j}, {j}], but a mean square is never negative",
                diagonal[j]
            )));
        }
        let mut order: Vec<usize> = (0..cols).collect();
        // A stable sort, so that equal columns keep their order on every machine.
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
        let hand = |i: usize| order.iter().skip(i).step_by(hands).copied();
        let order: Vec<usize> = (0..hands).flat_map(hand).collect();
        let mean = diagonal.iter().map(|&h| f64::from(h)).sum::<f64>() / cols.max(1) as f64;
        // A column that is always zero costs nothing, whatever its weights become.
        let dead = |j: usize| if diagonal[j] == 0.0 { 1.0 } else { 0.0 };
        let noise = tokens.map_or(0.0, |n| DAMPING_BY_TOKENS * cols as f64 / n.max(1) as f64);
        let mut lower = vec![0f64; cols * cols];
        for raises in 0..MOST_RAISES {
            let damping = DAMPING * mean * (raises + 1) as f64;
            let added: Vec<f64> =
                order.iter().map(|&j| damping + noise * f64::from(diagonal[j]) + dead(j)).collect();
            // Backwards, so that the lower factor becomes the upper one.
            for (row, &a) in lower.chunks_exact_mut(cols).zip(order.iter().rev()) {
                let source = &moment[a * cols..][..cols];
                for (out, &b) in row.iter_mut().zip(order.iter().rev()) {
                    *out = f64::from(source[b]);
                }
            }
            for (k, added) in added.iter().rev().enumerate() {
                lower[k * cols + k] += added;
            }
            if cols == 0 || cholesky(&mut lower, cols)? {
                let (pivots, panels) = panels(&lower, cols);
                drop(lower);
                let added: Vec<f32> = added.iter().map(|&a| a as f32).collect();
                let moment = moment_panels(moment, cols, &order, &added);
                return Ok(Factor { cols, order, pivots, added, panels, moment });
            }
        }
        Err(Error::input(
            "the second moment is far from positive definite, so it is no mean of x xᵀ; gather the statistics again",
        ))
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Which column comes k-th.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// D, in that order.
    pub fn pivots(&self) -> &[f32] {
        &self.pivots
    }

    /// What was added to H_jj, in that order.
    pub fn added(&self) -> &[f32] {
        &self.added
    }

    /// Columns `BLOCK·p ..` of the damped moment, a row for each `[f32; BLOCK]`, in the columns' own order.
    pub fn moment_panel(&self, p: usize) -> &[[f32; BLOCK]] {
        &self.moment.as_chunks().0[p * self.cols..(p + 1) * self.cols]
    }

    /// Columns `BLOCK·p ..` of U, from its first row to the last that is not zero, a row for each `[f32; BLOCK]`.
    pub fn panel(&self, p: usize) -> &[[f32; BLOCK]] {
        let first = BLOCK * p * (p + 1) / 2;
        let rows = (BLOCK * (p + 1)).min(self.cols);
        &self.panels.as_chunks().0[first..first + rows]
    }
}

/// Panels of the damped moment, whose rows and columns are in their own order.
fn moment_panels(moment: &[f32], cols: usize, order: &[usize], added: &[f32]) -> Vec<f32> {
    let mut panels = vec![0f32; cols.div_ceil(BLOCK) * cols * BLOCK];
    let (rows, _) = panels.as_chunks_mut::<BLOCK>();
    for (p, panel) in rows.chunks_exact_mut(cols.max(1)).enumerate() {
        for (row, source) in panel.iter_mut().zip(moment.chunks_exact(cols)) {
            let source = &source[p * BLOCK..];
            let n = source.len().min(BLOCK);
            row[..n].copy_from_slice(&source[..n]);
        }
    }
    for (&j, added) in order.iter().zip(added) {
        rows[j / BLOCK * cols + j][j % BLOCK] += added;
    }
    panels
}

/// D and the panels of U, from the lower factor of the matrix taken backwards.
fn panels(lower: &[f64], cols: usize) -> (Vec<f32>, Vec<f32>) {
    let at = |i: usize, k: usize| lower[(cols - 1 - i) * cols + (cols - 1 - k)];
    let roots: Vec<f64> = (0..cols).map(|k| at(k, k)).collect();
    let blocks = cols.div_ceil(BLOCK);
    let mut panels = vec![0f32; BLOCK * (BLOCK * blocks * (blocks + 1) / 2)];
    let mut rows = panels.as_chunks_mut::<BLOCK>().0.iter_mut();
    for p in 0..blocks {
        let columns = p * BLOCK..((p + 1) * BLOCK).min(cols);
        // The last panel ends where the matrix does.
        for i in 0..(p + 1) * BLOCK {
            let Some(row) = rows.next() else { break };
            for (out, k) in row.iter_mut().zip(columns.clone()) {
                if i < k {
                    *out = (at(i, k) / roots[k]) as f32;
                }
            }
        }
    }
    (roots.iter().map(|r| (r * r) as f32).collect(), panels)
}
