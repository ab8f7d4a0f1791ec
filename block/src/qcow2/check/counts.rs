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

/// Parts below this are found by their number, others by hashing: a terabyte's 64 KiB clusters take 128 KiB.
const NEAR: u64 = 1 << 20;
/// Stands for a part that has no chunk.
const NOWHERE: usize = usize::MAX;

/// Numbers by cluster; those that are not there are 0.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Where the chunks of near parts are, as far as there are any.
    near: Vec<usize>,
    far: HashMap<u64, usize>,
    chunks: Vec<Chunk>,
    large: HashMap<u64, u64>,
}

impl Counts {
    fn split(cluster: u64) -> (u64, usize) {
        (
            cluster / CHUNK,
            usize::try_from(cluster % CHUNK).unwrap_or(0),
        )
    }

    fn chunk(&self, key: u64) -> Option<&Chunk> {
        let place = if key < NEAR {
            *self.near.get(usize::try_from(key).unwrap_or(NOWHERE))?
        } else {
            *self.far.get(&key)?
        };
        self.chunks.get(place)
    }

    fn chunk_mut(&mut self, key: u64) -> Option<&mut Chunk> {
        let fresh = self.chunks.len();
        let place = if key < NEAR {
            let near = usize::try_from(key).unwrap_or(NOWHERE);
            if self.near.len() <= near {
                self.near.resize(near + 1, NOWHERE);
            }
            let place = self.near.get_mut(near)?;
            if *place == NOWHERE {
                *place = fresh;
            }
            *place
        } else {
            *self.far.entry(key).or_insert(fresh)
        };
        if place == fresh {
            self.chunks.push([0; CHUNK_LEN]);
        }
        self.chunks.get_mut(place)
    }

    fn slot(&mut self, cluster: u64) -> Option<&mut u8> {
        let (key, within) = Self::split(cluster);
        self.chunk_mut(key)?.get_mut(within)
    }

    /// The numbers of all parts that have chunks.
    fn keys(&self) -> impl Iterator<Item = u64> {
        let near = (0..)
            .zip(&self.near)
            .filter(|(_, place)| **place != NOWHERE);
        near.map(|(key, _)| key).chain(self.far.keys().copied())
    }

    /// The number of a cluster.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        let (key, within) = Self::split(cluster);
        match self.chunk(key).and_then(|chunk| chunk.get(within)) {
            Some(&LARGE) => self.large.get(&cluster).copied().unwrap_or(0),
            Some(&small) => small.into(),
            None => 0,
        }
    }

    /// Sets the number of a cluster.
    pub(crate) fn set(&mut self, cluster: u64, number: u64) {
        let small = u8::try_from(number).unwrap_or(LARGE);
        let Some(slot) = self.slot(cluster) else {
            return;
        };
        let was = std::mem::replace(slot, small);
        if small == LARGE {
            self.large.insert(cluster, number);
        } else if was == LARGE {
            self.large.remove(&cluster);
        }
    }

    /// Sets the numbers of clusters from `first` on, which must not have any yet.
    pub(crate) fn fill(&mut self, first: u64, numbers: &mut dyn Iterator<Item = u64>) {
        let mut cluster = first;
        loop {
            let (key, within) = Self::split(cluster);
            let part: Vec<u64> = numbers.take(CHUNK_LEN - within).collect();
            if part.is_empty() {
                return;
            }
            if part.iter().all(|number| *number < LARGE.into()) && part.iter().any(|it| *it != 0) {
                let slots = self
                    .chunk_mut(key)
                    .and_then(|chunk| chunk.get_mut(within..));
                let slots = slots.unwrap_or_default().iter_mut();
                slots.zip(&part).for_each(|(slot, number)| {
                    *slot = u8::try_from(*number).unwrap_or(LARGE);
                });
            } else {
                let some = (cluster..).zip(&part).filter(|(_, number)| **number != 0);
                some.for_each(|(cluster, number)| self.set(cluster, *number));
            }
            cluster += part.len() as u64;
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
        let keys = all.iter().flat_map(|counts| counts.keys());
        keys.map(|key| key * CHUNK).collect()
    }

    /// How many clusters a part has.
    pub(crate) const PART: u64 = CHUNK;

    /// Whether all numbers of a part are the same in both.
    pub(crate) fn same_part(&self, other: &Self, start: u64) -> bool {
        const NONE: Chunk = [0; CHUNK_LEN];
        let a = self.chunk(start / CHUNK).unwrap_or(&NONE);
        let b = other.chunk(start / CHUNK).unwrap_or(&NONE);
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
        let mut keys: Vec<u64> = self.keys().collect();
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
    fn numbers_are_filled_in_across_parts() {
        let numbers = |at: u64| if at % 700 == 3 { at * 1000 } else { at % 5 };
        let mut counts = Counts::default();
        counts.fill(300, &mut (300..3000).map(numbers));
        assert!((300..3000).all(|at| counts.get(at) == numbers(at)));
        assert_eq!((counts.get(299), counts.get(3000)), (0, 0));
        let mut zeros = Counts::default();
        zeros.fill(0, &mut (0..9999).map(|_| 0));
        assert_eq!(zeros.chunks.len(), 0, "zeros cost nothing");
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
