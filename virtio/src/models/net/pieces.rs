//! Chains of descriptors as memory that a network reads and writes.

use std::ops::Range;

use net::{IoVec, Pieces};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::GuestMap;
use crate::ring::Extent;

/// Adds the host memory behind `extents` to `list`. `false`, with the list as it was, when part of them is
/// not memory or there would be more than `most` pieces.
pub fn resolve(view: &GuestMap, extents: &[Extent], list: &mut Vec<IoVec>, most: usize) -> bool {
    let before = list.len();
    for extent in extents {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        for slice in GuestMemoryBackend::get_slices(view, extent.addr, len) {
            match slice {
                Ok(slice) if list.len() < most => list.push(IoVec {
                    base: slice.ptr_guard_mut().as_ptr(),
                    len: slice.len(),
                }),
                _ => {
                    list.truncate(before);
                    return false;
                }
            }
        }
    }
    true
}

/// Lends memory that [`resolve`] has found in `view`, besides memory of the worker's own.
#[expect(
    unsafe_code,
    reason = "what keeps the memory mapped is known here alone"
)]
pub fn lend<'a>(_view: &'a GuestMap, list: &'a [IoVec]) -> Pieces<'a> {
    // SAFETY: the pieces are slices of regions of `view`, which are mapped readable and
    // writable until the last handle on the region is dropped; the view that is borrowed is one. Guest memory is accessed by
    // volatile copies and system calls only, so that no reference to it exists. The one
    // piece that is not guest memory is the receiver's spare room, which lives behind a
    // raw pointer for as long as the receiver does and is not looked at during a call.
    unsafe { Pieces::new(list) }
}

/// What of each of `extents` lies in `range`, counted in bytes from the first one's start.
fn windows(extents: &[Extent], range: Range<usize>) -> impl Iterator<Item = (GuestAddress, usize)> {
    let Range { mut start, end } = range;
    let mut left = end.saturating_sub(start);
    extents.iter().filter_map(move |extent| {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        let skipped = start.min(len);
        start -= skipped;
        let part = (len - skipped).min(left);
        left -= part;
        // It is inside memory, so nothing wraps.
        let at = GuestAddress(extent.addr.0.saturating_add(skipped as u64));
        (part > 0).then_some((at, part))
    })
}

/// Copies the bytes from `skip` on into `into`, as far as there are any.
pub fn read_at(view: &GuestMap, extents: &[Extent], skip: usize, into: &mut [u8]) {
    let mut rest = into;
    let range = skip..skip.saturating_add(rest.len());
    for (at, len) in windows(extents, range) {
        let (part, later) = rest.split_at_mut(len.min(rest.len()));
        // What is not memory stays as it is.
        let _ = view.read_slice(part, at);
        rest = later;
    }
}

/// Overwrites the bytes from `skip` on with `from`, as far as there is room.
pub fn write_at(view: &GuestMap, extents: &[Extent], skip: usize, from: &[u8]) {
    let mut rest = from;
    let range = skip..skip.saturating_add(rest.len());
    for (at, len) in windows(extents, range) {
        let (part, later) = rest.split_at(len.min(rest.len()));
        // What is not memory takes nothing.
        let _ = view.write_slice(part, at);
        rest = later;
    }
}

/// Notes that the first `len` bytes have been written by the device.
pub fn mark_dirty(view: &GuestMap, extents: &[Extent], len: usize) {
    for (at, len) in windows(extents, 0..len) {
        for slice in GuestMemoryBackend::get_slices(view, at, len).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
