//! Writing compressed clusters: packed one behind the other, several to a host cluster.

use std::io;

use super::compress;
use super::entry::Compressed;
use super::image::Qcow2;
use super::meta::{Lookup, Meta};
use super::write::Refusal;

/// A compressed cluster that has a place.
#[derive(Debug)]
pub(crate) struct Packed {
    entry: u64,
    /// Where its bytes go.
    pub host: u64,
    /// The host clusters that have got one reference more.
    clusters: (u64, u64),
}

impl Meta {
    /// Finds a place for `len` bytes of compressed data for the cluster at a guest offset, and takes
    /// that cluster for this write.
    pub(crate) fn plan_packed(&mut self, offset: u64, len: u64) -> Result<Packed, Refusal> {
        self.writable()?;
        let number = offset >> self.geometry.cluster_bits;
        if self.in_flight.contains(&number) {
            return Err(Refusal::Busy);
        }
        if self.pages.crowded() {
            return Err(Refusal::Checkpoint);
        }
        self.record(offset, self.geometry.cluster(), false)?;
        self.own_table(offset, false)?;
        let (host, clusters) = self.pack(len)?;
        let Some(entry) = Compressed::encode(host, len, &self.geometry) else {
            return Err(Refusal::Failed(io::ErrorKind::FileTooLarge.into()));
        };
        self.in_flight.insert(number);
        Ok(Packed {
            entry,
            host,
            clusters,
        })
    }

    /// Bytes in a row behind the last compressed ones, or in a new cluster. Every host cluster that they
    /// touch gets a reference.
    fn pack(&mut self, len: u64) -> io::Result<(u64, (u64, u64))> {
        let size = self.geometry.cluster();
        let begun = self.compressed_end;
        let left = (size - self.geometry.within(begun)) % size;
        let open = begun >> self.geometry.cluster_bits;
        let shared = left > 0 && self.refcount(open)? < self.geometry.refcount_max();
        if shared && left >= len {
            self.raise(open)?;
            self.compressed_end = begun + len;
            return Ok((begun, (open, 1)));
        }
        let run = self.allocate(1)?;
        let start = run.first * size;
        // To allocate one cluster may have freed the other.
        if shared && begun == self.compressed_end && run.first == open + 1 {
            self.raise(open)?;
            self.compressed_end = begun + len;
            return Ok((begun, (open, 2)));
        }
        self.compressed_end = start + len;
        Ok((start, (run.first, 1)))
    }

    /// Enters a compressed cluster into the mapping.
    pub(crate) fn publish_packed(&mut self, offset: u64, packed: &Packed) -> io::Result<()> {
        let number = offset >> self.geometry.cluster_bits;
        let table = self.own_table(offset, false);
        let result = match table {
            Ok(table) => self.enter_packed(offset, table, packed.entry),
            Err(Refusal::Failed(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::WouldBlock.into()),
        };
        self.release(number..number + 1);
        result
    }

    fn enter_packed(&mut self, offset: u64, table: u64, entry: u64) -> io::Result<()> {
        let Lookup::Page { page, at } = self.l2_page(offset, true)? else {
            return Err(super::meta::eio());
        };
        let word = self.place(offset).word;
        let old = self.l2_entry(&page, word, offset)?;
        self.set_entry(&page, word, entry, 0);
        self.mark_l2(table, at);
        if let Some(clusters) = self.held(old) {
            self.unlink_all(&[clusters]);
        }
        Ok(())
    }

    /// Gives up a place.
    pub(crate) fn abandon_packed(&mut self, offset: u64, packed: &Packed) {
        let number = offset >> self.geometry.cluster_bits;
        // What others have packed in between stays where it is.
        self.unlink_all(&[packed.clusters]);
        self.release(number..number + 1);
    }
}

impl Qcow2 {
    /// Compresses one whole cluster (the last one of the disk may be cut off) for
    /// [`Qcow2::write_packed`]; `None` when that makes it no smaller.
    ///
    /// # Errors
    ///
    /// The library's.
    pub(crate) fn pack(&self, data: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let cluster = usize::try_from(self.geometry().cluster()).unwrap_or(usize::MAX);
        if data.len() >= cluster {
            return compress::shrink(self.compression(), data);
        }
        let mut padded = data.to_vec();
        padded.resize(cluster, 0);
        compress::shrink(self.compression(), &padded)
    }

    /// Writes what [`Qcow2::pack`] made of the cluster at `offset`; `planned` is called as soon as it has a
    /// place, before it is written.
    ///
    /// # Errors
    ///
    /// As [`crate::Image::write`]; `Unsupported` on images that cannot hold compressed data.
    pub(crate) fn write_packed(
        &self,
        offset: u64,
        small: &[u8],
        planned: impl FnOnce(),
    ) -> io::Result<()> {
        if self.geometry().data_file {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.check_range(offset, 1)?;
        if self.geometry().within(offset) != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let packed = self.persist(|meta| meta.plan_packed(offset, small.len() as u64))?;
        planned();
        let written = self.storage().write_at(small, packed.host);
        let mut meta = self.lock();
        let result = match written {
            Ok(()) => meta.publish_packed(offset, &packed),
            Err(error) => {
                meta.abandon_packed(offset, &packed);
                Err(error)
            }
        };
        drop(meta);
        self.announce();
        result
    }

    /// Writes one whole cluster (the last one of the disk may be cut off) in compressed form; `false` when
    /// that makes it no smaller, so that nothing was written.
    ///
    /// # Errors
    ///
    /// As [`crate::Image::write`]; `Unsupported` on images that cannot hold compressed data.
    pub fn write_compressed(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        let cluster = self.geometry().cluster();
        if self.geometry().data_file {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.check_range(offset, data.len() as u64)?;
        let whole = data.len() as u64 == cluster
            || (offset + data.len() as u64 == self.disk_size() && (data.len() as u64) < cluster);
        if self.geometry().within(offset) != 0 || !whole {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        match self.pack(data)? {
            Some(small) => self.write_packed(offset, &small, || {}).map(|()| true),
            None => Ok(false),
        }
    }
}
