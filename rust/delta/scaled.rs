//! A chunk's distances from its base, each in two parts: lower bits, which are as good as random and stored as they
//! are, and what lies above them, which is small and goes through a prefix code.
//!
//! How many lower bits an element has follows from its base's exponent and from one number for each block of 64: the
//! scale of the block's changes. A step of a float is as large as its exponent says, so that changes of one size are
//! distances of very different ones. docs/delta.md says how the bytes lie.
// Iterators of several arrays become calls of functions without the wide instructions of their caller.
#![allow(clippy::needless_range_loop)]

use super::bits::{self, Kernel, Pack, Writer};
use super::prefix::{self, Lengths, SYMBOLS};
use super::word::Word;
use crate::codec::simd::Level;
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Elements that have one scale.
pub const BLOCK: usize = 64;

/// Blocks of which one is looked at to find the prefix code.
const SAMPLED: usize = 8;

/// What is added to the mean of the changes' logarithms, in sixteenths: measured on fine-tunes.
const ABOVE_MEAN: u32 = 0;

/// The symbol of a scale that is far from the one before it.
const FAR: u8 = SYMBOLS as u8 - 1;

/// How an element's bits are read.
#[derive(Clone, Copy)]
struct Form {
    float: bool,
    /// The exponent's place, and ones for its bits.
    from: u32,
    mask: u16,
}

impl Form {
    fn of(dtype: Dtype) -> Form {
        use Dtype::{BF16, F8_E4M3, F8_E5M2, F16, F32, F64};
        let (from, mask) = match dtype {
            F64 => (52, 0x7ff),
            F32 => (23, 0xff),
            BF16 => (7, 0xff),
            F16 => (10, 0x1f),
            F8_E4M3 => (3, 0xf),
            F8_E5M2 => (2, 0x1f),
            _ => (0, 0),
        };
        Form { float: super::word::is_float(dtype), from, mask }
    }
}

/// What one thread needs.
#[derive(Default)]
pub struct Scratch {
    /// Changed elements of each block.
    changed: Vec<u8>,
    scales: Vec<u8>,
    upper: Vec<u8>,
    lower: Vec<u8>,
    lane: Vec<u8>,
    far: Vec<u8>,
    steps: Vec<u8>,
}

/// What changed in a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Changes {
    /// Elements that are not the base's.
    pub count: usize,
    /// Zeros at the end of all distances.
    zeros: u32,
}

/// Elements of a block, zeros beyond the end.
#[inline(always)]
fn block<W: Word>(bytes: &[u8], i: usize) -> [W; BLOCK] {
    let start = i * BLOCK * W::BYTES;
    let mut out = [W::default(); BLOCK];
    match bytes.get(start..start + BLOCK * W::BYTES) {
        Some(all) => {
            for i in 0..BLOCK {
                out[i] = W::read(&all[i * W::BYTES..(i + 1) * W::BYTES]);
            }
        }
        None => {
            let rest = bytes.get(start..).unwrap_or_default().chunks_exact(W::BYTES);
            out.iter_mut().zip(rest).for_each(|(out, bytes)| *out = W::read(bytes));
        }
    }
    out
}

/// The scale of a block's changes.
#[inline(always)]
fn scale<W: Word>(folded: &[W; BLOCK], exponents: &[W; BLOCK]) -> u16 {
    let (mut sum, mut count) = (0u32, 0u32);
    for i in 0..BLOCK {
        let magnitude = folded[i].magnitude();
        let counts = u32::from(magnitude > 0);
        sum += (magnitude + exponents[i].small()) * counts;
        count += counts;
    }
    ((((sum - 127 * count) * 16).checked_div(count).unwrap_or(0) + ABOVE_MEAN) >> 4) as u16
}

struct Scan<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    scratch: &'a mut Scratch,
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Kernel for Scan<'_, W> {
    type Output = Changes;

    #[inline(always)]
    fn run<P: Pack>(self, _: P) -> Changes {
        let blocks = self.new.len().div_ceil(BLOCK * W::BYTES);
        self.scratch.changed.clear();
        let (mut count, mut all) = (0, W::default());
        for i in 0..blocks {
            let (old, new) = (block::<W>(self.old, i), block::<W>(self.new, i));
            let mut changed = 0u8;
            for j in 0..BLOCK {
                let steps = W::climb(new[j], old[j], self.form.float);
                all = all.or(steps);
                changed += u8::from(steps != W::default());
            }
            count += usize::from(changed);
            self.scratch.changed.push(changed);
        }
        Changes { count, zeros: (0..8 * W::BYTES as u32).find(|&i| all.bit(i)).unwrap_or(0) }
    }
}

