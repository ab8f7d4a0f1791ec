//! From a request to the commands that serve it, as a state machine without system calls.
//!
//! ```text
//! read        part* ───────────────────────────────────► end
//! write       part* ──► flush, if durable without FUA ─► end
//! flush       flush ───────────────────────────────────► end
//! discard     trim* ───────────────────────────────────► end
//! zeroes      zero* ──► flush, if durable without FUA ─► end
//!               └► write* of zeros, where the server does not zero ─► …
//! ```
//!
//! The parts of a request are with the server at the same time.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::buffers::Buffers;
use crate::disk::{DiskInfo, Op, Request, Token};
use crate::engine::job;
use crate::options::{Discard, DiskOptions};

use super::handshake::Export;
use super::slots::Command;
use super::wire::{CMD_FUA, CMD_NO_HOLE, Kind};

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// The longest trim, in bytes.
const MAX_TRIM: u64 = 1 << 30;

/// The largest block that is told to a guest as efficient, in bytes.
const MAX_EFFICIENT: u32 = 64 << 10;

/// How requests become commands; the same for all queues of a disk.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) export: Export,
    read_only: bool,
    /// A write is durable when it has completed.
    durable: bool,
    /// A flush does nothing: by choice, or because the server has none.
    no_flush: bool,
    unmap: bool,
    /// The server zeroes ranges, as far as is known.
    zeroes: AtomicBool,
    /// The server trims, as far as is known.
    trims: AtomicBool,
    /// A flush has failed, or a connection: data that it would have covered may be lost. Later ones must not
    /// claim success.
    pub(super) lost: AtomicBool,
}

impl Rules {
    /// The rules for an export, which offers to be written unless `options` say read-only.
    pub(super) fn new(export: Export, options: &DiskOptions) -> Self {
        let ignored = options.cache.ignores_flush();
        let offers = export.offers;
        Self {
            read_only: options.read_only,
            // Without flushes, durable writes are the only way to keep what a flush promises.
            durable: !ignored && (!options.cache.writeback() || !offers.flush() && offers.fua()),
            no_flush: ignored || !offers.flush(),
            unmap: options.discard == Discard::Unmap,
            zeroes: AtomicBool::new(offers.zeroes()),
            trims: AtomicBool::new(offers.trim()),
            lost: AtomicBool::new(false),
            export,
        }
    }

    /// The facts of the disk.
    pub(super) fn info(&self) -> DiskInfo {
        let logical_block = self.export.minimum.max(512);
        let unit = u64::from(logical_block);
        let size = self.size();
        DiskInfo {
            size: if self.read_only {
                size.next_multiple_of(unit)
            } else {
                size - size % unit
            },
            logical_block,
            physical_block: self.export.preferred.min(MAX_EFFICIENT).max(logical_block),
            read_only: self.read_only,
            discard: self.unmap && !self.read_only && self.export.offers.trim(),
        }
    }

    /// How much of the export can be reached, in bytes: whole minimum blocks.
    pub(super) fn size(&self) -> u64 {
        self.export.size - self.export.size % u64::from(self.export.minimum)
    }

    /// Whether the size is a number of sectors.
    pub(super) fn whole_sectors(&self) -> bool {
        self.size().is_multiple_of(SECTOR)
    }

    /// The flag of a durable write, where it is wanted and offered.
    fn fua(&self) -> u16 {
        if self.durable && self.export.offers.fua() {
            CMD_FUA
        } else {
            0
        }
    }

    /// Whether a flush must follow a write to make it durable.
    fn flush_after(&self) -> bool {
        self.durable && !self.export.offers.fua() && !self.no_flush
    }

