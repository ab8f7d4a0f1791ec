//! The queue of a raw disk: checks requests and makes a job of each.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::admit::Policy;
use crate::buffers::Buffers;
use crate::disk::{Completed, IoQueue, Op, Request, Watch};
use crate::engine::{FileId, Job, Until};
use crate::events::Events;
use crate::file::{HostFile, Kind};
use crate::jobs::{End, JobQueue};
use crate::storage::FileStorage;

/// The queue of a raw disk.
#[derive(Debug)]
pub(crate) struct RawQueue {
    file: Arc<HostFile>,
    id: FileId,
    policy: Policy,
    events: Arc<Events>,
    jobs: JobQueue,
}

impl RawQueue {
    /// A queue of the disk that `file` is; `jobs` knows no file yet.
    pub(crate) fn new(
        file: Arc<HostFile>,
        policy: Policy,
        events: Arc<Events>,
        mut jobs: JobQueue,
    ) -> Self {
        Self {
            id: jobs.add_file(Arc::new(FileStorage::new(Arc::clone(&file)))),
            file,
            policy,
            events,
            jobs,
        }
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

    /// The job for a request; `None` when nothing is to be done.
    fn job(&self, request: Request) -> io::Result<Option<Job>> {
        let unit = u64::from(self.file.abilities().align.offset);
        let size = self.file.size();
        let Some(work) = self.policy.admit(&request, size, unit)? else {
            return Ok(None);
        };
        let (op, offset) = match work.op {
            Op::Discard { len } => {
                let (offset, len) = self.whole_sectors(request.offset, len);
                (Op::Discard { len }, offset)
            }
            Op::Flush => (Op::Flush, 0),
            op => (op, request.offset),
        };
        let changed = match op {
            Op::Read | Op::Flush => None,
            Op::Write => Some(request.buffers.len()),
            Op::WriteZeroes { len, .. } | Op::Discard { len } => Some(len),
        };
        if let Some(len) = changed {
            self.file.tracks().note(offset, len);
            if !matches!(op, Op::Discard { .. }) {
                self.events.writes_to(offset.saturating_add(len));
            }
        }
        let buffers = match op {
            Op::Read | Op::Write => request.buffers,
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => Buffers::none(),
        };
        let durable = self.policy.durable;
        let job = Job::new(request.token, self.id, op, offset, buffers, durable);
        Ok(Some(job.standing_for(work.zeros)))
    }
}

impl IoQueue for RawQueue {
    fn push(&mut self, request: Request) {
        let token = request.token;
        let result = match self.job(request) {
            Ok(Some(job)) => return self.jobs.push(job),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        self.jobs.end(End {
            tag: token,
            note: 0,
            result,
            bytes: 0,
        });
    }

    fn submit(&mut self) {
        self.jobs.submit();
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.jobs.watch(fd, watch)
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let until = Until::new(timeout);
        self.jobs
            .wait(until, out, |end, out| out.push(end.into()))
            .map(|_| ())
    }

    fn in_flight(&self) -> usize {
        self.jobs.in_flight()
    }
}

#[cfg(test)]
pub(crate) mod tests;
