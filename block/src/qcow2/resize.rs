//! Changing the size of a disk.
//!
//! A disk may grow while queues use it: the new part is complete on disk before the header knows of it, and the header before
//! the queues. Shrinking wants the image to itself.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::create::Preallocation;
use super::header::{L1_MAX, OFFSET_END};
use super::image::{CHUNK, Qcow2};
use super::map::Kind;
use super::meta::eio;
use super::session::{ChangeError, Part, Session};
use super::snapshot_table;
use super::zero::Clear;

impl Qcow2 {
    /// Changes the size of the disk, in bytes, to a multiple of 512. New bytes are zeros, whatever the backing
    /// file has there; `preallocation` is for them. It is durable when this returns.
    ///
    /// Growing may be done while queues use the image; they know of the new size when this returns. Shrinking
    /// may not: what is past the new end is lost.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the disk is as it was then.
    pub fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), ChangeError> {
        if !size.is_multiple_of(512) {
            return Err(ChangeError::Unaligned(size));
        }
        let _one = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.disk_size();
        self.check_snapshots()?;
        if size > old {
            self.grow(old, size, preallocation)
        } else if size < old {
            self.shrink(old, size)
        } else {
            Ok(())
        }
    }

    /// Snapshots must know the size of their own disk.
    fn check_snapshots(&self) -> Result<(), ChangeError> {
        let session = self.session()?;
        let snapshots = snapshot_table::load(session.storage(), &session.meta.header)
            .map_err(|error| ChangeError::Snapshots(Box::new(error)))?;
        if snapshots.is_empty() {
            return Ok(());
        }
        if session.meta.geometry.version < 3 {
            return Err(ChangeError::NeedsVersion3("resizing a disk with snapshots"));
        }
        if snapshots.iter().any(|it| it.disk_size.is_none()) {
            return Err(ChangeError::SizelessSnapshots);
        }
        Ok(())
    }

    /// How many L1 entries a disk of this size needs, if it can be.
    fn needed(&self, size: u64) -> Result<u32, ChangeError> {
        let entries = self.geometry().l1_entries(size);
        u32::try_from(entries)
            .ok()
            .filter(|entries| u64::from(*entries) * 8 <= L1_MAX && size < OFFSET_END)
            .ok_or(ChangeError::TooLarge {
                size,
                cluster: self.geometry().cluster(),
            })
    }

    fn grow(&self, old: u64, size: u64, preallocation: Preallocation) -> Result<(), ChangeError> {
        let needed = self.needed(size)?;
        {
            let mut session = self.session()?;
            if needed > session.meta.header.l1_entries {
                session.grow_l1(needed)?;
            }
        }
        if self.has_raw_data() {
            self.grow_data(old, size)?;
        }
        self.hide_past_end(old, size)?;
        // In a raw data file all is mapped, always.
        let preallocation = match preallocation {
            Preallocation::Off if self.has_raw_data() => Preallocation::Metadata,
            other => other,
        };
        if preallocation != Preallocation::Off {
            let from = old.next_multiple_of(self.geometry().cluster());
            self.preallocate(from, size, preallocation)?;
        }
        self.checkpoint()?;
        let mut session = self.session()?;
        let mut header = session.meta.header.clone();
        header.size = size;
        session.switch_size(header)?;
        session.finish();
        Ok(())
    }

    fn grow_data(&self, old: u64, size: u64) -> io::Result<()> {
        let data = self.data();
        data.zero(old, size - old)?;
        if data.len()? < size {
            data.set_len(size)?;
        }
        Ok(())
    }

    /// Makes a range past the end of the disk read as zeros: whatever is mapped there was never the disk's, and
    /// what the backing file has there never was either.
    fn hide_past_end(&self, old: u64, size: u64) -> io::Result<()> {
        let geometry = *self.geometry();
        let aligned = old.next_multiple_of(geometry.cluster());
        self.zero_part(old, aligned.min(size) - old)?;
        let end = size.next_multiple_of(geometry.cluster());
        let mut at = aligned;
        while at < end {
            let table = at >> geometry.table_bits();
            let next = end.min((table + 1) << geometry.table_bits());
            let index = usize::try_from(table).map_err(|_| eio())?;
            let mapped = self.lock().table(index)?.is_some();
            if mapped || at < self.backing_size() {
                self.clear(at, next - at, Clear::Zero { unmap: true })?;
            }
            at = next;
        }
        Ok(())
    }

    /// Gives a range of zeros its place.
    fn preallocate(&self, from: u64, size: u64, how: Preallocation) -> io::Result<()> {
        let zeros = match how {
            Preallocation::Full => vec![0; usize::try_from(CHUNK).unwrap_or(0)],
            _ => Vec::new(),
        };
        let mut at = from;
        while at < size {
            let len = (CHUNK - at % CHUNK).min(size - at);
            let data = zeros.get(..usize::try_from(len).unwrap_or(usize::MAX));
            self.write_parts(at, len, data)?;
            if how == Preallocation::Falloc {
                self.reserve(at, len)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Has the host reserve the space of a mapped range.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let range = self.range(offset + done, len - done)?;
            if let Kind::Data { host, .. } = range.kind {
                self.data().reserve(host, range.len)?;
            }
            done += range.len;
        }
        Ok(())
    }

    fn shrink(&self, old: u64, size: u64) -> Result<(), ChangeError> {
        let needed = self.needed(size)?;
        let mut session = self.exclusive()?;
        let mut header = session.meta.header.clone();
        header.size = size;
        session.commit()?;
        session.switch_size(header)?;
        session.finish();
        if let Err(error) = self.give_back(old, size, needed) {
            tracing::warn!(%error, "the space of a disk that shrank was not given back");
        }
        Ok(())
    }

    /// Frees what is past the end of a disk that had `old` bytes and has `size`.
    fn give_back(&self, old: u64, size: u64, needed: u32) -> Result<(), ChangeError> {
        let geometry = *self.geometry();
        let aligned = size.next_multiple_of(geometry.cluster());
        // Not every program hides it when it makes the disk larger again.
        self.zero_part(size, aligned.min(old) - size)?;
        let end = u64::from(needed) << geometry.table_bits();
        if aligned < end {
            self.clear(aligned, end - aligned, Clear::Forget)?;
        }
        let mut session = self.exclusive()?;
        session.cut_l1(needed)?;
        self.shrink_files(&mut session, old, size)?;
        session.finish();
        Ok(())
    }

    fn shrink_files(&self, session: &mut Session<'_>, old: u64, size: u64) -> io::Result<()> {
        self.settle(&mut session.meta)?;
        session.cut_file()?;
        if self.has_raw_data() {
            return self.data().set_len(size);
        }
        if self.geometry().data_file {
            let from = size.next_multiple_of(self.geometry().cluster());
            self.data().discard(from, old.saturating_sub(from))?;
        }
        Ok(())
    }
}

