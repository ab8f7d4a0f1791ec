//! Changes of an image as a whole: snapshots, sizes, bitmaps.
//!
//! Such a change holds the image's lock from its first to its last step, and keeps checkpoints out that others
//! began, so that memory and disk agree where it needs them to. What it makes is complete on fresh
//! clusters, counted and durable, before one write to the header refers to it; what that write makes superfluous is freed
//! only then. A power cut leaves the old state or the new one, and leaks.
//!
//! While refcounts of many clusters change, COPIED bits on disk may not go with them, though never so that a shared
//! cluster counts as not shared. Version 3 images are marked dirty for that time, so that whoever opens
//! one after a power cut repairs it first.

use std::io;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use super::allocate::Run;
use super::checkpoint::Turn;
use super::header::{DIRTY, Header};
use super::image::Qcow2;
use super::meta::Meta;
use crate::size::Size;
use crate::storage::Storage;

/// Why an image could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Requests are under way.
    #[error("the image is in use: try again when no request is under way")]
    Busy,
    /// What images with a data file cannot have.
    #[error("an image with a data file cannot have internal snapshots")]
    DataFile,
    /// There is no such snapshot.
    #[error("there is no snapshot with the id or name {0:?}: 'vireo image snapshot -l' lists them")]
    NoSnapshot(String),
    /// The ID is taken.
    #[error("there is a snapshot with the id {0:?} already")]
    SnapshotExists(String),
    /// A refcount is at its largest.
    #[error(
        "cluster {cluster} has {count} references, and refcounts of {bits} bits cannot count more: \
         convert the image to one with larger refcount_bits"
    )]
    RefcountFull {
        /// The cluster's number.
        cluster: u64,
        /// Its refcount.
        count: u64,
        /// The width of refcounts.
        bits: u32,
    },
    /// The snapshots are of no use, or would not be.
    #[error("the snapshots cannot be changed")]
    Snapshots(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The bitmaps are of no use, or would not be.
    #[error("the bitmaps cannot be changed")]
    Bitmaps(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// There is no such bitmap.
    #[error(
        "there is no bitmap {0:?}: 'vireo image info' lists those of an image, 'vireo disk bitmap list' those of a machine that runs"
    )]
    NoBitmap(String),
    /// The name is taken.
    #[error("there is a bitmap {0:?} already")]
    BitmapExists(String),
    /// A bitmap was not saved after its last use.
    #[error("bitmap {0:?} was not saved after its last use: it can only be removed")]
    Inconsistent(String),
    /// A bitmap does not record, so that it does not tell of all changes.
    #[error("bitmap {0:?} is disabled: it does not tell what has been written meanwhile")]
    Disabled(String),
    /// More bitmaps than are kept in memory.
    #[error("the disk has {0} bitmaps already: remove one first")]
    ManyBitmaps(usize),
    /// A bitmap has data that only its maker understands.
    #[error("bitmap {0:?} has extra data of an unknown kind: it can only be removed")]
    ForeignBitmap(String),
    /// Not a granularity.
    #[error("a granularity of {0} bytes: it must be a power of two from 512 to 2 GiB")]
    Granularity(u64),
    /// The bitmap would take too much memory.
    #[error(
        "bitmap {name:?} would have {bytes} bytes, more than 512 MiB: use a larger granularity"
    )]
    BitmapSize {
        /// Its name.
        name: String,
        /// Its size in bytes.
        bytes: u64,
    },
    /// Bitmaps of disks of different size.
    #[error("a bitmap of a disk of {from} bytes does not go with one of {to} bytes")]
    DiskSizes {
        /// The source's size in bytes.
        from: u64,
        /// The target's.
        to: u64,
    },
    /// Something that version 2 does not have.
    #[error("{0} needs an image of compat=1.1")]
    NeedsVersion3(&'static str),
    /// Snapshots that do not say how large the disk was.
    #[error(
        "the image has snapshots that do not say how large their disk is: delete them, or convert the image"
    )]
    SizelessSnapshots,
    /// Not a size.
    #[error("a size of {} is not a multiple of 512 bytes", Size(*.0))]
    Unaligned(u64),
    /// Clusters have more uses than references, so that freeing one use would free them all.
    #[error("the image is corrupt: {0}; repair it with 'vireo image check -r all'")]
    Corrupt(String),
    /// The disk would be too large.
    #[error("a disk of {} is too large for clusters of {}", Size(*size), Size(*cluster))]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// The cluster size in bytes.
        cluster: u64,
    },
    /// The host's error, or what an image that contradicts itself gives.
    #[error("the image cannot be changed")]
    Host(#[from] io::Error),
}

impl From<ChangeError> for io::Error {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Host(error) => error,
            ChangeError::Busy => Self::new(io::ErrorKind::ResourceBusy, error),
            ChangeError::Corrupt(_) => super::meta::eio(),
            other => Self::new(io::ErrorKind::InvalidInput, other),
        }
    }
}

/// Which part of the header changes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    /// The disk's size and the place of the L1 table.
    Mapping,
    /// The place of the snapshot table.
    Snapshots,
    /// Anything.
    Whole,
}

impl Part {
    fn store(self, header: &Header, storage: &dyn Storage) -> io::Result<()> {
        match self {
            Self::Mapping => header.store_mapping(storage),
            Self::Snapshots => header.store_snapshots(storage),
            Self::Whole => header.store(storage),
        }
    }
}

/// One change, under way.
pub(crate) struct Session<'a> {
    pub(crate) image: &'a Qcow2,
    pub(crate) meta: MutexGuard<'a, Meta>,
    _turn: Turn<'a>,
}

