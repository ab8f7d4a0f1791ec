//! A machine that comes from another monitor: it has been built, has not run, and a thread of its own takes memory and state into it
//! ([`crate::migrate::destination`]), for which this one does what changes it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use api::wire::MigrationOrder;
use api::{Answer, ControlError, ErrorKind, EventKind, ExitReason, PauseReason, Reply, VmState};
use block::{Awaited, Disk, DiskInfo, ImageOptions, open_disk};
use migration::SectionSet;
use migration::transport::pages::PageSink;
use migration::transport::protocol::Locks;
use migration::transport::samples::Samples;
use virtio::device::DiskImage;

use super::fetching::Fetching;
use super::{Desk, Driver, Outcome};
use crate::config::GuestAction;
use crate::config::restored::Renewal;
use crate::error::chain;
use crate::machine::MachineError;
use crate::memory::missing::Missing;
use crate::memory::still::RamParts;
use crate::migrate::board::Migration;
use crate::migrate::destination::{Arriving, Caller, take};
use crate::migrate::facts::{features_lacking, refuse};
use crate::migrate::memory::Arriving as Memory;
use crate::migrate::status::Status;
use crate::migrate::storage::coming::Landings;
use crate::monitor::JobHandle;
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// What a driver needs to know of a machine that comes.
pub struct Coming {
    /// Who sends it.
    pub caller: Caller,
    /// Where it can be seen how far it is.
    pub status: Arc<Status>,
    /// The job.
    pub job: JobHandle,
    /// What its disks are known to be.
    pub disks: Vec<(String, DiskInfo)>,
    /// What can be seen of their locks, which the other machine has.
    pub locks: Locks,
}

impl Coming {
    /// The machine is not taken, for this reason.
    pub fn refuse(self, reason: &str) {
        self.caller.refuse(&[], reason);
        self.status.fail(reason);
        self.job.finish(Err(reason.to_owned()));
    }
}

/// A machine that is not here yet.
pub(super) struct Arrival {
    /// Until a thread has it.
    coming: Option<Box<Coming>>,
    status: Arc<Status>,
    /// Who waits for it.
    answer: Option<Answer>,
    /// Why it does not come.
    failed: Option<String>,
}

/// A disk whose image is still with the other machine.
struct Absent {
    id: String,
    info: DiskInfo,
    path: PathBuf,
    options: ImageOptions,
}

/// What is told of a machine that has ended.
const GONE: &str = "the machine has ended";
/// What is told of one that may run in part.
const BEGUN: &str = "it has begun here, and could not be stopped again";

impl Driver {
    /// The machine does not begin at power-on: it comes.
    pub fn begin_from(&mut self, coming: Box<Coming>) {
        self.arrival = Some(Arrival {
            status: Arc::clone(&coming.status),
            coming: Some(coming),
            answer: None,
            failed: None,
        });
    }

    /// Tells who has booted the machine that it has been, or keeps the answer until it is here.
    pub(super) fn answer_booted(&mut self, booted: Option<Answer>) {
        match (&mut self.arrival, booted) {
            (Some(arrival), booted) => arrival.answer = booted,
            (None, Some(booted)) => booted(Ok(Reply::Done)),
            (None, None) => {}
        }
    }

    /// The machine has ended: where it never came, who waited is `refused`, and it has never run.
    pub(super) fn end_arrival(
        &mut self,
        outcome: Result<Outcome, MachineError>,
        refused: &mut Option<(Answer, ControlError)>,
    ) -> Result<Outcome, MachineError> {
        let Some(arrival) = self.arrival.take() else {
            return outcome;
        };
        let reason = arrival.failed.unwrap_or_else(|| GONE.to_owned());
        // A thread that still waits is to end.
        let _ended = arrival.status.order(MigrationOrder::Cancel);
        self.parting = Some(arrival.status);
        let error = ControlError::new(ErrorKind::Failed, reason);
        *refused = arrival.answer.map(|answer| (answer, error));
        outcome.map(|outcome| Outcome {
            failed_to_boot: true,
            next: GuestAction::Exit,
            ..outcome
        })
    }

