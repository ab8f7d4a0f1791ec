//! Work that takes long, with progress, cancellation and a result.
//!
//! A job belongs to the thread that does it, which reports through its
//! [`JobHandle`] and looks there whether it is still wanted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use api::wire::{JobInfo, JobState, MigrationInfo, SnapshotReport};
use api::{ControlError, ErrorKind, EventKind, EventLog};

use crate::process;

/// How many ended jobs are remembered.
const REMEMBERED: usize = 64;
/// How many events of progress a job makes at most.
const STEPS: u64 = 100;

/// All jobs of a monitor. Clones share them.
#[derive(Clone)]
pub struct Jobs {
    events: EventLog,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    made: u64,
    jobs: VecDeque<Arc<Job>>,
}

struct Job {
    id: String,
    kind: &'static str,
    done: AtomicU64,
    total: AtomicU64,
    way: Mutex<Way>,
    /// Why it was cancelled, where no client has asked for that.
    reason: OnceLock<&'static str>,
    end: Mutex<Option<(JobState, Option<String>)>>,
    /// What a snapshot was like.
    snapshot: OnceLock<SnapshotReport>,
    /// What a migration was like.
    migration: OnceLock<MigrationInfo>,
}

/// Where a job goes: one of the two excludes the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Way {
    /// It is being done.
    #[default]
    Open,
    /// It is to leave nothing.
    Cancelled,
    /// What it makes appears.
    Committed,
}

impl Job {
    fn way(&self) -> MutexGuard<'_, Way> {
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) -> MutexGuard<'_, Option<(JobState, Option<String>)>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> JobInfo {
        let (state, error) = match &*self.end() {
            Some((state, error)) => (*state, error.clone()),
            None if *self.way() == Way::Cancelled => (JobState::Cancelling, None),
            None => (JobState::Running, None),
        };
        JobInfo {
            id: self.id.clone(),
            kind: self.kind.to_owned(),
            state,
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            error,
            snapshot: self.snapshot.get().cloned(),
            migration: self.migration.get().cloned().map(Box::new),
        }
    }
}

/// The side of a job that does it. Dropped without a result, it has failed.
pub struct JobHandle {
    job: Arc<Job>,
    events: EventLog,
    told: u64,
}

impl Jobs {
    /// There are none yet; what becomes of jobs is published to `events`.
    #[must_use]
    pub fn new(events: EventLog) -> Self {
        Self {
            events,
            inner: Arc::default(),
        }
    }

    /// Begins a job that has `total` units to do (0: not known).
    #[must_use]
    pub fn begin(&self, kind: &'static str, total: u64) -> JobHandle {
        let job = {
            let mut inner = self.lock();
            inner.made += 1;
            let job = Arc::new(Job {
                id: format!("{kind}-{}", inner.made),
                kind,
                done: AtomicU64::new(0),
                total: AtomicU64::new(total),
                way: Mutex::default(),
                reason: OnceLock::new(),
                end: Mutex::default(),
                snapshot: OnceLock::new(),
                migration: OnceLock::new(),
            });
            let ended = inner.jobs.iter().filter(|job| job.end().is_some()).count();
            if ended >= REMEMBERED
                && let Some(oldest) = inner.jobs.iter().position(|job| job.end().is_some())
            {
                inner.jobs.remove(oldest);
            }
            inner.jobs.push_back(Arc::clone(&job));
            job
        };
        let handle = JobHandle {
            job,
            events: self.events.clone(),
            told: 0,
        };
        handle.tell();
        handle
    }

