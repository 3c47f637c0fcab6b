//! A tensor's bytes as differences from those of its base, in chunks that any thread can take, without loss.
//!
//! One part, `data`: a head of five bytes for each chunk of [`CHUNK`] elements (its kind, its bytes as u32), then
//! the chunks. Each is coded in whichever of the ways below takes the fewest bytes.

use super::entry::Method;
use super::plane::{Coder, bits};
use super::scaled;
use super::word::{Word, is_float};
use crate::artifact::{ArtifactFile, Entry};
use crate::codec::simd::Level;
use crate::error::{Error, Result};
use crate::pieces;
use crate::tensor::Dtype;
use rayon::prelude::*;
use std::borrow::Cow;
use std::cell::RefCell;

/// Elements that are coded together: few enough for a core's cache, enough for their own statistics.
pub const CHUNK: usize = 1 << 17;

/// Where fewer than one element in so many changed, gaps between changes are smallest.
const FEW: usize = 16;

/// Where fewer than one element in so many changed, gaps are worth a try.
const NOT_MANY: usize = 5;

/// Bytes of a chunk's heads and tables, about.
const SMALL: usize = 4096;

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
    /// The distances of all elements: [`scaled`].
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
    /// BLAKE3 of all elements.
    pub digest: [u8; 32],
}

/// Codes `new` against `old`, which may be shorter or longer: elements beyond its end stand alone.
///
/// # Errors
/// An I/O error where zstd cannot start.
pub fn encode(old: &[u8], new: &[u8], dtype: Dtype) -> Result<Encoded> {
    let bytes = CHUNK * dtype.size();
    let coded: Vec<Result<(Coded, [u8; 32])>> = new
        .par_chunks(bytes)
        .enumerate()
        .map(|(i, piece)| {
            let coded = encode_chunk(&base(old, i * bytes, piece.len()), piece, dtype)?;
            // The chunk is in the core's cache now.
            Ok((coded, pieces::hash(piece, i * bytes, new.len())))
        })
        .collect();
    let coded = coded.into_iter().collect::<Result<Vec<_>>>()?;
    let mut out = Encoded::default();
    out.data.reserve_exact(coded.iter().map(|(c, _)| HEAD + c.bytes.len()).sum());
    for (Coded { kind, bytes, changed }, _) in &coded {
        out.data.push(*kind as u8);
        out.data.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.changed += changed;
    }
    coded.iter().for_each(|(c, _)| out.data.extend_from_slice(&c.bytes));
    let hashes: Vec<[u8; 32]> = coded.iter().map(|(_, hash)| *hash).collect();
    out.digest = pieces::joined(&hashes, bytes);
    Ok(out)
}

/// Restores into `new` what [`encode`] has coded against the same `old`.
///
/// # Errors
/// An artifact error for anything that [`encode`] does not write.
pub fn decode(data: &[u8], old: &[u8], dtype: Dtype, new: &mut [u8]) -> Result<()> {
    let bytes = CHUNK * dtype.size();
    let chunks = chunks(data, (new.len() / dtype.size()) as u64)?;
    let done: Vec<Result<()>> = new
        .par_chunks_mut(bytes)
        .zip(chunks)
        .enumerate()
        .map(|(i, (new, (kind, chunk)))| {
            decode_chunk(kind, chunk, &base(old, i * bytes, new.len()), dtype, new)
        })
        .collect();
    done.into_iter().collect()
}

/// As [`decode`], but hands over each chunk with its place among `len` bytes while it is in a core's cache, in no
/// order, on any thread; returns BLAKE3 of all of it.
///
/// # Errors
/// As [`decode`]; the first that `each` returns.
pub fn decode_each(
    data: &[u8],
    old: &[u8],
    dtype: Dtype,
    len: usize,
    each: &(dyn Fn(usize, &[u8]) -> Result<()> + Sync),
) -> Result<[u8; 32]> {
    thread_local! {
        static ROOM: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    let bytes = CHUNK * dtype.size();
    let done: Vec<Result<[u8; 32]>> = chunks(data, (len / dtype.size()) as u64)?
        .into_par_iter()
        .enumerate()
        .map(|(i, (kind, chunk))| {
            ROOM.with_borrow_mut(|room| {
                let start = i * bytes;
                let here = bytes.min(len - start);
                if room.len() < here {
                    room.resize(here, 0);
                }
                let new = &mut room[..here];
                decode_chunk(kind, chunk, &base(old, start, here), dtype, new)?;
                each(start, new)?;
                Ok(pieces::hash(new, start, len))
            })
        })
        .collect();
    Ok(pieces::joined(&done.into_iter().collect::<Result<Vec<_>>>()?, bytes))
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

/// Bytes `start .. start + len` of the base, with zeros beyond its end; nothing at all where it has none there.
fn base(old: &[u8], start: usize, len: usize) -> Cow<'_, [u8]> {
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

/// A coded chunk.
struct Coded {
    kind: Kind,
    bytes: Vec<u8>,
    changed: u64,
}

/// What one thread needs, whatever it codes: it is dear to make.
struct Scratch {
    coder: Coder,
    plane: Vec<u8>,
    scaled: scaled::Scratch,
    level: Level,
}

fn with_scratch<T>(f: impl FnOnce(&mut Scratch) -> Result<T>) -> Result<T> {
    thread_local! {
        static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => scratch.insert(Scratch {
                coder: Coder::new()?,
                plane: Vec::new(),
                scaled: scaled::Scratch::default(),
                level: Level::detect(),
            }),
        };
        f(scratch)
    })
}

