//! One pass over an image's metadata: what is referred to, and what the refcounts say.

use super::super::bitmap_table;
use super::super::clusters::layers;
use super::super::entry::OFFSET;
use super::super::extension::BitmapsExtension;
use super::super::geometry::Geometry;
use super::super::header::{Header, HeaderError, SNAPSHOTS_MAX};
use super::super::refblock;
use super::super::snapshot_table::{Entries, Snapshot, SnapshotError};
use super::super::words::{each_word, is_hole};
use super::counts::Counts;
use super::{CheckError, CheckReport, Finding, Severity, Sink};
use crate::storage::Storage;

/// How many clusters the tables of snapshots and bitmaps may take that are holes of the file: whoever makes tables, writes them.
const HOLLOW_MAX: u64 = 1 << 20;

/// Whether a snapshot table that must be cut is an error, as it is to those who do not repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leniency {
    /// It is.
    Strict,
    /// It gets cut.
    CutSnapshots,
}

/// Bytes of the image that a table takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub offset: u64,
    pub len: u64,
}

/// What a pass over the image gave.
#[derive(Debug)]
pub(crate) struct Scan {
    /// The header, with its tables' places unchecked.
    pub header: Header,
    pub geometry: Geometry,
    /// How many clusters the file has, the last one maybe in part.
    pub clusters: u64,
    pub report: CheckReport,
    /// References by cluster.
    pub found: Counts,
    /// Refcounts by cluster.
    pub stored: Counts,
    /// The offset of each refcount block, 0 for those that are not there or not usable.
    pub blocks: Vec<u64>,
    /// What the refcount structures take; it is given up when they are rebuilt.
    pub structures: Vec<Run>,
    /// The refcount structures must be rebuilt.
    pub broken: bool,
    /// There are references that could not be followed, so that what looks leaked may be in use.
    pub hidden: bool,
    /// References past the end of the file: first and last cluster. Nothing may ever be put there.
    pub past_end: Vec<(u64, u64)>,
    /// How many zero clusters keep an impossible place: they lose nothing when they give it up.
    pub bad_zeros: u64,
    /// The snapshots as they should be in the table, if they are not, and where the old table is.
    pub snapshots: Option<(Vec<Snapshot>, Run)>,
}

impl Scan {
    /// What a cluster's refcount is to be.
    pub(crate) fn expected(&self, cluster: u64, raise: bool) -> u64 {
        let (stored, found) = (self.stored.get(cluster), self.found.get(cluster));
        let lost = stored < found && (!raise || found > self.geometry.refcount_max());
        if lost || (stored > found && self.hidden) {
            stored
        } else {
            found
        }
    }

    /// Calls `visit` with every cluster whose refcount is not the number of references to it: the cluster, the
    /// refcount, the references.
    pub(crate) fn differences<E>(
        &self,
        mut visit: impl FnMut(u64, u64, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        for start in Counts::parts(&[&self.stored, &self.found]) {
            if self.stored.same_part(&self.found, start) {
                continue;
            }
            for cluster in start..(start + Counts::PART).min(self.clusters) {
                let (stored, found) = (self.stored.get(cluster), self.found.get(cluster));
                if stored != found {
                    visit(cluster, stored, found)?;
                }
            }
        }
        Ok(())
    }
}

/// A pass under way.
pub(super) struct Scanner<'a> {
    pub storage: &'a dyn Storage,
    pub sink: Sink<'a>,
    pub scan: Scan,
    pub leniency: Leniency,
}

/// Goes through all metadata of an image.
pub(crate) fn scan(
    storage: &dyn Storage,
    sink: Sink<'_>,
    leniency: Leniency,
) -> Result<Scan, CheckError> {
    let header = Header::load_unchecked(storage)?;
    let geometry = header.geometry();
    let clusters = geometry.clusters(storage.len().map_err(CheckError::Read)?);
    let report = CheckReport {
        total_clusters: geometry.clusters(header.size),
        ..CheckReport::default()
    };
    let mut scanner = Scanner {
        storage,
        sink,
        leniency,
        scan: Scan {
            header,
            geometry,
            clusters,
            report,
            found: Counts::default(),
            stored: Counts::default(),
            blocks: Vec::new(),
            structures: Vec::new(),
            broken: false,
            hidden: false,
            past_end: Vec::new(),
            bad_zeros: 0,
            snapshots: None,
        },
    };
    scanner.scan.found.add(0, 1);
    scanner.refcounts()?;
    let snapshots = scanner.snapshots()?;
    scanner.mapping(&snapshots)?;
    scanner.bitmaps()?;
    scanner.compare();
    Ok(scanner.scan)
}