    /// Has a thread take what comes, into the machine which has been built.
    pub(super) fn begin_to_receive(&mut self) -> Result<(), MachineError> {
        let coming = self
            .arrival
            .as_mut()
            .and_then(|arrival| arrival.coming.take());
        let Some(coming) = coming else {
            return Ok(());
        };
        let Coming {
            caller,
            status,
            mut job,
            disks,
            locks,
        } = *coming;
        let lacking = features_lacking(&caller.offer.facts, &self.machine);
        if !lacking.is_empty() {
            let reason = refuse(&lacking);
            caller.refuse(&lacking, "");
            status.fail(&reason);
            job.finish(Err(reason.clone()));
            return Err(MachineError::NotTaken { reason });
        }
        let description = self.ears.description.as_ref();
        let config = description.map(|description| description.config.clone());
        let absent = disks.into_iter().filter_map(|(id, info)| {
            let disk = config.as_ref()?.disk(&id)?;
            Some(Absent {
                id,
                info,
                options: disk.image_options(),
                path: disk.path,
            })
        });
        let paused = caller.offer.paused;
        let guest = Arriver {
            desk: self.desk(),
            absent: absent.collect(),
            locks,
            landings: caller.landings.clone(),
            opener: Arc::clone(&self.tools.opener),
            paused,
            ram: self.machine.ram_parts(),
            memory: Arc::new(Memory::new(self.machine.memory_map())),
            missing: None,
            samples: Vec::new(),
            begun: Arc::default(),
        };
        let run = move || {
            let watched = Arc::clone(&status);
            take(caller, Box::new(guest), status, || {
                watched.report_to(&mut job);
            });
            let info = watched.info();
            let result = info.error.clone().map_or(Ok(()), Err);
            job.migrated(info);
            job.finish(result);
        };
        // For readers it is there and stands.
        self.enter(VmState::Paused, Some(PauseReason::Migration));
        let started = Builder::new(Kind::Job)
            .name("receive".to_owned())
            .spawn(run);
        started.map(drop).map_err(|source| {
            let what = "no thread for a machine that comes";
            MachineError::Host { what, source }
        })
    }

    fn load_arrived(&mut self, set: SectionSet, paused: bool) -> Result<(), String> {
        self.check_arriving()?;
        let renewal = Renewal {
            // What has passed since its pause has passed for the guest, too.
            clock: !paused,
            ..Renewal::default()
        };
        let loaded = self.machine.take_over(set, &renewal);
        loaded.map_err(|error| chain(&error))
    }

    fn check_arriving(&self) -> Result<(), String> {
        if self.arrival.is_none() || self.outcome.is_some() {
            return Err(GONE.to_owned());
        }
        Ok(())
    }

    /// Puts devices on other images, all or none; the ones before are given back.
    pub(super) fn exchange(
        &self,
        images: Vec<(String, DiskImage)>,
    ) -> Result<Vec<DiskImage>, String> {
        let mut before: Vec<(String, DiskImage)> = Vec::new();
        for (id, image) in images {
            let device = self.settled_device(&id).map_err(|error| error.to_string());
            let exchanged = device.and_then(|device| {
                device
                    .exchange_disk(image)
                    .map_err(|error| error.to_string())
            });
            match exchanged {
                Ok(old) => before.push((id, old)),
                Err(error) => {
                    for (id, image) in before {
                        let device = self.settled_device(&id).ok();
                        // It was there a moment ago.
                        let _put_back = device.map(|device| device.exchange_disk(image));
                    }
                    return Err(format!("disk {id}: {error}"));
                }
            }
        }
        Ok(before.into_iter().map(|(_, image)| image).collect())
    }

