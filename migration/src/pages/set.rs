//! Sets of pages: of one chunk, and of all memory.

use super::{CHUNK, CHUNK_PAGES, PAGE_LEN, Run, chunks_of};
use std::ops::Range;

/// How many words of 64 pages a chunk has.
const WORDS: usize = 8;
/// How many pages a word has.
const WORD_PAGES: u16 = 64;

/// Pages of one chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mask([u64; WORDS]);

impl Mask {
    /// The first `pages` of a chunk.
    pub fn first(pages: usize) -> Self {
        let mut all = Self::default();
        for page in 0..u16::try_from(pages).unwrap_or(CHUNK_PAGES) {
            all.insert(page);
        }
        all
    }

    pub fn of(runs: &[Run]) -> Self {
        let mut all = Self::default();
        for run in runs {
            let end = run.first.saturating_add(run.count);
            (run.first..end).for_each(|page| all.insert(page));
        }
        all
    }

    fn insert(&mut self, page: u16) {
        if let Some(word) = self.0.get_mut(usize::from(page / WORD_PAGES)) {
            *word |= 1 << (page % WORD_PAGES);
        }
    }

    fn remove(&mut self, page: u16) {
        if let Some(word) = self.0.get_mut(usize::from(page / WORD_PAGES)) {
            *word &= !(1 << (page % WORD_PAGES));
        }
    }

    pub fn holds(&self, page: u16) -> bool {
        let word = self.0.get(usize::from(page / WORD_PAGES));
        word.is_some_and(|word| word >> (page % WORD_PAGES) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    pub fn and(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & b)
    }

    pub fn or(&self, other: &Self) -> Self {
        self.with(other, |a, b| a | b)
    }

    pub fn without(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & !b)
    }

    fn with(&self, other: &Self, act: impl Fn(u64, u64) -> u64) -> Self {
        let mut all = *self;
        for (to, from) in all.0.iter_mut().zip(other.0) {
            *to = act(*to, from);
        }
        all
    }

    /// Pages that follow each other, as few runs as there can be.
    pub fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for page in (0..CHUNK_PAGES).filter(|page| self.holds(*page)) {
            super::write::add(&mut runs, page);
        }
        runs
    }

    /// The same as ranges of bytes from the chunk's start.
    pub fn bytes(&self) -> Vec<Range<usize>> {
        self.runs().into_iter().map(Run::bytes).collect()
    }
}

/// Pages of guest memory: of each range of RAM, in the order of [`super::Ram::ranges`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    /// Chunk after chunk, as a file of memory counts them.
    chunks: Vec<Mask>,
    /// Of each range its first chunk and how many pages it has.
    ranges: Vec<(usize, u64)>,
}

