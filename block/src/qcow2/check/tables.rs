//! The mapping's part of a check: L1 and L2 tables, of the disk and of its snapshots.

use std::collections::BTreeMap;

use super::super::entry::{self, COMPRESSED, COPIED, EntryError, L2, ZERO};
use super::super::fields::u64_at;
use super::super::snapshot_table::Snapshot;
use super::super::words::is_hole;
use super::CheckError;
use super::scan::{Run, Scanner, offset_of};

/// How an L2 table is used.
#[derive(Clone, Copy, Debug, Default)]
struct Uses {
    /// How many entries refer to it, of all L1 tables.
    all: u64,
    /// How many of these are the active L1 table's.
    active: u64,
    /// The first of these.
    index: u64,
}

/// An L2 table by its offset.
type Tables = BTreeMap<u64, Uses>;

/// An L2 table being read.
struct Table {
    uses: Uses,
    /// Where the next cluster is to be if nothing is fragmented.
    next: u64,
}

impl Scanner<'_> {
    /// Counts what all L1 tables refer to.
    pub(super) fn mapping(&mut self, snapshots: &[Snapshot]) -> Result<(), CheckError> {
        let mut tables = Tables::new();
        let header = &self.scan.header;
        let active = Run {
            offset: header.l1_offset,
            len: u64::from(header.l1_entries) * 8,
        };
        let checked = header.check_l1();
        if self.placed(checked)? && self.refer("L1 table", active, 1) {
            self.l1(active, 1, true, &mut tables)?;
        }
        // Snapshots that share an L1 table are as many references to it, and to all it refers to.
        let what = "L1 table of a snapshot";
        let mut runs = Vec::new();
        for snapshot in snapshots {
            if let Err(error) = snapshot.check_l1(&self.scan.header) {
                self.hiding(error.to_string());
                continue;
            }
            let run = Run {
                offset: snapshot.l1_offset,
                len: u64::from(snapshot.l1_entries) * 8,
            };
            if self.is_within(what, run) {
                runs.push(run);
            }
        }
        for (run, times) in self.tables(what, &runs)? {
            self.l1(run, times, false, &mut tables)?;
        }
        for (offset, uses) in tables {
            self.l2(offset, uses)?;
        }
        Ok(())
    }

    fn l1(
        &mut self,
        run: Run,
        times: u64,
        active: bool,
        tables: &mut Tables,
    ) -> Result<(), CheckError> {
        self.each_entry(run, |this, index, entry| {
            match entry::l1(entry, &this.scan.geometry) {
                Err(error @ EntryError::Unaligned(_)) => {
                    this.hiding(format!("L1 entry {index}: {error}"));
                    return Ok(());
                }
                Err(error) => this.hiding(format!("L1 entry {index}: {error}")),
                Ok(_) => {}
            }
            let offset = offset_of(entry);
            if offset == 0 || this.scan.geometry.within(offset) != 0 {
                return Ok(());
            }
            let cluster = this.scan.geometry.cluster();
            let name = "L2 table";
            if !this.refer(
                name,
                Run {
                    offset,
                    len: cluster,
                },
                times,
            ) {
                return Ok(());
            }
            if active {
                this.copied(name, entry, offset);
            }
            let uses = tables.entry(offset).or_default();
            if active {
                if uses.active == 0 {
                    uses.index = index;
                }
                uses.active += times;
            }
            uses.all = uses.all.saturating_add(times);
            Ok(())
        })
    }

    /// Checks that an entry of the active tables has the COPIED bit if and only if the refcount is 1.
    fn copied(&mut self, what: &str, entry: u64, offset: u64) {
        let cluster = offset >> self.scan.geometry.cluster_bits;
        let refcount = self.scan.stored.get(cluster);
        if (refcount == 1) != (entry & COPIED != 0) {
            self.corruption(format!(
                "{what} at {offset:#x}: the COPIED bit of entry {entry:#x} is wrong, the refcount is {refcount}"
            ));
        }
    }

    fn l2(&mut self, offset: u64, uses: Uses) -> Result<(), CheckError> {
        let geometry = self.scan.geometry;
        if is_hole(self.storage, offset, geometry.cluster()) {
            return Ok(());
        }
        let mut bytes = vec![0; usize::try_from(geometry.cluster()).unwrap_or(0)];
        self.read(&mut bytes, offset)?;
        let size = usize::try_from(geometry.entry_size()).unwrap_or(8);
        let mut table = Table { uses, next: 0 };
        for (index, bytes) in (0..).zip(bytes.chunks_exact(size)) {
            let (entry, bitmap) = (u64_at(bytes, 0), u64_at(bytes, 8));
            if entry | bitmap != 0 {
                let guest =
                    (uses.index << geometry.table_bits()) + (index << geometry.cluster_bits);
                self.l2_entry(&mut table, entry, bitmap, guest);
            }
        }
        Ok(())
    }

    fn l2_entry(&mut self, table: &mut Table, entry: u64, bitmap: u64, guest: u64) {
        let geometry = self.scan.geometry;
        match entry::l2(entry, bitmap, &geometry) {
            Ok(L2::Absent | L2::Zero { host: None, .. } | L2::Parts { host: None, .. }) => {}
            Ok(
                L2::Zero {
                    host: Some(host), ..
                }
                | L2::Data { host, .. }
                | L2::Parts {
                    host: Some(host), ..
                },
            ) => self.cluster(table, entry, host, guest),
            Ok(L2::Compressed(compressed)) => {
                let run = Run {
                    offset: compressed.offset,
                    len: compressed.len,
                };
                self.compressed(table, entry, run, guest);
            }
            Err(error) => {
                let message = format!("cluster at {guest:#x} of the disk: {error}");
                let unaligned = matches!(error, EntryError::Unaligned(_));
                if unaligned && entry & ZERO != 0 && !geometry.extended && geometry.version >= 3 {
                    self.scan.bad_zeros += 1;
                    self.corruption(message);
                } else {
                    self.hiding(message);
                }
                self.unsound(table, entry);
            }
        }
    }

    /// Counts what an unsound entry may refer to, so that it is not taken for free.
    fn unsound(&mut self, table: &mut Table, entry: u64) {
        let geometry = self.scan.geometry;
        if entry & COMPRESSED != 0 {
            let place = entry::Compressed::decode(entry, &geometry);
            let run = Run {
                offset: place.offset,
                len: place.len,
            };
            self.compressed(table, entry & !COPIED, run, 0);
        } else if offset_of(entry) != 0 {
            let offset = offset_of(entry);
            self.place(table, offset);
            if !geometry.data_file {
                self.refer(
                    "data cluster",
                    Run {
                        offset,
                        len: geometry.cluster(),
                    },
                    table.uses.all,
                );
            }
        }
    }

    /// Counts a cluster in the statistics.
    fn place(&mut self, table: &mut Table, host: u64) {
        let Uses { active, .. } = table.uses;
        let report = &mut self.scan.report;
        report.allocated_clusters += active;
        if table.next != 0 && table.next != host {
            report.fragmented_clusters += active;
        }
        table.next = host.saturating_add(self.scan.geometry.cluster());
    }

    fn cluster(&mut self, table: &mut Table, entry: u64, host: u64, guest: u64) {
        self.place(table, host);
        if self.scan.geometry.data_file {
            if host != guest && table.uses.active != 0 {
                self.corruption(format!(
                    "cluster at {guest:#x} of the disk is at {host:#x} of the data file"
                ));
            }
            if entry & COPIED == 0 {
                self.corruption(format!(
                    "cluster at {guest:#x} of the disk: entry {entry:#x} lacks the COPIED bit"
                ));
            }
            return;
        }
        let run = Run {
            offset: host,
            len: self.scan.geometry.cluster(),
        };
        if self.refer("data cluster", run, table.uses.all) && table.uses.active != 0 {
            self.copied("data cluster", entry, host);
        }
    }

    fn compressed(&mut self, table: &mut Table, entry: u64, run: Run, guest: u64) {
        if self.scan.geometry.data_file {
            self.corruption(format!(
                "cluster at {guest:#x} of the disk is compressed, by entry {entry:#x}, in spite of the data file"
            ));
            return;
        }
        let Uses { active, all, .. } = table.uses;
        let report = &mut self.scan.report;
        report.allocated_clusters += active;
        report.compressed_clusters += active;
        report.fragmented_clusters += active;
        self.refer("compressed cluster", run, all);
    }
}
