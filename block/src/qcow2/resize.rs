//! Changing the size of an image's disk.
//!
//! Growing is done under queues that work: the tables are made first, then what the backing file must not
//! show is hidden, then the header says the new size durably, and last the queues see it. The L1 table, if it has
//! to be longer, moves: a checkpoint writes the new one and switches the header to it in one write.

use std::io;

use super::allocate::Run;
use super::image::Qcow2;
use super::map::Kind;
use super::zero::Clear;
use crate::disk::ResizeError;
use crate::image::{Image, Kept};
use crate::qcow2::Preallocation;

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// The most bytes of an L1 table, as in QEMU.
const MAX_L1: u64 = 32 << 20;

impl Qcow2 {
    /// Makes the disk `size` bytes long. What a larger one gains reads as zeros; what a smaller one leaves out is
    /// lost, and nobody may be using it meanwhile.
    ///
    /// # Errors
    ///
    /// The host's; `EROFS` on a read-only image; a [`ResizeError`] as the inner error where the image cannot
    /// have that size.
    pub fn resize(&self, size: u64, preallocation: Preallocation) -> io::Result<()> {
        self.may_resize(size)?;
        let old = self.disk_size();
        if size < old {
            return self.shrink(old, size);
        }
        self.grow(old, size)?;
        self.preallocate(old, size - old, preallocation)?;
        self.flush()
    }

    fn may_resize(&self, size: u64) -> io::Result<()> {
        if !size.is_multiple_of(SECTOR) {
            let unit = SECTOR;
            return Err(ResizeError::Unit { size, unit }.into());
        }
        let meta = self.lock();
        meta.writable()?;
        if meta.header.version < 3 && meta.header.snapshots > 0 {
            return Err(unsupported(
                "a version 2 image with snapshots keeps its size",
            ));
        }
        if meta.header.consistent_bitmaps().is_some() {
            return Err(unsupported("an image with bitmaps keeps its size"));
        }
        if meta.geometry.l1_entries(size) * 8 > MAX_L1 {
            return Err(unsupported(
                "its clusters are too small for a disk of that size",
            ));
        }
        Ok(())
    }

    fn grow(&self, old: u64, size: u64) -> io::Result<()> {
        self.lengthen_l1(size)?;
        self.clean_tail(old)?;
        let shown = size.min(self.backing_size());
        if shown > old {
            self.hide_backing(old, shown)?;
        }
        if self.has_raw_data() {
            self.data().set_len(size)?;
        }
        // Tables before the size that needs them.
        self.checkpoint()?;
        self.set_size(size)
    }

    /// Makes the L1 table long enough for a disk of `size` bytes.
    fn lengthen_l1(&self, size: u64) -> io::Result<()> {
        self.persist(|meta| {
            let wanted = meta.geometry.l1_entries(size);
            if wanted <= meta.l1.len() as u64 {
                return Ok(());
            }
            if meta.l1_move.is_some() {
                return Err(super::write::Refusal::Checkpoint);
            }
            let clusters = meta.geometry.clusters(wanted * 8);
            let Run { first, count, .. } = meta.allocate_exact(clusters)?;
            meta.metadata.extend(first..first + count);
            let entries =
                u32::try_from(wanted).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
            meta.l1
                .resize(usize::try_from(wanted).unwrap_or(usize::MAX), 0);
            meta.l1_move = Some((first << meta.geometry.cluster_bits, entries));
            meta.soil();
            Ok(())
        })
    }

    /// Zeroes what the last cluster holds past the disk's end: whoever shrank the disk may have left data there.
    fn clean_tail(&self, end: u64) -> io::Result<()> {
        let whole = end.next_multiple_of(self.geometry().cluster());
        let mut at = end;
        while at < whole {
            let range = self.range(at, whole - at)?;
            if matches!(range.kind, Kind::Data { .. } | Kind::Compressed(_)) {
                self.write_zeros_past_end(at, range.len)?;
            }
            at += range.len;
        }
        Ok(())
    }

