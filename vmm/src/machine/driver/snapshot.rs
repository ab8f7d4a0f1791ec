//! The command `vm.snapshot`: a job that writes the machine as it is into a directory.
//!
//! Memory and state are written and synced first, under names that no other snapshot has; the manifest that names them comes
//! last. How the machine is paused, goes on and ends is of all captures ([`super::capture`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::machine::manifest::{FileEntry, Manifest, NAME, VERSION};
use api::{Answer, Command, ControlError, ErrorKind, PauseReason, Reply, wire};
use migration::SectionSet;
use migration::pages::PageIndex;

use serde_json::Value;

use super::Driver;
use super::capture::{Plan, path_of};
use crate::config::{DeviceConfig, files};
use crate::error::chain;
use crate::machine::coredump::total;
use crate::machine::saved::machine_type;
use crate::machine::snapshot::{SnapshotRam, index_section};
use crate::machine::{MachineError, fault};
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
        let begun = self.check_no_capture().and_then(|()| {
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
        let open = move || {
            if let Some(config) = config {
                files::check_dump(&config, models, &opener, &own, &place.join(NAME))
                    .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            }
            Files::begin(&opener, &place, id).map_err(|error| refused(&place, &error))
        };
        let answer = self.asides.wait_with(answer);
        let started = self.beside("open", open, move |driver, files| {
            let begun = files.and_then(|files| driver.snapshot_into(files, path, request, answer));
            if let Err(error) = begun {
                driver.asides.answer(answer, Err(error));
            }
        });
        if let Err(error) = started {
            self.asides.answer(answer, Err(error));
        }
    }

    /// The second half of [`Driver::snapshot`]. Who waits with `answer` hears of the end.
    fn snapshot_into(
        &mut self,
        files: Files,
        path: PathBuf,
        request: wire::VmSnapshotConfig,
        answer: u64,
    ) -> Result<Reply, ControlError> {
        self.check_settled()?;
        self.check_form()?;
        let memory = SnapshotRam(self.machine.memory_map());
        let plan = Plan {
            kind: "snapshot",
            reason: PauseReason::Snapshot,
            path: path.clone(),
            total: total(&memory.0),
            answer: Some(answer),
        };
        self.capture(&Command::Snapshot(request), plan, move |driver| {
            let set = driver.machine.save();
            let set = set.map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
            let config = driver.described()?;
            let opener = Arc::clone(&driver.tools.opener);
            Ok(Box::new(move |job| {
                let written = write(job, (files, &opener), &memory, set, config);
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

/// Does the job; the snapshot is there when all is well, and nothing is otherwise.
fn write(
    job: &mut JobHandle,
    (files, opener): (Files, &Opener),
    memory: &SnapshotRam,
    mut set: SectionSet,
    config: Value,
) -> Result<(), String> {
    let Files {
        id,
        memory: pages,
        state,
        manifest,
    } = files;
    let total = job.info().total;
    let mut step = |done| {
        job.progress(done, total);
        !job.is_cancelled()
    };
    let index = PageIndex::write(pages.file(), memory, &mut step);
    let index = index.map_err(|error| chain(&error))?;
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
    name(opener, [pages, state], manifest).map_err(|error| chain(&error))
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
