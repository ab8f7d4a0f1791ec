//! Pages that go back to the host: gathered, put in order, and given back in
//! as few pieces as there are.
//!
//! A driver names pages one by one, mostly neighbours of each other. Telling the host costs
//! by the piece, whatever its length, and splits a huge page that does not go as a whole.
//!
//! Where the host's pages are larger than the balloon's, one goes back once all
//! of it is in the balloon ([`Partial`]).

use std::collections::BTreeMap;
use std::ops::Range;

use devices::LogLimit;
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::spec::PAGE;
use crate::memory::{Backing, GuestMap};

/// Runs of page numbers.
#[derive(Debug, Default)]
pub struct Runs {
    list: Vec<Range<u64>>,
    pages: u64,
}

impl Runs {
    /// Adds a page. A neighbour of the page before costs no room.
    pub fn push(&mut self, page: u64) {
        self.pages = self.pages.saturating_add(1);
        if let Some(last) = self.list.last_mut() {
            if page == last.end {
                last.end = page.saturating_add(1);
                return;
            }
            if page.saturating_add(1) == last.start {
                last.start = page;
                return;
            }
        }
        self.list.push(page..page.saturating_add(1));
    }

    /// Adds a run.
    pub fn push_run(&mut self, run: Range<u64>) {
        self.pages = self.pages.saturating_add(run.end.saturating_sub(run.start));
        self.list.push(run);
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many pages there are, and in how many pieces.
    pub fn size(&self) -> (u64, usize) {
        (self.pages, self.list.len())
    }

    /// Puts them in order, neighbours together, and no page twice.
    pub fn settle(&mut self) -> &[Range<u64>] {
        if !self.list.is_sorted_by_key(|run| run.start) {
            self.list.sort_unstable_by_key(|run| run.start);
        }
        self.list.dedup_by(|next, last| {
            let joins = next.start <= last.end;
            if joins {
                last.end = last.end.max(next.end);
            }
            joins
        });
        &self.list
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.list.clear();
        self.pages = 0;
    }
}

/// What has become of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that were given back to the host.
    pub discarded: u64,
    /// Pages that are no memory.
    pub ignored: u64,
    /// Pieces that the host would not take.
    pub errors: u64,
}

impl Outcome {
    /// Gives a piece of a region back.
    fn discard(&mut self, backing: &dyn Backing, piece: &Range<u64>, log: &LogLimit) {
        let len = piece.end.saturating_sub(piece.start);
        if len == 0 {
            return;
        }
        match backing.discard(piece.start, len) {
            Ok(()) => self.discarded = self.discarded.saturating_add(len),
            Err(error) => {
                self.errors = self.errors.saturating_add(1);
                if let Some(suppressed) = log.allow() {
                    tracing::warn!(%error, len, suppressed, "the host would not take guest memory back");
                }
            }
        }
    }
}

/// A part of a run of pages that lies in one region.
struct Piece<'a> {
    backing: Option<&'a dyn Backing>,
    /// Where the region begins, in guest-physical bytes.
    base: u64,
    /// The region's length in bytes.
    len: u64,
    /// In bytes from there.
    range: Range<u64>,
}

/// Hands each part of `run` (of page numbers) that is memory to `take`, and returns how many pages are none.
fn pieces<'a>(view: &'a GuestMap, run: &Range<u64>, mut take: impl FnMut(Piece<'a>)) -> u64 {
    let (start, end) = (run.start.saturating_mul(PAGE), run.end.saturating_mul(PAGE));
    let mut missing = end.saturating_sub(start) / PAGE;
    for region in view.iter() {
        let (base, len) = (region.start_addr().raw_value(), region.len());
        let from = start.max(base);
        let to = end.min(base.saturating_add(len));
        if from < to {
            missing = missing.saturating_sub((to - from) / PAGE);
            take(Piece {
                backing: region.bitmap().backing(),
                base,
                len,
                range: from - base..to - base,
            });
        }
    }
    missing
}

/// Which pages of the balloon lie in larger pages of the host that are not all in it. For each of the
/// host's pages that the driver has begun, one bit for each 4096 bytes: no more than a part in 32,768 of the memory.
#[derive(Default)]
pub struct Partial {
    marks: BTreeMap<u64, Box<[u64]>>,
    /// Runs of pages that a saved state has in the balloon, and that are not marked yet: how long the host's
    /// pages are here is known with the memory alone.
    whole: Vec<Range<u64>>,
}

/// One of the host's pages that is in the balloon in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialPageV1 {
    /// Where it begins, in guest-physical bytes.
    pub address: u64,
    /// A bit for each of its 4096-byte pages, set for those that are in the balloon.
    pub words: Vec<u64>,
}

/// Which of a balloon's pages lie in larger pages of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargePagesV1 {
    /// Runs of 4096-byte pages that are in it with all of the host's page: the first, and how many. In
    /// order, and apart from each other.
    pub whole: Vec<(u64, u64)>,
    /// The host's pages that are in it in part, in order.
    pub partial: Vec<PartialPageV1>,
}

impl Partial {
    /// Nothing is in the balloon any more.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// What belongs to a saved state.
    pub fn save(&self) -> LargePagesV1 {
        let mut whole = Runs::default();
        for run in &self.whole {
            whole.push_run(run.clone());
        }
        let mut partial = Vec::new();
        for (address, words) in &self.marks {
            if words.iter().all(|word| *word == u64::MAX) {
                let first = address / PAGE;
                let bits = u64::try_from(words.len()).unwrap_or(0).saturating_mul(64);
                whole.push_run(first..first.saturating_add(bits));
            } else {
                partial.push(PartialPageV1 {
                    address: *address,
                    words: words.to_vec(),
                });
            }
        }
        let runs = whole.settle().iter();
        LargePagesV1 {
            whole: runs.map(|run| (run.start, run.end - run.start)).collect(),
            partial,
        }
    }

