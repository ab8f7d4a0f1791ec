//! From a chain of descriptors to something a disk can do.
//!
//! A request is a header, data, and one last byte for the status (Virtio 1.2,
//! 5.2.6). How these are cut into descriptors means nothing; which of them are
//! readable and which writable does. All of it is the guest's and is checked here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::{Buffers, IoVec};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use zerocopy::{FromZeros, IntoBytes};

use super::spec::{Header, SECTOR, Segment};
use crate::memory::GuestMap;
use crate::ring::{Chain, Extent, fill_front, take_front, take_last_byte, total};

/// The most data in one request, in bytes. Firmware is known to ask for 1 GiB
/// at once; the host moves at most 2 GiB in one call.
pub const MAX_BYTES: u64 = 1 << 30;

/// The most pieces of memory in one request: what a system call takes.
pub const MAX_PIECES: usize = 1024;

/// The most segments in one discard or write-zeroes. They are done one after
/// the other, so that more would only make a request slower to end.
pub const MAX_SEGMENTS: u32 = 32;

/// The most sectors in one segment of a discard: 2 GiB, which a file system
/// frees without moving data.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 22;

/// The most sectors in one segment of a write-zeroes: 32 MiB, which is
/// written out where the file system cannot do better.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 16;

/// The status that ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed, or not possible as asked.
    IoErr,
    /// No such request.
    Unsupported,
}

impl Status {
    /// The byte for the driver.
    #[must_use]
    pub fn byte(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoErr => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

/// What requests are held against.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Size of the disk in sectors. It may grow at any time.
    pub capacity: Arc<AtomicU64>,
    /// No writes, whatever the driver accepted.
    pub read_only: bool,
    /// The driver accepted discards.
    pub discard: bool,
    /// The driver accepted write-zeroes.
    pub write_zeroes: bool,
    /// The serial number, padded with zeros.
    pub serial: [u8; 20],
}

/// A range of the disk in bytes, inside its capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// How many bytes, not 0.
    pub len: u64,
    /// The range may be deallocated (write-zeroes only).
    pub unmap: bool,
}

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Nothing more: it has been answered with this many bytes of data.
    Answered(u32),
    /// Disk to the chain's writable extents. The offset is in bytes.
    Read(u64),
    /// The chain's readable extents to disk. The offset is in bytes.
    Write(u64),
    /// Make completed writes durable.
    Flush,
    /// Discard the ranges that were parsed.
    Discard,
    /// Zero the ranges that were parsed.
    Zeroes,
}

/// A chain that has a place for a status.
#[derive(Clone, Copy, Debug)]
pub struct Parsed {
    /// Where the status goes: it is memory.
    pub status_at: GuestAddress,
    /// What is asked for, or how it ends at once.
    pub ask: Result<Ask, Status>,
}

/// Reads a chain and leaves only the data's extents in it; the ranges of a
/// discard or write-zeroes go to `ranges`. `None` when there is no place for
/// a status: nothing may be done then, and nothing can be told.
pub fn parse(
    view: &GuestMap,
    chain: &mut Chain,
    limits: &Limits,
    ranges: &mut Vec<Range>,
) -> Option<Parsed> {
    ranges.clear();
    let status_at = take_last_byte(&mut chain.writable)?;
    if !view.address_in_range(status_at) {
        return None;
    }
    let ask = read_ask(view, chain, limits, ranges);
    Some(Parsed { status_at, ask })
}

