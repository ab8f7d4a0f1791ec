//! The command `vm.snapshot`: a job that writes the machine as it is into a directory.
//!
//! Memory and state are written and synced first, under names that no other snapshot has; the manifest that names them comes
//! last. How the machine is paused, goes on and ends is of all captures ([`super::capture`]).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use api::wire::{SnapshotCompression, SnapshotMode, SnapshotReport};
use api::{Answer, Command, ControlError, ErrorKind, PauseReason, Reply, VmState, wire};
use migration::SectionSet;
use migration::pages::{PAGE, PageIndex, PageWriter, PagesError, Ram};
use serde_json::Value;
use virtio::memory::GuestMap;

use super::Driver;
use super::capture::{Hold, Manner, Plan, path_of};
use super::hints::{self, Free, Round};
use crate::config::{DeviceConfig, files};
use crate::error::chain;
use crate::machine::chain::{DEEPEST, Link, follow};
use crate::machine::coredump::total;
use crate::machine::inbox::ended;
use crate::machine::manifest::{NAME, Parent, Sealed, is_parent_place};
use crate::machine::saving::{Files, new_id};
use crate::machine::snapshot::{SnapshotRam, index_section};
use crate::machine::tracking::{Base, Moment, Ready, TrackError, Tracking};
use crate::machine::{MachineError, fault, sealed};
use crate::memory::still::{LIMIT, RamParts, Still};
use crate::monitor::JobHandle;
use crate::opener::{OpenError, Opener};

/// Why nothing is begun in `directory`.
fn refused(directory: &Path, error: &OpenError) -> ControlError {
    let kind = fault::of(error);
    match error {
        OpenError::Exists { path } if path.ends_with(NAME) => {
            let place = directory.display();
            let message = format!("{place} holds a snapshot already: choose another directory");
            ControlError::new(kind, message)
        }
        error => ControlError::from_error(kind, error),
    }
}

/// What a snapshot is to others.
struct Kin {
    /// Its parent, and how its manifest names that.
    parent: Option<(Base, Parent)>,
    /// It is compared with from its instant on.
    ready: Option<Arc<Ready>>,
}

/// What has been opened for one, and is held still.
type Opened = (Files, Kin, Hold);

/// What is begun beside the control thread.
struct Beginning {
    place: PathBuf,
    id: String,
    /// The parent's directory.
    parent: Option<PathBuf>,
    track: bool,
    /// The machine's, while it is there.
    tracking: Weak<Tracking>,
    /// What is held still.
    ram: Option<RamParts>,
    /// It becomes a template, with these disks.
    template: Option<Vec<sealed::Disk>>,
}

impl Beginning {
    fn run(self, opener: &Opener) -> Result<Opened, ControlError> {
        let Self {
            place,
            id,
            parent,
            track,
            tracking,
            ram,
            template,
        } = self;
        let tracking = || tracking.upgrade().ok_or_else(ended);
        let parent = parent.map(|directory| -> Result<_, ControlError> {
            let base = parent_of(&directory, opener)?;
            let changed = tracking()?.look(&base);
            Ok((base, changed.map_err(|error| refused_parent(&error))?))
        });
        let parent = parent.transpose()?;
        let files = Files::begin(opener, &place, id);
        let mut files = files.map_err(|error| refused(&place, &error))?;
        if let Some(disks) = template {
            let looked = disks.iter().map(|disk| disk.look(opener));
            let looked: Result<Vec<_>, ControlError> = looked.collect();
            files.seal(Sealed {
                disks: looked?.concat(),
            });
        }
        let ready = if track {
            let begun = tracking()?.begin();
            Some(begun.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?)
        } else {
            None
        };
        let (parent, changed) = parent.unzip();
        let hold = ram.ok_or(None).and_then(|ram| {
            let held = Still::begin_some(ram, changed.as_deref(), opener, LIMIT);
            held.map_err(|error| Some(chain(&error)))
        });
        let parent = parent.map(|base| -> Result<_, ControlError> {
            let entry = entry_of(&base, &place, opener)?;
            Ok((base, entry))
        });
        let parent = parent.transpose()?;
        Ok((files, Kin { parent, ready }, hold))
    }
}

