//! One connection in the transmission phase: many commands at once, sent and answered
//! without ever blocking.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use crate::buffers::IoVec;
use crate::buffers::for_window;

use super::reply::{Replies, ReplyError};
use super::slots::{Command, Ended, Slots};
use super::socket::{MAX_PIECES, Ready, Socket};
use super::wire::{self, Kind, REQUEST_LEN};

/// The most commands in one system call.
const MAX_BATCH: usize = 64;

/// Why a connection has come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the server closed the connection")]
    Closed,
    #[error("the connection failed: {source}")]
    Io { source: io::Error },
    #[error("the server broke the protocol: {source}")]
    Reply { source: ReplyError },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server did not answer in time")]
    TimedOut,
}

impl From<ReplyError> for LinkError {
    fn from(source: ReplyError) -> Self {
        match source {
            ReplyError::ShuttingDown => Self::ShuttingDown,
            source => Self::Reply { source },
        }
    }
}

/// The connection.
#[derive(Debug)]
pub(super) struct Link {
    socket: Socket,
    slots: Slots,
    /// Not all sent yet, in order.
    unsent: VecDeque<usize>,
    /// How much of the first of those has been.
    sent: u64,
    /// There was no room in the socket for more.
    blocked: bool,
    replies: Replies,
    failed: bool,
    ended: Vec<Ended>,
    pieces: Vec<IoVec>,
    headers: Vec<[u8; REQUEST_LEN]>,
}

impl Link {
    /// A connection that has entered the transmission phase.
    pub(super) fn new(socket: Socket, structured: bool) -> Self {
        Self {
            socket,
            slots: Slots::default(),
            unsent: VecDeque::new(),
            sent: 0,
            blocked: false,
            replies: Replies::new(structured),
            failed: false,
            ended: Vec::new(),
            pieces: Vec::new(),
            headers: Vec::new(),
        }
    }

    /// Takes a command, to be sent by [`Link::send`]. On a connection that has failed it ends at once.
    ///
    /// The command's data stays in use until it has ended, or this is dropped.
    pub(super) fn start(&mut self, command: Command) {
        if self.failed {
            self.ended.push(lost(&command));
        } else {
            self.unsent.push_back(self.slots.insert(command));
        }
    }

    /// Sends as much as there is room for.
    ///
    /// # Errors
    ///
    /// Why the connection failed, once; all commands have ended then.
    pub(super) fn send(&mut self) -> Result<(), LinkError> {
        match self.send_all() {
            Err(error) if !self.failed => {
                // It may have said why before it hung up.
                Err(match self.receive_all() {
                    Ok(()) => self.fail(error),
                    Err(reason) => self.fail(reason),
                })
            }
            _ => Ok(()),
        }
    }

    /// Reads all answers that are there.
    ///
    /// # Errors
    ///
    /// As [`Link::send`].
    pub(super) fn receive(&mut self) -> Result<(), LinkError> {
        match self.receive_all() {
            Err(error) if !self.failed => Err(self.fail(error)),
            _ => Ok(()),
        }
    }

    /// Ends the connection, and all commands with it.
    pub(super) fn fail(&mut self, error: LinkError) -> LinkError {
        if matches!(error, LinkError::ShuttingDown) && self.sent == 0 {
            self.take_leave();
        }
        self.failed = true;
        self.blocked = false;
        self.socket.shut_down();
        self.unsent.clear();
        self.ended
            .extend(self.slots.drain().map(|command| lost(&command)));
        error
    }