/// Counts what changed; the first step of [`put`].
pub fn scan<W: Word>(level: Level, old: &[u8], new: &[u8], dtype: Dtype, scratch: &mut Scratch) -> Changes {
    bits::run(level, Scan::<W> { old, new, form: Form::of(dtype), scratch, word: std::marker::PhantomData })
}

/// A prefix code, and what it would cost.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    lengths: Lengths,
    /// Bits for all elements of the chunk.
    pub bits: f64,
}

struct Sample<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    changes: Changes,
    scratch: &'a Scratch,
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Sample<'_, W> {
    #[inline(always)]
    fn block(&self, i: usize) -> ([W; BLOCK], [W; BLOCK], u16) {
        let (old, new) = (block::<W>(self.old, i), block::<W>(self.new, i));
        let (mut folded, mut exponents) = ([W::default(); BLOCK], [W::default(); BLOCK]);
        for j in 0..BLOCK {
            folded[j] = W::folded(W::climb(new[j], old[j], self.form.float), self.changes.zeros);
            exponents[j] = old[j].field(self.form.from, self.form.mask);
        }
        let scale = scale(&folded, &exponents);
        for j in 0..BLOCK {
            exponents[j] = exponents[j].below(scale);
        }
        (folded, exponents, scale)
    }
}

impl<W: Word> Kernel for &Sample<'_, W> {
    type Output = Plan;

    #[inline(always)]
    fn run<P: Pack>(self, _: P) -> Plan {
        let mut counts = [0u32; SYMBOLS];
        let (mut live, mut seen, mut lower) = (0usize, 0usize, 0u64);
        for (i, _) in self.scratch.changed.iter().enumerate().filter(|(_, n)| **n > 0) {
            live += 1;
            // The first of every eight, so that a single one is looked at too.
            if live % SAMPLED != 1 {
                continue;
            }
            seen += 1;
            let (folded, split, _) = self.block(i);
            let mut upper = [0u8; BLOCK];
            let mut bits = 0;
            for j in 0..BLOCK {
                upper[j] = folded[j].upper(split[j], FAR);
                bits += split[j].small();
            }
            for u in upper {
                counts[(u & FAR) as usize] += 1;
            }
            lower += u64::from(bits);
        }
        // What the sample lacks is coded as what is too large.
        let last = counts.iter().rposition(|&n| n > 0).unwrap_or(0);
        counts[..=last].iter_mut().for_each(|n| *n = (*n).max(1));
        counts[(last + 1).min(SYMBOLS - 1)] += 1;
        let lengths = Lengths::new(&counts);
        let upper: u64 = (0..SYMBOLS).map(|s| u64::from(counts[s] * lengths.of(s))).sum();
        let far = f64::from(counts[lengths.last() as usize]) * 8.0 * W::BYTES as f64;
        let bits = ((upper + lower) as f64 + far + 2.0 * seen as f64) * live as f64 / seen.max(1) as f64;
        Plan { lengths, bits: bits + self.scratch.changed.len() as f64 / 4.0 }
    }
}

/// A code for the changes that [`scan`] has counted.
pub fn plan<W: Word>(
    level: Level,
    old: &[u8],
    new: &[u8],
    dtype: Dtype,
    changes: Changes,
    scratch: &Scratch,
) -> Plan {
    let form = Form::of(dtype);
    bits::run(level, &Sample::<W> { old, new, form, changes, scratch, word: std::marker::PhantomData })
}

