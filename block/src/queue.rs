//! The queue of a raw disk: checks requests and hands them to an engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::buffers::Buffers;
use crate::disk::{Completed, IoQueue, Op, Request, Token, Watch};
use crate::engine::bounce::BouncePool;
use crate::engine::{Engine, FileId, Harvest, Job, Until};
use crate::file::{HostFile, Kind};

/// What the queue must know of the disk's options.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Refuse changes.
    pub read_only: bool,
    /// A write is durable when it completes.
    pub durable: bool,
    /// A flush does nothing.
    pub ignore_flush: bool,
    /// A discard frees space.
    pub unmap: bool,
}

/// The queue of a raw disk.
#[derive(Debug)]
pub(crate) struct RawQueue {
    file: Arc<HostFile>,
    id: FileId,
    policy: Policy,
    engine: Engine,
    depth: usize,
    /// Jobs that the engine has.
    running: usize,
    /// Begun, but beyond the depth or without a bounce buffer so far. First come, first served.
    waiting: VecDeque<Job>,
    bounces: BouncePool,
    /// Ended without the host's help.
    ready: Vec<Completed>,
    harvest: Harvest,
}

impl RawQueue {
    pub(crate) fn new(
        file: Arc<HostFile>,
        policy: Policy,
        mut engine: Engine,
        depth: usize,
    ) -> Self {
        Self {
            id: engine.add_file(Arc::clone(&file)),
            file,
            policy,
            engine,
            depth,
            running: 0,
            waiting: VecDeque::new(),
            bounces: BouncePool::default(),
            ready: Vec::new(),
            harvest: Harvest::default(),
        }
    }

    /// The range that a request touches on the host, or why it may not. `None`
    /// when nothing is to be done.
    fn check(&self, request: &Request) -> io::Result<Option<(Op, u64)>> {
        let len = match request.op {
            Op::Read | Op::Write => request.buffers.len(),
            Op::Flush if self.policy.read_only || self.policy.ignore_flush => return Ok(None),
            Op::Flush => return Ok(Some((Op::Flush, 0))),
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        if request.op != Op::Read && self.policy.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let offset = request.offset;
        let end = offset.checked_add(len);
        let unit = u64::from(self.file.abilities().align.offset);
        if end.is_none_or(|end| end > self.file.size()) || !(offset | len).is_multiple_of(unit) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (op, offset) = match request.op {
            Op::Discard { .. } if !self.policy.unmap => return Ok(None),
            Op::Discard { len } => {
                let (offset, len) = self.whole_sectors(offset, len);
                (Op::Discard { len }, offset)
            }
            Op::WriteZeroes { len, may_unmap } => {
                let may_unmap = may_unmap && self.policy.unmap;
                (Op::WriteZeroes { len, may_unmap }, offset)
            }
            op => (op, offset),
        };
        Ok(Some((op, offset)))
    }

    /// The sectors within a range that a device can discard; all of it on a file.
    fn whole_sectors(&self, offset: u64, len: u64) -> (u64, u64) {
        if self.file.abilities().kind == Kind::Regular {
            return (offset, len);
        }
        let unit = u64::from(self.file.logical_block());
        let end = offset.saturating_add(len);
        let first = offset.div_ceil(unit).saturating_mul(unit);
        let last = end - end % unit;
        (first, last.saturating_sub(first))
    }

    fn end(&mut self, token: Token, result: io::Result<()>) {
        self.ready.push(Completed::Request {
            token,
            result,
            bytes: 0,
        });
    }

    /// Starts what waits, as far as depth and bounce buffers go.
    fn start_waiting(&mut self) {
        while self.running < self.depth
            && let Some(job) = self.waiting.pop_front()
        {
            if let Some(job) = self.admit(job) {
                self.waiting.push_front(job);
                return;
            }
        }
    }

    /// Starts or ends a job; gives it back when it must wait for a bounce buffer.
    fn admit(&mut self, mut job: Job) -> Option<Job> {
        let abilities = self.file.abilities();
        if job.needs_bounce(abilities) {
            match self.bounces.take() {
                Ok(Some(buf)) => job.lend(buf),
                Ok(None) => return Some(job),
                Err(error) => {
                    self.end(job.token, Err(error));
                    return None;
                }
            }
        }
        match job.begin(abilities) {
            Some(result) => self.end(job.token, result),
            None => {
                self.running += 1;
                self.engine.start(job);
            }
        }
        None
    }

    /// Passes on what the engine has reported.
    fn deliver(&mut self, out: &mut Vec<Completed>) {
        for (mut job, result) in self.harvest.done.drain(..) {
            self.running = self.running.saturating_sub(1);
            if let Some(buf) = job.take_bounce() {
                self.bounces.give(buf);
            }
            out.push(Completed::Request {
                token: job.token,
                result,
                bytes: job.bytes(),
            });
        }
        out.extend(self.harvest.watches.drain(..).map(Completed::Watch));
    }
}

impl IoQueue for RawQueue {
    fn push(&mut self, request: Request) {
        let (op, offset) = match self.check(&request) {
            Ok(Some(work)) => work,
            Ok(None) => return self.end(request.token, Ok(())),
            Err(error) => return self.end(request.token, Err(error)),
        };
        let buffers = match op {
            Op::Read | Op::Write => request.buffers,
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => Buffers::none(),
        };
        let durable = self.policy.durable;
        let job = Job::new(request.token, self.id, op, offset, buffers, durable);
        if self.running < self.depth && self.waiting.is_empty() {
            if let Some(job) = self.admit(job) {
                self.waiting.push_back(job);
            }
        } else {
            self.waiting.push_back(job);
        }
    }

    fn submit(&mut self) {
        self.engine.submit();
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.engine.watch(fd, watch)
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let until = if self.ready.is_empty() {
            Until::new(timeout)
        } else {
            Until::Now
        };
        out.append(&mut self.ready);
        self.engine.wait(until, &mut self.harvest)?;
        self.deliver(out);
        if !self.waiting.is_empty() {
            self.start_waiting();
            self.engine.submit();
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.running + self.waiting.len() + self.ready.len()
    }
}

#[cfg(test)]
mod tests;
