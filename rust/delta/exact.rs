//! A tensor's bytes as differences from those of its base, in chunks that any thread can take, without loss.
//!
//! One part, `data`: a head of five bytes for each chunk of [`CHUNK`] elements (its kind, its bytes as u32), then
//! the chunks. Each is coded in whichever of the ways below takes the fewest bytes.

use super::entry::Method;
use super::plane::{Coder, bits};
use super::word::{Against, Word, is_float};
use crate::artifact::{ArtifactFile, Entry};
use crate::error::{Error, Result};
use crate::tensor::Dtype;
use rayon::prelude::*;
use std::borrow::Cow;

/// Elements that are coded together: few enough for a core's cache, enough for their own statistics.
pub const CHUNK: usize = 1 << 17;

/// Chunks that a thread takes together, for making what it needs takes time.
const AT_ONCE: usize = 4;

/// Bytes of a chunk's head.
const HEAD: usize = 5;

/// How a chunk is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Nothing changed, nothing is stored.
    Same = 0,
    /// The elements that changed: gaps between them, then planes of their distances.
    Sparse = 1,
    /// Planes of the distances of all elements, the lowest bytes first.
    Distance = 2,
    /// Planes of the bits in which elements differ.
    Bits = 3,
    /// Planes of the elements themselves.
    Alone = 4,
    /// The elements themselves.
    Raw = 5,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 6] = [Kind::Same, Kind::Sparse, Kind::Distance, Kind::Bits, Kind::Alone, Kind::Raw];

    /// The name shown to people.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Same => "same",
            Kind::Sparse => "sparse",
            Kind::Distance => "distances",
            Kind::Bits => "bits",
            Kind::Alone => "alone",
            Kind::Raw => "raw",
        }
    }
}

/// A tensor's differences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The part `data`.
    pub data: Vec<u8>,
    /// Elements that are not as in the base; those beyond its end among them.
    pub changed: u64,
}

/// Codes `new` against `old`, which may be shorter or longer: elements beyond its end stand alone.
pub fn encode(old: &[u8], new: &[u8], dtype: Dtype) -> Result<Encoded> {
    match dtype.size() {
        1 => encode_words::<u8>(old, new, dtype),
        2 => encode_words::<u16>(old, new, dtype),
        4 => encode_words::<u32>(old, new, dtype),
        _ => encode_words::<u64>(old, new, dtype),
    }
}

/// Restores into `new` what [`encode`] has coded against the same `old`.
///
/// # Errors
/// An artifact error for anything that [`encode`] does not write.
pub fn decode(data: &[u8], old: &[u8], dtype: Dtype, new: &mut [u8]) -> Result<()> {
    match dtype.size() {
        1 => decode_words::<u8>(data, old, dtype, new),
        2 => decode_words::<u16>(data, old, dtype, new),
        4 => decode_words::<u32>(data, old, dtype, new),
        _ => decode_words::<u64>(data, old, dtype, new),
    }
}

/// How the chunks of an entry of a delta are coded: kinds, chunks of each, and their bytes.
///
/// # Errors
/// An artifact error for a damaged entry.
pub fn chunk_kinds(file: &ArtifactFile, entry: &Entry) -> Result<Vec<(&'static str, u64, u64)>> {
    let Some(Method::Exact) = Method::of(entry)? else { return Ok(Vec::new()) };
    let part = entry.parts.get("data").ok_or_else(|| Error::artifact("the part data is missing"))?;
    let chunks =
        chunks(file.checked_part(part, &format!("tensor {:?}, data", entry.name))?, entry.elements())?;
    let all = Kind::ALL.into_iter().map(|kind| {
        let of_kind = chunks.iter().filter(|(k, _)| *k == kind);
        (kind.name(), of_kind.clone().count() as u64, of_kind.map(|(_, c)| c.len() as u64).sum())
    });
    Ok(all.filter(|(_, n, _)| *n > 0).collect())
}

