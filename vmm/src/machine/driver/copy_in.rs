//! The command `vm.snapshot-copy-in`: a job that makes memory that is mapped from the file of a snapshot the machine's own.
//!
//! A thread copies part after part while the guest works on ([`crate::memory::copy_in`]). The guest stands still for an instant at the end
//! of each, which waits for the end of a capture. Wherever the job ends, memory is as it was.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use api::wire::JobState;
use api::{Answer, ControlError, ErrorKind, Reply};
use virtio::memory::GuestMap;

use super::Driver;
use crate::error::chain;
use crate::machine::inbox::ended;
use crate::machine::snapshot::SnapshotRam;
use crate::machine::tracking::Tracking;
use crate::memory::copy_in::Window;
use crate::memory::dirty::Consumer;
use crate::memory::restored::Restored;
use crate::monitor::JobHandle;

/// The kind of its job.
const KIND: &str = "copy-in";
/// How often a part is looked at again while the guest writes to it.
const ROUNDS: usize = 4;
/// As many bytes are copied while it stands.
const REST: u64 = 1 << 20;

/// The job.
struct CopyIn {
    job: JobHandle,
    restored: Arc<Restored>,
    map: GuestMap,
    tracking: Weak<Tracking>,
    /// There when writes are logged.
    consumer: Option<Consumer>,
    done: u64,
    total: u64,
    /// For how long the guest stood, at most.
    longest: Duration,
}

/// A part that has been copied, or that there is none.
type Copied = Result<Option<Window>, String>;

impl CopyIn {
    /// Copies the next part.
    fn copy(&mut self) -> Copied {
        let cancelled = || "it was cancelled".to_owned();
        if self.job.is_cancelled() {
            return Err(cancelled());
        }
        let consumer = match self.consumer.take() {
            Some(consumer) => consumer,
            None => {
                let tracking = self.tracking.upgrade();
                let tracking = tracking.ok_or_else(|| ended().to_string())?;
                tracking.listen().map_err(|error| chain(&error))?
            }
        };
        let copied = self.copy_logged(&consumer);
        let window = match copied {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(cancelled()),
            copied => copied.map_err(|error| chain(&error))?,
        };
        self.consumer = Some(consumer);
        Ok(window)
    }

    fn copy_logged(&self, consumer: &Consumer) -> io::Result<Option<Window>> {
        let Some(window) = self.restored.window()? else {
            return Ok(None);
        };
        let ram = SnapshotRam::new(GuestMap::clone(&self.map), false);
        window.fill(&ram, &|| !self.job.is_cancelled())?;
        for _ in 0..ROUNDS {
            let written = consumer.look().map_err(io::Error::other)?;
            if window.count(consumer.ranges(), &written) <= REST {
                break;
            }
            let written = consumer.take().map_err(io::Error::other)?;
            window.again(&ram, consumer.ranges(), &written)?;
        }
        Ok(Some(window))
    }

    /// Makes what has been copied the machine's own. vCPUs and devices stand.
    fn take_in(&mut self, window: Window) -> Result<(), ControlError> {
        let Some(consumer) = &self.consumer else {
            return Err(ended());
        };
        let bytes = window.bytes();
        let ram = SnapshotRam::new(GuestMap::clone(&self.map), false);
        let written = consumer.take().map_err(io::Error::other);
        let again = written.and_then(|written| window.again(&ram, consumer.ranges(), &written));
        let taken = again.and_then(|()| window.take_in());
        taken.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
        self.done = self.done.saturating_add(bytes);
        self.job.progress(self.done.min(self.total), self.total);
        Ok(())
    }

    fn finish(self, result: Result<(), String>) {
        let Self {
            job,
            restored,
            consumer,
            longest,
            ..
        } = self;
        // Who knows of the end pays nothing any more.
        drop(consumer);
        if result.is_ok() {
            restored.let_go();
            tracing::info!(
                "memory is the machine's own; the guest stood still for {longest:?} at most"
            );
        }
        job.finish(result);
    }
}

impl Driver {
    /// Begins to make memory the machine's own. The answer is the job.
    pub(super) fn copy_in(&mut self, answer: Answer) {
        answer(self.begin_copy_in());
    }

    fn begin_copy_in(&mut self) -> Result<Reply, ControlError> {
        let conflict = |message: &str| Err(ControlError::new(ErrorKind::Conflict, message));
        let restored = self.machine.restored_memory().cloned();
        let restored = restored.filter(|restored| restored.is_mapped());
        let Some((restored, total)) = restored
            .map(|restored| {
                let total = restored.bytes_of_file();
                (restored, total)
            })
            .filter(|(_, total)| *total > 0)
        else {
            return conflict("no memory of this machine is mapped from a snapshot's file");
        };
        let running = self.tools.jobs.list().into_iter();
        if running.into_iter().any(|job| {
            job.kind == KIND && matches!(job.state, JobState::Running | JobState::Cancelling)
        }) {
            let message = "memory is being copied in already";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        let job = self.tools.jobs.begin(KIND, total);
        let info = job.info();
        self.asides.jobs.push(info.id.clone());
        self.next_window(CopyIn {
            job,
            restored,
            map: self.machine.memory_map(),
            tracking: Arc::downgrade(self.machine.tracking()),
            consumer: None,
            done: 0,
            total,
            longest: Duration::ZERO,
        })?;
        Ok(Reply::Started(info))
    }

    fn next_window(&mut self, mut work: CopyIn) -> Result<(), ControlError> {
        let copy = move || {
            let copied = work.copy();
            (work, copied)
        };
        // It may wait for the file's storage, and holds nothing but memory.
        self.beside(KIND, copy, |driver, (work, copied)| match copied {
            Ok(Some(window)) => driver.when_free(move |driver| driver.take_window_in(work, window)),
            Ok(None) => driver.end_copy_in(work, Ok(())),
            Err(why) => driver.end_copy_in(work, Err(why)),
        })
    }

    fn take_window_in(&mut self, mut work: CopyIn, window: Window) {
        // What may write to memory besides vCPUs.
        let devices = self.machine.virtio_devices();
        let taken = self.stall(&devices, |_| work.take_in(window));
        match taken {
            Ok(((), stood)) => {
                work.longest = work.longest.max(stood);
                // Without a thread the job ends with what it holds.
                if let Err(error) = self.next_window(work) {
                    tracing::warn!("memory stays a file's in part: {error}");
                }
            }
            Err(error) => self.end_copy_in(work, Err(error.to_string())),
        }
    }

    fn end_copy_in(&mut self, work: CopyIn, result: Result<(), String>) {
        let id = work.job.info().id;
        self.asides.jobs.retain(|other| *other != id);
        work.finish(result);
    }
}