    fn run_arrived(
        &mut self,
        (paused, begun): (bool, &AtomicBool),
        missing: Option<Arc<Missing>>,
    ) -> Result<(), String> {
        self.check_arriving()?;
        begun.store(true, Ordering::SeqCst);
        let status = self.arrival.as_ref().map(|a| Arc::clone(&a.status));
        let fetching = missing.zip(status);
        let fetching = fetching.map(|(missing, status)| Fetching::new(missing, status));
        if paused {
            self.enter(VmState::Paused, Some(PauseReason::Command));
        } else {
            // What has been started can be stopped alone.
            let started = self.machine.start_clock();
            let started = started.and_then(|()| self.machine.start_units());
            if let Err(error) = started {
                match self.stop_units(super::SWITCH) {
                    Ok(()) => begun.store(false, Ordering::SeqCst),
                    // Some of it may run.
                    Err(error) => {
                        tracing::error!("a machine that does not start: {}", chain(&error));
                    }
                }
                return Err(chain(&error));
            }
            self.go();
        }
        self.fetching = fetching;
        self.ears.events.publish(EventKind::Restored);
        let answer = self.arrival.take().and_then(|arrival| arrival.answer);
        answer
            .into_iter()
            .for_each(|answer| answer(Ok(Reply::Done)));
        Ok(())
    }

    fn not_arriving(&mut self, reason: String) {
        if let Some(arrival) = &mut self.arrival {
            arrival.failed = Some(reason);
            self.finish(ExitReason::Stopped, None);
        }
    }
}

/// The machine, for the thread that takes it.
struct Arriver {
    desk: Desk,
    absent: Vec<Absent>,
    locks: Locks,
    /// Images that were made here.
    landings: Option<Arc<Landings>>,
    opener: Arc<Opener>,
    paused: bool,
    ram: RamParts,
    memory: Arc<Memory>,
    /// What comes while it runs.
    missing: Option<Arc<Missing>>,
    /// What its disks hold at the source.
    samples: Vec<Samples>,
    /// It may run, or have run.
    begun: Arc<AtomicBool>,
}

impl Arriver {
    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Driver) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        let done = self.desk.ask(work);
        done.unwrap_or_else(|| Err(GONE.to_owned()))
    }

    fn open(&self, absent: &Absent) -> Result<DiskImage, String> {
        let Absent {
            id,
            info,
            path,
            options,
        } = absent;
        let made = self.landings.as_ref().and_then(|made| made.disk(id));
        let opened = made.map_or_else(|| open_disk(path, &*self.opener, options), Ok);
        let disk = opened.map_err(|error| format!("disk {id}: {}", chain(&error)))?;
        let found = disk.info();
        let is_alike = (found.size, found.read_only) == (info.size, info.read_only)
            && found.logical_block <= info.logical_block
            && (found.discard || !info.discard);
        if !is_alike {
            return Err(format!(
                "disk {id}: {} is not what the source has: {:?}, and not {info:?}",
                path.display(),
                found
            ));
        }
        Ok(absent.image(disk))
    }
}

impl Arriver {
    /// That an image is the one that the source has had, as far as that has told.
    fn compare(&self, id: &str, image: &DiskImage) -> Result<(), String> {
        let told = self.samples.iter().find(|told| told.disk == id);
        let (Some(told), Some(live)) = (told, image.disk.live()) else {
            return Ok(());
        };
        let path = image.path.display();
        match told.differs(|offset| live.sample(offset)) {
            Ok(None) => Ok(()),
            Ok(Some(offset)) => Err(format!(
                "disk {id}: {path} is not the image that the source has as {}: they differ at byte {offset}: share that one with the \
                 destination, or say there where it is (--disk id={id},path=PATH)",
                told.path
            )),
            Err(error) => Err(format!("disk {id}: {path}: {error}")),
        }
    }
}

impl Absent {
    fn image(&self, disk: Arc<dyn Disk>) -> DiskImage {
        DiskImage::of(disk, &self.path, &self.options)
    }
}

impl Arriving for Arriver {
    fn memory(&self) -> Arc<dyn PageSink + Send + Sync> {
        Arc::clone(&self.memory) as Arc<dyn PageSink + Send + Sync>
    }

    fn miss(&mut self, runs: &[(u64, u64)]) -> Result<Arc<Missing>, String> {
        let missing = Missing::begin(&self.ram, runs, &self.opener);
        let missing =
            missing.map_err(|error| format!("memory cannot come while the guest runs: {error}"))?;
        self.memory.follow(Some(Arc::clone(&missing)));
        self.missing = Some(Arc::clone(&missing));
        Ok(missing)
    }

    fn stand(&mut self) {
        // One that has ended stands.
        let _ended = self.desk.ask(Driver::stand_for_pages);
    }

