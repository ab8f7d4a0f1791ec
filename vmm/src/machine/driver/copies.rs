//! Jobs that copy what a disk holds while its guest works on, and then have the disk go on elsewhere.
//!
//! ```text
//!   beside          control thread        a thread of the job              control thread         beside
//!   images opened   disk on what can ───► all is copied, then what    ───► disk on its new   ───► what is needed no
//!                   be copied from        the guest has changed            image or chain         more is closed
//! ```
//!
//! For both steps on the control thread the guest stands still for an instant; they wait for the end of a snapshot of the machine.
//! Where anything fails before the second step, the disk goes on as it was before the job. The machine's end, and the
//! disk's removal, end the job.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::wire::VmDiskCommit;
use api::{Answer, ControlError, ErrorKind, Reply};
use block::{Cut, Disk, Emptied, Format, ImageOptions, Merge, Merged};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::Driver;
use super::streams::{REST, no_disk};
use crate::error::chain;
use crate::machine::fault;
use crate::machine::inbox::ended;
use crate::monitor::JobHandle;

/// With so little left to be copied the guest may stand still for it, in bytes.
const ENOUGH: u64 = 8 << 20;

/// After so many times through all that has been changed meanwhile, the guest is held up.
const TIMES: u32 = 3;

/// The disk.
#[derive(Clone)]
struct Target {
    id: String,
    device: Weak<VirtioPci>,
    path: PathBuf,
    options: ImageOptions,
    /// The most bytes to be copied in a second.
    speed: Option<u64>,
}

/// A job whose end is to be told when it is left, whatever happens.
struct Ending {
    job: Option<JobHandle>,
    result: Result<(), String>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            let result = std::mem::replace(&mut self.result, Ok(()));
            job.finish(result);
        }
    }
}

/// What the disk goes on with at the end.
enum Next {
    Shorter(Cut),
    Base(Arc<dyn Disk>, Emptied),
}

/// What a thread closes at the end.
enum Rest {
    /// What was copied lies below the disk.
    Below(Merge),
    /// It was the disk's image.
    Emptied(Emptied),
}

fn failed<E: std::error::Error + 'static>(error: &E) -> ControlError {
    ControlError::from_error(fault::of(error), error)
}

impl Driver {
    /// Begins to merge images of a disk down. The answer is the job.
    pub(super) fn commit_disk(&mut self, request: VmDiskCommit, answer: Answer) {
        let begun = self.begin_commit(&request);
        let (target, device) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let answer = self.asides.wait_with(answer);
        let (opener, wanted) = (Arc::clone(&self.tools.opener), target.clone());
        let look = move || {
            let disk = device.disk().ok_or_else(|| no_disk(&wanted.id))?;
            let which = (request.top.as_deref(), request.base.as_deref());
            Merge::of(&*disk, &wanted.path, which, opener, &wanted.options)
                .map_err(|error| failed(&error).context(format!("disk {}", wanted.id)))
        };
        let mark = target.clone();
        let started = self.holding("commit", look, move |driver, looked| {
            driver.when_free(move |driver| {
                let (id, device) = (target.id.clone(), Weak::clone(&target.device));
                let begun = looked.and_then(|merge| driver.start_commit(target, merge));
                if begun.is_err() {
                    driver.asides.finish(&id, &device);
                }
                driver.asides.answer(answer, begun);
            });
        });
        if let Err(error) = started {
            self.asides.finish(&mark.id, &mark.device);
            self.asides.answer(answer, Err(error));
        }
    }

