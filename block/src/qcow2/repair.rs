//! Repairs images: frees leaked clusters, corrects refcounts and COPIED bits, rebuilds refcount structures.
//!
//! Whatever is interrupted leaves an image that is no worse than it was. So everything that makes writers more
//! careful (higher refcounts, COPIED bits taken away) is on disk before anything that makes them less careful, and
//! new structures are complete on fresh space before the header refers to them, which one write does for all.
//!
//! Nothing is freed while there are references that could not be followed: what looks leaked may be theirs.

use std::collections::BTreeSet;
use std::io;

use super::check::{
    CheckError, CheckReport, Counts, Finding, Leniency, Run, Scan, Severity, Sink, scan,
};
use super::entry::{self, COPIED, EntryError, L2, OFFSET, ZERO};
use super::fields::{put, u64_at};
use super::geometry::Geometry;
use super::header::{AUTOCLEAR_KNOWN, CORRUPT, DIRTY, Header, OFFSET_END, REFTABLE_MAX};
use super::refblock;
use super::snapshot_table;
use super::words::is_hole;
use crate::storage::Storage;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Leaked clusters, and COPIED bits.
    Leaks,
    /// Whatever can be.
    All,
}

/// Checks an image, repairs it, and checks it again: the report's numbers are those after the repair.
///
/// `sink` gets what was found at first, and then what was repaired.
///
/// # Errors
///
/// As of `check`; also the host's on writing, and refcount structures that only [`Repair::All`] can rebuild.
pub(crate) fn repair(
    storage: &dyn Storage,
    how: Repair,
    sink: Sink<'_>,
) -> Result<CheckReport, CheckError> {
    let leniency = match how {
        Repair::Leaks => Leniency::Strict,
        Repair::All => Leniency::CutSnapshots,
    };
    // What the host says of holes is to hold for all that has been written.
    storage.sync().map_err(CheckError::Write)?;
    let mut scan_now = scan(storage, sink, leniency)?;
    let mut repairer = Repairer {
        storage,
        sink,
        all: how == Repair::All,
        corruptions_fixed: 0,
        leaks_fixed: 0,
    };
    if scan_now.broken && !repairer.all {
        return Err(CheckError::NeedsRebuild);
    }
    repairer.prepare(&mut scan_now.header)?;
    if repairer.all && scan_now.bad_zeros != 0 {
        repairer.drop_bad_zeros(&scan_now)?;
        let header = scan_now.header;
        scan_now = scan(storage, &mut |_| (), leniency)?;
        scan_now.header = header;
    }
    repairer.mend(&mut scan_now)?;
    let mut header = scan_now.header;
    let mut report = scan(storage, &mut |_| (), Leniency::Strict)?.report;
    if report.corruptions == 0 && header.incompatible & (DIRTY | CORRUPT) != 0 {
        header.incompatible &= !(DIRTY | CORRUPT);
        header.store_features(storage).map_err(CheckError::Write)?;
        repairer.sync()?;
    }
    report.corruptions_fixed = repairer.corruptions_fixed;
    report.leaks_fixed = repairer.leaks_fixed;
    Ok(report)
}

struct Repairer<'a> {
    storage: &'a dyn Storage,
    sink: Sink<'a>,
    all: bool,
    corruptions_fixed: u64,
    leaks_fixed: u64,
}