fn encode_chunk(old: &[u8], new: &[u8], dtype: Dtype) -> Result<Coded> {
    if old == new {
        return Ok(Coded { kind: Kind::Same, bytes: Vec::new(), changed: 0 });
    }
    with_scratch(|scratch| {
        Ok(match dtype.size() {
            1 => Chunk::<u8>::new(scratch, dtype).encode(old, new),
            2 => Chunk::<u16>::new(scratch, dtype).encode(old, new),
            4 => Chunk::<u32>::new(scratch, dtype).encode(old, new),
            _ => Chunk::<u64>::new(scratch, dtype).encode(old, new),
        })
    })
}

fn decode_chunk(kind: Kind, chunk: &[u8], old: &[u8], dtype: Dtype, new: &mut [u8]) -> Result<()> {
    if kind == Kind::Same && chunk.is_empty() && !old.is_empty() {
        new.copy_from_slice(old);
        return Ok(());
    }
    with_scratch(|scratch| match dtype.size() {
        1 => Chunk::<u8>::new(scratch, dtype).decode(kind, chunk, old, new),
        2 => Chunk::<u16>::new(scratch, dtype).decode(kind, chunk, old, new),
        4 => Chunk::<u32>::new(scratch, dtype).decode(kind, chunk, old, new),
        _ => Chunk::<u64>::new(scratch, dtype).decode(kind, chunk, old, new),
    })
}

/// A chunk on its way.
struct Chunk<'a, W> {
    scratch: &'a mut Scratch,
    dtype: Dtype,
    float: bool,
    words: Vec<W>,
}

impl<'a, W: Word> Chunk<'a, W> {
    fn new(scratch: &'a mut Scratch, dtype: Dtype) -> Self {
        Chunk { scratch, dtype, float: is_float(dtype), words: Vec::new() }
    }

    fn encode(mut self, old: &[u8], new: &[u8]) -> Coded {
        let count = new.len() / W::BYTES;
        let (level, dtype) = (self.scratch.level, self.dtype);
        let mut bytes = Vec::new();
        let (mut kind, mut changed) = (Kind::Alone, count);
        if old.is_empty() {
            self.put_planes(kind, old, new, &mut bytes);
        } else {
            let changes = scaled::scan::<W>(level, old, new, dtype, &mut self.scratch.scaled);
            changed = changes.count;
            // Every distance takes a bit at least; gaps between few changes take less.
            if changed * FEW < count {
                (kind, bytes) = (Kind::Sparse, self.sparse(old, new));
            } else {
                let plan = scaled::plan::<W>(level, old, new, dtype, changes, &self.scratch.scaled);
                let bits = plan.bits / count as f64;
                // Where distances take so little, nothing else is worth a look.
                kind = if bits < 2.0 * W::BYTES as f64 {
                    Kind::Distance
                } else {
                    best(bits, sample::<W>(old, new))
                };
                match kind {
                    Kind::Distance => {
                        bytes.reserve_exact((plan.bits / 7.5) as usize + SMALL);
                        scaled::put::<W>(
                            level,
                            old,
                            new,
                            dtype,
                            changes,
                            plan,
                            &mut self.scratch.scaled,
                            &mut bytes,
                        );
                    }
                    _ => self.put_planes(kind, old, new, &mut bytes),
                }
                if changed * NOT_MANY < count {
                    let sparse = self.sparse(old, new);
                    if sparse.len() < bytes.len() {
                        (kind, bytes) = (Kind::Sparse, sparse);
                    }
                }
            }
        }
        if bytes.len() >= new.len() {
            (kind, bytes) = (Kind::Raw, new.to_vec());
        }
        Coded { kind, bytes, changed: changed as u64 }
    }

