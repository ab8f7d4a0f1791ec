//! Threads that run jobs with blocking calls: system calls where a file has a descriptor, else
//! those of its [`Storage`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::c_int;

use crate::buffers::IoVec;
use crate::crew::{Crew, Mailbox, Task};
use crate::engine::bounce::{AlignedBuf, BOUNCE_SIZE, Way};
use crate::engine::job::{Job, Step};
use crate::engine::target::Target;
use crate::file::discard_device;
use crate::storage::Storage;

/// The longest read that is tried in the calling thread, in bytes: copying
/// that much costs less than waking a thread.
const MAX_ATTEMPT: u64 = 64 << 10;

/// A job that has ended, and how.
type Ended = (Job, io::Result<()>);

/// A pool of threads.
#[derive(Debug)]
pub(crate) struct Pool {
    crew: Crew<Run>,
    ended: Arc<Mailbox<Ended>>,
}

/// A job to run to its end.
struct Run {
    job: Job,
    target: Target,
    ended: Arc<Mailbox<Ended>>,
}

impl Pool {
    /// A pool of at most `limit` threads; one is started at once.
    ///
    /// # Errors
    ///
    /// The host's, when it has no thread or descriptor to give.
    pub(crate) fn new(limit: usize) -> io::Result<Self> {
        Ok(Self {
            ended: Arc::new(Mailbox::new()?),
            crew: Crew::new("block-io", limit)?,
        })
    }

    /// Becomes readable, edge by edge, when there is something to [`Pool::harvest`].
    pub(crate) fn doorbell(&self) -> BorrowedFd<'_> {
        self.ended.bell()
    }

    /// Runs jobs that have begun.
    pub(crate) fn start(&self, jobs: impl IntoIterator<Item = (Job, Target)>) {
        let run = |(job, target)| Run {
            job,
            target,
            ended: Arc::clone(&self.ended),
        };
        self.crew.start(jobs.into_iter().map(run));
    }

    /// Appends what has ended.
    pub(crate) fn harvest(&self, out: &mut Vec<Ended>) {
        self.ended.take(out);
    }
}

impl Task for Run {
    fn run(mut self) {
        let abilities = self.target.abilities();
        let end = loop {
            let step = self.job.step(abilities);
            let answer = match &self.target {
                Target::Host(file) => perform(&step, file.as_fd()),
                Target::Remote(remote) => call(&step, &*remote.storage).map_err(|e| number(&e)),
            };
            if let Some(end) = self.job.advance(answer, abilities) {
                break end;
            }
        };
        drop(self.target);
        self.ended.put((self.job, end));
    }
}

/// Tries a job's step in the calling thread if the page cache may have the
/// answer, so that the host need not wait. `None` when there is (still) a step to do.
pub(crate) fn attempt(job: &mut Job, target: &Target) -> Option<io::Result<()>> {
    let abilities = target.abilities();
    if abilities.direct || job.len() > MAX_ATTEMPT {
        return None;
    }
    let Step::Read { offset, pieces } = job.step(abilities) else {
        return None;
    };
    // Whatever an error is, a thread will find out.
    let moved = read(target.descriptor()?, offset, pieces, libc::RWF_NOWAIT).ok()?;
    job.advance(Ok(moved), abilities)
}

/// Reads with `preadv2`; the bytes moved or the error number.
#[expect(unsafe_code, reason = "vectored I/O on raw addresses")]
fn read(file: BorrowedFd<'_>, offset: u64, pieces: &[IoVec], flags: c_int) -> Result<u64, c_int> {
    let count = c_int::try_from(pieces.len()).map_err(|_| libc::EINVAL)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| libc::EINVAL)?;
    let vector = pieces.as_ptr().cast();
    // SAFETY: the pieces are laid out as iovec, and their memory is kept valid by
    // the job that they were borrowed from.
    moved(unsafe { libc::preadv2(file.as_raw_fd(), vector, count, offset, flags) })
}

/// What a system call gave back.
fn moved(rc: isize) -> Result<u64, c_int> {
    u64::try_from(rc).map_err(|_| number(&io::Error::last_os_error()))
}

/// The error number; `EIO` for an error that has none.
fn number(error: &io::Error) -> c_int {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Does one step with a plain system call; the bytes moved or the error number.
#[expect(unsafe_code, reason = "vectored I/O on raw addresses")]
fn perform(step: &Step<'_>, file: BorrowedFd<'_>) -> Result<u64, c_int> {
    let fd = file.as_raw_fd();
    // A file's size and offsets are an i64 to the kernel; a disk lies within its file.
    let off = |offset: u64| libc::off_t::try_from(offset).map_err(|_| libc::EINVAL);
    let count = |n: usize| c_int::try_from(n).map_err(|_| libc::EINVAL);
    let rc = match *step {
        Step::Read { offset, pieces } => return read(file, offset, pieces, 0),
        Step::Write {
            offset,
            pieces,
            dsync,
        } => {
            let (n, off) = (count(pieces.len())?, off(offset)?);
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as for `read`.
            unsafe { libc::pwritev2(fd, pieces.as_ptr().cast(), n, off, flags) }
        }
        // SAFETY: takes a descriptor only.
        Step::Sync => unsafe { libc::fdatasync(fd) as isize },
        Step::Allocate { mode, offset, len } => {
            let (offset, len) = (off(offset)?, off(len)?);
            // SAFETY: takes numbers only.
            unsafe { libc::fallocate(fd, mode, offset, len) as isize }
        }
        Step::DiscardDevice { offset, len } => {
            return match discard_device(file, offset, len) {
                Ok(()) => Ok(0),
                Err(e) => Err(number(&e)),
            };
        }
    };
    moved(rc)
}

/// Does one step, or the first part of a long one, by a storage's own calls; the bytes moved.
fn call(step: &Step<'_>, storage: &dyn Storage) -> io::Result<u64> {
    match *step {
        Step::Read { offset, pieces } => {
            let mut buf = buffer(pieces)?;
            storage.read_at(buf.bytes_mut(), offset)?;
            let len = buf.bytes().len();
            buf.exchange(pieces, 0, len, Way::Out);
            Ok(len as u64)
        }
        Step::Write {
            offset,
            pieces,
            dsync,
        } => {
            let mut buf = buffer(pieces)?;
            let len = buf.bytes().len();
            buf.exchange(pieces, 0, len, Way::In);
            storage.write_at(buf.bytes(), offset)?;
            if dsync {
                storage.sync()?;
            }
            Ok(len as u64)
        }
        Step::Sync => storage.sync().map(|()| 0),
        Step::Allocate { offset, len, .. } => storage.zero(offset, len).map(|()| 0),
        Step::DiscardDevice { offset, len } => storage.discard(offset, len).map(|()| 0),
    }
}

/// Memory for these pieces, or for the first of them.
fn buffer(pieces: &[IoVec]) -> io::Result<AlignedBuf> {
    let len = pieces
        .iter()
        .fold(0, |len: usize, p| len.saturating_add(p.len));
    AlignedBuf::new(len.min(BOUNCE_SIZE))
}
