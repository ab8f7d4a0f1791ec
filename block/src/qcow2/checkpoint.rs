//! Bringing changed tables to the disk, in an order that a power cut cannot hurt.
//!
//! ```text
//! under the lock   copy what has changed
//! early            refcounts, new refcount blocks, L2 tables that nothing points to yet;
//!                  sync: with them all data whose write has completed is durable
//! link             the refcount table's entries for new blocks, or the header's pointer
//!                  to a new refcount table; sync (only when there are any)
//! late             changed L2 tables, L1 entries for new ones; sync
//! under the lock   what has left the mapping has now left it on disk too: it may be freed
//! ```
//!
//! So whatever a table on disk points to is counted and written before the table is. What is
//! counted and not pointed to is a leak, the only damage that a power cut can do. Lowered
//! refcounts are written by the next checkpoint.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::header::Header;
use super::image::Qcow2;
use super::meta::{Meta, TableMove, Unlinked, table_sectors};

type Writes = Vec<(u64, Vec<u8>)>;

/// What one checkpoint writes, and what to restore if it fails.
struct Work {
    /// How long the file must be at least, in bytes, so that it holds every cluster in use.
    end: u64,
    early: Writes,
    link: Writes,
    /// A header that points to a new refcount table.
    header: Option<Header>,
    late: Writes,
    /// The header, if the one on disk may be another.
    restore: Option<Header>,
    pages: (BTreeSet<u64>, BTreeSet<u64>),
    l1_dirty: BTreeSet<usize>,
    reftable_dirty: BTreeSet<usize>,
    table_move: Option<TableMove>,
    new_tables: HashMap<u64, usize>,
    unlinked: Vec<Unlinked>,
    /// The early part is durable, and the disk may have some of the rest.
    counted: bool,
}

/// Lets one checkpoint run at a time and serves everybody who waits with the next one.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    running: bool,
    begun: u64,
    done: u64,
    /// The error number of the last one.
    failure: Option<i32>,
}

/// Keeps checkpoints out.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Gate);

impl Gate {
    /// Waits until no checkpoint runs; none runs until the result is dropped.
    pub(crate) fn turn(&self) -> Turn<'_> {
        let mut state = lock(&self.state);
        while state.running {
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        Turn(self)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).running = false;
        self.0.ended.notify_all();
    }
}

impl Qcow2 {
    /// Writes all changed tables, and makes them and all completed data writes durable.
    ///
    /// # Errors
    ///
    /// The host's; what could not be written is tried again by the next checkpoint.
    pub(crate) fn checkpoint(&self) -> io::Result<()> {
        let gate = self.gate();
        let mut state = lock(&gate.state);
        let wanted = state.begun + 1;
        loop {
            if state.done >= wanted {
                return state
                    .failure
                    .map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)));
            }
            if !state.running {
                break;
            }
            state = gate
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        state.begun += 1;
        let own = state.begun;
        drop(state);
        let result = self.commit();
        let mut state = lock(&gate.state);
        state.running = false;
        state.done = own;
        state.failure = result
            .as_ref()
            .err()
            .map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        gate.ended.notify_all();
        result
    }

    /// As [`Qcow2::checkpoint`], under the lock and with the [`Turn`] held.
    pub(crate) fn commit_held(&self, meta: &mut Meta) -> io::Result<()> {
        meta.writable()?;
        let mut work = Work::collect(meta);
        match self.write_out(&mut work) {
            Ok(()) => work.succeed(meta),
            Err(error) => {
                work.fail(meta);
                return Err(error);
            }
        }
        let ready = meta.take_released(usize::MAX);
        if self.punches() {
            let parts = sole_parts(meta, &ready)?;
            self.punch(&parts);
        }
        ready.into_iter().try_for_each(|run| meta.settle(run))
    }

    fn commit(&self) -> io::Result<()> {
        let mut work = {
            let mut meta = self.lock();
            meta.writable()?;
            Work::collect(&mut meta)
        };
        let written = self.write_out(&mut work);
        let mut meta = self.lock();
        match written {
            Ok(()) => work.succeed(&mut meta),
            Err(error) => {
                work.fail(&mut meta);
                return Err(error);
            }
        }
        self.free_released(meta)
    }

    fn write_out(&self, work: &mut Work) -> io::Result<()> {
        let storage = self.storage();
        let stage = |writes: &Writes| -> io::Result<()> {
            writes
                .iter()
                .try_for_each(|(at, bytes)| storage.write_at(bytes, *at))
        };
        if let Some(header) = &work.restore {
            // Before anything is counted or written that the other one does not know.
            header.store(storage)?;
            self.sync_tables()?;
        }
        stage(&work.early)?;
        self.reach(work.end)?;
        self.sync_data()?;
        work.counted = true;
        if let Some(header) = &work.header {
            header.store_reftable(storage)?;
        }
        stage(&work.link)?;
        if work.header.is_some() || !work.link.is_empty() {
            self.sync_tables()?;
        }
        if !work.late.is_empty() {
            stage(&work.late)?;
            self.sync_tables()?;
        }
        Ok(())
    }

    /// Makes the file at least so long. Clusters that are zeros may never have been written, and
    /// others take it for damage when the mapping leads past the end.
    fn reach(&self, end: u64) -> io::Result<()> {
        let storage = self.storage();
        if !storage.grows_zeroed() || end == 0 || storage.len()? >= end {
            return Ok(());
        }
        // Not by setting the length: a write beyond it may be on its way.
        match storage.reserve(end - 1, 1) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Frees the clusters whose last users are gone; with `discard=unmap` they become holes first.
    fn free_released<'a>(&'a self, mut meta: MutexGuard<'a, Meta>) -> io::Result<()> {
        let ready = meta.take_released(usize::MAX);
        if ready.is_empty() {
            return Ok(());
        }
        if self.punches() {
            let parts = sole_parts(&mut meta, &ready)?;
            drop(meta);
            self.punch(&parts);
            meta = self.lock();
        }
        for run in ready {
            meta.settle(run)?;
        }
        Ok(())
    }

    /// Makes clusters holes that are still counted, so that nobody else can have them.
    fn punch(&self, parts: &[(u64, u64)]) {
        let size = self.geometry().cluster();
        for (first, count) in parts {
            // Space that is not given back is no reason to fail.
            if let Err(error) = self.storage().discard(first * size, count * size) {
                tracing::debug!(%error, "a freed range was not given back");
            }
        }
    }
}