    /// Has a range past the disk's end read as zeros, though the backing file has bytes there.
    fn hide_backing(&self, from: u64, to: u64) -> io::Result<()> {
        let cluster = self.geometry().cluster();
        let whole = from.next_multiple_of(cluster);
        if whole > from {
            self.write_zeros_past_end(from, whole - from)?;
        }
        let end = to.next_multiple_of(cluster);
        let mut at = whole;
        while at < end && !self.clear(at, end - at, Clear::Zero { unmap: true })? {
            // Version 2 has no entry for zeros.
            self.write_zeros_past_end(at, cluster)?;
            at += cluster;
        }
        Ok(())
    }

    /// Makes the header say the size, and then the queues see it.
    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut meta = self.lock();
        let old = meta.header.size;
        meta.header.size = size;
        let stored = meta.header.store_size(self.storage());
        if let Err(error) = stored.and_then(|()| self.sync_tables()) {
            meta.header.size = old;
            return Err(error);
        }
        self.set_disk_size(size);
        Ok(())
    }

    fn shrink(&self, old: u64, size: u64) -> io::Result<()> {
        if self.has_raw_data() {
            return Err(unsupported("an image with a raw data file does not shrink"));
        }
        let cluster = self.geometry().cluster();
        let whole = size.next_multiple_of(cluster);
        // So that it is zeros should the disk grow again.
        self.write_zeroes(size, whole.min(old) - size, true)?;
        self.flush()?;
        self.set_size(size)?;
        let end = old.next_multiple_of(cluster);
        if end > whole {
            self.clear(whole, end - whole, Clear::Forget)?;
        }
        self.drop_tables(size);
        self.close()?;
        self.cut()
    }

    /// Takes the L2 tables out that map nothing of a disk of `size` bytes.
    fn drop_tables(&self, size: u64) {
        let mut meta = self.lock();
        let first = usize::try_from(meta.geometry.l1_entries(size)).unwrap_or(usize::MAX);
        let mut dropped = Vec::new();
        for index in first..meta.l1.len() {
            let Some(entry) = meta.l1.get_mut(index) else {
                break;
            };
            let table = std::mem::take(entry) & super::entry::OFFSET;
            if table != 0 {
                dropped.push((table >> meta.geometry.cluster_bits, 1));
                meta.new_tables.remove(&table);
                meta.l1_changed(index);
            }
        }
        meta.unlink_all(&dropped);
        // Cursors may hold pages of them.
        meta.shared
            .generation
            .fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    }

    /// Gives the free clusters at the end of the file back.
    fn cut(&self) -> io::Result<()> {
        let mut meta = self.lock();
        if !self.storage().grows_zeroed() {
            return Ok(());
        }
        let mut end = meta.frontier;
        while end > 0 && meta.refcount(end - 1)? == 0 && !meta.metadata.contains(&(end - 1)) {
            end -= 1;
        }
        if end == meta.frontier {
            return Ok(());
        }
        let mut free = std::mem::take(&mut meta.free);
        free.retain(|first, count| {
            *count = (*count).min(end.saturating_sub(*first));
            *count > 0
        });
        meta.free = free;
        meta.frontier = end;
        meta.fresh = end;
        meta.scan_end = meta.scan_end.min(end);
        meta.scan = meta.scan.min(meta.scan_end);
        self.storage().set_len(end << meta.geometry.cluster_bits)?;
        self.sync_tables()
    }

    /// Gives a new part of the disk its clusters at once, as asked.
    fn preallocate(&self, offset: u64, len: u64, how: Preallocation) -> io::Result<()> {
        match how {
            Preallocation::Off => Ok(()),
            Preallocation::Metadata => self.write_mapped_zeros(offset, len),
            Preallocation::Falloc => {
                self.write_mapped_zeros(offset, len)?;
                let mut done = 0;
                while done < len {
                    let extent = self.extent(offset + done, len - done)?;
                    if let Kept::Data { host: Some(host) } = extent.kept {
                        self.data().reserve(host, extent.len)?;
                    }
                    done += extent.len;
                }
                Ok(())
            }
            Preallocation::Full => {
                let zeros = vec![0; 1 << 20];
                let mut done = 0;
                while done < len {
                    let part = (len - done).min(zeros.len() as u64);
                    let bytes = zeros.get(..usize::try_from(part).unwrap_or(0));
                    self.write(offset + done, bytes.unwrap_or_default())?;
                    done += part;
                }
                Ok(())
            }
        }
    }
}

fn unsupported(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}
