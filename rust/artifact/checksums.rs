//! The two checksums of a part, on the threads that are free.

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

/// Bytes below which waking another thread costs more than hashing.
const WORTH_THREADS: u64 = 128 << 10;

/// XXH3 and BLAKE3.
pub fn checksums(bytes: &[u8]) -> (u64, [u8; 32]) {
    if (bytes.len() as u64) < WORTH_THREADS {
        return (xxh3_64(bytes), *blake3::hash(bytes).as_bytes());
    }
    rayon::join(|| xxh3_64(bytes), || crate::pieces::digest(bytes))
}

/// `f` of every item, in order; in parallel where they have enough bytes together.
pub fn map_parts<T: Sync, U: Send>(
    items: &[T],
    len: impl Fn(&T) -> u64,
    f: impl Fn(&T) -> U + Sync + Send,
) -> Vec<U> {
    if items.iter().map(len).sum::<u64>() < WORTH_THREADS {
        return items.iter().map(f).collect();
    }
    items.par_iter().map(f).collect()
}
