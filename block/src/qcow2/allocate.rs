//! Host clusters: where to get them, and when freed ones are free.
//!
//! A cluster comes from what this process has freed, from what a search of the refcounts
//! finds (a little at a time, so that no write waits for the search of a large
//! image), or from past the end of the file.
//!
//! A freed cluster takes its time: it is taken out of the mapping in memory, then a
//! checkpoint takes it out on disk, then whoever still moves data there ends; only then its refcount
//! is lowered and it can be found again.

use std::io;
use std::sync::atomic::Ordering;

use super::meta::{Meta, Unlinked};

/// How many refcounts are searched in one go.
const SEARCH: u64 = 2048;

/// Clusters in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The number of the first.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
    /// They read as zeros.
    pub fresh: bool,
}

impl Meta {
    /// Moves the frontier up.
    pub(crate) fn advance_frontier(&mut self, to: u64) {
        self.frontier = self.frontier.max(to);
        if self.fresh != u64::MAX {
            self.fresh = self.fresh.max(to);
        }
        let high = self.frontier.saturating_mul(self.geometry.cluster());
        self.shared.high_water.fetch_max(high, Ordering::Relaxed);
    }

    /// Allocates up to `want` clusters in a row, at least one, with a refcount of 1.
    pub(crate) fn allocate(&mut self, want: u64) -> io::Result<Run> {
        self.reclaim(1)?;
        let run = match self.take_counted(want, 1)? {
            Some(run) => run,
            None => {
                self.search()?;
                match self.take_counted(want, 1)? {
                    Some(run) => run,
                    None => return self.allocate_at_frontier(want, false),
                }
            }
        };
        self.count_in(run)?;
        Ok(run)
    }

    /// Allocates exactly `count` clusters in a row.
    pub(crate) fn allocate_exact(&mut self, count: u64) -> io::Result<Run> {
        let run = match self.take_counted(count, count)? {
            Some(run) => run,
            None => return self.allocate_at_frontier(count, true),
        };
        self.count_in(run)?;
        Ok(run)
    }

    /// Gives clusters back that were allocated and that nothing has ever referred to.
    pub(crate) fn give_back(&mut self, run: Run) {
        let tag = self.shared.epochs.advance();
        self.released.push_back(Unlinked {
            first: run.first,
            count: run.count,
            tag,
        });
        self.soil();
    }

    /// Notes that nothing in memory refers to these clusters any more.
    pub(crate) fn unlink(&mut self, first: u64, count: u64, tag: u64) {
        match self.unlinked.last_mut() {
            Some(last) if last.tag == tag && last.first + last.count == first => {
                last.count += count;
            }
            _ => self.unlinked.push(Unlinked { first, count, tag }),
        }
        self.soil();
    }

    /// Frees up to `most` runs of clusters that are out of use by now.
    pub(crate) fn reclaim(&mut self, most: usize) -> io::Result<()> {
        for run in self.take_released(most) {
            self.settle(run)?;
        }
        Ok(())
    }

    /// Up to `most` runs of clusters that are out of use by now, still counted; the caller
    /// gives each to [`Meta::settle`].
    pub(crate) fn take_released(&mut self, most: usize) -> Vec<Unlinked> {
        if self.released.is_empty() {
            return Vec::new();
        }
        let oldest = self.shared.epochs.oldest();
        let ready = self.released.iter().take(most);
        let ready = ready.take_while(|run| run.tag < oldest).count();
        self.released.drain(..ready).collect()
    }

    /// Lowers the refcounts of clusters that nobody uses, and makes those findable that became free.
    pub(crate) fn settle(&mut self, run: Unlinked) -> io::Result<()> {
        for cluster in run.first..run.first + run.count {
            if self.lower(cluster)? != 0 {
                continue;
            }
            let size = self.geometry.cluster();
            self.pages.forget(cluster * size, size);
            self.metadata.remove(cluster);
            if self.compressed_end / size == cluster {
                // No more goes into it: it may soon be somebody's.
                self.compressed_end = 0;
            }
            // What the search has not come to, it will find.
            if !(self.scan..self.scan_end).contains(&cluster) {
                self.add_free(cluster, 1);
            }
        }
        Ok(())
    }

