//! Disks: where bytes live (raw and qcow2 images, block devices, NBD),
//! the engines that move them, and the locks that keep others out.
//!
//! This crate knows no virtio and no guest memory. It receives buffers as
//! [`Buffers`]: addresses of host memory plus an owner that keeps the mapping
//! alive until the request completes.
//!
//! # Structure
//!
//! * A [`Disk`] is an opened, locked image. Any thread may ask it for an
//!   [`IoQueue`].
//! * An [`IoQueue`] belongs to one worker thread. Requests go in with a token,
//!   completions come out with it. It is also the thread's one place to
//!   wait: other file descriptors (doorbells) are watched through it, so that
//!   a worker blocks in a single system call.
//! * Files are opened through the caller's [`Opener`] only.
//! * [`open_disk`] opens any disk: one whose bytes are a file's or a block device's ([`RawDisk`]) or an
//!   NBD server's ([`NbdDisk`]), or a qcow2 image with its chain.
//! * Below it, an engine (io_uring or threads) runs jobs at (file, offset).
//!   It knows no formats, so a format's mapping goes between disk and engine.
//!
//! # Promises
//!
//! A completed [`Op::Flush`] means that every write that had completed before
//! the flush was submitted, on any queue of the disk, is on stable storage
//! (except under `cache=unsafe`, which says so). A request that cannot be
//! served completes with an [`std::io::Error`]; nothing here panics on what a
//! file, a device or a guest holds.

mod admit;
mod awaited;
mod buffers;
mod crew;
mod disk;
mod engine;
mod events;
mod file;
mod image;
mod jobs;
mod lease;
mod live;
mod lock;
mod look;
mod magic;
pub mod nbd;
mod open;
mod opener;
pub mod ops;
mod options;
mod qcow2;
mod queue;
mod queued;
mod raw;
mod size;
mod storage;
#[cfg(test)]
mod testing;
mod track;
mod unfinished;

pub use awaited::Awaited;
pub use buffers::{Buffers, INLINE, IoVec};
pub use disk::{
    Completed, Disk, DiskInfo, IoQueue, Op, QueueError, Request, ResizeError, Token, Watch,
};
pub use events::{DiskEvent, Observer};
pub use image::{Extent, Image, Kept};
pub use lease::Lease;
pub use live::{
    Absorb, Attached, Away, AwayError, Back, Backup, BackupError, BackupRequest, Base, Covered,
    Cut, Emptied, Landing, LandingError, Live, Merge, MergeError, Merged, Mirror, MirrorError,
    MirrorTarget, Overlay, OverlayError, PIECE, Piece, Revert, RevertError, Stream, StreamError,
    Transfer, Unlike, revert,
};
pub use lock::lock_output;
pub use look::{LookedAt, SeenLocks, look_at_disk};
pub use nbd::NbdDisk;
pub use open::{BackingPolicy, ImageOptions, open_disk, open_image};
pub use opener::{Access, Address, Connector, Listening, Opener};
pub use options::{Aio, Cache, DetectZeroes, Discard, DiskOptions, Format};
pub use qcow2::{
    ChangeError, CheckReport, Compression, CreateError, CreateOptions, Finding, NewSnapshot,
    Preallocation, Qcow2, Repair, Severity,
};
pub use queued::open_queued;
pub use raw::{OpenError, RawDisk, RawImage};
pub use size::Size;
pub use track::{LiveBitmap, LiveBitmapChange};
pub use unfinished::unfinished_in;
