//! Pages of an image's tables in memory: parts of L2 tables and of refcount blocks.
//!
//! Entries are atomic, so that a queue that holds a page reads entries without a lock.
//! They change only under the image's lock. A changed page is written by a
//! checkpoint alone and stays in memory until then.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The largest page, in bytes; images with smaller clusters have pages of one cluster.
pub(crate) const MAX_PAGE: u64 = 4096;

/// How many pages are considered for dropping when one comes in.
const MAX_TRIES: usize = 64;

/// One page: big-endian words as they are on disk.
#[derive(Debug)]
pub(crate) struct Page {
    words: Box<[AtomicU64]>,
    /// Looked at since the cache last considered dropping it.
    used: AtomicBool,
    /// An entry was found that must not be written through without a closer look.
    suspect: AtomicBool,
}

impl Page {
    /// A page of `len` bytes, a multiple of 8, all zero.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self::from_words((0..len / 8).map(|_| 0))
    }

    /// A page with these bytes, whose number is a multiple of 8.
    pub(crate) fn new(bytes: &[u8]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        Self::from_words(words.iter().map(|word| u64::from_ne_bytes(*word)))
    }

    fn from_words(words: impl Iterator<Item = u64>) -> Self {
        Self {
            words: words.map(AtomicU64::new).collect(),
            used: AtomicBool::new(true),
            suspect: AtomicBool::new(false),
        }
    }

    /// The word at `index`; 0 past the end.
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.words
            .get(index)
            .map_or(0, |word| u64::from_be(word.load(Ordering::Acquire)))
    }

    /// Changes a word. Under the image's lock only.
    pub(crate) fn set(&self, index: usize, value: u64) {
        if let Some(word) = self.words.get(index) {
            word.store(value.to_be(), Ordering::Release);
        }
    }

    /// How many words there are.
    pub(crate) fn len(&self) -> usize {
        self.words.len()
    }

    /// The refcount whose first bit is bit `bit` of the page, `width` bits wide. Widths below 8 count from
    /// the least significant bit of their byte.
    pub(crate) fn refcount(&self, bit: usize, width: u32) -> u64 {
        (self.get(bit / 64) >> shift(bit, width)) & mask(width)
    }

    /// Changes a refcount. Under the image's lock only.
    pub(crate) fn set_refcount(&self, bit: usize, width: u32, value: u64) {
        let (shift, mask) = (shift(bit, width), mask(width));
        let word = self.get(bit / 64);
        self.set(
            bit / 64,
            (word & !(mask << shift)) | ((value & mask) << shift),
        );
    }

    /// Appends the bytes.
    pub(crate) fn append_to(&self, bytes: &mut Vec<u8>) {
        for word in &self.words {
            bytes.extend_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
    }

    /// Keeps the page in the cache for another round.
    pub(crate) fn touch(&self) {
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Marks that an entry needs a closer look before anything is written where it points.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    /// Whether [`Page::suspect`] was called.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::Acquire)
    }
}

fn shift(bit: usize, width: u32) -> u32 {
    let bit = u32::try_from(bit % 64).unwrap_or(0);
    if width < 8 {
        56 - (bit & !7) + (bit & 7)
    } else {
        64 - width - bit
    }
}

fn mask(width: u32) -> u64 {
    u64::MAX >> (64 - width)
}

/// When a changed page is written, see [`super::checkpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Before anything refers to what it says: refcounts, and tables that nothing points to yet.
    Early,
    /// After everything that it refers to.
    Late,
}

/// The pages in memory, by host offset.
#[derive(Debug)]
pub(crate) struct Pages {
    size: usize,
    /// How many pages are kept when nothing forbids to drop them.
    budget: usize,
    slots: HashMap<u64, Arc<Page>>,
    /// In the order in which they are considered for dropping.
    order: VecDeque<u64>,
    early: BTreeSet<u64>,
    late: BTreeSet<u64>,
    /// Being written by a checkpoint.
    writing: BTreeSet<u64>,
}

impl Pages {
    /// A cache of pages of `size` bytes that keeps about `budget` bytes.
    pub(crate) fn new(size: usize, budget: usize) -> Self {
        Self {
            size,
            budget: (budget / size).max(16),
            slots: HashMap::new(),
            order: VecDeque::new(),
            early: BTreeSet::new(),
            late: BTreeSet::new(),
            writing: BTreeSet::new(),
        }
    }

