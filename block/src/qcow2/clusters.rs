//! A set of clusters that mostly lie together, kept as ranges: it takes memory for what was put in, however long that is.

use std::collections::BTreeMap;

/// The set. Clusters are told by their numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clusters {
    /// Ranges that neither overlap nor touch: the first cluster of each, and one past its last.
    ranges: BTreeMap<u64, u64>,
}

impl Clusters {
    /// Puts the clusters from `first` up to `end` in.
    pub(crate) fn insert(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        let (mut first, mut end) = (first, end);
        while let Some((&start, &last)) = self.ranges.range(..=end).next_back()
            && last >= first
        {
            self.ranges.remove(&start);
            first = first.min(start);
            end = end.max(last);
        }
        self.ranges.insert(first, end);
    }

    /// Takes a cluster out.
    pub(crate) fn remove(&mut self, cluster: u64) {
        let Some((&first, &end)) = self.ranges.range(..=cluster).next_back() else {
            return;
        };
        if end <= cluster {
            return;
        }
        self.ranges.remove(&first);
        if first < cluster {
            self.ranges.insert(first, cluster);
        }
        if cluster + 1 < end {
            self.ranges.insert(cluster + 1, end);
        }
    }

    /// Whether a cluster is in.
    pub(crate) fn contains(&self, cluster: u64) -> bool {
        let before = self.ranges.range(..=cluster).next_back();
        before.is_some_and(|(_, end)| *end > cluster)
    }

    /// The first cluster that is in from `cluster` on.
    pub(crate) fn next_from(&self, cluster: u64) -> Option<u64> {
        if self.contains(cluster) {
            return Some(cluster);
        }
        let next = self.ranges.range(cluster..).next();
        next.map(|(first, _)| *first)
    }

    /// One past the last cluster that is in; 0 when there is none.
    pub(crate) fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(_, end)| *end)
    }
}

/// Ranges that may overlap as ones that do not, in order: first, end, and how many cover it.
pub(crate) fn layers(ranges: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64, u64)> {
    let ranges = ranges.filter(|(first, end)| first < end);
    let mut edges: Vec<(u64, bool)> = ranges
        .flat_map(|(first, end)| [(first, true), (end, false)])
        .collect();
    edges.sort_unstable();
    let mut layers = Vec::new();
    let (mut covers, mut from) = (0_u64, 0);
    for (at, begins) in edges {
        if covers != 0 && from < at {
            layers.push((from, at, covers));
        }
        from = at;
        covers = if begins {
            covers.saturating_add(1)
        } else {
            covers.saturating_sub(1)
        };
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_join_and_split_as_clusters_come_and_go() {
        let mut set = Clusters::default();
        assert_eq!((set.end(), set.next_from(0)), (0, None));
        set.insert(7, 7);
        for (first, end) in [(10, 20), (30, 40), (20, 25), (5, 11), (39, 39)] {
            set.insert(first, end);
        }
        assert_eq!(set.ranges, [(5, 25), (30, 40)].into());
        set.insert(24, 31);
        assert_eq!(set.ranges, [(5, 40)].into());
        for cluster in [5, 39, 20, 20, 4, 41] {
            set.remove(cluster);
        }
        assert_eq!(set.ranges, [(6, 20), (21, 39)].into());
        let inside = (0..50).filter(|cluster| set.contains(*cluster));
        assert!(inside.eq((6..20).chain(21..39)));
        assert_eq!(set.end(), 39);
        assert_eq!(
            [0, 7, 20, 38].map(|at| set.next_from(at)),
            [6, 7, 21, 38].map(Some)
        );
        assert_eq!(set.next_from(39), None);
    }

    #[test]
    fn long_ranges_cost_no_more_than_short_ones() {
        let mut set = Clusters::default();
        set.insert(0, 1 << 50);
        set.remove(1 << 49);
        assert_eq!(set.ranges.len(), 2);
    }

    #[test]
    fn overlapping_ranges_come_apart_with_their_numbers() {
        let ranges = [(0, 10), (5, 15), (5, 10), (20, 30), (15, 16), (7, 7)];
        let expected = [(0, 5, 1), (5, 10, 3), (10, 15, 1), (15, 16, 1), (20, 30, 1)];
        assert_eq!(layers(ranges.into_iter()), expected);
        assert_eq!(layers(std::iter::empty()), []);
    }
}
