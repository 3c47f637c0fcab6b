//! The merges of a SentencePiece vocabulary: BPE that joins the pair with the best score is BPE whose merges are
//! ranked by score (as in transformers' conversion of slow tokenizers).

use super::config::Reason;
use std::collections::HashMap;

/// The longest token, in characters, that is looked at: SentencePiece makes none longer than 16 unless told to.
const LONGEST: usize = 64;

/// The most merges for each token, so that a small file never becomes a large list; vocabularies have two or three.
const MOST: usize = 16;

/// A merge: the numbers of both tokens.
pub(super) type Pair = (u32, u32);

/// The merges, best first. `ids` has each token's number; tokens that are not made of others are empty.
pub(super) fn merges(tokens: &[&str], scores: &[f32], ids: &HashMap<&str, u32>) -> Result<Vec<Pair>, Reason> {
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
        if ranked.len() + pairs.len() > MOST * tokens.len() {
            return Err("its tokens can be made of each other in too many ways".to_owned());
        }
        ranked.extend(pairs.into_iter().map(|(pair, l, r)| (scores[number], l, r, number, pair)));
    }
    // Stable, so that the vocabulary decides between equals.
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
    Ok(ranked.into_iter().map(|(.., pair)| pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_ranked_by_score_and_then_by_length() {
        let tokens = ["a", "b", "ab", "ba", "aba", ""];
        let scores = [-9.0, -9.0, -1.0, -3.0, -2.0, 0.0];
        let ids: HashMap<&str, u32> = tokens[..5].iter().copied().zip(0..).collect();
        assert_eq!(merges(&tokens, &scores, &ids).unwrap(), [(0, 1), (2, 0), (0, 3), (1, 0)]);
    }

    #[test]
    fn a_small_vocabulary_never_becomes_a_large_list() {
        let tokens: Vec<String> = (1..=60).map(|n| "a".repeat(n)).collect();
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let ids: HashMap<&str, u32> = tokens.iter().copied().zip(0..).collect();
        assert!(merges(&tokens, &vec![0.0; 60], &ids).unwrap_err().contains("too many ways"));
    }
}