    /// The parts of a run that nothing but the run's own reference keeps in use. They are about to become holes, so no
    /// more compressed data goes there.
    pub(crate) fn sole(&mut self, run: Unlinked) -> io::Result<Vec<(u64, u64)>> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for cluster in run.first..run.first + run.count {
            if self.refcount(cluster)? != 1 {
                continue;
            }
            if self.compressed_end >> self.geometry.cluster_bits == cluster {
                self.compressed_end = 0;
            }
            match parts.last_mut() {
                Some((first, count)) if *first + *count == cluster => *count += 1,
                _ => parts.push((cluster, 1)),
            }
        }
        Ok(parts)
    }

    /// Makes clusters findable.
    fn add_free(&mut self, first: u64, count: u64) {
        let (mut first, mut count) = (first, count);
        if let Some((&before, &len)) = self.free.range(..first).next_back()
            && before + len == first
        {
            self.free.remove(&before);
            first = before;
            count += len;
        }
        if let Some(len) = self.free.remove(&(first + count)) {
            count += len;
        }
        self.free.insert(first, count);
    }

    /// Takes up to `want` free clusters in a row, not fewer than `least`.
    fn take_free(&mut self, want: u64, least: u64) -> Option<Run> {
        let (&first, &len) = self.free.iter().find(|(_, len)| **len >= least)?;
        let count = len.min(want);
        self.free.remove(&first);
        if count < len {
            self.free.insert(first + count, len - count);
        }
        Some(Run {
            first,
            count,
            fresh: false,
        })
    }

    /// As [`Meta::take_free`], with blocks that count what was taken: whoever shrinks an image may give back blocks in the
    /// midst of it.
    fn take_counted(&mut self, want: u64, least: u64) -> io::Result<Option<Run>> {
        let Some(run) = self.take_free(want, least) else {
            return Ok(None);
        };
        let bits = self.geometry.refblock_bits();
        for block in run.first >> bits..=(run.first + run.count - 1) >> bits {
            loop {
                match self.ensure_block(block << bits) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        self.add_free(run.first, run.count);
                        return Err(error);
                    }
                }
            }
        }
        Ok(Some(run))
    }

    /// Searches some more refcounts for free clusters, as far as the refcount table goes.
    fn search(&mut self) -> io::Result<()> {
        let counted = (self.reftable.len() as u64) << self.geometry.refblock_bits();
        let end = self.scan_end.min(self.scan + SEARCH).min(counted);
        for cluster in self.scan..end {
            if self.refcount(cluster)? == 0 && !self.metadata.contains(cluster) {
                self.add_free(cluster, 1);
            }
        }
        self.scan = self.scan.max(end);
        Ok(())
    }

    fn allocate_at_frontier(&mut self, want: u64, exact: bool) -> io::Result<Run> {
        loop {
            let first = self.frontier;
            let last = first + want - 1;
            if last.saturating_add(1) > 1 << (56 - self.geometry.cluster_bits) {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            if self.ensure_block(first)? {
                continue;
            }
            let block = self.geometry.refblock_bits();
            let mut count = want;
            if exact {
                let mut made = false;
                for index in (first >> block) + 1..=(last >> block) {
                    made |= self.ensure_block(index << block)?;
                }
                if made {
                    continue;
                }
            } else {
                count = count.min((((first >> block) + 1) << block) - first);
            }
            if let Some(used) = self.used_in(first, count)? {
                // Counted, though past the end of the file.
                self.advance_frontier(used + 1);
                continue;
            }
            let fresh = first >= self.fresh;
            self.advance_frontier(first + count);
            let run = Run {
                first,
                count,
                fresh,
            };
            self.count_in(run)?;
            return Ok(run);
        }
    }

    fn used_in(&mut self, first: u64, count: u64) -> io::Result<Option<u64>> {
        for cluster in first..first + count {
            if self.metadata.contains(cluster) || self.refcount(cluster)? != 0 {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    fn count_in(&mut self, run: Run) -> io::Result<()> {
        for cluster in run.first..run.first + run.count {
            if self.metadata.contains(cluster) || self.refcount(cluster)? != 0 {
                return Err(self.corrupt(format!("cluster {cluster} was free and is in use")));
            }
            self.set_refcount(cluster, 1)?;
        }
        Ok(())
    }
}
