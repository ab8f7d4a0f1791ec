//! Memory that requests read from and write to.
//!
//! A [`Buffers`] with up to [`INLINE`] pieces takes no allocation of its own,
//! so that a small request costs none at all.

use std::any::Any;
use std::fmt;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::sync::{Arc, LazyLock};

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

/// How many bytes [`Buffers::is_zero`] looks at together.
const CHUNK: usize = 1024;

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

impl Buffers {
    /// The `len` bytes from `offset` on, or as many of them as there are, as buffers of the same
    /// owner. Up to [`INLINE`] pieces need no allocation.
    #[must_use]
    pub fn slice(&self, offset: u64, len: u64) -> Self {
        let mut array = [NO_PIECE; INLINE];
        let mut count = 0;
        let mut many = Vec::new();
        for_window(self.pieces(), offset, len, |piece| {
            match array.get_mut(count) {
                Some(room) => *room = piece,
                None if many.is_empty() => {
                    many.extend_from_slice(&array);
                    many.push(piece);
                }
                None => many.push(piece),
            }
            count += 1;
            true
        });
        let pieces = if many.is_empty() {
            Pieces::Few { len: count, array }
        } else {
            Pieces::Many(many)
        };
        Self {
            pieces,
            owner: Arc::clone(&self.owner),
        }
    }

    /// Fills a range of the bytes, as far as there are any, with zeros.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    pub fn fill_zero(&self, range: Range<u64>) {
        let len = range.end.saturating_sub(range.start);
        for_window(self.pieces(), range.start, len, |piece| {
            // SAFETY: the creator promised that a piece is mapped and writable as long as the owner
            // lives, which `self` sees to, and that no reference to it exists.
            unsafe { piece.base.write_bytes(0, piece.len) };
            true
        });
    }

    /// Copies the first bytes to `to`, until either ends; how many that were.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let mut done = 0;
        for_window(self.pieces(), 0, to.len() as u64, |piece| {
            let Some(room) = to.get_mut(done..done + piece.len) else {
                return false;
            };
            // SAFETY: the creator promised that a piece is mapped and readable as long as the owner
            // lives, which `self` sees to, and that no reference to it exists, so that `room`, which
            // is as long, is other memory. Another's concurrent change can only mix bytes.
            unsafe {
                room.as_mut_ptr()
                    .copy_from_nonoverlapping(piece.base, piece.len);
            };
            done += piece.len;
            true
        });
        done
    }

    /// Overwrites the first bytes with those of `from`, until either ends; how many that were.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for_window(self.pieces(), 0, from.len() as u64, |piece| {
            let Some(part) = from.get(done..done + piece.len) else {
                return false;
            };
            // SAFETY: as in `copy_to`, with a piece that is writable and `part` as long.
            unsafe {
                piece
                    .base
                    .copy_from_nonoverlapping(part.as_ptr(), piece.len);
            };
            done += piece.len;
            true
        });
        done
    }

    /// Whether all bytes are zero at the time they are looked at.
    #[expect(unsafe_code, reason = "the memory is reached by address only")]
    #[must_use]
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0_u8; CHUNK];
        self.pieces().iter().all(|piece| {
            let mut at = 0;
            while at < piece.len {
                let len = (piece.len - at).min(CHUNK);
                let part = piece.base.wrapping_add(at);
                // Looked at in a copy, which nobody changes meanwhile.
                // SAFETY: the creator promised that a piece, of which this is a part, is mapped and
                // readable as long as the owner lives; it fits into the chunk by its length.
                unsafe { chunk.as_mut_ptr().copy_from_nonoverlapping(part, len) };
                // Without a branch for each byte, so that vector instructions can do it.
                let any = chunk.get(..len).unwrap_or(&chunk);
                if any.iter().fold(0, |any, byte| any | byte) != 0 {
                    return false;
                }
                at += len;
            }
            true
        })
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Buffers").field(&self.pieces()).finish()
    }
}

