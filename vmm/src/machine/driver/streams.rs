//! The command `vm.disk-stream`: a job that takes what lies below a disk's image into it, and then cuts the chain.
//!
//! A thread of the job's own copies while the guest works on, and cuts the chain. What it needs of the image it has by itself, and
//! the image keeps it and the guest apart. Then the guest stands still for an instant, for the disk to let go of what it
//! needs no more; that waits for the end of a snapshot of the machine. The machine's end, and
//! the disk's removal, end the job; what has been copied by then stays in the image, and the next job begins with it.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::wire::VmDiskStream;
use api::{Answer, ControlError, ErrorKind, Reply};
use block::{Cut, ImageOptions, Stream};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::Driver;
use crate::error::chain;
use crate::machine::fault;
use crate::machine::inbox::ended;
use crate::monitor::JobHandle;

/// How long a job that is ahead of its speed rests before it looks around.
pub(super) const REST: Duration = Duration::from_millis(50);

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

impl Driver {
    /// Begins to take what lies below a disk's image into it. The answer is the job.
    pub(super) fn stream_disk(&mut self, request: VmDiskStream, answer: Answer) {
        let begun = self.begin_stream(&request);
        let (target, device) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let answer = self.asides.wait_with(answer);
        let (opener, wanted) = (Arc::clone(&self.tools.opener), target.clone());
        let look = move || {
            let disk = device.disk().ok_or_else(|| no_disk(&wanted.id))?;
            let base = request.base.as_deref();
            Stream::of(&*disk, &wanted.path, base, &*opener, &wanted.options).map_err(|error| {
                let error = ControlError::from_error(fault::of(&error), &error);
                error.context(format!("disk {}", wanted.id))
            })
        };
        let mark = target.clone();
        let started = self.holding("stream", look, move |driver, looked| {
            let id = target.id.clone();
            let device = Weak::clone(&target.device);
            let begun = looked.and_then(|stream| driver.start_stream(target, stream));
            if begun.is_err() {
                driver.asides.finish(&id, &device);
            }
            driver.asides.answer(answer, begun);
        });
        if let Err(error) = started {
            self.asides.finish(&mark.id, &mark.device);
            self.asides.answer(answer, Err(error));
        }
    }

    fn begin_stream(
        &mut self,
        request: &VmDiskStream,
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

    fn start_stream(&mut self, target: Target, stream: Stream) -> Result<Reply, ControlError> {
        let mut job = self.tools.jobs.begin("stream", stream.size());
        let info = job.info();
        let copied = target.clone();
        let copy = move || match copy(&mut job, &stream, &copied) {
            Ok(()) => Some(Done {
                stream: Some(stream),
                job: Some(job),
            }),
            Err(error) => {
                // Who knows of the end can begin another.
                drop(stream);
                job.finish(Err(error));
                None
            }
        };
        let id = info.id.clone();
        self.holding("stream", copy, move |driver, done| {
            driver.asides.jobs.retain(|other| *other != id);
            match done {
                Some(done) => driver.when_free(move |driver| driver.finish_stream(&target, done)),
                None => driver.asides.finish(&target.id, &target.device),
            }
        })?;
        self.asides.jobs.push(info.id.clone());
        Ok(Reply::Started(info))
    }

    fn finish_stream(&mut self, target: &Target, mut done: Done) {
        self.asides.finish(&target.id, &target.device);
        if let Some(stream) = done.stream.take()
            && let Err(error) = self.let_go(target, stream)
        {
            let error =
                error.context("the image needs them no more, but images below it stay open");
            if let Some(job) = done.job.take() {
                job.finish(Err(error.to_string()));
            }
        }
    }

    fn let_go(&mut self, target: &Target, stream: Stream) -> Result<(), ControlError> {
        let device = self.settled_device(&target.id)?;
        if !target.device.ptr_eq(&Arc::downgrade(&device)) {
            return Err(no_disk(&target.id));
        }
        let devices = [device];
        let wanted = target.clone();
        let finish = move |go: &dyn Fn() -> bool| {
            stream
                .finish(&wanted.options, go)
                .map_err(|error| ControlError::from_error(fault::of(&error), &error))
        };
        let (old, _) = self.stall(&devices, |driver| {
            let cut = driver.while_still(finish)?;
            let old = exchange(&devices[0], cut, target)?;
            driver.tell_of_images(std::iter::once(&target.id));
            Ok(old)
        })?;
        // The images below are closed.
        drop(old);
        Ok(())
    }

    /// Ends all jobs on disks: the machine ends.
    pub(super) fn give_up_jobs(&mut self) {
        for id in std::mem::take(&mut self.asides.jobs) {
            // It may have ended by itself.
            let _ = self.tools.jobs.give_up(&id, "the machine has ended");
        }
    }
}

pub(super) fn no_disk(id: &str) -> ControlError {
    let message = format!("{id}: it is no disk with an image of its own");
    ControlError::new(ErrorKind::Invalid, message)
}

/// A job that has cut the chain, and the disk which still has the images open that it needs no more. However it goes on, the
/// job has done its work.
struct Done {
    stream: Option<Stream>,
    job: Option<JobHandle>,
}

impl Drop for Done {
    fn drop(&mut self) {
        self.stream = None;
        if let Some(job) = self.job.take() {
            job.finish(Ok(()));
        }
    }
}

/// Goes through the disk, no faster than it may, and cuts the chain.
fn copy(job: &mut JobHandle, stream: &Stream, target: &Target) -> Result<(), String> {
    let (size, began) = (stream.size(), Instant::now());
    let (mut at, mut copied) = (0, 0_u64);
    while at < size {
        if job.is_cancelled() {
            return Err("it was cancelled".to_owned());
        }
        let device = target.device.upgrade();
        if device.is_none_or(|device| device.disk().is_none()) {
            return Err(format!("disk {} has been removed", target.id));
        }
        let ahead = target.speed.map_or(Duration::ZERO, |speed| {
            let part = u128::from(copied % speed) * 1_000_000_000 / u128::from(speed);
            let due = Duration::from_secs(copied / speed)
                + Duration::from_nanos(u64::try_from(part).unwrap_or(0));
            due.saturating_sub(began.elapsed())
        });
        if !ahead.is_zero() {
            std::thread::sleep(ahead.min(REST));
            continue;
        }
        let (done, more) = stream
            .step(at)
            .map_err(|error| format!("at byte {at}: {}", chain(&error)))?;
        at += done;
        copied += more;
        job.progress(at, size);
    }
    if !job.commit() {
        return Err("it was cancelled".to_owned());
    }
    stream.name().map_err(|error| chain(&error))
}

/// Has the disk go on with the shorter chain. The device is stopped.
fn exchange(device: &VirtioPci, cut: Cut, target: &Target) -> Result<DiskImage, ControlError> {
    let image = DiskImage {
        disk: cut.disk(),
        path: target.path.clone(),
        format: target.options.disk.format,
        backing: target.options.backing,
    };
    let old = device
        .exchange_disk(image)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    cut.keep();
    Ok(old)
}
