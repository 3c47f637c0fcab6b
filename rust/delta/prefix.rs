//! Symbols below sixteen in a prefix code whose words have at most seven bits: eight of them are packed at once, and
//! about four are found by one look-up.
//!
//! A stream is the lengths of the sixteen codes (a nibble each, the lower one first; 0: does not occur), the bytes of
//! each of four lanes (u32), and the lanes, each of which holds a quarter of the symbols, rounded up to whole blocks.
//! Codes are canonical: shorter ones first, then smaller symbols; they are written with their first bit lowest.

use super::bits::{self, Pack, Writer};
use crate::error::{Error, Result};

/// Symbols that there can be.
pub const SYMBOLS: usize = 16;

/// The longest code: eight of them fit what a [`Writer`] takes.
const LONGEST: u8 = 7;

/// Runs of symbols that are coded by themselves, so that a processor can work on all of them at once.
const LANES: usize = 4;

/// Symbols of which a lane holds a whole number, save the last.
const BLOCK: usize = 64;

/// Bits by which one look-up finds symbols.
const WINDOW: u32 = 10;

/// The most symbols that one look-up finds: they and their number fill eight bytes.
const AT_ONCE: usize = 7;

/// Symbols below which to find many at once takes longer than to find each.
const WORTH_WINDOWS: usize = 1 << 13;

/// Bytes before the lanes.
const HEAD: usize = SYMBOLS / 2 + 4 * LANES;

/// The lengths of the codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths([u8; SYMBOLS]);

impl Lengths {
    /// For symbols that occur so often; those that never do have no code.
    pub fn new(counts: &[u32; SYMBOLS]) -> Lengths {
        let mut counts = counts.map(u64::from);
        // A code of one symbol alone would leave half of all words without a meaning.
        if counts.iter().filter(|&&n| n > 0).count() < 2 {
            counts[SYMBOLS - 1] += 1;
            counts[0] += 1;
        }
        // Rare symbols are taken for more frequent ones until no code is too long.
        let total: u64 = counts.iter().sum();
        let mut least = 1;
        loop {
            let lengths = huffman(&counts.map(|n| if n == 0 { 0 } else { n.max(least) }));
            if lengths.iter().all(|&l| l <= LONGEST) {
                return Lengths(lengths);
            }
            least = (least + least / 4 + 1).max(total >> 10);
        }
    }

    /// The bits of a symbol.
    pub fn of(&self, symbol: usize) -> u32 {
        u32::from(self.0[symbol])
    }

    /// The largest symbol that has a code.
    pub fn last(&self) -> u8 {
        self.0.iter().rposition(|&l| l > 0).unwrap_or(0) as u8
    }

    /// The codes, as they are written.
    fn codes(&self) -> [u8; SYMBOLS] {
        let mut codes = [0; SYMBOLS];
        let mut next = 0u32;
        for length in 1..=LONGEST {
            for (code, _) in codes.iter_mut().zip(self.0).filter(|(_, l)| *l == length) {
                *code = ((next << (8 - length)) as u8).reverse_bits();
                next += 1;
            }
            next <<= 1;
        }
        codes
    }

    /// Whether every word has one meaning.
    fn complete(&self) -> bool {
        let used = self.0.iter().filter(|&&l| l > 0);
        self.0.iter().all(|&l| l <= LONGEST)
            && used.map(|&l| 1u32 << (LONGEST - l)).sum::<u32>() == 1 << LONGEST
    }
}

/// Lengths of a Huffman code, without a limit.
fn huffman(counts: &[u64; SYMBOLS]) -> [u8; SYMBOLS] {
    let mut lengths = [0; SYMBOLS];
    // Trees that are not joined yet: how often they occur, and a bit for each of their symbols.
    let mut trees: Vec<(u64, u16)> =
        (0..SYMBOLS).filter(|&s| counts[s] > 0).map(|s| (counts[s], 1 << s)).collect();
    while trees.len() > 1 {
        trees.sort_unstable_by(|a, b| b.cmp(a));
        let (a, b) = (trees.pop().expect("two"), trees.pop().expect("two"));
        let joined = a.1 | b.1;
        (0..SYMBOLS).filter(|s| joined >> s & 1 == 1).for_each(|s| lengths[s] += 1);
        trees.push((a.0 + b.0, joined));
    }
    lengths
}

/// Symbols of a lane.
fn lane(count: usize) -> usize {
    count.div_ceil(BLOCK * LANES) * BLOCK
}

