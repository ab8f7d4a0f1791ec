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

mod pace;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

use api::wire::{MirrorFormat, VmDiskCommit, VmDiskMirror, VmDiskStream};
use api::{Answer, ControlError, ErrorKind, Reply};
use block::{
    Absorb, Backup, BackupError, Cut, Disk, Emptied, Format, ImageOptions, Merge, Merged, Mirror,
    MirrorError, MirrorTarget,
};
use virtio::device::DiskImage;
use virtio::transport::VirtioPci;

pub(super) use self::pace::go_through;
use self::pace::{catch_up, copy};
use super::Driver;
use super::streams::no_disk;
use crate::config::files;
use crate::error::chain;
use crate::machine::fault;
use crate::machine::inbox::ended;
use crate::monitor::JobHandle;
use crate::opener::Opener;

/// With so little left to be copied the guest may stand still for it, in bytes.
const ENOUGH: u64 = 8 << 20;

/// The disk of a job.
#[derive(Clone)]
pub(super) struct Target {
    pub id: String,
    pub device: Weak<VirtioPci>,
    pub path: PathBuf,
    pub options: ImageOptions,
    /// The most bytes to be copied in a second.
    speed: Option<u64>,
}

/// A job whose end is to be told when it is left, whatever happens.
struct Ending {
    job: Option<JobHandle>,
    result: Result<(), String>,
}

impl Ending {
    /// What is dropped before the disk has gone on is not done.
    fn of(job: JobHandle) -> Self {
        Self {
            job: Some(job),
            result: Err("the machine has ended".to_owned()),
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(job) = self.job.take() {
            let result = std::mem::replace(&mut self.result, Ok(()));
            job.finish(result);
        }
    }
}

/// What a job does.
pub(super) enum Work {
    /// Images of the disk's chain are merged.
    Merge(Box<Merge>),
    /// It is copied to another place, where it then goes on or not.
    Mirror(Box<Mirror>, bool),
    /// What it holds at the beginning is copied.
    Backup(Box<Backup>),
    /// An image of the disk's chain takes in what is below it.
    Absorb(Box<Absorb>),
}

/// What the disk goes on with.
enum Next {
    /// Its own image, on another chain.
    Chain(Cut),
    /// Another image, where that is and what it is. The one before is empty, or needed no more.
    Other(Arc<dyn Disk>, PathBuf, Format, Option<Emptied>),
    /// What it is on.
    Same(Arc<dyn Disk>),
}

/// What a thread closes at the end.
struct Rest {
    /// What the disk was on.
    before: Option<DiskImage>,
    work: Work,
    /// The disk's image before.
    emptied: Option<Emptied>,
}

impl Rest {
    /// Of a job after which the disk is on what it was on.
    fn of(work: Work) -> Self {
        Self {
            before: None,
            work,
            emptied: None,
        }
    }

    fn close(self) -> Result<(), String> {
        drop(self.before);
        match self.emptied {
            Some(emptied) => {
                drop(self.work);
                emptied.free();
                Ok(())
            }
            None => self.work.settle(),
        }
    }
}

impl Work {
    fn kind(&self) -> &'static str {
        match self {
            Self::Merge(_) => "commit",
            Self::Mirror(..) => "mirror",
            Self::Backup(_) => "backup",
            Self::Absorb(_) => "stream",
        }
    }

    /// Begins. The disk's queues have ended.
    fn begin(&mut self, go: &dyn Fn() -> bool) -> Result<Next, ControlError> {
        match self {
            Self::Merge(merge) => {
                let cut = merge.begin(go).map_err(|error| failed(&error))?;
                Ok(Next::Chain(cut))
            }
            Self::Mirror(mirror, _) => Ok(Next::Same(mirror.begin())),
            Self::Backup(backup) => {
                let guarded = backup.begin(go).map_err(|error| failed(&error))?;
                Ok(Next::Same(guarded))
            }
            Self::Absorb(absorb) => {
                let cut = absorb.begin(go).map_err(|error| failed(&error))?;
                Ok(Next::Chain(cut))
            }
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Merge(merge) => merge.size(),
            Self::Mirror(mirror, _) => mirror.size(),
            Self::Backup(backup) => backup.size(),
            Self::Absorb(absorb) => absorb.size(),
        }
    }

    fn step(&self, at: u64) -> std::io::Result<(u64, u64)> {
        match self {
            Self::Merge(merge) => merge.step(at),
            Self::Mirror(mirror, _) => mirror.step(at),
            Self::Backup(backup) => backup.step(at),
            Self::Absorb(absorb) => absorb.step(at),
        }
    }

