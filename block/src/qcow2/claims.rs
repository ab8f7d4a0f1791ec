//! Which clusters hold metadata, and whether one of them is claimed for two things.
//!
//! A table that lies over another one is not seen when it is read. But to write one of them destroys the other, so
//! nothing may be written to such an image.

use std::collections::HashSet;

use super::geometry::Geometry;

/// The clusters that metadata claims.
#[derive(Debug)]
pub(crate) struct Claims {
    geometry: Geometry,
    clusters: HashSet<u64>,
    tables: HashSet<u64>,
    twice: Option<u64>,
}

impl Claims {
    /// Nothing is claimed.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            clusters: HashSet::new(),
            tables: HashSet::new(),
            twice: None,
        }
    }

    /// Claims a range, in bytes, for something that has it alone.
    pub(crate) fn own(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = offset >> self.geometry.cluster_bits;
        let len = self.geometry.within(offset).saturating_add(len);
        let end = first.saturating_add(self.geometry.clusters(len));
        for cluster in first..end {
            if !self.clusters.insert(cluster) {
                self.twice.get_or_insert(cluster);
            }
        }
    }

    /// Claims a cluster for an L2 table, to which several L1 entries may lead.
    pub(crate) fn table(&mut self, offset: u64) {
        self.tables.insert(offset >> self.geometry.cluster_bits);
    }

    /// All clusters that are claimed, and one that is claimed twice, if there is one.
    pub(crate) fn into_parts(mut self) -> (HashSet<u64>, Option<u64>) {
        let twice = self.twice.or_else(|| {
            let mut tables = self.tables.iter();
            tables.find(|table| self.clusters.contains(table)).copied()
        });
        self.clusters.extend(self.tables);
        (self.clusters, twice)
    }
}