impl PageSet {
    /// No page of memory with `ranges`.
    #[must_use]
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        let mut all = 0_usize;
        let place = |&(_, len): &(u64, u64)| {
            let first = all;
            all = all.saturating_add(chunks_of(len).count());
            (first, len.div_ceil(PAGE_LEN as u64))
        };
        let ranges = ranges.iter().map(place).collect();
        Self {
            chunks: vec![Mask::default(); all],
            ranges,
        }
    }

    /// All pages of memory with `ranges`.
    #[must_use]
    pub fn all(ranges: &[(u64, u64)]) -> Self {
        let mut set = Self::new(ranges);
        for (range, (_, len)) in ranges.iter().enumerate() {
            let words = chunks_of(*len).count().saturating_mul(WORDS);
            (0..words).for_each(|word| set.add_word(range, word, u64::MAX));
        }
        set
    }

    /// The pages of chunk `index`, counted over all ranges, as guest-physical address and length in bytes. The set is one of memory
    /// with these `ranges`.
    #[must_use]
    pub fn runs_of(&self, ranges: &[(u64, u64)], index: usize) -> Vec<(u64, u64)> {
        let after = self.ranges.partition_point(|(first, _)| *first <= index);
        // Empty ranges begin where the next one does.
        let Some(range) = after.checked_sub(1) else {
            return Vec::new();
        };
        let (Some((first, _)), Some((start, _))) = (self.ranges.get(range), ranges.get(range))
        else {
            return Vec::new();
        };
        let before = (index.saturating_sub(*first) as u64).saturating_mul(CHUNK);
        let run = |run: Range<usize>| {
            let address = start
                .saturating_add(before)
                .saturating_add(run.start as u64);
            (address, run.len() as u64)
        };
        self.of_chunk(index).bytes().into_iter().map(run).collect()
    }

    /// Adds those of the 64 pages from page 64 × `word` of a range on whose bits are set in `pages`. What is not in the range
    /// is passed over.
    pub fn add_word(&mut self, range: usize, word: usize, pages: u64) {
        let Some((first, count)) = self.ranges.get(range).copied() else {
            return;
        };
        let before = (word as u64).saturating_mul(u64::from(WORD_PAGES));
        let here = count.saturating_sub(before).min(u64::from(WORD_PAGES));
        let inside = match u32::try_from(here) {
            Ok(0) | Err(_) => return,
            Ok(here) => u64::MAX >> (u32::from(WORD_PAGES) - here),
        };
        let chunk = self.chunks.get_mut(first.saturating_add(word / WORDS));
        if let Some(word) = chunk.and_then(|chunk| chunk.0.get_mut(word % WORDS)) {
            *word |= pages & inside;
        }
    }

    /// Adds all pages of the other, which is of the same memory.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in self.chunks.iter_mut().zip(&other.chunks) {
            *to = to.or(from);
        }
    }

    /// Leaves those alone that the other, which is of the same memory, has too.
    pub fn keep(&mut self, other: &Self) {
        for (to, from) in self.chunks.iter_mut().zip(&other.chunks) {
            *to = to.and(from);
        }
    }

    /// Takes those out that the other, which is of the same memory, has too.
    pub fn remove(&mut self, other: &Self) {
        for (to, from) in self.chunks.iter_mut().zip(&other.chunks) {
            *to = to.without(from);
        }
    }

    /// Where the page at a guest-physical address is: its chunk, and its place in that. The set is one of memory with these `ranges`.
    fn place(&self, ranges: &[(u64, u64)], address: u64) -> Option<(usize, u16)> {
        let after = ranges.partition_point(|(start, _)| *start <= address);
        let range = after.checked_sub(1)?;
        let ((start, len), (first, _)) = (ranges.get(range)?, self.ranges.get(range)?);
        let inside = address.checked_sub(*start).filter(|inside| inside < len)?;
        let chunk = usize::try_from(inside / CHUNK).ok()?;
        let page = u16::try_from(inside % CHUNK / PAGE_LEN as u64).ok()?;
        Some((first.checked_add(chunk)?, page))
    }

    /// Adds the pages of `len` bytes from a guest-physical address on. What is not in the `ranges`, by which the set was made, is passed over.
    pub fn insert(&mut self, ranges: &[(u64, u64)], address: u64, len: u64) {
        for address in within(ranges, address, len) {
            if let Some((chunk, page)) = self.place(ranges, address)
                && let Some(mask) = self.chunks.get_mut(chunk)
            {
                mask.insert(page);
            }
        }
    }

    /// Takes the pages of `len` bytes from a guest-physical address on out: those that were there, as address and length in bytes. What is not in
    /// the `ranges`, by which the set was made, is passed over.
    pub fn take(&mut self, ranges: &[(u64, u64)], address: u64, len: u64) -> Vec<(u64, u64)> {
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for address in within(ranges, address, len) {
            let Some((chunk, page)) = self.place(ranges, address) else {
                continue;
            };
            let mask = self.chunks.get_mut(chunk).filter(|mask| mask.holds(page));
            let Some(mask) = mask else { continue };
            mask.remove(page);
            match taken.last_mut() {
                Some((start, len)) if start.saturating_add(*len) == address => {
                    *len = len.saturating_add(PAGE_LEN as u64);
                }
                _ => taken.push((address, PAGE_LEN as u64)),
            }
        }
        taken
    }

    /// The first chunk from `index` on that has a page.
    #[must_use]
    pub fn next_chunk(&self, index: usize) -> Option<usize> {
        let rest = self.chunks.get(index..)?;
        let after = rest.iter().position(|mask| !mask.is_empty())?;
        index.checked_add(after)
    }

    /// All pages, as guest-physical address and length in bytes. The set is one of memory with these `ranges`.
    #[must_use]
    pub fn runs(&self, ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut next = self.next_chunk(0);
        while let Some(chunk) = next {
            for (address, len) in self.runs_of(ranges, chunk) {
                match runs.last_mut() {
                    Some((start, before)) if start.saturating_add(*before) == address => {
                        *before = before.saturating_add(len);
                    }
                    _ => runs.push((address, len)),
                }
            }
            next = self.next_chunk(chunk.saturating_add(1));
        }
        runs
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.chunks.fill(Mask::default());
    }

    /// How many pages there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.chunks.iter().map(|mask| u64::from(mask.count())).sum()
    }

    /// Whether any page of a chunk is there, for each chunk.
    #[must_use]
    pub fn chunks(&self) -> Vec<bool> {
        self.chunks.iter().map(|mask| !mask.is_empty()).collect()
    }

    /// Those of a chunk.
    pub(super) fn of_chunk(&self, index: usize) -> Mask {
        self.chunks.get(index).copied().unwrap_or_default()
    }
}

