//! The engine of plain system calls: a pool of threads and one epoll.
//!
//! Short reads that the page cache can answer are done at once by the worker
//! itself; all that may have to wait goes to a thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::engine::pool::{Pool, attempt};
use crate::engine::target::Target;
use crate::engine::{FileId, Harvest, Job, MAX_THREADS, Notice, Until};

/// Epoll's mark for the pool's doorbell; watches are marked by their index.
const DOORBELL: u64 = u64::MAX;

/// The most events taken from epoll at a time.
const EVENTS: usize = 16;

/// The engine.
#[derive(Debug)]
pub(crate) struct Threads {
    pool: Pool,
    files: Vec<Target>,
    started: Vec<(Job, Target)>,
    /// Ended without a thread.
    ended: Vec<(Job, io::Result<()>)>,
    watches: Vec<(OwnedFd, Notice)>,
    epoll: Epoll,
}

impl Threads {
    /// An engine for `depth` jobs at once.
    pub(crate) fn new(depth: u32) -> io::Result<Self> {
        let limit = usize::try_from(depth).unwrap_or(MAX_THREADS);
        let engine = Self {
            pool: Pool::new(limit.min(MAX_THREADS))?,
            files: Vec::new(),
            started: Vec::new(),
            ended: Vec::new(),
            watches: Vec::new(),
            epoll: Epoll::new()?,
        };
        engine.poll(engine.pool.doorbell().as_raw_fd(), DOORBELL)?;
        Ok(engine)
    }

    pub(crate) fn add_file(&mut self, file: Target) -> FileId {
        self.files.push(file);
        FileId(self.files.len() - 1)
    }

    pub(crate) fn files(&self) -> &[Target] {
        &self.files
    }

    pub(crate) fn start(&mut self, mut job: Job) {
        let file = &self.files[job.file.0];
        match attempt(&mut job, file) {
            Some(end) => self.ended.push((job, end)),
            None => self.started.push((job, file.clone())),
        }
    }

    pub(crate) fn submit(&mut self) {
        if !self.started.is_empty() {
            self.pool.start(self.started.drain(..));
        }
    }

    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, notice: Notice) -> io::Result<()> {
        let fd = fd.try_clone_to_owned()?;
        self.poll(fd.as_raw_fd(), self.watches.len() as u64)?;
        self.watches.push((fd, notice));
        Ok(())
    }

    pub(crate) fn wait(&mut self, until: Until, out: &mut Harvest) -> io::Result<()> {
        self.submit();
        loop {
            out.done.append(&mut self.ended);
            self.pool.harvest(&mut out.done);
            let left = if out.is_empty() {
                until.left()
            } else {
                Some(Duration::ZERO)
            };
            let mut events = [EpollEvent::default(); EVENTS];
            let count = match self.epoll.wait(milliseconds(left), &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => return Err(e),
            };
            for event in events.iter().take(count) {
                let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
                if let Some((_, notice)) = self.watches.get(index) {
                    out.notice(*notice);
                }
            }
            self.pool.harvest(&mut out.done);
            if !out.is_empty() || left == Some(Duration::ZERO) {
                return Ok(());
            }
        }
    }

    fn poll(&self, fd: RawFd, mark: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, mark);
        self.epoll.ctl(ControlOperation::Add, fd, event)
    }
}

/// Epoll's unit, rounded up so that a short time is no busy loop; -1 is no limit.
pub(crate) fn milliseconds(time: Option<Duration>) -> i32 {
    time.map_or(-1, |time| {
        i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    })
}