    fn go_on(&mut self) -> bool {
        self.desk.ask(Driver::go_on_with_pages).unwrap_or(true)
    }

    fn is_whole(&mut self) {
        let _ended = self.desk.ask(Driver::is_whole);
    }

    fn load(&mut self, sections: &[u8]) -> Result<Locks, String> {
        let set = SectionSet::from_bytes(sections).map_err(|error| chain(&error))?;
        let paused = self.paused;
        self.ask(move |driver| driver.load_arrived(set, paused))?;
        Ok(self.locks)
    }

    fn unload(&mut self) -> Result<(), String> {
        self.memory.follow(None);
        self.missing = None;
        self.ask(|driver| {
            driver.check_arriving()?;
            driver.machine.forget_state().map_err(|error| chain(&error))
        })
    }

    fn expect(&mut self, samples: Vec<Samples>) {
        self.samples = samples;
    }

    fn take_locks(&mut self) -> Result<(), String> {
        self.landings.iter().for_each(|made| made.close());
        let open = |absent: &Absent| Ok((absent.id.clone(), self.open(absent)?));
        let images: Result<Vec<_>, String> = self.absent.iter().map(open).collect();
        let images = images?;
        for (id, image) in &images {
            self.compare(id, image)?;
        }
        for (id, image) in &images {
            // A source that gets its locks back is to know that the guest may have run here.
            let marked = image.disk.live().map_or(Ok(()), |live| live.mark());
            marked.map_err(|error| format!("disk {id}: {error}"))?;
        }
        self.ask(move |driver| driver.exchange(images)).map(drop)
    }

    fn give_back(&mut self) -> Result<(), String> {
        if self.begun.load(Ordering::SeqCst) {
            return Err(BEGUN.to_owned());
        }
        let awaited = |absent: &Absent| {
            let image = absent.image(Arc::new(Awaited::new(absent.info.clone())));
            (absent.id.clone(), image)
        };
        let images: Vec<_> = self.absent.iter().map(awaited).collect();
        // They are closed here, before the other side hears of it.
        let closed = self.desk.ask(move |driver| driver.exchange(images));
        match closed {
            Some(closed) => closed.map(drop),
            // A machine that has ended before it ran never will, and its images go with it. A source whose locks are the same waits for them.
            None => Ok(()),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        let paused = self.paused;
        let keep = |kept| self.landings.iter().for_each(|made| made.keep(kept));
        keep(true);
        let missing = self.missing.clone();
        let begun = Arc::clone(&self.begun);
        let run = self.ask(move |driver| driver.run_arrived((paused, &begun), missing));
        match &run {
            Ok(()) => self.landings.iter().for_each(|made| made.let_go()),
            Err(_) => keep(false),
        }
        run
    }

    fn discard(&mut self, reason: &str) {
        let reason = reason.to_owned();
        let _ended = self.desk.ask(move |driver| driver.not_arriving(reason));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use virtio::memory::GuestMap;
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::machine::inbox::inbox;
    use crate::memory::{GuestRam, RamSpec};

    /// What takes a machine that has ended already.
    fn of_nothing(desk: Desk) -> Arriver {
        let ram = GuestRam::new(&RamSpec {
            size: 2 << 20,
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        });
        let ram = ram.unwrap();
        Arriver {
            desk,
            absent: Vec::new(),
            locks: Locks::Separate,
            landings: None,
            opener: Arc::new(Opener::new()),
            paused: false,
            memory: Arc::new(Memory::new(GuestMap::clone(&ram.memory().memory()))),
            ram: ram.parts(),
            missing: None,
            samples: Vec::new(),
            begun: Arc::default(),
        }
    }

    #[test]
    fn a_machine_that_ends_before_it_runs_never_did_and_one_that_may_have_run_is_not_told_so() {
        let (mailbox, _inbox) = inbox().unwrap();
        let mut guest = of_nothing(Desk::new(mailbox, Weak::new()));
        // The destination says that it has failed, and the guest goes on at the source.
        assert_eq!(guest.run(), Err(GONE.to_owned()));
        assert_eq!(guest.give_back(), Ok(()));
        guest.begun.store(true, Ordering::SeqCst);
        assert_eq!(guest.give_back(), Err(BEGUN.to_owned()));
    }
}
