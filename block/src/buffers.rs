//! Memory that requests read from and write to.
//!
//! A [`Buffers`] with up to [`INLINE`] pieces takes no allocation of its own,
//! so that a small request costs none at all.

use std::any::Any;
use std::fmt;
use std::mem::{offset_of, size_of};
use std::sync::{Arc, LazyLock};

use crate::engine::bounce::for_window;

/// How many pieces a [`Buffers`] holds without an allocation.
pub const INLINE: usize = 4;

/// One piece of a buffer in host memory; laid out as the system's `struct iovec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IoVec {
    /// The host virtual address of the first byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

const _: () = assert!(
    size_of::<IoVec>() == size_of::<libc::iovec>()
        && offset_of!(IoVec, base) == offset_of!(libc::iovec, iov_base)
        && offset_of!(IoVec, len) == offset_of!(libc::iovec, iov_len)
);

#[expect(unsafe_code, reason = "raw addresses are not Send by default")]
// SAFETY: it is a plain address; whoever follows it must prove that right anyway.
unsafe impl Send for IoVec {}

/// Memory that a request reads from or writes to.
///
/// The pieces stay valid for as long as `owner` lives: that is what the
/// creator of a `Buffers` promises, and why the constructors are unsafe.
/// The memory may change at any time (a guest owns it); it is only ever read
/// and written whole by the kernel or copied through raw addresses, never
/// referenced.
pub struct Buffers {
    pieces: Pieces,
    owner: Arc<dyn Any + Send + Sync>,
}

enum Pieces {
    Few { len: usize, array: [IoVec; INLINE] },
    Many(Vec<IoVec>),
}

/// The owner of no memory, shared by all who have none.
static NOBODY: LazyLock<Arc<()>> = LazyLock::new(|| Arc::new(()));

const NO_PIECE: IoVec = IoVec {
    base: std::ptr::null_mut(),
    len: 0,
};

impl Buffers {
    /// No memory: for requests that carry no data.
    #[must_use]
    pub fn none() -> Self {
        Self {
            pieces: Pieces::Few {
                len: 0,
                array: [NO_PIECE; INLINE],
            },
            owner: NOBODY.clone(),
        }
    }