    /// All jobs, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<JobInfo> {
        let jobs: Vec<_> = self.lock().jobs.iter().cloned().collect();
        jobs.iter().map(|job| job.info()).collect()
    }

    /// Asks a job to end.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], and [`ErrorKind::Conflict`] when it has ended.
    pub fn cancel(&self, id: &str) -> Result<(), ControlError> {
        self.end(id, None)
    }

    /// As [`Jobs::cancel`], where not a client wants it; the job then tells why.
    ///
    /// # Errors
    ///
    /// As [`Jobs::cancel`].
    pub fn give_up(&self, id: &str, why: &'static str) -> Result<(), ControlError> {
        self.end(id, Some(why))
    }

    /// Whether it has been asked to end.
    pub(crate) fn is_cancelled(&self, id: &str) -> bool {
        let inner = self.lock();
        let job = inner.jobs.iter().find(|job| job.id == id);
        job.is_some_and(|job| *job.way() == Way::Cancelled)
    }

    fn end(&self, id: &str, why: Option<&'static str>) -> Result<(), ControlError> {
        let found = self.lock().jobs.iter().find(|job| job.id == id).cloned();
        let Some(job) = found else {
            let message = format!("No job with id {id:?}");
            return Err(ControlError::new(ErrorKind::NotFound, message));
        };
        if job.end().is_some() {
            let message = format!("Job {id} has ended");
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        let mut way = job.way();
        match *way {
            Way::Committed => {
                let message = format!("Job {id} is about to end: what it makes is whole");
                return Err(ControlError::new(ErrorKind::Conflict, message));
            }
            Way::Open => {
                // The first reason stays.
                let _ = why.map(|why| job.reason.set(why));
                *way = Way::Cancelled;
            }
            Way::Cancelled => (),
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JobHandle {
    /// The job as it is now.
    #[must_use]
    pub fn info(&self) -> JobInfo {
        self.job.info()
    }

    /// Whether it is no longer wanted.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        *self.job.way() == Way::Cancelled
    }

    /// Tells from any thread whether it is no longer wanted.
    pub fn watch(&self) -> impl Fn() -> bool + Send + Sync + use<> {
        let job = Arc::clone(&self.job);
        move || *job.way() == Way::Cancelled
    }

    /// What the snapshot was like that it has made. Once.
    pub fn report(&self, snapshot: SnapshotReport) {
        // A second one would say the same.
        let _ = self.job.snapshot.set(snapshot);
    }

    /// What the migration was like that it was. Once.
    pub fn migrated(&self, migration: MigrationInfo) {
        // A second one would say the same.
        let _ = self.job.migration.set(migration);
    }

    /// What it makes is whole and appears now: from here on it cannot be cancelled. `false` where it has been.
    #[must_use]
    pub fn commit(&self) -> bool {
        let mut way = self.job.way();
        if *way == Way::Open {
            *way = Way::Committed;
        }
        *way == Way::Committed
    }

    /// `done` of `total` units have been done.
    pub fn progress(&mut self, done: u64, total: u64) {
        self.job.done.store(done, Ordering::Relaxed);
        self.job.total.store(total, Ordering::Relaxed);
        let step = (total / STEPS).max(1);
        if done / step > self.told / step {
            self.told = done;
            self.tell();
        }
    }

    /// It has come to its end.
    pub fn finish(self, result: Result<(), String>) {
        let end = match result {
            Ok(()) => (JobState::Completed, None),
            Err(_) if self.is_cancelled() => {
                let reason = self.job.reason.get();
                (JobState::Cancelled, reason.map(|&why| why.to_owned()))
            }
            Err(reason) => (JobState::Failed, Some(reason)),
        };
        *self.job.end() = Some(end);
    }

    fn tell(&self) {
        self.events.publish(EventKind::Job {
            info: self.job.info(),
        });
    }
}

impl Drop for JobHandle {
    fn drop(&mut self) {
        self.job
            .end()
            .get_or_insert_with(|| (JobState::Failed, Some("its thread ended".to_owned())));
        self.tell();
        process::give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(jobs: &Jobs) -> Vec<JobState> {
        jobs.list().iter().map(|job| job.state).collect()
    }

    #[test]
    fn a_job_whose_thread_panics_has_failed_and_says_so() {
        let events = EventLog::default();
        let jobs = Jobs::new(events.clone());
        let job = jobs.begin("copy", 0);
        let ended = std::thread::spawn(move || {
            let _job = job;
            panic!("as told");
        });
        assert!(ended.join().is_err());
        let found = jobs.list().remove(0);
        assert_eq!(found.state, JobState::Failed);
        assert_eq!(found.error.as_deref(), Some("its thread ended"));
        let last = events.after(0, usize::MAX).pop().unwrap();
        assert_eq!(last.kind, EventKind::Job { info: found });
    }

    #[test]
    fn a_job_tells_its_beginning_its_steps_and_its_end() {
        let events = EventLog::default();
        let jobs = Jobs::new(events.clone());
        let mut job = jobs.begin("test", 1000);
        for done in 1..=1000 {
            job.progress(done, 1000);
        }
        job.finish(Ok(()));
        assert_eq!(states(&jobs), [JobState::Completed]);
        let told = events.after(0, usize::MAX).len();
        assert!((3..=103).contains(&told), "{told}");
    }

    #[test]
    fn a_cancelled_job_ends_as_its_thread_says() {
        let jobs = Jobs::new(EventLog::default());
        let (heeds, ignores) = (jobs.begin("test", 0), jobs.begin("test", 0));
        jobs.cancel("test-1").unwrap();
        jobs.cancel("test-2").unwrap();
        assert_eq!(states(&jobs), [JobState::Cancelling; 2]);
        assert!(heeds.is_cancelled());
        heeds.finish(Err("it was told to".to_owned()));
        ignores.finish(Ok(()));
        assert_eq!(states(&jobs), [JobState::Cancelled, JobState::Completed]);
        assert_eq!(jobs.cancel("test-1").unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(jobs.cancel("test-3").unwrap_err().kind, ErrorKind::NotFound);
    }

    #[test]
    fn a_job_is_either_cancelled_or_committed() {
        let jobs = Jobs::new(EventLog::default());
        let (first, second) = (jobs.begin("test", 0), jobs.begin("test", 0));
        assert!(first.commit());
        assert_eq!(jobs.cancel("test-1").unwrap_err().kind, ErrorKind::Conflict);
        assert!(!first.is_cancelled());
        jobs.cancel("test-2").unwrap();
        assert!(!second.commit() && second.is_cancelled());
        first.finish(Ok(()));
        second.finish(Err("it was told to".to_owned()));
        assert_eq!(states(&jobs), [JobState::Completed, JobState::Cancelled]);
    }

    #[test]
    fn a_job_that_is_given_up_says_why_unless_a_client_was_first() {
        let jobs = Jobs::new(EventLog::default());
        let both = [jobs.begin("test", 0), jobs.begin("test", 0)];
        jobs.cancel("test-2").unwrap();
        for id in ["test-1", "test-2"] {
            jobs.give_up(id, "no time").unwrap();
        }
        for job in both {
            job.finish(Err("it was told to".to_owned()));
        }
        let errors: Vec<_> = jobs.list().into_iter().map(|job| job.error).collect();
        assert_eq!(errors, [Some("no time".to_owned()), None]);
        assert_eq!(states(&jobs), [JobState::Cancelled; 2]);
    }

    #[test]
    fn a_job_whose_thread_is_lost_has_failed_and_old_ones_are_forgotten() {
        let jobs = Jobs::new(EventLog::default());
        let kept = jobs.begin("test", 0);
        for _ in 0..3 * REMEMBERED {
            drop(jobs.begin("test", 0));
        }
        let list = jobs.list();
        assert_eq!(list.len(), REMEMBERED + 1);
        assert_eq!(list[0].id, "test-1");
        assert_eq!(list[1].state, JobState::Failed);
        kept.finish(Ok(()));
    }
}
