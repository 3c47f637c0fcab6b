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
use std::marker::PhantomData;

/// Elements that have one scale.
pub const BLOCK: usize = 64;

/// Blocks of which one is looked at to find the prefix code.
const SAMPLED: usize = 16;

/// The most lower bits of an element where hardly any needs more: those of eight elements are packed at once.
const NARROW: u8 = 7;

/// What is added to the mean of the changes' logarithms, in sixteenths: measured on fine-tunes.
const ABOVE_MEAN: u32 = 8;

/// Where at most one element in so many would need more, all have at most [`NARROW`] lower bits.
const FEW_WIDE: usize = 32;

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
    /// Numbers of blocks with changes.
    live: Vec<u32>,
    scales: Vec<u8>,
    upper: Vec<u8>,
    lower: Vec<u8>,
    lane: Vec<u8>,
    far: Vec<u8>,
}

/// What changed in a chunk.
#[derive(Clone, Copy, Debug)]
pub struct Changes {
    /// Elements that are not the base's.
    pub count: usize,
    /// Zeros at the end of all distances.
    zeros: u32,
}

/// Bytes in whole blocks, zeros beyond the end.
struct Blocks<'a, W> {
    bytes: &'a [u8],
    last: [u8; BLOCK * 8],
    word: PhantomData<W>,
}

impl<'a, W: Word> Blocks<'a, W> {
    const SIZE: usize = BLOCK * W::BYTES;

    fn new(bytes: &'a [u8]) -> Self {
        let mut last = [0; BLOCK * 8];
        let rest = &bytes[bytes.len() / Self::SIZE * Self::SIZE..];
        last[..rest.len()].copy_from_slice(rest);
        Blocks { bytes, last, word: PhantomData }
    }

    fn count(&self) -> usize {
        self.bytes.len().div_ceil(Self::SIZE)
    }

    #[inline(always)]
    fn get(&self, i: usize) -> Block<'_, W> {
        let start = i * Self::SIZE;
        Block(self.bytes.get(start..start + Self::SIZE).unwrap_or(&self.last[..Self::SIZE]), PhantomData)
    }
}

/// The bytes of [`BLOCK`] elements.
#[derive(Clone, Copy)]
struct Block<'a, W>(&'a [u8], PhantomData<W>);

impl<W: Word> Block<'_, W> {
    #[inline(always)]
    fn word(&self, i: usize) -> W {
        assert!(i < BLOCK);
        // SAFETY: `Blocks::get`, which alone makes blocks, gives them the bytes of that many integers.
        unsafe { self.0.as_ptr().cast::<W>().add(i).read_unaligned() }.little_endian()
    }
}

/// Blocks that go through each step together. Between two steps they lie in memory: the compiler would otherwise take
/// vectors apart to hand over their elements.
const STRIP: usize = 16;

/// What is known of a strip's blocks.
#[repr(align(64))]
struct Strip<W> {
    folded: [[W; BLOCK]; STRIP],
    /// Exponents at first, then how many lower bits there are, then as many ones.
    split: [[W; BLOCK]; STRIP],
    /// Lower bits and their masks where these are narrow.
    lower: [[u8; BLOCK]; STRIP],
    masks: [[u8; BLOCK]; STRIP],
}

impl<W: Word> Strip<W> {
    fn new() -> Self {
        Strip {
            folded: [[W::default(); BLOCK]; STRIP],
            split: [[W::default(); BLOCK]; STRIP],
            lower: [[0; BLOCK]; STRIP],
            masks: [[0; BLOCK]; STRIP],
        }
    }
}

