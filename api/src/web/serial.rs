//! A browser's terminal at the serial console.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::SerialLine;
use super::client::Gone;
use super::socket::WebSocket;
use super::stream::is_for_later;

/// Bytes that are moved at a time.
const PIECE: usize = 4 << 10;
/// How often each direction is served before others are.
const ROUNDS: usize = 4;
/// How long a browser may read nothing of what it is sent.
const STALLED: Duration = Duration::from_secs(30);

/// A WebSocket and the console, joined. What one side does not read makes the other wait; the guest never does.
#[derive(Debug)]
pub(super) struct Serial {
    socket: WebSocket,
    console: UnixStream,
    /// How much of the output is of before, until that has been told.
    replayed: Option<u32>,
    /// What is typed and not taken yet.
    typed: Vec<u8>,
    /// When it was last sent something.
    since: Instant,
}

impl Serial {
    pub fn new(socket: WebSocket, line: SerialLine, now: Instant) -> io::Result<Self> {
        let SerialLine { stream, replayed } = line;
        stream.set_nonblocking(true)?;
        Ok(Self {
            socket,
            console: stream,
            replayed: Some(replayed),
            typed: Vec::new(),
            since: now,
        })
    }

    /// What to wait for. A side from which nothing is wanted is left out: it would tell of its end again and again.
    pub fn interests(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let flags = |reads, writes| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, reads);
            flags.set(PollFlags::OUT, writes);
            flags
        };
        let (waits, held) = (!self.typed.is_empty(), self.socket.holds_back());
        [
            (self.socket.as_fd(), flags(!waits, held)),
            (self.console.as_fd(), flags(!held, waits)),
        ]
        .into_iter()
        .filter(|(_, flags)| !flags.is_empty())
    }

    /// When the browser has had enough time, if it is waited for.
    pub fn deadline(&self) -> Option<Instant> {
        self.socket.holds_back().then(|| self.since + STALLED)
    }

    /// Moves what can be moved. Whether there may be more.
    pub fn pump(&mut self, now: Instant) -> Result<bool, Gone> {
        let mut bytes = [0; PIECE];
        let mut moved = false;
        for _ in 0..ROUNDS {
            moved = false;
            if let Err(error) = self.socket.flush()
                && !is_for_later(&error)
            {
                return Err(error.into());
            }
            if self.typed.is_empty() {
                match self.socket.read(&mut bytes) {
                    Ok(0) => return Err(Gone),
                    Ok(count) => self.typed.extend(bytes.iter().take(count)),
                    Err(error) if is_for_later(&error) => (),
                    Err(error) => return Err(error.into()),
                }
            }
            if !self.typed.is_empty() {
                match self.console.write(&self.typed) {
                    Ok(count) => {
                        self.typed.drain(..count.min(self.typed.len()));
                        moved = true;
                    }
                    Err(error) if is_for_later(&error) => (),
                    Err(error) => return Err(error.into()),
                }
            }
            if !self.socket.holds_back() {
                self.since = now;
                // In a message of its own. Nothing is held back, so that it is taken whole.
                if let Some(replayed) = self.replayed.take() {
                    self.socket.write_all(&replayed.to_be_bytes())?;
                    moved = true;
                    continue;
                }
                match self.console.read(&mut bytes) {
                    Ok(0) => return Err(Gone),
                    Ok(count) => {
                        // Nothing is held back, so that it takes all.
                        self.socket
                            .write_all(bytes.get(..count).unwrap_or_default())?;
                        moved = true;
                    }
                    Err(error) if is_for_later(&error) => (),
                    Err(error) => return Err(error.into()),
                }
            }
            if !moved {
                break;
            }
        }
        Ok(moved || (self.typed.is_empty() && self.socket.is_ahead()))
    }
}
