//! The engines: what moves data between memory and files.
//!
//! An engine runs [`Job`]s at (file, host offset) and knows nothing of disks
//! or formats, so that a format's mapping can sit between a disk and an engine.
//! There are two, of one behaviour: [`uring`] and [`threads`]. What a request
//! goes through is decided in [`job`], which both share. Files are storages; those without a
//! descriptor are served by threads in both engines.
//!
//! An engine belongs to one queue. Jobs that it has taken keep their memory
//! alive until they are harvested; dropping an engine waits for them.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::Watch;
use crate::file::Abilities;
use crate::options::Aio;
use crate::storage::Storage;

pub(crate) mod bounce;
pub(crate) mod job;
mod pool;
mod target;
pub(crate) mod threads;
pub(crate) mod uring;

pub(crate) use job::Job;
use target::Target;

/// How many threads serve the files of one queue that block their callers.
const MAX_THREADS: usize = 8;

/// Names a file within an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId(pub usize);

/// What an engine reports.
#[derive(Debug, Default)]
pub(crate) struct Harvest {
    /// Jobs that have ended, and how.
    pub done: Vec<(Job, io::Result<()>)>,
    /// Watched descriptors that became readable.
    pub watches: Vec<Watch>,
    /// The queue's own descriptor became readable.
    pub bell: bool,
}

/// What to report when a descriptor becomes readable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// To the queue's user.
    Watch(Watch),
    /// To the queue itself.
    Bell,
}

impl Harvest {
    pub(crate) fn is_empty(&self) -> bool {
        self.done.is_empty() && self.watches.is_empty() && !self.bell
    }

    /// Notes a notice, once.
    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Bell => self.bell = true,
            Notice::Watch(watch) if self.watches.contains(&watch) => {}
            Notice::Watch(watch) => self.watches.push(watch),
        }
    }
}

/// One of the two engines.
#[derive(Debug)]
pub(crate) enum Engine {
    Uring(Box<uring::Uring>),
    Threads(threads::Threads),
}

impl Engine {
    /// The engine that was asked for, for `depth` jobs at once.
    ///
    /// # Errors
    ///
    /// The host's, when it lacks resources or the very engine that was asked for.
    pub(crate) fn new(aio: Aio, depth: u32) -> io::Result<Self> {
        match aio {
            Aio::Threads => threads::Threads::new(depth).map(Self::Threads),
            Aio::IoUring => uring::Uring::new(depth).map(|e| Self::Uring(Box::new(e))),
            Aio::Auto => match uring::Uring::new(depth) {
                Err(error) if absent(&error) => {
                    tracing::debug!(%error, "no io_uring here, disk I/O uses threads");
                    threads::Threads::new(depth).map(Self::Threads)
                }
                other => other.map(|e| Self::Uring(Box::new(e))),
            },
        }
    }

    /// Makes a file known; its jobs name it by the result.
    pub(crate) fn add_file(&mut self, storage: Arc<dyn Storage>) -> FileId {
        let target = Target::new(storage);
        match self {
            Self::Uring(e) => e.add_file(target),
            Self::Threads(e) => e.add_file(target),
        }
    }

    /// What can be done with a file of this engine.
    pub(crate) fn abilities(&self, file: FileId) -> &Abilities {
        let files = match self {
            Self::Uring(e) => e.files(),
            Self::Threads(e) => e.files(),
        };
        files[file.0].abilities()
    }

    /// Takes a job that has begun, about a file of this engine. At most as many as the engine was
    /// made for.
    pub(crate) fn start(&mut self, job: Job) {
        match self {
            Self::Uring(e) => e.start(job),
            Self::Threads(e) => e.start(job),
        }
    }

    /// Sends what was started to the host.
    pub(crate) fn submit(&mut self) {
        match self {
            Self::Uring(e) => e.submit(),
            Self::Threads(e) => e.submit(),
        }
    }

    /// As [`crate::IoQueue::watch`].
    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, notice: Notice) -> io::Result<()> {
        match self {
            Self::Uring(e) => e.watch(fd, notice),
            Self::Threads(e) => e.watch(fd, notice),
        }
    }

    /// Submits, then waits until there is something in `out` or time is up.
    pub(crate) fn wait(&mut self, until: Until, out: &mut Harvest) -> io::Result<()> {
        match self {
            Self::Uring(e) => e.wait(until, out),
            Self::Threads(e) => e.wait(until, out),
        }
    }
}

/// Whether an error means that io_uring is missing, forbidden or too old.
fn absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
        || matches!(
            error.raw_os_error(),
            Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM | libc::EINVAL)
        )
}

/// How long to wait.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Until {
    /// Do not.
    Now,
    /// No longer than this.
    Deadline(Instant),
    /// As long as it takes.
    Forever,
}

impl Until {
    pub(crate) fn new(timeout: Option<Duration>) -> Self {
        match timeout {
            None => Self::Forever,
            Some(Duration::ZERO) => Self::Now,
            // A time beyond the clock's end is no limit.
            Some(time) => Instant::now()
                .checked_add(time)
                .map_or(Self::Forever, Self::Deadline),
        }
    }

    /// What is left, `None` without limit.
    pub(crate) fn left(self) -> Option<Duration> {
        match self {
            Self::Now => Some(Duration::ZERO),
            Self::Deadline(at) => Some(at.saturating_duration_since(Instant::now())),
            Self::Forever => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_without_io_uring_makes_auto_fall_back() {
        for code in [libc::ENOSYS, libc::EPERM, libc::ENOMEM] {
            assert!(absent(&io::Error::from_raw_os_error(code)));
        }
        assert!(absent(&io::ErrorKind::Unsupported.into()));
        assert!(!absent(&io::Error::from_raw_os_error(libc::EMFILE)));
    }
}