/// Distances and exponents of a block; returns the scale of its changes.
#[inline(always)]
fn measure<W: Word>(
    old: Block<'_, W>,
    new: Block<'_, W>,
    form: Form,
    zeros: u32,
    folded: &mut [W; BLOCK],
    exponents: &mut [W; BLOCK],
) -> u16 {
    for i in 0..BLOCK {
        folded[i] = W::folded(W::climb(new.word(i), old.word(i), form.float), zeros);
        exponents[i] = old.word(i).field(form.from, form.mask);
    }
    let (mut sum, mut count) = (0u32, 0u32);
    for i in 0..BLOCK {
        let magnitude = folded[i].magnitude();
        let counts = u32::from(magnitude > 0);
        sum += (magnitude + exponents[i].small()) * counts;
        count += counts;
    }
    ((((sum - 127 * count) * 16).checked_div(count).unwrap_or(0) + ABOVE_MEAN) >> 4) as u16
}

/// Appends the bits of a block that are under the masks.
#[inline(always)]
fn put_lower<W: Word, P: Pack>(pack: P, words: &[W; BLOCK], masks: &[W; BLOCK], writer: &mut Writer<'_>) {
    for i in 0..BLOCK * W::BYTES / 8 {
        // SAFETY: the arrays have `BLOCK * W::BYTES` bytes.
        let (word, mask) = unsafe {
            let eight = |array: &[W; BLOCK]| array.as_ptr().cast::<u64>().add(i).read_unaligned();
            (u64::from_le(eight(words)), u64::from_le(eight(masks)))
        };
        writer.put(pack.gather(word, mask), mask.count_ones());
    }
}

/// Takes what [`put_lower`] has appended, from `bit` on.
#[inline(always)]
fn take_lower<W: Word, P: Pack>(
    pack: P,
    stored: &[u8],
    bit: &mut usize,
    masks: &[W; BLOCK],
    words: &mut [W; BLOCK],
) {
    for i in 0..BLOCK * W::BYTES / 8 {
        // SAFETY: the arrays have `BLOCK * W::BYTES` bytes, and any bits are integers.
        unsafe {
            let mask = u64::from_le(masks.as_ptr().cast::<u64>().add(i).read_unaligned());
            let word = pack.scatter(bits::read(stored, *bit), mask).to_le();
            words.as_mut_ptr().cast::<u64>().add(i).write_unaligned(word);
            *bit += mask.count_ones() as usize;
        }
    }
}

struct Scan<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    scratch: &'a mut Scratch,
    word: PhantomData<W>,
}

impl<W: Word> Kernel for Scan<'_, W> {
    type Output = Changes;

    #[inline(always)]
    fn run<P: Pack>(self, _: P) -> Changes {
        let (olds, news) = (Blocks::<W>::new(self.old), Blocks::<W>::new(self.new));
        self.scratch.changed.clear();
        let (mut count, mut all) = (0, W::default());
        for i in 0..news.count() {
            let (old, new) = (olds.get(i), news.get(i));
            let mut changed = 0u8;
            for j in 0..BLOCK {
                let steps = W::climb(new.word(j), old.word(j), self.form.float);
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
    bits::run(level, Scan::<W> { old, new, form: Form::of(dtype), scratch, word: PhantomData })
}

/// A prefix code, and what it would cost.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    lengths: Lengths,
    /// The most lower bits of an element.
    most: u8,
    /// Bits for all elements of the chunk.
    pub bits: f64,
}

struct Sample<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    changes: Changes,
    scratch: &'a Scratch,
    word: PhantomData<W>,
}

