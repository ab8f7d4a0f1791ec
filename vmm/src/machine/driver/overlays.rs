//! The command `vm.disk-snapshot`: new overlays on disks, all at one instant or none.
//!
//! ```text
//!   beside, while the guest runs      on the control thread                       beside
//!   overlays made and opened ───►  vCPUs stop, the disks' queues stop   ───►  the guest thaws
//!   what is unwritten written      every disk: switched                       old images written out
//!   the guest's agent freezes      queues and vCPUs go on                     and closed to writers
//! ```
//!
//! Until the last disk is switched every failure puts the old images back, and removes the overlays. Nothing waits for storage
//! while the guest stands still: what an old image has in memory then, the flushes of its overlay write too. A machine that is
//! paused has its disks switched as well.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::wire::{DiskLayer, DiskSnapshotInfo, Quiesce, VmDiskSnapshot};
use api::{
    AgentCommand, AgentReply, Answer, Command, ControlError, ErrorKind, EventKind, PauseReason,
    Reply, VmState,
};
use block::{Attached, Covered, ImageOptions, Overlay};
use devices::Unit;
use virtio::device::{DiskImage, ExchangeError};
use virtio::transport::VirtioPci;

use super::{DRAIN, Driver, SWITCH};
use crate::agent::AgentDesk;
use crate::config::files;
use crate::error::chain;
use crate::machine::fault;
use crate::machine::inbox::ended;
use crate::machine::state::{permits, wrong_state};
use crate::opener::Opener;

/// A disk that is to get an overlay.
struct Target {
    id: String,
    device: Weak<VirtioPci>,
    /// Its present image.
    base: PathBuf,
    /// The overlay.
    path: PathBuf,
    options: ImageOptions,
}

/// What has been made beside the control thread.
struct Made {
    overlays: Vec<Overlay>,
    frozen: Frozen,
}

/// Whether the guest's file systems are frozen.
#[derive(Default)]
struct Frozen {
    /// How many are.
    count: Option<u64>,
    /// Why not, where they were to be.
    error: Option<String>,
}

/// What came of making all overlays.
type Making = Result<Made, ControlError>;

impl Driver {
    /// Puts new overlays on disks.
    pub(super) fn snapshot_disks(&mut self, request: VmDiskSnapshot, answer: Answer) {
        let begun = self.begin_overlays(&request);
        let (targets, make) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let taken: Vec<_> = targets.iter().map(Target::mark).collect();
        let answer = self.asides.wait_with(answer);
        let started = self.holding("overlay", make, move |driver, made: Making| {
            let (overlays, frozen) = match made {
                Ok(Made { overlays, frozen }) => (Ok(overlays), frozen),
                Err(error) => (Err(error), Frozen::default()),
            };
            let switched = overlays.and_then(|overlays| driver.switch(&targets, overlays));
            driver.settle_and_answer(&targets, frozen, switched, answer);
        });
        if let Err(error) = started {
            for (id, device) in taken {
                self.asides.finish(&id, &device);
            }
            self.asides.answer(answer, Err(error));
        }
    }

