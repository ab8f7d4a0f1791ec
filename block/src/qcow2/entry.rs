//! Entries of the L1 and L2 tables ("Cluster mapping").

use super::geometry::Geometry;

/// The refcount of what the entry points to is exactly one (`OFLAG_COPIED`).
pub(crate) const COPIED: u64 = 1 << 63;
/// The cluster is compressed (`OFLAG_COMPRESSED`).
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros (version 3, not extended).
pub(crate) const ZERO: u64 = 1;
/// Where an entry's host offset is, bits 9 to 55.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EntryError {
    /// Reserved bits are set.
    #[error("reserved bits are set in entry {0:#x}")]
    Reserved(u64),
    /// The host offset is not at the start of a cluster.
    #[error("entry {0:#x} does not point to the start of a cluster")]
    Unaligned(u64),
    /// A subcluster is both allocated and zero, or allocated without a cluster.
    #[error("the subclusters {bitmap:#x} of entry {entry:#x} contradict themselves")]
    Subclusters {
        /// The entry.
        entry: u64,
        /// Its bitmap.
        bitmap: u64,
    },
}

/// Where a table's or cluster's bytes are, from an L1 entry; `None` when there is no table.
pub(crate) fn l1(entry: u64, geometry: &Geometry) -> Result<Option<u64>, EntryError> {
    if entry & !(COPIED | OFFSET) != 0 {
        return Err(EntryError::Reserved(entry));
    }
    let offset = entry & OFFSET;
    if geometry.within(offset) != 0 {
        return Err(EntryError::Unaligned(entry));
    }
    Ok((offset != 0).then_some(offset))
}

/// An L2 entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum L2 {
    /// Nothing: the backing file's bytes, or zeros.
    Absent,
    /// Zeros, with a host cluster kept for it or not (extended entries never decode to this).
    Zero {
        /// The cluster that is kept.
        host: Option<u64>,
        /// Nothing else refers to it.
        copied: bool,
    },
    /// Data in a host cluster of its own.
    Data {
        /// Its offset in bytes.
        host: u64,
        /// Nothing else refers to it.
        copied: bool,
    },
    /// An extended entry with some subclusters of any kind.
    Parts {
        /// The host cluster, if there is one.
        host: Option<u64>,
        /// Nothing else refers to it.
        copied: bool,
        /// Bit n: subcluster n is in the host cluster.
        allocated: u32,
        /// Bit n: subcluster n reads as zeros.
        zero: u32,
    },
    /// Compressed data.
    Compressed(Compressed),
}

/// Where a compressed cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compressed {
    /// Offset of its first byte.
    pub offset: u64,
    /// How many bytes it may have at most, up to the end of its last 512-byte sector.
    pub len: u64,
}

impl Compressed {
    fn offset_bits(geometry: &Geometry) -> u32 {
        62 - (geometry.cluster_bits - 8)
    }

    /// Decodes the descriptor's 62 bits.
    pub(crate) fn decode(entry: u64, geometry: &Geometry) -> Self {
        let bits = Self::offset_bits(geometry);
        let offset = entry & ((1 << bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> bits;
        let end = ((offset >> 9) + sectors + 1) << 9;
        Self {
            offset,
            len: end - offset,
        }
    }

    /// Encodes an entry for `len` bytes at `offset`; `None` when they do not fit its fields.
    pub(crate) fn encode(offset: u64, len: u64, geometry: &Geometry) -> Option<u64> {
        let bits = Self::offset_bits(geometry);
        let last = offset.checked_add(len.checked_sub(1)?)?;
        let sectors = (last >> 9) - (offset >> 9);
        (offset < 1 << bits && sectors < 1 << (62 - bits))
            .then_some(COMPRESSED | (sectors << bits) | offset)
    }
}

/// Decodes an L2 entry; `bitmap` is that of an extended entry, else 0.
pub(crate) fn l2(entry: u64, bitmap: u64, geometry: &Geometry) -> Result<L2, EntryError> {
    if entry & COMPRESSED != 0 {
        if entry & COPIED != 0 || bitmap != 0 {
            return Err(EntryError::Reserved(entry));
        }
        return Ok(L2::Compressed(Compressed::decode(entry, geometry)));
    }
    let zero_flag = if geometry.version >= 3 && !geometry.extended {
        ZERO
    } else {
        0
    };
    if entry & !(COPIED | OFFSET | zero_flag) != 0 {
        return Err(EntryError::Reserved(entry));
    }
    let offset = entry & OFFSET;
    if geometry.within(offset) != 0 {
        return Err(EntryError::Unaligned(entry));
    }
    let copied = entry & COPIED != 0;
    // In a data file the first cluster is at offset 0, and only the flag tells that it is there.
    let host = (offset != 0 || (geometry.data_file && copied)).then_some(offset);
    if geometry.extended {
        return parts(entry, bitmap, host, copied);
    }
    Ok(match (entry & zero_flag != 0, host) {
        (true, host) => L2::Zero { host, copied },
        (false, Some(host)) => L2::Data { host, copied },
        (false, None) => L2::Absent,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of a bitmap"
)]
fn parts(entry: u64, bitmap: u64, host: Option<u64>, copied: bool) -> Result<L2, EntryError> {
    let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    if allocated & zero != 0 || (allocated != 0 && host.is_none()) {
        return Err(EntryError::Subclusters { entry, bitmap });
    }
    Ok(match (host, allocated, zero) {
        (None, _, 0) => L2::Absent,
        (Some(host), u32::MAX, _) => L2::Data { host, copied },
        _ => L2::Parts {
            host,
            copied,
            allocated,
            zero,
        },
    })
}
