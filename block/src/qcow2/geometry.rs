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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every one that a header can have.
    fn all() -> impl Iterator<Item = Geometry> {
        CLUSTER_BITS.flat_map(|cluster_bits| {
            (0..=6).flat_map(move |refcount_order| {
                // Subclusters are sectors at least.
                [false, true]
                    .into_iter()
                    .filter(move |extended| !extended || cluster_bits >= 14)
                    .map(move |extended| Geometry {
                        cluster_bits,
                        extended,
                        refcount_order,
                        version: 3,
                        data_file: false,
                    })
            })
        })
    }

    /// Offsets around each power of two.
    fn offsets() -> impl Iterator<Item = u64> {
        (0..64).flat_map(|bit| {
            let power = 1_u64 << bit;
            [power - 1, power, power + 1, power | (power - 1)]
        })
    }

    #[test]
    fn every_offset_is_in_one_cluster_of_one_table() {
        for geometry in all() {
            let cluster = geometry.cluster();
            assert_eq!(geometry.l2_entries() * geometry.entry_size(), cluster);
            assert_eq!(geometry.l2_entries() * cluster, 1 << geometry.table_bits());
            assert!(geometry.grain() >= 512 && cluster.is_multiple_of(geometry.grain()));
            for offset in offsets() {
                let (down, within) = (geometry.down(offset), geometry.within(offset));
                assert_eq!((down + within, within < cluster), (offset, true));
                assert!(down.is_multiple_of(cluster));
                let tables = geometry.l1_entries(offset);
                let held = u128::from(tables) << geometry.table_bits();
                assert!(held >= u128::from(offset), "{geometry:?} {offset:#x}");
                assert!(held - u128::from(offset) < 1 << geometry.table_bits());
                let clusters = u128::from(geometry.clusters(offset)) * u128::from(cluster);
                assert!(
                    clusters >= u128::from(offset)
                        && clusters - u128::from(offset) < cluster.into()
                );
            }
        }
    }

    #[test]
    fn every_block_of_refcounts_is_a_cluster_and_holds_the_largest() {
        for geometry in all() {
            let width = 1_u64 << geometry.refcount_order;
            assert_eq!(
                (1 << geometry.refblock_bits()) * width,
                geometry.cluster() * 8
            );
            let max = u128::from(geometry.refcount_max());
            assert_eq!(max + 1, 1 << width);
        }
    }
}
