//! How much room a call offers the network.
//!
//! The host goes through all pieces of memory that a call lends, used or not: for the longest frame that may come those are
//! forty and more, and a frame of the usual length needs one. So after many short frames in a row a call lends room for a short one
//! alone, with the spare room behind it. A long one that comes then is copied out of there once, and from then on all is lent again.

/// What is lent for short frames, in bytes. One piece covers it, or two.
pub const SHORT: usize = 2048;

/// As many short frames in a row have the next one be expected short. A long frame costs a copy when it was not
/// expected, so they are many.
const PROOF: u32 = 64;

/// What frame is expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Short frames in a row, no more than [`PROOF`].
    short: u32,
}

impl Reach {
    /// How many bytes of room the next call is to lend at least; `None`: all there is.
    pub fn room(self) -> Option<usize> {
        (self.short >= PROOF).then_some(SHORT)
    }

    /// A frame has come that is so long with its header.
    pub fn came(&mut self, len: usize) {
        self.short = if len <= SHORT {
            self.short.saturating_add(1).min(PROOF)
        } else {
            0
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_frames_are_expected_after_many_of_them_and_no_more_after_a_long_one() {
        let mut reach = Reach::default();
        for _ in 0..PROOF {
            assert_eq!(reach.room(), None);
            reach.came(SHORT);
        }
        assert_eq!(reach.room(), Some(SHORT));
        reach.came(60);
        assert_eq!(reach.room(), Some(SHORT));
        reach.came(SHORT + 1);
        assert_eq!(reach.room(), None);
        for _ in 1..PROOF {
            reach.came(60);
            assert_eq!(reach.room(), None);
        }
        reach.came(60);
        assert_eq!(reach.room(), Some(SHORT));
    }
}