impl Repairer<'_> {
    fn repaired(&mut self, message: String) {
        let severity = Severity::Repaired;
        (self.sink)(Finding { severity, message });
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), CheckError> {
        self.storage.read_at(buf, offset).map_err(CheckError::Read)
    }

    fn write(&self, buf: &[u8], offset: u64) -> Result<(), CheckError> {
        self.storage
            .write_at(buf, offset)
            .map_err(CheckError::Write)
    }

    fn sync(&self) -> Result<(), CheckError> {
        self.storage.sync().map_err(CheckError::Write)
    }

    /// Does what a writer must do before its first write: features that it does not know lose their word, and
    /// bitmaps that an earlier writer did not know are gone, as their clusters are about to be freed.
    fn prepare(&mut self, header: &mut Header) -> Result<(), CheckError> {
        let unknown = header.autoclear & !AUTOCLEAR_KNOWN != 0;
        let stale = header.bitmaps.is_some() && header.consistent_bitmaps().is_none();
        header.autoclear &= AUTOCLEAR_KNOWN;
        if stale {
            header.bitmaps = None;
            header.store(self.storage).map_err(CheckError::Write)?;
        } else if unknown {
            header
                .store_features(self.storage)
                .map_err(CheckError::Write)?;
        } else {
            return Ok(());
        }
        self.sync()
    }

    fn mend(&mut self, scan: &mut Scan) -> Result<(), CheckError> {
        self.copied(scan, false)?;
        if self.all && (scan.broken || scan.snapshots.is_some()) {
            self.rebuild(scan)?;
        } else {
            if self.all {
                self.adjust(scan, true)?;
            }
            self.adjust(scan, false)?;
        }
        self.copied(scan, true)
    }

    /// Raises refcounts, or lowers them.
    fn adjust(&mut self, scan: &Scan, raise: bool) -> Result<(), CheckError> {
        let geometry = scan.geometry;
        let order = geometry.refcount_order;
        let mut block = Block::default();
        scan.differences::<CheckError>(|cluster, stored, found| {
            let expected = scan.expected(cluster, self.all);
            if expected == stored || (stored < found) != raise {
                return Ok(());
            }
            let index = usize::try_from(cluster >> geometry.refblock_bits()).unwrap_or(usize::MAX);
            let offset = scan.blocks.get(index).copied().unwrap_or(0);
            block.go_to(self, offset, &geometry)?;
            let within = cluster & ((1 << geometry.refblock_bits()) - 1);
            let within = usize::try_from(within).unwrap_or(usize::MAX);
            refblock::set(&mut block.bytes, within, order, expected);
            block.changed = true;
            if raise {
                self.corruptions_fixed += 1;
            } else {
                self.leaks_fixed += 1;
            }
            self.repaired(format!(
                "cluster {cluster}: refcount {stored} is now {expected}"
            ));
            Ok(())
        })?;
        block.go_to(self, 0, &geometry)?;
        self.sync()
    }

    /// Sets the COPIED bits that are missing in the active tables, or clears those that are wrong, by the
    /// refcounts that are to be.
    fn copied(&mut self, scan: &Scan, set: bool) -> Result<(), CheckError> {
        let geometry = scan.geometry;
        let all = self.all;
        let wanted = |entry: u64| {
            let single = scan.expected((entry & OFFSET) >> geometry.cluster_bits, all) == 1;
            let wanted = if single {
                entry | COPIED
            } else {
                entry & !COPIED
            };
            Some(wanted).filter(|wanted| single == set && *wanted != entry)
        };
        let l2 = |entry: u64, bitmap: u64| match entry::l2(entry, bitmap, &geometry) {
            Ok(
                L2::Data { .. } | L2::Zero { host: Some(_), .. } | L2::Parts { host: Some(_), .. },
            ) if geometry.data_file => Some(entry | COPIED).filter(|to| set && *to != entry),
            Ok(
                L2::Data { host, .. }
                | L2::Zero {
                    host: Some(host), ..
                }
                | L2::Parts {
                    host: Some(host), ..
                },
            ) if host >> geometry.cluster_bits < scan.clusters => wanted(entry),
            _ => None,
        };
        self.rewrite(scan, &wanted, &l2)
    }

    /// Makes zero clusters with an impossible place plain ones.
    fn drop_bad_zeros(&mut self, scan: &Scan) -> Result<(), CheckError> {
        self.rewrite(scan, &|_| None, &|entry, bitmap| {
            let error = entry::l2(entry, bitmap, &scan.geometry).err()?;
            let bad = matches!(error, EntryError::Unaligned(_)) && entry & ZERO != 0;
            (bad && !scan.geometry.extended).then_some(ZERO)
        })?;
        self.sync()
    }

    /// Changes entries of the active tables: `l1` and `l2` give the new one where there is to be one.
    fn rewrite(
        &mut self,
        scan: &Scan,
        l1: &dyn Fn(u64) -> Option<u64>,
        l2: &dyn Fn(u64, u64) -> Option<u64>,
    ) -> Result<(), CheckError> {
        let header = &scan.header;
        let geometry = scan.geometry;
        let end = scan.clusters << geometry.cluster_bits;
        if header.check_l1().is_err() || header.l1_offset >= end {
            return Ok(());
        }
        let mut seen = BTreeSet::new();
        let mut table = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
        let size = usize::try_from(geometry.entry_size()).unwrap_or(8);
        // The L1 table is gone through a cluster at a time; it is within the file, or there is none.
        let len = (u64::from(header.l1_entries) * 8).min(end - header.l1_offset);
        let mut done = 0;
        while done < len {
            let part = (len - done).min(geometry.cluster());
            let mut entries = vec![0; usize::try_from(part).unwrap_or(0)];
            self.read(&mut entries, header.l1_offset + done)?;
            for bytes in entries.chunks_exact(8) {
                let Ok(Some(offset)) = entry::l1(u64_at(bytes, 0), &geometry) else {
                    continue;
                };
                if offset < end
                    && seen.insert(offset)
                    && !is_hole(self.storage, offset, geometry.cluster())
                {
                    self.read(&mut table, offset)?;
                    self.change(&mut table, offset, size, &|bytes| {
                        l2(
                            u64_at(bytes, 0),
                            if geometry.extended {
                                u64_at(bytes, 8)
                            } else {
                                0
                            },
                        )
                    })?;
                }
            }
            self.change(&mut entries, header.l1_offset + done, 8, &|bytes| {
                let entry = u64_at(bytes, 0);
                let offset = entry::l1(entry, &geometry).ok().flatten()?;
                (offset < end).then(|| l1(entry)).flatten()
            })?;
            done += part;
        }
        self.sync()
    }

    /// Changes the entries of a part of a table, and writes what has changed in one go.
    fn change(
        &mut self,
        table: &mut [u8],
        offset: u64,
        size: usize,
        new: &dyn Fn(&[u8]) -> Option<u64>,
    ) -> Result<(), CheckError> {
        let mut span: Option<(usize, usize)> = None;
        for (start, bytes) in (0..).step_by(size).zip(table.chunks_exact_mut(size)) {
            let Some(entry) = new(bytes) else {
                continue;
            };
            let old = u64_at(bytes, 0);
            put(bytes, 0, &entry.to_be_bytes());
            span = Some((span.map_or(start, |(first, _)| first), start + 8));
            self.corruptions_fixed += 1;
            let place = offset + start as u64;
            self.repaired(format!("entry {old:#x} at {place:#x} is now {entry:#x}"));
        }
        match span {
            Some((first, end)) => self.write(
                table.get(first..end).unwrap_or_default(),
                offset + first as u64,
            ),
            None => Ok(()),
        }
    }

    /// Writes all refcount structures anew, and the snapshot table if it is to change.
    fn rebuild(&mut self, scan: &mut Scan) -> Result<(), CheckError> {
        let geometry = scan.geometry;
        self.repaired("rebuilding the refcount structures".into());
        scan.differences::<CheckError>(|_, stored, found| {
            if stored < found {
                self.corruptions_fixed += 1;
            } else if !scan.hidden {
                self.leaks_fixed += 1;
            }
            Ok(())
        })?;
        self.corruptions_fixed += 1;
        settle(scan);
        let table = match &scan.snapshots {
            Some((snapshots, old)) => {
                let run = *old;
                let table = snapshot_table::encode(snapshots)?;
                scan.header.snapshots = u32::try_from(snapshots.len()).unwrap_or(u32::MAX);
                forget(&mut scan.found, run, &geometry);
                table
            }
            None => Vec::new(),
        };
        let plan = Plan::new(scan, self.storage, geometry.clusters(table.len() as u64))?;
        plan.write(self.storage, scan).map_err(CheckError::Write)?;
        if !table.is_empty() {
            scan.header.snapshot_offset = plan.snapshots;
            self.write(&table, plan.snapshots)?;
        }
        self.sync()?;
        scan.header.reftable_offset = plan.table;
        scan.header.reftable_clusters = plan.table_clusters;
        scan.header
            .store_tables(self.storage)
            .map_err(CheckError::Write)?;
        self.sync()
    }
}

