//! The interface between a disk and whoever does I/O on it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::buffers::Buffers;
use crate::events::Observer;
use crate::live::Live;
use crate::size::Size;

/// How a request touches the disk. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Disk to buffers. Past the end of the disk is `InvalidInput`.
    Read,
    /// Buffers to disk.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// The range's contents are no longer needed; it may read as anything
    /// old or as zeros. Never an error merely because it is unsupported.
    Discard {
        /// Length in bytes.
        len: u64,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// Length in bytes.
        len: u64,
        /// The range may be deallocated.
        may_unmap: bool,
    },
}

/// The submitter's own mark on a request, given back with its completion.
pub type Token = u64;

/// One request. `offset` plus the length must lie within the disk.
pub struct Request {
    /// Comes back in [`Completed::Request`].
    pub token: Token,
    /// What to do.
    pub op: Op,
    /// Byte offset on the disk; 0 for a flush.
    pub offset: u64,
    /// Where the data is; empty for flush, discard and write-zeroes.
    pub buffers: Buffers,
}

/// What [`IoQueue::wait`] reports.
#[derive(Debug)]
pub enum Completed {
    /// A request has ended.
    Request {
        /// Its token.
        token: Token,
        /// Success, or why not. A short transfer is an error.
        result: io::Result<()>,
        /// How many bytes were read or written before the end; 0 for a
        /// flush, a discard and write-zeroes. The buffers' owner has been
        /// released.
        bytes: u64,
    },
    /// A watched descriptor has become readable.
    Watch(Watch),
}

/// Names a descriptor that is watched through an [`IoQueue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(pub u32);

/// Facts about an opened disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// The size the guest sees, in bytes.
    pub size: u64,
    /// The unit below which a write is not atomic or not possible, in bytes;
    /// a power of two, at least 512. What a guest should see as its logical block size.
    pub logical_block: u32,
    /// The unit above which I/O is efficient, in bytes; a power of two.
    pub physical_block: u32,
    /// Writes, discards and zeroes are refused with `EROFS`.
    pub read_only: bool,
    /// [`Op::Discard`] frees space.
    pub discard: bool,
}

/// Why a queue could not be had.
#[derive(Debug, thiserror::Error)]
#[error("no I/O queue of depth {depth} for this disk: {source}")]
pub struct QueueError {
    /// The depth that was asked for.
    pub depth: u32,
    /// The host's reason.
    #[source]
    pub source: io::Error,
}

/// Why a disk's size could not be changed; within an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It would lose bytes.
    #[error(
        "a disk of {} that is in use cannot shrink to {}; shrink it while it is not",
        Size(*from), Size(*to)
    )]
    Shrink {
        /// Its size in bytes.
        from: u64,
        /// What was asked for.
        to: u64,
    },
    /// Not in the disk's units.
    #[error("a size of {} is not a multiple of {unit} bytes", Size(*size))]
    Unit {
        /// What was asked for, in bytes.
        size: u64,
        /// What it should be a multiple of, in bytes.
        unit: u64,
    },
    /// A device has the size that it has.
    #[error("the device has {}, fewer than {}; make the device larger first", Size(*held), Size(*size))]
    Device {
        /// What was asked for, in bytes.
        size: u64,
        /// The device's size in bytes.
        held: u64,
    },
    /// It is not written to.
    #[error(
        "the disk is read-only; add it without readonly=on, or enlarge it with 'vireo image resize' while nobody uses it"
    )]
    ReadOnly,
    /// There is no way to.
    #[error("a disk of this kind cannot change its size while it is in use")]
    Fixed,
}

impl From<ResizeError> for io::Error {
    fn from(error: ResizeError) -> Self {
        let kind = match error {
            ResizeError::Fixed => io::ErrorKind::Unsupported,
            ResizeError::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            _ => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

/// An opened and locked disk image.
pub trait Disk: Send + Sync {
    /// The facts of the disk as it is now.
    fn info(&self) -> DiskInfo;

    /// Makes a queue for a worker to own, which has up to `depth` requests
    /// at the host at once (at least 1; more than 1024 count as 1024).
    /// Requests beyond that wait in the queue.
    ///
    /// # Errors
    ///
    /// [`QueueError`] when the host lacks resources.
    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError>;

    /// Makes the disk `size` bytes long while it is in use; new bytes are zeros. All queues, and
    /// [`Disk::info`], know of it when this returns. A block device is not changed: its size is read again, and
    /// must be `size` at least.
    ///
    /// # Errors
    ///
    /// The host's, or a [`ResizeError`] as the inner error.
    fn resize(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(ResizeError::Fixed.into())
    }

    /// One past the highest byte of the image file that was ever allocated; `None` where nothing is
    /// allocated as the disk is written.
    fn high_water(&self) -> Option<u64> {
        None
    }

    /// Has `observer` told of all further events, for as long as the disk or a queue of it lives. A disk that
    /// has no image file here has no events.
    fn observe(&self, observer: Arc<dyn Observer>) {
        let _ = observer;
    }

    /// Sets a byte offset of the image file. The first write past it is
    /// told as [`crate::DiskEvent::WriteThreshold`], once; it may be set again then. `None` takes it away.
    fn set_write_threshold(&self, threshold: Option<u64>) {
        let _ = threshold;
    }

    /// The disk without what notes or holds up its changes for a job, if there is such; a job that could not put it back has left that.
    fn plain(&self) -> Option<Arc<dyn Disk>> {
        None
    }

    /// The image behind the disk, for changes of its chain; `None` where there are none to be made.
    fn live(&self) -> Option<Live> {
        None
    }
}

/// A worker's path to a disk, and its place to wait.
///
/// Used by one thread at a time; it may be handed from one thread to another.
/// Dropping a queue waits for what is at the host; what was pushed and not
/// yet sent there may or may not be done.
pub trait IoQueue: Send {
    /// Takes a request. It may be held until [`IoQueue::submit`] or [`IoQueue::wait`].
    /// Every request yields exactly one completion, whatever happens.
    fn push(&mut self, request: Request);

    /// Sends what has been pushed to the host without waiting. Completions
    /// that are already there may be taken with a `wait` of zero.
    fn submit(&mut self);

    /// Starts to watch `fd` (an eventfd or another pollable descriptor): every time it becomes readable,
    /// [`Completed::Watch`] is reported once. The descriptor is not read: it is the caller who
    /// empties it, before looking at what it announces. The queue keeps its own
    /// duplicate, and watches until it is dropped.
    ///
    /// # Errors
    ///
    /// The host's, when it cannot be watched.
    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()>;

    /// Submits what is pending, then waits until something has completed or
    /// `timeout` has passed (`None`: no limit; zero: just look), and appends
    /// all completions to `out`, in no particular order.
    ///
    /// # Errors
    ///
    /// Only when the engine itself is broken; the worker should then end.
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()>;

    /// How many requests have been pushed and not been reported.
    fn in_flight(&self) -> usize;
}
