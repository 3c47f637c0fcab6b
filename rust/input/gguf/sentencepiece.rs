//! The merges of a SentencePiece vocabulary: BPE that joins the pair with the best score is BPE whose merges are
//! ranked by score (as in transformers' conversion of slow tokenizers).

use std::collections::HashMap;

/// The longest token, in characters, that is looked at: SentencePiece makes none longer than 16 unless told to.
const LONGEST: usize = 64;

/// A merge: the numbers of both tokens.
pub(super) type Pair = (u32, u32);

/// The merges, best first. `ids` has each token's number.
pub(super) fn merges(tokens: &[&str], scores: &[f32], ids: &HashMap<&str, u32>) -> Vec<Pair> {
    let mut ranked: Vec<(f32, usize, usize, usize, Pair)> = Vec::new();
    for (number, token) in tokens.iter().enumerate().filter(|(_, t)| t.chars().count() <= LONGEST) {
        let mut pairs: Vec<(Pair, usize, usize)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some(((*ids.get(left)?, *ids.get(right)?), left.chars().count(), right.chars().count()))
            })
            .collect();
        pairs.sort_unstable();
        ranked.extend(pairs.into_iter().map(|(pair, l, r)| (scores[number], l, r, number, pair)));
    }
    // Stable, so that the vocabulary decides between equals.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
    ranked.into_iter().map(|(.., pair)| pair).collect()
}