/// Appends symbols, each of which has a code. `room` is for the bytes of a lane.
#[inline(always)]
pub fn put<P: Pack>(pack: P, lengths: &Lengths, symbols: &[u8], room: &mut Vec<u8>, out: &mut Vec<u8>) {
    out.extend(lengths.0.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4));
    let lens = out.len();
    out.extend_from_slice(&[0; 4 * LANES]);
    let codes = lengths.codes();
    let masks = lengths.0.map(|l| ((1u32 << l) - 1) as u8);
    let step = lane(symbols.len()).max(1);
    if room.len() < step + Writer::ROOM {
        room.resize(step + Writer::ROOM, 0);
    }
    for (i, symbols) in symbols.chunks(step).enumerate() {
        let mut writer = Writer::new(room);
        let (eights, rest) = symbols.as_chunks::<8>();
        for eight in eights {
            let symbols = u64::from_le_bytes(*eight);
            let mask = pack.look_up(&masks, symbols);
            writer.put(pack.gather(pack.look_up(&codes, symbols), mask), mask.count_ones());
        }
        for &symbol in rest {
            writer.put(u64::from(codes[symbol as usize]), u32::from(lengths.0[symbol as usize]));
        }
        let len = writer.len();
        out[lens + 4 * i..lens + 4 * i + 4].copy_from_slice(&(len as u32).to_le_bytes());
        out.extend_from_slice(&room[..len]);
    }
}

/// What the next bits hold.
struct Table {
    /// Up to seven symbols, then a byte of how many (the upper nibble) and of how many bits.
    many: Vec<u64>,
    /// One symbol: the upper nibble; its bits: the lower one.
    one: [u8; 1 << LONGEST],
}

impl Table {
    /// The windows' symbols only where there are enough of them to repay it.
    fn new(lengths: &Lengths, count: usize) -> Table {
        let mut one = [0; 1 << LONGEST];
        for (symbol, (code, length)) in lengths.codes().into_iter().zip(lengths.0).enumerate() {
            if length > 0 {
                let places = one.iter_mut().skip(usize::from(code)).step_by(1 << length);
                places.for_each(|entry| *entry = (symbol as u8) << 4 | length);
            }
        }
        if count < WORTH_WINDOWS {
            return Table { many: Vec::new(), one };
        }
        // The symbols of a window are its first and those of the shorter window behind it: `many` holds all windows
        // of n bits from 2^n on.
        let mut many = vec![0u64; 2 << WINDOW];
        for bits in 1..=WINDOW {
            for window in 0..1usize << bits {
                let entry = one[window & ((1 << LONGEST) - 1)];
                let (symbol, length) = (u64::from(entry >> 4), u32::from(entry & 15));
                if length > bits {
                    continue;
                }
                let mut rest = bits - length;
                let mut behind = many[(1 << rest) + (window >> length)];
                // Where that would be one too many, the window behind is taken for a shorter one.
                while behind >> 60 >= AT_ONCE as u64 {
                    rest -= 1;
                    behind = many[(1 << rest) + (window >> length & ((1 << rest) - 1))];
                }
                let about = (behind >> 56) + (1 << 4) + u64::from(length);
                many[(1 << bits) + window] = symbol | behind << 8 & (u64::MAX >> 8) | about << 56;
            }
        }
        many.drain(..1 << WINDOW);
        Table { many, one }
    }
}

/// Takes `symbols.len()` symbols from the start of `stored`; returns the largest that has a code.
///
/// # Errors
/// An artifact error for anything that [`put`] does not write.
#[inline(always)]
pub fn take(stored: &mut &[u8], symbols: &mut [u8]) -> Result<u8> {
    let malformed = || Error::artifact("the coded differences are malformed");
    let (head, mut rest) = stored.split_at_checked(HEAD).ok_or_else(malformed)?;
    let (nibbles, lens) = head.split_at(SYMBOLS / 2);
    let lengths = Lengths(std::array::from_fn(|s| nibbles[s / 2] >> (s % 2 * 4) & 15));
    if !lengths.complete() {
        return Err(malformed());
    }
    let step = lane(symbols.len()).max(1);
    let mut lanes: [Lane<'_>; LANES] = std::array::from_fn(|_| Lane::default());
    for (lane, (i, len)) in lanes.iter_mut().zip(lens.as_chunks::<4>().0.iter().enumerate()) {
        let len = u32::from_le_bytes(*len) as usize;
        let (bytes, after) = rest.split_at_checked(len).ok_or_else(malformed)?;
        // A look-up may see what follows the lane; its own symbols end before that.
        *lane = Lane { bytes: rest, bit: 0, end_bit: 8 * bytes.len(), at: i * step, end: (i + 1) * step };
        lane.at = lane.at.min(symbols.len());
        lane.end = lane.end.min(symbols.len());
        rest = after;
    }
    *stored = rest;
    let table = Table::new(&lengths, symbols.len());
    if let Ok(many) = table.many.as_slice().try_into() {
        // Five windows of ten bits are within what one read gives.
        while lanes.iter().all(Lane::has_room) {
            for lane in &mut lanes {
                lane.step(many, symbols);
            }
        }
        for lane in &mut lanes {
            while lane.has_room() {
                lane.step(many, symbols);
            }
        }
    }
    for lane in &mut lanes {
        lane.finish(&table.one, symbols);
        if lane.bit.div_ceil(8) * 8 != lane.end_bit {
            return Err(malformed());
        }
    }
    Ok(lengths.last())
}

#[derive(Default)]
struct Lane<'a> {
    bytes: &'a [u8],
    bit: usize,
    end_bit: usize,
    at: usize,
    end: usize,
}

