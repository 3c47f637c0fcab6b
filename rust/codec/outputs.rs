//! What the rows of a weight should make good of each other, where it is known how much their outputs matter.
//!
//! With G = E[g gᵀ] of the gradients of a layer's outputs, the loss grows by tr(G E H Eᵀ) for errors E, as far as its
//! Hessian is a Kronecker product (K-FAC, Martens and Grosse 2015; for quantising, YAQA, Tseng et al. 2025). G is
//! factorised as H is ([`Factor`]): row k should have the error -Σ U_ik e_i, over the rows i before it in the
//! factor's order, whatever the input is, and then costs nothing.

use super::factor::{BLOCK, Cholesky, Factor};
use super::feedback::{Column, ROWS, add_product, add_products, store, vectors};
use super::simd::{Kernel, Level, Simd};
use crate::error::Result;
use std::ops::Range;

const _: () = assert!(ROWS == BLOCK, "columns of a weight are taken as many at a time as rows");

/// The most steps in which the rows of a tensor are encoded. More of them know more of each other's errors, but rows of
/// one step are what threads share.
const STEPS: usize = 8;

/// G of a weight's outputs, and how many rows make a step.
pub struct Outputs {
    /// The factor; the rows of a step follow one another in its order, and are as little alike as all.
    pub factor: Factor,
    /// Rows of every step but a last one, which may be shorter; some blocks.
    pub step: usize,
}

impl Outputs {
    /// As [`Factor::new`], for so many `rows`.
    ///
    /// # Errors
    /// As there.
    pub fn new(moment: &[f32], rows: usize, tokens: Option<u64>, cholesky: Cholesky<'_>) -> Result<Outputs> {
        let step = BLOCK * rows.div_ceil(BLOCK).div_ceil(STEPS).max(1);
        let factor = Factor::dealt(moment, rows, rows.div_ceil(step).max(1), tokens, cholesky)?;
        Ok(Outputs { factor, step })
    }
}

/// Writes the errors that `rows` should have, given those of all rows before them; `errors` are those of [`BLOCK`]
/// columns of the weight, its rows in the factor's order, and `rows` begins with a block.
pub fn owed(level: Level, factor: &Factor, rows: Range<usize>, errors: &mut [Column]) {
    assert!(rows.start.is_multiple_of(BLOCK) && rows.end <= errors.len() && errors.len() == factor.cols());
    level.run(Owed { factor, rows, errors })
}

struct Owed<'a> {
    factor: &'a Factor,
    rows: Range<usize>,
    errors: &'a mut [Column],
}

impl Kernel for Owed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut fed = [[0.0; ROWS]; BLOCK];
        for first in self.rows.clone().step_by(BLOCK) {
            let (before, within) = self.factor.panel(first / BLOCK).split_at(first);
            let len = BLOCK.min(self.rows.end - first);
            fed.fill([0.0; ROWS]);
            add_products(s, self.errors, before, &mut fed);
            for (j, row) in within.iter().enumerate().take(len) {
                let e = vectors(s, &fed[j]).map(|due| s.sub(s.splat(0.0), due));
                store(s, e, &mut self.errors[first + j]);
                add_product(s, e, &row[j + 1..len], &mut fed[j + 1..]);
            }
        }
    }
}