/// Makes `found` the refcounts that are to be, and takes out the old refcount structures.
fn settle(scan: &mut Scan) {
    let max = scan.geometry.refcount_max();
    let mut wanted = Vec::new();
    let hidden = scan.hidden;
    let Ok(()) = scan.differences::<std::convert::Infallible>(|cluster, stored, found| {
        let number = if hidden { stored.max(found) } else { found };
        wanted.push((cluster, number.min(max)));
        Ok(())
    });
    for (cluster, number) in wanted {
        scan.found.set(cluster, number);
    }
    for run in std::mem::take(&mut scan.structures) {
        forget(&mut scan.found, run, &scan.geometry);
    }
}

/// Takes out one reference to each cluster of a range.
fn forget(found: &mut Counts, run: Run, geometry: &Geometry) {
    if run.len != 0 {
        let last = run.offset.saturating_add(run.len - 1) >> geometry.cluster_bits;
        (run.offset >> geometry.cluster_bits..=last).for_each(|cluster| found.take_one(cluster));
    }
}

/// Where new structures go: refcount table, blocks and snapshot table, one after the other.
#[derive(Debug)]
struct Plan {
    /// The refcount table's offset in bytes.
    table: u64,
    table_clusters: u32,
    /// Which blocks there are, by index.
    blocks: Vec<u64>,
    /// The offset of the first block.
    first_block: u64,
    /// The snapshot table's offset.
    snapshots: u64,
}