struct Put<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    changes: Changes,
    plan: Plan,
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u8>,
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Kernel for Put<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<P: Pack>(self, pack: P) {
        let Put { old, new, form, changes, plan, scratch: kept, out, word } = self;
        let mut scratch = std::mem::take(kept);
        let blocks = scratch.changed.len();
        let last = plan.lengths.last();
        let room = |bytes: &mut Vec<u8>, len: usize| {
            if bytes.len() < len {
                bytes.resize(len, 0);
            }
        };
        room(&mut scratch.upper, blocks * BLOCK);
        room(&mut scratch.lower, blocks * BLOCK * W::BYTES + Writer::ROOM);
        scratch.scales.clear();
        scratch.far.clear();
        scratch.steps.clear();
        let mut lower = std::mem::take(&mut scratch.lower);
        let mut writer = Writer::new(&mut lower);
        let mut live = 0;
        let mut before = 0u16;
        let sample = Sample::<W> { old, new, form, changes, scratch: &Scratch::default(), word };
        for i in 0..blocks {
            if scratch.changed[i] == 0 {
                scratch.scales.push(0);
                continue;
            }
            let (folded, split, scale) = sample.block(i);
            let step = scale.wrapping_sub(before).cast_signed();
            let step = ((step << 1) ^ (step >> 15)).cast_unsigned();
            before = scale;
            if step < u16::from(FAR) - 1 {
                scratch.scales.push(step as u8 + 1);
            } else {
                scratch.scales.push(FAR);
                scratch.steps.extend_from_slice(&scale.to_le_bytes());
            }
            let mut masks = [W::default(); BLOCK];
            let upper: &mut [u8; BLOCK] =
                (&mut scratch.upper[live * BLOCK..(live + 1) * BLOCK]).try_into().expect("a block");
            let mut any = false;
            for j in 0..BLOCK {
                upper[j] = folded[j].upper(split[j], last);
                masks[j] = split[j].ones();
                any |= upper[j] == last;
            }
            for j in (0..BLOCK).step_by(8 / W::BYTES) {
                let mask = W::joined(&masks[j..j + 8 / W::BYTES]);
                writer.put(pack.gather(W::joined(&folded[j..j + 8 / W::BYTES]), mask), mask.count_ones());
            }
            if any {
                for j in 0..BLOCK {
                    if upper[j] == last {
                        let at = scratch.far.len();
                        scratch.far.resize(at + W::BYTES, 0);
                        folded[j].write(&mut scratch.far[at..]);
                    }
                }
            }
            live += 1;
        }
        out.push(changes.zeros as u8);
        let mut counts = [0u32; SYMBOLS];
        scratch.scales.iter().for_each(|&s| counts[s as usize] += 1);
        prefix::put(pack, &Lengths::new(&counts), &scratch.scales, &mut scratch.lane, out);
        out.extend_from_slice(&scratch.steps);
        prefix::put(pack, &plan.lengths, &scratch.upper[..live * BLOCK], &mut scratch.lane, out);
        let len = writer.len();
        out.extend_from_slice(&(len as u32).to_le_bytes());
        out.extend_from_slice(&lower[..len]);
        out.extend_from_slice(&scratch.far);
        scratch.lower = lower;
        *kept = scratch;
    }
}

/// Appends a chunk's distances, as [`scan`] and [`plan`] have found them.
#[allow(clippy::too_many_arguments)]
pub fn put<W: Word>(
    level: Level,
    old: &[u8],
    new: &[u8],
    dtype: Dtype,
    changes: Changes,
    plan: Plan,
    scratch: &mut Scratch,
    out: &mut Vec<u8>,
) {
    let (form, word) = (Form::of(dtype), std::marker::PhantomData);
    bits::run(level, Put::<W> { old, new, form, changes, plan, scratch, out, word });
}

struct Take<'a, W> {
    stored: &'a [u8],
    old: &'a [u8],
    new: &'a mut [u8],
    form: Form,
    scratch: &'a mut Scratch,
    word: std::marker::PhantomData<W>,
}

impl<W: Word> Kernel for Take<'_, W> {
    type Output = Option<()>;

    #[inline(always)]
    fn run<P: Pack>(self, pack: P) -> Option<()> {
        let Take { stored, old, new, form, scratch, .. } = self;
        let blocks = new.len().div_ceil(BLOCK * W::BYTES);
        let (&zeros, mut rest) = stored.split_first()?;
        let zeros = u32::from(zeros);
        if zeros >= 8 * W::BYTES as u32 {
            return None;
        }
        scratch.scales.resize(blocks, 0);
        prefix::take(&mut rest, &mut scratch.scales).ok()?;
        let live = scratch.scales.iter().filter(|&&s| s > 0).count();
        let far = scratch.scales.iter().filter(|&&s| s == FAR).count();
        let (mut steps, mut rest) = rest.split_at_checked(2 * far)?;
        if scratch.upper.len() < live * BLOCK {
            scratch.upper.resize(live * BLOCK, 0);
        }
        let last = prefix::take(&mut rest, &mut scratch.upper[..live * BLOCK]).ok()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let (lower, mut far) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        let mut bit = 0;
        let mut before = 0u16;
        let mut uppers = scratch.upper.as_chunks::<BLOCK>().0.iter();
        for (i, &scale) in scratch.scales.iter().enumerate() {
            let start = i * BLOCK * W::BYTES;
            let end = (start + BLOCK * W::BYTES).min(new.len());
            if scale == 0 {
                new[start..end].copy_from_slice(&old[start..end]);
                continue;
            }
            before = if scale == FAR {
                let (scale, after) = steps.split_first_chunk::<2>()?;
                steps = after;
                u16::from_le_bytes(*scale)
            } else {
                let step = u16::from(scale - 1);
                before.wrapping_add((step >> 1) ^ (step & 1).wrapping_neg())
            };
            let old = block::<W>(old, i);
            let (mut split, mut masks) = ([W::default(); BLOCK], [W::default(); BLOCK]);
            for j in 0..BLOCK {
                split[j] = old[j].field(form.from, form.mask).below(before);
                masks[j] = split[j].ones();
            }
            let mut lowers = [W::default(); BLOCK];
            for j in (0..BLOCK).step_by(8 / W::BYTES) {
                let mask = W::joined(&masks[j..j + 8 / W::BYTES]);
                W::parted(pack.scatter(bits::read(lower, bit), mask), &mut lowers[j..j + 8 / W::BYTES]);
                bit += mask.count_ones() as usize;
            }
            let upper = uppers.next()?;
            let mut any = false;
            let mut folded = [W::default(); BLOCK];
            for j in 0..BLOCK {
                folded[j] = W::whole(upper[j], split[j], lowers[j]);
                any |= upper[j] == last;
            }
            if any {
                for j in 0..BLOCK {
                    if upper[j] == last {
                        let (word, after) = far.split_at_checked(W::BYTES)?;
                        folded[j] = W::read(word);
                        far = after;
                    }
                }
            }
            let mut out = [W::default(); BLOCK];
            for j in 0..BLOCK {
                out[j] = W::climbed(folded[j], zeros, old[j], form.float);
            }
            let new = &mut new[start..end];
            if new.len() == BLOCK * W::BYTES {
                for j in 0..BLOCK {
                    out[j].write(&mut new[j * W::BYTES..(j + 1) * W::BYTES]);
                }
            } else {
                new.chunks_exact_mut(W::BYTES).zip(out).for_each(|(new, out)| out.write(new));
            }
        }
        (far.is_empty() && bit.div_ceil(8) == lower.len()).then_some(())
    }
}