    /// The size of a page in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size as u64
    }

    /// The page at a host offset, if it is in memory.
    pub(crate) fn get(&self, at: u64) -> Option<Arc<Page>> {
        let page = self.slots.get(&at)?;
        page.touch();
        Some(Arc::clone(page))
    }

    /// Whether `count` more pages may come in before others have to go.
    pub(crate) fn has_room(&self, count: u64) -> bool {
        (self.slots.len() as u64).saturating_add(count) < self.budget as u64
    }

    /// Puts a page in, in place of the one that was there, and drops others that nobody needs.
    pub(crate) fn insert(&mut self, at: u64, page: Page) -> Arc<Page> {
        self.shrink();
        let page = Arc::new(page);
        if self.slots.insert(at, Arc::clone(&page)).is_none() {
            self.order.push_back(at);
        }
        page
    }

    /// Notes that the page has changed.
    pub(crate) fn mark(&mut self, at: u64, stage: Stage) {
        match stage {
            Stage::Early => self.early.insert(at),
            Stage::Late => self.late.insert(at),
        };
    }

    /// Forgets the pages of a freed cluster, changed or not.
    pub(crate) fn forget(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let mut at = start;
        while at < end {
            self.slots.remove(&at);
            self.early.remove(&at);
            self.late.remove(&at);
            at = at.saturating_add(self.size as u64);
        }
    }

    /// How many pages wait for a checkpoint.
    pub(crate) fn dirty(&self) -> usize {
        self.early.len() + self.late.len()
    }

    /// Whether so many pages have changed that a checkpoint should make room.
    pub(crate) fn crowded(&self) -> bool {
        self.dirty() > self.budget / 2
    }

    /// Takes the changed pages of both stages, for a checkpoint; they stay in memory until [`Pages::written`].
    pub(crate) fn take_dirty(&mut self) -> (BTreeSet<u64>, BTreeSet<u64>) {
        let taken = (
            std::mem::take(&mut self.early),
            std::mem::take(&mut self.late),
        );
        self.writing = taken.0.union(&taken.1).copied().collect();
        taken
    }

    /// The checkpoint has ended; with `failed`, these pages are as changed as before.
    pub(crate) fn written(&mut self, failed: Option<(BTreeSet<u64>, BTreeSet<u64>)>) {
        self.writing.clear();
        if let Some((mut early, mut late)) = failed {
            early.retain(|at| self.slots.contains_key(at));
            late.retain(|at| self.slots.contains_key(at));
            self.early.append(&mut early);
            self.late.append(&mut late);
        }
    }

    /// Copies pages out, neighbours joined, as (host offset, bytes).
    pub(crate) fn copy_out(&self, pages: &BTreeSet<u64>) -> Vec<(u64, Vec<u8>)> {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for &at in pages {
            let Some(page) = self.slots.get(&at) else {
                continue;
            };
            match runs.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => page.append_to(bytes),
                _ => {
                    let mut bytes = Vec::with_capacity(self.size);
                    page.append_to(&mut bytes);
                    runs.push((at, bytes));
                }
            }
        }
        runs
    }

    /// Drops pages beyond the budget that are unchanged, not in anybody's hands and not used lately.
    fn shrink(&mut self) {
        let mut tries = MAX_TRIES;
        while self.slots.len() >= self.budget && tries > 0 {
            tries -= 1;
            let Some(at) = self.order.pop_front() else {
                return;
            };
            let Some(page) = self.slots.get(&at) else {
                continue;
            };
            let needed = Arc::strong_count(page) > 1
                || self.early.contains(&at)
                || self.late.contains(&at)
                || self.writing.contains(&at);
            if needed || page.used.swap(false, Ordering::Relaxed) {
                self.order.push_back(at);
            } else {
                self.slots.remove(&at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_where_the_format_says() {
        // Bytes 0x01 0x02 … as the disk has them.
        let bytes: Vec<u8> = (1..=16).collect();
        let page = Page::new(&bytes);
        assert_eq!(page.refcount(0, 1), 1);
        assert_eq!(page.refcount(1, 1), 0);
        assert_eq!(page.refcount(9, 1), 1, "bit 1 of 0x02");
        assert_eq!(page.refcount(8, 2), 2);
        assert_eq!(page.refcount(16, 4), 3);
        assert_eq!(page.refcount(20, 4), 0);
        assert_eq!(page.refcount(24, 8), 4);
        assert_eq!(page.refcount(16, 16), 0x0304);
        assert_eq!(page.refcount(32, 32), 0x0506_0708);
        assert_eq!(page.refcount(64, 64), 0x090a_0b0c_0d0e_0f10);
    }

    #[test]
    fn setting_a_refcount_changes_nothing_else() {
        for order in 0..=6_u32 {
            let width = 1 << order;
            let page = Page::zeroed(64);
            let count = 512 / width as usize;
            for index in 0..count {
                let value = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask(width);
                page.set_refcount(index * width as usize, width, value);
            }
            for index in 0..count {
                let value = (index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask(width);
                assert_eq!(page.refcount(index * width as usize, width), value);
            }
        }
    }

    #[test]
    fn changed_held_and_used_pages_stay() {
        let mut pages = Pages::new(64, 16 * 64);
        let held = pages.insert(0, Page::zeroed(64));
        pages.insert(64, Page::zeroed(64));
        pages.mark(64, Stage::Late);
        for at in 2..100 {
            pages.insert(at * 64, Page::zeroed(64));
        }
        assert!(pages.slots.len() <= 16);
        assert!(Arc::ptr_eq(&held, &pages.get(0).unwrap()));
        assert!(pages.get(64).is_some());
        let dirty = pages.take_dirty();
        for at in 100..200 {
            pages.insert(at * 64, Page::zeroed(64));
        }
        assert!(pages.get(64).is_some(), "it is being written");
        pages.written(Some(dirty));
        assert_eq!(pages.dirty(), 1);
    }

    #[test]
    fn there_is_room_until_the_budget_is_spent() {
        let mut pages = Pages::new(64, 32 * 64);
        assert!(pages.has_room(31) && !pages.has_room(32));
        for at in 0..31 {
            pages.insert(at * 64, Page::zeroed(64));
        }
        assert!(!pages.has_room(1));
    }

    #[test]
    fn neighbours_are_copied_out_as_one() {
        let mut pages = Pages::new(64, 1 << 20);
        for at in [0, 64, 192] {
            pages.insert(at, Page::zeroed(64)).set(0, at);
            pages.mark(at, Stage::Early);
        }
        let (early, _) = pages.take_dirty();
        let runs = pages.copy_out(&early);
        let shape: Vec<_> = runs.iter().map(|(at, bytes)| (*at, bytes.len())).collect();
        assert_eq!(shape, [(0, 128), (192, 64)]);
    }
}