impl Plan {
    /// Plans for the references of `scan`, and adds those to the new structures.
    fn new(scan: &mut Scan, storage: &dyn Storage, snapshots: u64) -> Result<Self, CheckError> {
        let geometry = scan.geometry;
        let bits = geometry.refblock_bits();
        let fixed = !storage.grows_zeroed();
        let mut start = if fixed {
            let last = scan.found.last_used().max(scan.stored.last_used());
            last.map_or(1, |last| last + 1)
        } else {
            scan.clusters
        };
        let mut used = BTreeSet::new();
        for part in Counts::parts(&[&scan.found]) {
            let clusters = (part..part + Counts::PART).filter(|it| scan.found.get(*it) != 0);
            used.extend(clusters.map(|cluster| cluster >> bits));
        }
        scan.past_end.sort_unstable();
        let mut past_end = scan.past_end.iter().peekable();
        let (blocks, table, total) = loop {
            let (blocks, table, total) = fit(&geometry, &used, start, snapshots);
            // A cluster that is referred to, though it is not there, must not become a table's.
            match past_end.next_if(|(first, _)| *first < start.saturating_add(total)) {
                Some((_, last)) => start = start.max(last.saturating_add(1)),
                None => break (blocks, table, total),
            }
            if start >= OFFSET_END >> geometry.cluster_bits {
                return Err(CheckError::NoRoom(total));
            }
        };
        let too_large = table << geometry.cluster_bits > REFTABLE_MAX;
        if too_large || (fixed && start + total > scan.clusters) {
            return Err(CheckError::NoRoom(total));
        }
        let used = table + blocks.len() as u64 + snapshots;
        (start..start + used).for_each(|cluster| scan.found.set(cluster, 1));
        let place = |cluster: u64| cluster << geometry.cluster_bits;
        Ok(Self {
            table: place(start),
            table_clusters: u32::try_from(table).map_err(|_| CheckError::NoRoom(total))?,
            first_block: place(start + table),
            snapshots: place(start + table + blocks.len() as u64),
            blocks,
        })
    }

    /// Writes table and blocks, with the references of `scan` as refcounts.
    fn write(&self, storage: &dyn Storage, scan: &Scan) -> io::Result<()> {
        let geometry = scan.geometry;
        let cluster = usize::try_from(geometry.cluster()).unwrap_or(0);
        let mut table = vec![0; cluster * usize::try_from(self.table_clusters).unwrap_or(0)];
        let capacity = refblock::capacity(cluster, geometry.refcount_order);
        for (offset, index) in (self.first_block..).step_by(cluster).zip(&self.blocks) {
            let mut block = vec![0; cluster];
            let first = index << geometry.refblock_bits();
            for (cluster, within) in (first..).zip(0..capacity) {
                let number = scan.found.get(cluster);
                if number != 0 {
                    refblock::set(&mut block, within, geometry.refcount_order, number);
                }
            }
            storage.write_at(&block, offset)?;
            let place = usize::try_from(index * 8).unwrap_or(usize::MAX);
            put(&mut table, place, &offset.to_be_bytes());
        }
        storage.write_at(&table, self.table)
    }
}

/// The blocks, the clusters of the table, and a bound of all clusters together that new structures need which start
/// at `start`. `used` are the blocks that are needed anyway.
fn fit(
    geometry: &Geometry,
    used: &BTreeSet<u64>,
    start: u64,
    snapshots: u64,
) -> (Vec<u64>, u64, u64) {
    let bits = geometry.refblock_bits();
    // Each round adds the blocks for what the round before added; it ends where nothing is added.
    let mut total = snapshots + 1;
    loop {
        let own = (start >> bits)..=((start + total) >> bits);
        let more = own.clone().filter(|block| !used.contains(block)).count() as u64;
        let last = used.last().copied().unwrap_or(0).max(*own.end());
        let table = geometry.clusters((last + 1) * 8);
        let needed = table + used.len() as u64 + more + snapshots;
        if needed <= total {
            let blocks: BTreeSet<u64> = used.iter().copied().chain(own).collect();
            return (blocks.into_iter().collect(), table, total);
        }
        total = needed;
    }
}

/// The refcount block being changed.
#[derive(Debug, Default)]
struct Block {
    offset: u64,
    bytes: Vec<u8>,
    changed: bool,
}

impl Block {
    /// Writes back what has changed, and reads the block at `offset` instead; 0 for none.
    fn go_to(
        &mut self,
        repairer: &Repairer<'_>,
        offset: u64,
        geometry: &Geometry,
    ) -> Result<(), CheckError> {
        if self.offset == offset {
            return Ok(());
        }
        if self.changed {
            repairer.write(&self.bytes, self.offset)?;
        }
        self.changed = false;
        self.offset = offset;
        self.bytes.clear();
        if offset != 0 {
            self.bytes
                .resize(usize::try_from(geometry.cluster()).unwrap_or(0), 0);
            repairer.read(&mut self.bytes, offset)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
