//! Copying what disks hold into another image.
//!
//! Several threads read, look for zeros, compress and write at once. Only one step is done in the source's order
//! (unless the caller does not care): finding a place in a qcow2 target, so that the target lies on its host as it is read
//! later, and is the same each time.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::share::{Turns, share};
use super::zeros::runs;
use super::{Control, OpError, status};
use crate::image::Image;
use crate::qcow2::Qcow2;

/// The most bytes that are one piece of work.
const PIECE: u64 = 2 << 20;

/// The unit of all ranges, in bytes.
const SECTOR: u64 = 512;

/// How long a wait goes on without a look at whether the operation is to end.
const PATIENCE: Duration = Duration::from_millis(50);

/// The most threads.
const MAX_THREADS: usize = 64;

/// What is to be copied, and how.
#[derive(Clone, Copy, Debug)]
pub struct Convert<'a> {
    /// The sources, one behind the other.
    pub sources: &'a [&'a dyn Image],
    /// The target, at least as large as they are together.
    pub target: &'a dyn Image,
    /// How many zero bytes at least become a hole, a multiple of 512; 0: everything is written.
    pub sparse: u64,
    /// Data is compressed.
    pub compress: bool,
    /// All of the target reads as zeros, apart from what is behind it.
    pub target_is_zero: bool,
    /// Only what this many images at the top of the source's chain say is copied: what lies below the target stands for
    /// the others.
    pub layers: Option<usize>,
    /// The size of the target's backing file in bytes; 0 without one.
    pub backing: u64,
    /// How many threads work, at least 1.
    pub threads: usize,
    /// Places in the target need not be in the order of the source.
    pub any_order: bool,
    /// What cannot be read becomes zeros, with a warning in the log.
    pub salvage: bool,
    /// The most bytes to be written in a second.
    pub rate: Option<u64>,
}

/// What is to be done with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Do {
    /// Nothing: the target says the same already.
    Skip,
    /// Make it zeros.
    Zero,
    /// Copy it.
    Copy,
}

/// A range and what is to be done with it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: u64,
    len: u64,
    what: Do,
}

/// Copies.
///
/// # Errors
///
/// [`OpError`]; a part has been copied then. The target is not flushed.
pub fn convert(how: &Convert<'_>, control: &Control<'_>) -> Result<(), OpError> {
    let needed = how.sources.iter().map(|source| source.size()).sum();
    let target = how.target.size();
    if target < needed {
        return Err(OpError::TooSmall { target, needed });
    }
    let qcow2 = how.target.as_qcow2();
    if how.compress && qcow2.is_none_or(|image| image.geometry().data_file) {
        return Err(OpError::NoCompression);
    }
    let grain = grain(how, qcow2);
    let job = Job {
        how,
        control,
        qcow2,
        size: needed,
        // What is around the data of a target in use is not read: it may be the target's own.
        unit: if how.compress || how.target_is_zero {
            grain
        } else {
            SECTOR
        },
        hole: grain.max(how.sparse.min(PIECE).next_power_of_two()),
        turns: Turns::new(),
        done: AtomicU64::new(0),
        paid: std::sync::Mutex::new((Instant::now(), 0)),
    };
    (control.progress)(0, needed);
    let mut at = 0;
    let next = || {
        control.go_on()?;
        while at < needed {
            let piece = job.piece(at)?;
            at += piece.len;
            if piece.what != Do::Skip {
                return Ok(Some(piece));
            }
            job.count(piece.len);
        }
        Ok(None)
    };
    share(
        how.threads.clamp(1, MAX_THREADS),
        &job.turns,
        next,
        |number, piece| job.work(number, piece),
    )
}

/// What the target allocates at once, in bytes.
fn grain(how: &Convert<'_>, qcow2: Option<&Qcow2>) -> u64 {
    match qcow2 {
        Some(image) if how.compress => image.geometry().cluster(),
        Some(image) => image.geometry().grain(),
        None => 4096,
    }
}

struct Job<'a> {
    how: &'a Convert<'a>,
    control: &'a Control<'a>,
    qcow2: Option<&'a Qcow2>,
    size: u64,
    /// What pieces are multiples of, in bytes.
    unit: u64,
    /// The unit of a look for zeros, in bytes.
    hole: u64,
    turns: Turns,
    done: AtomicU64,
    /// Since when how many bytes have been written, for the rate.
    paid: std::sync::Mutex<(Instant, u64)>,
}