impl<W: Word> Kernel for Sample<'_, W> {
    type Output = Plan;

    #[inline(always)]
    fn run<P: Pack>(self, _: P) -> Plan {
        let mut counts = [0u32; SYMBOLS];
        let (mut live, mut seen, mut lower, mut wide) = (0usize, 0usize, 0u64, 0usize);
        let mut quarters = [[0u32; SYMBOLS]; 4];
        let (olds, news) = (Blocks::<W>::new(self.old), Blocks::<W>::new(self.new));
        let mut strip = Strip::<W>::new();
        let mut upper = [0u8; BLOCK];
        for i in 0..self.scratch.changed.len() {
            if self.scratch.changed[i] == 0 {
                continue;
            }
            live += 1;
            // The first of every eight, so that a single one is looked at too.
            if live % SAMPLED != 1 {
                continue;
            }
            seen += 1;
            let (folded, split) = (&mut strip.folded[0], &mut strip.split[0]);
            let scale = measure(olds.get(i), news.get(i), self.form, self.changes.zeros, folded, split);
            let mut bits = 0;
            for j in 0..BLOCK {
                let split = split[j].below(scale, W::SPLIT as u8);
                upper[j] = folded[j].upper(split, FAR);
                bits += split.small();
                wide += usize::from(split.small() > u32::from(NARROW));
            }
            // Four counts of each, for to add to one waits for what was added before.
            for j in 0..BLOCK {
                quarters[j % 4][usize::from(upper[j] & FAR)] += 1;
            }
            lower += u64::from(bits);
        }
        quarters.iter().for_each(|quarter| counts.iter_mut().zip(quarter).for_each(|(n, more)| *n += more));
        // What the sample lacks is coded as what is too large.
        let last = counts.iter().rposition(|&n| n > 0).unwrap_or(0);
        counts[..=last].iter_mut().for_each(|n| *n = (*n).max(1));
        counts[(last + 1).min(SYMBOLS - 1)] += 1;
        let lengths = Lengths::new(&counts);
        let upper: u64 = (0..SYMBOLS).map(|s| u64::from(counts[s] * lengths.of(s))).sum();
        let far = f64::from(counts[lengths.last() as usize]) * 8.0 * W::BYTES as f64;
        let bits = ((upper + lower) as f64 + far + 2.0 * seen as f64) * live as f64 / seen.max(1) as f64;
        let most = if wide * FEW_WIDE <= seen * BLOCK { NARROW.min(W::SPLIT as u8) } else { W::SPLIT as u8 };
        Plan { lengths, most, bits: bits + self.scratch.changed.len() as f64 / 4.0 }
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
    bits::run(level, Sample::<W> { old, new, form, changes, scratch, word: PhantomData })
}

struct Put<'a, W> {
    old: &'a [u8],
    new: &'a [u8],
    form: Form,
    changes: Changes,
    plan: Plan,
    scratch: &'a mut Scratch,
    out: &'a mut Vec<u8>,
    word: PhantomData<W>,
}

