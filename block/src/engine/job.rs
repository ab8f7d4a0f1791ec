//! One piece of work on one file, as a state machine without system calls.
//!
//! A [`Job`] says which [`Step`] to do next; whoever does it, in the ring or in a
//! thread, tells the job what the host answered. All that can go wrong between
//! a request and its end is decided here: short transfers, interruptions,
//! what the host cannot do, what must be made durable, memory that direct I/O
//! does not accept.
//!
//! ```text
//! read, write   Transfer* ─────────────────────────────► end
//! flush         Sync ──────────────────────────────────► end
//! discard       Discard ───────────────────────────────► end
//! zeroes        Punch ─► ZeroRange ─► ZeroWrite* ──────► end
//!                 └──────────┴─► Sync if durable ──────► end
//! ```

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use libc::c_int;

use crate::buffers::{Buffers, IoVec, for_window};
use crate::disk::Op;
use crate::engine::FileId;
use crate::engine::bounce::{AlignedBuf, BOUNCE_SIZE, Way};
use crate::file::{Abilities, Kind, forget};

/// The most pieces that one system call takes (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// The most bytes in one system call, in bytes; below what the kernel cuts off at.
const MAX_STEP: u64 = 1 << 30;

/// How often one step is tried again when the host is interrupted or short of
/// resources, before that becomes the answer.
const MAX_RETRIES: u32 = 1 << 12;

/// The length of the zeros that are written where a range cannot be zeroed otherwise.
const ZEROS_LEN: usize = 64 << 10;

/// How many times the zeros are repeated in one step: 1 MiB.
const ZEROS_REPEAT: u64 = 16;

#[repr(align(4096))]
struct Zeros([AtomicU8; ZEROS_LEN]);

/// Never written; atomics only because that needs no unsafe code to point to.
static ZEROS: Zeros = Zeros([const { AtomicU8::new(0) }; ZEROS_LEN]);

