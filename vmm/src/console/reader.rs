//! Who gets the guest's output through a descriptor: a terminal, a pipe, a client.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use super::history::{History, count};
use crate::machine::driver::ppoll;

/// A pipe that is writable takes this much without blocking (`PIPE_BUF`).
const PIECE: usize = 4096;

/// How many pieces are written before others have their turn.
const PIECES: usize = 16;

/// How long the end of the process waits for a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manners {
    /// It may be a pager: as long as it wants.
    Patient,
    /// It is a terminal: as long as it goes on reading.
    Steady,
    /// It is whoever has connected: a moment.
    Brief,
}

/// A descriptor that output is written to, without ever waiting for it.
pub struct Reader {
    file: Arc<File>,
    manners: Manners,
    is_socket: bool,
    /// The place of the next byte that it gets.
    place: u64,
    lost: u64,
    gone: bool,
}

impl Reader {
    /// One that gets what follows `place`. Where `file` may block, it is
    /// written to only while it is writable.
    #[must_use]
    pub fn new(file: Arc<File>, manners: Manners, place: u64) -> Self {
        let is_socket = file.metadata().is_ok_and(|m| m.file_type().is_socket());
        Self {
            file,
            manners,
            is_socket,
            place,
            lost: 0,
            gone: false,
        }
    }

    /// What the end of the process does about it.
    #[must_use]
    pub fn manners(&self) -> Manners {
        self.manners
    }

    /// Whether output waits for it.
    #[must_use]
    pub fn lags(&self, history: &History) -> bool {
        !self.gone && self.place < history.end()
    }

    /// How much output waits for it.
    #[must_use]
    pub fn waiting(&self, history: &History) -> u64 {
        if self.gone {
            return 0;
        }
        history.end() - self.place.max(history.start())
    }

    /// How much of the output it has missed because it was too slow.
    #[must_use]
    pub fn lost(&self, history: &History) -> u64 {
        if self.gone {
            return self.lost;
        }
        self.lost
            .saturating_add(history.start().saturating_sub(self.place))
    }

    /// The place of the first byte that it is still to get, if it is there.
    #[must_use]
    pub fn needs(&self) -> Option<u64> {
        (!self.gone).then_some(self.place)
    }

    /// Whether nobody will ever read again.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// The descriptor to wait on until it is writable.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Nobody will read what is written from now on.
    pub fn leave(&mut self) {
        self.gone = true;
    }

    /// Writes some of what waits, as far as it is taken now; whether any was.
    pub fn advance(&mut self, history: &History) -> bool {
        self.lost = self.lost(history);
        self.place = self.place.max(history.start());
        let before = self.place;
        for _ in 0..PIECES {
            let piece = history.piece(self.place);
            let piece = piece.get(..piece.len().min(PIECE)).unwrap_or_default();
            if self.gone || piece.is_empty() {
                break;
            }
            match self.write(piece) {
                Ok(written) => self.place += count(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // A reader that leaves is no news; a file that takes no more is.
                    if !self.is_socket && error.kind() != io::ErrorKind::BrokenPipe {
                        tracing::warn!("a console's output is written there no more: {error}");
                    }
                    self.gone = true;
                }
            }
        }
        self.gone || self.place > before
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_socket {
            return send(&self.file, bytes);
        }
        let mut fds = [libc::pollfd {
            fd: self.file.as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        }];
        ppoll(&mut fds, Some(Duration::ZERO))?;
        if fds[0].revents == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        (&*self.file).write(bytes)
    }
}

/// Writes to a socket that may be a blocking one, as standard output can be,
/// without waiting.
fn send(socket: &File, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the buffer is as long as stated.
    #[expect(unsafe_code, reason = "send is a system call")]
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            flags,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests;