impl Scanner<'_> {
    pub(super) fn corruption(&mut self, message: String) {
        self.scan.report.corruptions += 1;
        let severity = Severity::Corruption;
        (self.sink)(Finding { severity, message });
    }

    /// A corruption behind which references may be that nobody sees.
    pub(super) fn hiding(&mut self, message: String) {
        self.scan.hidden = true;
        self.corruption(message);
    }

    /// Counts references to all clusters that a range touches; whether all of them are in the file.
    pub(super) fn refer(&mut self, what: &str, run: Run, times: u64) -> bool {
        if run.len == 0 {
            return true;
        }
        let bits = self.scan.geometry.cluster_bits;
        let first = run.offset >> bits;
        let last = run.offset.saturating_add(run.len - 1) >> bits;
        for cluster in first..=last {
            if cluster >= self.scan.clusters {
                let Run { offset, len } = run;
                self.scan.past_end.push((cluster, last));
                self.hiding(format!(
                    "{what}: {len:#x} bytes at {offset:#x} are past the end of the file"
                ));
                return false;
            }
            self.scan.found.add(cluster, times);
        }
        true
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), CheckError> {
        self.storage.read_at(buf, offset).map_err(CheckError::Read)
    }

    /// Calls `visit` with every number of a table that is not 0 and its index.
    pub(super) fn each_entry(
        &mut self,
        run: Run,
        mut visit: impl FnMut(&mut Self, u64, u64) -> Result<(), CheckError>,
    ) -> Result<(), CheckError> {
        let storage = self.storage;
        each_word(
            storage,
            run.offset,
            run.len,
            CheckError::Read,
            |index, entry| visit(self, index, entry),
        )
    }

    /// Turns "it is nowhere it could be" into a finding; all else stays an error.
    pub(super) fn placed(&mut self, checked: Result<(), HeaderError>) -> Result<bool, CheckError> {
        match checked {
            Ok(()) => Ok(true),
            Err(HeaderError::TableOffset { table, offset })
                if self.scan.geometry.within(offset) == 0 =>
            {
                self.hiding(format!("the {table} cannot be at {offset:#x}"));
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn refcounts(&mut self) -> Result<(), CheckError> {
        let bits = self.scan.geometry.cluster_bits;
        let header = &self.scan.header;
        let run = Run {
            offset: header.reftable_offset,
            len: u64::from(header.reftable_clusters) << bits,
        };
        let hidden = self.scan.hidden;
        let checked = match self.scan.header.check_refcounts() {
            Err(HeaderError::NoRefcounts) => {
                self.scan.broken = true;
                self.corruption("there is no refcount table".into());
                return Ok(());
            }
            other => other,
        };
        let usable = self.placed(checked)? && self.refer("refcount table", run, 1);
        if !usable {
            self.scan.broken = true;
        }
        if run.offset >> bits < self.scan.clusters && run.offset != 0 {
            self.scan.structures.push(run);
            let len = run
                .len
                .min((self.scan.clusters << bits).saturating_sub(run.offset));
            self.each_entry(Run { len, ..run }, Self::refblock)?;
        }
        // That refcounts are missing hides no reference.
        self.scan.hidden = hidden;
        Ok(())
    }

    fn refblock(&mut self, index: u64, entry: u64) -> Result<(), CheckError> {
        let geometry = self.scan.geometry;
        let cluster = entry >> geometry.cluster_bits;
        let wrong = if entry & 0x1ff != 0 {
            Some("has reserved bits set")
        } else if geometry.within(entry) != 0 {
            Some("is not at the start of a cluster")
        } else if cluster >= self.scan.clusters {
            Some("is past the end of the file")
        } else if self.scan.found.get(cluster) != 0 {
            Some("is used for something else too")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            self.scan.broken = true;
            self.corruption(format!("refcount block {index} at {entry:#x} {wrong}"));
            return Ok(());
        }
        let len = geometry.cluster();
        let run = Run { offset: entry, len };
        self.scan.found.add(cluster, 1);
        self.scan.structures.push(run);
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        if self.scan.blocks.len() <= place {
            self.scan.blocks.resize(place + 1, 0);
        }
        if let Some(slot) = self.scan.blocks.get_mut(place) {
            *slot = entry;
        }
        if is_hole(self.storage, entry, len) {
            return Ok(());
        }
        let mut block = vec![0; usize::try_from(len).unwrap_or(0)];
        self.read(&mut block, entry)?;
        let first = index << geometry.refblock_bits();
        let order = geometry.refcount_order;
        // Refcounts past the end of the file are not for this check: nothing is there to leak.
        let count = self.scan.clusters.saturating_sub(first);
        let count = refblock::capacity(block.len(), order)
            .min(usize::try_from(count).unwrap_or(usize::MAX));
        let mut refcounts = (0..count).map(|index| refblock::get(&block, index, order));
        self.scan.stored.fill(first, &mut refcounts);
        Ok(())
    }

    fn snapshots(&mut self) -> Result<Vec<Snapshot>, CheckError> {
        let (count, offset) = (self.scan.header.snapshots, self.scan.header.snapshot_offset);
        if count == 0 {
            return Ok(Vec::new());
        }
        let lenient = self.leniency == Leniency::CutSnapshots;
        match self.scan.header.check_snapshots() {
            Err(error @ HeaderError::DataFileSnapshots(_)) => self.corruption(error.to_string()),
            Err(error @ HeaderError::TableSize { .. }) if lenient => {
                self.corruption(error.to_string());
            }
            other => {
                if !self.placed(other)? {
                    return Ok(Vec::new());
                }
            }
        }
        let mut entries = Entries::new(self.storage, offset)?;
        let mut snapshots = Vec::new();
        let mut rewrite = count > SNAPSHOTS_MAX;
        for index in 0..count.min(SNAPSHOTS_MAX) {
            let (mut snapshot, cut) = match entries.next() {
                Ok(next) => next,
                Err(error @ SnapshotError::PastEnd { .. }) => {
                    self.hiding(error.to_string());
                    rewrite = true;
                    break;
                }
                Err(error @ SnapshotError::TableSize(_)) if lenient => {
                    self.corruption(error.to_string());
                    rewrite = true;
                    break;
                }
                Err(error) => return Err(error.into()),
            };
            if let Some(len) = cut {
                let error = SnapshotError::Extra { index, len };
                if !lenient {
                    return Err(error.into());
                }
                rewrite = true;
                self.corruption(error.to_string());
            }
            if self.scan.header.version >= 3 && snapshot.disk_size.is_none() {
                rewrite = true;
                self.corruption(format!("the entry of snapshot {index} is incomplete"));
                snapshot.disk_size = Some(self.scan.header.size);
            }
            snapshots.push(snapshot);
        }
        let len = entries.table_len();
        let run = Run { offset, len };
        self.refer("snapshot table", run, 1);
        if rewrite {
            self.scan.snapshots = Some((snapshots.clone(), run));
        }
        Ok(snapshots)
    }

    fn bitmaps(&mut self) -> Result<(), CheckError> {
        let header = &self.scan.header;
        let Some(extension) = header.consistent_bitmaps() else {
            return Ok(());
        };
        header.check_bitmaps()?;
        let BitmapsExtension {
            directory_offset: offset,
            directory_size: len,
            ..
        } = extension;
        let (geometry, size) = (self.scan.geometry, header.size);
        let bitmaps = bitmap_table::load(self.storage, &extension, &geometry, size)?;
        self.refer("bitmap directory", Run { offset, len }, 1);
        let mut tables = Vec::new();
        for bitmap in bitmaps {
            let run = Run {
                offset: bitmap.table_offset,
                len: u64::from(bitmap.table_entries) * 8,
            };
            let what = format!("bitmap {:?}", bitmap.name());
            if self.is_within(&what, run) {
                tables.push(run);
            }
        }
        let what = "table of a bitmap";
        for (run, times) in self.tables(what, &tables)? {
            self.each_entry(run, |this, _, entry| {
                match bitmap_table::bits(entry, &geometry) {
                    Ok(bitmap_table::Bits::At(offset)) => {
                        let len = geometry.cluster();
                        this.refer("bitmap", Run { offset, len }, times);
                    }
                    Ok(_) => {}
                    Err(error) => this.hiding(format!("{what}: {error}")),
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Whether all of a table is in the file. What is there of one that is not stays uncounted: nothing is freed then.
    pub(super) fn is_within(&mut self, what: &str, run: Run) -> bool {
        let bits = self.scan.geometry.cluster_bits;
        let (Run { offset, len }, end) = (run, self.scan.clusters);
        let last = offset.saturating_add(len.saturating_sub(1)) >> bits;
        if len == 0 || last < end {
            return true;
        }
        self.scan.past_end.push((end.max(offset >> bits), last));
        self.hiding(format!(
            "{what}: {len:#x} bytes at {offset:#x} are past the end of the file"
        ));
        false
    }

    /// Counts references to all clusters of tables that are in the file. What is returned are their bytes, each one once, with the
    /// number of tables that have it.
    pub(super) fn tables(
        &mut self,
        what: &str,
        tables: &[Run],
    ) -> Result<Vec<(Run, u64)>, CheckError> {
        let bits = self.scan.geometry.cluster_bits;
        let whole = |run: &Run| {
            let last = run.offset.saturating_add(run.len.saturating_sub(1)) >> bits;
            let first = run.offset >> bits;
            (first, if run.len == 0 { first } else { last + 1 })
        };
        let mut hollow = 0_u64;
        for (first, end, times) in layers(tables.iter().map(whole)) {
            let run = Run {
                offset: first << bits,
                len: (end - first) << bits,
            };
            hollow = hollow.saturating_add(self.hollow(run));
            if hollow > HOLLOW_MAX {
                let what = what.into();
                return Err(CheckError::Hollow {
                    what,
                    most: HOLLOW_MAX,
                });
            }
            self.refer(what, run, times);
        }
        let bytes = tables
            .iter()
            .map(|run| (run.offset, run.offset.saturating_add(run.len)));
        let layers = layers(bytes).into_iter();
        let run = |(offset, end, times)| {
            let len = end - offset;
            (Run { offset, len }, times)
        };
        Ok(layers.map(run).collect())
    }

    /// How many clusters of a range are holes of the file.
    fn hollow(&self, run: Run) -> u64 {
        let (mut done, mut holes) = (0, 0_u64);
        while done < run.len {
            let (part, data) = self.storage.extent(run.offset + done, run.len - done);
            if !data {
                holes += part;
            }
            done += part.max(1);
        }
        holes >> self.scan.geometry.cluster_bits
    }

    /// Compares references with refcounts, once all are known.
    fn compare(&mut self) {
        let geometry = self.scan.geometry;
        for offset in std::mem::take(&mut self.scan.blocks) {
            self.scan.blocks.push(offset);
            let references = self.scan.found.get(offset >> geometry.cluster_bits);
            if offset != 0 && references != 1 {
                self.scan.broken = true;
                self.corruption(format!(
                    "the refcount block at {offset:#x} is referred to {references} times"
                ));
            }
        }
        let max = geometry.refcount_max();
        let (mut leaks, mut corruptions, mut missing) = (0, 0, false);
        let sink = &mut self.sink;
        let Ok(()) = self
            .scan
            .differences::<std::convert::Infallible>(|cluster, stored, found| {
                let block =
                    usize::try_from(cluster >> geometry.refblock_bits()).unwrap_or(usize::MAX);
                let (severity, what) = if stored > found {
                    leaks += 1;
                    (Severity::Leak, "leaked")
                } else {
                    corruptions += 1;
                    missing |= self
                        .scan
                        .blocks
                        .get(block)
                        .is_none_or(|offset| *offset == 0);
                    (
                        Severity::Corruption,
                        if found > max {
                            "refcount overflows"
                        } else {
                            "refcount too low"
                        },
                    )
                };
                let message =
                    format!("cluster {cluster} {what}: refcount {stored}, references {found}");
                sink(Finding { severity, message });
                Ok(())
            });
        self.scan.broken |= missing;
        let report = &mut self.scan.report;
        report.leaks += leaks;
        report.corruptions += corruptions;
        let last = self
            .scan
            .found
            .last_used()
            .max(self.scan.stored.last_used());
        report.image_end_offset = last.map_or(0, |last| (last + 1) << geometry.cluster_bits);
    }
}

/// The offset in an entry, aligned or not.
pub(super) fn offset_of(entry: u64) -> u64 {
    entry & OFFSET
}
