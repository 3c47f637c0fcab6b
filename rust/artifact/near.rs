//! Names like a name that does not exist, for error messages.

/// Most suggestions.
const SUGGESTIONS: usize = 3;

/// Names longer than this are not compared letter by letter.
const MAX_COMPARED: usize = 128;

/// The names nearest to `wanted`, best first: those that contain it, and those a few letters away.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut near: Vec<(usize, &str)> =
        names.filter_map(|name| Some((distance(wanted, name)?, name))).collect();
    near.sort_by_key(|(distance, name)| (*distance, name.len()));
    near.truncate(SUGGESTIONS);
    near.into_iter().map(|(_, name)| name).collect()
}

/// How far apart two names are, or `None` where nobody would take one for the other.
fn distance(wanted: &str, name: &str) -> Option<usize> {
    if !wanted.is_empty() && name.contains(wanted) {
        return Some(1);
    }
    let close = 1 + wanted.len() / 8;
    if wanted.len().max(name.len()) > MAX_COMPARED || wanted.len().abs_diff(name.len()) > close {
        return None;
    }
    let (a, b) = (wanted.as_bytes(), name.as_bytes());
    // Levenshtein: row i holds the edits from the first i bytes of `a` to every beginning of `b`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    (row[b.len()] <= close).then_some(row[b.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_what_was_meant() {
        let names = ["model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight", "lm_head.weight"];
        let near = |wanted| nearest(wanted, names.iter().copied());
        assert_eq!(near("lm_head"), ["lm_head.weight"]);
        assert_eq!(near("lm_haed.weight"), ["lm_head.weight"]);
        assert_eq!(near("model.layers.0.q_proj.weights")[0], names[0]);
        assert!(near("transformer.wte").is_empty());
        assert!(near("").is_empty());
    }
}
