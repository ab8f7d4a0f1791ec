//! A snapshot that is opened, to build its machine from it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{LIMIT, Manifest, ManifestError, NAME};
use api::wire::MemoryRestoreMode;
use api::{ControlError, ErrorKind};
use migration::pages::{PagesError, Ram};
use migration::{RestoreError, SectionSet};
use serde::Serialize;
use virtio::memory::GuestMap;
use virtio::models::MODELS;

use super::fault;
use super::snapshot::{SnapshotRam, take_index};
use crate::config::restored::Renewal;
use crate::config::{HostLimits, VmConfig};
use crate::error::chain;
use crate::memory::demand::{DemandError, WorkingSet};
use crate::memory::ram_ranges;
use crate::memory::restored::{Excluded, Restored, choose};
use crate::opener::{OpenError, Opener};

/// The most bytes of state that are read. A vCPU's is 8 KiB, a device's less, but for the screen's memory.
const STATE: u64 = 512 << 20;

/// Why a machine is not as its snapshot says.
#[derive(Debug, thiserror::Error)]
pub enum RestoreFailure {
    /// A file is not there or cannot be read.
    #[error("the snapshot in {}", directory.display())]
    Open {
        /// The snapshot's directory.
        directory: PathBuf,
        /// What failed, naming the path.
        #[source]
        source: OpenError,
    },
    /// There is no manifest.
    #[error("{} holds no snapshot: there is no {NAME}: check the path, or make one with 'vireo snapshot create'", directory.display())]
    Nothing {
        /// The directory.
        directory: PathBuf,
    },
    /// The manifest is refused.
    #[error("{}", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// The machine's description in it is none.
    #[error("{}: config: {reason}", path.display())]
    Config {
        /// The manifest.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A file has not the length that the manifest says.
    #[error("{} has {found} bytes, not the {stated} that {NAME} says: the snapshot is damaged", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// What the manifest says.
        stated: u64,
    },
    /// The state is refused.
    #[error("{}", path.display())]
    State {
        /// The file, or the directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// It cannot come back in the way that is asked for.
    #[error("--restore")]
    Excluded(#[source] Excluded),
    /// Memory cannot be read when the guest touches it.
    #[error("memory_restore_mode=ondemand")]
    Demand(#[source] DemandError),
    /// Some of its memory is in another snapshot.
    #[error("{} holds only what has changed since the snapshot in {parent}: this release restores whole ones", path.display())]
    Parent {
        /// The manifest.
        path: PathBuf,
        /// The parent's directory, as the manifest has it.
        parent: String,
    },
    /// Memory is refused.
    #[error("{}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PagesError,
    },
}

impl RestoreFailure {
    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        let kind = match self {
            Self::Open { source, .. } => fault::of(source),
            Self::Nothing { .. } => ErrorKind::NotFound,
            _ => ErrorKind::Invalid,
        };
        ControlError::from_error(kind, self)
    }
}

/// The machine type of this build.
#[must_use]
pub fn machine_type() -> &'static str {
    crate::smbios::MACHINE
}

/// A snapshot that has been opened. Its memory has not been looked at yet.
pub struct Saved {
    directory: PathBuf,
    id: String,
    /// The description of its machine.
    pub config: VmConfig,
    set: SectionSet,
    memory: (PathBuf, File, u64),
    /// How it is asked to come back.
    way: RestoreWay,
}

/// What has been compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Sections of state.
    pub sections: usize,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Bytes of it that are not zeros, which have been read.
    pub data: u64,
}

