//! Which clusters hold metadata, and whether one of them is claimed for two things.
//!
//! A table that lies over another one is not seen when it is read. But to write one of them destroys the other, so
//! nothing may be written to such an image.

use super::clusters::Clusters;
use super::geometry::Geometry;

/// How many L2 tables are noted before those that several entries lead to are looked for again.
const TABLES: usize = 1 << 16;

/// The clusters that metadata claims. It takes memory for each claim, however long.
#[derive(Debug)]
pub(crate) struct Claims {
    geometry: Geometry,
    /// What has its clusters alone: the first of each, and one past its last.
    owned: Vec<(u64, u64)>,
    tables: Vec<u64>,
    /// How many tables there may be before they are compacted.
    room: usize,
}

impl Claims {
    /// Nothing is claimed.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            owned: Vec::new(),
            tables: Vec::new(),
            room: TABLES,
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
        self.owned.push((first, end));
    }

    /// Claims a cluster for an L2 table, to which several L1 entries may lead.
    pub(crate) fn table(&mut self, offset: u64) {
        if self.tables.len() >= self.room {
            self.compact();
            self.room = TABLES.max(self.tables.len().saturating_mul(2));
        }
        self.tables.push(offset >> self.geometry.cluster_bits);
    }

    fn compact(&mut self) {
        self.tables.sort_unstable();
        self.tables.dedup();
    }

    /// All clusters that are claimed, and one that is claimed twice, if there is one.
    pub(crate) fn into_parts(mut self) -> (Clusters, Option<u64>) {
        self.compact();
        self.owned.sort_unstable();
        let mut all = Clusters::default();
        let mut twice = None;
        for &(first, end) in &self.owned {
            if first < all.end() {
                twice.get_or_insert(first);
            }
            all.insert(first, end);
        }
        if twice.is_none() {
            let mut tables = self.tables.iter();
            twice = tables.find(|table| all.contains(**table)).copied();
        }
        for &table in &self.tables {
            all.insert(table, table.saturating_add(1));
        }
        (all, twice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            cluster_bits: 9,
            extended: false,
            refcount_order: 4,
            version: 3,
            data_file: false,
        }
    }

    #[test]
    fn what_touches_is_no_overlap_and_what_overlaps_is() {
        let mut claims = Claims::new(geometry());
        claims.own(0, 512);
        claims.own(2048, 1 << 60);
        claims.own(512, 1536);
        claims.own(99, 0);
        let (all, twice) = claims.into_parts();
        assert_eq!((twice, all.end()), (None, (1 << 51) + 4));
        let mut claims = Claims::new(geometry());
        claims.own(1024, 1 << 60);
        claims.own(1 << 40, 1);
        assert_eq!(claims.into_parts().1, Some(1 << 31));
    }

    #[test]
    fn tables_may_be_shared_but_lie_over_nothing_else() {
        let mut claims = Claims::new(geometry());
        for at in (0..3 * TABLES as u64).rev() {
            claims.table((at % 100_000) << 9);
        }
        assert!(claims.tables.len() <= 100_000 + TABLES);
        let (all, twice) = claims.into_parts();
        assert_eq!((twice, all.end()), (None, 100_000));
        let mut claims = Claims::new(geometry());
        claims.table(5 << 9);
        claims.own(4 << 9, 4096);
        assert_eq!(claims.into_parts().1, Some(5));
    }
}