    /// What is to be made, and by what. The disks are marked as being changed.
    fn begin_overlays(
        &mut self,
        request: &VmDiskSnapshot,
    ) -> Result<(Vec<Target>, impl FnOnce() -> Making + Send + use<>), ControlError> {
        self.check_no_capture()?;
        if request.quiesce == Quiesce::Required && self.state().0 != VmState::Running {
            let message = "the machine is paused: its guest agent cannot freeze file systems now";
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        let targets = self.targets(request)?;
        let devices: Result<Vec<_>, _> = targets
            .iter()
            .map(|target| self.settled_device(&target.id))
            .collect();
        let devices = devices?;
        for (index, device) in devices.iter().enumerate() {
            if let Err(error) = self.asides.begin(device) {
                for begun in devices.iter().take(index) {
                    self.asides.finish(begun.id(), &Arc::downgrade(begun));
                }
                return Err(error);
            }
        }
        let work = self.overlay_work(&targets, &devices, request.quiesce)?;
        Ok((targets, work))
    }

    /// What makes the overlays and has the guest freeze.
    fn overlay_work(
        &self,
        targets: &[Target],
        devices: &[Arc<VirtioPci>],
        quiesce: Quiesce,
    ) -> Result<impl FnOnce() -> Making + Send + use<>, ControlError> {
        let (models, opener) = (self.tools.models, Arc::clone(&self.tools.opener));
        let own = self.ears.consoles.reserved().clone();
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let config = description.config.clone();
        let agent = self.ears.consoles.agent().clone();
        let running = self.state().0 == VmState::Running;
        let wanted: Vec<_> = targets
            .iter()
            .zip(devices)
            .map(|(target, device)| {
                let (base, path) = (target.base.clone(), target.path.clone());
                (Arc::clone(device), base, path, target.options.clone())
            })
            .collect();
        Ok(move || {
            let mut overlays = Vec::new();
            for (device, base, path, options) in wanted {
                files::check_new(&config, models, &opener, &own, (files::OVERLAY, &path))
                    .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
                let made = make(&device, &base, &path, &opener, &options);
                overlays
                    .push(made.map_err(|error| error.context(format!("disk {}", device.id())))?);
            }
            let frozen = match quiesce {
                Quiesce::Off => Frozen::default(),
                _ if !running => Frozen {
                    count: None,
                    error: Some("the machine is paused".to_owned()),
                },
                how => freeze(&agent, how)?,
            };
            Ok(Made { overlays, frozen })
        })
    }

    /// The disks that `request` means.
    fn targets(&self, request: &VmDiskSnapshot) -> Result<Vec<Target>, ControlError> {
        let invalid = |message: String| Err(ControlError::new(ErrorKind::Invalid, message));
        if request.disks.is_empty() {
            return invalid("disks: there is none: name at least one".to_owned());
        }
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let mut targets: Vec<Target> = Vec::new();
        for wanted in &request.disks {
            let (id, path) = (&wanted.id, &wanted.path);
            if targets
                .iter()
                .any(|other| other.id == *id || other.path == *path)
            {
                return invalid(format!("{id}: the disk or its overlay is named twice"));
            }
            if !path.is_absolute() || path.file_name().is_none() {
                let path = path.display();
                return invalid(format!(
                    "{id}: {path}: give the absolute path of a new file"
                ));
            }
            let device = self.settled_device(id)?;
            let config = description.config.disk(id).ok_or_else(|| {
                let message = format!("{id}: it is no disk with an image of its own");
                ControlError::new(ErrorKind::Invalid, message)
            })?;
            targets.push(Target {
                id: id.clone(),
                device: Arc::downgrade(&device),
                options: config.image_options(),
                base: config.path,
                path: path.clone(),
            });
        }
        Ok(targets)
    }

    /// The instant itself.
    fn switch(
        &mut self,
        targets: &[Target],
        overlays: Vec<Overlay>,
    ) -> Result<(DiskSnapshotInfo, Vec<Covered>), ControlError> {
        self.check_no_capture()?;
        let (state, pause) = self.state();
        let command = Command::DiskSnapshot(VmDiskSnapshot {
            disks: Vec::new(),
            quiesce: Quiesce::Off,
        });
        if !permits(state, pause, &command) {
            return Err(wrong_state(state, pause, &command));
        }
        let devices: Result<Vec<_>, _> = targets.iter().map(|target| self.still(target)).collect();
        let devices = devices?;
        let ((old, covered), stall) = self.stall(&devices, |driver| {
            exchange(&devices, overlays)
                .map(|switched| driver.take_up(targets, switched))
                .map_err(|failed| driver.take_up_rest(targets, failed))
        })?;
        // Threads of the old queues end; the images stay.
        drop(old);
        let disks = targets.iter().map(|target| DiskLayer {
            id: target.id.clone(),
            path: target.path.clone(),
            backing: target.base.clone(),
        });
        let info = DiskSnapshotInfo {
            disks: disks.collect(),
            frozen: None,
            quiesce_error: None,
            stall_us: u64::try_from(stall.as_micros()).unwrap_or(u64::MAX),
        };
        Ok((info, covered))
    }

    /// Has `change` exchange the images of devices while neither they nor the guest work. Gives for how long the guest stood
    /// still.
    ///
    /// # Errors
    ///
    /// What `change` fails with; all goes on as it was then.
    pub(super) fn stall<T>(
        &mut self,
        devices: &[Arc<VirtioPci>],
        change: impl FnOnce(&mut Self) -> Result<T, ControlError>,
    ) -> Result<(T, Duration), ControlError> {
        if self.state().0 != VmState::Running {
            return Ok((change(self)?, Duration::ZERO));
        }
        let began = Instant::now();
        self.machine.vcpus().pause();
        let units = devices
            .iter()
            .map(|device| Arc::clone(device) as Arc<dyn Unit>);
        if let Err(error) = self.stop_these(&units.collect::<Vec<_>>(), SWITCH) {
            self.recover();
            return Err(error.to_control());
        }
        let changed = change(self);
        if self.outcome.is_none() {
            self.go_on_after_switch(changed.is_ok())?;
        }
        Ok((changed?, began.elapsed()))
    }

    /// The device of a target, if it is the same as before.
    fn still(&self, target: &Target) -> Result<Arc<VirtioPci>, ControlError> {
        let device = self.settled_device(&target.id)?;
        if !target.device.ptr_eq(&Arc::downgrade(&device)) {
            let message = format!("{}: it is another device now", target.id);
            return Err(ControlError::new(ErrorKind::Conflict, message));
        }
        Ok(device)
    }

    /// From here on an overlay stays.
    fn stay(&mut self, target: &Target, attached: Attached) -> Covered {
        if let Some(description) = &mut self.ears.description {
            description.overlay(&target.id, attached.path(), attached.options());
        }
        attached.keep()
    }

    /// Shows and tells that disks have other images, whether or not they go on with them.
    pub(super) fn tell_of_images<'a>(&mut self, ids: impl Iterator<Item = &'a String>) {
        self.show_devices();
        for id in ids.cloned() {
            self.ears.events.publish(EventKind::DiskUpdated { id });
        }
    }

