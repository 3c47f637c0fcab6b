//! Symbols that are mostly zero, at their entropy given a context that both sides know: a range coder of the ANS kind
//! (J. Duda, arXiv:1311.2540), four states in turn.
//!
//! A stream is a table for each context that occurs in it, in their order, the bytes of each chunk of 2^18 symbols as
//! u32, then the chunks. A table is its last symbol (u8) and the frequencies in 1/2^14 of all symbols up to that one, as
//! LEB128; a chunk is the four states (u32), then 16-bit words.

use crate::error::{Error, Result};
use rayon::prelude::*;

/// Symbols in a chunk.
const CHUNK: usize = 1 << 18;

/// Bits of a frequency.
const BITS: u32 = 14;

/// States stay in `LOW .. LOW << 16`.
const LOW: u32 = 1 << 16;

/// States that take turns: each waits for its own division alone.
const LANES: usize = 4;

/// Contexts that there can be.
pub const CONTEXTS: usize = 32;

/// Appends coded symbols, each with the context at the same place (below [`CONTEXTS`]; none given: all 0).
pub fn encode(symbols: &[u8], contexts: Option<&[u8]>, out: &mut Vec<u8>) {
    let counts = symbols
        .par_chunks(CHUNK)
        .enumerate()
        .map(|(i, symbols)| {
            let mut counts = vec![[0u64; 256]; CONTEXTS];
            let pairs = symbols.iter().zip(part(contexts, i, symbols.len()));
            pairs.for_each(|(&s, &c)| counts[c as usize][s as usize] += 1);
            counts
        })
        .reduce(
            || vec![[0u64; 256]; CONTEXTS],
            |mut a, b| {
                a.as_flattened_mut().iter_mut().zip(b.as_flattened()).for_each(|(a, b)| *a += b);
                a
            },
        );
    let tables: Vec<Option<Table>> = counts
        .iter()
        .map(|counts| counts.iter().any(|&n| n > 0).then(|| Table::new(frequencies(counts))))
        .inspect(|table| table.iter().for_each(|table| table.put(out)))
        .collect();
    let chunks: Vec<Vec<u8>> = symbols
        .par_chunks(CHUNK)
        .enumerate()
        .map(|(i, symbols)| encode_chunk(&tables, symbols, part(contexts, i, symbols.len())))
        .collect();
    chunks.iter().for_each(|c| out.extend_from_slice(&(c.len() as u32).to_le_bytes()));
    chunks.iter().for_each(|c| out.extend_from_slice(c));
}

/// Takes `symbols.len()` symbols from the start of `coded`.
///
/// # Errors
/// An artifact error for anything that [`encode`] does not write.
pub fn decode(coded: &mut &[u8], contexts: Option<&[u8]>, symbols: &mut [u8]) -> Result<()> {
    let mut occurs = [false; CONTEXTS];
    match contexts {
        Some(contexts) => contexts.iter().for_each(|&c| occurs[c as usize] = true),
        None => occurs[0] = !symbols.is_empty(),
    }
    let mut rest = *coded;
    let mut tables: Vec<(Table, Vec<u8>)> = Vec::with_capacity(CONTEXTS);
    let mut places = [0; CONTEXTS];
    for (place, _) in places.iter_mut().zip(occurs).filter(|(_, occurs)| *occurs) {
        let table = Table::take(&mut rest).ok_or_else(malformed)?;
        let slots = table.slots();
        *place = tables.len();
        tables.push((table, slots));
    }
    let count = symbols.len().div_ceil(CHUNK);
    let (lens, mut rest) = rest.split_at_checked(4 * count).ok_or_else(malformed)?;
    let mut chunks = Vec::with_capacity(count);
    for len in lens.as_chunks::<4>().0 {
        let (chunk, after) =
            rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(malformed)?;
        chunks.push(chunk);
        rest = after;
    }
    *coded = rest;
    let done: Vec<Result<()>> = symbols
        .par_chunks_mut(CHUNK)
        .zip(chunks)
        .enumerate()
        .map(|(i, (symbols, chunk))| {
            let contexts = part(contexts, i, symbols.len());
            decode_chunk(&tables, &places, chunk, contexts, symbols).ok_or_else(malformed)
        })
        .collect();
    done.into_iter().collect()
}

/// The fewest bytes that so many symbols take.
pub fn least_bytes(symbols: usize) -> usize {
    symbols.div_ceil(CHUNK) * (4 + 4 * LANES)
}

/// The contexts of chunk `i`, which has `len` symbols.
fn part(contexts: Option<&[u8]>, i: usize, len: usize) -> &[u8] {
    contexts.map_or(&[0; CHUNK][..len], |contexts| &contexts[i * CHUNK..][..len])
}

fn malformed() -> Error {
    Error::artifact("the coded differences are malformed")
}

/// Frequencies that add up to 2^BITS, at least 1 for each symbol that occurs.
fn frequencies(counts: &[u64; 256]) -> [u32; 256] {
    let total: u64 = counts.iter().sum();
    let scale = |&n: &u64| if n == 0 { 0 } else { ((n << BITS) / total).max(1) as u32 };
    let mut scaled: [u32; 256] = std::array::from_fn(|s| scale(&counts[s]));
    // What rounding has left, or taken, is the most frequent symbols' affair: they feel it least.
    let mut sum: u32 = scaled.iter().sum();
    while sum != 1 << BITS {
        let largest = (0..256).max_by_key(|&s| (scaled[s], std::cmp::Reverse(s))).expect("256 symbols");
        if sum < 1 << BITS {
            scaled[largest] += (1 << BITS) - sum;
            sum = 1 << BITS;
        } else {
            scaled[largest] -= 1;
            sum -= 1;
        }
    }
    scaled
}

