//! Writing: what a range needs before it can be written, and how it enters the mapping.
//!
//! A write that does not just land on mapped clusters has three parts. [`Meta::plan`]
//! takes the guest's clusters for this write alone, allocates host clusters, and says what has to be copied around the new data. Then the data is
//! moved, by whoever asked. [`Meta::publish`] enters the clusters into the mapping, in memory; a
//! checkpoint makes that durable after the data. [`Meta::abandon`] undoes a plan whose data could not be moved.

use std::io;
use std::sync::Arc;

use super::allocate::Run;
use super::entry::{COPIED, L2, OFFSET};
use super::meta::{Lookup, Meta};
use super::pages::Page;

/// Why there is no plan.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Another write is about to map one of the clusters. Its end is announced.
    Busy,
    /// It takes waiting: for the disk, or for copying. Ask again where that may be done.
    Slow,
    /// Changed tables have to be written first.
    Checkpoint,
    /// It cannot be.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::Checkpoint,
            _ => Self::Failed(error),
        }
    }
}

/// What has to be copied, or zeroed, beside the data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copy {
    /// The guest range whose present bytes are needed: its offset.
    pub guest: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where they go.
    pub host: u64,
    /// They are known to be zeros.
    pub zero: bool,
}

/// An entry that changes when a plan is published.
#[derive(Debug)]
struct Change {
    page: Arc<Page>,
    page_at: u64,
    word: usize,
    table: u64,
    entry: u64,
    bitmap: u64,
    /// Clusters that lose a reference, as first and count.
    unlink: Option<(u64, u64)>,
}

/// A write that may go ahead.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Where the data goes, in order, as (host offset, length).
    pub pieces: Vec<(u64, u64)>,
    /// What else goes where, before [`Meta::publish`].
    pub copies: Vec<Copy>,
    changes: Vec<Change>,
    runs: Vec<Run>,
    /// The guest clusters that are taken.
    clusters: std::ops::Range<u64>,
}

/// One cluster of a write, as it is now. Clusters of images without subclusters count as one subcluster.
#[derive(Debug)]
struct Found {
    page: Arc<Page>,
    page_at: u64,
    word: usize,
    table: u64,
    host: Option<u64>,
    copied: bool,
    allocated: u32,
    zero: u32,
    unlink: Option<(u64, u64)>,
}

impl Found {
    /// It has a cluster that may be written in place.
    fn in_place(&self) -> Option<u64> {
        self.host.filter(|_| self.copied)
    }
}

/// Where a write stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    /// Guest offset in bytes.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// How far the backing file reaches, in bytes.
    pub backing: u64,
    /// Nothing may be waited for and nothing copied.
    pub quick: bool,
}

impl Meta {
    /// Plans a write. Nothing is allocated when it is refused.
    pub(crate) fn plan(&mut self, asked: Asked) -> Result<Plan, Refusal> {
        self.writable()?;
        let bits = self.geometry.cluster_bits;
        let end = asked.offset + asked.len;
        let clusters = asked.offset >> bits..((end - 1) >> bits) + 1;
        if clusters.clone().any(|c| self.in_flight.contains(&c)) {
            return Err(Refusal::Busy);
        }
        if self.pages.crowded() {
            return Err(Refusal::Checkpoint);
        }
        self.record(asked.offset, asked.len, asked.quick)?;
        let mut found = Vec::new();
        for cluster in clusters.clone() {
            found.push(self.find(cluster << bits, asked.quick)?);
        }
        let mut plan = Plan {
            pieces: Vec::new(),
            copies: Vec::new(),
            changes: Vec::new(),
            runs: Vec::new(),
            clusters: clusters.clone(),
        };
        match self.fill(&mut plan, found, asked) {
            Ok(()) => {
                self.in_flight.extend(clusters);
                Ok(plan)
            }
            Err(refusal) => {
                for run in plan.runs {
                    self.give_back(run);
                }
                Err(refusal)
            }
        }
    }

    /// Gives every cluster a place and says what is to be done.
    fn fill(&mut self, plan: &mut Plan, found: Vec<Found>, asked: Asked) -> Result<(), Refusal> {
        let cluster = self.geometry.cluster();
        let end = asked.offset + asked.len;
        let mut wanting = runs_wanting(&found);
        let mut run = Run {
            first: 0,
            count: 0,
            fresh: false,
        };
        let mut at = asked.offset;
        for (index, found) in found.into_iter().enumerate() {
            let start = self.geometry.down(at);
            let part = at..end.min(start + cluster);
            let (host, fresh) = match found.in_place() {
                Some(host) => {
                    self.check_target(host)?;
                    (host, false)
                }
                None if self.geometry.data_file => (start, false),
                None => {
                    if run.count == 0 {
                        let want = wanting.get_mut(index).map_or(1, |want| *want).max(1);
                        run = self.allocate(want)?;
                        plan.runs.push(run);
                    }
                    let host = run.first * cluster;
                    run.first += 1;
                    run.count -= 1;
                    (host, run.fresh)
                }
            };
            let target = Target {
                start,
                host,
                fresh,
                part: part.clone(),
            };
            self.arrange(plan, found, &target, asked)?;
            let host = host + self.geometry.within(at);
            let len = part.end - part.start;
            match plan.pieces.last_mut() {
                Some((last, have)) if *last + *have == host => *have += len,
                _ => plan.pieces.push((host, len)),
            }
            at = part.end;
        }
        Ok(())
    }