impl Session<'_> {
    /// Puts the L1 table where it has room for so many entries.
    fn grow_l1(&mut self, entries: u32) -> Result<(), ChangeError> {
        // From now on the disk has what memory has.
        self.commit()?;
        let mut l1 = self.meta.l1.clone();
        l1.resize(usize::try_from(entries).map_err(|_| eio())?, 0);
        let run = self.put(l1.iter().flat_map(|entry| entry.to_be_bytes()).collect())?;
        let mut header = self.meta.header.clone();
        let old = (header.l1_offset, u64::from(header.l1_entries) * 8);
        header.l1_entries = entries;
        header.l1_offset = self.offset(run);
        let switched = self
            .commit()
            .and_then(|()| self.switch(header, Part::Mapping));
        if let Err(error) = switched {
            self.give_back(run);
            return Err(error.into());
        }
        self.meta.l1 = l1;
        self.free_range(old.0, old.1);
        Ok(())
    }

    /// Makes the L1 table no longer than this, and frees what the rest of it leads to.
    fn cut_l1(&mut self, needed: u32) -> Result<(), ChangeError> {
        let geometry = self.meta.geometry;
        let mut header = self.meta.header.clone();
        if header.l1_entries <= needed {
            return Ok(());
        }
        let (offset, entries) = (header.l1_offset, header.l1_entries);
        header.l1_entries = needed;
        self.commit()?;
        self.switch(header, Part::Mapping)?;
        let kept = usize::try_from(needed).map_err(|_| eio())?;
        let kept = kept.min(self.meta.l1.len());
        let tail = self.meta.l1.split_off(kept);
        let bytes = |entries: u32| geometry.clusters(u64::from(entries) * 8) * geometry.cluster();
        let keep = bytes(needed);
        self.free_range(offset + keep, bytes(entries) - keep);
        // Nothing that was looked up in it counts.
        self.meta.shared.generation.fetch_add(1, Ordering::SeqCst);
        self.drop_tree(&tail)
    }

    /// Cuts the file off behind the last cluster in use.
    fn cut_file(&mut self) -> io::Result<()> {
        if !self.storage().grows_zeroed() {
            return Ok(());
        }
        let meta = &mut *self.meta;
        let before = meta.frontier;
        meta.find_frontier()?;
        meta.frontier = meta.frontier.max(meta.metadata.end()).min(before);
        meta.fresh = meta.frontier;
        meta.scan_end = meta.frontier;
        meta.scan = meta.scan.min(meta.frontier);
        let _past_the_end = meta.free.split_off(&meta.frontier);
        let len = meta.frontier << meta.geometry.cluster_bits;
        if self.storage().len()? > len {
            self.storage().set_len(len)?;
        }
        Ok(())
    }

    /// The new size is in the header: tells those who use the disk.
    pub(crate) fn announce_size(&mut self) {
        let size = self.meta.header.size;
        self.meta.shared.recorder.resize(size);
        self.image.set_disk_size(size);
        // Nothing that was looked up past the old end counts.
        self.meta.shared.generation.fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