    fn decode(mut self, kind: Kind, mut chunk: &[u8], old: &[u8], new: &mut [u8]) -> Result<()> {
        let malformed = || Error::artifact(format!("a chunk of kind {} is malformed", kind.name()));
        if old.is_empty() && !matches!(kind, Kind::Alone | Kind::Raw) {
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
                self.take_sparse(&mut chunk, new)?;
            }
            Kind::Distance => {
                let Scratch { scaled, level, .. } = self.scratch;
                scaled::take::<W>(*level, chunk, old, self.dtype, new, scaled)?;
                chunk = &[];
            }
            Kind::Bits | Kind::Alone => {
                self.take_planes(&mut chunk, new.len() / W::BYTES)?;
                new.chunks_exact_mut(W::BYTES).zip(&self.words).for_each(|(new, word)| word.write(new));
                if kind == Kind::Bits {
                    new.iter_mut().zip(old).for_each(|(new, old)| *new ^= old);
                }
            }
        }
        if chunk.is_empty() { Ok(()) } else { Err(malformed()) }
    }

    /// Planes of the elements, or of the bits in which they differ from the base's.
    fn put_planes(&mut self, kind: Kind, old: &[u8], new: &[u8], out: &mut Vec<u8>) {
        self.words.clear();
        self.words.extend(words::<W>(new));
        if kind == Kind::Bits {
            self.words.iter_mut().zip(words::<W>(old)).for_each(|(new, old)| *new = new.xor(old));
        }
        self.put_words(out);
    }

    fn put_words(&mut self, out: &mut Vec<u8>) {
        for i in 0..W::BYTES {
            self.scratch.plane.clear();
            self.scratch.plane.extend(self.words.iter().map(|w| w.byte(i)));
            let Scratch { coder, plane, .. } = &mut *self.scratch;
            coder.put(plane, out);
        }
    }

    fn take_planes(&mut self, stored: &mut &[u8], count: usize) -> Result<()> {
        self.words.clear();
        self.words.resize(count, W::default());
        self.scratch.plane.resize(count, 0);
        for i in 0..W::BYTES {
            let Scratch { coder, plane, .. } = &mut *self.scratch;
            coder.take(stored, plane)?;
            for (word, byte) in self.words.iter_mut().zip(&self.scratch.plane) {
                *word = word.or(W::of_byte(*byte, i));
            }
        }
        Ok(())
    }

    /// Bytes of gaps as u32, how many elements changed as u32, the gaps as LEB128, then planes of distances.
    fn sparse(&mut self, old: &[u8], new: &[u8]) -> Vec<u8> {
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
            self.words.push(W::folded(W::climb(W::read(new), W::read(old), self.float), 0));
        }
        let mut out = Vec::new();
        out.extend_from_slice(&(gaps.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.words.len() as u32).to_le_bytes());
        self.scratch.coder.put(&gaps, &mut out);
        self.put_words(&mut out);
        out
    }

    fn take_sparse(&mut self, stored: &mut &[u8], new: &mut [u8]) -> Result<()> {
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
        self.scratch.coder.take(stored, &mut gaps)?;
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
            W::climbed(*word, 0, W::read(element), self.float).write(element);
        }
        if gaps.next().is_none() { Ok(()) } else { Err(malformed()) }
    }
}

/// A tensor's bytes as words.
fn words<W: Word>(bytes: &[u8]) -> impl ExactSizeIterator<Item = W> + Clone {
    bytes.chunks_exact(W::BYTES).map(W::read)
}

/// Bits per element of differing bits, and of elements alone, each byte coded by itself, from a sample.
fn sample<W: Word>(old: &[u8], new: &[u8]) -> [f64; 2] {
    /// Elements that follow one another, and how many such runs there are at most.
    const RUN: usize = 64;
    const RUNS: usize = 16;
    let count = new.len() / W::BYTES;
    let step = (count / RUNS).max(RUN);
    let mut counts = vec![[[0u32; 256]; 2]; W::BYTES];
    let mut total = 0;
    for start in (0..count).step_by(step) {
        for i in start..(start + RUN).min(count) {
            let at = i * W::BYTES..(i + 1) * W::BYTES;
            let (o, n) = (W::read(&old[at.clone()]), W::read(&new[at]));
            for (b, counts) in counts.iter_mut().enumerate() {
                for (way, counts) in [n.xor(o), n].iter().zip(counts) {
                    counts[way.byte(b) as usize] += 1;
                }
            }
            total += 1;
        }
    }
    std::array::from_fn(|way| counts.iter().map(|counts| bits(&counts[way], total)).sum())
}

fn best(distance: f64, [differing, alone]: [f64; 2]) -> Kind {
    // A sample's own entropy is below what all of it takes: the distances' estimate is nearer to the truth.
    if distance <= 1.05 * differing.min(alone) {
        Kind::Distance
    } else if differing <= alone {
        Kind::Bits
    } else {
        Kind::Alone
    }
}
