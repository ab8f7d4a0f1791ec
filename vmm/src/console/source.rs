//! Who types: a terminal, a pipe, a client.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use super::escape::{Escape, EscapeFilter};

/// How much input is read at once; from a pipe or a client, also the most that waits.
pub const INPUT_CHUNK: usize = 4096;

/// The most that waits of what is typed on a terminal, which is read on
/// because an escape may follow: a large paste.
const MOST_TYPED: usize = 1 << 20;

/// Where input comes from.
pub struct Source {
    file: Arc<File>,
    /// Escapes are looked for on a terminal only: a pipe is passed on as it is.
    escapes: Option<EscapeFilter>,
    /// Typed; of this, the guest has taken the first `taken` bytes.
    typed: Vec<u8>,
    taken: usize,
}

impl Source {
    /// A pipe, a pseudo-terminal or a client: what comes is passed on as it is,
    /// and waits there while the guest takes none.
    #[must_use]
    pub fn plain(file: Arc<File>) -> Self {
        Self {
            file,
            escapes: None,
            typed: Vec::new(),
            taken: 0,
        }
    }

    /// A terminal with a person at it: always read, because the escape that
    /// ends the machine must be heard although the guest takes nothing.
    #[must_use]
    pub fn terminal(file: Arc<File>) -> Self {
        Self {
            escapes: Some(EscapeFilter::default()),
            ..Self::plain(file)
        }
    }

    /// What to read from.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether a person types.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.escapes.is_some()
    }

    /// Whether to read on.
    #[must_use]
    pub fn wants_more(&self) -> bool {
        self.is_terminal() || self.pending().is_empty()
    }

    /// Takes what has been read; the first escape in it. Of what is typed
    /// on a terminal at a guest that takes nothing, the first MiB is kept.
    pub fn typed(&mut self, bytes: &[u8]) -> Option<Escape> {
        self.typed.drain(..self.taken);
        self.taken = 0;
        match &mut self.escapes {
            None => {
                self.typed.extend_from_slice(bytes);
                None
            }
            Some(filter) => {
                let escape = filter.filter(bytes, &mut self.typed);
                self.typed.truncate(MOST_TYPED);
                escape
            }
        }
    }

    /// What has been typed and not been taken.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        self.typed.get(self.taken..).unwrap_or_default()
    }

    /// The guest has taken the first `len` bytes of what is pending.
    pub fn take(&mut self, len: usize) {
        self.taken = (self.taken + len).min(self.typed.len());
        if self.taken == self.typed.len() {
            self.typed.clear();
            self.taken = 0;
        }
    }
}

/// Reads once what is there; `None` when nothing will ever come again.
pub fn read(mut file: &File, to: &mut [u8; INPUT_CHUNK]) -> Option<usize> {
    match file.read(to) {
        Ok(0) => None,
        Ok(len) => Some(len),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
            ) =>
        {
            Some(0)
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Arc<File> {
        Arc::new(tempfile::tempfile().unwrap())
    }

    #[test]
    fn a_pipe_waits_until_the_guest_has_taken_all() {
        let mut source = Source::plain(file());
        assert!(source.wants_more());
        assert_eq!(source.typed(b"a\x01xb"), None);
        assert!(!source.wants_more());
        source.take(3);
        assert_eq!(source.pending(), b"b");
        assert!(!source.wants_more());
        source.take(1);
        assert!(source.wants_more());
    }

    #[test]
    fn a_terminal_is_read_on_and_keeps_the_first_mebibyte() {
        let mut source = Source::terminal(file());
        for _ in 0..300 {
            assert_eq!(source.typed(&[b'a'; INPUT_CHUNK]), None);
            assert!(source.wants_more());
        }
        assert_eq!(source.pending().len(), MOST_TYPED);
        source.take(1000);
        assert_eq!(source.typed(&[b'b'; INPUT_CHUNK]), None);
        assert_eq!(source.pending().len(), MOST_TYPED);
        assert!(source.pending().ends_with(&[b'b'; 1000]));
        assert_eq!(source.typed(b"\x01x"), Some(Escape::Quit));
    }
}
