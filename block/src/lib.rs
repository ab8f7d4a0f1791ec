//! Disks: where bytes live (raw files, block devices, later qcow2 and NBD),
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
//!
//! # Promises
//!
//! A completed [`Op::Flush`] means that every write that had completed before
//! the flush was submitted, on any queue of the disk, is on stable storage
//! (except under `cache=unsafe`, which says so). A request that cannot be
//! served completes with an [`std::io::Error`]; nothing here panics on what a
//! file, a device or a guest holds.

mod disk;
mod opener;

pub use disk::{
    Buffers, Completed, Disk, DiskInfo, IoQueue, IoVec, Op, QueueError, Request, Token, Watch,
};
pub use opener::{Access, Opener};
