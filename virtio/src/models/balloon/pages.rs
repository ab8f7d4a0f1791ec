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
    let (start, end) = (
        run.start.saturating_mul(PAGE),
        run.end.saturating_mul(PAGE),
    );
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
pub struct Partial(BTreeMap<u64, Box<[u64]>>);

impl Partial {
    /// Nothing is in the balloon any more.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes a run of pages into the balloon and gives back to the host what can be.
    pub fn inflate(&mut self, view: &GuestMap, run: &Range<u64>, log: &LogLimit) -> Outcome {
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
            let marks = self
                .0
                .entry(piece.base.saturating_add(page))
                .or_insert_with(|| vec![0; words].into());
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
        pieces(view, run, |piece| {
            let size = piece.backing.map_or(PAGE, Backing::page_size);
            if size <= PAGE {
                return;
            }
            each_page(&piece, size, |page, covered| {
                let at = piece.base.saturating_add(page);
                if let Some(marks) = self.0.get_mut(&at) {
                    mark(marks, &covered, false);
                    if marks.iter().all(|word| *word == 0) {
                        self.0.remove(&at);
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
