//! Groups of weights in SIMD lanes: sixteen groups at a time are gathered, one in each lane, and their
//! codes and parameters scattered back into rows.

use super::Strip;
use super::simd::{LANES, Simd};

/// How many weights ahead memory is asked for: arithmetic between loads keeps the hardware from doing it.
const AHEAD: usize = 1024;

/// Where the groups of a strip lie: which sixteen of them a block holds.
#[derive(Clone, Copy)]
pub struct Grid {
    cols: usize,
    group: usize,
    rows: usize,
}

/// Sixteen groups of a grid; fewer at its end, where the last lanes repeat the last group.
#[derive(Clone, Copy)]
pub struct Block {
    /// How many lanes hold a group of their own.
    pub lanes: usize,
    /// Weights in each group: the grid's group, or what is left at the end of a row.
    pub len: usize,
    first: usize,
    per_row: usize,
}

impl Grid {
    /// The grid of `strip` with groups of `group` weights.
    pub fn new(strip: &Strip<'_>, group: usize) -> Grid {
        Grid { cols: strip.cols, group, rows: strip.rows() }
    }

    /// Groups in a row, a shorter last one included.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// The blocks of full groups, row by row, then those of the shorter last groups.
    pub fn blocks(self) -> impl Iterator<Item = Block> {
        let full = self.cols / self.group;
        let tail = self.cols % self.group;
        let kind = move |len: usize, per_row: usize| {
            let total = self.rows * per_row;
            (0..total.div_ceil(LANES)).map(move |i| {
                let first = i * LANES;
                Block { lanes: (total - first).min(LANES), len, first, per_row }
            })
        };
        kind(self.group, full).chain(kind(tail, usize::from(tail > 0)))
    }

    /// The first sixteen full groups, which must exist.
    pub fn first(&self) -> Block {
        Block { lanes: LANES, len: self.group, first: 0, per_row: self.cols / self.group }
    }

    /// Whether the groups of a block follow one another in memory.
    fn contiguous(&self, block: &Block) -> bool {
        block.lanes == LANES && (self.cols == self.group * block.per_row)
    }

    /// Row, and group within the row, of a lane.
    #[inline(always)]
    pub fn place(&self, block: &Block, lane: usize) -> (usize, usize) {
        let n = block.first + lane.min(block.lanes - 1);
        let (row, group) = (n / block.per_row, n % block.per_row);
        (row, if block.len == self.group { group } else { self.cols / self.group })
    }

    /// Index of the lane's group among all groups of the strip.
    #[inline(always)]
    pub fn index(&self, block: &Block, lane: usize) -> usize {
        let (row, group) = self.place(block, lane);
        row * self.groups_per_row() + group
    }

    /// Where the lane's weights start.
    #[inline(always)]
    fn start(&self, block: &Block, lane: usize) -> usize {
        if self.contiguous(block) {
            return (block.first + lane) * self.group;
        }
        let (row, group) = self.place(block, lane);
        row * self.cols + group * self.group
    }

    /// Where the lane's four-bit codes start.
    #[inline(always)]
    fn code_start(&self, block: &Block, lane: usize) -> usize {
        if self.contiguous(block) {
            return (block.first + lane) * self.group / 2;
        }
        let (row, group) = self.place(block, lane);
        row * self.cols.div_ceil(2) + group * self.group / 2
    }

    /// The weights of a lane's group, and the bytes of its four-bit codes.
    #[inline(always)]
    pub fn group<'d, 'c>(
        &self,
        block: &Block,
        lane: usize,
        data: &'d [f32],
        codes: &'c mut [u8],
    ) -> (&'d [f32], &'c mut [u8]) {
        let data = &data[self.start(block, lane)..][..block.len];
        (data, &mut codes[self.code_start(block, lane)..][..block.len.div_ceil(2)])
    }

    /// The weights of all groups of a block of full groups, and their codes, where they follow one another.
    #[inline(always)]
    pub fn together<'d, 'c>(
        &self,
        block: &Block,
        data: &'d [f32],
        codes: &'c mut [u8],
    ) -> Option<(&'d [f32], &'c mut [u8])> {
        if !self.contiguous(block) {
            return None;
        }
        let (start, end) = (block.first * self.group, (block.first + LANES) * self.group);
        Some((&data[start..end], &mut codes[start / 2..end / 2]))
    }