    /// Takes up overlays of disks that did not get their old images back, where not all could be switched.
    fn take_up_rest(&mut self, targets: &[Target], failed: Unswitched) -> ControlError {
        let Unswitched { mut error, stay } = failed;
        let mut staying = Vec::new();
        for (index, attached) in stay {
            if let Some(target) = targets.get(index) {
                // Flushes write it out.
                drop(self.stay(target, attached));
                error = error.context(format!("disk {} stays on its overlay", target.id));
                staying.push(&target.id);
            }
        }
        self.tell_of_images(staying.into_iter());
        error
    }

    /// From here on the overlays stay. What is given back first closes the old queues.
    fn take_up(
        &mut self,
        targets: &[Target],
        switched: Vec<(Attached, DiskImage)>,
    ) -> (Vec<DiskImage>, Vec<Covered>) {
        let (mut before, mut covered) = (Vec::new(), Vec::new());
        for (target, (attached, old)) in targets.iter().zip(switched) {
            covered.push(self.stay(target, attached));
            before.push(old);
        }
        self.tell_of_images(targets.iter().map(|target| &target.id));
        (before, covered)
    }

    /// Lets the disks and the guest go on, with the old images or the new ones.
    fn go_on_after_switch(&mut self, switched: bool) -> Result<(), ControlError> {
        let Err(error) = self.machine.start_units() else {
            self.go_on();
            return Ok(());
        };
        if let Err(error) = self.stop_units(DRAIN) {
            self.fail("the machine cannot go on", &error);
        } else {
            self.enter(VmState::Paused, Some(PauseReason::Command));
        }
        let how = if switched {
            "what was to be changed has been, but devices do not go on: the machine is paused"
        } else {
            "all is as before, but devices do not go on: the machine is paused"
        };
        Err(error.to_control().context(how))
    }

    /// Answers, once the guest has thawed and what is below the overlays has been written out.
    fn settle_and_answer(
        &mut self,
        targets: &[Target],
        frozen: Frozen,
        switched: Result<(DiskSnapshotInfo, Vec<Covered>), ControlError>,
        answer: u64,
    ) {
        let Frozen { count, error } = frozen;
        let (info, covered) = match switched {
            Ok((info, covered)) => (Ok(info), covered),
            Err(error) => (Err(error), Vec::new()),
        };
        let thawed = count.map(|_| thaw(self.ears.consoles.agent()));
        let ids = targets.iter().map(|target| target.id.clone());
        let covered: Vec<_> = ids.zip(covered).collect();
        let settle = move || {
            let settled: Vec<_> = covered.into_iter().map(written_out).collect();
            (settled, thawed.and_then(|thawed| thawed.recv().ok()))
        };
        let marks: Vec<_> = targets.iter().map(Target::mark).collect();
        let taken = marks.clone();
        let started = self.holding("settle", settle, move |driver, (settled, thawed)| {
            for (id, device) in marks {
                driver.asides.finish(&id, &device);
            }
            let told = info.and_then(|mut info| {
                settled.into_iter().collect::<Result<Vec<()>, _>>()?;
                (info.frozen, info.quiesce_error) = (count, error);
                if let Some(Err(error)) = thawed {
                    info.quiesce_error = Some(format!("not thawed: {error}"));
                }
                Ok(Reply::Overlaid(info))
            });
            driver.asides.answer(answer, told);
        });
        if let Err(error) = started {
            for (id, device) in taken {
                self.asides.finish(&id, &device);
            }
            self.asides.answer(answer, Err(error));
        }
    }
}