/// Kind and bytes of every chunk of a tensor of that many elements.
///
/// # Errors
/// An artifact error for heads that cannot be.
pub fn chunks(data: &[u8], elements: u64) -> Result<Vec<(Kind, &[u8])>> {
    let malformed = || Error::artifact("the chunks of differences do not fit the tensor");
    let count = usize::try_from(elements.div_ceil(CHUNK as u64)).map_err(|_| malformed())?;
    let (heads, mut rest) =
        count.checked_mul(HEAD).and_then(|n| data.split_at_checked(n)).ok_or_else(malformed)?;
    let mut chunks = Vec::with_capacity(count);
    for head in heads.as_chunks::<HEAD>().0 {
        let kind = Kind::ALL.get(head[0] as usize).ok_or_else(malformed)?;
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let (chunk, after) = rest.split_at_checked(len).ok_or_else(malformed)?;
        chunks.push((*kind, chunk));
        rest = after;
    }
    if rest.is_empty() { Ok(chunks) } else { Err(malformed()) }
}

fn encode_words<W: Word>(old: &[u8], new: &[u8], dtype: Dtype) -> Result<Encoded> {
    let bytes = CHUNK * W::BYTES;
    let coded: Vec<Result<(Kind, Vec<u8>, u64)>> = new
        .par_chunks(bytes)
        .enumerate()
        .with_min_len(AT_ONCE)
        .map_init(Scratch::<W>::new, |scratch, (i, new)| {
            let scratch = scratch.as_mut().map_err(|e| e.clone())?;
            Ok(scratch.encode(&piece(old, i * bytes, new.len()), new, is_float(dtype)))
        })
        .collect();
    let coded = coded.into_iter().collect::<Result<Vec<_>>>()?;
    let mut out = Encoded::default();
    for (kind, chunk, changed) in &coded {
        out.data.push(*kind as u8);
        out.data.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        out.changed += changed;
    }
    coded.iter().for_each(|(_, chunk, _)| out.data.extend_from_slice(chunk));
    Ok(out)
}

fn decode_words<W: Word>(data: &[u8], old: &[u8], dtype: Dtype, new: &mut [u8]) -> Result<()> {
    let bytes = CHUNK * W::BYTES;
    let chunks = chunks(data, (new.len() / W::BYTES) as u64)?;
    let done: Vec<Result<()>> = new
        .par_chunks_mut(bytes)
        .zip(chunks)
        .enumerate()
        .with_min_len(AT_ONCE)
        .map_init(Scratch::<W>::new, |scratch, (i, (new, (kind, chunk)))| {
            let scratch = scratch.as_mut().map_err(|e| e.clone())?;
            scratch.decode(kind, chunk, &piece(old, i * bytes, new.len()), new, is_float(dtype))
        })
        .collect();
    done.into_iter().collect()
}

/// Bytes `start .. start + len` of the base, with zeros beyond its end; nothing at all where it has none there.
fn piece(old: &[u8], start: usize, len: usize) -> Cow<'_, [u8]> {
    let there = old.get(start..).unwrap_or_default();
    match there.get(..len) {
        Some(all) => Cow::Borrowed(all),
        None if there.is_empty() => Cow::Borrowed(&[]),
        None => {
            let mut padded = there.to_vec();
            padded.resize(len, 0);
            Cow::Owned(padded)
        }
    }
}

/// What one thread needs.
struct Scratch<W> {
    coder: Coder,
    words: Vec<W>,
    plane: Vec<u8>,
}

impl<W: Word> Scratch<W> {
    fn new() -> Result<Self> {
        Ok(Scratch { coder: Coder::new()?, words: Vec::new(), plane: Vec::new() })
    }

    fn encode(&mut self, old: &[u8], new: &[u8], float: bool) -> (Kind, Vec<u8>, u64) {
        let count = new.len() / W::BYTES;
        if old == new {
            return (Kind::Same, Vec::new(), 0);
        }
        let kind = if old.is_empty() { Kind::Alone } else { best(sample::<W>(old, new, float)) };
        let mut out = Vec::new();
        self.differences(kind, old, new, float);
        let changed = match kind {
            Kind::Alone if old.is_empty() => count,
            Kind::Alone => {
                let pairs = words::<W>(old).zip(words::<W>(new));
                pairs.map(|(old, new)| usize::from(old != new)).sum()
            }
            _ => self.words.chunks(COUNTED).map(|words| usize::from(nonzero(words))).sum(),
        };
        self.put_planes(&mut out);
        let mut chosen = (kind, out);
        // Gaps cost a few bits each, and zeros next to nothing: with more changes, planes are smaller.
        if changed * 8 < count {
            let sparse = self.sparse(old, new, float);
            if sparse.len() < chosen.1.len() {
                chosen = (Kind::Sparse, sparse);
            }
        }
        if chosen.1.len() >= new.len() {
            chosen = (Kind::Raw, new.to_vec());
        }
        (chosen.0, chosen.1, changed as u64)
    }

