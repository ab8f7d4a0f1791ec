//! The memory that frames are moved from and to.

use std::io;
use std::marker::PhantomData;
use std::mem::{align_of, offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes in front of every frame: `virtio_net_hdr` with `num_buffers` (Virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;

/// The most pieces in one call (`UIO_MAXIOV`).
pub const MAX_PIECES: usize = 1024;

/// A piece of memory, with the layout of the system's `iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IoVec {
    /// The first byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());
const _: () = assert!(offset_of!(IoVec, base) == offset_of!(libc::iovec, iov_base));
const _: () = assert!(offset_of!(IoVec, len) == offset_of!(libc::iovec, iov_len));

#[expect(unsafe_code, reason = "an address alone may go to any thread")]
// SAFETY: an `IoVec` is an address and a number. Following the address needs a
// promise of its own, [`Pieces::new`].
unsafe impl Send for IoVec {}

/// Pieces of memory that may be read and written for as long as this lives.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a> {
    list: &'a [IoVec],
    memory: PhantomData<&'a ()>,
}

impl<'a> Pieces<'a> {
    /// Lends the memory that `list` names. Pieces past [`MAX_PIECES`] are left out.
    ///
    /// # Safety
    ///
    /// For the whole of `'a` each piece is mapped, readable and writable, and no reference of Rust's to any
    /// byte of it exists. Others (a guest) may change it at any time.
    #[expect(
        unsafe_code,
        reason = "only the caller knows what keeps the memory mapped"
    )]
    #[must_use]
    pub unsafe fn new(list: &'a [IoVec]) -> Self {
        Self {
            list: list.get(..MAX_PIECES).unwrap_or(list),
            memory: PhantomData,
        }
    }

    /// The pieces.
    #[must_use]
    pub fn list(&self) -> &'a [IoVec] {
        self.list
    }

    /// How many bytes they have.
    #[must_use]
    pub fn len(&self) -> usize {
        let lens = self.list.iter().map(|piece| piece.len);
        lens.fold(0, usize::saturating_add)
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads from `fd` into the pieces, by one system call, and returns how many bytes.
    ///
    /// # Errors
    ///
    /// The system's.
    #[expect(unsafe_code, reason = "readv")]
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the creator promised that the pieces are writable memory without references;
        // there are no more of them than the count, and `IoVec` has the layout of `iovec`.
        let result =
            unsafe { libc::readv(fd.as_raw_fd(), self.list.as_ptr().cast(), self.count()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Writes the pieces to `fd`, by one system call, and returns how many bytes.
    ///
    /// # Errors
    ///
    /// The system's.
    #[expect(unsafe_code, reason = "writev")]
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as in `read_from`, with memory that is read.
        let result =
            unsafe { libc::writev(fd.as_raw_fd(), self.list.as_ptr().cast(), self.count()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Copies the bytes from `skip` on to `to`, until either ends; how many that were.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    pub fn copy_to(&self, skip: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.window(skip, to.len()) {
            let room = to.get_mut(done..).unwrap_or_default();
            let len = piece.len.min(room.len());
            // SAFETY: the creator promised that the piece, of which this is a part, is mapped and readable, and that
            // no reference to it exists, so that `room`, which is long enough, is other memory. Another's
            // concurrent change can only mix bytes.
            unsafe { room.as_mut_ptr().copy_from_nonoverlapping(piece.base, len) };
            done += len;
        }
        done
    }

    /// Overwrites the bytes from `skip` on with `from`, until either ends; how many that were.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    pub fn copy_from(&self, skip: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.window(skip, from.len()) {
            let part = from.get(done..).unwrap_or_default();
            let len = piece.len.min(part.len());
            // SAFETY: as in `copy_to`, with a piece that is writable and `part` long enough.
            unsafe { piece.base.copy_from_nonoverlapping(part.as_ptr(), len) };
            done += len;
        }
        done
    }

    /// The parts of the pieces that lie in the `len` bytes from `skip` on.
    fn window(&self, skip: usize, len: usize) -> impl Iterator<Item = IoVec> {
        let (mut skip, mut left) = (skip, len);
        self.list.iter().map(move |piece| {
            let skipped = skip.min(piece.len);
            skip -= skipped;
            let part = (piece.len - skipped).min(left);
            left -= part;
            IoVec {
                base: piece.base.wrapping_add(skipped),
                len: part,
            }
        })
    }

    fn count(&self) -> libc::c_int {
        // It is at most `MAX_PIECES`.
        libc::c_int::try_from(self.list.len()).unwrap_or(0)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Lends `parts` to `call`.
    #[expect(unsafe_code, reason = "memory of the test's own")]
    pub(crate) fn with_pieces<T>(parts: &mut [Vec<u8>], call: impl FnOnce(Pieces<'_>) -> T) -> T {
        let list: Vec<IoVec> = parts
            .iter_mut()
            .map(|part| IoVec {
                base: part.as_mut_ptr(),
                len: part.len(),
            })
            .collect();
        // SAFETY: the vectors are borrowed while this runs and nobody else has them.
        call(unsafe { Pieces::new(&list) })
    }
}
