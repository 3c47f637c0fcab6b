//! Groups of weights in SIMD lanes: sixteen groups at a time are gathered, one in each lane, and their
//! codes and parameters scattered back into rows.

use super::Strip;
use super::simd::{LANES, Simd};

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

    /// Gathers a block of full groups: `[j]` holds weight j of every group.
    #[inline(always)]
    pub fn load<S: Simd, const G: usize>(&self, s: S, data: &[f32], block: &Block) -> [S::F; G] {
        const { assert!(G.is_multiple_of(8)) };
        let mut x = [s.splat(0.0); G];
        if self.contiguous(block) {
            let data = &data[block.first * G..(block.first + LANES) * G];
            for c in 0..G / 8 {
                let runs = std::array::from_fn(|l| run(&data[l * G + c * 8..]));
                x[c * 8..c * 8 + 8].copy_from_slice(&s.transpose8(runs));
            }
        } else {
            let starts: [usize; LANES] = std::array::from_fn(|l| {
                let (row, group) = self.place(block, l);
                row * self.cols + group * G
            });
            for c in 0..G / 8 {
                let runs = std::array::from_fn(|l| run(&data[starts[l] + c * 8..]));
                x[c * 8..c * 8 + 8].copy_from_slice(&s.transpose8(runs));
            }
        }
        x
    }

    /// Gathers a block of shorter groups, each filled up with copies of its first weight.
    #[inline(always)]
    pub fn load_tail<S: Simd, const G: usize>(&self, s: S, data: &[f32], block: &Block) -> [S::F; G] {
        std::array::from_fn(|j| {
            let j = if j < block.len { j } else { 0 };
            s.load(&std::array::from_fn(|l| {
                let (row, group) = self.place(block, l);
                data[row * self.cols + group * G + j]
            }))
        })
    }

    /// Gathers the columns' importance: 1 where there is none, 0 behind the end of a shorter group.
    #[inline(always)]
    pub fn load_importance<S: Simd, const G: usize>(
        &self,
        s: S,
        importance: Option<&[f32]>,
        block: &Block,
    ) -> [S::F; G] {
        std::array::from_fn(|j| match importance {
            _ if j >= block.len => s.splat(0.0),
            None => s.splat(1.0),
            Some(w) => s.load(&std::array::from_fn(|l| w[self.place(block, l).1 * G + j])),
        })
    }

    /// Packs four-bit codes, `q[j]` for weight j of every group, into rows of `codes`.
    #[inline(always)]
    pub fn store_codes<S: Simd, const G: usize>(&self, s: S, q: &[S::I; G], block: &Block, codes: &mut [u8]) {
        let mut words = [[0u32; LANES]; 16];
        let words = &mut words[..G / 8];
        for (c, word) in words.iter_mut().enumerate() {
            let q = &q[c * 8..c * 8 + 8];
            let a = s.or_shl::<4>(q[0], q[1]);
            let b = s.or_shl::<4>(q[2], q[3]);
            let c = s.or_shl::<4>(q[4], q[5]);
            let d = s.or_shl::<4>(q[6], q[7]);
            s.store_i(s.or_shl::<16>(s.or_shl::<8>(a, b), s.or_shl::<8>(c, d)), word);
        }
        if self.contiguous(block) {
            let codes = &mut codes[block.first * G / 2..(block.first + LANES) * G / 2];
            for l in 0..LANES {
                for (c, word) in words.iter().enumerate() {
                    codes[l * G / 2 + c * 4..][..4].copy_from_slice(&word[l].to_le_bytes());
                }
            }
            return;
        }
        let row_bytes = self.cols.div_ceil(2);
        for l in 0..block.lanes {
            let (row, group) = self.place(block, l);
            let out = &mut codes[row * row_bytes + group * G / 2..][..block.len.div_ceil(2)];
            for (c, out) in out.chunks_mut(4).enumerate() {
                // Codes behind the end of a row are zero, so that equal weights give equal bytes.
                let kept = 4 * (block.len - c * 8).min(8);
                let word = words[c][l] & (u32::MAX >> (32 - kept));
                out.copy_from_slice(&word.to_le_bytes()[..out.len()]);
            }
        }
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

#[inline(always)]
fn run(data: &[f32]) -> &[f32; 8] {
    data.first_chunk().expect("a full group has a multiple of eight weights")
}
