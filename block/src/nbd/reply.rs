//! Reads what a server sends in the transmission phase, as a state machine without system calls.
//!
//! Bytes come into a small stash, and from there into the state machine. While the data of a
//! read is due, they go from the socket straight to where the read wants them, with
//! the stash behind for what follows: many short replies, or the rest of a long one and several
//! short ones, are one system call.
//!
//! ```text
//!            simple reply without data, chunk NONE or HOLE
//!            ┌──────┐
//!            ▼      │
//!  ──────► Header ──┴─► Body ──► Header      data of a read
//!            └────────► Skip ──► Header      words about an error
//! ```
//!
//! Nothing that comes is believed: see [`ReplyError`] for what ends the connection.

use std::io;

use crate::buffers::IoVec;
use crate::buffers::for_window;

use super::slots::{Ended, Slot, Slots};
use super::socket::MAX_PIECES;
use super::wire::{
    self, CHUNK_DATA, CHUNK_DONE, CHUNK_ERROR, CHUNK_ERROR_BIT, CHUNK_ERROR_OFFSET, CHUNK_HOLE,
    CHUNK_LEN, CHUNK_MAGIC, CHUNK_NONE, ESHUTDOWN, Kind, MAX_STRING, Reader, SIMPLE_LEN,
    SIMPLE_MAGIC,
};

/// The size of the stash, in bytes. A reply to a read of 4 KiB fits: copying that costs less than another system call.
const STASH: usize = 8 << 10;

/// The longest payload of a chunk about an error, in bytes: the fixed fields and one text.
const MAX_ERROR: u32 = 14 + 4096;

/// How a server has broken the protocol.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplyError {
    #[error("a reply begins with {magic:#010x}")]
    Magic { magic: u32 },
    #[error("a reply to nothing that was sent: cookie {cookie:#x}")]
    UnknownCookie { cookie: u64 },
    #[error("a simple reply to a read after structured replies were agreed on")]
    SimpleRead,
    #[error("a structured reply though none were agreed on")]
    Structured,
    #[error("a chunk of type {kind:#06x} with {len} bytes, which does not fit a reply to {to:?}")]
    Chunk { kind: u16, len: u32, to: Kind },
    #[error("an error without its number")]
    NoError,
    #[error("data for the bytes from {start} on, {len} of them, which were not asked for")]
    Outside { start: u64, len: u64 },
    #[error("data for the bytes {start} to {end} of a read twice")]
    Overlap { start: u64, end: u64 },
    #[error("a read ended without the data at {offset}")]
    Missing { offset: u64 },
    #[error("a read in too many scattered parts")]
    Scattered,
    #[error("too many chunks without data")]
    TooManyChunks,
    #[error("it is shutting down")]
    ShuttingDown,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// The header of a reply, and of its payload.
    Header,
    /// Data of a read.
    Body {
        slot: usize,
        /// Where it goes, in bytes from the start of the read.
        at: u64,
        left: u64,
        /// The reply ends with it.
        done: bool,
    },
    /// Bytes that nobody reads.
    Skip { left: u64 },
}

/// The reader of one connection.
#[derive(Debug)]
pub(super) struct Replies {
    structured: bool,
    state: State,
    stash: Box<[u8]>,
    /// The part of the stash that holds bytes.
    start: usize,
    end: usize,
}

/// The header of a chunk.
#[derive(Clone, Copy)]
struct Chunk {
    kind: u16,
    done: bool,
    slot: usize,
    len: u32,
}

