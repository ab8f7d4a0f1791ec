//! Layouts and numbers of the memory balloon (Virtio 1.2, section 5.5).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device type number.
pub const DEVICE_TYPE: u16 = 5;

/// A balloon counts in pages of this many bytes, whatever the guest's or the host's are.
pub const PAGE: u64 = 4096;

/// Feature bits (5.5.3).
pub mod feature {
    /// The driver tells of pages before it uses them again.
    pub const MUST_TELL_HOST: u64 = 1 << 0;
    /// There is a queue for statistics.
    pub const STATS_VQ: u64 = 1 << 1;
    /// The driver may take pages back when the guest is out of memory.
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// There is a queue for hints of free pages.
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    /// The driver tells what it fills free pages with.
    pub const PAGE_POISON: u64 = 1 << 4;
    /// There is a queue for reports of free pages.
    pub const PAGE_REPORTING: u64 = 1 << 5;
}

/// The configuration space (5.5.4).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigSpace {
    /// How many pages the balloon is to have.
    pub num_pages: U32,
    /// How many it has. The driver writes it.
    pub actual: U32,
    /// What the driver is to do about hints: [`HINT_STOP`], [`HINT_DONE`] or a round's id.
    pub free_page_hint_cmd_id: U32,
    /// What the driver fills free pages with. It writes it.
    pub poison_val: U32,
}

const _: () = assert!(size_of::<ConfigSpace>() == 16);

/// Where [`ConfigSpace::actual`] and [`ConfigSpace::poison_val`] begin, which can be written.
pub const ACTUAL_OFFSET: u64 = 4;
pub const POISON_OFFSET: u64 = 12;

const _: () = assert!(std::mem::offset_of!(ConfigSpace, actual) == 4);
const _: () = assert!(std::mem::offset_of!(ConfigSpace, poison_val) == 12);

/// No hints are wanted any more; those that were given still hold (5.5.6.4).
pub const HINT_STOP: u32 = 0;
/// The driver may use the pages again that it has told of.
pub const HINT_DONE: u32 = 1;
/// The first id of a round of hints.
pub const HINT_FIRST: u32 = 2;

/// One statistic (5.5.6.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Statistic {
    /// Which: an index into [`STATISTICS`].
    pub tag: U16,
    /// How much.
    pub value: U64,
}

const _: () = assert!(size_of::<Statistic>() == 10);

/// The names of the statistics by their tags (5.5.6.4). Those of memory are in bytes. The last six are younger
/// than Virtio 1.2.
pub const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
];