impl<W: Word> Kernel for Put<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<P: Pack>(self, pack: P) {
        let Put { old, new, form, changes, plan, scratch: kept, out, .. } = self;
        let mut scratch = std::mem::take(kept);
        let (olds, news) = (Blocks::<W>::new(old), Blocks::<W>::new(new));
        let last = plan.lengths.last();
        let room = |bytes: &mut Vec<u8>, len: usize| {
            if bytes.len() < len {
                bytes.resize(len, 0);
            }
        };
        room(&mut scratch.upper, news.count() * BLOCK);
        room(&mut scratch.lower, news.count() * BLOCK * W::BYTES + Writer::ROOM);
        scratch.far.clear();
        scratch.live.clear();
        for i in 0..scratch.changed.len() {
            if scratch.changed[i] > 0 {
                scratch.live.push(i as u32);
            }
        }
        let mut lower = std::mem::take(&mut scratch.lower);
        let mut writer = Writer::new(&mut lower);
        let uppers = scratch.upper.as_chunks_mut::<BLOCK>().0;
        let mut strip = Strip::<W>::new();
        let mut scales = Scales::default();
        for (live, uppers) in scratch.live.chunks(STRIP).zip(uppers.chunks_mut(STRIP)) {
            for (i, (folded, split)) in live.iter().zip(strip.folded.iter_mut().zip(&mut strip.split)) {
                let i = *i as usize;
                let scale = measure(olds.get(i), news.get(i), form, changes.zeros, folded, split);
                scales.push(i, scale);
                for j in 0..BLOCK {
                    split[j] = split[j].below(scale, plan.most);
                }
            }
            for (k, upper) in uppers.iter_mut().enumerate().take(live.len()) {
                let (folded, split) = (&strip.folded[k], &mut strip.split[k]);
                let mut largest = 0;
                for j in 0..BLOCK {
                    let up = folded[j].upper(split[j], last);
                    upper[j] = up;
                    largest = up.max(largest);
                    split[j] = split[j].ones();
                }
                if largest >= last {
                    for j in 0..BLOCK {
                        if upper[j] == last {
                            let at = scratch.far.len();
                            scratch.far.resize(at + W::BYTES, 0);
                            folded[j].write(&mut scratch.far[at..]);
                        }
                    }
                }
                let (lower, masks) = (&mut strip.lower[k], &mut strip.masks[k]);
                for j in 0..BLOCK {
                    lower[j] = folded[j].byte(0);
                    masks[j] = split[j].byte(0);
                }
            }
            for k in 0..live.len() {
                if plan.most <= NARROW {
                    put_lower(pack, &strip.lower[k], &strip.masks[k], &mut writer);
                } else {
                    put_lower(pack, &strip.folded[k], &strip.split[k], &mut writer);
                }
            }
        }
        let live = scratch.live.len();
        scales.end(news.count());
        out.extend_from_slice(&[changes.zeros as u8, plan.most]);
        let mut counts = [0u32; SYMBOLS];
        scales.symbols.iter().for_each(|&s| counts[s as usize] += 1);
        prefix::put(pack, &Lengths::new(&counts), &scales.symbols, &mut scratch.lane, out);
        out.extend_from_slice(&scales.far);
        prefix::put(pack, &plan.lengths, &scratch.upper[..live * BLOCK], &mut scratch.lane, out);
        let len = writer.len();
        out.extend_from_slice(&(len as u32).to_le_bytes());
        out.extend_from_slice(&lower[..len]);
        out.extend_from_slice(&scratch.far);
        scratch.lower = lower;
        *kept = scratch;
    }
}

/// The scales of all blocks, each as its step from the one before it.
#[derive(Default)]
struct Scales {
    /// 0 for a block that did not change.
    symbols: Vec<u8>,
    far: Vec<u8>,
    before: u16,
}

impl Scales {
    #[inline(always)]
    fn push(&mut self, block: usize, scale: u16) {
        self.symbols.resize(block, 0);
        let step = scale.wrapping_sub(self.before).cast_signed();
        let step = ((step << 1) ^ (step >> 15)).cast_unsigned();
        self.before = scale;
        if step < u16::from(FAR) - 1 {
            self.symbols.push(step as u8 + 1);
        } else {
            self.symbols.push(FAR);
            self.far.extend_from_slice(&scale.to_le_bytes());
        }
    }

    fn end(&mut self, blocks: usize) {
        self.symbols.resize(blocks, 0);
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
    let (form, word) = (Form::of(dtype), PhantomData);
    bits::run(level, Put::<W> { old, new, form, changes, plan, scratch, out, word });
}

struct Take<'a, W> {
    stored: &'a [u8],
    old: &'a [u8],
    new: &'a mut [u8],
    form: Form,
    scratch: &'a mut Scratch,
    word: PhantomData<W>,
}