    fn begin_commit(
        &mut self,
        request: &VmDiskCommit,
    ) -> Result<(Target, Arc<VirtioPci>), ControlError> {
        let id = &request.id;
        if request.speed == Some(0) {
            let message = "speed: 0 bytes in a second: leave it out for no limit";
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let device = self.settled_device(id)?;
        let config = description.config.disk(id).ok_or_else(|| no_disk(id))?;
        self.asides.begin_job(&device)?;
        let target = Target {
            id: id.clone(),
            device: Arc::downgrade(&device),
            options: config.image_options(),
            path: config.path,
            speed: request.speed,
        };
        Ok((target, device))
    }

    /// Puts the disk on a chain that can be merged, and has a thread do that.
    fn start_commit(&mut self, target: Target, mut merge: Merge) -> Result<Reply, ControlError> {
        let device = self.same(&target)?;
        let devices = [device];
        let begin = move |go: &dyn Fn() -> bool| {
            let cut = merge.begin(go).map_err(|error| failed(&error))?;
            Ok((merge, cut))
        };
        let ((old, merge), _) = self.stall(&devices, |driver| {
            let (merge, cut) = driver.while_still(begin)?;
            let old = exchange(&devices[0], cut.disk(), &target)?;
            cut.keep();
            Ok((old, merge))
        })?;
        drop(old);
        let mut job = self.tools.jobs.begin("commit", merge.size());
        let info = job.info();
        let copied = target.clone();
        let work = move || {
            let mut merge = merge;
            let result = copy(&mut job, &mut merge, &copied);
            let job = Some(job);
            (merge, Ending { job, result })
        };
        let id = info.id.clone();
        self.holding("commit", work, move |driver, (merge, ending)| {
            driver.asides.jobs.retain(|other| *other != id);
            driver.when_free(move |driver| driver.finish_commit(&target, merge, ending));
        })?;
        self.asides.jobs.push(info.id.clone());
        Ok(Reply::Started(info))
    }

    /// The device of a job's disk, if it is the same as before.
    fn same(&self, target: &Target) -> Result<Arc<VirtioPci>, ControlError> {
        let device = self.settled_device(&target.id)?;
        let same = target.device.ptr_eq(&Arc::downgrade(&device));
        same.then_some(device).ok_or_else(|| no_disk(&target.id))
    }

    fn finish_commit(&mut self, target: &Target, merge: Merge, mut ending: Ending) {
        let plain = merge.given_up();
        let committed = ending.job.as_ref().is_some_and(JobHandle::commit);
        if ending.result.is_ok() && !committed {
            ending.result = Err("it was cancelled".to_owned());
        }
        let rest = if ending.result.is_ok() {
            match self.go_elsewhere(target, merge) {
                Ok(done) => Some(done),
                Err((merge, error)) => {
                    ending.result = Err(error.to_string());
                    merge.map(Rest::Below)
                }
            }
        } else {
            Some(Rest::Below(merge))
        };
        if ending.result.is_err()
            && let Some(plain) = plain
            && let Err(error) = self.go_back(target, plain)
        {
            tracing::warn!("disk {} still notes its changes: {error}", target.id);
        }
        let close = move || match rest {
            Some(Rest::Below(merge)) => merge.settle().map_err(|error| chain(&error)),
            Some(Rest::Emptied(emptied)) => {
                emptied.free();
                Ok(())
            }
            None => Ok(()),
        };
        let mark = target.clone();
        let started = self.holding("settle", close, move |driver, closed| {
            driver.asides.finish(&mark.id, &mark.device);
            if ending.result.is_ok() {
                ending.result = closed;
            }
            drop(ending);
        });
        if started.is_err() {
            self.asides.finish(&target.id, &target.device);
        }
    }

    /// Has the disk go on with what has been merged.
    fn go_elsewhere(
        &mut self,
        target: &Target,
        mut merge: Merge,
    ) -> Result<Rest, (Option<Merge>, ControlError)> {
        let device = match self.same(target) {
            Ok(device) => device,
            Err(error) => return Err((Some(merge), error)),
        };
        let devices = [device];
        let finish = move |go: &dyn Fn() -> bool| {
            let finished = merge.finish(go).map_err(|error| failed(&error));
            let next = finished.map(|merged| match merged {
                Merged::Shorter(cut) => Next::Shorter(cut),
                Merged::Base(disk, emptied) => Next::Base(disk, emptied),
            });
            Ok((merge, next))
        };
        let mut kept = None;
        let done = self.stall(&devices, |driver| {
            let (merge, next) = driver.while_still(finish)?;
            let next = match next {
                Ok(next) => next,
                Err(error) => {
                    kept = Some(merge);
                    return Err(error);
                }
            };
            let (old, rest) = match next {
                Next::Shorter(cut) => {
                    let old = exchange(&devices[0], cut.disk(), target)?;
                    cut.keep();
                    (old, Rest::Below(merge))
                }
                Next::Base(disk, emptied) => {
                    let (path, format) = merge.moves_to().ok_or_else(ended)?;
                    let there = target.at(path.to_owned(), format);
                    let old = exchange(&devices[0], disk, &there)?;
                    if let Some(description) = &mut driver.ears.description {
                        description.overlay(&there.id, &there.path, &there.options);
                    }
                    (old, Rest::Emptied(emptied))
                }
            };
            driver.tell_of_images(std::iter::once(&target.id));
            Ok((old, rest))
        });
        match done {
            Ok(((old, rest), _)) => {
                drop(old);
                Ok(rest)
            }
            Err(error) => Err((kept, error)),
        }
    }

    /// Has the disk go on as before the job.
    fn go_back(&mut self, target: &Target, plain: Arc<dyn Disk>) -> Result<(), ControlError> {
        let devices = [self.same(target)?];
        let (old, _) = self.stall(&devices, |_| exchange(&devices[0], plain, target))?;
        drop(old);
        Ok(())
    }
}

impl Target {
    /// The same disk, with another image.
    fn at(&self, path: PathBuf, format: Format) -> Self {
        let mut other = Self {
            path,
            ..self.clone()
        };
        other.options.disk.format = Some(format);
        other
    }

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

/// Has the device's requests go to `disk`. It is stopped.
fn exchange(
    device: &VirtioPci,
    disk: Arc<dyn Disk>,
    target: &Target,
) -> Result<DiskImage, ControlError> {
    let image = DiskImage {
        disk,
        path: target.path.clone(),
        format: target.options.disk.format,
        backing: target.options.backing,
    };
    device
        .exchange_disk(image)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))
}

/// A job under way: it heeds who cancels it, the disk's removal, and its speed.
struct Pace<'a> {
    job: &'a JobHandle,
    target: &'a Target,
    began: Instant,
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

/// Copies all, and then what the guest has changed meanwhile until little of that is left.
fn copy(job: &mut JobHandle, merge: &mut Merge, target: &Target) -> Result<(), String> {
    let (size, mut at) = (merge.size(), 0);
    let (began, mut copied) = (Instant::now(), 0);
    let told = |error: std::io::Error| move |at: u64| format!("at byte {at}: {}", chain(&error));
    while at < size {
        let pace = Pace {
            job,
            target,
            began,
            copied,
        };
        pace.wait()?;
        let (done, more) = merge.step(at).map_err(|error| told(error)(at))?;
        at += done;
        copied += more;
        job.progress(at, size);
    }
    let mut times = 0_u32;
    while merge.left() > ENOUGH {
        times = times.saturating_add(1);
        if times > TIMES {
            merge.hold_up(ENOUGH / 2);
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
            let again = merge.catch_up(at).map_err(|error| told(error)(at))?;
            let Some((more, end)) = again else { break };
            copied += more;
            at = end;
        }
    }
    // In its own chain it may be named from here on.
    merge.name().map_err(|error| chain(&error))
}