/// Frequencies of symbols in one context, and where each symbol's slots start.
#[derive(Clone)]
struct Table {
    frequencies: [u32; 256],
    starts: [u32; 256],
}

impl Table {
    fn new(frequencies: [u32; 256]) -> Table {
        let mut next = 0;
        let starts = frequencies.map(|f| {
            next += f;
            next - f
        });
        Table { frequencies, starts }
    }

    /// The symbol of each slot.
    fn slots(&self) -> Vec<u8> {
        let mut slots = vec![0u8; 1 << BITS];
        for (symbol, (&start, &f)) in self.starts.iter().zip(&self.frequencies).enumerate() {
            slots[start as usize..(start + f) as usize].fill(symbol as u8);
        }
        slots
    }

    fn put(&self, out: &mut Vec<u8>) {
        let last = self.frequencies.iter().rposition(|&f| f > 0).unwrap_or(0);
        out.push(last as u8);
        for &f in &self.frequencies[..=last] {
            let mut rest = f;
            while rest >= 128 {
                out.push(rest as u8 | 128);
                rest >>= 7;
            }
            out.push(rest as u8);
        }
    }

    fn take(stored: &mut &[u8]) -> Option<Table> {
        let mut byte = || {
            let (&byte, rest) = stored.split_first()?;
            *stored = rest;
            Some(byte)
        };
        let last = byte()?;
        let mut frequencies = [0u32; 256];
        for f in &mut frequencies[..=usize::from(last)] {
            let mut shift = 0;
            loop {
                let more = byte()?;
                *f |= u32::from(more & 127) << shift;
                shift += 7;
                if more < 128 {
                    break;
                }
                if shift > BITS {
                    return None;
                }
            }
        }
        (frequencies.iter().map(|&f| u64::from(f)).sum::<u64>() == 1 << BITS).then(|| Table::new(frequencies))
    }
}

fn encode_chunk(tables: &[Option<Table>], symbols: &[u8], contexts: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut states = [LOW; LANES];
    let mut words: Vec<u16> = Vec::with_capacity(symbols.len() / 8);
    for (i, (&symbol, &context)) in symbols.iter().zip(contexts).enumerate().rev() {
        let table = tables[context as usize].as_ref().expect("it was counted");
        let state = &mut states[i % LANES];
        let f = table.frequencies[symbol as usize];
        if u64::from(*state) >= u64::from(f) << (32 - BITS) {
            words.push(*state as u16);
            *state >>= 16;
        }
        *state = ((*state / f) << BITS) + *state % f + table.starts[symbol as usize];
    }
    states.iter().for_each(|s| out.extend_from_slice(&s.to_le_bytes()));
    words.iter().rev().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
    out
}

fn decode_chunk(
    tables: &[(Table, Vec<u8>)],
    places: &[usize; CONTEXTS],
    chunk: &[u8],
    contexts: &[u8],
    symbols: &mut [u8],
) -> Option<()> {
    let mut rest = chunk;
    let mut states = [0u32; LANES];
    for state in &mut states {
        let (bytes, after) = rest.split_first_chunk()?;
        *state = u32::from_le_bytes(*bytes);
        rest = after;
    }
    let (words, odd) = rest.as_chunks::<2>();
    let mut words = words.iter();
    for (i, (out, &context)) in symbols.iter_mut().zip(contexts).enumerate() {
        let (table, slots) = &tables[places[context as usize]];
        let state = &mut states[i % LANES];
        let slot = *state & ((1 << BITS) - 1);
        let symbol = slots[slot as usize];
        // Below 2^32: the frequency is at most 2^BITS, and the slot lies within its symbol's.
        *state = table.frequencies[symbol as usize] * (*state >> BITS) + slot - table.starts[symbol as usize];
        if *state < LOW {
            *state = *state << 16 | u32::from(u16::from_le_bytes(*words.next()?));
        }
        *out = symbol;
    }
    (odd.is_empty() && words.next().is_none() && states == [LOW; LANES]).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_near_its_entropy() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as u32
        };
        for len in [0, 1, 3, 4, 5, 1000, CHUNK, 3 * CHUNK + 7] {
            let sparse: Vec<u8> = (0..len)
                .map(|_| match random() % 16 {
                    0 => 1,
                    1 => 15,
                    _ => 0,
                })
                .collect();
            let dense: Vec<u8> = (0..len).map(|_| random() as u8).collect();
            for symbols in [sparse, dense, vec![0; len], vec![7; len]] {
                let contexts: Vec<u8> = (0..len).map(|i| (i / 16 % 3) as u8).collect();
                let mut back = vec![9; len];
                for contexts in [Some(contexts.as_slice()), None] {
                    let mut coded = Vec::new();
                    encode(&symbols, contexts, &mut coded);
                    let mut rest = coded.as_slice();
                    decode(&mut rest, contexts, &mut back).unwrap();
                    assert!(back == symbols && rest.is_empty() && coded.len() >= least_bytes(len));
                }
                let mut coded = Vec::new();
                encode(&symbols, None, &mut coded);
                if len > CHUNK {
                    let mut counts = [0; 256];
                    symbols.iter().for_each(|s| counts[*s as usize] += 1);
                    let bits = super::super::plane::bits(&counts, len as u32);
                    let got = coded.len() as f64 * 8.0 / len as f64;
                    assert!(got < bits * 1.002 + 0.03, "{got} bits for {bits}");
                }
                for cut in 0..coded.len().min(50) {
                    assert!(len == 0 || decode(&mut &coded[..cut], None, &mut back).is_err());
                }
            }
        }
    }
}
