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
struct Pace<'a> {
    job: &'a JobHandle,
    target: &'a Target,
    began: Instant,
    /// In bytes.
    copied: u64,
}

impl Pace<'_> {
    /// Waits until more may be copied.
    fn wait(&self) -> Result<(), String> {
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

/// Goes once through `size` bytes by `step`, which deals with some from an offset on: how many those are, and how many of them have been
/// copied. How many have been in all.
pub(in crate::machine::driver) fn go_through(
    job: &mut JobHandle,
    (target, began): (&Target, Instant),
    size: u64,
    mut step: impl FnMut(u64) -> Result<(u64, u64), String>,
) -> Result<u64, String> {
    let (mut at, mut copied) = (0, 0);
    while at < size {
        let pace = Pace {
            job,
            target,
            began,
            copied,
        };
        pace.wait()?;
        let (done, more) = step(at)?;
        at += done;
        copied += more;
        job.progress(at, size);
    }
    Ok(copied)
}

/// Copies all, and then what the guest has changed meanwhile until little of that is left.
pub(super) fn copy(job: &mut JobHandle, work: &mut Work, target: &Target) -> Result<(), String> {
    let began = Instant::now();
    let step = |at| work.step(at).map_err(|error| work.failed(at, &error));
    let copied = go_through(job, (target, began), work.size(), step)?;
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