/// What is to be the parent: the snapshot in `directory`, all of whose own parents are there.
fn parent_of(directory: &Path, opener: &Opener) -> Result<Base, ControlError> {
    let links = follow(directory, opener).map_err(|error| error.to_control())?;
    if links.len() >= DEEPEST {
        let message = format!(
            "{} needs {DEEPEST} snapshots with itself, which is the most: take a whole one",
            directory.display()
        );
        return Err(ControlError::new(ErrorKind::Conflict, message));
    }
    let mut links = links.into_iter();
    let Link {
        manifest, checksum, ..
    } = links.next().ok_or_else(ended)?;
    Ok(Base {
        id: manifest.id,
        checksum,
        directory: directory.to_owned(),
    })
}

fn refused_parent(error: &TrackError) -> ControlError {
    let kind = match error {
        TrackError::Dirty(_) => ErrorKind::Failed,
        _ => ErrorKind::Conflict,
    };
    ControlError::from_error(kind, error)
}

/// How the manifest of the snapshot in `place` names its parent: by its name, where both lie in one directory.
fn entry_of(base: &Base, place: &Path, opener: &Opener) -> Result<Parent, ControlError> {
    let canonical = |path: &Path| {
        let path = opener.canonical(path);
        path.map_err(|error| ControlError::from_error(fault::of(&error), &error))
    };
    let (parent, own) = (canonical(&base.directory)?, canonical(place)?);
    let beside = parent.parent() == own.parent();
    let text = match (parent.file_name().and_then(|name| name.to_str()), beside) {
        (Some(name), true) => Some(format!("../{name}")),
        _ => parent.to_str().map(str::to_owned),
    };
    let text = text.filter(|text| is_parent_place(text));
    let Some(directory) = text else {
        let message = format!("parent: {}: a manifest cannot name it", parent.display());
        return Err(ControlError::new(ErrorKind::Invalid, message));
    };
    Ok(Parent {
        id: base.id.clone(),
        directory,
        checksum: base.checksum.clone(),
    })
}

/// The directory that a request names as the parent.
fn parent_path(parent: &str) -> Result<PathBuf, ControlError> {
    let wanted = "the absolute path of a snapshot's directory";
    if parent.starts_with('/') {
        path_of(&format!("file://{parent}"), "parent", wanted)
    } else {
        path_of(parent, "parent", wanted)
    }
}