/// What the host is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step<'a> {
    /// Read at `offset` into `pieces`.
    Read {
        /// Host offset in bytes.
        offset: u64,
        /// Where to; at least one, at most [`MAX_PIECES`].
        pieces: &'a [IoVec],
    },
    /// Write `pieces` at `offset`, durably if `dsync`.
    Write {
        /// Host offset in bytes.
        offset: u64,
        /// Where from; at least one, at most [`MAX_PIECES`].
        pieces: &'a [IoVec],
        /// Complete only when it is on stable storage.
        dsync: bool,
    },
    /// Make all completed writes durable.
    Sync,
    /// `fallocate` with this mode.
    Allocate {
        /// `FALLOC_FL_…`.
        mode: c_int,
        /// Host offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Discard a range of a block device.
    DiscardDevice {
        /// Host offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Moving data: the next step takes this many bytes, from the request's own
    /// pieces if `whole`, else from `window`.
    Transfer {
        ask: u64,
        whole: bool,
    },
    Sync,
    Punch,
    ZeroRange,
    ZeroWrite {
        ask: u64,
    },
    Discard,
}

/// One piece of work on one file.
#[derive(Debug)]
pub(crate) struct Job {
    /// The submitter's mark.
    pub tag: u64,
    /// Another one.
    pub note: u64,
    /// Which of the engine's files it is about.
    pub file: FileId,
    op: Op,
    offset: u64,
    len: u64,
    durable: bool,
    /// A read finds zeros past the end of the file.
    endless: bool,
    /// It stands for a write of so many bytes.
    stands_for: u64,
    buffers: Buffers,
    bounce: Option<AlignedBuf>,
    stage: Stage,
    done: u64,
    retries: u32,
    window: Vec<IoVec>,
}

impl Job {
    /// Describes work on `file` at the host's `offset`. With `durable`, its
    /// end means that its effect is on stable storage.
    ///
    /// Offset plus length must not overflow.
    pub(crate) fn new(
        tag: u64,
        file: FileId,
        op: Op,
        offset: u64,
        buffers: Buffers,
        durable: bool,
    ) -> Self {
        let len = match op {
            Op::Read | Op::Write => buffers.len(),
            Op::Flush => 0,
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        Self {
            tag,
            note: 0,
            file,
            op,
            offset,
            len,
            durable,
            endless: false,
            stands_for: 0,
            buffers,
            bounce: None,
            stage: Stage::Sync,
            done: 0,
            retries: 0,
            window: Vec::new(),
        }
    }

    /// Gives it a note.
    pub(crate) fn noted(mut self, note: u64) -> Self {
        self.note = note;
        self
    }

    /// Makes a read find zeros past the end of the file, instead of failing there.
    pub(crate) fn endless(mut self) -> Self {
        self.endless = true;
        self
    }

    /// Makes its success count as that of a write of so many bytes.
    pub(crate) fn standing_for(mut self, bytes: u64) -> Self {
        self.stands_for = bytes;
        self
    }

    /// Whether its memory does not suit the file, so that it needs [`Job::lend`].
    pub(crate) fn needs_bounce(&self, abilities: &Abilities) -> bool {
        matches!(self.op, Op::Read | Op::Write)
            && self.len > 0
            && !abilities.accepts(self.buffers.pieces())
    }

    /// Gives it a buffer of [`BOUNCE_SIZE`] to go through.
    pub(crate) fn lend(&mut self, bounce: AlignedBuf) {
        self.bounce = Some(bounce);
    }

    /// Takes the buffer back after the end.
    pub(crate) fn take_bounce(&mut self) -> Option<AlignedBuf> {
        self.bounce.take()
    }

    /// The length of the range that it is about, in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// How many bytes have been read or written for a request, given how the job has ended.
    pub(crate) fn bytes(&self, result: &io::Result<()>) -> u64 {
        match self.op {
            Op::Read | Op::Write => self.done,
            Op::WriteZeroes { .. } if result.is_ok() => self.stands_for,
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => 0,
        }
    }

    /// Starts: `None` when there is a [`Job::step`] to do, else the end.
    pub(crate) fn begin(&mut self, abilities: &Abilities) -> Option<io::Result<()>> {
        match self.op {
            Op::Flush if abilities.lost.load(Ordering::Relaxed) => return Some(Err(os(libc::EIO))),
            Op::Flush => self.stage = Stage::Sync,
            _ if self.len == 0 => return Some(Ok(())),
            Op::Read | Op::Write => self.next_transfer(),
            Op::Discard { .. } => {
                if !abilities.discard.load(Ordering::Relaxed) {
                    return Some(Ok(()));
                }
                self.stage = Stage::Discard;
            }
            Op::WriteZeroes { may_unmap, .. } => {
                if may_unmap && abilities.punch.load(Ordering::Relaxed) {
                    self.stage = Stage::Punch;
                } else {
                    self.without_punch(abilities);
                }
            }
        }
        None
    }

    /// What the host is to do now. The pieces stay where they are until [`Job::advance`]
    /// provided that the job itself does.
    pub(crate) fn step(&self, abilities: &Abilities) -> Step<'_> {
        let at = self.offset.saturating_add(self.done);
        let (offset, len) = (self.offset, self.len);
        match self.stage {
            Stage::Transfer { whole, .. } => {
                let pieces = if whole {
                    self.buffers.pieces()
                } else {
                    &self.window
                };
                if self.op == Op::Read {
                    Step::Read { offset: at, pieces }
                } else {
                    Step::Write {
                        offset: at,
                        pieces,
                        dsync: self.durable,
                    }
                }
            }
            Stage::ZeroWrite { .. } => Step::Write {
                offset: at,
                pieces: &self.window,
                dsync: self.durable,
            },
            Stage::Sync => Step::Sync,
            Stage::Discard if abilities.kind == Kind::Device => Step::DiscardDevice { offset, len },
            Stage::Punch | Stage::Discard => Step::Allocate {
                mode: libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            },
            Stage::ZeroRange => Step::Allocate {
                mode: libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            },
        }
    }

    /// Takes the host's answer to the step: how many bytes it moved (0 where
    /// that has no meaning) or its error number. `None` when there is another
    /// step to do, else the end.
    pub(crate) fn advance(
        &mut self,
        answer: Result<u64, c_int>,
        abilities: &Abilities,
    ) -> Option<io::Result<()>> {
        // The ring cancels what a thread has sent when that thread ends.
        if let Err(libc::EINTR | libc::EAGAIN | libc::ECANCELED) = answer
            && self.retries < MAX_RETRIES
        {
            self.retries += 1;
            return None;
        }
        self.retries = 0;
        match (self.stage, answer) {
            (Stage::Transfer { ask, .. } | Stage::ZeroWrite { ask }, Ok(moved)) => {
                self.moved(moved.min(ask), abilities)
            }
            (Stage::Sync, Err(code)) => {
                // A direct write reports its own errors, so nothing of it can be lost here.
                if !abilities.direct {
                    abilities.lost.store(true, Ordering::Relaxed);
                }
                Some(Err(os(code)))
            }
            (Stage::Sync | Stage::Discard, Ok(_)) => Some(Ok(())),
            (Stage::Punch | Stage::ZeroRange, Ok(_)) if self.durable => {
                self.stage = Stage::Sync;
                None
            }
            (Stage::Punch | Stage::ZeroRange, Ok(_)) => Some(Ok(())),
            (Stage::Discard, Err(code)) if unsupported(code) => {
                forget(&abilities.discard);
                Some(Ok(()))
            }
            (Stage::Punch, Err(code)) if unsupported(code) => {
                forget(&abilities.punch);
                self.without_punch(abilities);
                None
            }
            (Stage::ZeroRange, Err(code)) if unsupported(code) => {
                forget(&abilities.zero_range);
                self.next_zeros();
                None
            }
            // This range only: a device may refuse what is not on its sectors.
            (Stage::Punch | Stage::ZeroRange, Err(libc::EINVAL)) => {
                self.next_zeros();
                None
            }
            (_, Err(code)) => Some(Err(os(code))),
        }
    }

    fn without_punch(&mut self, abilities: &Abilities) {
        if abilities.zero_range.load(Ordering::Relaxed) {
            self.stage = Stage::ZeroRange;
        } else {
            self.next_zeros();
        }
    }

    /// A transfer has moved `moved` bytes of what was asked.
    fn moved(&mut self, moved: u64, abilities: &Abilities) -> Option<io::Result<()>> {
        if self.op == Op::Read && self.past_end(moved, abilities) {
            return Some(Ok(()));
        }
        // Direct I/O can only go on from where it may start.
        let tail = if self.done.saturating_add(moved) < self.len {
            moved % u64::from(abilities.align.offset)
        } else {
            0
        };
        // A transfer that stops elsewhere has come to the end of the file; so has one of nothing.
        let ended = self.endless && self.op == Op::Read && (moved == 0 || tail != 0);
        let moved = if ended { moved } else { moved - tail };
        if moved == 0 && !ended {
            return Some(Err(match self.op {
                Op::Read => io::ErrorKind::UnexpectedEof.into(),
                _ => io::ErrorKind::WriteZero.into(),
            }));
        }
        if self.op == Op::Read
            && let Some(bounce) = &mut self.bounce
        {
            let len = usize::try_from(moved).unwrap_or(BOUNCE_SIZE);
            bounce.exchange(self.buffers.pieces(), self.done, len, Way::Out);
        }
        self.done = self.done.saturating_add(moved);
        if ended {
            self.buffers.fill_zero(self.done..self.len);
            self.done = self.len;
        }
        if self.done >= self.len {
            return Some(Ok(()));
        }
        match self.stage {
            Stage::ZeroWrite { .. } => self.next_zeros(),
            _ => self.next_transfer(),
        }
        None
    }

    /// Ends a read that has come to the end of a file that its disk goes on past: the rest is zeros.
    fn past_end(&mut self, moved: u64, abilities: &Abilities) -> bool {
        let done = self.done.saturating_add(moved);
        if abilities
            .end
            .is_none_or(|end| self.offset.saturating_add(done) < end)
        {
            return false;
        }
        if let Some(bounce) = &mut self.bounce {
            let len = usize::try_from(moved).unwrap_or(BOUNCE_SIZE);
            bounce.exchange(self.buffers.pieces(), self.done, len, Way::Out);
        }
        self.buffers.zero(done, u64::MAX);
        self.done = self.len;
        true
    }

    /// Prepares the transfer of what is left, or of as much as one step takes.
    fn next_transfer(&mut self) {
        let left = self.len.saturating_sub(self.done);
        let pieces = self.buffers.pieces();
        self.window.clear();
        let (ask, whole) = if let Some(bounce) = &mut self.bounce {
            let len = usize::try_from(left)
                .unwrap_or(BOUNCE_SIZE)
                .min(BOUNCE_SIZE);
            if self.op == Op::Write {
                bounce.exchange(pieces, self.done, len, Way::In);
            }
            self.window.push(bounce.piece(len));
            (len as u64, false)
        } else if self.done == 0 && left <= MAX_STEP && pieces.len() <= MAX_PIECES {
            (left, true)
        } else {
            let window = &mut self.window;
            let mut ask = 0;
            for_window(pieces, self.done, left.min(MAX_STEP), |piece| {
                window.push(piece);
                ask += piece.len as u64;
                window.len() < MAX_PIECES
            });
            (ask, false)
        };
        self.stage = Stage::Transfer { ask, whole };
    }

    /// Prepares the writing of zeros over what is left, a bounded part at a time.
    fn next_zeros(&mut self) {
        let left = self.len.saturating_sub(self.done);
        let ask = zeros(left, &mut self.window);
        self.stage = Stage::ZeroWrite { ask };
    }
}

/// Makes `pieces` up to `len` zeros that are only to be read, as many as one step may write: how many that is.
pub(crate) fn zeros(len: u64, pieces: &mut Vec<IoVec>) -> u64 {
    let ask = len.min(ZEROS_LEN as u64 * ZEROS_REPEAT);
    let mut unasked = usize::try_from(ask).unwrap_or(ZEROS_LEN);
    pieces.clear();
    while unasked > 0 {
        let len = unasked.min(ZEROS_LEN);
        pieces.push(IoVec {
            base: ZEROS.0.as_ptr().cast_mut().cast(),
            len,
        });
        unasked -= len;
    }
    ask
}

/// Whether the answer means that the host will never do this.
fn unsupported(code: c_int) -> bool {
    matches!(
        code,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY
    )
}

fn os(code: c_int) -> io::Error {
    io::Error::from_raw_os_error(code)
}

#[cfg(test)]
mod tests;