    /// What a saved state says; `None` when it contradicts itself.
    pub fn restored(state: LargePagesV1) -> Option<Self> {
        let LargePagesV1 { whole, partial } = state;
        let mut restored = Self::default();
        let mut from = 0;
        for (first, count) in whole {
            let end = first
                .checked_add(count)
                .filter(|_| count > 0 && first >= from)?;
            restored.whole.push(first..end);
            from = end;
        }
        let mut from = 0;
        for PartialPageV1 { address, words } in partial {
            if address < from || !address.is_multiple_of(PAGE) || words.is_empty() {
                return None;
            }
            from = address.checked_add(1)?;
            restored.marks.insert(address, words.into());
        }
        Some(restored)
    }

    /// Marks what a saved state had. Those pages have gone back to the host already.
    fn settle(&mut self, view: &GuestMap) {
        for run in std::mem::take(&mut self.whole) {
            pieces(view, &run, |piece| {
                let size = piece.backing.map_or(PAGE, Backing::page_size);
                if size > PAGE {
                    self.add(&piece, size);
                }
            });
        }
    }

    /// Takes a run of pages into the balloon and gives back to the host what can be.
    pub fn inflate(&mut self, view: &GuestMap, run: &Range<u64>, log: &LogLimit) -> Outcome {
        self.settle(view);
        let mut outcome = Outcome::default();
        outcome.ignored = pieces(view, run, |piece| {
            let Some(backing) = piece.backing else {
                return;
            };
            if backing.page_size() <= PAGE {
                outcome.discard(backing, &piece.range, log);
                return;
            }
            for whole in self.add(&piece, backing.page_size()) {
                outcome.discard(backing, &whole, log);
            }
        });
        outcome
    }

    /// Marks pages, and returns which of the host's pages are whole now: parts of the region, neighbours together.
    fn add(&mut self, piece: &Piece<'_>, size: u64) -> Vec<Range<u64>> {
        let mut whole: Vec<Range<u64>> = Vec::new();
        let bits = size / PAGE;
        each_page(piece, size, |page, covered| {
            let words = usize::try_from(bits.div_ceil(64)).unwrap_or(0);
            let at = piece.base.saturating_add(page);
            let marks = self.marks.entry(at).or_default();
            if marks.len() != words {
                // New, or from a host with pages of another size.
                *marks = vec![0; words].into();
            }
            mark(marks, &covered, true);
            let set: u64 = marks.iter().map(|word| u64::from(word.count_ones())).sum();
            if set == bits {
                match whole.last_mut() {
                    Some(last) if last.end == page => last.end = page + size,
                    _ => whole.push(page..page + size),
                }
            }
        });
        whole
    }

    /// Takes a run of pages out of the balloon.
    pub fn deflate(&mut self, view: &GuestMap, run: &Range<u64>) {
        self.settle(view);
        pieces(view, run, |piece| {
            let size = piece.backing.map_or(PAGE, Backing::page_size);
            if size <= PAGE {
                return;
            }
            each_page(&piece, size, |page, covered| {
                let at = piece.base.saturating_add(page);
                if let Some(marks) = self.marks.get_mut(&at) {
                    mark(marks, &covered, false);
                    if marks.iter().all(|word| *word == 0) {
                        self.marks.remove(&at);
                    }
                }
            });
        });
    }
}

/// Calls `each` for every page of `size` bytes that `piece` touches and the region has whole: with where it begins in the region, and
/// which of its 4096-byte pages are touched.
fn each_page(piece: &Piece<'_>, size: u64, mut each: impl FnMut(u64, Range<u64>)) {
    let mut page = piece.range.start / size * size;
    while page < piece.range.end && page.saturating_add(size) <= piece.len {
        let from = piece.range.start.max(page) - page;
        let to = piece.range.end.min(page + size) - page;
        each(page, from / PAGE..to / PAGE);
        page += size;
    }
}

fn mark(words: &mut [u64], bits: &Range<u64>, set: bool) {
    for (first, word) in (0u64..).step_by(64).zip(words) {
        let from = bits.start.clamp(first, first + 64) - first;
        let to = bits.end.clamp(first, first + 64) - first;
        if from < to {
            let mask = u64::MAX >> (64 - (to - from)) << from;
            *word = if set { *word | mask } else { *word & !mask };
        }
    }
}

/// Whether the host's pages are larger than the balloon's anywhere.
pub fn has_larger_pages(view: &GuestMap) -> bool {
    view.iter()
        .filter_map(|region| region.bitmap().backing())
        .any(|backing| backing.page_size() > PAGE)
}

/// Gives free pages back to the host, which are not in the balloon and may be used again at any time: of the host's pages those
/// that are whole in the run.
pub fn discard_free(view: &GuestMap, run: &Range<u64>, log: &LogLimit) -> Outcome {
    let mut outcome = Outcome::default();
    outcome.ignored = pieces(view, run, |piece| {
        let Some(backing) = piece.backing else {
            return;
        };
        let size = backing.page_size();
        let start = piece.range.start.next_multiple_of(size);
        let end = piece.range.end / size * size;
        outcome.discard(backing, &(start..end.max(start)), log);
    });
    outcome
}

/// The whole pages of `len` bytes at `address`.
pub fn whole_pages(address: GuestAddress, len: u64) -> Range<u64> {
    let start = address.raw_value().div_ceil(PAGE);
    let end = address.raw_value().saturating_add(len) / PAGE;
    start..end.max(start)
}
