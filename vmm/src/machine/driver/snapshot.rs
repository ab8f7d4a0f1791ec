//! The command `vm.snapshot`: a job that writes the machine as it is into a directory.
//!
//! Memory and state are written and synced first, under names that no other snapshot has; the manifest that names them comes
//! last. How the machine is paused, goes on and ends is of all captures ([`super::capture`]).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::wire::{SnapshotMode, SnapshotReport};
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
use crate::machine::coredump::total;
use crate::machine::manifest::{FileEntry, Manifest, NAME, VERSION};
use crate::machine::saved::machine_type;
use crate::machine::snapshot::{SnapshotRam, index_section};
use crate::machine::{MachineError, fault};
use crate::memory::still::{LIMIT, Still};
use crate::monitor::JobHandle;
use crate::opener::{NewFile, OpenError, Opener};

/// The files of a snapshot that is being written. What is dropped leaves nothing.
struct Files {
    /// What tells it from other snapshots.
    id: String,
    memory: NewFile,
    state: NewFile,
    manifest: NewFile,
}

impl Files {
    fn begin(opener: &Opener, directory: &Path, id: String) -> Result<Self, OpenError> {
        opener.directory(directory)?;
        let begin = |name: &str| opener.begin_file(&directory.join(name));
        Ok(Self {
            manifest: begin(NAME)?,
            memory: begin(&memory_name(&id))?,
            state: begin(&state_name(&id))?,
            id,
        })
    }
}

fn memory_name(id: &str) -> String {
    format!("{id}.memory")
}

fn state_name(id: &str) -> String {
    format!("{id}.state")
}

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

