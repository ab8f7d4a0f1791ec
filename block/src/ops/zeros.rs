//! Finding zeros in data.

/// Whether all bytes are zero.
pub(super) fn is_zero(data: &[u8]) -> bool {
    // Data is mostly told by its first bytes.
    let (head, rest) = data.split_at(data.len().min(16));
    head.iter().all(|&byte| byte == 0)
        && rest
            .chunks(1024)
            .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Divides data into runs of whole `unit`s (the last one may be shorter) that are all zeros or are not, as
/// (offset, length, zero).
pub(super) fn runs(data: &[u8], unit: usize) -> impl Iterator<Item = (usize, usize, bool)> {
    let unit = unit.max(1);
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at;
        let mut kind = None;
        while let Some(part) = data.get(at..(at + unit).min(data.len()))
            && !part.is_empty()
        {
            let zero = is_zero(part);
            if *kind.get_or_insert(zero) != zero {
                break;
            }
            at += part.len();
        }
        kind.map(|zero| (start, at - start, zero))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_byte_that_is_not_zero_is_found() {
        for len in [0, 1, 15, 16, 17, 1040, 5000] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in [0, 15, 16, 17, 1039, 1040, 4999] {
                if at < len {
                    data[at] = 1;
                    assert!(!is_zero(&data), "{len} {at}");
                    data[at] = 0;
                }
            }
        }
    }

    #[test]
    fn runs_are_of_whole_units() {
        let mut data = vec![0; 10];
        data[5] = 1;
        let all = |unit| runs(&data, unit).collect::<Vec<_>>();
        assert_eq!(all(4), [(0, 4, true), (4, 4, false), (8, 2, true)]);
        assert_eq!(all(1), [(0, 5, true), (5, 1, false), (6, 4, true)]);
        assert_eq!(all(100), [(0, 10, false)]);
        assert_eq!(runs(&[], 4).count(), 0);
    }
}