impl Lane<'_> {
    const READS: usize = 5;

    #[inline(always)]
    fn has_room(&self) -> bool {
        self.at + Self::READS * AT_ONCE < self.end && (self.bit >> 3) + 8 <= self.bytes.len()
    }

    #[inline(always)]
    fn step(&mut self, many: &[u64; 1 << WINDOW], symbols: &mut [u8]) {
        let mut word = bits::read(self.bytes, self.bit);
        let out = &mut symbols[self.at..self.at + Self::READS * AT_ONCE + 1];
        let (mut found, mut used) = (0, 0);
        for _ in 0..Self::READS {
            let entry = many[(word & ((1 << WINDOW) - 1)) as usize];
            // SAFETY: before the last look-up at most `(READS - 1) * AT_ONCE` symbols were found, and `out` has room
            // for `AT_ONCE + 1` bytes more, which are eight.
            unsafe { out.as_mut_ptr().add(found).cast::<[u8; 8]>().write(entry.to_le_bytes()) };
            found += (entry >> 60) as usize;
            let bits = entry >> 56 & 15;
            word >>= bits;
            used += bits as usize;
        }
        self.at += found;
        self.bit += used;
    }

    fn finish(&mut self, one: &[u8; 1 << LONGEST], symbols: &mut [u8]) {
        for symbol in &mut symbols[self.at..self.end] {
            let entry = one[(bits::read(self.bytes, self.bit) & ((1 << LONGEST) - 1)) as usize];
            *symbol = entry >> 4;
            self.bit += usize::from(entry & 15);
        }
        self.at = self.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::simd::Level;

    struct Both<'a>(&'a Lengths, &'a [u8]);

    impl bits::Kernel for Both<'_> {
        type Output = (Vec<u8>, Vec<u8>);

        fn run<P: Pack>(self, pack: P) -> Self::Output {
            let mut out = Vec::new();
            put(pack, self.0, self.1, &mut Vec::new(), &mut out);
            let mut back = vec![9; self.1.len()];
            let mut rest = out.as_slice();
            take(&mut rest, &mut back).unwrap();
            assert!(rest.is_empty());
            (out, back)
        }
    }

    #[test]
    fn symbols_come_back_near_their_entropy() {
        let mut state = 1u64;
        for len in [0, 1, 5, 64, 255, 256, 257, 100_000] {
            for skew in [0, 1, 3, 8] {
                let symbols: Vec<u8> = (0..len)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        ((state >> 33) as u32 | 1 << 15).trailing_zeros().saturating_sub(skew) as u8
                    })
                    .collect();
                let mut counts = [0; SYMBOLS];
                symbols.iter().for_each(|&s| counts[s as usize] += 1);
                let lengths = Lengths::new(&counts);
                assert!(lengths.complete());
                let written: Vec<Vec<u8>> = Level::available()
                    .into_iter()
                    .map(|level| {
                        let (out, back) = bits::run(level, Both(&lengths, &symbols));
                        assert!(back == symbols, "{level:?} {len} {skew}");
                        out
                    })
                    .collect();
                assert!(written.windows(2).all(|w| w[0] == w[1]));
                let bits = super::super::plane::bits(&counts, len.max(1)) * f64::from(len);
                // A code has whole bits, and no word is longer than seven.
                assert!(
                    (written[0].len() as f64) < HEAD as f64 + 4.0 + 1.25 * bits.max(f64::from(len)) / 8.0
                );
            }
        }
    }
}
