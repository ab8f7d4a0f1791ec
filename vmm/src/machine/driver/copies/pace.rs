//! How a job goes through a disk: no faster than it may, and again through what changes meanwhile.

use std::time::{Duration, Instant};

use super::{ENOUGH, Target, Work};
use crate::monitor::JobHandle;

/// How long a job that is ahead of its speed rests before it looks around.
const REST: Duration = Duration::from_millis(50);

/// After so many times through all that has been changed meanwhile, the guest is held up.
const TIMES: u32 = 3;

impl Target {
    /// How long the job waits that has copied so much since it began.
    fn ahead(&self, copied: u64, began: Instant) -> Duration {
        self.speed.map_or(Duration::ZERO, |speed| {
            let part = u128::from(copied % speed) * 1_000_000_000 / u128::from(speed);
            let due = Duration::from_secs(copied / speed)
                + Duration::from_nanos(u64::try_from(part).unwrap_or(0));
            due.saturating_sub(began.elapsed())
        })
    }
}

/// A job under way: it heeds who cancels it, the disk's removal, and its speed.
pub(in crate::machine::driver) struct Pace<'a> {
    pub job: &'a JobHandle,
    pub target: &'a Target,
    pub began: Instant,
    /// In bytes.
    pub copied: u64,
}

impl Pace<'_> {
    /// Waits until more may be copied.
    pub fn wait(&self) -> Result<(), String> {
        loop {
            if self.job.is_cancelled() {
                return Err("it was cancelled".to_owned());
            }
            let device = self.target.device.upgrade();
            if device.is_none_or(|device| device.disk().is_none()) {
                return Err(format!("disk {} has been removed", self.target.id));
            }
            let ahead = self.target.ahead(self.copied, self.began);
            if ahead.is_zero() {
                return Ok(());
            }
            std::thread::sleep(ahead.min(REST));
        }
    }
}

/// Copies all, and then what the guest has changed meanwhile until little of that is left.
pub(super) fn copy(job: &mut JobHandle, work: &mut Work, target: &Target) -> Result<(), String> {
    let (size, mut at) = (work.size(), 0);
    let (began, mut copied) = (Instant::now(), 0);
    while at < size {
        let pace = Pace {
            job,
            target,
            began,
            copied,
        };
        pace.wait()?;
        let (done, more) = work.step(at).map_err(|error| work.failed(at, &error))?;
        at += done;
        copied += more;
        job.progress(at, size);
    }
    catch_up(job, work, (target, began, copied))
}

/// Copies what the guest has changed since it was copied, until little of that is left.
pub(super) fn catch_up(
    job: &mut JobHandle,
    work: &mut Work,
    (target, began, mut copied): (&Target, Instant, u64),
) -> Result<(), String> {
    let mut times = 0_u32;
    while work.left() > ENOUGH {
        times = times.saturating_add(1);
        if times > TIMES {
            work.hold_up(ENOUGH / 2);
        }
        let mut at = 0;
        loop {
            let pace = Pace {
                job,
                target,
                began,
                copied,
            };
            pace.wait()?;
            let again = work.catch_up(at).map_err(|error| work.failed(at, &error))?;
            let Some((more, end)) = again else { break };
            copied += more;
            at = end;
        }
    }
    // The end may have to wait, and the guest is not to wait with it.
    work.hold_up(u64::MAX);
    work.prepare(job)
}