impl Replies {
    pub(super) fn new(structured: bool) -> Self {
        Self {
            structured,
            state: State::Header,
            stash: vec![0; STASH].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// Appends where the next bytes of the stream belong: never nothing, and at most [`MAX_PIECES`] pieces.
    pub(super) fn room(&mut self, slots: &Slots, pieces: &mut Vec<IoVec>) {
        let mut whole = true;
        if let State::Body { slot, at, left, .. } = self.state
            && let Some(slot) = slots.get(slot)
        {
            for_window(slot.command.data.pieces(), at, left, |piece| {
                whole = pieces.len() + 1 < MAX_PIECES;
                if whole {
                    pieces.push(piece);
                }
                whole
            });
        }
        if whole {
            // Less than a header is in there at most, so there is always room.
            self.stash.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let free = self.stash.get_mut(self.end..).unwrap_or_default();
            pieces.push(IoVec {
                base: free.as_mut_ptr(),
                len: free.len(),
            });
        }
    }

    /// Takes note that the first `count` bytes of the [`Replies::room`] have been filled, and reads them.
    ///
    /// # Errors
    ///
    /// [`ReplyError`]: the connection is of no more use.
    pub(super) fn filled(
        &mut self,
        count: usize,
        slots: &mut Slots,
        ended: &mut Vec<Ended>,
    ) -> Result<(), ReplyError> {
        let mut count = count;
        if let State::Body { at, left, .. } = &mut self.state {
            let direct = count.min(usize::try_from(*left).unwrap_or(usize::MAX));
            *at = at.saturating_add(direct as u64);
            *left -= direct as u64;
            count -= direct;
        }
        self.end = self.end.saturating_add(count).min(self.stash.len());
        while self.step(slots, ended)? {}
        Ok(())
    }

    /// Makes one step; `false` when that takes more bytes.
    fn step(&mut self, slots: &mut Slots, ended: &mut Vec<Ended>) -> Result<bool, ReplyError> {
        match self.state {
            State::Header => self.header(slots, ended),
            State::Body {
                slot,
                at,
                left,
                done,
            } => {
                let now = self.take(left);
                if let Some(slot) = slots.get(slot) {
                    slot.command.data.put(at, now);
                }
                let now = now.len() as u64;
                if now < left {
                    self.state = State::Body {
                        slot,
                        at: at.saturating_add(now),
                        left: left - now,
                        done,
                    };
                    return Ok(false);
                }
                self.state = State::Header;
                if done {
                    finish(slots, slot, ended)?;
                }
                Ok(true)
            }
            State::Skip { left } => {
                let now = self.take(left).len() as u64;
                self.state = match left - now {
                    0 => State::Header,
                    left => State::Skip { left },
                };
                Ok(now == left)
            }
        }
    }

    /// Takes up to `len` bytes out of the stash.
    fn take(&mut self, len: u64) -> &[u8] {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let from = self.start;
        self.start = from.saturating_add(len).min(self.end);
        self.stash.get(from..self.start).unwrap_or_default()
    }

    /// What is in the stash.
    fn look(&self) -> Reader<'_> {
        Reader(self.stash.get(self.start..self.end).unwrap_or_default())
    }

    /// Reads a header, if all of it is there.
    fn header(&mut self, slots: &mut Slots, ended: &mut Vec<Ended>) -> Result<bool, ReplyError> {
        let mut bytes = self.look();
        match bytes.u32() {
            None => Ok(false),
            Some(SIMPLE_MAGIC) => {
                let Some((error, cookie)) = bytes.u32().zip(bytes.u64()) else {
                    return Ok(false);
                };
                self.start += SIMPLE_LEN;
                self.simple(error, slots.find(cookie)?, slots, ended)?;
                Ok(true)
            }
            Some(CHUNK_MAGIC) if self.structured => {
                let Some((flags, kind)) = bytes.u16().zip(bytes.u16()) else {
                    return Ok(false);
                };
                let Some((cookie, len)) = bytes.u64().zip(bytes.u32()) else {
                    return Ok(false);
                };
                let chunk = Chunk {
                    kind,
                    done: flags & CHUNK_DONE != 0,
                    slot: slots.find(cookie)?,
                    len,
                };
                self.chunk(chunk, slots, ended)
            }
            Some(CHUNK_MAGIC) => Err(ReplyError::Structured),
            Some(magic) => Err(ReplyError::Magic { magic }),
        }
    }

    fn simple(
        &mut self,
        error: u32,
        index: usize,
        slots: &mut Slots,
        ended: &mut Vec<Ended>,
    ) -> Result<(), ReplyError> {
        let Some(slot) = slots.get_mut(index) else {
            return Ok(());
        };
        let read = slot.command.kind == Kind::Read;
        if read && self.structured {
            return Err(ReplyError::SimpleRead);
        }
        if error != 0 {
            refuse(slot, error)?;
        } else if read {
            let left = u64::from(slot.command.len);
            slot.come.add(0, left)?;
            self.state = State::Body {
                slot: index,
                at: 0,
                left,
                done: true,
            };
            return Ok(());
        }
        finish(slots, index, ended)
    }

    /// Goes into a chunk, if the fixed part of its payload is there.
    fn chunk(
        &mut self,
        chunk: Chunk,
        slots: &mut Slots,
        ended: &mut Vec<Ended>,
    ) -> Result<bool, ReplyError> {
        let Chunk { kind, len, .. } = chunk;
        let Some(slot) = slots.get_mut(chunk.slot) else {
            return Ok(true);
        };
        let read = slot.command.kind == Kind::Read;
        let taken = match kind {
            CHUNK_NONE if len == 0 && chunk.done => Some(()),
            CHUNK_DATA if read && len > 8 => return self.data(chunk, slot),
            CHUNK_HOLE if read && len == 12 => self.hole(slot)?,
            _ if kind & CHUNK_ERROR_BIT != 0 && (6..=MAX_ERROR).contains(&len) => {
                self.failure(chunk, slot)?
            }
            _ => {
                let to = slot.command.kind;
                return Err(ReplyError::Chunk { kind, len, to });
            }
        };
        if taken.is_none() {
            return Ok(false);
        }
        if !matches!(self.state, State::Skip { .. }) {
            self.start += CHUNK_LEN + usize::try_from(len).unwrap_or(0);
        }
        if chunk.done {
            finish(slots, chunk.slot, ended)?;
        }
        Ok(true)
    }

    /// The payload of a chunk whose header is at the front of the stash.
    fn payload(&self) -> Reader<'_> {
        Reader(self.look().0.get(CHUNK_LEN..).unwrap_or_default())
    }

