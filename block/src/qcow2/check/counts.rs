//! A number per cluster, compactly: a byte for most, nothing for the clusters of parts that have none.
//!
//! What a file does not refer to costs no memory, however long it claims to be.

use std::collections::{BTreeSet, HashMap};

const CHUNK: u64 = 512;
/// The same, as a length.
const CHUNK_LEN: usize = 512;
/// Stands for a number that is in `large`.
const LARGE: u8 = u8::MAX;

type Chunk = [u8; CHUNK_LEN];

/// Numbers by cluster; those that are not there are 0.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    index: HashMap<u64, usize>,
    chunks: Vec<Chunk>,
    large: HashMap<u64, u64>,
    /// The chunk that was used last, and where it is.
    last: Option<(u64, usize)>,
}

impl Counts {
    fn split(cluster: u64) -> (u64, usize) {
        (
            cluster / CHUNK,
            usize::try_from(cluster % CHUNK).unwrap_or(0),
        )
    }

    fn find(&self, key: u64) -> Option<usize> {
        match self.last {
            Some((last, place)) if last == key => Some(place),
            _ => self.index.get(&key).copied(),
        }
    }

    fn slot(&mut self, cluster: u64) -> Option<&mut u8> {
        let (key, within) = Self::split(cluster);
        let place = match self.find(key) {
            Some(place) => place,
            None => {
                self.chunks.push([0; CHUNK_LEN]);
                self.index.insert(key, self.chunks.len() - 1);
                self.chunks.len() - 1
            }
        };
        self.last = Some((key, place));
        self.chunks.get_mut(place)?.get_mut(within)
    }

    /// The number of a cluster.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let (key, within) = Self::split(cluster);
        let chunk = self.find(key).and_then(|place| self.chunks.get(place));
        match chunk.and_then(|chunk| chunk.get(within)) {
            Some(&LARGE) => self.large.get(&cluster).copied().unwrap_or(0),
            Some(&small) => small.into(),
            None => 0,
        }
    }

    /// Sets the number of a cluster.
    pub(crate) fn set(&mut self, cluster: u64, number: u64) {
        let was_large = self.get(cluster) >= LARGE.into();
        let small = u8::try_from(number).unwrap_or(LARGE);
        if small == LARGE {
            self.large.insert(cluster, number);
        } else if was_large {
            self.large.remove(&cluster);
        }
        if let Some(slot) = self.slot(cluster) {
            *slot = small;
        }
    }

    /// Adds to the number of a cluster; it stops at the largest number.
    pub(crate) fn add(&mut self, cluster: u64, more: u64) {
        if let Some(slot) = self.slot(cluster) {
            let sum = u64::from(*slot) + more.min(LARGE.into());
            if let Some(small) = u8::try_from(sum).ok().filter(|small| *small < LARGE) {
                *slot = small;
                return;
            }
        }
        let sum = self.get(cluster).saturating_add(more);
        self.set(cluster, sum);
    }

    /// Takes one from the number of a cluster.
    pub(crate) fn take_one(&mut self, cluster: u64) {
        if let Some(left) = self.get(cluster).checked_sub(1) {
            self.set(cluster, left);
        }
    }

    /// The first cluster of each part that may have numbers, in order; a part has [`Counts::PART`] clusters.
    pub(crate) fn parts(all: &[&Self]) -> BTreeSet<u64> {
        all.iter()
            .flat_map(|counts| counts.index.keys())
            .map(|key| key * CHUNK)
            .collect()
    }

    /// How many clusters a part has.
    pub(crate) const PART: u64 = CHUNK;

    /// Whether all numbers of a part are the same in both.
    pub(crate) fn same_part(&self, other: &Self, start: u64) -> bool {
        let chunk = |counts: &Self| {
            let chunk = counts
                .find(start / CHUNK)
                .and_then(|place| counts.chunks.get(place));
            chunk.copied().unwrap_or([0; CHUNK_LEN])
        };
        let (a, b) = (chunk(self), chunk(other));
        a == b && !a.contains(&LARGE)
    }

    /// The last cluster with a number.
    pub(crate) fn last_used(&self) -> Option<u64> {
        let used = |key: &u64| {
            let start = key * CHUNK;
            (start..start + CHUNK)
                .rev()
                .find(|cluster| self.get(*cluster) != 0)
        };
        let mut keys: Vec<u64> = self.index.keys().copied().collect();
        keys.sort_unstable();
        keys.iter().rev().find_map(used)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_large_numbers_are_kept_apart_and_may_change() {
        let mut counts = Counts::default();
        for cluster in [0, 1, 511, 512, 1 << 40, u64::MAX] {
            assert_eq!(counts.get(cluster), 0);
            for (add, sum) in [
                (1, 1),
                (253, 254),
                (1, 255),
                (1, 256),
                (1 << 40, (1 << 40) + 256),
            ] {
                counts.add(cluster, add);
                assert_eq!(counts.get(cluster), sum);
            }
            counts.take_one(cluster);
            assert_eq!(counts.get(cluster), (1 << 40) + 255);
            counts.set(cluster, 3);
            assert_eq!(counts.get(cluster), 3);
        }
        counts.add(7, u64::MAX);
        counts.add(7, u64::MAX);
        assert_eq!(counts.get(7), u64::MAX);
        counts.set(9, 0);
        counts.take_one(9);
        assert_eq!(counts.get(9), 0);
        assert!(counts.large.len() == 1, "only cluster 7 is large");
    }

    #[test]
    fn parts_are_compared_and_listed_in_order() {
        let (mut a, mut b) = (Counts::default(), Counts::default());
        a.set(5000, 2);
        b.set(5000, 2);
        b.set(3, 300);
        assert_eq!(
            Counts::parts(&[&a, &b]).into_iter().collect::<Vec<_>>(),
            [0, 4608]
        );
        assert!(a.same_part(&b, 4608));
        assert!(!a.same_part(&b, 0));
        a.set(3, 300);
        assert!(!a.same_part(&b, 0), "large numbers are not compared here");
        assert_eq!(a.last_used(), Some(5000));
        a.set(5000, 0);
        assert_eq!(a.last_used(), Some(3));
        assert_eq!(Counts::default().last_used(), None);
    }
}