/// Walks the part of `pieces` that starts `skip` bytes in and is at most `len`
/// bytes long, until `each` says false. Empty pieces are left out.
pub(crate) fn for_window(
    pieces: &[IoVec],
    skip: u64,
    len: u64,
    mut each: impl FnMut(IoVec) -> bool,
) {
    let mut skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    for piece in pieces {
        if left == 0 {
            break;
        }
        let skipped = skip.min(piece.len);
        skip -= skipped;
        let n = (piece.len - skipped).min(left);
        if n == 0 {
            continue;
        }
        left -= n;
        let part = IoVec {
            base: piece.base.wrapping_add(skipped),
            len: n,
        };
        if !each(part) {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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

    /// Pieces of an arena with gaps between them, and their places.
    fn scattered(arena: &Arc<Arena>, lens: &[usize]) -> (Buffers, Vec<(usize, usize)>) {
        let mut at = 3;
        let places: Vec<_> = lens
            .iter()
            .map(|&len| {
                let place = (at, len);
                at += len + 5;
                place
            })
            .collect();
        (arena.buffers(&places), places)
    }

    fn bytes(arena: &Arena, places: &[(usize, usize)]) -> Vec<u8> {
        let each = places.iter().flat_map(|(at, len)| arena.get(*at, *len));
        each.collect()
    }

    fn range() -> impl Strategy<Value = (u64, u64)> {
        prop_oneof![
            (0..9000_u64, 0..9000_u64),
            (0..9000_u64, Just(u64::MAX)),
            (Just(u64::MAX), any::<u64>())
        ]
    }

    proptest! {
        #[test]
        fn slices_are_the_bytes_of_their_range(
            lens in prop::collection::vec(0..1500_usize, 0..8),
            (offset, len) in range(),
            data in any::<u64>(),
        ) {
            let arena = Arena::new(16 << 10);
            let (whole, places) = scattered(&arena, &lens);
            let cycle = data.to_ne_bytes();
            let pattern: Vec<u8> = (0..whole.len()).zip(cycle.into_iter().cycle()).map(|(_, b)| b).collect();
            prop_assert_eq!(whole.copy_from(&pattern), pattern.len());
            prop_assert_eq!(bytes(&arena, &places), pattern.clone());
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(pattern.len());
            let to = from.saturating_add(usize::try_from(len).unwrap_or(usize::MAX)).min(pattern.len());
            let slice = whole.slice(offset, len);
            prop_assert_eq!(slice.len(), (to - from) as u64);
            prop_assert!(slice.pieces().iter().all(|piece| piece.len > 0));
            prop_assert_eq!(matches!(slice.pieces, Pieces::Few { .. }), slice.pieces().len() <= INLINE);
            let mut copy = vec![0xee; pattern.len() + 1];
            prop_assert_eq!(slice.copy_to(&mut copy), to - from);
            prop_assert_eq!(&copy[..to - from], &pattern[from..to]);
            prop_assert!(copy[to - from..].iter().all(|byte| *byte == 0xee));
        }

        #[test]
        fn zeros_fill_their_range_and_nothing_else(
            lens in prop::collection::vec(0..1500_usize, 0..8),
            (offset, len) in range(),
        ) {
            let arena = Arena::new(16 << 10);
            arena.put(0, &[0xff; 16 << 10]);
            let (whole, places) = scattered(&arena, &lens);
            let end = offset.saturating_add(len);
            whole.fill_zero(offset..end);
            for (at, byte) in (0..).zip(bytes(&arena, &places)) {
                prop_assert_eq!(byte == 0, (offset..end).contains(&at));
            }
            let zeros = arena.get(0, 16 << 10).into_iter().filter(|byte| *byte == 0).count() as u64;
            prop_assert_eq!(zeros, whole.slice(offset, end.saturating_sub(offset)).len());
        }

        #[test]
        fn one_byte_anywhere_makes_buffers_other_than_zero(
            lens in prop::collection::vec(0..3000_usize, 1..5),
            place in any::<prop::sample::Index>(),
        ) {
            let arena = Arena::new(16 << 10);
            arena.put(0, &[0xff; 16 << 10]);
            let (whole, _) = scattered(&arena, &lens);
            prop_assert_eq!(whole.is_zero(), whole.is_empty());
            whole.fill_zero(0..u64::MAX);
            prop_assert!(whole.is_zero());
            if !whole.is_empty() {
                let at = place.index(usize::try_from(whole.len()).unwrap()) as u64;
                prop_assert_eq!(whole.slice(at, 1).copy_from(&[0x80]), 1);
                prop_assert!(!whole.is_zero());
            }
        }
    }

    #[test]
    fn copies_stop_at_the_shorter_end() {
        let arena = Arena::new(4096);
        let buffers = arena.buffers(&[(0, 10), (20, 10)]);
        assert_eq!(buffers.copy_from(&[7; 15]), 15);
        assert_eq!(arena.get(20, 10), [7, 7, 7, 7, 7, 0, 0, 0, 0, 0]);
        assert_eq!(buffers.copy_from(&[9; 50]), 20);
        let mut few = [0; 3];
        assert_eq!(buffers.copy_to(&mut few), 3);
        assert_eq!(few, [9; 3]);
    }
}
