//! Output that neither blocks the guest nor is lost while a reader is slow.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::machine::driver::ppoll;

/// The most output that waits for a slow reader; what comes after is refused.
const BACKLOG: usize = 1 << 20;
/// A pipe that is writable takes this much without blocking (`PIPE_BUF`).
const PIECE: usize = 4096;

/// Called when output has begun to wait; it must not block.
pub type OnBacklog = Arc<dyn Fn() + Send + Sync>;

/// A terminal, pseudo-terminal or pipe that a guest writes to. Clones share it.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    file: File,
    backlog: Mutex<Vec<u8>>,
    on_backlog: OnBacklog,
}

impl Output {
    /// Output to `file`. `on_backlog` asks for [`Output::drain`] to be called
    /// once [`Output::as_fd`] is writable.
    #[must_use]
    pub fn new(file: File, on_backlog: OnBacklog) -> Self {
        Self(Arc::new(Shared {
            file,
            backlog: Mutex::default(),
            on_backlog,
        }))
    }

    /// Whether output waits for the reader.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.backlog().is_empty()
    }

    /// The descriptor to wait on until it is writable.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }

    /// Writes what waits, as far as the reader takes it now.
    pub fn drain(&self) {
        let mut backlog = self.backlog();
        while !backlog.is_empty() && self.writable(Duration::ZERO) {
            let piece = backlog.len().min(PIECE);
            match (&self.0.file).write(backlog.get(..piece).unwrap_or_default()) {
                Ok(written) => drop(backlog.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The reader is gone: nobody will ever take it.
                Err(_) => backlog.clear(),
            }
        }
    }

    /// Writes what waits at the end of the machine's life, as long as the
    /// reader takes some of it within each `patience`.
    pub fn finish(&self, patience: Duration) {
        let mut before = usize::MAX;
        loop {
            let left = self.backlog().len();
            if left == 0 || left == before || !self.writable(patience) {
                return;
            }
            before = left;
            self.drain();
        }
    }

    /// Whether a person reads it, as opposed to a program.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.0.file.is_terminal()
    }

    fn writable(&self, patience: Duration) -> bool {
        let mut fds = [libc::pollfd {
            fd: self.0.file.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        }];
        ppoll(&mut fds, Some(patience)).is_ok() && fds[0].revents != 0
    }

    fn backlog(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0
            .backlog
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut backlog = self.backlog();
        if backlog.is_empty() && self.writable(Duration::ZERO) {
            let piece = bytes.len().min(PIECE);
            match (&self.0.file).write(bytes.get(..piece).unwrap_or_default()) {
                // A terminal may have room, but not enough for a line's end.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
                written => return written,
            }
        }
        let room = BACKLOG.saturating_sub(backlog.len());
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let first = backlog.is_empty();
        let taken = bytes.len().min(room);
        backlog.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        drop(backlog);
        if first {
            (self.0.on_backlog)();
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn pipe() -> (File, Output, Arc<AtomicUsize>) {
        let (reader, writer) = io::pipe().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&asked);
        let output = Output::new(
            File::from(OwnedFd::from(writer)),
            Arc::new(move || {
                counter.fetch_add(1, Ordering::SeqCst);
            }),
        );
        (File::from(OwnedFd::from(reader)), output, asked)
    }

    #[test]
    fn a_reader_that_is_slow_misses_nothing_and_blocks_nobody() {
        let (mut reader, mut output, asked) = pipe();
        let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0]).collect();
        output.write_all(&sent).unwrap();
        assert!(output.is_waiting());
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            output.drain();
            let mut chunk = [0; 65536];
            let read = reader.read(&mut chunk).unwrap();
            got.extend_from_slice(&chunk[..read]);
        }
        assert_eq!(got, sent);
        assert!(!output.is_waiting());
    }

    #[test]
    fn what_nobody_reads_is_bounded() {
        let (_reader, mut output, _) = pipe();
        let error = loop {
            if let Err(error) = output.write(&[0; PIECE]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(output.backlog().len() <= BACKLOG);
    }

    #[test]
    fn a_pseudo_terminal_that_is_full_loses_nothing() {
        let (near, far, _) = crate::console::open_pty().unwrap();
        let mut output = Output::new(near, Arc::new(|| ()));
        let sent: Vec<u8> = (0..200_000u32).map(|n| n.to_le_bytes()[0]).collect();
        for piece in sent.chunks(1000) {
            output.write_all(piece).unwrap();
        }
        assert!(output.is_waiting());
        let mut far = File::from(far);
        let mut got = Vec::new();
        while got.len() < sent.len() {
            output.drain();
            let mut chunk = [0; 4096];
            let read = far.read(&mut chunk).unwrap();
            got.extend_from_slice(&chunk[..read]);
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn a_terminal_that_has_room_for_half_a_line_end_loses_none() {
        use std::os::unix::fs::OpenOptionsExt;
        // A line's end takes two places; one is left with one of these.
        for first in ["", "x"] {
            let (near, far, path) = crate::console::open_pty().unwrap();
            let cooked = ["-F", &path, "opost", "onlcr"];
            let stty = std::process::Command::new("stty").args(cooked).status();
            assert!(stty.unwrap().success());
            let terminal = std::fs::OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path)
                .unwrap();
            drop(far);
            let mut output = Output::new(terminal, Arc::new(|| ()));
            output.write_all(first.as_bytes()).unwrap();
            for _ in 0..100_000 {
                output.write_all(b"\n").unwrap();
            }
            assert!(output.is_waiting());
            let mut got = 0;
            while got < first.len() + 200_000 {
                output.drain();
                let mut chunk = [0; 4096];
                match (&near).read(&mut chunk) {
                    Ok(read) => got += read,
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                }
            }
            assert!(!output.is_waiting());
        }
    }

    #[test]
    fn a_reader_that_takes_nothing_ends_the_waiting_too() {
        let (_reader, mut output, _) = pipe();
        output.write_all(&[0; 200_000]).unwrap();
        output.finish(Duration::ZERO);
        assert!(output.is_waiting());
    }

    #[test]
    fn a_reader_that_went_away_ends_the_waiting() {
        let (reader, mut output, _) = pipe();
        output.write_all(&[0; 200_000]).unwrap();
        drop(reader);
        output.finish(Duration::from_secs(5));
        assert!(!output.is_waiting());
    }
}