/// 32 hexadecimal digits that no other snapshot has.
fn new_id() -> Result<String, ControlError> {
    let bytes: Result<[u8; 16], _> = crate::machine::payload::random();
    let bytes = bytes.map_err(|error| error.to_control())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Driver {
    /// Begins to write a snapshot, which a thread of its own makes. The answer comes when it is whole.
    pub(super) fn snapshot(&mut self, request: wire::VmSnapshotConfig, answer: Answer) {
        let begun = self.check_no_snapshot().and_then(|()| {
            let wanted = "the absolute path of a directory";
            let path = path_of(&request.destination_url, "destination_url", wanted)?;
            // Before anything is made; another look follows when it is.
            self.check_form()?;
            Ok((path, new_id()?))
        });
        let (path, id) = match begun {
            Ok(begun) => begun,
            Err(error) => return answer(Err(error)),
        };
        let (opener, place) = (Arc::clone(&self.tools.opener), path.clone());
        let (models, own) = (self.tools.models, self.ears.consoles.reserved().clone());
        let description = self.ears.description.as_ref();
        let config = description.map(|description| description.config.clone());
        // A machine that is paused is what its client has made it.
        let goes_on = self.state().0 == VmState::Running && !request.pause;
        let ram = goes_on.then(|| self.machine.ram_parts());
        let begun = Instant::now();
        let open = move || {
            if let Some(config) = config {
                files::check_new(
                    &config,
                    models,
                    &opener,
                    &own,
                    (files::DUMP, &place.join(NAME)),
                )
                .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            }
            let files = Files::begin(&opener, &place, id);
            let files = files.map_err(|error| refused(&place, &error))?;
            let hold = ram.ok_or(None).and_then(|ram| {
                let held = Still::begin(ram, &opener, LIMIT);
                held.map_err(|error| Some(chain(&error)))
            });
            Ok((files, hold))
        };
        let answer = self.asides.wait_with(answer);
        let begins = Arc::new(());
        self.snapshotting = Arc::downgrade(&begins);
        let started = self.beside("open", open, move |driver, opened| match opened {
            Ok((files, hold)) => driver.ask_first(Begun {
                files,
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

    /// That no other capture is being written, nor a snapshot begun: memory is held still for one.
    fn check_no_snapshot(&mut self) -> Result<(), ControlError> {
        self.check_no_capture()?;
        if self.snapshotting.strong_count() > 0 {
            let message = "another snapshot is being begun: try again when that has been written";
            return Err(ControlError::new(ErrorKind::Busy, message));
        }
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
        let plan = Plan {
            kind: "snapshot",
            reason: PauseReason::Snapshot,
            path: path.clone(),
            total: total(&memory),
            answer: Some(answer),
            hold,
        };
        // The guest's round ends when this returns, and memory has been held still.
        let _round = free;
        self.capture(&Command::Snapshot(request), plan, move |driver| {
            let free = told.at_the_instant();
            let set = driver.machine.save();
            let set = set.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
            let config = driver.described()?;
            let opener = Arc::clone(&driver.tools.opener);
            Ok(Box::new(move |job, manner| {
                let snapshot = Snapshot {
                    files,
                    memory,
                    set,
                    config,
                    begun,
                    free,
                };
                let written = snapshot.write(job, &opener, manner);
                written.map_err(|error| format!("{}: {error}", path.display()))
            }))
        })
    }

    /// That the machine is one which a snapshot can hold.
    fn check_form(&self) -> Result<(), ControlError> {
        let saved = self.check_devices();
        saved
            .and_then(|()| self.machine.check_saved_form())
            .map_err(|error| error.to_control())
    }

    /// That description and machine say the same, before what describes it is taken from one and its state from the other.
    fn check_settled(&mut self) -> Result<(), ControlError> {
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
    fn described(&self) -> Result<Value, ControlError> {
        let description = self.ears.description.as_ref();
        let description = description.ok_or_else(crate::machine::inbox::ended)?;
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
    memory: GuestMap,
    set: SectionSet,
    config: Value,
    /// When it was asked for.
    begun: Instant,
    free: Free,
}

impl Snapshot {
    /// Does the job; the snapshot is there when all is well, and nothing is otherwise.
    fn write(self, job: &mut JobHandle, opener: &Opener, manner: Manner) -> Result<(), String> {
        let Self {
            files,
            memory,
            mut set,
            config,
            begun,
            free,
        } = self;
        let Files {
            id,
            memory: pages,
            state,
            manifest,
        } = files;
        let swaps = Swaps::look(opener);
        let free = free.left_out(manner.still.as_deref());
        let ram = SnapshotRam::new(memory, swaps.none).without(free.ranges.clone());
        let index = write_memory(job, pages.file(), &ram, manner.still.as_deref())?;
        swaps.check(opener)?;
        set.push(index_section(&index).map_err(|error| chain(&error))?);
        let bytes = set.to_bytes();
        let entry = |file: String, bytes: u64| FileEntry { file, bytes };
        let text = Manifest {
            vireo_snapshot: VERSION.to_owned(),
            machine: machine_type().to_owned(),
            config,
            state: entry(state_name(&id), bytes.len() as u64),
            memory: entry(memory_name(&id), length(&pages)?),
            parent: None,
            id,
        }
        .to_bytes();
        put(&state, &bytes)?;
        put(&manifest, &text)?;
        for file in [&pages, &state, &manifest] {
            file.sync().map_err(|error| chain(&error))?;
        }
        if !job.commit() {
            return Err("it was cancelled".to_owned());
        }
        name(opener, [pages, state], manifest).map_err(|error| chain(&error))?;
        let written = index.data().saturating_add(bytes.len() as u64);
        job.report(free.report(report(manner, begun, &index, written)));
        Ok(())
    }
}

/// Writes memory into `file`: `still`, while the guest goes on.
fn write_memory(
    job: &mut JobHandle,
    file: &File,
    ram: &SnapshotRam,
    still: Option<&Still>,
) -> Result<PageIndex, String> {
    let total = job.info().total;
    let mut step = |done| {
        job.progress(done, total);
        !job.is_cancelled()
    };
    let Some(still) = still else {
        let index = PageIndex::write(file, ram, &mut step);
        return index.map_err(|error| chain(&error));
    };
    let cancelled = || chain(&PagesError::Cancelled);
    let mut writer = PageWriter::new(&ram.ranges());
    let mut done = 0_u64;
    while let Some(chunk) = still.next() {
        let written = writer.write(chunk, file, ram);
        let written = written.map_err(|error| chain(&error))?;
        still.saved(chunk);
        done = done.saturating_add(written.unwrap_or(0));
        if !step(done) {
            return Err(cancelled());
        }
    }
    if let Some(why) = still.why() {
        return Err(why.to_owned());
    }
    let index = writer.finish(file).map_err(|error| chain(&error))?;
    index.ok_or_else(cancelled)
}

/// What is told of a snapshot that has been made.
fn report(manner: Manner, begun: Instant, index: &PageIndex, bytes: u64) -> SnapshotReport {
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
        zero_pages: index.total().saturating_sub(index.data()) / PAGE,
        free_pages: None,
        free_pages_reason: None,
    }
}

/// Whether the host swaps memory out, so that what it has not got may be more than zeros.
struct Swaps {
    none: bool,
}

impl Swaps {
    fn look(opener: &Opener) -> Self {
        // One line, the heading, where there is none.
        let text = opener.read_text(Path::new("/proc/swaps"), 1 << 20);
        Self {
            none: text.is_ok_and(|text| text.lines().count() == 1),
        }
    }

    /// That it was so all the time.
    fn check(&self, opener: &Opener) -> Result<(), String> {
        if self.none && !Self::look(opener).none {
            return Err("the host has begun to swap meanwhile: try again".to_owned());
        }
        Ok(())
    }
}

/// Gives the files their names. What has no manifest is no snapshot, and leaves nothing.
fn name(opener: &Opener, data: [NewFile; 2], manifest: NewFile) -> Result<(), OpenError> {
    let mut named = Vec::new();
    let mut result = Ok(());
    for file in data {
        let path = file.path().to_owned();
        result = result.and_then(|()| file.keep());
        if result.is_ok() {
            named.push(path);
        }
    }
    result = result.and_then(|()| manifest.keep());
    if result.is_err() {
        // Nobody else has these names, of which the id is part. The reason that is told is the first one.
        named.iter().for_each(|path| drop(opener.remove_file(path)));
    }
    result
}

fn put(file: &NewFile, bytes: &[u8]) -> Result<(), String> {
    std::io::Write::write_all(&mut file.file(), bytes).map_err(|error| error.to_string())
}

fn length(file: &NewFile) -> Result<u64, String> {
    let facts = file.file().metadata();
    facts.map(|facts| facts.len()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        Opener::new().names_in(directory).unwrap()
    }

    fn begun(directory: &Path) -> Files {
        let files = Files::begin(&Opener::new(), directory, "0".repeat(32)).unwrap();
        put(&files.memory, b"memory").unwrap();
        files
    }

    #[test]
    fn what_loses_the_race_for_the_manifest_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (begun(dir.path()), begun(dir.path()));
        let opener = Opener::new();
        name(&opener, [first.memory, first.state], first.manifest).unwrap();
        let mut before = names(dir.path());
        before.sort();
        assert_eq!(before.len(), 3, "{before:?}");
        let Files {
            memory,
            state,
            manifest,
            ..
        } = second;
        drop((memory, state));
        let begin = |name: &str| opener.begin_file(&dir.path().join(name)).unwrap();
        let data = [begin("1.memory"), begin("1.state")];
        let error = name(&opener, data, manifest).unwrap_err();
        assert!(matches!(error, OpenError::Exists { .. }), "{error}");
        let mut after = names(dir.path());
        after.sort();
        assert_eq!(after, before);
    }
}