    /// Works out the copies and the new entry of one cluster.
    fn arrange(
        &self,
        plan: &mut Plan,
        found: Found,
        target: &Target,
        asked: Asked,
    ) -> Result<(), Refusal> {
        let grain = self.geometry.grain();
        let moved = found.in_place().is_none();
        let mut touched = 0_u32;
        let mut keep = 0_u32;
        for number in 0..self.geometry.cluster() / grain {
            let bit = 1_u32 << number;
            let from = target.start + number * grain;
            let to = from + grain;
            let hit = from < target.part.end && to > target.part.start;
            let have = found.allocated & bit != 0;
            if hit {
                touched |= bit;
            } else if have && moved {
                keep |= bit;
            }
            let must = if hit { !have || moved } else { have && moved };
            if !must {
                continue;
            }
            let zero = !have && (found.zero & bit != 0 || from >= asked.backing);
            let head = from..if hit {
                target.part.start.clamp(from, to)
            } else {
                to
            };
            let tail = if hit {
                target.part.end.clamp(from, to)
            } else {
                to
            }..to;
            for range in [head, tail] {
                if range.is_empty() || (zero && target.fresh) {
                    continue;
                }
                if asked.quick {
                    return Err(Refusal::Slow);
                }
                plan.copy(range, target, zero);
            }
        }
        let allocated = found.allocated & if moved { 0 } else { u32::MAX } | keep | touched;
        if !moved && allocated == found.allocated {
            return Ok(());
        }
        let zero = found.zero & !allocated;
        let bitmap = if self.geometry.extended {
            u64::from(zero) << 32 | u64::from(allocated)
        } else {
            0
        };
        plan.changes.push(Change {
            page: found.page,
            page_at: found.page_at,
            word: found.word,
            table: found.table,
            entry: (target.host & OFFSET) | COPIED,
            bitmap,
            unlink: if moved { found.unlink } else { None },
        });
        Ok(())
    }

    /// How the cluster at a guest offset is kept, with an L2 table that may be changed.
    fn find(&mut self, offset: u64, quick: bool) -> Result<Found, Refusal> {
        let table = self.own_table(offset, quick)?;
        let Lookup::Page { page, at } = self.l2_page(offset, !quick)? else {
            return Err(Refusal::Slow);
        };
        let word = self.place(offset).word;
        let entry = self.l2_entry(&page, word, offset)?;
        let whole = if self.geometry.extended { u32::MAX } else { 1 };
        let bits = self.geometry.cluster_bits;
        let mut found = Found {
            page,
            page_at: at,
            word,
            table,
            host: None,
            copied: false,
            allocated: 0,
            zero: 0,
            unlink: None,
        };
        match entry {
            L2::Absent => {}
            L2::Zero { host, copied } => {
                (found.host, found.copied, found.zero) = (host, copied, whole);
            }
            L2::Data { host, copied } => {
                (found.host, found.copied, found.allocated) = (Some(host), copied, whole);
            }
            L2::Parts {
                host,
                copied,
                allocated,
                zero,
            } => {
                (found.host, found.copied) = (host, copied);
                (found.allocated, found.zero) = (allocated, zero);
            }
            L2::Compressed(data) => {
                found.allocated = whole;
                let first = data.offset >> bits;
                let last = (data.offset + data.len - 1) >> bits;
                found.unlink = Some((first, last - first + 1));
            }
        }
        if let Some(host) = found.host
            && !self.geometry.data_file
        {
            found.unlink = Some((host >> bits, 1));
        }
        Ok(found)
    }

    /// Enters the clusters of a plan into the mapping. Its data and its copies have been written.
    pub(crate) fn publish(&mut self, plan: Plan) {
        let mut unlinked = Vec::new();
        // First, so that whoever finds the new entries without the lock also finds that they are not durable.
        self.soil();
        for change in &plan.changes {
            self.set_entry(
                change.page.as_ref(),
                change.word,
                change.entry,
                change.bitmap,
            );
            self.mark_l2(change.table, change.page_at);
            unlinked.extend(change.unlink);
        }
        self.unlink_all(&unlinked);
        self.release(plan.clusters);
    }

