//! A bounded pool of threads that run jobs with plain system calls.
//!
//! Threads are started as work demands, up to the bound, and end with the pool.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use libc::c_int;
use vmm_sys_util::eventfd::EventFd;

use crate::buffers::IoVec;
use crate::engine::job::{Job, Step};
use crate::file::{HostFile, discard_device};

/// The longest read that is tried in the calling thread, in bytes: copying
/// that much costs less than waking a thread.
const MAX_ATTEMPT: u64 = 64 << 10;

/// A pool of threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Readable when `done` has become non-empty. Watched edge-triggered, so
    /// nobody ever reads it; its count cannot reach its limit in practice and a
    /// failed write would mean just that it is readable already.
    doorbell: EventFd,
}

#[derive(Default)]
struct State {
    todo: VecDeque<(Job, Arc<HostFile>)>,
    done: Vec<(Job, io::Result<()>)>,
    idle: usize,
    stopping: bool,
}

impl Pool {
    /// A pool of at most `limit` threads; one is started at once.
    ///
    /// # Errors
    ///
    /// The host's, when it has no thread or descriptor to give.
    pub(crate) fn new(limit: usize) -> io::Result<Self> {
        let mut pool = Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                doorbell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            }),
            threads: Vec::new(),
            limit: limit.max(1),
        };
        pool.grow()?;
        Ok(pool)
    }

    /// Becomes readable, edge by edge, when there is something to [`Pool::harvest`].
    pub(crate) fn doorbell(&self) -> BorrowedFd<'_> {
        self.shared.doorbell()
    }

    /// Runs jobs that have begun.
    pub(crate) fn start(&mut self, jobs: impl IntoIterator<Item = (Job, Arc<HostFile>)>) {
        let mut state = self.shared.lock();
        let before = state.todo.len();
        state.todo.extend(jobs);
        let (fresh, short) = (
            state.todo.len() - before,
            state.todo.len().saturating_sub(state.idle),
        );
        drop(state);
        for _ in 0..fresh {
            self.shared.work.notify_one();
        }
        for _ in 0..short {
            // One thread exists, so the work gets done; more would only be faster.
            if self.threads.len() >= self.limit || self.grow().is_err() {
                break;
            }
        }
    }

    /// Appends what has ended.
    pub(crate) fn harvest(&self, out: &mut Vec<(Job, io::Result<()>)>) {
        out.append(&mut self.shared.lock().done);
    }

    fn grow(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name("block-io".to_owned())
            .spawn(move || shared.serve())?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Pool {
    /// Waits for all jobs.
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // Its panic, if any, has been printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads.len())
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock but the allocator's.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[expect(unsafe_code, reason = "vmm-sys-util's EventFd lends no BorrowedFd")]
    fn doorbell(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.doorbell` lives, which the borrow sees to.
        unsafe { BorrowedFd::borrow_raw(self.doorbell.as_raw_fd()) }
    }

    /// A thread's life.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some((job, file)) = state.todo.pop_front() {
                drop(state);
                let ended = run(job, &file);
                drop(file);
                state = self.lock();
                state.done.push(ended);
                if state.done.len() == 1 {
                    let _ = self.doorbell.write(1);
                }
            } else if state.stopping {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// Runs a job to its end in this thread.
fn run(mut job: Job, file: &HostFile) -> (Job, io::Result<()>) {
    let abilities = file.abilities();
    loop {
        let answer = perform(&job.step(abilities), file.as_fd());
        if let Some(end) = job.advance(answer, abilities) {
            return (job, end);
        }
    }
}

/// Tries a job's step in the calling thread if the page cache may have the
/// answer, so that the host need not wait. `None` when there is (still) a step to do.
pub(crate) fn attempt(job: &mut Job, file: &HostFile) -> Option<io::Result<()>> {
    let abilities = file.abilities();
    if abilities.direct || job.len() > MAX_ATTEMPT {
        return None;
    }
    let Step::Read { offset, pieces } = job.step(abilities) else {
        return None;
    };
    // Whatever an error is, a thread will find out.
    let moved = read(file.as_fd(), offset, pieces, libc::RWF_NOWAIT).ok()?;
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
    u64::try_from(rc).map_err(|_| {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    })
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
                Err(e) => Err(e.raw_os_error().unwrap_or(libc::EIO)),
            };
        }
    };
    moved(rc)
}