impl Qcow2 {
    /// Starts a change beside which requests may be under way.
    pub(crate) fn session(&self) -> Result<Session<'_>, ChangeError> {
        let turn = self.gate().turn();
        let meta = self.lock();
        meta.writable()?;
        Ok(Session {
            image: self,
            meta,
            _turn: turn,
        })
    }

    /// Starts a change that no request may see half done. Requests that come later wait for its end.
    pub(crate) fn exclusive(&self) -> Result<Session<'_>, ChangeError> {
        let session = self.session()?;
        let shared = &session.meta.shared;
        // Before the pins are looked at: whoever pins after that asks for the lock.
        shared.generation.fetch_add(1, Ordering::SeqCst);
        if shared.epochs.pinned() || !session.meta.in_flight.is_empty() {
            return Err(ChangeError::Busy);
        }
        Ok(session)
    }
}

impl Session<'_> {
    pub(crate) fn storage(&self) -> &dyn Storage {
        self.image.storage()
    }

    /// Brings everything in memory to the disk.
    pub(crate) fn commit(&mut self) -> io::Result<()> {
        self.image.commit_held(&mut self.meta)
    }

    /// Commits if much has changed.
    pub(crate) fn make_room(&mut self) -> io::Result<()> {
        if self.meta.pages.crowded() {
            self.commit()?;
        }
        Ok(())
    }

    /// Allocates clusters in a row for metadata.
    pub(crate) fn allocate(&mut self, count: u64) -> io::Result<Run> {
        let run = loop {
            match self.meta.allocate_exact(count) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.commit()?,
                other => break other?,
            }
        };
        self.meta
            .metadata
            .insert(run.first, run.first.saturating_add(run.count));
        Ok(run)
    }

    /// Writes a table into fresh clusters, which zeros fill up. Not durable before the next commit.
    pub(crate) fn put(&mut self, mut bytes: Vec<u8>) -> io::Result<Run> {
        let geometry = self.meta.geometry;
        let count = geometry.clusters(bytes.len() as u64).max(1);
        let run = self.allocate(count)?;
        let len = count.saturating_mul(geometry.cluster());
        bytes.resize(usize::try_from(len).unwrap_or(bytes.len()), 0);
        let at = run.first.saturating_mul(geometry.cluster());
        match self.storage().write_at(&bytes, at) {
            Ok(()) => Ok(run),
            Err(error) => {
                self.meta.give_back(run);
                Err(error)
            }
        }
    }

    /// The host offset of a run.
    pub(crate) fn offset(&self, run: Run) -> u64 {
        run.first << self.meta.geometry.cluster_bits
    }

    /// Frees the clusters of a range that nothing on disk refers to.
    pub(crate) fn free_range(&mut self, offset: u64, len: u64) {
        if len != 0 {
            let geometry = self.meta.geometry;
            let count = geometry.clusters(geometry.within(offset).saturating_add(len));
            self.meta.give_back(Run {
                first: offset >> geometry.cluster_bits,
                count,
                fresh: false,
            });
        }
    }

    /// Frees what was made for a change that failed. What the header may still refer to stays: a leak.
    pub(crate) fn give_back(&mut self, run: Run) {
        if !self.meta.stale {
            self.meta.give_back(run);
        }
    }

    /// Makes the header this one, durably. When that fails, the old one is put back.
    pub(crate) fn switch(&mut self, mut header: Header, part: Part) -> io::Result<()> {
        // The refcount table may have moved since the header was made.
        header.reftable_offset = self.meta.header.reftable_offset;
        header.reftable_clusters = self.meta.header.reftable_clusters;
        let storage = self.storage();
        let stored = part
            .store(&header, storage)
            .and_then(|()| self.image.sync_tables());
        match stored {
            Ok(()) => {
                self.meta.header = header;
                Ok(())
            }
            Err(error) => {
                let restored = part
                    .store(&self.meta.header, storage)
                    .and_then(|()| self.image.sync_tables());
                if restored.is_err() {
                    self.meta.stale = true;
                    self.meta.soil();
                }
                Err(error)
            }
        }
    }

    /// Marks the image dirty, until [`Session::finish`].
    pub(crate) fn mark(&mut self) -> io::Result<()> {
        if self.meta.geometry.version < 3 || self.meta.marked {
            return Ok(());
        }
        let mut header = self.meta.header.clone();
        header.incompatible |= DIRTY;
        self.meta.marked = true;
        header.store_features(self.storage())?;
        self.image.sync_tables()?;
        self.meta.header = header;
        Ok(())
    }

    /// Leaves the mark of [`Session::mark`] there, so that the next one who opens the image repairs it.
    pub(crate) fn stay_marked(&mut self) {
        self.meta.marked = false;
    }

    /// Brings the image to a state in which nothing is left to do. The change has been made, so a failure is no
    /// failure of it: what is left is tried again when the image is closed.
    pub(crate) fn finish(mut self) {
        if let Err(error) = self.image.settle(&mut self.meta) {
            tracing::warn!(%error, "space of a changed image was not given back yet");
        }
    }
}

impl Qcow2 {
    /// Writes all that is in memory, frees what nobody uses, and takes the mark of [`Session::mark`] away.
    pub(crate) fn settle(&self, meta: &mut Meta) -> io::Result<()> {
        // What the first one takes out of the mapping the second one frees, and the third one writes.
        for _ in 0..3 {
            if !meta.shared.dirty.load(Ordering::Acquire) && !meta.stale {
                break;
            }
            self.commit_held(meta)?;
        }
        if meta.marked && !meta.stale {
            let mut header = meta.header.clone();
            header.incompatible &= !DIRTY;
            header.store_features(self.storage())?;
            self.sync_tables()?;
            meta.header = header;
            meta.marked = false;
        }
        Ok(())
    }
}