    /// Takes clusters out of the reach of new look-ups; their entries have been changed.
    pub(crate) fn unlink_all(&mut self, unlinked: &[(u64, u64)]) {
        if unlinked.is_empty() {
            return;
        }
        let tag = self.shared.epochs.advance();
        for &(first, count) in unlinked {
            self.unlink(first, count, tag);
        }
    }

    /// Undoes a plan.
    pub(crate) fn abandon(&mut self, plan: Plan) {
        for run in plan.runs {
            self.give_back(run);
        }
        self.release(plan.clusters);
    }

    /// Changes an L2 entry in memory.
    pub(crate) fn set_entry(&self, page: &Page, word: usize, entry: u64, bitmap: u64) {
        page.set(word, entry);
        if self.geometry.extended {
            page.set(word + 1, bitmap);
        }
    }

    /// Lets others write to guest clusters again.
    pub(crate) fn release(&mut self, clusters: std::ops::Range<u64>) {
        for cluster in clusters {
            self.in_flight.remove(&cluster);
        }
        for waiter in self.waiters.drain(..) {
            if let Err(error) = waiter.write(1) {
                tracing::error!(%error, "a queue could not be told that clusters are free");
            }
        }
    }

    /// The L2 table for a guest offset, made or copied if need be so that it may be changed.
    pub(crate) fn own_table(&mut self, offset: u64, quick: bool) -> Result<u64, Refusal> {
        let index = self.place(offset).table;
        let old = self.table(index)?;
        let copied = self.l1.get(index).is_some_and(|entry| entry & COPIED != 0);
        if let Some(table) = old
            && copied
        {
            return Ok(table);
        }
        if quick && old.is_some() {
            return Err(Refusal::Slow);
        }
        if index >= self.l1.len() {
            return Err(Refusal::Failed(io::ErrorKind::InvalidInput.into()));
        }
        let pages = match old {
            Some(old) => Some(self.table_pages(old)?),
            None => None,
        };
        let run = self.allocate(1)?;
        let table = run.first * self.geometry.cluster();
        self.metadata.insert(run.first, run.first + 1);
        self.new_table_pages(table);
        for (at, page) in pages.into_iter().flatten() {
            for word in 0..page.len() {
                let Some(new) = self.pages.get(table + at) else {
                    break;
                };
                new.set(word, page.get(word));
            }
            if page.is_suspect()
                && let Some(new) = self.pages.get(table + at)
            {
                new.suspect();
            }
        }
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = table | COPIED;
        }
        self.new_tables.insert(table, index);
        self.l1_changed(index);
        if let Some(old) = old {
            self.unlink_all(&[(old >> self.geometry.cluster_bits, 1)]);
        }
        // Cursors may hold pages of the old table, or the knowledge that there is none.
        self.shared
            .generation
            .fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        Ok(table)
    }

    /// All pages of a table, with their offsets in it.
    pub(crate) fn table_pages(&mut self, table: u64) -> io::Result<Vec<(u64, Arc<Page>)>> {
        let size = self.pages.size();
        let mut pages = Vec::new();
        for number in 0..self.geometry.cluster() / size {
            let page = self.table_page(table + number * size)?;
            pages.push((number * size, page));
        }
        Ok(pages)
    }
}

impl Plan {
    /// Notes a copy, joined with the last where they are one.
    fn copy(&mut self, range: std::ops::Range<u64>, target: &Target, zero: bool) {
        let host = target.host + (range.start - target.start);
        let len = range.end - range.start;
        match self.copies.last_mut() {
            Some(last)
                if last.zero == zero
                    && last.guest + last.len == range.start
                    && last.host + last.len == host =>
            {
                last.len += len;
            }
            _ => self.copies.push(Copy {
                guest: range.start,
                len,
                host,
                zero,
            }),
        }
    }
}

/// One cluster of a write, as it will be.
struct Target {
    /// The guest offset of its first byte.
    start: u64,
    /// Its host cluster.
    host: u64,
    /// The host cluster reads as zeros.
    fresh: bool,
    /// The guest range in it that is written.
    part: std::ops::Range<u64>,
}

/// For each cluster, how many from it on need a new host cluster without a break.
fn runs_wanting(found: &[Found]) -> Vec<u64> {
    let mut wanting = vec![0; found.len()];
    let mut length = 0;
    for (found, wanted) in found.iter().zip(&mut wanting).rev() {
        length = if found.in_place().is_some() {
            0
        } else {
            length + 1
        };
        *wanted = length;
    }
    wanting
}
