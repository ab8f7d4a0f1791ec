//! The files of a snapshot that is being written.
//!
//! Memory and state are written and synced first, under names that no other snapshot has; the manifest that names them comes
//! last. What is dropped before leaves nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use migration::SectionSet;
use serde_json::Value;

use super::MachineError;
use super::manifest::{FileEntry, Manifest, NAME, Parent, Sealed, VERSION, checksum};
use super::saved::machine_type;
use crate::error::chain;
use crate::opener::{NewFile, OpenError, Opener, SyncNames, sync_directory};

/// The files of a snapshot that is being written. What is dropped leaves nothing.
pub struct Files {
    /// What tells it from other snapshots.
    id: String,
    memory: NewFile,
    state: NewFile,
    manifest: NewFile,
    /// What it says of a template.
    sealed: Option<Sealed>,
}

/// What has been written besides memory.
pub struct Filled {
    /// The bytes of state.
    pub state: u64,
    /// The [`checksum`] of the manifest.
    pub checksum: String,
}

impl Files {
    /// Begins a snapshot in `directory`, which is made where it is not there.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: [`OpenError::Exists`] where there is one.
    pub fn begin(opener: &Opener, directory: &Path, id: String) -> Result<Self, OpenError> {
        opener.directory(directory)?;
        let begin = |name: &str| opener.begin_file(&directory.join(name));
        Ok(Self {
            manifest: begin(NAME)?,
            memory: begin(&memory_name(&id))?,
            state: begin(&state_name(&id))?,
            id,
            sealed: None,
        })
    }

    /// Has it be a template, whose files nobody writes to from now on.
    pub fn seal(&mut self, sealed: Sealed) {
        self.sealed = Some(sealed);
    }

    /// The images that disks of a template have for themselves: of each disk the first that is named.
    #[must_use]
    pub fn sealed_images(&self) -> Vec<PathBuf> {
        let disks = self.sealed.iter().flat_map(|sealed| &sealed.disks);
        let mut seen = BTreeSet::new();
        let first = disks.filter(|disk| seen.insert(&disk.id));
        first.map(|disk| PathBuf::from(&disk.path)).collect()
    }

    /// What tells it from other snapshots.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where guest memory is written.
    #[must_use]
    pub fn memory(&self) -> &File {
        self.memory.file()
    }

    /// The same for writes past the page cache, where the file system has such.
    #[must_use]
    pub fn memory_direct(&self) -> Option<File> {
        self.memory.direct()
    }

    /// Writes all else, when memory has been written, and syncs all of it: `set`, and what is said of the machine, `config`, and of
    /// the `parent`.
    ///
    /// # Errors
    ///
    /// Why the storage takes it not.
    pub fn fill(
        &self,
        set: &SectionSet,
        config: Value,
        parent: Option<Parent>,
    ) -> Result<Filled, String> {
        let bytes = set.to_bytes();
        let entry = |file: String, bytes: u64| FileEntry { file, bytes };
        let text = Manifest {
            vireo_snapshot: VERSION.to_owned(),
            machine: machine_type().to_owned(),
            config,
            state: entry(state_name(&self.id), bytes.len() as u64),
            memory: entry(memory_name(&self.id), length(&self.memory)?),
            parent,
            template: self.sealed.clone(),
            id: self.id.clone(),
        }
        .to_bytes();
        put(&self.state, &bytes)?;
        put(&self.manifest, &text)?;
        for file in [&self.memory, &self.state, &self.manifest] {
            if self.sealed.is_some() {
                file.seal().map_err(|error| chain(&error))?;
            }
            file.sync().map_err(|error| chain(&error))?;
        }
        Ok(Filled {
            state: bytes.len() as u64,
            checksum: checksum(&text),
        })
    }

    /// Gives the files their names. What has no manifest is no snapshot, and leaves nothing.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: [`OpenError::Exists`] where another one has come to be meanwhile.
    pub fn keep(self, opener: &Opener) -> Result<(), OpenError> {
        self.keep_synced(opener, &sync_directory)
    }

    /// As [`Files::keep`]; `sync` makes names durable. The manifest gets its name when those of the others are durable, and loses it
    /// before they do.
    fn keep_synced(self, opener: &Opener, sync: SyncNames<'_>) -> Result<(), OpenError> {
        let mut named = Vec::new();
        let mut result = Ok(());
        for file in [self.memory, self.state] {
            let path = file.path().to_owned();
            result = result.and_then(|()| file.name());
            if result.is_ok() {
                named.push(path);
            }
        }
        // They have their names, also after a crash, before there is a manifest, and all three were synced when they were filled.
        let path = self.manifest.path().to_owned();
        result = result.and_then(|()| sync(&path));
        result = result.and_then(|()| self.manifest.name());
        if result.is_ok() {
            // It is the first to go.
            named.insert(0, path.clone());
            result = sync(&path);
        }
        if result.is_err() {
            // Nobody else has these names, of which the id is part. The reason that is told is the first one.
            // A manifest that cannot be removed keeps what it names.
            let _ = opener.remove_files(&named);
        }
        result
    }
}

fn memory_name(id: &str) -> String {
    format!("{id}.memory")
}

fn state_name(id: &str) -> String {
    format!("{id}.state")
}

/// 32 hexadecimal digits that no other snapshot has.
///
/// # Errors
///
/// [`MachineError`]: the host gives no random numbers.
pub fn new_id() -> Result<String, MachineError> {
    let bytes: [u8; 16] = super::payload::random()?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn put(file: &NewFile, bytes: &[u8]) -> Result<(), String> {
    let written = file.file().write_all(bytes);
    written.map_err(|error| error.to_string())
}

fn length(file: &NewFile) -> Result<u64, String> {
    let facts = file.file().metadata();
    facts.map(|facts| facts.len()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names = Opener::new().names_in(directory).unwrap();
        names.sort();
        names
    }

    fn begun(directory: &Path, id: &str) -> Files {
        let files = Files::begin(&Opener::new(), directory, id.repeat(32)).unwrap();
        put(&files.memory, b"memory").unwrap();
        files
    }

    #[test]
    fn what_loses_the_race_for_the_manifest_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (begun(dir.path(), "0"), begun(dir.path(), "1"));
        let opener = Opener::new();
        first.keep(&opener).unwrap();
        let before = names(dir.path());
        assert_eq!(before.len(), 3, "{before:?}");
        let error = second.keep(&opener).unwrap_err();
        assert!(matches!(error, OpenError::Exists { .. }), "{error}");
        assert_eq!(names(dir.path()), before);
    }

    #[test]
    fn a_directory_that_cannot_be_synced_has_all_of_a_snapshot_or_nothing() {
        let opener = Opener::new();
        for fails in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let files = begun(dir.path(), "0");
            let count = std::cell::Cell::new(0);
            let sync = |path: &Path| {
                count.set(count.get() + 1);
                if count.get() == fails + 1 {
                    return Err(OpenError::Exists {
                        path: path.to_owned(),
                    });
                }
                Ok(())
            };
            let kept = files.keep_synced(&opener, &sync);
            assert_eq!(kept.is_ok(), fails == 2, "{kept:?}");
            assert_eq!(names(dir.path()).len(), if fails == 2 { 3 } else { 0 });
        }
    }
}