    /// Describes memory that is kept alive by `owner`.
    ///
    /// # Safety
    ///
    /// Each piece must be mapped, readable and writable memory of the given
    /// length for as long as `owner` lives, and no Rust reference to it may exist.
    #[expect(unsafe_code, reason = "the caller's promise cannot be checked here")]
    #[must_use]
    pub unsafe fn new(pieces: Vec<IoVec>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            pieces: Pieces::Many(pieces),
            owner,
        }
    }

    /// As [`Buffers::new`], copying the description; up to [`INLINE`] pieces
    /// need no allocation.
    ///
    /// # Safety
    ///
    /// As for [`Buffers::new`].
    #[expect(unsafe_code, reason = "the caller's promise cannot be checked here")]
    #[must_use]
    pub unsafe fn from_slice(pieces: &[IoVec], owner: Arc<dyn Any + Send + Sync>) -> Self {
        let mut array = [NO_PIECE; INLINE];
        let pieces = match array.get_mut(..pieces.len()) {
            Some(room) => {
                room.copy_from_slice(pieces);
                Pieces::Few {
                    len: pieces.len(),
                    array,
                }
            }
            None => Pieces::Many(pieces.to_vec()),
        };
        Self { pieces, owner }
    }

    /// The pieces, in order.
    #[must_use]
    pub fn pieces(&self) -> &[IoVec] {
        match &self.pieces {
            Pieces::Few { len, array } => array.get(..*len).unwrap_or(array),
            Pieces::Many(pieces) => pieces,
        }
    }

    /// The sum of the pieces' lengths, in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.pieces()
            .iter()
            .map(|p| p.len as u64)
            .fold(0, u64::saturating_add)
    }

    /// Whether there is no memory at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Overwrites `len` bytes with zeros, from `skip` bytes in; stops at the end.
    #[expect(unsafe_code, reason = "guest memory is reached by address only")]
    pub(crate) fn zero(&self, skip: u64, len: u64) {
        for_window(self.pieces(), skip, len, |piece| {
            // SAFETY: the piece is within memory that the owner keeps mapped and writable, and
            // nothing refers to it; another's concurrent change can only mix bytes.
            unsafe { std::ptr::write_bytes(piece.base, 0, piece.len) };
            true
        });
    }

    /// Copies `bytes` to where `skip` bytes in is; stops at the end.
    #[expect(unsafe_code, reason = "guest memory is reached by address only")]
    pub(crate) fn put(&self, skip: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for_window(self.pieces(), skip, bytes.len() as u64, |piece| {
            let (now, later) = rest.split_at(piece.len.min(rest.len()));
            // SAFETY: the piece is at least as long as `now`, and within memory that the owner
            // keeps mapped and writable and that nothing refers to, so `now` is elsewhere;
            // another's concurrent change can only mix bytes.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), piece.base, now.len()) };
            rest = later;
            !rest.is_empty()
        });
    }

    /// The part of this memory that begins `skip` bytes in and is at most `len` bytes long.
    #[expect(unsafe_code, reason = "buffers of the same memory")]
    pub(crate) fn window(&self, skip: u64, len: u64) -> Self {
        let mut pieces = Vec::new();
        for_window(self.pieces(), skip, len, |piece| {
            pieces.push(piece);
            true
        });
        // SAFETY: the pieces lie within this one's, under the same owner.
        unsafe { Self::from_slice(&pieces, Arc::clone(&self.owner)) }
    }

    /// What keeps the memory mapped.
    #[must_use]
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Buffers").field(&self.pieces()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Arena;

    fn pieces(count: usize) -> Vec<IoVec> {
        (0..count)
            .map(|i| IoVec {
                base: std::ptr::without_provenance_mut(0x1000 * (i + 1)),
                len: 512 * (i + 1),
            })
            .collect()
    }

    #[test]
    #[expect(unsafe_code, reason = "the addresses are never followed")]
    fn pieces_are_kept_in_order_inline_and_beyond() {
        for count in 0..INLINE * 2 {
            let given = pieces(count);
            // SAFETY: nothing follows these addresses.
            let copied = unsafe { Buffers::from_slice(&given, Arc::new(())) };
            assert_eq!(copied.pieces(), given);
            assert_eq!(
                copied.len(),
                given.iter().map(|p| p.len as u64).sum::<u64>()
            );
            assert_eq!(
                matches!(copied.pieces, Pieces::Few { .. }),
                count <= INLINE,
                "{count} pieces"
            );
        }
    }

    #[test]
    fn bytes_go_to_their_places_across_pieces_and_stop_at_the_end() {
        let arena = Arena::new(4096);
        let buffers = arena.buffers(&[(0, 3), (8, 0), (10, 4)]);
        arena.put(0, &[9; 16]);
        buffers.put(2, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(
            arena.get(0, 16),
            [9, 9, 1, 9, 9, 9, 9, 9, 9, 9, 2, 3, 4, 5, 9, 9]
        );
        buffers.zero(1, 3);
        assert_eq!(
            arena.get(0, 16),
            [9, 0, 0, 9, 9, 9, 9, 9, 9, 9, 0, 3, 4, 5, 9, 9]
        );
        buffers.zero(6, u64::MAX);
        assert_eq!(arena.get(10, 6), [0, 3, 4, 0, 9, 9]);
        let window = buffers.window(2, 3);
        assert_eq!(window.len(), 3);
        window.put(0, &[7; 8]);
        assert_eq!(
            arena.get(0, 16),
            [9, 0, 7, 9, 9, 9, 9, 9, 9, 9, 7, 7, 4, 0, 9, 9]
        );
    }

    #[test]
    #[expect(unsafe_code, reason = "the addresses are never followed")]
    fn lengths_beyond_the_address_space_saturate() {
        let huge = IoVec {
            base: std::ptr::null_mut(),
            len: usize::MAX,
        };
        // SAFETY: nothing follows these addresses.
        let buffers = unsafe { Buffers::from_slice(&[huge, huge], Arc::new(())) };
        assert_eq!(buffers.len(), u64::MAX);
        assert!(Buffers::none().is_empty());
    }
}
