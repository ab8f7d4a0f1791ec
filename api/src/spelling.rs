//! Words that are meant where another is written.

/// The longest word for which a neighbour is looked for, in characters.
const NEAREST_MAX: usize = 32;

/// The candidate that `word` is most likely a misspelling of: at most two
/// letters away, and at most one in words of up to four letters.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let letters: Vec<char> = word.chars().take(NEAREST_MAX + 1).collect();
    if letters.is_empty() || letters.len() > NEAREST_MAX {
        return None;
    }
    let allowed = if letters.len() <= 4 { 1 } else { 2 };
    candidates
        .map(|candidate| (distance(&letters, candidate), candidate))
        .filter(|&(distance, _)| distance <= allowed)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| candidate)
}

/// How many letters must be added, taken away, changed, or swapped with their
/// neighbour to make one word of the other (optimal string alignment).
fn distance(from: &[char], to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, &a) in from.iter().enumerate() {
        let mut next = Vec::with_capacity(row.len());
        next.push(i + 1);
        for (j, &b) in to.iter().enumerate() {
            let mut best = (row[j] + usize::from(a != b))
                .min(row[j + 1] + 1)
                .min(next[j] + 1);
            let swapped = i > 0 && j > 0 && a == to[j - 1] && b == from[i - 1];
            if swapped {
                best = best.min(before[j - 1] + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_close_and_bounded() {
        let keys = || ["size", "shared", "hugepages", "hugepage_size"].into_iter();
        assert_eq!(nearest("hugepage", keys()), Some("hugepages"));
        assert_eq!(nearest("szie", keys()), Some("size"));
        assert_eq!(nearest("sz", keys()), None);
        assert_eq!(nearest("", keys()), None);
        assert_eq!(nearest(&"x".repeat(1 << 20), keys()), None);
    }
}