    fn decode(
        &mut self,
        kind: Kind,
        mut chunk: &[u8],
        old: &[u8],
        new: &mut [u8],
        float: bool,
    ) -> Result<()> {
        let malformed = || Error::artifact(format!("a chunk of kind {} is malformed", kind.name()));
        if old.is_empty() && matches!(kind, Kind::Same | Kind::Sparse | Kind::Distance | Kind::Bits) {
            return Err(malformed());
        }
        match kind {
            Kind::Same => new.copy_from_slice(old),
            Kind::Raw if chunk.len() == new.len() => {
                new.copy_from_slice(chunk);
                chunk = &[];
            }
            Kind::Raw => return Err(malformed()),
            Kind::Sparse => {
                new.copy_from_slice(old);
                self.take_sparse(&mut chunk, new, float)?;
            }
            Kind::Distance | Kind::Bits | Kind::Alone => {
                self.take_planes(&mut chunk, new.len() / W::BYTES)?;
                let words = new.chunks_exact_mut(W::BYTES).zip(&self.words);
                match kind {
                    Kind::Alone => words.for_each(|(new, word)| word.write(new)),
                    Kind::Distance if float => {
                        words.zip(old.chunks_exact(W::BYTES)).for_each(|((new, d), old)| {
                            W::restore(*d, W::read(old), Against::Distance, true).write(new);
                        })
                    }
                    Kind::Distance => words.zip(old.chunks_exact(W::BYTES)).for_each(|((new, d), old)| {
                        W::restore(*d, W::read(old), Against::Distance, false).write(new);
                    }),
                    _ => words.zip(old.chunks_exact(W::BYTES)).for_each(|((new, d), old)| {
                        W::restore(*d, W::read(old), Against::Bits, float).write(new);
                    }),
                }
            }
        }
        if chunk.is_empty() { Ok(()) } else { Err(malformed()) }
    }

    /// Fills the words with differences of that kind.
    fn differences(&mut self, kind: Kind, old: &[u8], new: &[u8], float: bool) {
        self.words.clear();
        let new = words::<W>(new);
        let pairs = new.clone().zip(words::<W>(old));
        match kind {
            // Two loops, so that neither asks in each round which it is.
            Kind::Distance if float => {
                self.words.extend(pairs.map(|(n, o)| W::difference(n, o, Against::Distance, true)));
            }
            Kind::Distance => {
                self.words.extend(pairs.map(|(n, o)| W::difference(n, o, Against::Distance, false)));
            }
            Kind::Bits => self.words.extend(pairs.map(|(n, o)| W::difference(n, o, Against::Bits, float))),
            _ => self.words.extend(new),
        }
    }

    fn put_planes(&mut self, out: &mut Vec<u8>) {
        for i in 0..W::BYTES {
            self.plane.clear();
            self.plane.extend(self.words.iter().map(|w| w.byte(i)));
            self.coder.put(&self.plane, out);
        }
    }

    fn take_planes(&mut self, stored: &mut &[u8], count: usize) -> Result<()> {
        self.words.clear();
        self.words.resize(count, W::default());
        self.plane.resize(count, 0);
        for i in 0..W::BYTES {
            self.coder.take(stored, &mut self.plane)?;
            for (word, byte) in self.words.iter_mut().zip(&self.plane) {
                *word = word.or(W::of_byte(*byte, i));
            }
        }
        Ok(())
    }

