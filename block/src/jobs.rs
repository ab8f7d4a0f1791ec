//! The queue below every disk's queue: jobs on host files in, their ends out.
//!
//! A [`JobQueue`] owns an engine. It holds jobs back that exceed its depth and lends bounce
//! buffers to those whose memory the file does not accept. What a job means is its submitter's
//! business: each carries a tag and a note, which come back with its [`End`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::disk::{Completed, QueueError, Watch};
use crate::engine::bounce::BouncePool;
use crate::engine::{Engine, FileId, Harvest, Job, Notice, Until};
use crate::file::Abilities;
use crate::options::Aio;
use crate::storage::Storage;

/// The most jobs that a queue has at the host at once.
const MAX_DEPTH: u32 = 1024;

/// How a job has ended.
#[derive(Debug)]
pub(crate) struct End {
    /// The job's tag.
    pub tag: u64,
    /// The job's note.
    pub note: u64,
    /// Success, or why not.
    pub result: io::Result<()>,
    /// How many bytes were read or written. The buffers' owner has been released.
    pub bytes: u64,
}

impl From<End> for Completed {
    /// The end of a job whose tag is its request's token.
    fn from(end: End) -> Self {
        Self::Request {
            token: end.tag,
            result: end.result,
            bytes: end.bytes,
        }
    }
}

/// A queue of jobs.
#[derive(Debug)]
pub(crate) struct JobQueue {
    engine: Engine,
    depth: usize,
    /// Jobs that the engine has.
    running: usize,
    /// Pushed, but beyond the depth or without a bounce buffer so far. First come, first served.
    waiting: VecDeque<Job>,
    bounces: BouncePool,
    /// Ended without the host's help.
    ready: Vec<End>,
    harvest: Harvest,
}

impl JobQueue {
    /// A queue that has up to `depth` jobs at the host at once, at least 1 and at most [`MAX_DEPTH`].
    ///
    /// # Errors
    ///
    /// [`QueueError`] when the host lacks resources, or the very engine that was asked for.
    pub(crate) fn new(aio: Aio, depth: u32) -> Result<Self, QueueError> {
        let host_depth = depth.clamp(1, MAX_DEPTH);
        let engine = Engine::new(aio, host_depth).map_err(|source| QueueError { depth, source })?;
        Ok(Self {
            engine,
            depth: usize::try_from(host_depth).unwrap_or(1),
            running: 0,
            waiting: VecDeque::new(),
            bounces: BouncePool::default(),
            ready: Vec::new(),
            harvest: Harvest::default(),
        })
    }

    /// Makes a file known; jobs name it by the result. Files are numbered from 0 in the order of these calls.
    pub(crate) fn add_file(&mut self, storage: Arc<dyn Storage>) -> FileId {
        self.engine.add_file(storage)
    }

    /// What can be done with a file.
    pub(crate) fn abilities(&self, file: FileId) -> &Abilities {
        self.engine.abilities(file)
    }

    /// Takes a job on one of the files. Its end is reported once by [`JobQueue::wait`].
    pub(crate) fn push(&mut self, job: Job) {
        if self.running < self.depth && self.waiting.is_empty() {
            if let Some(job) = self.admit(job) {
                self.waiting.push_back(job);
            }
        } else {
            self.waiting.push_back(job);
        }
    }

    /// Reports an end that needed no job, at the next [`JobQueue::wait`].
    pub(crate) fn end(&mut self, end: End) {
        self.ready.push(end);
    }

    /// As [`crate::IoQueue::submit`].
    pub(crate) fn submit(&mut self) {
        self.engine.submit();
    }

    /// As [`crate::IoQueue::watch`].
    pub(crate) fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.engine.watch(fd, Notice::Watch(watch))
    }

    /// Watches the one descriptor that [`JobQueue::wait`] reports by its result.
    pub(crate) fn watch_bell(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.engine.watch(fd, Notice::Bell)
    }

    /// Submits, then waits as [`crate::IoQueue::wait`] does. Each end is given to `each`, watches are appended to
    /// `out`. Whether the bell has rung, which ends the wait too.
    pub(crate) fn wait(
        &mut self,
        until: Until,
        out: &mut Vec<Completed>,
        mut each: impl FnMut(End, &mut Vec<Completed>),
    ) -> io::Result<bool> {
        let until = if self.ready.is_empty() {
            until
        } else {
            Until::Now
        };
        for end in self.ready.drain(..) {
            each(end, out);
        }
        self.engine.wait(until, &mut self.harvest)?;
        for (mut job, result) in self.harvest.done.drain(..) {
            self.running = self.running.saturating_sub(1);
            if let Some(buf) = job.take_bounce() {
                self.bounces.give(buf);
            }
            let end = End {
                tag: job.tag,
                note: job.note,
                bytes: job.bytes(&result),
                result,
            };
            // Its buffers first.
            drop(job);
            each(end, out);
        }
        out.extend(self.harvest.watches.drain(..).map(Completed::Watch));
        if !self.waiting.is_empty() {
            self.start_waiting();
            self.engine.submit();
        }
        Ok(std::mem::take(&mut self.harvest.bell))
    }

    /// How many jobs and ends have not been reported.
    pub(crate) fn in_flight(&self) -> usize {
        self.running + self.waiting.len() + self.ready.len()
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
        let abilities = self.engine.abilities(job.file);
        if job.needs_bounce(abilities) {
            match self.bounces.take() {
                Ok(Some(buf)) => job.lend(buf),
                Ok(None) => return Some(job),
                Err(error) => {
                    self.finish(job, Err(error));
                    return None;
                }
            }
        }
        match job.begin(abilities) {
            Some(result) => self.finish(job, result),
            None => {
                self.running += 1;
                self.engine.start(job);
            }
        }
        None
    }

    /// Takes note of a job that ended at its very beginning.
    fn finish(&mut self, mut job: Job, result: io::Result<()>) {
        if let Some(buf) = job.take_bounce() {
            self.bounces.give(buf);
        }
        self.ready.push(End {
            tag: job.tag,
            note: job.note,
            bytes: job.bytes(&result),
            result,
        });
    }
}

#[cfg(test)]
mod tests;