fn read_ask(
    view: &GuestMap,
    chain: &mut Chain,
    limits: &Limits,
    ranges: &mut Vec<Range>,
) -> Result<Ask, Status> {
    let mut header = Header::new_zeroed();
    if !chain.ordered || !take_front(view, &mut chain.readable, header.as_mut_bytes()) {
        return Err(Status::IoErr);
    }
    match header.kind.get() {
        VIRTIO_BLK_T_IN => {
            expect_none(&chain.readable)?;
            transfer(header.sector.get(), &chain.writable, limits).map(Ask::Read)
        }
        VIRTIO_BLK_T_OUT => {
            expect_writable(chain, limits)?;
            transfer(header.sector.get(), &chain.readable, limits).map(Ask::Write)
        }
        VIRTIO_BLK_T_FLUSH => Ok(Ask::Flush),
        VIRTIO_BLK_T_GET_ID => {
            let written = fill_front(view, &chain.writable, &limits.serial);
            Ok(Ask::Answered(written))
        }
        VIRTIO_BLK_T_DISCARD if limits.discard => {
            expect_writable(chain, limits)?;
            read_ranges(view, chain, limits, MAX_DISCARD_SECTORS, 0, ranges)?;
            Ok(Ask::Discard)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if limits.write_zeroes => {
            expect_writable(chain, limits)?;
            let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
            read_ranges(view, chain, limits, MAX_ZEROES_SECTORS, flags, ranges)?;
            Ok(Ask::Zeroes)
        }
        _ => Err(Status::Unsupported),
    }
}

/// Data in the wrong direction is an error, not something to skip over.
fn expect_none(extents: &[Extent]) -> Result<(), Status> {
    extents.is_empty().then_some(()).ok_or(Status::IoErr)
}

fn expect_writable(chain: &Chain, limits: &Limits) -> Result<(), Status> {
    expect_none(&chain.writable)?;
    (!limits.read_only).then_some(()).ok_or(Status::IoErr)
}

/// The byte offset of a transfer that lies within the disk.
fn transfer(sector: u64, data: &[Extent], limits: &Limits) -> Result<u64, Status> {
    let bytes = total(data);
    if bytes > MAX_BYTES || !bytes.is_multiple_of(SECTOR) {
        return Err(Status::IoErr);
    }
    within(sector, bytes / SECTOR, limits)
}

/// The byte offset of `sector` if `count` sectors from there are on the disk.
fn within(sector: u64, count: u64, limits: &Limits) -> Result<u64, Status> {
    sector
        .checked_add(count)
        .filter(|end| *end <= limits.capacity.load(Ordering::Acquire))
        .and_then(|_| sector.checked_mul(SECTOR))
        .ok_or(Status::IoErr)
}

fn read_ranges(
    view: &GuestMap,
    chain: &mut Chain,
    limits: &Limits,
    max_sectors: u32,
    known_flags: u32,
    ranges: &mut Vec<Range>,
) -> Result<(), Status> {
    let bytes = total(&chain.readable);
    let size = size_of::<Segment>() as u64;
    if bytes == 0 || !bytes.is_multiple_of(size) || bytes / size > u64::from(MAX_SEGMENTS) {
        return Err(Status::IoErr);
    }
    while !chain.readable.is_empty() {
        let mut segment = Segment::new_zeroed();
        if !take_front(view, &mut chain.readable, segment.as_mut_bytes()) {
            return Err(Status::IoErr);
        }
        let (count, flags) = (segment.num_sectors.get(), segment.flags.get());
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        if count > max_sectors {
            return Err(Status::IoErr);
        }
        let offset = within(segment.sector.get(), count.into(), limits)?;
        if count > 0 {
            ranges.push(Range {
                offset,
                len: u64::from(count) * SECTOR,
                unmap: flags != 0,
            });
        }
    }
    Ok(())
}

/// The host memory behind `extents`, gathered in `pieces`; `None` when part of them is not memory,
/// or when they fall into more than [`MAX_PIECES`].
#[expect(
    unsafe_code,
    reason = "only the caller of Buffers knows what keeps the memory mapped"
)]
pub fn buffers(
    view: &Arc<GuestMap>,
    extents: &[Extent],
    pieces: &mut Vec<IoVec>,
) -> Option<Buffers> {
    pieces.clear();
    for extent in extents {
        let len = usize::try_from(extent.len).ok()?;
        for slice in GuestMemoryBackend::get_slices(&**view, extent.addr, len) {
            let slice = slice.ok()?;
            pieces.push(IoVec {
                base: slice.ptr_guard_mut().as_ptr(),
                len: slice.len(),
            });
        }
        if pieces.len() > MAX_PIECES {
            return None;
        }
    }
    let owner = Arc::clone(view);
    // SAFETY: every piece is a slice of a region of `view`, which is mapped
    // readable and writable until the region is dropped; `owner` keeps it. Guest
    // memory is accessed by volatile copies only: no reference to it exists.
    Some(unsafe { Buffers::from_slice(pieces, owner) })
}

/// Marks `extents` as written by the device.
pub fn mark_dirty(view: &GuestMap, extents: &[Extent]) {
    for extent in extents {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        for slice in GuestMemoryBackend::get_slices(view, extent.addr, len).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