    fn catch_up(&self, at: u64) -> std::io::Result<Option<(u64, u64)>> {
        match self {
            Self::Merge(merge) => merge.catch_up(at),
            Self::Mirror(mirror, _) => mirror.catch_up(at),
            Self::Backup(_) => Ok(None),
            Self::Absorb(_) => Ok(None),
        }
    }

    fn left(&self) -> u64 {
        match self {
            Self::Merge(merge) => merge.left(),
            Self::Mirror(mirror, _) => mirror.left(),
            Self::Backup(_) => 0,
            Self::Absorb(_) => 0,
        }
    }

    fn hold_up(&self, bytes: u64) {
        match self {
            Self::Merge(merge) => merge.hold_up(bytes),
            Self::Mirror(mirror, _) => mirror.hold_up(bytes),
            Self::Backup(_) => (),
            Self::Absorb(_) => {}
        }
    }

    /// All but a little has been copied: what can be done before the guest stands still. What appears then cannot be cancelled any more.
    fn prepare(&mut self, job: &JobHandle) -> Result<(), String> {
        match self {
            Self::Merge(merge) => merge.name().map_err(|error| chain(&error)),
            Self::Mirror(mirror, _) => mirror
                .flush()
                .map_err(|error| chain(&MirrorError::Copy(error))),
            Self::Backup(backup) => {
                let prepared = backup.prepare();
                prepared.map_err(|error| chain(&BackupError::Copy(error)))?;
                if !job.commit() {
                    return Err("it was cancelled".to_owned());
                }
                backup.name().map_err(|error| chain(&error))
            }
            Self::Absorb(absorb) => absorb.name().map_err(|error| chain(&error)),
        }
    }

    /// Ends. The disk's queues have ended.
    fn finish(&mut self, go: &dyn Fn() -> bool) -> Result<Next, ControlError> {
        match self {
            Self::Merge(merge) => {
                let merged = merge.finish(go).map_err(|error| failed(&error))?;
                match merged {
                    Merged::Shorter(cut) => Ok(Next::Chain(cut)),
                    Merged::Base(disk, emptied) => {
                        let (path, format) = merge.moves_to().ok_or_else(ended)?;
                        Ok(Next::Other(disk, path.to_owned(), format, Some(emptied)))
                    }
                }
            }
            Self::Mirror(mirror, switch) => {
                let there = mirror.finish(go).map_err(|error| failed(&error))?;
                let MirrorTarget { path, format, .. } = mirror.target().clone();
                Ok(if *switch {
                    Next::Other(there, path, format, None)
                } else {
                    Next::Same(mirror.given_up())
                })
            }
            Self::Backup(backup) => {
                backup.finish(go).map_err(|error| failed(&error))?;
                Ok(Next::Same(backup.given_up()))
            }
            Self::Absorb(absorb) => {
                let cut = absorb.finish(go).map_err(|error| failed(&error))?;
                Ok(Next::Chain(cut))
            }
        }
    }

    /// Where it writes.
    fn place(&self) -> Option<&Path> {
        match self {
            Self::Merge(merge) => Some(merge.base()),
            Self::Mirror(mirror, _) => Some(&mirror.target().path),
            Self::Backup(backup) => Some(backup.path()),
            // What fails may be of any image of the chain.
            Self::Absorb(_) => None,
        }
    }

    /// What is told of a part that could not be copied.
    fn failed(&self, at: u64, error: &std::io::Error) -> String {
        told(self.place(), at, error)
    }

    /// What is there by now, whatever becomes of the rest.
    fn made(&self) -> Option<PathBuf> {
        match self {
            Self::Backup(backup) => Some(backup.path().to_owned()),
            Self::Merge(_) | Self::Mirror(..) | Self::Absorb(_) => None,
        }
    }

    /// The disk as it is without the job.
    fn given_up(&self) -> Option<Arc<dyn Disk>> {
        match self {
            Self::Merge(merge) => merge.given_up(),
            Self::Mirror(mirror, _) => Some(mirror.given_up()),
            Self::Backup(backup) => Some(backup.given_up()),
            // It notes nothing.
            Self::Absorb(_) => None,
        }
    }

    /// Closes what is needed no more, and lets others have it.
    fn settle(self) -> Result<(), String> {
        match self {
            Self::Merge(merge) => merge.settle().map_err(|error| chain(&error)),
            Self::Mirror(mirror, _) => {
                drop(mirror);
                Ok(())
            }
            Self::Backup(backup) => {
                drop(backup);
                Ok(())
            }
            Self::Absorb(absorb) => absorb.settle().map_err(|error| chain(&error)),
        }
    }
}