/// Reads the manifest in `directory`. It is not trusted.
///
/// # Errors
///
/// [`RestoreFailure`].
pub fn read_manifest(directory: &Path, opener: &Opener) -> Result<Manifest, RestoreFailure> {
    let path = directory.join(NAME);
    let bytes = match opener.read_document(&path, LIMIT) {
        Err(OpenError::System { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            let directory = directory.to_owned();
            return Err(RestoreFailure::Nothing { directory });
        }
        bytes => bytes.map_err(|source| RestoreFailure::Open {
            directory: directory.to_owned(),
            source,
        })?,
    };
    Manifest::parse(&bytes, machine_type())
        .map_err(|source| RestoreFailure::Manifest { path, source })
}

/// How a machine is to come out of its snapshot.
#[derive(Clone, Debug, Default)]
pub struct RestoreWay {
    /// How memory comes; `None`: as is best for memory of its kind.
    pub memory: Option<MemoryRestoreMode>,
    /// All of memory is to be there before the guest goes on.
    pub prefault: bool,
    /// What it has to be told of itself.
    pub renewal: Renewal,
}

/// The most pieces that the file is mapped in: a process has some ten thousand mappings.
const PIECES: usize = 1024;

impl Saved {
    /// Compares every checksum of the snapshot's memory with its pages; those of its state have been compared. `step` hears how
    /// many bytes of memory have been gone through, and says whether to go on.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure`].
    pub fn verify(mut self, step: &mut dyn FnMut(u64) -> bool) -> Result<Verified, RestoreFailure> {
        let (path, file, len) = self.memory;
        let ranges = ram_ranges(self.config.memory.size);
        let index = take_index(&mut self.set, &ranges, len).map_err(|source| {
            let path = self.directory;
            RestoreFailure::State { path, source }
        })?;
        index
            .read(&file, &mut |_, _| Ok(()), step)
            .map_err(|source| RestoreFailure::Memory { path, source })?;
        Ok(Verified {
            sections: self.set.sections().len().saturating_add(1),
            memory: index.total(),
            data: index.data(),
        })
    }

    /// The machine is to come back so, and not as is best.
    pub fn ask(&mut self, way: RestoreWay) {
        self.way = way;
    }

    /// The machine is to be told this of itself.
    pub fn renew(&mut self, renewal: Renewal) {
        self.way.renewal = renewal;
    }

    /// How memory comes back, for a machine of this `config`.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure::Excluded`].
    pub fn memory_mode(&self, config: &VmConfig) -> Result<MemoryRestoreMode, RestoreFailure> {
        let RestoreWay {
            memory, prefault, ..
        } = self.way;
        choose(memory, &config.memory, prefault).map_err(RestoreFailure::Excluded)
    }

    /// Opens the snapshot in `directory`. It is not trusted.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure`].
    pub fn open(directory: &Path, opener: &Opener) -> Result<Self, RestoreFailure> {
        let failed = |source| RestoreFailure::Open {
            directory: directory.to_owned(),
            source,
        };
        let path = directory.join(NAME);
        let manifest = read_manifest(directory, opener)?;
        if let Some(parent) = manifest.parent {
            let parent = parent.directory;
            return Err(RestoreFailure::Parent { path, parent });
        }
        let refused = |reason: String| RestoreFailure::Config { path, reason };
        let config: Result<VmConfig, _> = serde_json::from_value(manifest.config);
        let config = config.map_err(|error| error.to_string());
        let config = config.and_then(|mut config| {
            config.complete(MODELS);
            let valid = config.validate(MODELS, &HostLimits::read());
            valid.map(|()| config).map_err(|error| chain(&error))
        });
        let config = config.map_err(refused)?;
        let state = directory.join(&manifest.state.file);
        let bytes = opener.read_document(&state, STATE).map_err(failed)?;
        check_length(&state, bytes.len() as u64, manifest.state.bytes)?;
        let set = SectionSet::from_bytes(&bytes).map_err(|source| RestoreFailure::State {
            path: state,
            source,
        })?;
        let memory = directory.join(&manifest.memory.file);
        let file = opener.open_input(&memory).map_err(failed)?;
        let facts = file.metadata().map_err(|source| RestoreFailure::Memory {
            path: memory.clone(),
            source: PagesError::Read { offset: 0, source },
        })?;
        check_length(&memory, facts.len(), manifest.memory.bytes)?;
        Ok(Self {
            directory: directory.to_owned(),
            id: manifest.id,
            config,
            set,
            memory: (memory, file, facts.len()),
            way: RestoreWay::default(),
        })
    }

    /// Fills `ram`, which reads as zeros, in the `mode` that [`Saved::memory_mode`] has given, and puts what is `own` to this machine in its places: guest-physical addresses and bytes. What is left is the state of all else.
    /// `needed` says whether to go on.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure`].
    pub fn fill(
        self,
        (ram, restored): (&GuestMap, &Restored),
        mode: MemoryRestoreMode,
        own: &[(u64, &[u8])],
        (opener, needed): (&Arc<Opener>, &dyn Fn() -> bool),
    ) -> Result<SavedState, RestoreFailure> {
        let Self {
            directory,
            mut set,
            memory: (path, file, len),
            id,
            way,
            ..
        } = self;
        let ram = SnapshotRam::new(GuestMap::clone(ram), false);
        let index = take_index(&mut set, &ram.ranges(), len).map_err(|source| {
            let path = directory.clone();
            RestoreFailure::State { path, source }
        })?;
        let filled = match mode {
            MemoryRestoreMode::Mmap => restored
                .map((&path, file, len), &index.filled(PIECES))
                .map_err(|(address, source)| PagesError::Memory { address, source }),
            MemoryRestoreMode::OnDemand => {
                let working = WorkingSet::of(&directory, &id, opener);
                let begun = restored.on_demand((&path, file), index, working);
                begun.map_err(RestoreFailure::Demand)?;
                Ok(())
            }
            MemoryRestoreMode::Copy => {
                let mut take = |address, bytes: &[u8]| ram.write(address, bytes);
                let read = index.read(&file, &mut take, &mut |_| needed());
                let read = read.and_then(|()| {
                    let there = if way.prefault {
                        restored.populate()
                    } else {
                        Ok(())
                    };
                    there.map_err(|(address, source)| PagesError::Memory { address, source })
                });
                read.inspect(|()| restored.copied(&path))
            }
        };
        filled
            .and_then(|()| {
                own.iter().try_for_each(|&(address, bytes)| {
                    let written = ram.write(address, bytes);
                    written.map_err(|source| PagesError::Memory { address, source })
                })
            })
            .map_err(|source| RestoreFailure::Memory { path, source })?;
        let renewal = way.renewal;
        Ok(SavedState {
            directory,
            set,
            renewal,
        })
    }
}

/// What of a snapshot is not memory.
pub struct SavedState {
    directory: PathBuf,
    set: SectionSet,
    renewal: Renewal,
}

impl SavedState {
    /// Names the snapshot whose state `source` is about.
    #[must_use]
    pub fn failed(directory: PathBuf, source: RestoreError) -> RestoreFailure {
        RestoreFailure::State {
            path: directory,
            source,
        }
    }

    /// The state, where it comes from, and what the machine is to be told besides.
    #[must_use]
    pub fn into_parts(self) -> (PathBuf, SectionSet, Renewal) {
        (self.directory, self.set, self.renewal)
    }
}

fn check_length(path: &Path, found: u64, stated: u64) -> Result<(), RestoreFailure> {
    if found == stated {
        return Ok(());
    }
    Err(RestoreFailure::Length {
        path: path.to_owned(),
        found,
        stated,
    })
}