/// Restores a chunk from all of what [`put`] has appended.
///
/// # Errors
/// An artifact error for anything that [`put`] does not write.
pub fn take<W: Word>(
    level: Level,
    stored: &[u8],
    old: &[u8],
    dtype: Dtype,
    new: &mut [u8],
    scratch: &mut Scratch,
) -> Result<()> {
    let (form, word) = (Form::of(dtype), std::marker::PhantomData);
    bits::run(level, Take::<W> { stored, old, new, form, scratch, word })
        .ok_or_else(|| Error::artifact("a chunk of distances is malformed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look random, and are the same on every machine.
    fn noise(mut state: u64, len: usize) -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    fn check<W: Word>(dtype: Dtype, count: usize) {
        let old = noise(1, count * W::BYTES);
        let near = |few: usize, bits: u8| {
            let mut new = old.clone();
            let changes = noise(2, count);
            for (i, word) in new.chunks_mut(W::BYTES).enumerate().filter(|(i, _)| i / few % few == 0) {
                word[0] ^= changes[i] >> (8 - bits);
            }
            new
        };
        let mut coarse = old.clone();
        coarse.chunks_mut(W::BYTES).for_each(|word| word[W::BYTES - 1] ^= 1);
        for new in [near(1, 2), near(7, 1), near(200, 8), noise(3, old.len()), old.clone(), coarse] {
            let mut written = Vec::new();
            for level in Level::available() {
                let (mut scratch, mut out) = (Scratch::default(), Vec::new());
                let changes = scan::<W>(level, &old, &new, dtype, &mut scratch);
                let differ = old.chunks(W::BYTES).zip(new.chunks(W::BYTES)).filter(|(a, b)| a != b).count();
                assert_eq!(changes.count, differ);
                let plan = plan::<W>(level, &old, &new, dtype, changes, &scratch);
                put::<W>(level, &old, &new, dtype, changes, plan, &mut scratch, &mut out);
                let mut back = noise(4, old.len());
                take::<W>(level, &out, &old, dtype, &mut back, &mut scratch).unwrap();
                assert!(back == new, "{level:?} {} {count}", dtype.name());
                for cut in [0, 1, 20, out.len() / 2, out.len() - 1] {
                    let cut = &out[..cut.min(out.len() - 1)];
                    assert!(take::<W>(level, cut, &old, dtype, &mut back, &mut scratch).is_err());
                }
                written.push(out);
            }
            assert!(written.windows(2).all(|w| w[0] == w[1]), "{} {count}", dtype.name());
        }
    }

    #[test]
    fn distances_come_back_and_every_instruction_set_writes_the_same() {
        for count in [1, 63, 64, 1000, 70_001] {
            check::<u8>(Dtype::F8_E4M3, count);
            check::<u8>(Dtype::U8, count);
            check::<u16>(Dtype::BF16, count);
            check::<u16>(Dtype::F16, count);
            check::<u32>(Dtype::F32, count);
            check::<u32>(Dtype::I32, count);
            check::<u64>(Dtype::F64, count);
        }
    }
}