    fn data(&mut self, chunk: Chunk, slot: &mut Slot) -> Result<bool, ReplyError> {
        let Some(offset) = self.payload().u64() else {
            return Ok(false);
        };
        let left = u64::from(chunk.len).saturating_sub(8);
        let at = cover(slot, offset, left)?;
        self.start += CHUNK_LEN + 8;
        self.state = State::Body {
            slot: chunk.slot,
            at,
            left,
            done: chunk.done,
        };
        Ok(true)
    }

    fn hole(&self, slot: &mut Slot) -> Result<Option<()>, ReplyError> {
        let mut payload = self.payload();
        let Some((offset, len)) = payload.u64().zip(payload.u32()) else {
            return Ok(None);
        };
        let at = cover(slot, offset, u64::from(len))?;
        slot.command.data.zero(at, u64::from(len));
        Ok(Some(()))
    }

    /// A chunk about an error. Its text is passed over, and so is the offset: a request fails as a whole.
    fn failure(&mut self, chunk: Chunk, slot: &mut Slot) -> Result<Option<()>, ReplyError> {
        let mut payload = self.payload();
        let Some((error, text)) = payload.u32().zip(payload.u16()) else {
            return Ok(None);
        };
        let fixed = if chunk.kind == CHUNK_ERROR_OFFSET {
            14
        } else {
            6
        };
        let exact = matches!(chunk.kind, CHUNK_ERROR | CHUNK_ERROR_OFFSET);
        let needed = u32::from(text) + fixed;
        if usize::from(text) > MAX_STRING || needed > chunk.len || exact && needed != chunk.len {
            return Err(ReplyError::Chunk {
                kind: chunk.kind,
                len: chunk.len,
                to: slot.command.kind,
            });
        }
        slot.idle_chunk()?;
        refuse(slot, error)?;
        self.start += CHUNK_LEN + 6;
        self.state = State::Skip {
            left: u64::from(chunk.len - 6),
        };
        Ok(Some(()))
    }
}

/// Takes note of an error that a server has sent.
fn refuse(slot: &mut Slot, error: u32) -> Result<(), ReplyError> {
    match error {
        0 => Err(ReplyError::NoError),
        ESHUTDOWN => Err(ReplyError::ShuttingDown),
        error => {
            slot.fail(wire::error(error));
            Ok(())
        }
    }
}

/// Takes note of a part of a read that comes; where in the read it goes.
fn cover(slot: &mut Slot, offset: u64, len: u64) -> Result<u64, ReplyError> {
    let outside = ReplyError::Outside { start: offset, len };
    let Some(at) = offset.checked_sub(slot.command.offset) else {
        return Err(outside);
    };
    let end = at.checked_add(len);
    match end.filter(|end| *end <= u64::from(slot.command.len) && len > 0) {
        Some(end) => slot.come.add(at, end).map(|()| at),
        None => Err(outside),
    }
}

/// Ends a command whose reply is complete.
fn finish(slots: &mut Slots, index: usize, ended: &mut Vec<Ended>) -> Result<(), ReplyError> {
    let Some(slot) = slots.get_mut(index) else {
        return Ok(());
    };
    let result: io::Result<()> = slot.outcome()?;
    if let Some(command) = slots.remove(index) {
        ended.push(Ended {
            owner: command.owner,
            tag: command.tag,
            result,
        });
    }
    Ok(())
}
