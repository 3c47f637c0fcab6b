//! Symbols that are mostly zero, at their entropy: a range coder of the ANS kind (J. Duda, arXiv:1311.2540), four
//! states in turn, with one table of frequencies for each chunk.
//!
//! A chunk is its number of distinct symbols less one (u8), for each the symbol (u8) and its frequency in 1/2^14
//! (u16), the four states (u32), then 16-bit words. One symbol alone takes nothing behind the table.

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

/// Codes symbols: the bytes of each chunk as u32, then the chunks.
pub fn encode(symbols: &[u8]) -> Vec<u8> {
    let chunks: Vec<Vec<u8>> = symbols.par_chunks(CHUNK).map(encode_chunk).collect();
    let mut out: Vec<u8> = chunks.iter().flat_map(|c| (c.len() as u32).to_le_bytes()).collect();
    chunks.iter().for_each(|c| out.extend_from_slice(c));
    out
}

/// Restores `symbols.len()` symbols.
///
/// # Errors
/// An artifact error for anything that [`encode`] does not write.
pub fn decode(coded: &[u8], symbols: &mut [u8]) -> Result<()> {
    let count = symbols.len().div_ceil(CHUNK);
    let (lens, mut rest) = coded.split_at_checked(4 * count).ok_or_else(malformed)?;
    let mut chunks = Vec::with_capacity(count);
    for len in lens.as_chunks::<4>().0 {
        let (chunk, after) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(malformed)?;
        chunks.push(chunk);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(malformed());
    }
    let done: Vec<Result<()>> = symbols
        .par_chunks_mut(CHUNK)
        .zip(chunks)
        .map(|(symbols, chunk)| decode_chunk(chunk, symbols).ok_or_else(malformed))
        .collect();
    done.into_iter().collect()
}

fn malformed() -> Error {
    Error::artifact("the coded differences are malformed")
}

/// Frequencies that add up to 2^BITS, at least 1 for each symbol that occurs.
fn frequencies(symbols: &[u8]) -> [u32; 256] {
    let mut counts = [0u64; 256];
    symbols.iter().for_each(|&s| counts[s as usize] += 1);
    let total = symbols.len() as u64;
    let mut scaled = counts.map(|n| if n == 0 { 0 } else { ((n << BITS) / total).max(1) as u32 });
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

fn starts(frequencies: &[u32; 256]) -> [u32; 256] {
    let mut next = 0;
    frequencies.map(|f| {
        next += f;
        next - f
    })
}

fn encode_chunk(symbols: &[u8]) -> Vec<u8> {
    let frequencies = frequencies(symbols);
    let starts = starts(&frequencies);
    let distinct = frequencies.iter().filter(|&&f| f > 0).count();
    let mut out = vec![(distinct - 1) as u8];
    for (symbol, &f) in frequencies.iter().enumerate().filter(|(_, f)| **f > 0) {
        out.push(symbol as u8);
        out.extend_from_slice(&(f as u16).to_le_bytes());
    }
    if distinct == 1 {
        return out;
    }
    let mut states = [LOW; LANES];
    let mut words: Vec<u16> = Vec::with_capacity(symbols.len() / 8);
    for (i, &symbol) in symbols.iter().enumerate().rev() {
        let state = &mut states[i % LANES];
        let f = frequencies[symbol as usize];
        if u64::from(*state) >= u64::from(f) << (32 - BITS) {
            words.push(*state as u16);
            *state >>= 16;
        }
        *state = (*state / f << BITS) + *state % f + starts[symbol as usize];
    }
    states.iter().for_each(|s| out.extend_from_slice(&s.to_le_bytes()));
    words.iter().rev().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
    out
}

fn decode_chunk(chunk: &[u8], symbols: &mut [u8]) -> Option<()> {
    let (&last, mut rest) = chunk.split_first()?;
    let distinct = usize::from(last) + 1;
    let mut frequencies = [0u32; 256];
    let mut before = None;
    for _ in 0..distinct {
        let (&[symbol, low, high], after) = rest.split_first_chunk()?;
        rest = after;
        // In order, so that there is one spelling.
        if before.is_some_and(|before| before >= symbol) {
            return None;
        }
        before = Some(symbol);
        frequencies[symbol as usize] = u32::from(u16::from_le_bytes([low, high]));
        if frequencies[symbol as usize] == 0 {
            return None;
        }
    }
    if frequencies.iter().sum::<u32>() != 1 << BITS {
        return None;
    }
    if distinct == 1 {
        symbols.fill(before?);
        return rest.is_empty().then_some(());
    }
    let starts = starts(&frequencies);
    let mut table = vec![0u8; 1 << BITS];
    for (symbol, (&start, &f)) in starts.iter().zip(&frequencies).enumerate() {
        table[start as usize..(start + f) as usize].fill(symbol as u8);
    }
    let mut states = [0u32; LANES];
    for state in &mut states {
        let (bytes, after) = rest.split_first_chunk()?;
        *state = u32::from_le_bytes(*bytes);
        rest = after;
    }
    let (words, odd) = rest.as_chunks::<2>();
    let mut words = words.iter();
    for (i, out) in symbols.iter_mut().enumerate() {
        let state = &mut states[i % LANES];
        let slot = *state & ((1 << BITS) - 1);
        let symbol = table[slot as usize];
        // Below 2^32: the frequency is at most 2^BITS, and the slot lies within its symbol's.
        *state = frequencies[symbol as usize] * (*state >> BITS) + slot - starts[symbol as usize];
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
                let coded = encode(&symbols);
                let mut back = vec![9; len];
                decode(&coded, &mut back).unwrap();
                assert_eq!(back, symbols);
                if len > CHUNK {
                    let mut counts = [0; 256];
                    symbols.iter().for_each(|s| counts[*s as usize] += 1);
                    let bits = super::super::plane::bits(&counts, len as u32);
                    let got = coded.len() as f64 * 8.0 / len as f64;
                    assert!(got < bits * 1.002 + 0.03, "{got} bits for {bits}");
                }
                for cut in 0..coded.len().min(50) {
                    assert!(len == 0 || decode(&coded[..cut], &mut back).is_err());
                }
            }
        }
    }
}