impl<W: Word> Kernel for Take<'_, W> {
    type Output = Option<()>;

    #[inline(always)]
    fn run<P: Pack>(self, pack: P) -> Option<()> {
        let Take { stored, old, new, form, scratch, .. } = self;
        let olds = Blocks::<W>::new(&old[..new.len()]);
        let (&[zeros, most], mut rest) = stored.split_first_chunk()?;
        let zeros = u32::from(zeros);
        if zeros >= 8 * W::BYTES as u32 || u16::from(most) > W::SPLIT {
            return None;
        }
        scratch.scales.resize(olds.count(), 0);
        prefix::take(&mut rest, &mut scratch.scales).ok()?;
        scratch.live.clear();
        let mut far = 0;
        for i in 0..scratch.scales.len() {
            if scratch.scales[i] > 0 {
                scratch.live.push(i as u32);
            }
            far += usize::from(scratch.scales[i] == FAR);
        }
        let (mut steps, mut rest) = rest.split_at_checked(2 * far)?;
        let len = scratch.live.len() * BLOCK;
        if scratch.upper.len() < len {
            scratch.upper.resize(len, 0);
        }
        let last = prefix::take(&mut rest, &mut scratch.upper[..len]).ok()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let (lower, mut far) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        if scratch.live.len() < olds.count() {
            new.copy_from_slice(&old[..new.len()]);
        }
        let mut bit = 0;
        let mut before = 0u16;
        let mut strip = Strip::<W>::new();
        let uppers = scratch.upper.as_chunks::<BLOCK>().0;
        for (live, uppers) in scratch.live.chunks(STRIP).zip(uppers.chunks(STRIP)) {
            for (k, &i) in live.iter().enumerate() {
                let symbol = scratch.scales[i as usize];
                before = if symbol == FAR {
                    let (scale, after) = steps.split_first_chunk::<2>()?;
                    steps = after;
                    u16::from_le_bytes(*scale)
                } else {
                    let step = u16::from(symbol - 1);
                    before.wrapping_add((step >> 1) ^ (step & 1).wrapping_neg())
                };
                let old = olds.get(i as usize);
                let (split, masks) = (&mut strip.split[k], &mut strip.masks[k]);
                for j in 0..BLOCK {
                    let below = old.word(j).field(form.from, form.mask).below(before, most);
                    split[j] = below;
                    masks[j] = below.ones().byte(0);
                }
            }
            for k in 0..live.len() {
                if most <= NARROW {
                    take_lower(pack, lower, &mut bit, &strip.masks[k], &mut strip.lower[k]);
                } else {
                    let masks = strip.split[k].map(W::ones);
                    take_lower(pack, lower, &mut bit, &masks, &mut strip.folded[k]);
                }
            }
            for (k, (&i, upper)) in live.iter().zip(uppers).enumerate() {
                let (folded, split) = (&mut strip.folded[k], &strip.split[k]);
                if most <= NARROW {
                    let lower = &strip.lower[k];
                    for j in 0..BLOCK {
                        folded[j] = W::of_byte(lower[j], 0);
                    }
                }
                let mut largest = 0;
                for j in 0..BLOCK {
                    folded[j] = W::whole(upper[j], split[j], folded[j]);
                    largest = upper[j].max(largest);
                }
                if largest >= last {
                    for j in 0..BLOCK {
                        if upper[j] == last {
                            let (word, after) = far.split_at_checked(W::BYTES)?;
                            folded[j] = W::read(word);
                            far = after;
                        }
                    }
                }
                let old = olds.get(i as usize);
                for j in 0..BLOCK {
                    folded[j] = W::climbed(folded[j], zeros, old.word(j), form.float).little_endian();
                }
                let start = i as usize * BLOCK * W::BYTES;
                // SAFETY: the array has that many bytes, and any are bytes.
                let bytes =
                    unsafe { std::slice::from_raw_parts(folded.as_ptr().cast::<u8>(), BLOCK * W::BYTES) };
                match new.get_mut(start..start + BLOCK * W::BYTES) {
                    Some(new) => new.copy_from_slice(bytes),
                    None => {
                        let new = &mut new[start..];
                        new.copy_from_slice(&bytes[..new.len()]);
                    }
                }
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
    let (form, word) = (Form::of(dtype), PhantomData);
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
            for (i, word) in
                new.chunks_mut(W::BYTES).enumerate().filter(|(i, _)| (i / few).is_multiple_of(few))
            {
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