    /// The block's weights, to be read eight per group at a time.
    #[inline(always)]
    pub fn weights<'d, S: Simd, const G: usize>(
        &self,
        s: S,
        data: &'d [f32],
        block: &Block,
    ) -> Weights<'d, G> {
        const { assert!(G.is_multiple_of(8)) };
        if self.contiguous(block) {
            let start = block.first * G;
            for line in (0..LANES * G).step_by(LANES) {
                s.prefetch(data.as_ptr().wrapping_add(start + line + AHEAD));
            }
            let groups = data[start..].as_chunks().0.first_chunk().expect("the block lies inside the data");
            return Weights { data, starts: [0; LANES], len: G, together: Some(groups) };
        }
        let mut starts = [0; LANES];
        for (l, start) in starts.iter_mut().enumerate() {
            *start = self.start(block, l);
        }
        Weights { data, starts, len: block.len, together: None }
    }

    /// Gathers the columns' importance: 1 where there is none, 0 behind the end of a shorter group.
    #[inline(always)]
    pub fn load_importance<S: Simd, const G: usize>(
        &self,
        s: S,
        importance: Option<&[f32]>,
        block: &Block,
    ) -> [S::F; G] {
        let mut out = [s.splat(0.0); G];
        let Some(w) = importance else {
            out[..block.len].fill(s.splat(1.0));
            return out;
        };
        let mut starts = [0; LANES];
        for (l, start) in starts.iter_mut().enumerate() {
            *start = self.place(block, l).1 * G;
        }
        let weights = Weights::<G> { data: w, starts, len: block.len, together: None };
        out[..block.len].copy_from_slice(&weights.all(s)[..block.len]);
        out
    }

    /// Writes one element of `N` bytes for every group of the block.
    #[inline(always)]
    pub fn store_per_group<const N: usize>(&self, values: &[[u8; N]; LANES], block: &Block, out: &mut [u8]) {
        if self.contiguous(block) {
            let out = &mut out[block.first * N..(block.first + LANES) * N];
            return out.copy_from_slice(values.as_flattened());
        }
        for (l, value) in values[..block.lanes].iter().enumerate() {
            out[self.index(block, l) * N..][..N].copy_from_slice(value);
        }
    }
}

/// The weights of sixteen groups.
pub struct Weights<'d, const G: usize> {
    data: &'d [f32],
    starts: [usize; LANES],
    len: usize,
    /// The groups, where they follow one another.
    together: Option<&'d [[f32; G]; LANES]>,
}

impl<const G: usize> Weights<'_, G> {
    /// Weights `8·c .. 8·c + 8` of every group; a shorter group is filled up with copies of its first.
    #[inline(always)]
    pub fn eight<S: Simd>(&self, s: S, c: usize) -> [S::F; 8] {
        if let Some(groups) = self.together {
            let mut runs = [&[0.0; 8]; LANES];
            for (run, group) in runs.iter_mut().zip(groups) {
                *run = &group.as_chunks().0[c];
            }
            return s.transpose8(runs);
        }
        if self.len == G {
            let mut runs = [&[0.0; 8]; LANES];
            for (run, start) in runs.iter_mut().zip(self.starts) {
                *run = self.data[start + c * 8..].first_chunk().expect("a full group has this chunk");
            }
            return s.transpose8(runs);
        }
        let mut out = [s.splat(0.0); 8];
        for (j, out) in out.iter_mut().enumerate() {
            let j = if c * 8 + j < self.len { c * 8 + j } else { 0 };
            let mut lanes = [0.0; LANES];
            for (x, start) in lanes.iter_mut().zip(self.starts) {
                *x = self.data[start + j];
            }
            *out = s.load(&lanes);
        }
        out
    }

    /// All of them: `[j]` holds weight j of every group.
    #[inline(always)]
    pub fn all<S: Simd>(&self, s: S) -> [S::F; G] {
        let mut x = [s.splat(0.0); G];
        for (c, x) in x.as_chunks_mut().0.iter_mut().enumerate() {
            *x = self.eight(s, c);
        }
        x
    }
}