impl Driver {
    /// Begins to write a snapshot, which a thread of its own makes. The answer comes when it is whole.
    pub(super) fn snapshot(&mut self, request: wire::VmSnapshotConfig, answer: Answer) {
        let begun = self.check_no_snapshot().and_then(|()| {
            let wanted = "the absolute path of a directory";
            let path = path_of(&request.destination_url, "destination_url", wanted)?;
            let parent = request.parent.as_deref().map(parent_path).transpose()?;
            // Before anything is made; another look follows when it is.
            self.check_form()?;
            self.check_disks_stay()?;
            let template = request.template.then(|| self.template_disks(&request));
            let id = new_id().map_err(|error| error.to_control())?;
            Ok((path, parent, template.transpose()?, id))
        });
        let (path, parent, template, id) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let (opener, place) = (Arc::clone(&self.tools.opener), path.clone());
        let (models, own) = (self.tools.models, self.ears.consoles.reserved().clone());
        let description = self.ears.description.as_ref();
        let config = description.map(|description| description.config.clone());
        // A machine that is paused is what its client has made it.
        let goes_on = self.state().0 == VmState::Running && !request.pause;
        let beginning = Beginning {
            place: path.clone(),
            id,
            parent,
            track: request.track,
            tracking: Arc::downgrade(self.machine.tracking()),
            ram: goes_on.then(|| self.machine.ram_parts()),
            template,
        };
        let begun = Instant::now();
        let open = move || {
            if let Some(config) = config {
                let new = (files::SNAPSHOT, place.join(NAME));
                files::check_new(&config, models, &opener, &own, (new.0, &new.1))
                    .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            }
            beginning.run(&opener)
        };
        let answer = self.asides.wait_with(answer);
        let begins = Arc::new(());
        self.snapshotting = Arc::downgrade(&begins);
        let started = self.beside("open", open, move |driver, opened| match opened {
            Ok((files, kin, hold)) => driver.ask_first(Begun {
                files,
                kin,
                hold,
                free: None,
                path,
                begun,
                request,
                answer,
                begins,
            }),
            Err(error) => {
                drop(begins);
                driver.asides.answer(answer, Err(error));
                driver.do_later();
            }
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
            self.do_later();
        }
    }

    /// That the disks that the guest can write to do not go with this machine: what a snapshot refers to is to be there later.
    fn check_disks_stay(&self) -> Result<(), ControlError> {
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        for (id, config) in crate::chains::disks(&description.config) {
            if !config.readonly && config.path.starts_with("/proc/self/fd") {
                let message = format!(
                    "disk {id:?} goes when this machine ends, as those of 'vireo clone --stateless' do: a snapshot would have none"
                );
                return Err(ControlError::new(ErrorKind::Conflict, message));
            }
        }
        Ok(())
    }

    /// The disks of a machine that becomes a template, which its guest could write to.
    fn template_disks(
        &self,
        request: &wire::VmSnapshotConfig,
    ) -> Result<Vec<sealed::Disk>, ControlError> {
        if request.parent.is_some() {
            let message =
                "template and parent exclude each other: a template needs no other snapshot";
            return Err(ControlError::new(ErrorKind::Invalid, message));
        }
        let description = self.ears.description.as_ref().ok_or_else(ended)?;
        let mut disks = Vec::new();
        for (id, config) in crate::chains::disks(&description.config) {
            if config.readonly {
                continue;
            }
            if self.state().0 == VmState::Running {
                let message = format!(
                    "the guest can write to disk {id:?} while it runs, and the disks of a template stay as they are: pause the machine \
                     first ('vireo pause'), and end it when the template is there"
                );
                return Err(ControlError::new(ErrorKind::Conflict, message));
            }
            let device = self.settled_device(&id)?;
            self.asides.check_no_job(&device)?;
            let device = Arc::downgrade(&device);
            let disk = sealed::Disk { id, config, device };
            disk.check()?;
            disks.push(disk);
        }
        Ok(disks)
    }

    /// That no other capture is being written, nor a snapshot begun: memory is held still for one.
    pub(super) fn check_no_snapshot(&mut self) -> Result<(), ControlError> {
        self.check_no_capture()?;
        if self.snapshotting.strong_count() > 0 {
            let message = "another snapshot is being begun: try again when that has been written";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// Has what is written be logged no more.
    pub(super) fn untrack(&mut self) -> Result<(), ControlError> {
        self.check_no_snapshot()?;
        self.machine.tracking().end();
        Ok(())
    }

    /// Asks the guest for free pages where they are wanted, and goes on when it has told of them.
    fn ask_first(&mut self, mut begun: Begun) {
        let wanted = begun.request.skip_free_pages;
        begun.free = wanted.then(|| match &begun.hold {
            Ok(_) => self.ask_for_free_pages(),
            Err(_) => Err("the guest stands while its memory is written".to_owned()),
        });
        let Some(Ok(round)) = &begun.free else {
            return self.go_into(begun);
        };
        let (view, answer) = (round.view(), begun.answer);
        let wait = move || view.wait_for_hints(hints::PATIENCE);
        let started = self.beside("hints", wait, move |driver, told| {
            if !told {
                tracing::info!("the guest has not told of all its free pages in time");
            }
            driver.go_into(begun);
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
            self.do_later();
        }
    }

    fn go_into(&mut self, begun: Begun) {
        let answer = begun.answer;
        if let Err(error) = self.snapshot_into(begun) {
            self.asides.answer(answer, Err(error));
        }
        self.do_later();
    }

    /// The second half of [`Driver::snapshot`]. Who waits with `answer` hears of the end.
    fn snapshot_into(&mut self, begun: Begun) -> Result<Reply, ControlError> {
        let Begun {
            files,
            kin,
            hold,
            free,
            path,
            begun,
            request,
            answer,
            begins,
        } = begun;
        drop(begins);
        self.check_settled()?;
        self.check_form()?;
        let told = match &free {
            None => Free::default(),
            Some(Ok(round)) => Free::of(round),
            Some(Err(why)) => Free::none(why),
        };
        let memory = self.machine.memory_map();
        let Kin { parent, ready } = kin;
        let (base, parent) = parent.unzip();
        let tracking = Arc::clone(self.machine.tracking());
        let look = move || {
            let moment = tracking.instant(base.as_ref(), ready);
            moment.map_err(|error| refused_parent(&error))
        };
        let plan = Plan {
            kind: "snapshot",
            reason: PauseReason::Snapshot,
            path: path.clone(),
            total: total(&memory),
            answer: Some(answer),
            hold,
            look: Some(Box::new(look)),
        };
        let compress = request.compress;
        // The guest's round ends when this returns, and memory has been held still.
        let _round = free;
        self.capture(&Command::Snapshot(request), plan, move |driver, moment| {
            let free = told.at_the_instant();
            let set = driver.machine.save();
            let set = set.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
            let config = driver.described()?;
            let opener = Arc::clone(&driver.tools.opener);
            Ok(Box::new(move |job, manner| {
                let snapshot = Snapshot {
                    files,
                    place: path.clone(),
                    memory,
                    moment,
                    set,
                    config,
                    parent,
                    begun,
                    free,
                    compress,
                };
                let written = snapshot.write(job, &opener, manner);
                written.map_err(|error| format!("{}: {error}", path.display()))
            }))
        })
    }

    /// That the machine is one which a snapshot can hold.
    pub(super) fn check_form(&self) -> Result<(), ControlError> {
        let saved = self.check_devices();
        saved
            .and_then(|()| self.machine.check_saved_form())
            .map_err(|error| error.to_control())
    }

    /// That description and machine say the same, before what describes it is taken from one and its state from the other.
    pub(super) fn check_settled(&mut self) -> Result<(), ControlError> {
        if self.asides.is_changing() {
            let message = "a device is being changed or removed: try again when that has ended";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
        Ok(())
    }

    /// What another program serves is not known here in full.
    fn check_devices(&self) -> Result<(), MachineError> {
        let description = self.ears.description.as_ref();
        let mut devices = description.iter().flat_map(|d| &d.config.devices);
        if devices.any(is_served) {
            let what = "a device that another program serves over vhost-user";
            return Err(MachineError::NotYetSaved { what });
        }
        Ok(())
    }

    /// The description, from which the machine is built again.
    pub(super) fn described(&self) -> Result<Value, ControlError> {
        let description = self.ears.description.as_ref();
        let description = description.ok_or_else(ended)?;
        serde_json::to_value(&description.config)
            .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))
    }
}

/// Whether another program serves the device.
fn is_served(device: &DeviceConfig) -> bool {
    let fs = virtio::models::fs::MODEL.kind;
    device.kind == fs || device.kind.starts_with("vhost-user-")
}

/// A snapshot that is being begun: its files are there, and memory is protected where the guest goes on.
struct Begun {
    files: Files,
    kin: Kin,
    hold: Hold,
    /// Of whom free pages have been asked, or why of nobody; `None`: they are not wanted.
    free: Option<Result<Round, String>>,
    path: PathBuf,
    begun: Instant,
    request: wire::VmSnapshotConfig,
    answer: u64,
    /// There as long as no other may begin.
    begins: Arc<()>,
}

/// What becomes a snapshot.
struct Snapshot {
    files: Files,
    /// Its directory.
    place: PathBuf,
    memory: GuestMap,
    /// What is known of that.
    moment: Moment,
    set: SectionSet,
    config: Value,
    parent: Option<Parent>,
    /// When it was asked for.
    begun: Instant,
    free: Free,
    compress: Option<SnapshotCompression>,
}

impl Snapshot {
    /// Does the job; the snapshot is there when all is well, and nothing is otherwise.
    fn write(self, job: &mut JobHandle, opener: &Opener, manner: Manner) -> Result<(), String> {
        let Self {
            files,
            place,
            memory,
            moment: Moment { changed, taken },
            mut set,
            config,
            parent,
            begun,
            free,
            compress,
        } = self;
        let swaps = Swaps::look(opener);
        let still = manner.still.as_deref();
        let free = free.left_out(still);
        let ram = SnapshotRam::new(memory, swaps.none).without(free.ranges.clone());
        let writer = PageWriter::new(&ram.ranges()).since(changed);
        let writer = match compress {
            None => Ok(writer.past_the_cache(files.memory_direct())),
            Some(SnapshotCompression::Zstd) => writer.packed(),
        };
        let writer = writer.map_err(|error| chain(&error))?;
        let index = write_memory(job, files.memory(), (&ram, writer), still)?;
        swaps.check(opener)?;
        set.push(index_section(&index).map_err(|error| chain(&error))?);
        let needs = parent.as_ref().map(|parent| parent.id.clone());
        let filled = files.fill(&set, config, parent)?;
        if !job.commit() {
            return Err("it was cancelled".to_owned());
        }
        let base = Base {
            id: files.id().to_owned(),
            checksum: filled.checksum,
            directory: place,
        };
        let images = opener.seal_images(&files.sealed_images());
        let images = images.map_err(|error| chain(&error))?;
        files.keep(opener).map_err(|error| chain(&error))?;
        images.keep();
        if let Some(taken) = taken {
            taken.keep(base);
        }
        let written = index.stored().saturating_add(filled.state);
        job.report(free.report(report(manner, begun, (&index, needs), written)));
        Ok(())
    }
}

/// Writes memory into `file`: `still`, while the guest goes on.
fn write_memory(
    job: &mut JobHandle,
    file: &File,
    (ram, mut writer): (&SnapshotRam, PageWriter),
    still: Option<&Still>,
) -> Result<PageIndex, String> {
    let total = job.info().total;
    let mut step = |done| {
        job.progress(done, total);
        !job.is_cancelled()
    };
    let cancelled = || PagesError::Cancelled;
    for chunk in still.iter().flat_map(|still| still.zeros()) {
        writer.leave_zeros(chunk);
    }
    // Of one that stands all are gone through.
    let mut done = still.map_or(0, |_| writer.done());
    let mut all = 0..writer.count();
    let written = writer.beside(file, ram, |feeder| {
        while let Some(chunk) = still.map_or_else(|| all.next(), Still::next) {
            let copied = feeder.copy(chunk)?;
            if let Some(still) = still {
                still.saved(chunk);
            }
            done = done.saturating_add(copied.unwrap_or(0));
            if !step(done) {
                return Err(cancelled());
            }
        }
        Ok(())
    });
    let index = written.and_then(|written| {
        written?;
        writer.finish(file)
    });
    if let Some(why) = still.and_then(Still::why) {
        return Err(why.to_owned());
    }
    let index = index.and_then(|index| index.ok_or_else(cancelled));
    index.map_err(|error| chain(&error))
}

/// What is told of a snapshot that has been made.
fn report(
    manner: Manner,
    begun: Instant,
    (index, parent): (&PageIndex, Option<String>),
    bytes: u64,
) -> SnapshotReport {
    let Manner {
        still,
        paused,
        pause,
        drain,
        why,
    } = manner;
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    // Who is still paused goes on when this has been told.
    let pause = pause.get().copied();
    let pause = pause.or_else(|| paused.map(|paused| paused.elapsed()));
    if let Some(why) = &why {
        tracing::warn!("the guest was paused until its snapshot was written: {why}");
    }
    SnapshotReport {
        mode: match still {
            Some(_) => SnapshotMode::Live,
            None => SnapshotMode::Paused,
        },
        reason: why,
        pause_us: pause.map(micros),
        drain_us: micros(drain),
        total_us: micros(begun.elapsed()),
        bytes,
        pages: index.data() / PAGE,
        zero_pages: index
            .total()
            .saturating_sub(index.data())
            .saturating_sub(index.kept())
            / PAGE,
        free_pages: None,
        free_pages_reason: None,
        parent,
    }
}

/// Whether the host swaps memory out, so that what it has not got may be more than zeros.
pub(super) struct Swaps {
    /// It does not.
    pub(super) none: bool,
}

impl Swaps {
    pub(super) fn look(opener: &Opener) -> Self {
        // One line, the heading, where there is none.
        let text = opener.read_text(Path::new("/proc/swaps"), 1 << 20);
        Self {
            none: text.is_ok_and(|text| text.lines().count() == 1),
        }
    }

    /// That it was so all the time.
    pub(super) fn check(&self, opener: &Opener) -> Result<(), String> {
        if self.none && !Self::look(opener).none {
            return Err("the host has begun to swap meanwhile: try again".to_owned());
        }
        Ok(())
    }
}
