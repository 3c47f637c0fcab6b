//! Coordinate descent on the squared error of a layer's outputs, e H eᵀ: each code, and each group's scale and
//! offset, is chosen again given all others, for a few rounds.
//!
//! With the gradient g = e H, the best place for weight j is its rebuilt value plus g_j / H_jj, wherever the
//! others are; and the error changes by -2(α p + β r) + α²A + 2αβB + β²C when a group's scale grows by α and its
//! offset by β, with u its unscaled values, p = Σ g u, r = Σ g, A = u H uᵀ, B = u H 1, C = 1 H 1 over the group.

use super::factor::{BLOCK, Factor};
use super::feedback::{
    Codes, Column, Group, Job, Nearest, ROWS, VECTORS, add_product, add_products, store, store_codes, vectors,
};
use super::simd::{LANES, Simd};

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
            refit(s, ready, job, &block, group.clone(), errors, codes, &mut gradient);
            for j in group {
                choose(s, ready, job, &block, j, errors, codes, &mut gradient);
            }
        }
    }
}

/// How the error changes with one group's scale and offset, by the letters of this file's head.
pub struct Step<S: Simd> {
    p: S::F,
    r: S::F,
    a: S::F,
    b: S::F,
    c: S::F,
}

impl<S: Simd> Step<S> {
    /// The best α alone.
    #[inline(always)]
    pub fn scale(&self, s: S) -> S::F {
        s.div(self.p, self.a)
    }

    /// The best α and β.
    #[inline(always)]
    pub fn both(&self, s: S) -> [S::F; 2] {
        let d = s.sub(s.mul(self.a, self.c), s.mul(self.b, self.b));
        let scale = s.div(s.sub(s.mul(self.c, self.p), s.mul(self.b, self.r)), d);
        let offset = s.div(s.sub(s.mul(self.a, self.r), s.mul(self.b, self.p)), d);
        [scale, offset]
    }

    /// The best β for this α.
    #[inline(always)]
    pub fn offset(&self, s: S, scale: S::F) -> S::F {
        s.div(s.sub(self.r, s.mul(scale, self.b)), self.c)
    }

    /// What α and β add to the error.
    #[inline(always)]
    pub fn change(&self, s: S, scale: S::F, offset: S::F) -> S::F {
        let linear = s.fma(scale, self.p, s.mul(offset, self.r));
        let square = s.fma(
            scale,
            s.fma(scale, self.a, s.mul(s.mul(s.splat(2.0), offset), self.b)),
            s.mul(s.mul(offset, offset), self.c),
        );
        s.sub(square, s.mul(s.splat(2.0), linear))
    }
}

/// Some columns of H that are next to each other.
struct Block<'a> {
    first: usize,
    len: usize,
    /// Their rows of the panel, from the first of them on.
    rows: &'a [[f32; BLOCK]],
}

/// Chooses the codes of column `j` of the block.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn choose<S: Simd, N: Nearest>(
    s: S,
    ready: &N::Ready<S>,
    job: &Job<'_, N>,
    block: &Block<'_>,
    j: usize,
    errors: &mut [Column],
    codes: &mut [Codes],
    gradient: &mut [Column; BLOCK],
) {
    let (k, row) = (block.first + j, &block.rows[j]);
    let inverse = s.splat(1.0 / row[j]);
    let (w, e, g) = (vectors(s, &job.weights[k]), vectors(s, &errors[k]), vectors(s, &gradient[j]));
    let after: [S::F; VECTORS] = std::array::from_fn(|v| {
        let best = s.fma(g[v], inverse, s.sub(w[v], e[v]));
        let (code, rebuilt) = N::nearest(s, ready, best, job.group(s, k / N::GROUP, v));
        store_codes(s, code, &mut codes[k], v);
        s.sub(w[v], rebuilt)
    });
    store(s, after, &mut errors[k]);
    let change = std::array::from_fn(|v| s.sub(after[v], e[v]));
    add_product(s, change, &row[j + 1..block.len], &mut gradient[j + 1..]);
}

/// Chooses scale and offset of one group of the block.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn refit<S: Simd, N: Nearest>(
    s: S,
    ready: &N::Ready<S>,
    job: &mut Job<'_, N>,
    block: &Block<'_>,
    group: std::ops::Range<usize>,
    errors: &mut [Column],
    codes: &[Codes],
    gradient: &mut [Column; BLOCK],
) {
    let zero = s.splat(0.0);
    let number = (block.first + group.start) / N::GROUP;
    let all: f32 = group.clone().map(|i| block.rows[i][group.clone()].iter().sum::<f32>()).sum();
    let all = s.splat(all);
    let mut chosen = [[0.0; ROWS]; 2];
    for v in 0..VECTORS {
        let old = job.group(s, number, v);
        let mut u = [zero; BLOCK];
        for j in group.clone() {
            u[j] = N::unscaled(s, ready, load_codes(s, &codes[block.first + j], v), old);
        }
        let (mut p, mut r, mut a, mut b) = (zero, zero, zero, zero);
        for i in group.clone() {
            let mut product = zero;
            for j in group.clone() {
                product = s.fma(u[j], s.splat(block.rows[i][j]), product);
            }
            let g = vectors(s, &gradient[i])[v];
            p = s.fma(g, u[i], p);
            r = s.add(r, g);
            a = s.fma(product, u[i], a);
            b = s.add(b, product);
        }
        let step = Step { p, r, a, b, c: all };
        let new = N::storable(s, &step, old);
        let offset = if N::OFFSET { s.sub(new.b, old.b) } else { zero };
        // NaN and infinity, where a group is degenerate, never compare as better.
        let better = s.lt(step.change(s, s.sub(new.a, old.a), offset), zero);
        let kept = Group { a: s.select(better, new.a, old.a), b: s.select(better, new.b, old.b), ..old };
        for (x, out) in [kept.a, kept.b].into_iter().zip(&mut chosen) {
            s.store(x, &mut out.as_chunks_mut::<LANES>().0[v]);
        }
    }
    [job.parameters[0][number], job.parameters[1][number]] = chosen;
    for j in group {
        let k = block.first + j;
        let (w, e) = (vectors(s, &job.weights[k]), vectors(s, &errors[k]));
        let after: [S::F; VECTORS] = std::array::from_fn(|v| {
            let group = job.group(s, number, v);
            let u = N::unscaled(s, ready, load_codes(s, &codes[k], v), group);
            let scaled = s.mul(u, group.a);
            s.sub(w[v], if N::OFFSET { s.add(scaled, group.b) } else { scaled })
        });
        store(s, after, &mut errors[k]);
        let change = std::array::from_fn(|v| s.sub(after[v], e[v]));
        add_product(s, change, &block.rows[j][..block.len], &mut gradient[..block.len]);
    }
}

#[inline(always)]
fn load_codes<S: Simd>(s: S, codes: &Codes, v: usize) -> S::I {
    let mut words = [0; LANES];
    for (word, code) in words.iter_mut().zip(&codes[v * LANES..]) {
        *word = u32::from(*code);
    }
    s.load_i(&words)
}
