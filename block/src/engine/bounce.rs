//! Memory aligned for direct I/O, for requests whose own memory is not.

use std::alloc::{Layout, alloc, dealloc};
use std::io;
use std::ptr::NonNull;

use crate::buffers::{IoVec, for_window};

/// Suits every alignment that the host is known to demand of memory.
const ALIGN: usize = 64 << 10;

/// The size and alignment of a large page, in bytes.
const LARGE_PAGE: usize = 2 << 20;

/// The size of one bounce buffer, in bytes; larger requests go through it in turns.
pub(crate) const BOUNCE_SIZE: usize = 256 << 10;

/// How many bounce buffers a queue has at most: 4 MiB.
const BOUNCE_COUNT: usize = 16;

/// Zeroed, aligned memory of fixed length.
#[derive(Debug)]
pub(crate) struct AlignedBuf {
    start: NonNull<u8>,
    layout: Layout,
}

#[expect(unsafe_code, reason = "a raw address is not Send by default")]
// SAFETY: the buffer owns its memory alone.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// Allocates `len` bytes, at least one. Where that is a large page or more, the host is asked for such.
    #[expect(unsafe_code, reason = "aligned memory comes from the raw allocator")]
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let align = if len < LARGE_PAGE { ALIGN } else { LARGE_PAGE };
        let layout = Layout::from_size_align(len.max(1), align).map_err(io::Error::other)?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) };
        let start = NonNull::new(start).ok_or(io::ErrorKind::OutOfMemory)?;
        if align == LARGE_PAGE {
            // SAFETY: advice about whole pages of memory that is ours, which changes no content. The host may
            // refuse it: that costs only time.
            let _ = unsafe {
                libc::madvise(
                    start.as_ptr().cast(),
                    len - len % LARGE_PAGE,
                    libc::MADV_HUGEPAGE,
                )
            };
        }
        // SAFETY: so long is the memory.
        unsafe { start.write_bytes(0, layout.size()) };
        Ok(Self { start, layout })
    }

    /// The whole buffer. Not to be called while the host works on it.
    #[expect(unsafe_code, reason = "the memory is raw")]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory is ours, initialised (zeroed), and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }

    /// The whole buffer, to look at. Not to be called while the host works on it.
    #[expect(unsafe_code, reason = "the memory is raw")]
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised (zeroed), and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    /// The first `len` bytes, as the host sees them.
    pub(crate) fn piece(&self, len: usize) -> IoVec {
        self.part(0, len)
    }

    /// `len` bytes from `from` on, as the host sees them; fewer where it ends before.
    #[expect(unsafe_code, reason = "the memory is raw")]
    pub(crate) fn part(&self, from: usize, len: usize) -> IoVec {
        let from = from.min(self.layout.size());
        IoVec {
            // SAFETY: no further than one past the end.
            base: unsafe { self.start.as_ptr().add(from) },
            len: len.min(self.layout.size() - from),
        }
    }

    /// Copies bytes between the start of this buffer and the bytes of
    /// `pieces` that begin `skip` bytes in; stops at the end of either, and after `len`.
    ///
    /// The pieces must be valid memory, as those of [`crate::Buffers`] are
    /// while it lives.
    #[expect(unsafe_code, reason = "guest memory is reached by address only")]
    pub(crate) fn exchange(&mut self, pieces: &[IoVec], skip: u64, len: usize, way: Way) {
        let mut at = 0_usize;
        let mut left = len.min(self.layout.size());
        for_window(pieces, skip, u64::MAX, |piece| {
            let n = piece.len.min(left);
            // SAFETY: `at + n` is within this buffer by `left`, and `piece` is
            // within memory that its `Buffers` keeps valid; the two are
            // different allocations. Another's concurrent change of the piece
            // can only mix bytes.
            unsafe {
                let own = self.start.as_ptr().add(at);
                match way {
                    Way::In => std::ptr::copy_nonoverlapping(piece.base, own, n),
                    Way::Out => std::ptr::copy_nonoverlapping(own, piece.base, n),
                }
            }
            at += n;
            left -= n;
            left > 0
        });
    }
}

impl Drop for AlignedBuf {
    #[expect(unsafe_code, reason = "aligned memory goes back to the raw allocator")]
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// The direction of [`AlignedBuf::exchange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the pieces.
    In,
    /// To the pieces.
    Out,
}

/// A queue's bounce buffers: made when first needed, bounded in number.
#[derive(Debug, Default)]
pub(crate) struct BouncePool {
    free: Vec<AlignedBuf>,
    made: usize,
}

impl BouncePool {
    /// A buffer; `None` when all are in use (one will come back).
    ///
    /// # Errors
    ///
    /// No memory, and no buffer in use that could come back.
    pub(crate) fn take(&mut self) -> io::Result<Option<AlignedBuf>> {
        if let Some(buf) = self.free.pop() {
            return Ok(Some(buf));
        }
        if self.made >= BOUNCE_COUNT {
            return Ok(None);
        }
        match AlignedBuf::new(BOUNCE_SIZE) {
            Ok(buf) => {
                self.made += 1;
                Ok(Some(buf))
            }
            Err(_) if self.made > 0 => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes a buffer back.
    pub(crate) fn give(&mut self, buf: AlignedBuf) {
        self.free.push(buf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_every_size_is_aligned_and_zero_and_has_parts() {
        for len in [0, 1, 4096, LARGE_PAGE - 1, LARGE_PAGE, 2 * LARGE_PAGE + 512] {
            // The allocator gives out again what it has got back, with what was in it.
            AlignedBuf::new(len).unwrap().bytes_mut().fill(0xee);
            let buf = AlignedBuf::new(len).unwrap();
            assert!(buf.bytes().iter().all(|byte| *byte == 0), "{len}");
            let whole = buf.piece(len);
            assert!(whole.base.addr().is_multiple_of(ALIGN), "{len}");
            let end = buf.part(len, 10);
            assert_eq!(end.base.addr() - whole.base.addr(), len);
            assert_eq!(end.len, len.max(1) - len);
            assert_eq!(buf.part(len / 2, usize::MAX).len, len.max(1) - len / 2);
        }
    }
}