/// Has the guest thaw; what it says.
fn thaw(agent: &AgentDesk) -> Receiver<Result<Reply, ControlError>> {
    let (sender, answer) = channel();
    let told = Box::new(move |told| {
        // Who has asked waits.
        let _ = sender.send(told);
    });
    agent.submit(AgentCommand::FsThaw, told);
    answer
}

/// Writes out what is below the overlay of a disk.
fn written_out((id, covered): (String, Covered)) -> Result<(), ControlError> {
    covered.settle().map_err(|error| {
        let error = ControlError::from_error(fault::of(&error), &error);
        error.context(format!("disk {id} has its new image"))
    })
}

impl Target {
    /// What it is marked by as being changed.
    fn mark(&self) -> (String, Weak<VirtioPci>) {
        (self.id.clone(), Weak::clone(&self.device))
    }
}

/// Makes one overlay, and writes out what its disk has in memory.
fn make(
    device: &VirtioPci,
    base: &Path,
    path: &Path,
    opener: &Arc<Opener>,
    options: &ImageOptions,
) -> Result<Overlay, ControlError> {
    let disk = device.disk().ok_or_else(|| {
        ControlError::new(ErrorKind::Invalid, "it is no disk with an image of its own")
    })?;
    let opener = Arc::clone(opener) as Arc<dyn block::Opener>;
    let overlay = Overlay::create(&*disk, base, path, opener, options)
        .map_err(|error| ControlError::from_error(fault::of(&error), &error))?;
    if let Some(Err(error)) = disk.live().map(|live| live.flush()) {
        let failed = ControlError::from_error(ErrorKind::Failed, &error);
        return Err(failed.context("what it holds cannot be made durable"));
    }
    Ok(overlay)
}

/// Has the guest's agent freeze its file systems. A guest that hangs in that is told to thaw.
fn freeze(agent: &AgentDesk, how: Quiesce) -> Result<Frozen, ControlError> {
    let (sender, answer) = channel();
    let told = Box::new(move |told| {
        // Who has asked waits.
        let _ = sender.send(told);
    });
    agent.submit(AgentCommand::FsFreeze, told);
    let error = match answer.recv() {
        Ok(Ok(Reply::Agent(AgentReply::Filesystems(told)))) => {
            return Ok(Frozen {
                count: Some(told.filesystems),
                error: None,
            });
        }
        Ok(Ok(_)) | Err(_) => {
            ControlError::new(ErrorKind::Failed, "the agent is not asked any more")
        }
        Ok(Err(error)) => error,
    };
    if error.kind == ErrorKind::Failed {
        // Some may be frozen. Whether it answers makes no difference to what is done.
        agent.submit(AgentCommand::FsThaw, Box::new(|_| ()));
    }
    if how == Quiesce::Required {
        return Err(error
            .context("the guest's file systems are not frozen, and the disks are as they were"));
    }
    let error = Some(error.to_string());
    Ok(Frozen { count: None, error })
}

/// Not all disks could be switched.
struct Unswitched {
    error: ControlError,
    /// The overlays of disks that did not get their old images back, and which ones these are.
    stay: Vec<(usize, Attached)>,
}

/// Puts the overlays on all disks, or on none. The devices are stopped. Gives the images before.
fn exchange(
    devices: &[Arc<VirtioPci>],
    overlays: Vec<Overlay>,
) -> Result<Vec<(Attached, DiskImage)>, Unswitched> {
    let mut switched = Vec::new();
    for (device, overlay) in devices.iter().zip(overlays) {
        match attach(device, overlay) {
            Ok(done) => switched.push(done),
            Err(error) => {
                let error = error.context(format!("disk {}", device.id()));
                let before = devices.iter().zip(switched);
                let stay = put_back(before, |device, old| {
                    let done = device.exchange_disk(old);
                    done.inspect_err(|error| {
                        let (id, why) = (device.id(), chain(error));
                        tracing::error!("{id} does not get its image back: {why}");
                    })
                });
                return Err(Unswitched { error, stay });
            }
        }
    }
    Ok(switched)
}

fn attach(device: &VirtioPci, overlay: Overlay) -> Result<(Attached, DiskImage), ControlError> {
    let gone = || ControlError::new(ErrorKind::Failed, "its image is gone");
    let below = device.disk().ok_or_else(gone)?;
    let attached = overlay
        .attach(&*below)
        .map_err(|error| ControlError::from_error(fault::of(&error), &error))?;
    let image = DiskImage::of(attached.disk(), attached.path(), attached.options());
    let old = device
        .exchange_disk(image)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    Ok((attached, old))
}

