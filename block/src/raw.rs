//! Raw disks: a regular file or a block device whose bytes are the disk's.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::admit::Policy;
use crate::disk::{Disk, DiskInfo, IoQueue, QueueError, ResizeError};
use crate::events::{Events, Observer};
use crate::file::{self, HostFile, Kind};
use crate::jobs::JobQueue;
use crate::lease::Keep;
use crate::live::Live;
use crate::lock::{self, Intent, LockError};
use crate::magic;
use crate::opener::{Access, Opener};
use crate::options::{Aio, DiskOptions};
use crate::queue::RawQueue;

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// Why a disk could not be opened. Each message names the file, and where there is one the mend.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("disk {}: no such file; create it first, for example with 'vireo image create -f qcow2 {} 10G', and say format=qcow2", path.display(), path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It is something that cannot hold a disk.
    #[error("disk {}: it is {kind}; give a regular file or a block device", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// It may be read and not written.
    #[error("disk {}: it cannot be opened for writing; make it writable or say readonly=on", path.display())]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It may not be opened.
    #[error("disk {}: it cannot be opened", path.display())]
    Unopenable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// `O_DIRECT` is refused.
    #[error(
        "disk {}: its file system does not support direct I/O; say direct=off or cache=writeback",
        path.display()
    )]
    NoDirectIo {
        /// The file.
        path: PathBuf,
    },
    /// Its facts cannot be had.
    #[error("disk {}: its size and type cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It has no bytes.
    #[error("disk {}: it is empty; give it a size, for example with 'truncate -s 10G'", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Its size is no number of sectors.
    #[error(
        "disk {}: its size of {size} bytes is not a multiple of {unit}; \
         'truncate -s %{unit}' rounds it up, or say readonly=on",
        path.display()
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What it should be a multiple of, in bytes.
        unit: u64,
    },
    /// Its size is no number of the blocks that direct I/O demands.
    #[error(
        "disk {}: its size of {size} bytes is not a multiple of {unit}, which direct I/O \
         demands here; say direct=off or cache=writeback",
        path.display()
    )]
    OddDirectSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// What it should be a multiple of, in bytes.
        unit: u64,
    },
    /// It looks like another format and was not stated to be raw.
    #[error(
        "disk {}: it looks like a {format} image and no format was given; \
         say {}format=raw if its bytes really are the disk's",
        path.display(), magic::stated(format)
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The format it looks like.
        format: &'static str,
    },
    /// Its backing file looks like another format than raw, and it does not say which one it is.
    #[error(
        "disk {}: it does not say what format its backing file {} has, which looks like an image; say it with \
         'vireo image rebase -u -F FORMAT -b NAME'",
        path.display(), other.display()
    )]
    Unstated {
        /// The file.
        path: PathBuf,
        /// Its backing file.
        other: PathBuf,
    },
    /// Someone else uses it.
    #[error(
        "disk {}: it is in use by another program, or here already; its locks do not tell by whom, 'fuser -v {}' may; \
         {mend}",
        path.display(), path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// What to do about it.
        mend: &'static str,
    },
    /// Its contents are not a usable image of the stated format.
    #[error("disk {}: it is no usable {format} image", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// The stated format.
        format: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It is marked as corrupt.
    #[error(
        "disk {}: it is marked as corrupt; repair it with 'vireo image check -r all', or open it read-only",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
    },
    /// What lies on it was being merged into it, and does not lie on it here.
    #[error(
        "disk {}: {top} was being merged into it, and that has not ended: by itself it holds a mixture of two times; have the merge end \
         first: 'vireo disk commit', or 'vireo image commit -b {} {top}'; an image that has been renamed needs that name for it",
        path.display(), path.display()
    )]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// The name of the topmost image that was being merged.
        top: String,
    },
    /// It refers to a file that the policy does not allow.
    #[error(
        "disk {}: it refers to {}, which is not allowed; {mend}",
        path.display(), other.display()
    )]
    Forbidden {
        /// The file.
        path: PathBuf,
        /// What it refers to.
        other: PathBuf,
        /// What to do about it.
        mend: &'static str,
    },
    /// It refers to itself, or to too many others.
    #[error("disk {}: its backing chain is a loop or deeper than {depth}", path.display())]
    EndlessChain {
        /// The file.
        path: PathBuf,
        /// How deep a chain may be.
        depth: usize,
    },
    /// Something that it refers to cannot be opened.
    #[error("disk {}: its {role} cannot be opened", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// What it is to the image: "backing file" or "data file".
        role: &'static str,
        /// Why not.
        #[source]
        source: Box<OpenError>,
    },
    /// Its clusters are smaller than what direct I/O demands.
    #[error(
        "disk {}: its clusters of {cluster} bytes are smaller than the {unit} bytes that direct I/O \
         demands here; say direct=off or cache=writeback",
        path.display()
    )]
    SmallClusters {
        /// The file.
        path: PathBuf,
        /// The cluster size in bytes.
        cluster: u64,
        /// The unit of direct I/O in bytes.
        unit: u64,
    },
    /// It is on an NBD server and cannot be had there.
    #[error(transparent)]
    Nbd(#[from] crate::nbd::NbdError),
    /// No lease was given on it.
    #[error("disk {}: no lease on it", path.display())]
    NoLease {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be locked.
    #[error("disk {}: its file system cannot lock it; say lock=off if nobody else uses it", path.display())]
    NoLocks {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// An opened and locked raw disk. The lock lasts until it and all its queues are dropped.
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<HostFile>,
    policy: Policy,
    events: Arc<Events>,
    aio: Aio,
}

impl RawDisk {
    /// Opens and locks the file or block device at `path`. A file that is no whole number of
    /// sectors can be opened read-only: zeros make its last sector whole.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing is left open or locked then.
    pub fn open(
        path: &Path,
        opener: &dyn Opener,
        options: &DiskOptions,
    ) -> Result<Self, OpenError> {
        let file = open_file(path, opener, options.access(), options.keep())?;
        let path = Named(path);
        path.check(&file, options.format.is_some())?;
        Ok(Self::of(Arc::new(file), options))
    }

    /// The disk of an opened and locked file.
    pub(crate) fn of(file: Arc<HostFile>, options: &DiskOptions) -> Self {
        Self {
            file,
            policy: Policy::new(options),
            events: Arc::default(),
            aio: options.aio,
        }
    }

    /// The opened file.
    pub(crate) fn file(&self) -> Arc<HostFile> {
        Arc::clone(&self.file)
    }

    /// As if a flush had failed.
    #[cfg(test)]
    pub(crate) fn lose_data(&self) {
        let lost = &self.file.abilities().lost;
        lost.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Opens and locks a file or block device, whatever is in it. It unlocks itself.
pub(crate) fn open_file<'a>(
    path: &Path,
    opener: &dyn Opener,
    access: Access,
    keep: impl Into<Keep<'a>>,
) -> Result<HostFile, OpenError> {
    let (path, keep) = (Named(path), keep.into());
    let lease = keep
        .lease(path.0, opener, access.write)
        .map_err(|source| OpenError::NoLease {
            path: path.path(),
            source,
        })?;
    let file = opener
        .open(path.0, access)
        .map_err(|source| path.unopened(source, access.write, access.direct))?;
    let kind = match file::kind(&file).map_err(|source| path.unreadable(source))? {
        Ok(kind) => kind,
        Err(kind) => return Err(path.not_a_disk(kind)),
    };
    file::make_blocking(&file).map_err(|source| path.unreadable(source))?;
    if keep.lock {
        path.lock(&file, !access.write)?;
    }
    let mut file =
        HostFile::new(file, kind, access.direct).map_err(|source| path.unreadable(source))?;
    file.named(path.0);
    file.hold(lease);
    if keep.lock {
        file.locked(if access.write {
            Intent::Write
        } else {
            Intent::Read
        });
    }
    if !access.write && kind == Kind::Regular {
        // An ISO image, say. As QEMU does, so that the last bytes can be read.
        file.pad_to(SECTOR.max(file.abilities().align.offset.into()));
    }
    Ok(file)
}

/// Judges the contents alone of a file whose bytes are to be a disk's. `stated`: somebody said that it is raw.
pub(crate) fn check_contents(path: &Path, file: &HostFile, stated: bool) -> Result<(), OpenError> {
    Named(path).check_contents(file, stated)
}

/// Judges contents and size of a file whose bytes are to be a disk's. `stated`: somebody said that it is raw.
pub(crate) fn check_raw(path: &Path, file: &HostFile, stated: bool) -> Result<(), OpenError> {
    Named(path).check(file, stated)
}

impl Disk for RawDisk {
    fn info(&self) -> DiskInfo {
        DiskInfo {
            size: self.file.size(),
            logical_block: self.file.logical_block(),
            physical_block: self.file.physical_block(),
            read_only: self.policy.read_only,
            discard: self.policy.unmap && !self.policy.read_only,
        }
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        let jobs = JobQueue::new(self.aio, depth)?;
        let (file, events) = (Arc::clone(&self.file), Arc::clone(&self.events));
        Ok(Box::new(RawQueue::new(file, self.policy, events, jobs)))
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        if self.policy.read_only {
            return Err(ResizeError::ReadOnly.into());
        }
        let unit = SECTOR.max(self.file.abilities().align.offset.into());
        if !size.is_multiple_of(unit) {
            return Err(ResizeError::Unit { size, unit }.into());
        }
        // First: whoever sees the new size may write there.
        self.file.tracks().resize(self.file.size().max(size));
        let grown = self.file.grow(size);
        self.file.tracks().resize(self.file.size());
        grown
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.events.observe(observer);
    }

    fn set_write_threshold(&self, threshold: Option<u64>) {
        self.events.set_threshold(threshold);
    }

    fn live(&self) -> Option<Live> {
        Some(Live::raw(self.file()))
    }
}

/// A path that turns what went wrong with it into errors that name it.
#[derive(Clone, Copy)]
struct Named<'a>(&'a Path);

impl Named<'_> {
    fn path(self) -> PathBuf {
        self.0.to_owned()
    }

    fn not_a_disk(self, kind: &'static str) -> OpenError {
        OpenError::NotADisk {
            path: self.path(),
            kind,
        }
    }

    fn unreadable(self, source: io::Error) -> OpenError {
        OpenError::Unreadable {
            path: self.path(),
            source,
        }
    }

    fn unopened(self, source: io::Error, write: bool, direct: bool) -> OpenError {
        let path = self.path();
        match source.raw_os_error() {
            Some(libc::ENOENT) => OpenError::Missing { path },
            Some(libc::EISDIR) => self.not_a_disk("a directory"),
            Some(libc::ENXIO) => self.not_a_disk("a socket, a pipe or a device without a driver"),
            Some(libc::EINVAL) if direct => OpenError::NoDirectIo { path },
            Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::ETXTBSY) if write => {
                OpenError::NotWritable { path, source }
            }
            _ => OpenError::Unopenable { path, source },
        }
    }

    fn lock(self, file: &File, read_only: bool) -> Result<(), OpenError> {
        let intent = if read_only {
            Intent::Read
        } else {
            Intent::Write
        };
        lock::acquire(file, intent).map_err(|error| match error {
            LockError::Held { .. } => OpenError::InUse {
                path: self.path(),
                mend: if read_only {
                    "readers can share it only while nobody writes to it"
                } else {
                    "close it there, or say readonly=on in all places"
                },
            },
            LockError::Unsupported { source, .. } => OpenError::NoLocks {
                path: self.path(),
                source,
            },
        })
    }

    fn check_contents(self, file: &HostFile, stated: bool) -> Result<(), OpenError> {
        if stated {
            return Ok(());
        }
        let head = file
            .head(magic::HEAD)
            .map_err(|source| self.unreadable(source))?;
        match magic::foreign(&head) {
            Some(format) => Err(OpenError::Foreign {
                path: self.path(),
                format,
            }),
            None => Ok(()),
        }
    }

    /// Judges the contents and the size.
    fn check(self, file: &HostFile, stated: bool) -> Result<(), OpenError> {
        let (path, size) = (self.path(), file.size());
        if size == 0 {
            return Err(OpenError::Empty { path });
        }
        self.check_contents(file, stated)?;
        let direct = u64::from(file.abilities().align.offset);
        if !size.is_multiple_of(SECTOR) {
            let unit = SECTOR;
            Err(OpenError::OddSize { path, size, unit })
        } else if !size.is_multiple_of(direct) {
            let unit = direct;
            Err(OpenError::OddDirectSize { path, size, unit })
        } else {
            Ok(())
        }
    }
}

mod image;
#[cfg(test)]
mod tests;

pub use image::RawImage;