impl Job<'_> {
    fn count(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        (self.control.progress)(done, self.size);
    }

    /// The source that holds an offset, and the offset within it.
    fn source(&self, mut offset: u64) -> Option<(&dyn Image, u64)> {
        for source in self.how.sources {
            if offset < source.size() {
                return Some((*source, offset));
            }
            offset -= source.size();
        }
        None
    }

    /// What is to be done from `at`, a multiple of the unit, on.
    fn piece(&self, at: u64) -> Result<Piece, OpError> {
        let (mut len, what) = self.judge(at)?;
        let left = self.size - at;
        while len < self.unit.min(left) {
            let (more, next) = self.judge(at + len)?;
            if next != what {
                break;
            }
            len += more;
        }
        let whole = len - len % self.unit;
        // Up to the next multiple of the largest piece, which a multiple of the unit is.
        let most = PIECE - at % PIECE;
        if what == Do::Skip && (whole > 0 || len == left) {
            let len = if len == left { len } else { whole };
            return Ok(Piece {
                offset: at,
                len,
                what,
            });
        }
        if what == Do::Zero && (whole > 0 || len == left) {
            let len = if len == left { len } else { whole };
            // So that it can be interrupted.
            let len = len.min((1 << 30) - at % (1 << 30));
            return Ok(Piece {
                offset: at,
                len,
                what,
            });
        }
        // Where less than a unit is of another kind, that unit is copied.
        let len = len
            .min(most)
            .next_multiple_of(self.unit)
            .min(most)
            .min(left);
        Ok(Piece {
            offset: at,
            len,
            what: Do::Copy,
        })
    }

    /// What is at an offset, as the sources alone see it.
    fn judge(&self, at: u64) -> Result<(u64, Do), OpError> {
        let Some((source, offset)) = self.source(at) else {
            return Ok((self.size - at, Do::Skip));
        };
        let found = status(source, offset, source.size() - offset)
            .map_err(|source| OpError::Status { offset: at, source })?;
        let below = self.how.layers.is_some_and(|layers| found.depth >= layers);
        let what = match (below, found.zero) {
            (true, _) => Do::Skip,
            (false, true) => Do::Zero,
            (false, false) => Do::Copy,
        };
        let what = match what {
            Do::Zero if self.how.sparse == 0 => Do::Copy,
            Do::Zero if self.zero_already(at) => Do::Skip,
            what => what,
        };
        Ok((found.len, what))
    }

    /// Whether the target reads as zeros where it has not been written to.
    fn zero_already(&self, at: u64) -> bool {
        self.how.target_is_zero && at >= self.how.backing
    }

    fn work(&self, number: u64, piece: Piece) -> Result<(), OpError> {
        let ordered = !self.how.any_order && self.qcow2.is_some();
        let result = match piece.what {
            Do::Copy => self.copy(number, piece, ordered),
            Do::Zero if ordered && !self.turns.wait(number) => Ok(()),
            Do::Zero => {
                let zeroed = self.zero(piece.offset, piece.len);
                self.turns.done(number);
                zeroed
            }
            Do::Skip => Ok(()),
        };
        result?;
        self.count(piece.len);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), OpError> {
        self.how
            .target
            .write_zeroes(offset, len, true)
            .map_err(|source| OpError::Write { offset, source })
    }

    fn read(&self, mut at: u64, mut buf: &mut [u8]) -> Result<(), OpError> {
        while let Some((source, offset)) = self.source(at).filter(|_| !buf.is_empty()) {
            let held = usize::try_from(source.size() - offset).unwrap_or(usize::MAX);
            let (part, rest) = buf.split_at_mut(held.min(buf.len()));
            if let Err(error) = source.read(offset, part) {
                if !self.how.salvage {
                    return Err(OpError::Read {
                        offset: at,
                        source: error,
                    });
                }
                salvage(source, offset, part);
            }
            at += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    fn copy(&self, number: u64, piece: Piece, ordered: bool) -> Result<(), OpError> {
        let len = usize::try_from(piece.len).unwrap_or(0);
        let mut data = Vec::new();
        data.try_reserve_exact(len)
            .map_err(|_| OpError::Host(io::ErrorKind::OutOfMemory.into()))?;
        data.resize(len, 0);
        self.read(piece.offset, &mut data)?;
        let parts = self.parts(piece.offset, &data)?;
        self.pay(parts.iter().map(|part| part.len).sum())?;
        if ordered && !self.turns.wait(number) {
            return Ok(());
        }
        let last = parts.len().saturating_sub(1);
        if parts.is_empty() {
            self.turns.done(number);
        }
        for (index, part) in parts.iter().enumerate() {
            let offset = part.offset;
            let planned = || {
                if index == last {
                    self.turns.done(number);
                }
            };
            self.write(part, &data, piece.offset, planned)
                .map_err(|source| OpError::Write { offset, source })?;
        }
        Ok(())
    }

    /// What is to be written of a piece.
    fn parts(&self, offset: u64, data: &[u8]) -> Result<Vec<Part>, OpError> {
        let mut parts = Vec::new();
        let unit = usize::try_from(self.hole).unwrap_or(usize::MAX);
        let pack = self.qcow2.filter(|_| self.how.compress);
        for (start, len, zero) in runs(data, unit) {
            let zero = zero && self.how.sparse != 0;
            let at = offset + start as u64;
            if zero && self.zero_already(at) {
                continue;
            }
            let part = |start: usize, len: usize, form| Part {
                offset: offset + start as u64,
                len: len as u64,
                form,
            };
            match pack {
                _ if zero => parts.push(part(start, len, Form::Zero)),
                None => parts.push(part(start, len, Form::Plain)),
                Some(image) => {
                    let cluster = usize::try_from(image.geometry().cluster()).unwrap_or(unit);
                    let bytes = data.get(start..start + len).unwrap_or_default();
                    for (index, bytes) in bytes.chunks(cluster).enumerate() {
                        let packed = image
                            .pack(bytes)
                            .map_err(|source| OpError::Write { offset: at, source })?;
                        let form = packed.map_or(Form::Plain, Form::Packed);
                        parts.push(part(start + index * cluster, bytes.len(), form));
                    }
                }
            }
        }
        Ok(parts)
    }

    fn write(&self, part: &Part, data: &[u8], base: u64, planned: impl FnOnce()) -> io::Result<()> {
        let start = usize::try_from(part.offset - base).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(part.len).unwrap_or(usize::MAX));
        let bytes = data.get(start..end).unwrap_or_default();
        match (&part.form, self.qcow2) {
            (Form::Packed(small), Some(image)) => image.write_packed(part.offset, small, planned),
            (Form::Plain, Some(image)) => image.write_planned(part.offset, bytes, planned),
            (Form::Zero, _) => {
                let zeroed = self.how.target.write_zeroes(part.offset, part.len, true);
                planned();
                zeroed
            }
            (_, None) => {
                planned();
                self.how.target.write(part.offset, bytes)
            }
        }
    }

    /// Waits until `len` more bytes may be written.
    fn pay(&self, len: u64) -> Result<(), OpError> {
        let Some(rate) = self.how.rate.filter(|&rate| rate > 0) else {
            return Ok(());
        };
        let due = {
            let mut paid = self
                .paid
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            paid.1 += len;
            let micros = u128::from(paid.1) * 1_000_000 / u128::from(rate);
            paid.0 + Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
        };
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.control.go_on()?;
            std::thread::sleep(left.min(PATIENCE));
        }
    }
}

/// A part of a piece that is written.
#[derive(Debug)]
struct Part {
    offset: u64,
    len: u64,
    form: Form,
}

/// In which form.
#[derive(Debug)]
enum Form {
    /// As it is.
    Plain,
    /// As zeros.
    Zero,
    /// Compressed to this.
    Packed(Vec<u8>),
}

/// Reads what can be read.
fn salvage(source: &dyn Image, offset: u64, buf: &mut [u8]) {
    for (index, part) in buf.chunks_mut(4096).enumerate() {
        let at = offset + index as u64 * 4096;
        if let Err(error) = source.read(at, part) {
            tracing::warn!(%error, offset = at, "cannot be read, zeros stand for it");
            part.fill(0);
        }
    }
}

#[cfg(test)]
mod tests;
