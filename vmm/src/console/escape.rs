//! The escape key of an interactive console.

/// What starts an escape: Ctrl-a, as in QEMU and screen.
const ESCAPE: u8 = 0x01;

/// What the user asked for with an escape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Ctrl-a x, or what else the filter leaves on: end the machine, or leave it.
    Quit,
    /// Ctrl-a h: say which escapes there are.
    Help,
}

/// Finds escapes in typed input, over any division into pieces.
#[derive(Debug)]
pub struct EscapeFilter {
    after_escape: bool,
    /// The keys that mean [`Escape::Quit`] behind Ctrl-a.
    leave: &'static [u8],
}

impl Default for EscapeFilter {
    fn default() -> Self {
        Self::leaving_on(b"xX")
    }
}

impl EscapeFilter {
    /// One for which Ctrl-a and any of `keys` is [`Escape::Quit`].
    #[must_use]
    pub fn leaving_on(keys: &'static [u8]) -> Self {
        Self {
            after_escape: false,
            leave: keys,
        }
    }

    /// Appends to `guest` what is meant for the guest, and returns the first
    /// escape found; the rest of `typed` is then dropped with a quit, kept otherwise.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Option<Escape> {
        let mut found = None;
        for &byte in typed {
            if !self.after_escape {
                self.after_escape = byte == ESCAPE;
                if byte != ESCAPE {
                    guest.push(byte);
                }
                continue;
            }
            self.after_escape = false;
            match byte {
                key if self.leave.contains(&key) => return Some(Escape::Quit),
                b'h' | b'H' | b'?' => found = Some(Escape::Help),
                b'a' | ESCAPE => guest.push(ESCAPE),
                other => guest.extend([ESCAPE, other]),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(pieces: &[&[u8]]) -> (Vec<u8>, Option<Escape>) {
        let (mut filter, mut guest, mut found) = (EscapeFilter::default(), Vec::new(), None);
        for piece in pieces {
            found = found.or(filter.filter(piece, &mut guest));
        }
        (guest, found)
    }

    #[test]
    fn ordinary_input_passes_unchanged() {
        assert_eq!(
            feed(&[b"ls -l\r\x03\xff"]),
            (b"ls -l\r\x03\xff".to_vec(), None)
        );
    }

    #[test]
    fn quit_is_found_across_pieces_and_drops_what_follows() {
        assert_eq!(
            feed(&[b"a\x01", b"xb"]),
            (b"a".to_vec(), Some(Escape::Quit))
        );
    }

    #[test]
    fn the_escape_key_itself_is_sent_by_doubling_it() {
        assert_eq!(feed(&[b"\x01a\x01\x01"]), (vec![1, 1], None));
        assert_eq!(feed(&[b"\x01q"]), (vec![1, b'q'], None));
    }

    #[test]
    fn a_filter_leaves_on_its_own_keys() {
        let mut guest = Vec::new();
        let mut filter = EscapeFilter::leaving_on(b"d");
        assert_eq!(filter.filter(b"\x01x", &mut guest), None);
        assert_eq!(filter.filter(b"\x01d", &mut guest), Some(Escape::Quit));
        assert_eq!(guest, b"\x01x");
    }

    #[test]
    fn help_keeps_what_follows() {
        assert_eq!(feed(&[b"\x01hok"]), (b"ok".to_vec(), Some(Escape::Help)));
    }
}