    /// Begins a request: `Ok(None)` when there is nothing to do.
    ///
    /// # Errors
    ///
    /// Why it may not be done.
    pub(super) fn begin(&self, request: Request) -> io::Result<Option<Task>> {
        let Request {
            token,
            op,
            offset,
            buffers,
        } = request;
        let len = match op {
            Op::Read | Op::Write => buffers.len(),
            Op::Flush => return self.begin_flush(token),
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        if op != Op::Read && self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let end = offset.checked_add(len);
        let aligned = (offset | len).is_multiple_of(u64::from(self.export.minimum));
        if end.is_none_or(|end| end > self.info().size) || !aligned {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let stage = match op {
            Op::Read => Stage::Read,
            Op::Write => Stage::Write,
            Op::Discard { .. } if !self.unmap || !self.trims.load(Ordering::Relaxed) => {
                return Ok(None);
            }
            Op::Discard { .. } => Stage::Trim,
            Op::WriteZeroes { may_unmap, .. } if self.zeroes.load(Ordering::Relaxed) => {
                let hole = may_unmap && self.unmap;
                Stage::Zero { hole }
            }
            _ => Stage::ZeroWrite,
        };
        let mut task = Task::new(token, stage, offset, len, buffers);
        if stage == Stage::Read {
            // Only on a read-only disk, whose last sector is made whole.
            let real = self.size().saturating_sub(offset).min(len);
            task.buffers.zero(real, u64::MAX);
            task.len = real;
            task.done = len - real;
        }
        Ok((task.len > 0).then_some(task))
    }

    fn begin_flush(&self, token: Token) -> io::Result<Option<Task>> {
        if !self.read_only && self.lost.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let task = Task::new(token, Stage::Flush, 0, 0, Buffers::none());
        Ok((!self.read_only && !self.no_flush).then_some(task))
    }

    /// The most bytes in one command.
    fn limit(&self, stage: Stage) -> u64 {
        let maximum = u64::from(self.export.maximum);
        match stage {
            Stage::Trim => MAX_TRIM,
            _ => maximum,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Read,
    Write,
    Trim,
    Zero { hole: bool },
    ZeroWrite,
    Flush,
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) token: Token,
    stage: Stage,
    offset: u64,
    len: u64,
    buffers: Buffers,
    /// How far the parts of this stage have been made.
    issued: u64,
    /// How many of them are with the server.
    open: u32,
    /// How many bytes have been read or written.
    done: u64,
    /// The flush that a durable write needs has been asked for.
    flushed: bool,
    error: Option<io::Error>,
    /// Its queue has it listed as one that has more to send.
    pub(super) listed: bool,
}

impl Task {
    fn new(token: Token, stage: Stage, offset: u64, len: u64, buffers: Buffers) -> Self {
        Self {
            token,
            stage,
            offset,
            len,
            buffers,
            issued: 0,
            open: 0,
            done: 0,
            flushed: false,
            error: None,
            listed: false,
        }
    }

    /// Whether [`Task::next`] has something.
    pub(super) fn has_more(&self) -> bool {
        self.error.is_none()
            && match self.stage {
                Stage::Flush => self.issued == 0,
                _ => self.issued < self.len,
            }
    }

    /// Makes the next command, if there is one to be sent now.
    pub(super) fn next(&mut self, rules: &Rules, owner: usize, tag: usize) -> Option<Command> {
        if !self.has_more() {
            return None;
        }
        let (kind, flags) = match self.stage {
            Stage::Flush => (Kind::Flush, 0),
            Stage::Read => (Kind::Read, 0),
            Stage::Write | Stage::ZeroWrite => (Kind::Write, rules.fua()),
            Stage::Trim => (Kind::Trim, 0),
            Stage::Zero { hole: true } => (Kind::Zeroes, rules.fua()),
            Stage::Zero { hole: false } => (Kind::Zeroes, rules.fua() | CMD_NO_HOLE),
        };
        let left = self
            .len
            .saturating_sub(self.issued)
            .min(rules.limit(self.stage));
        let (len, data) = match kind {
            Kind::Flush => (0, Buffers::none()),
            Kind::Trim | Kind::Zeroes => (left, Buffers::none()),
            _ if self.stage == Stage::ZeroWrite => zeros(left),
            _ if left == self.buffers.len() => {
                (left, std::mem::replace(&mut self.buffers, Buffers::none()))
            }
            _ => (left, self.buffers.window(self.issued, left)),
        };
        let offset = match kind {
            Kind::Flush => 0,
            _ => self.offset.saturating_add(self.issued),
        };
        self.issued = self.issued.saturating_add(len.max(1));
        self.open += 1;
        Some(Command {
            kind,
            flags,
            offset,
            // The limits are far below.
            len: u32::try_from(len).unwrap_or(0),
            data,
            owner,
            tag,
        })
    }

    /// Takes note that one of its commands has ended. `None` when there is more to wait for, or to be sent: ask
    /// [`Task::next`].
    pub(super) fn ended(
        &mut self,
        result: io::Result<()>,
        rules: &Rules,
    ) -> Option<(io::Result<()>, u64)> {
        self.open = self.open.saturating_sub(1);
        if let Err(error) = result {
            if self.stage == Stage::Flush {
                rules.lost.store(true, Ordering::Relaxed);
            }
            self.error.get_or_insert(error);
        }
        if self.open > 0 {
            return None;
        }
        if let Some(error) = self.error.take() {
            return self.refused(error, rules);
        }
        match self.stage {
            Stage::Flush => {}
            _ if self.issued < self.len => return None,
            Stage::Read => self.done = self.done.saturating_add(self.len),
            Stage::Write | Stage::ZeroWrite | Stage::Zero { .. }
                if rules.flush_after() && !self.flushed =>
            {
                if self.stage == Stage::Write {
                    self.done = self.len;
                }
                self.flushed = true;
                self.stage = Stage::Flush;
                self.issued = 0;
                return None;
            }
            Stage::Write => self.done = self.len,
            Stage::ZeroWrite | Stage::Zero { .. } | Stage::Trim => {}
        }
        Some((Ok(()), self.done))
    }

    /// What becomes of it after an error, when nothing of it is with the server.
    fn refused(&mut self, error: io::Error, rules: &Rules) -> Option<(io::Result<()>, u64)> {
        let unsupported = error.kind() == io::ErrorKind::Unsupported;
        match self.stage {
            Stage::Trim if unsupported => {
                rules.trims.store(false, Ordering::Relaxed);
                Some((Ok(()), 0))
            }
            Stage::Zero { .. } if unsupported => {
                rules.zeroes.store(false, Ordering::Relaxed);
                self.stage = Stage::ZeroWrite;
                self.issued = 0;
                None
            }
            Stage::Read => Some((Err(error), 0)),
            _ => Some((Err(error), self.done)),
        }
    }
}

/// Up to `len` zeros to send, and how many.
#[expect(unsafe_code, reason = "buffers of static memory")]
fn zeros(len: u64) -> (u64, Buffers) {
    let mut pieces = Vec::new();
    let len = job::zeros(len, &mut pieces);
    // SAFETY: the pieces are of static memory, which is only read; a write reads only.
    (len, unsafe {
        Buffers::new(pieces, std::sync::Arc::new(()))
    })
}