/// Has `exchange` give devices their old images again. A disk that does not get its own writes to its overlay still, which
/// must not go: those are given back.
fn put_back<D>(
    switched: impl Iterator<Item = (D, (Attached, DiskImage))>,
    exchange: impl Fn(D, DiskImage) -> Result<DiskImage, ExchangeError>,
) -> Vec<(usize, Attached)> {
    let mut stay = Vec::new();
    for (index, (device, (attached, old))) in switched.enumerate() {
        match exchange(device, old) {
            Ok(overlaid) => {
                // Before the old image becomes writable again.
                drop(overlaid);
                drop(attached);
            }
            Err(_) => stay.push((index, attached)),
        }
    }
    stay
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::{Bench, agreed};

    /// An agent that says this when it is to freeze, and what it is asked besides.
    fn agent(answer: &'static str) -> (Bench, Receiver<String>) {
        let (sender, asked) = channel();
        let bench = Bench::new(move |question| {
            agreed(question).unwrap_or_else(|| {
                let name = question["execute"].as_str().unwrap().to_owned();
                let freeze = name.ends_with("freeze-freeze");
                sender.send(name).unwrap();
                let answer = if freeze { answer } else { r#"{"return": 2}"# };
                format!("{answer}\n").into_bytes()
            })
        });
        (bench, asked)
    }

    #[test]
    fn a_guest_that_freezes_is_thawed_later() {
        let (bench, asked) = agent(r#"{"return": 2}"#);
        let frozen = freeze(&bench.desk, Quiesce::Required).unwrap();
        assert_eq!((frozen.count, frozen.error), (Some(2), None));
        assert_eq!(asked.try_iter().count(), 1);
    }

    #[test]
    fn a_guest_that_fails_to_freeze_is_thawed_at_once_and_decides_only_where_it_is_required_to() {
        let refusal = r#"{"error": {"class": "GenericError", "desc": "no such luck"}}"#;
        for (how, goes_on) in [(Quiesce::Required, false), (Quiesce::Auto, true)] {
            let (bench, asked) = agent(refusal);
            let frozen = freeze(&bench.desk, how);
            let said = match frozen {
                Ok(frozen) => {
                    assert!(goes_on && frozen.count.is_none());
                    frozen.error.unwrap()
                }
                Err(error) => {
                    assert!(!goes_on);
                    error.to_string()
                }
            };
            assert!(said.contains("no such luck"), "{said}");
            assert_eq!(asked.recv().unwrap(), "guest-fsfreeze-freeze");
            assert_eq!(asked.recv().unwrap(), "guest-fsfreeze-thaw");
        }
    }

    #[test]
    fn without_an_agent_nobody_is_asked() {
        let frozen = freeze(&AgentDesk::default(), Quiesce::Auto).unwrap();
        assert!(frozen.count.is_none() && frozen.error.is_some());
        let refused = freeze(&AgentDesk::default(), Quiesce::Required);
        assert_eq!(
            refused.err().map(|error| error.kind),
            Some(ErrorKind::Conflict)
        );
    }

    #[test]
    fn an_overlay_stays_with_a_disk_that_does_not_get_its_image_back() {
        let directory = tempfile::tempdir().unwrap();
        let opener = Arc::new(Opener::new()) as Arc<dyn block::Opener>;
        let overlaid = |name: &str| {
            let base = directory.path().join(name);
            std::fs::write(&base, [7; 1 << 16]).unwrap();
            let options = ImageOptions {
                disk: block::DiskOptions {
                    format: Some(block::Format::Raw),
                    ..block::DiskOptions::default()
                },
                ..ImageOptions::default()
            };
            let old = block::open_disk(&base, &*opener, &options).unwrap();
            let path = base.with_extension("over");
            let made = Overlay::create(&*old, &base, &path, Arc::clone(&opener), &options);
            let attached = made.unwrap().attach(&*old).unwrap();
            let disk = attached.disk();
            let image = |disk| DiskImage {
                disk,
                path: base.clone(),
                format: None,
                backing: options.backing,
            };
            (image(disk), (attached, image(old)))
        };
        let stay = put_back(["a", "b"].map(overlaid).into_iter(), |overlay, old| {
            if old.path.ends_with("a") {
                return Err(ExchangeError::NoDisk);
            }
            Ok(overlay)
        });
        assert_eq!(stay.len(), 1);
        let over = |name: &str| directory.path().join(name).exists();
        assert!(over("a.over") && !over("b.over"));
        for (index, attached) in stay {
            assert_eq!(index, 0);
            attached.keep().settle().unwrap();
        }
        assert!(over("a.over"));
    }
}
