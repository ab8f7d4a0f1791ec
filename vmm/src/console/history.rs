//! The last of a guest's output, kept once for all who are still to get it.
//!
//! Every byte has a place: how many were written before it. A reader is a
//! place; what it has not got yet is what comes after. So a slow reader costs
//! no buffer of its own, and one that comes late begins further back.

use std::collections::VecDeque;

/// The most that waits for slow readers, in bytes. Of more, they miss the oldest.
pub const MOST_WAITING: usize = 1 << 20;

/// Up to here, what was allocated for a slow reader is not given back.
const SMALL: usize = 8 << 10;

/// The kept output.
#[derive(Debug)]
pub struct History {
    bytes: VecDeque<u8>,
    end: u64,
    keep: usize,
}

impl History {
    /// Keeps the last `keep` bytes when nobody needs more.
    #[must_use]
    pub fn new(keep: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            end: 0,
            keep,
        }
    }

    /// The place after the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The place of the first byte that is kept.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.end - count(self.bytes.len())
    }

    /// Where one begins who comes late.
    #[must_use]
    pub fn replay_start(&self) -> u64 {
        self.start().max(self.end.saturating_sub(count(self.keep)))
    }

    /// Adds output. `needed` is the place of the first byte that a reader is
    /// still to get; at most [`MOST_WAITING`] bytes are kept for that.
    pub fn push(&mut self, bytes: &[u8], needed: u64) {
        self.make_room(bytes.len(), needed);
        self.bytes.extend(bytes);
        self.end += count(bytes.len());
    }

    /// Forgets what `needed`, as in [`History::push`], does not need any more.
    pub fn trim(&mut self, needed: u64) {
        self.make_room(0, needed);
        if self.bytes.len() <= self.keep && self.bytes.capacity() > SMALL.max(2 * self.keep) {
            self.bytes.shrink_to(self.keep);
        }
    }

    /// What follows `place`, as far as it lies in one piece; empty at the end.
    #[must_use]
    pub fn piece(&self, place: u64) -> &[u8] {
        let skip = usize::try_from(place.saturating_sub(self.start())).unwrap_or(usize::MAX);
        let (first, second) = self.bytes.as_slices();
        match first.get(skip..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => second
                .get(skip.saturating_sub(first.len())..)
                .unwrap_or_default(),
        }
    }

    fn make_room(&mut self, coming: usize, needed: u64) {
        let end = self.end + count(coming);
        let most = count(self.keep.max(MOST_WAITING));
        let first = needed
            .min(end.saturating_sub(count(self.keep)))
            .max(end.saturating_sub(most));
        let gone = usize::try_from(first.saturating_sub(self.start())).unwrap_or(usize::MAX);
        self.bytes.drain(..gone.min(self.bytes.len()));
    }
}

/// A length as a number of places.
pub fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that follows `place`.
    fn rest(history: &History, place: u64) -> Vec<u8> {
        let mut place = place.max(history.start());
        let mut all = Vec::new();
        loop {
            let piece = history.piece(place);
            if piece.is_empty() {
                return all;
            }
            all.extend_from_slice(piece);
            place += count(piece.len());
        }
    }

    #[test]
    fn the_last_bytes_are_kept_in_order() {
        let mut history = History::new(5);
        for text in ["ab", "cdef", "g", "h"] {
            let needed = history.end() + count(text.len());
            history.push(text.as_bytes(), needed);
        }
        assert_eq!((history.start(), history.end()), (3, 8));
        assert_eq!(rest(&history, history.replay_start()), b"defgh");
        assert_eq!(rest(&history, 6), b"gh");
        assert_eq!(rest(&history, 8), b"");
        // What is gone is not made up.
        assert_eq!(rest(&history, 0), b"defgh");
    }

    #[test]
    fn what_a_reader_still_needs_stays_and_a_late_one_does_not_get_it() {
        let mut history = History::new(2);
        history.push(b"abcdef", 0);
        history.push(b"gh", 1);
        assert_eq!(rest(&history, 1), b"bcdefgh");
        assert_eq!(rest(&history, history.replay_start()), b"gh");
        history.trim(history.end());
        assert_eq!(history.start(), 6);
    }

    #[test]
    fn one_who_never_reads_costs_a_bounded_amount() {
        let mut history = History::new(0);
        for _ in 0..MOST_WAITING / 1000 * 3 {
            history.push(&[7; 1000], 0);
        }
        assert_eq!(history.end() - history.start(), count(MOST_WAITING));
        history.trim(history.end());
        assert_eq!(history.start(), history.end());
        assert!(history.bytes.capacity() <= SMALL);
    }

    #[test]
    fn the_kept_bytes_take_their_own_room_and_no_more() {
        let mut history = History::new(64 << 10);
        for n in 0..200_000u64 {
            history.push(b"x", n + 1);
        }
        assert_eq!(history.bytes.len(), 64 << 10);
        assert_eq!(history.bytes.capacity(), 64 << 10);
    }
}