/// What is told where a part could not be copied that begins at the byte `at`, to what is at `place`.
fn told(place: Option<&Path>, at: u64, error: &std::io::Error) -> String {
    let place = place.map_or_else(String::new, |place| format!("{}: ", place.display()));
    let mend = match error.kind() {
        std::io::ErrorKind::StorageFull => ": make room there, and begin it again",
        _ => "",
    };
    format!("{place}at byte {at}: {}{mend}", chain(error))
}

pub(super) fn failed<E: std::error::Error + 'static>(error: &E) -> ControlError {
    ControlError::from_error(fault::of(error), error)
}

/// What a client means.
pub(super) fn format(asked: MirrorFormat) -> Format {
    match asked {
        MirrorFormat::Raw => Format::Raw,
        MirrorFormat::Qcow2 => Format::Qcow2,
    }
}

impl Driver {
    /// Begins to merge images of a disk down. The answer is the job.
    pub(super) fn commit_disk(&mut self, request: VmDiskCommit, answer: Answer) {
        let look = move |disk: Arc<dyn Disk>, target: &Target, opener: Arc<Opener>| {
            let which = (request.top.as_deref(), request.base.as_deref());
            let merge = Merge::of(&*disk, &target.path, which, opener, &target.options);
            Ok(Work::Merge(Box::new(
                merge.map_err(|error| failed(&error))?,
            )))
        };
        self.copy_disk((request.id, request.speed), look, answer);
    }

    /// Begins to take what lies below an image of a disk's chain into that. The answer is the job.
    pub(super) fn absorb_in_disk(&mut self, request: VmDiskStream, answer: Answer) {
        let VmDiskStream {
            id,
            top,
            base,
            speed,
        } = request;
        if base.is_some() {
            let message = "top and base: what is below an image in the middle is taken in whole";
            return answer(Err(ControlError::new(ErrorKind::Invalid, message)));
        }
        let look = move |disk: Arc<dyn Disk>, target: &Target, opener: Arc<Opener>| {
            let taker = top.unwrap_or_default();
            let absorb = Absorb::of(&*disk, &target.path, &taker, &*opener, &target.options);
            Ok(Work::Absorb(Box::new(
                absorb.map_err(|error| failed(&error))?,
            )))
        };
        self.copy_disk((id, speed), look, answer);
    }

    /// Begins to copy a disk to another place. The answer is the job.
    pub(super) fn mirror_disk(&mut self, request: VmDiskMirror, answer: Answer) {
        let Some(description) = &self.ears.description else {
            return answer(Err(ended()));
        };
        if !request.path.is_absolute() || request.path.file_name().is_none() {
            let message = format!("{}: give an absolute path", request.path.display());
            return answer(Err(ControlError::new(ErrorKind::Invalid, message)));
        }
        let (config, models) = (description.config.clone(), self.tools.models);
        let own = self.ears.consoles.reserved().clone();
        let target = MirrorTarget {
            path: request.path,
            format: format(request.format),
            existing: request.existing,
        };
        let look = move |disk: Arc<dyn Disk>, wanted: &Target, opener: Arc<Opener>| {
            let place = (files::COPY, target.path.as_path());
            files::check_new(&config, models, &opener, &own, place)
                .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            let mirror = Mirror::of(disk, target, opener, &wanted.options);
            let mirror = mirror.map_err(|error| failed(&error))?;
            Ok(Work::Mirror(Box::new(mirror), request.switch))
        };
        self.copy_disk((request.id, request.speed), look, answer);
    }