/// What of some runs nothing but the runs' own references keeps in use.
fn sole_parts(meta: &mut Meta, runs: &[Unlinked]) -> io::Result<Vec<(u64, u64)>> {
    let mut parts = Vec::new();
    for run in runs {
        parts.extend(meta.sole(*run)?);
    }
    Ok(parts)
}

fn lock(state: &Mutex<GateState>) -> MutexGuard<'_, GateState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Work {
    fn collect(meta: &mut Meta) -> Self {
        let pages = meta.pages.take_dirty();
        let l1_dirty = std::mem::take(&mut meta.l1_dirty);
        let reftable_dirty = std::mem::take(&mut meta.reftable_dirty);
        let mut early = meta.pages.copy_out(&pages.0);
        let mut late = meta.pages.copy_out(&pages.1);
        late.extend(table_sectors(&meta.l1, meta.header.l1_offset, &l1_dirty));
        let mut link = Writes::new();
        let header = meta.reftable_move.map(|table| {
            let words = meta.reftable.iter();
            let bytes = words.flat_map(|entry| entry.to_be_bytes()).collect();
            early.push((table.to.0, bytes));
            let mut header = meta.header.clone();
            (header.reftable_offset, header.reftable_clusters) = table.to;
            header
        });
        if header.is_none() {
            link = table_sectors(&meta.reftable, meta.header.reftable_offset, &reftable_dirty);
        }
        Self {
            end: meta.frontier << meta.geometry.cluster_bits,
            early,
            link,
            header,
            late,
            restore: meta.stale.then(|| meta.header.clone()),
            pages,
            l1_dirty,
            reftable_dirty,
            table_move: meta.reftable_move,
            new_tables: std::mem::take(&mut meta.new_tables),
            unlinked: std::mem::take(&mut meta.unlinked),
            counted: false,
        }
    }

    fn succeed(self, meta: &mut Meta) {
        meta.pages.written(None);
        if self.restore.is_some() {
            meta.stale = false;
        }
        meta.released.extend(self.unlinked);
        if let Some(table) = self.table_move {
            let old = meta.take_reftable(table);
            meta.released.push_back(old);
        }
        let clean = meta.pages.dirty() == 0
            && meta.l1_dirty.is_empty()
            && meta.reftable_dirty.is_empty()
            && meta.reftable_move.is_none()
            && meta.unlinked.is_empty();
        if clean {
            meta.shared.dirty.store(false, Ordering::Release);
        }
    }

    fn fail(mut self, meta: &mut Meta) {
        if self.counted {
            // An L1 entry may have reached the disk: its table is a new one no more, and from now on it is changed
            // only after what it refers to.
            self.pages.0.clear();
            self.new_tables.clear();
            if let Some(table) = self.table_move {
                // The header may have reached the disk too. The new refcount table is complete there, so it is the image's
                // from now on, and what is added to it waits for what it refers to; the header is written again before that.
                meta.stale = true;
                self.unlinked.push(meta.take_reftable(table));
            }
        }
        meta.pages.written(Some(self.pages));
        meta.l1_dirty.extend(self.l1_dirty);
        meta.reftable_dirty.extend(self.reftable_dirty);
        meta.new_tables.extend(self.new_tables);
        let mut unlinked = self.unlinked;
        unlinked.append(&mut meta.unlinked);
        meta.unlinked = unlinked;
    }
}