    /// Bytes of gaps as u32, how many elements changed as u32, the gaps as LEB128, then planes of distances.
    fn sparse(&mut self, old: &[u8], new: &[u8], float: bool) -> Vec<u8> {
        self.words.clear();
        let mut gaps = Vec::new();
        let mut gap = 0usize;
        for (old, new) in old.chunks_exact(W::BYTES).zip(new.chunks_exact(W::BYTES)) {
            if old == new {
                gap += 1;
                continue;
            }
            while gap >= 128 {
                gaps.push(gap as u8 | 128);
                gap >>= 7;
            }
            gaps.push(gap as u8);
            gap = 0;
            self.words.push(W::difference(W::read(new), W::read(old), Against::Distance, float));
        }
        let mut out = Vec::new();
        out.extend_from_slice(&(gaps.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.words.len() as u32).to_le_bytes());
        self.coder.put(&gaps, &mut out);
        self.put_planes(&mut out);
        out
    }

    fn take_sparse(&mut self, stored: &mut &[u8], new: &mut [u8], float: bool) -> Result<()> {
        let malformed = || Error::artifact("a chunk of kind sparse is malformed");
        let mut number = || {
            let (bytes, rest) = stored.split_first_chunk::<4>().ok_or_else(malformed)?;
            *stored = rest;
            Ok(u32::from_le_bytes(*bytes) as usize)
        };
        let (gap_bytes, count) = (number()?, number()?);
        if count > new.len() / W::BYTES || gap_bytes > 5 * count {
            return Err(malformed());
        }
        let mut gaps = vec![0; gap_bytes];
        self.coder.take(stored, &mut gaps)?;
        self.take_planes(stored, count)?;
        let mut elements = new.chunks_exact_mut(W::BYTES);
        let mut gaps = gaps.into_iter();
        for word in &self.words {
            let (mut gap, mut shift) = (0usize, 0);
            loop {
                let byte = gaps.next().filter(|_| shift < 28).ok_or_else(malformed)?;
                gap |= usize::from(byte & 127) << shift;
                shift += 7;
                if byte < 128 {
                    break;
                }
            }
            let element = elements.nth(gap).ok_or_else(malformed)?;
            W::restore(*word, W::read(element), Against::Distance, float).write(element);
        }
        if gaps.next().is_none() { Ok(()) } else { Err(malformed()) }
    }
}

/// Words that are counted in 16 bits, of which a register holds many.
const COUNTED: usize = 1 << 12;

/// How many of at most [`COUNTED`] words are not zero.
fn nonzero<W: Word>(words: &[W]) -> u16 {
    words.iter().map(|d| u16::from(*d != W::default())).sum()
}

/// A tensor's bytes as words.
fn words<W: Word>(bytes: &[u8]) -> impl ExactSizeIterator<Item = W> + Clone {
    bytes.chunks_exact(W::BYTES).map(W::read)
}

/// Bits per element of distances, differing bits, and elements alone, each byte coded by itself, from a sample.
fn sample<W: Word>(old: &[u8], new: &[u8], float: bool) -> [f64; 3] {
    /// Elements that follow one another, and how many such runs there are at most.
    const RUN: usize = 64;
    const RUNS: usize = 64;
    let count = new.len() / W::BYTES;
    let step = (count / RUNS).max(RUN);
    let mut counts = vec![[[0u32; 256]; 3]; W::BYTES];
    let mut total = 0;
    for start in (0..count).step_by(step) {
        for i in start..(start + RUN).min(count) {
            let at = i * W::BYTES..(i + 1) * W::BYTES;
            let (o, n) = (W::read(&old[at.clone()]), W::read(&new[at]));
            let ways =
                [W::difference(n, o, Against::Distance, float), W::difference(n, o, Against::Bits, float), n];
            for (b, counts) in counts.iter_mut().enumerate() {
                for (way, counts) in ways.iter().zip(counts) {
                    counts[way.byte(b) as usize] += 1;
                }
            }
            total += 1;
        }
    }
    std::array::from_fn(|way| counts.iter().map(|counts| bits(&counts[way], total)).sum())
}

fn best([distance, differing, alone]: [f64; 3]) -> Kind {
    if distance <= differing && distance <= alone {
        Kind::Distance
    } else if differing <= alone {
        Kind::Bits
    } else {
        Kind::Alone
    }
}
