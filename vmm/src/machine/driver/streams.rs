//! The command `vm.disk-stream`: a job that takes what lies below a disk's image into it, and then cuts the chain.
//!
//! A thread of the job's own copies while the guest works on, and cuts the chain. What it needs of the image it has by itself, and
//! the image keeps it and the guest apart. Then the guest stands still for an instant, for the disk to let go of what it
//! needs no more; that waits for the end of a snapshot of the machine. The machine's end, and
//! the disk's removal, end the job; what has been copied by then stays in the image, and the next job begins with it.

use std::sync::{Arc, Weak};
use std::time::Instant;

use api::wire::VmDiskStream;
use api::{Answer, ControlError, ErrorKind, Reply};
use block::{Cut, Stream};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

use super::Driver;
use super::copies::{Target, go_through};
use crate::error::chain;
use crate::machine::fault;
use crate::monitor::JobHandle;

impl Driver {
    /// Begins to take what lies below a disk's image into it. The answer is the job.
    pub(super) fn stream_disk(&mut self, request: VmDiskStream, answer: Answer) {
        if request.top.is_some() {
            return self.absorb_in_disk(request, answer);
        }
        let begun = self.begin_copy(&request.id, request.speed);
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
        let Some(stream) = done.stream.take() else {
            return self.asides.finish(&target.id, &target.device);
        };
        let old = match self.let_go(target, stream) {
            Ok(old) => old,
            Err(error) => {
                self.asides.finish(&target.id, &target.device);
                let error =
                    error.context("the image needs them no more, but images below it stay open");
                if let Some(job) = done.job.take() {
                    job.finish(Err(error.to_string()));
                }
                return;
            }
        };
        let mark = target.clone();
        // Who knows of the end finds the images below closed.
        let close = move || {
            drop(old);
            done
        };
        let started = self.holding("close", close, move |driver, done| {
            driver.asides.finish(&mark.id, &mark.device);
            drop(done);
        });
        if started.is_err() {
            self.asides.finish(&target.id, &target.device);
        }
    }

    /// Has the disk go on without the images that it needs no more; what it was on.
    fn let_go(&mut self, target: &Target, stream: Stream) -> Result<DiskImage, ControlError> {
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
            let cut = driver.while_still(&target.id, finish)?;
            let old = exchange(&devices[0], cut, target)?;
            driver.tell_of_images(std::iter::once(&target.id));
            Ok(old)
        })?;
        Ok(old)
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
    let step = |at| {
        let copied = stream.step(at);
        copied.map_err(|error| format!("at byte {at}: {}", chain(&error)))
    };
    go_through(job, (target, Instant::now()), stream.size(), step)?;
    if !job.commit() {
        return Err("it was cancelled".to_owned());
    }
    stream.name().map_err(|error| chain(&error))
}

/// Has the disk go on with the shorter chain. The device is stopped.
fn exchange(device: &VirtioPci, cut: Cut, target: &Target) -> Result<DiskImage, ControlError> {
    let image = DiskImage::of(cut.disk(), &target.path, &target.options);
    let old = device
        .exchange_disk(image)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    cut.keep();
    Ok(old)
}