    /// Takes the commands that have ended.
    pub(super) fn take_ended(&mut self) -> std::vec::Drain<'_, Ended> {
        self.ended.drain(..)
    }

    /// Whether it has failed.
    pub(super) fn failed(&self) -> bool {
        self.failed
    }

    /// Whether it waits for room to send.
    pub(super) fn blocked(&self) -> bool {
        self.blocked
    }

    /// Waits until there is something to do.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> io::Result<()> {
        let ready = if self.blocked {
            Ready::Either
        } else {
            Ready::Read
        };
        self.socket.wait(ready, deadline)
    }

    /// Tells the server so, if that is possible without waiting. Closing alone does as well, only less politely.
    fn take_leave(&self) {
        let bytes = wire::disconnect();
        let piece = IoVec {
            base: bytes.as_ptr().cast_mut(),
            len: bytes.len(),
        };
        let _ = self.socket.send(&[piece]);
    }

    /// Forgets the front of the queue as far as it has been sent.
    fn account(&mut self, count: u64) {
        self.sent = self.sent.saturating_add(count);
        while let Some(&index) = self.unsent.front() {
            let slot = self.slots.get_mut(index);
            let weight = slot.as_ref().map_or(0, |slot| slot.weight());
            if self.sent < weight {
                return;
            }
            if let Some(slot) = slot {
                slot.sent = true;
            }
            self.sent -= weight;
            self.unsent.pop_front();
        }
    }

    fn send_all(&mut self) -> Result<(), LinkError> {
        self.blocked = false;
        while !self.unsent.is_empty() && !self.failed {
            let total = self.gather();
            match self.socket.send(&self.pieces) {
                Ok(count) => {
                    self.account(count as u64);
                    if (count as u64) < total {
                        self.blocked = true;
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(());
                }
                Err(source) => return Err(hung_up(source)),
            }
        }
        Ok(())
    }

    /// Lists what is to be sent next; how many bytes that is.
    fn gather(&mut self) -> u64 {
        let Self {
            slots,
            unsent,
            pieces,
            headers,
            ..
        } = self;
        headers.clear();
        let batch = unsent.iter().take(MAX_BATCH);
        headers.extend(batch.filter_map(|index| slots.get(*index).map(|slot| slot.header())));
        pieces.clear();
        let (mut skip, mut total) = (self.sent, 0);
        for (index, header) in unsent.iter().zip(headers.iter()) {
            let Some(slot) = slots.get(*index) else {
                continue;
            };
            let head = IoVec {
                base: header.as_ptr().cast_mut(),
                len: header.len(),
            };
            let data = match slot.command.kind {
                Kind::Write => slot.command.data.pieces(),
                _ => &[],
            };
            let mut add = |piece: IoVec| {
                let room = pieces.len() < MAX_PIECES;
                if room {
                    total += piece.len as u64;
                    pieces.push(piece);
                }
                room
            };
            for_window(&[head], skip, u64::MAX, &mut add);
            let skip_data = skip.saturating_sub(REQUEST_LEN as u64);
            for_window(data, skip_data, u64::from(slot.command.len), &mut add);
            skip = 0;
            if pieces.len() == MAX_PIECES {
                break;
            }
        }
        total
    }

    fn receive_all(&mut self) -> Result<(), LinkError> {
        while !self.failed {
            self.pieces.clear();
            self.replies.room(&self.slots, &mut self.pieces);
            let room = self.pieces.iter().map(|piece| piece.len).sum::<usize>();
            let count = match self.socket.receive(&self.pieces) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(source) => return Err(hung_up(source)),
            };
            self.replies
                .filled(count, &mut self.slots, &mut self.ended)?;
            if count < room {
                // That was all; whoever waits is told of more.
                return Ok(());
            }
        }
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.failed && self.unsent.is_empty() && self.slots.is_empty() {
            self.take_leave();
        }
    }
}

/// How a command ends that the connection has taken with it.
fn lost(command: &Command) -> Ended {
    Ended {
        owner: command.owner,
        tag: command.tag,
        result: Err(io::Error::from_raw_os_error(libc::ENOTCONN)),
    }
}

fn hung_up(source: io::Error) -> LinkError {
    match source.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
        io::ErrorKind::TimedOut => LinkError::TimedOut,
        _ => LinkError::Io { source },
    }
}
