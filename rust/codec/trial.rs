//! One group's scale, offset and codes, tried from several starts and judged by the squared error of the layer's
//! outputs with all other groups as they are.
//!
//! With the gradient g = e H, the best place for weight j is its rebuilt value plus g_j / H_jj, wherever the
//! others are; and the error changes by -2(α p + β r) + α²A + 2αβB + β²C when a group's scale grows by α and its
//! offset by β, with u its unscaled values, p = Σ g u, r = Σ g, A = u H uᵀ, B = u H 1, C = 1 H 1 over the group.

use super::factor::BLOCK;
use super::feedback::{Group, Nearest};
use super::simd::Simd;

/// One group of a vector of rows: its parameters, and of each of its weights error, gradient and code.
#[derive(Clone, Copy)]
pub struct Trial<S: Simd> {
    /// The parameters.
    pub group: Group<S>,
    /// Errors of the weights.
    pub e: [S::F; BLOCK],
    /// The gradient, e H.
    pub g: [S::F; BLOCK],
    /// Codes of the weights.
    pub codes: [S::I; BLOCK],
}

/// The weights of a group, and H between them.
pub struct Weights<'a, S: Simd> {
    /// The weights of one vector of rows.
    pub w: [S::F; BLOCK],
    within: Within<'a>,
}

/// H between the weights of a group.
#[derive(Clone, Copy)]
pub struct Within<'a> {
    rows: &'a [[f32; BLOCK]],
    start: usize,
    all: f32,
}

impl<'a> Within<'a> {
    /// Of the weights that `rows` and, from `start` on, their columns belong to.
    pub fn new(rows: &'a [[f32; BLOCK]], start: usize) -> Self {
        let all = rows.iter().map(|row| row[start..][..rows.len()].iter().sum::<f32>()).sum();
        Within { rows, start, all }
    }

    /// How many weights there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[f32] {
        &self.rows[i][self.start..][..self.rows.len()]
    }
}

impl<'a, S: Simd> Weights<'a, S> {
    /// The weights `w`, of which only as many mean something as `within` knows.
    pub fn new(w: [S::F; BLOCK], within: Within<'a>) -> Self {
        Weights { w, within }
    }

    /// The best of what starts lead to, or `first` where none is better.
    #[inline(always)]
    pub fn best_trial<N: Nearest>(&self, s: S, ready: &N::Ready<S>, first: &Trial<S>) -> Trial<S> {
        let (mut best, mut least) = (*first, s.splat(0.0));
        for start in 0..=N::STARTS {
            let mut trial = *first;
            if let Some(start) = start.checked_sub(1) {
                trial.group = N::start(s, start, first.group);
                trial.choose::<N>(s, ready, self);
            }
            for _ in 0..N::PASSES {
                trial.refit::<N>(s, ready, self);
                trial.choose::<N>(s, ready, self);
            }
            let change = trial.change_from(s, first, self.within.len());
            // NaN and infinity, where a group is degenerate, never compare as better.
            let better = s.lt(change, least);
            least = s.select(better, change, least);
            best.group.a = s.select(better, trial.group.a, best.group.a);
            best.group.b = s.select(better, trial.group.b, best.group.b);
            for i in 0..self.within.len() {
                best.e[i] = s.select(better, trial.e[i], best.e[i]);
                best.codes[i] = s.select_i(better, trial.codes[i], best.codes[i]);
            }
        }
        best
    }
}

impl<S: Simd> Trial<S> {
    /// By how much the squared error of the outputs is larger than before: (e' - e)·(g' + g).
    #[inline(always)]
    fn change_from(&self, s: S, before: &Trial<S>, len: usize) -> S::F {
        let mut sum = s.splat(0.0);
        for i in 0..len {
            sum = s.fma(s.sub(self.e[i], before.e[i]), s.add(self.g[i], before.g[i]), sum);
        }
        sum
    }

    /// Gives weight `j` another error.
    #[inline(always)]
    fn set_error(&mut self, s: S, within: &Within<'_>, j: usize, e: S::F) {
        let change = s.sub(e, self.e[j]);
        self.e[j] = e;
        for (g, h) in self.g.iter_mut().zip(within.row(j)) {
            *g = s.fma(change, s.splat(*h), *g);
        }
    }

    /// Chooses every code again.
    #[inline(always)]
    fn choose<N: Nearest>(&mut self, s: S, ready: &N::Ready<S>, weights: &Weights<'_, S>) {
        let Weights { w, within } = weights;
        for (j, &w) in w.iter().enumerate().take(within.len()) {
            let best = s.fma(self.g[j], s.splat(1.0 / within.row(j)[j]), s.sub(w, self.e[j]));
            let (code, rebuilt) = N::nearest(s, ready, best, self.group);
            self.codes[j] = code;
            self.set_error(s, within, j, s.sub(w, rebuilt));
        }
    }

    /// Chooses scale and offset again.
    #[inline(always)]
    fn refit<N: Nearest>(&mut self, s: S, ready: &N::Ready<S>, weights: &Weights<'_, S>) {
        let Weights { w, within } = weights;
        let zero = s.splat(0.0);
        let old = self.group;
        let mut u = [zero; BLOCK];
        for (u, code) in u.iter_mut().zip(&self.codes).take(within.len()) {
            *u = N::unscaled(s, ready, *code, old);
        }
        let mut step = Step { p: zero, r: zero, a: zero, b: zero, c: s.splat(within.all) };
        for i in 0..within.len() {
            let mut product = zero;
            for (u, h) in u.iter().zip(within.row(i)) {
                product = s.fma(*u, s.splat(*h), product);
            }
            step.p = s.fma(self.g[i], u[i], step.p);
            step.r = s.add(step.r, self.g[i]);
            step.a = s.fma(product, u[i], step.a);
            step.b = s.add(step.b, product);
        }
        let new = N::storable(s, &step, old);
        let offset = if N::OFFSET { s.sub(new.b, old.b) } else { zero };
        // As above: what is no number is no better.
        let better = s.lt(step.change(s, s.sub(new.a, old.a), offset), zero);
        self.group = Group { a: s.select(better, new.a, old.a), b: s.select(better, new.b, old.b), ..old };
        for j in 0..within.len() {
            let scaled = s.mul(u[j], self.group.a);
            let rebuilt = if N::OFFSET { s.add(scaled, self.group.b) } else { scaled };
            self.set_error(s, within, j, s.sub(w[j], rebuilt));
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
