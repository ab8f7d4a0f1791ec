//! What differs between a page and the same page before.
//!
//! A delta is a row of pieces: how many bytes are as before, how many are others, and those. Both numbers are of one or two bytes, seven
//! bits in each, the lower ones first; the highest bit says that another follows. Bytes behind the last piece are as before.

use super::{PAGE, Run};

/// Bytes that are compared at once.
const WORD: usize = 8;

/// Why bytes are no delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// A number or bytes are missing.
    #[error("it ends early")]
    Short,
    /// A number of more than two bytes, or a piece of none.
    #[error("a number is out of range")]
    Number,
    /// It goes past the page.
    #[error("it goes past the end of the page")]
    Past,
}

/// Adds the delta that makes `new` of `old` to `out`, unless it has more than `most` bytes: whether it did. What has been added is of no use if not.
pub fn difference(old: &[u8], new: &[u8], most: usize, out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    let same = |(a, b): (&[u8], &[u8])| a == b;
    let mut words = old.chunks(WORD).zip(new.chunks(WORD)).map(same).peekable();
    let (mut at, mut done) = (0_usize, 0_usize);
    while let Some(same) = words.next() {
        if same {
            at = at.saturating_add(WORD);
            continue;
        }
        let mut end = at.saturating_add(WORD);
        while words.next_if(|same| !same).is_some() {
            end = end.saturating_add(WORD);
        }
        let end_of_bytes = end.min(new.len());
        put(out, at.saturating_sub(done));
        put(out, end_of_bytes.saturating_sub(at));
        out.extend_from_slice(new.get(at..end_of_bytes).unwrap_or_default());
        if out.len().saturating_sub(begin) > most {
            return false;
        }
        (at, done) = (end, end_of_bytes);
    }
    true
}

/// Makes the page before to the page after. It is of no use after an error.
///
/// # Errors
///
/// [`DeltaError`].
pub fn apply(delta: &[u8], page: &mut [u8; PAGE]) -> Result<(), DeltaError> {
    let mut rest = delta;
    let mut at = 0_usize;
    while !rest.is_empty() {
        at = at.saturating_add(number(&mut rest)?);
        let count = number(&mut rest)?;
        if count == 0 {
            return Err(DeltaError::Number);
        }
        let (bytes, after) = rest.split_at_checked(count).ok_or(DeltaError::Short)?;
        let end = at.saturating_add(count);
        page.get_mut(at..end)
            .ok_or(DeltaError::Past)?
            .copy_from_slice(bytes);
        (at, rest) = (end, after);
    }
    Ok(())
}

/// A number below 2^14.
fn put(out: &mut Vec<u8>, number: usize) {
    let low = u8::try_from(number & 0x7f).unwrap_or_default();
    let high = u8::try_from(number >> 7 & 0x7f).unwrap_or_default();
    if high == 0 {
        out.push(low);
    } else {
        out.extend_from_slice(&[low | 0x80, high]);
    }
}

fn number(rest: &mut &[u8]) -> Result<usize, DeltaError> {
    let (low, after) = rest.split_first().ok_or(DeltaError::Short)?;
    *rest = after;
    if low & 0x80 == 0 {
        return Ok(usize::from(*low));
    }
    let (high, after) = rest.split_first().ok_or(DeltaError::Short)?;
    *rest = after;
    if high & 0x80 != 0 {
        return Err(DeltaError::Number);
    }
    Ok(usize::from(*high) << 7 | usize::from(low & 0x7f))
}

/// Pages that the peer has, as they were sent. A page has one place, which it shares with others.
pub struct Cache {
    /// Of each place the address, or none.
    addresses: Vec<Option<u64>>,
    bytes: Vec<u8>,
}

impl Cache {
    /// Of so many bytes; none for less than a page.
    pub fn new(bytes: usize) -> Option<Self> {
        let places = bytes / PAGE;
        (places > 0).then(|| Self {
            addresses: vec![None; places],
            bytes: vec![0; places.saturating_mul(PAGE)],
        })
    }

    fn place(&self, address: u64) -> usize {
        let places = self.addresses.len().max(1) as u64;
        usize::try_from((address / PAGE as u64) % places).unwrap_or(0)
    }

    fn of_place(place: usize) -> std::ops::Range<usize> {
        let begin = place.saturating_mul(PAGE);
        begin..begin.saturating_add(PAGE)
    }