    /// Begins a job on the disk `id`, for which `look` opens what it needs.
    pub(super) fn copy_disk(
        &mut self,
        (id, speed): (String, Option<u64>),
        look: impl FnOnce(Arc<dyn Disk>, &Target, Arc<Opener>) -> Result<Work, ControlError>
        + Send
        + 'static,
        answer: Answer,
    ) {
        let (target, device) = match self.begin_copy(&id, speed) {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let answer = self.asides.wait_with(answer);
        let (opener, wanted) = (Arc::clone(&self.tools.opener), target.clone());
        let open = move || {
            let disk = device.disk().ok_or_else(|| no_disk(&wanted.id))?;
            // What a job before could not put back is left out.
            let disk = disk.plain().unwrap_or(disk);
            let opened = look(disk, &wanted, opener);
            opened.map_err(|error| error.context(format!("disk {}", wanted.id)))
        };
        let mark = target.clone();
        let started = self.holding("copy", open, move |driver, opened| {
            driver.when_free(move |driver| {
                let (id, device) = (target.id.clone(), Weak::clone(&target.device));
                let begun = opened.and_then(|work| driver.start_copy(target, work));
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

    /// What a job on the disk `id` works on, which is the job's from now on.
    pub(super) fn begin_copy(
        &mut self,
        id: &str,
        speed: Option<u64>,
    ) -> Result<(Target, Arc<VirtioPci>), ControlError> {
        if speed == Some(0) {
            let message = "speed: 0 bytes in a second: leave it out for no limit";
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let device = self.settled_device(id)?;
        let config = description.config.disk(id).ok_or_else(|| no_disk(id))?;
        self.asides.begin_job(&device)?;
        let target = Target {
            id: id.to_owned(),
            device: Arc::downgrade(&device),
            options: config.image_options(),
            path: config.path,
            speed,
        };
        Ok((target, device))
    }

    /// Puts the disk on what can be copied from, and has a thread do that.
    fn start_copy(&mut self, target: Target, mut work: Work) -> Result<Reply, ControlError> {
        let devices = [self.same(&target)?];
        let begin = move |go: &dyn Fn() -> bool| {
            let next = work.begin(go)?;
            Ok((work, next))
        };
        let mut begun = None;
        let stalled = self.stall(&devices, |driver| {
            let (work, next) = driver.while_still(&target.id, begin)?;
            let (old, _) = driver.go_on_with(&devices[0], next, &target)?;
            begun = Some(work);
            Ok(old)
        });
        let work = match (stalled, begun) {
            (Ok((old, _)), Some(work)) => {
                self.close_beside(old);
                work
            }
            (stalled, begun) => {
                // The disk is where nothing comes of it.
                self.call_off(&target, begun);
                return Err(stalled.err().unwrap_or_else(ended));
            }
        };
        let mut job = self.tools.jobs.begin(work.kind(), work.size());
        let info = job.info();
        let copied = target.clone();
        let plain = work.given_up();
        let copying = move || {
            let mut work = work;
            let copied = copy(&mut job, &mut work, &copied);
            (work, copied, Ending::of(job))
        };
        let id = info.id.clone();
        let disk = target.clone();
        let started = self.holding("copy", copying, move |driver, (work, copied, ending)| {
            driver.when_free(move |driver| driver.copied(target, id, (work, copied, ending)));
        });
        if let Err(error) = started {
            self.put_back(&disk, plain);
            return Err(error);
        }
        self.asides.jobs.push(info.id.clone());
        Ok(Reply::Started(info))
    }

    /// Nothing is being captured, and all has been copied but what the guest has changed while that was waited for.
    fn copied(
        &mut self,
        target: Target,
        id: String,
        (work, copied, mut ending): (Work, Result<(), String>, Ending),
    ) {
        if copied.is_err() || work.left() <= ENOUGH {
            self.asides.jobs.retain(|other| *other != id);
            ending.result = copied;
            return self.finish_copy(&target, work, ending);
        }
        let disk = target.clone();
        let copying = move || {
            let (mut work, mut ending) = (work, ending);
            let copied = match &mut ending.job {
                Some(job) => catch_up(job, &mut work, (&disk, Instant::now(), 0)),
                None => Ok(()),
            };
            (work, copied, ending)
        };
        let mark = target.clone();
        let started = self.holding("copy", copying, move |driver, (work, copied, ending)| {
            driver.when_free(move |driver| driver.copied(target, id, (work, copied, ending)));
        });
        if let Err(error) = started {
            tracing::warn!("disk {}: {error}", mark.id);
            self.asides.finish(&mark.id, &mark.device);
        }
    }

    /// Has the disk go on as before a job that could not begin, and closes what there is of it.
    fn call_off(&mut self, target: &Target, work: Option<Work>) {
        let Some(work) = work else {
            return;
        };
        self.put_back(target, work.given_up());
        let started = self.holding("settle", move || work.settle(), |_, _| {});
        if let Err(error) = started {
            tracing::warn!("disk {}: {error}", target.id);
        }
    }

    /// The device of a job's disk, if it is the same as before.
    pub(super) fn same(&self, target: &Target) -> Result<Arc<VirtioPci>, ControlError> {
        let device = self.settled_device(&target.id)?;
        let same = target.device.ptr_eq(&Arc::downgrade(&device));
        same.then_some(device).ok_or_else(|| no_disk(&target.id))
    }

    fn finish_copy(&mut self, target: &Target, work: Work, mut ending: Ending) {
        let plain = work.given_up();
        let committed = ending.job.as_ref().is_some_and(JobHandle::commit);
        if ending.result.is_ok() && !committed {
            ending.result = Err("it was cancelled".to_owned());
        }
        let rest = if ending.result.is_ok() {
            let made = work.made();
            match self.go_elsewhere(target, work) {
                Ok(rest) => Some(rest),
                Err((work, error)) => {
                    let error = match made {
                        Some(path) => {
                            let path = path.display();
                            error.context(format!(
                                "{path}: the backup is complete, and what comes after it has failed"
                            ))
                        }
                        None => error,
                    };
                    ending.result = Err(error.to_string());
                    work.map(Rest::of)
                }
            }
        } else {
            Some(Rest::of(work))
        };
        if ending.result.is_err() {
            self.put_back(target, plain);
        }
        let close = move || rest.map_or(Ok(()), Rest::close);
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

    /// Has the disk go on where the job has brought it.
    fn go_elsewhere(
        &mut self,
        target: &Target,
        mut work: Work,
    ) -> Result<Rest, (Option<Work>, ControlError)> {
        let devices = match self.same(target) {
            Ok(device) => [device],
            Err(error) => return Err((Some(work), error)),
        };
        let finish = move |go: &dyn Fn() -> bool| {
            let next = work.finish(go);
            Ok((work, next))
        };
        let mut kept = None;
        let mut gone = None;
        let done = self.stall(&devices, |driver| {
            let (work, next) = driver.while_still(&target.id, finish)?;
            let gone_on = next.and_then(|next| driver.go_on_with(&devices[0], next, target));
            match gone_on {
                Ok((before, emptied)) => {
                    driver.tell_of_images(std::iter::once(&target.id));
                    gone = Some(Rest {
                        before: Some(before),
                        work,
                        emptied,
                    });
                    Ok(())
                }
                Err(error) => {
                    kept = Some(work);
                    Err(error)
                }
            }
        });
        match (done, gone) {
            (Ok(_), Some(rest)) => Ok(rest),
            // It is there, whatever keeps the machine from going on: nothing may be written to where it was.
            (Err(error), Some(rest)) => {
                tracing::warn!("disk {} has gone on: {error}", target.id);
                Ok(rest)
            }
            (done, None) => Err((kept, done.err().unwrap_or_else(ended))),
        }
    }

    /// Has the stopped device go on with `next`. What it was on, and what is to be freed.
    fn go_on_with(
        &mut self,
        device: &VirtioPci,
        next: Next,
        target: &Target,
    ) -> Result<(DiskImage, Option<Emptied>), ControlError> {
        match next {
            Next::Chain(cut) => {
                let old = exchange(device, cut.disk(), target)?;
                cut.keep();
                Ok((old, None))
            }
            Next::Same(disk) => Ok((exchange(device, disk, target)?, None)),
            Next::Other(disk, path, format, emptied) => {
                let there = target.at(path, format);
                let old = exchange(device, disk, &there)?;
                if let Some(description) = &mut self.ears.description {
                    description.overlay(&there.id, &there.path, &there.options);
                }
                Ok((old, emptied))
            }
        }
    }

    /// Has the disk go on as before the job, where it can. Where it cannot, the next job does without what this one has left.
    fn put_back(&mut self, target: &Target, plain: Option<Arc<dyn Disk>>) {
        if let Some(plain) = plain
            && let Err(error) = self.go_back(target, plain)
        {
            tracing::warn!("disk {} still notes its changes: {error}", target.id);
        }
    }

    /// Has the disk go on as before the job.
    fn go_back(&mut self, target: &Target, plain: Arc<dyn Disk>) -> Result<(), ControlError> {
        let devices = [self.same(target)?];
        let (old, _) = self.stall(&devices, |_| exchange(&devices[0], plain, target))?;
        self.close_beside(old);
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
}

/// Has the device's requests go to `disk`. It is stopped.
fn exchange(
    device: &VirtioPci,
    disk: Arc<dyn Disk>,
    target: &Target,
) -> Result<DiskImage, ControlError> {
    let image = DiskImage::of(disk, &target.path, &target.options);
    device
        .exchange_disk(image)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn what_could_not_be_copied_is_told_with_its_place_and_what_can_be_done() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let text = told(Some(Path::new("/backup/full.qcow2")), 6 << 20, &full);
        assert!(
            text.starts_with("/backup/full.qcow2: at byte 6291456: "),
            "{text}"
        );
        assert!(
            text.ends_with(": make room there, and begin it again"),
            "{text}"
        );
        let other = told(None, 0, &io::Error::from_raw_os_error(libc::EIO));
        assert!(
            other.starts_with("at byte 0: ") && !other.contains("room"),
            "{other}"
        );
    }
}
