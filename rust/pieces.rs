//! BLAKE3 of bytes that are hashed in pieces, each on any thread, while it is in a core's cache.
//!
//! BLAKE3 is a tree: pieces of a power of two of bytes are its subtrees, and their digests are joined in the end.

use crate::error::Result;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{CHUNK_LEN, Hasher};
use rayon::prelude::*;

/// Bytes of a piece where nothing else asks for another size.
const PIECE: usize = 1 << 18;

/// BLAKE3, on the threads that are free.
pub fn digest(bytes: &[u8]) -> [u8; 32] {
    if bytes.len() <= PIECE {
        return *blake3::hash(bytes).as_bytes();
    }
    let hashes: Vec<[u8; 32]> =
        bytes.par_chunks(PIECE).enumerate().map(|(i, piece)| hash(piece, i * PIECE, bytes.len())).collect();
    joined(&hashes, PIECE)
}

/// Hands over bytes in pieces, each with its place, on the threads that are free.
///
/// # Errors
/// The first, in order, that `each` returns.
pub fn each(bytes: &[u8], each: &(dyn Fn(usize, &[u8]) -> Result<()> + Sync)) -> Result<()> {
    let done: Vec<Result<()>> =
        bytes.par_chunks(PIECE).enumerate().map(|(i, piece)| each(i * PIECE, piece)).collect();
    done.into_iter().collect()
}

/// The hash of the piece that starts at `start` of `len` bytes, for [`joined`].
pub fn hash(piece: &[u8], start: usize, len: usize) -> [u8; 32] {
    if piece.len() == len {
        return *blake3::hash(piece).as_bytes();
    }
    Hasher::new().set_input_offset(start as u64).update(piece).finalize_non_root()
}

/// BLAKE3 of all bytes, from the hashes of all pieces; each but the last has `piece` bytes, a power of two.
pub fn joined(hashes: &[[u8; 32]], piece: usize) -> [u8; 32] {
    debug_assert!(piece.is_power_of_two() && piece >= CHUNK_LEN);
    match hashes {
        [] => *blake3::hash(&[]).as_bytes(),
        [only] => *only,
        _ => {
            let (left, right) = hashes.split_at(left(hashes.len()));
            *merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash).as_bytes()
        }
    }
}

fn subtree(hashes: &[[u8; 32]]) -> [u8; 32] {
    if let [only] = hashes {
        return *only;
    }
    let (left, right) = hashes.split_at(left(hashes.len()));
    merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

/// Pieces in the left one of two subtrees: the largest power of two that leaves something to the right.
fn left(pieces: usize) -> usize {
    pieces.next_power_of_two() / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_give_what_the_whole_gives() {
        let bytes: Vec<u8> = (0..9 * PIECE + 77).map(|i| ((i * i) >> 7) as u8).collect();
        for len in [0, 1, 1024, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE, 5 * PIECE + 1, bytes.len()]
        {
            let bytes = &bytes[..len];
            assert_eq!(digest(bytes), *blake3::hash(bytes).as_bytes(), "{len}");
            let hashes: Vec<_> =
                bytes.chunks(4096).enumerate().map(|(i, piece)| hash(piece, i * 4096, len)).collect();
            assert_eq!(joined(&hashes, 4096), *blake3::hash(bytes).as_bytes(), "{len}");
        }
    }
}