    /// The page as it was sent.
    pub fn find(&self, address: u64) -> Option<&[u8]> {
        let place = self.place(address);
        let there = self.addresses.get(place).copied().flatten() == Some(address);
        there.then(|| self.bytes.get(Self::of_place(place)))?
    }

    /// It has been sent.
    pub fn put(&mut self, address: u64, page: &[u8]) {
        let place = self.place(address);
        let here = self.bytes.get_mut(Self::of_place(place));
        let owner = self.addresses.get_mut(place);
        if let (Some(here), Some(owner)) = (here, owner)
            && here.len() == page.len()
        {
            here.copy_from_slice(page);
            *owner = Some(address);
        }
    }

    /// They are something else there now.
    pub fn forget(&mut self, run: Run) {
        let places = self.addresses.len() as u64;
        // More pages than places are all of them.
        for page in 0..u64::from(run.pages).min(places) {
            let address = run.address.saturating_add(page.saturating_mul(PAGE as u64));
            let place = self.place(address);
            if let Some(owner) = self.addresses.get_mut(place) {
                let inside = |owner: u64| {
                    (run.address..run.address.saturating_add(run.len())).contains(&owner)
                };
                if owner.is_some_and(inside) {
                    *owner = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(seed: &[(u16, u8)]) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        for (at, byte) in seed {
            page[usize::from(*at) % PAGE] = *byte;
        }
        page
    }

    #[test]
    fn pages_that_are_the_same_have_an_empty_delta_and_all_others_one_that_makes_them() {
        let (old, mut new) = ([7; PAGE], [7; PAGE]);
        let mut out = Vec::new();
        assert!(difference(&old, &new, PAGE, &mut out) && out.is_empty());
        new[PAGE - 1] = 1;
        assert!(difference(&old, &new, PAGE, &mut out));
        assert_eq!(out[..3], [0x80 | 0x78, 31, 8]);
        let mut made = old;
        apply(&out, &mut made).unwrap();
        assert_eq!(made, new);
    }

    #[test]
    fn a_delta_that_is_too_long_is_none() {
        let mut out = Vec::new();
        assert!(!difference(&[0; PAGE], &[1; PAGE], PAGE / 2, &mut out));
        assert!(difference(
            &[0; PAGE],
            &[1; PAGE],
            PAGE + 4,
            &mut Vec::new()
        ));
    }

    #[test]
    fn wrong_deltas_are_refused() {
        let refused = |bytes: &[u8]| apply(bytes, &mut [0; PAGE]).unwrap_err();
        assert_eq!(refused(&[1]), DeltaError::Short);
        assert_eq!(refused(&[0x80]), DeltaError::Short);
        assert_eq!(refused(&[0, 2, 9]), DeltaError::Short);
        assert_eq!(refused(&[0, 0]), DeltaError::Number);
        assert_eq!(refused(&[0x80, 0x80, 1]), DeltaError::Number);
        assert_eq!(refused(&[0xff, 0x1f, 2, 1, 1]), DeltaError::Past);
        assert_eq!(refused(&[0xff, 0x7f, 1, 1]), DeltaError::Past);
    }

    #[test]
    fn a_cache_gives_what_was_put_last_and_forgets() {
        assert!(Cache::new(PAGE - 1).is_none());
        let mut cache = Cache::new(2 * PAGE).unwrap();
        cache.put(0, &[1; PAGE]);
        cache.put(4096, &[2; PAGE]);
        assert_eq!(cache.find(0), Some(&[1; PAGE][..]));
        cache.put(8192, &[3; PAGE]);
        assert_eq!(
            (cache.find(0), cache.find(8192)),
            (None, Some(&[3; PAGE][..]))
        );
        cache.forget(Run {
            address: 4096,
            pages: u32::MAX,
        });
        assert_eq!((cache.find(4096), cache.find(8192)), (None, None));
    }

    proptest! {
        #[test]
        fn any_two_pages_are_made_of_each_other(
            old in prop::collection::vec((any::<u16>(), any::<u8>()), 0..300),
            more in prop::collection::vec((any::<u16>(), any::<u8>()), 0..300),
        ) {
            let (old, new) = (page(&old), page(&more));
            let mut out = Vec::new();
            prop_assert!(difference(&old, &new, 2 * PAGE, &mut out));
            let mut made = old;
            apply(&out, &mut made).unwrap();
            prop_assert!(made == new);
        }

        #[test]
        fn any_bytes_are_applied_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = apply(&bytes, &mut [0; PAGE]);
        }
    }
}
