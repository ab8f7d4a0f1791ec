//! Where a guest's characters go: a writer that can hold up no guest.
//!
//! A guest writes its console one character at a time from a vCPU thread. If
//! the host's end is full, slow or gone, the character is dropped and counted;
//! the guest never sees it and never waits. Nothing is buffered here, so an
//! interactive user sees each character at once and a flood costs no memory.

use std::io::{self, ErrorKind, Write};

/// How often a write that a signal interrupted is tried again. vCPU threads
/// are kicked by signals, so one or two in a row happen; more is a storm.
const INTERRUPTED_LIMIT: u32 = 8;

/// A writer that never fails: what its host end does not take at once is dropped.
///
/// It is called on vCPU threads. The host end must not block: give it a file
/// descriptor with `O_NONBLOCK`, or a writer that queues within a bound.
pub struct LossyOutput {
    owner: String,
    sink: Box<dyn Write + Send>,
    dropped: u64,
}

impl LossyOutput {
    /// Wraps the host end `sink` of the device named `owner` (for the log).
    #[must_use]
    pub fn new(owner: impl Into<String>, sink: Box<dyn Write + Send>) -> Self {
        Self {
            owner: owner.into(),
            sink,
            dropped: 0,
        }
    }

    /// Hands over `bytes`, dropping what the host end does not take now.
    pub fn put(&mut self, mut bytes: &[u8]) {
        let mut interrupted = 0;
        while !bytes.is_empty() {
            match self.sink.write(bytes) {
                Ok(0) => return self.drop_bytes(bytes.len(), &ErrorKind::WriteZero.into()),
                Ok(taken) => bytes = bytes.get(taken..).unwrap_or_default(),
                Err(error)
                    if error.kind() == ErrorKind::Interrupted
                        && interrupted < INTERRUPTED_LIMIT =>
                {
                    interrupted += 1;
                }
                Err(error) => return self.drop_bytes(bytes.len(), &error),
            }
        }
        // The bytes are with the host end; whether it could pass them on
        // further says nothing about which of them are lost.
        let _ = self.sink.flush();
    }

    /// How many bytes have been dropped since the device was built.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Counts, and logs at 1, 2, 4, 8, … drops so that no guest floods the log.
    #[cold]
    fn drop_bytes(&mut self, count: usize, error: &io::Error) {
        let before = self.dropped;
        self.dropped = before.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        if self.dropped.leading_zeros() < before.leading_zeros() {
            tracing::warn!(
                device = self.owner,
                dropped = self.dropped,
                %error,
                "guest output was dropped",
            );
        }
    }
}

/// For users that want a [`Write`]; every call succeeds.
impl Write for LossyOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.put(bytes);
        Ok(bytes.len())
    }

    /// Does nothing: [`LossyOutput::put`] has flushed.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    /// Takes what it is told to take, and shows what it got.
    #[derive(Clone, Default)]
    pub(crate) struct Script(Arc<Mutex<Host>>);

    #[derive(Default)]
    struct Host {
        text: Vec<u8>,
        results: VecDeque<io::Result<usize>>,
    }

    impl Script {
        pub(crate) fn with(results: impl IntoIterator<Item = io::Result<usize>>) -> Self {
            Self(Arc::new(Mutex::new(Host {
                text: Vec::new(),
                results: results.into_iter().collect(),
            })))
        }

        pub(crate) fn text(&self) -> Vec<u8> {
            self.0.lock().unwrap().text.clone()
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut host = self.0.lock().unwrap();
            let taken = host.results.pop_front().unwrap_or(Ok(bytes.len()))?;
            host.text.extend_from_slice(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(ErrorKind::Other.into())
        }
    }

    #[test]
    fn bytes_that_find_the_host_end_full_are_dropped_and_counted() {
        let host = Script::with([Ok(1), Err(ErrorKind::WouldBlock.into())]);
        let mut output = LossyOutput::new("test", Box::new(host.clone()));
        output.put(b"abc");
        assert_eq!(output.dropped(), 2);
        output.put(b"d");
        assert_eq!((output.dropped(), host.text()), (2, b"ad".to_vec()));
    }

    #[test]
    fn an_interrupted_write_is_tried_again_but_not_for_ever() {
        let storm = |count| (0..count).map(|_| Err(ErrorKind::Interrupted.into()));
        let host = Script::with(storm(2));
        let mut output = LossyOutput::new("test", Box::new(host.clone()));
        output.put(b"a");
        assert_eq!((output.dropped(), host.text()), (0, b"a".to_vec()));
        let mut output = LossyOutput::new("test", Box::new(Script::with(storm(100))));
        output.put(b"a");
        assert_eq!(output.dropped(), 1);
    }

    #[test]
    fn a_host_end_that_takes_nothing_ends_the_write() {
        let mut output = LossyOutput::new("test", Box::new(Script::with([Ok(0)])));
        output.put(b"ab");
        assert_eq!(output.dropped(), 2);
    }
}
