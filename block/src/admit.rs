//! What a disk's options make of a request, whatever the disk's format.

use std::io;

use crate::disk::{Op, Request};
use crate::options::{DetectZeroes, Discard, DiskOptions};

/// What the queues of a disk must know of its options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Refuse changes.
    pub read_only: bool,
    /// A write is durable when it completes.
    pub durable: bool,
    /// A flush does nothing.
    pub ignore_flush: bool,
    /// A discard frees space.
    pub unmap: bool,
    /// What becomes of a write of nothing but zeros.
    pub detect_zeroes: DetectZeroes,
}

/// What is to be done for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Work {
    /// The operation, as far as the options allow it.
    pub op: Op,
    /// It was a write of so many bytes, all of them zero; else 0.
    pub zeros: u64,
}

impl Policy {
    /// What these options mean.
    pub(crate) fn new(options: &DiskOptions) -> Self {
        Self {
            read_only: options.read_only,
            durable: !options.cache.writeback(),
            ignore_flush: options.cache.ignores_flush(),
            unmap: options.discard == Discard::Unmap,
            detect_zeroes: options.detect_zeroes,
        }
    }

    /// What is to be done for a request to a disk of `size` bytes whose offsets and lengths
    /// are multiples of `unit`, or why it may not be. `None` when nothing is to be done.
    pub(crate) fn admit(
        &self,
        request: &Request,
        size: u64,
        unit: u64,
    ) -> io::Result<Option<Work>> {
        let len = match request.op {
            Op::Read | Op::Write => request.buffers.len(),
            Op::Flush if self.read_only || self.ignore_flush => return Ok(None),
            Op::Flush => {
                return Ok(Some(Work {
                    op: Op::Flush,
                    zeros: 0,
                }));
            }
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        if request.op != Op::Read && self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let offset = request.offset;
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > size) || !(offset | len).is_multiple_of(unit) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let op = match request.op {
            Op::Discard { .. } if !self.unmap => return Ok(None),
            Op::WriteZeroes { len, may_unmap } => {
                let may_unmap = may_unmap && self.unmap;
                Op::WriteZeroes { len, may_unmap }
            }
            Op::Write if self.detect_zeroes != DetectZeroes::Off && request.buffers.is_zero() => {
                let may_unmap = self.detect_zeroes == DetectZeroes::Unmap && self.unmap;
                return Ok(Some(Work {
                    op: Op::WriteZeroes { len, may_unmap },
                    zeros: len,
                }));
            }
            op => op,
        };
        Ok(Some(Work { op, zeros: 0 }))
    }
}
