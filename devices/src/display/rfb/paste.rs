//! Text that a client's user has cut, on its way to being typed into the guest letter by letter.

use std::collections::VecDeque;
use std::time::Duration;

/// The letters of a text that are typed; the rest is passed over.
pub const MAX_PASTE: usize = 4096;
/// The time between two letters: a guest that is given more at once loses some.
pub const LETTER: Duration = Duration::from_millis(10);

/// X symbols of the keys that make an end of line and a tabulator.
const RETURN: u32 = 0xff0d;
const TAB: u32 = 0xff09;

/// What is still to be typed of one text. While it is, others are passed over.
#[derive(Debug, Default)]
pub struct Paste {
    letters: VecDeque<u8>,
    /// Letters of the text that comes which are still taken.
    room: usize,
    due: Duration,
}

impl Paste {
    /// A text begins.
    pub fn begin(&mut self) {
        self.room = if self.letters.is_empty() {
            MAX_PASTE
        } else {
            0
        };
    }

    /// More of the text, in Latin-1 (RFC 6143, section 7.5.6).
    pub fn add(&mut self, text: &[u8]) {
        let taken = text.len().min(self.room);
        self.room -= taken;
        self.letters.extend(text.iter().take(taken));
    }

    /// When the next letter is due.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        (!self.letters.is_empty()).then_some(self.due)
    }

    /// The X symbol of the letter that is due.
    pub fn next(&mut self, now: Duration) -> Option<u32> {
        self.due().filter(|due| *due <= now)?;
        self.due = now.saturating_add(LETTER);
        loop {
            match self.letters.pop_front()? {
                // The end of a line is told by what follows.
                b'\r' => {}
                b'\n' => return Some(RETURN),
                b'\t' => return Some(TAB),
                letter => return Some(letter.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(paste: &mut Paste, from: Duration) -> Vec<u32> {
        let mut symbols = Vec::new();
        let mut now = from;
        while paste.due().is_some() {
            symbols.extend(paste.next(now));
            now += LETTER;
        }
        symbols
    }

    #[test]
    fn letters_come_one_by_one_in_time() {
        let mut paste = Paste::default();
        assert_eq!((paste.due(), paste.next(LETTER)), (None, None));
        paste.begin();
        paste.add(b"a\r");
        paste.add(b"\n\tb");
        let now = Duration::from_secs(5);
        assert_eq!(paste.next(now), Some(u32::from('a')));
        assert_eq!(paste.next(now), None, "it is too early");
        assert_eq!(paste.due(), Some(now + LETTER));
        let rest = [RETURN, TAB, u32::from('b')];
        assert_eq!(typed(&mut paste, now + LETTER), rest);
    }

    #[test]
    fn long_texts_are_cut_and_others_wait_for_no_end() {
        let mut paste = Paste::default();
        paste.begin();
        paste.add(&[b'a'; MAX_PASTE - 1]);
        paste.add(&[b'b'; 100]);
        paste.begin();
        paste.add(b"passed over");
        let symbols = typed(&mut paste, Duration::ZERO);
        assert_eq!(symbols.len(), MAX_PASTE);
        assert_eq!(symbols.last(), Some(&u32::from('b')));
        paste.begin();
        paste.add(b"c");
        assert_eq!(typed(&mut paste, Duration::from_secs(60)), [u32::from('c')]);
    }
}
