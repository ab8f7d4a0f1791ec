//! Sizes that follow from an image's header.

/// The smallest and largest cluster sizes, as powers of two.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// How many parts an extended L2 entry divides its cluster into.
pub(crate) const SUBCLUSTERS: u64 = 32;

/// The numbers that all of an image's tables depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Clusters are `1 << cluster_bits` bytes; within [`CLUSTER_BITS`].
    pub cluster_bits: u32,
    /// L2 entries are 16 bytes and have subclusters.
    pub extended: bool,
    /// Refcounts are `1 << refcount_order` bits wide; at most 6.
    pub refcount_order: u32,
    /// The header's version, 2 or 3.
    pub version: u32,
    /// Data is in a file of its own, each cluster at its guest offset.
    pub data_file: bool,
}

impl Geometry {
    /// The size of a cluster in bytes.
    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The size of an L2 entry in bytes.
    pub(crate) fn entry_size(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// How many entries an L2 table has, as a power of two.
    pub(crate) fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// How many entries an L2 table has.
    pub(crate) fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// How many bytes of the disk one L2 table maps, as a power of two.
    pub(crate) fn table_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub(crate) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.table_bits())
    }

    /// The unit of copy on write, in bytes: a cluster, or a subcluster.
    pub(crate) fn grain(&self) -> u64 {
        if self.extended {
            self.cluster() / SUBCLUSTERS
        } else {
            self.cluster()
        }
    }

    /// How many clusters one refcount block counts, as a power of two.
    pub(crate) fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// The largest refcount.
    pub(crate) fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.refcount_order))
    }

    /// Rounds down to a cluster.
    pub(crate) fn down(&self, offset: u64) -> u64 {
        offset & !(self.cluster() - 1)
    }

    /// How many clusters hold this many bytes.
    pub(crate) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// The offset within a cluster.
    pub(crate) fn within(&self, offset: u64) -> u64 {
        offset & (self.cluster() - 1)
    }
}
