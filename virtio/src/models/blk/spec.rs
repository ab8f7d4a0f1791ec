//! Layouts and numbers of the block device (Virtio 1.2, section 5.2).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A sector: the unit of offsets and of the capacity, whatever the disk's own
/// block size is. In bytes.
pub const SECTOR: u64 = 512;

/// The configuration space (5.2.4).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigSpace {
    /// Size of the disk in sectors.
    pub capacity: U64,
    /// Most bytes in one segment; not offered.
    pub size_max: U32,
    /// Most data segments in one request.
    pub seg_max: U32,
    /// Cylinders, heads, sectors; not offered.
    pub geometry: [u8; 4],
    /// The logical block in bytes.
    pub blk_size: U32,
    /// log2 of how many logical blocks make a physical one.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Smallest efficient transfer in logical blocks.
    pub min_io_size: U16,
    /// Best transfer in logical blocks; 0: none stated.
    pub opt_io_size: U32,
    /// 1: completed writes may be volatile until a flush; 0: they are durable.
    pub writeback: u8,
    /// Reserved.
    pub unused0: u8,
    /// Number of queues.
    pub num_queues: U16,
    /// Most sectors in one segment of a discard.
    pub max_discard_sectors: U32,
    /// Most segments in one discard.
    pub max_discard_seg: U32,
    /// What discards should be aligned to, in sectors.
    pub discard_sector_alignment: U32,
    /// Most sectors in one segment of a write-zeroes.
    pub max_write_zeroes_sectors: U32,
    /// Most segments in one write-zeroes.
    pub max_write_zeroes_seg: U32,
    /// A write-zeroes may free the space.
    pub write_zeroes_may_unmap: u8,
    /// Reserved.
    pub unused1: [u8; 3],
    /// Secure erase: not offered.
    pub secure_erase: [U32; 3],
}

const _: () = assert!(size_of::<ConfigSpace>() == 72);

/// Where [`ConfigSpace::writeback`] is, the only field that can be written.
pub const WRITEBACK_OFFSET: u64 = 32;

const _: () = assert!(std::mem::offset_of!(ConfigSpace, writeback) == 32);

/// The start of every request (5.2.6).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// What to do: a `VIRTIO_BLK_T_` number.
    pub kind: U32,
    /// Reserved.
    pub reserved: U32,
    /// Where, in sectors.
    pub sector: U64,
}

const _: () = assert!(size_of::<Header>() == 16);

/// One range of a discard or write-zeroes (5.2.6).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// The first sector.
    pub sector: U64,
    /// How many sectors.
    pub num_sectors: U32,
    /// Bit 0: unmap, for write-zeroes only. The others are reserved.
    pub flags: U32,
}

const _: () = assert!(size_of::<Segment>() == 16);