/// The pages of `len` bytes from `address` on, where it is in one of `ranges`, up to the end of that.
fn within(ranges: &[(u64, u64)], address: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
    let after = ranges.partition_point(|(start, _)| *start <= address);
    let range = after.checked_sub(1).and_then(|range| ranges.get(range));
    let end = range.map_or(0, |(start, len)| start.saturating_add(*len));
    (address..address.saturating_add(len).min(end)).step_by(PAGE_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_counted_by_range_and_those_past_its_end_are_none() {
        let ranges = [(0, 3 << 20), (1 << 32, 65 << 12)];
        let mut set = PageSet::new(&ranges);
        set.add_word(0, 0, 0b101);
        set.add_word(0, 11, 1 << 63);
        set.add_word(0, 12, u64::MAX);
        set.add_word(1, 1, u64::MAX);
        set.add_word(1, 2, u64::MAX);
        set.add_word(2, 0, u64::MAX);
        assert_eq!((set.count(), set.chunks()), (4, vec![true, true, true]));
        let last = set.of_chunk(2);
        assert!(last.holds(64) && last.count() == 1);
        assert_eq!(
            set.of_chunk(1).runs(),
            [Run {
                first: 255,
                count: 1
            }]
        );
        let mut other = PageSet::new(&ranges);
        other.add_word(0, 0, 0b110);
        other.add(&set);
        assert_eq!(
            other.of_chunk(0).bytes(),
            [Range {
                start: 0,
                end: 3 * PAGE_LEN
            }]
        );
        other.clear();
        assert_eq!(other, PageSet::new(&ranges));
        assert_eq!(set.runs_of(&ranges, 0), [(0, 4096), (2 << 12, 4096)]);
        assert_eq!(set.runs_of(&ranges, 1), [((2 << 20) + (255 << 12), 4096)]);
        assert_eq!(set.runs_of(&ranges, 2), [((1 << 32) + (64 << 12), 4096)]);
        assert_eq!(set.runs_of(&ranges, 3), []);
    }

    #[test]
    fn the_set_of_all_pages_has_each_of_them_once() {
        let ranges = [(0, 3 << 20), (1 << 32, 65 << 12)];
        let set = PageSet::all(&ranges);
        assert_eq!(set.count(), (768 + 65));
        let runs = |chunk| set.runs_of(&ranges, chunk);
        let all: Vec<(u64, u64)> = (0..4).flat_map(runs).collect();
        let second = (2 << 20, 1 << 20);
        assert_eq!(all, [(0, 2 << 20), second, (1 << 32, 65 << 12)]);
        assert_eq!(PageSet::all(&[]).count(), 0);
    }

    #[test]
    fn pages_are_added_and_taken_by_address_and_what_is_outside_is_passed_over() {
        let ranges = [(0, 3 << 20), (1 << 32, 65 << 12)];
        let mut set = PageSet::new(&ranges);
        set.insert(&ranges, (2 << 20) - 4096, 8192);
        set.insert(&ranges, (3 << 20) - 4096, 3 * 4096);
        set.insert(&ranges, (1 << 32) + (64 << 12), u64::MAX);
        assert_eq!(set.count(), 4);
        let last = (1 << 32) + (64 << 12);
        let edge = (3 << 20) - 4096;
        let all = [((2 << 20) - 4096, 8192), (edge, 4096), (last, 4096)];
        assert_eq!(set.runs(&ranges), all);
        assert_eq!((set.next_chunk(0), set.next_chunk(2)), (Some(0), Some(2)));
        assert_eq!(set.next_chunk(3), None);
        let taken = set.take(&ranges, 0, (2 << 20) + 4096);
        assert_eq!(taken, [((2 << 20) - 4096, 8192)]);
        assert_eq!(set.take(&ranges, 0, (2 << 20) + 4096), []);
        let mut other = PageSet::new(&ranges);
        other.insert(&ranges, last, 4096);
        set.keep(&other);
        assert_eq!(set.runs(&ranges), [(last, 4096)]);
    }
}
