//! A snapshot that is opened, to build its machine from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::wire::MemoryRestoreMode;
use api::{ControlError, ErrorKind};
use migration::pages::{LayerError, Layers, PageIndex, PagesError, Ram};
use migration::{RestoreError, SavedState as _, SectionSet};
use serde::Serialize;
use serde_json::Value;
use virtio::memory::GuestMap;
use virtio::models::MODELS;

use super::chain::{self, ChainError, Link};
use super::fault;
use super::manifest::{LIMIT, Manifest, ManifestError, NAME, Sealed};
use super::snapshot::SnapshotRam;
use crate::config::restored::Renewal;
use crate::config::{HostLimits, VmConfig};
use crate::error::chain;
use crate::memory::demand::{DemandError, WorkingSet};
use crate::memory::ram_ranges;
use crate::memory::restored::{Excluded, Restored, choose};
use crate::memory::template::Template;
use crate::opener::{OpenError, Opener};
use crate::sandbox::files::Rule;

/// The most bytes of state that are read. A vCPU's is 8 KiB, a device's less, but for the screen's memory.
pub(super) const STATE: u64 = 512 << 20;

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
    /// The snapshots that it needs are not there.
    #[error(transparent)]
    Chain(ChainError),
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
    /// Memory is refused.
    #[must_use]
    pub fn memory(LayerError { path, source }: LayerError) -> Self {
        Self::Memory { path, source }
    }

    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        let kind = match self {
            Self::Open { source, .. } => fault::of(source),
            Self::Nothing { .. } => ErrorKind::NotFound,
            Self::Chain(ChainError::Missing { source, .. }) => {
                return ControlError::from_error(source.to_control().kind, self);
            }
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
    /// The same as its manifest has it.
    described: Value,
    set: SectionSet,
    memory: Layers,
    /// What is said of a template.
    sealed: Option<Sealed>,
    /// How it is asked to come back.
    way: RestoreWay,
}

/// All that a snapshot, with those that it needs, is made of.
pub struct Whole {
    /// The machine's description, as a manifest has it.
    pub config: Value,
    /// Memory.
    pub memory: Layers,
    /// All else, in sections.
    pub set: SectionSet,
}

/// What has been compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// How many snapshots it is made of: itself, and those that it needs.
    pub snapshots: usize,
    /// Sections of state.
    pub sections: usize,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Bytes that are not zeros, which have been read: of all the snapshots together.
    pub data: u64,
}

/// Reads the manifest in `directory`, and gives its bytes, too. It is not trusted.
///
/// # Errors
///
/// [`RestoreFailure`].
pub fn read_manifest(
    directory: &Path,
    opener: &Opener,
) -> Result<(Manifest, Vec<u8>), RestoreFailure> {
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
    match Manifest::parse(&bytes, machine_type()) {
        Ok(manifest) => Ok((manifest, bytes)),
        Err(source) => Err(RestoreFailure::Manifest { path, source }),
    }
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
    /// Memory is that of a template, which other machines have, too. It takes [`MemoryRestoreMode::Mmap`].
    pub template: Option<Arc<Template>>,
}

/// The most pieces that the file is mapped in: a process has some ten thousand mappings.
const PIECES: usize = 1024;

impl Saved {
    /// What is read of it while its machine comes back and, where memory follows, later.
    #[must_use]
    pub fn reached(&self) -> Rule {
        Rule {
            path: self.directory.clone(),
            write: false,
        }
    }

    /// Compares every checksum of the snapshot's memory with its pages, and those of the snapshots that it needs; those of their state have been
    /// compared. `step` hears how many bytes of memory have been gone through, of [`Saved::all_memory`], and says whether to go on.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure`].
    pub fn verify(self, step: &mut dyn FnMut(u64) -> bool) -> Result<Verified, RestoreFailure> {
        self.memory.verify(step).map_err(RestoreFailure::memory)?;
        let layers = self.memory.layers();
        Ok(Verified {
            snapshots: layers.len(),
            sections: self.set.sections().len().saturating_add(1),
            memory: self.memory.total(),
            data: layers.iter().map(|layer| layer.index.data()).sum(),
        })
    }

    /// What is said of it, if it is a template.
    #[must_use]
    pub fn sealed(&self) -> Option<&Sealed> {
        self.sealed.as_ref()
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &Layers {
        &self.memory
    }

    /// The bytes of memory as often as there are snapshots of it.
    #[must_use]
    pub fn all_memory(&self) -> u64 {
        let count = self.memory.layers().len() as u64;
        self.memory.total().saturating_mul(count)
    }

    /// All that it is made of.
    #[must_use]
    pub fn into_whole(self) -> Whole {
        Whole {
            config: self.described,
            memory: self.memory,
            set: self.set,
        }
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
            memory,
            prefault,
            ref template,
            ..
        } = self.way;
        // A template's has been decompressed.
        let packed = self.memory.is_packed() && template.is_none();
        let chosen = choose(memory, &config.memory, prefault, packed);
        chosen.map_err(RestoreFailure::Excluded)
    }

    /// Opens the snapshot in `directory`. It is not trusted.
    ///
    /// # Errors
    ///
    /// [`RestoreFailure`].
    pub fn open(directory: &Path, opener: &Opener) -> Result<Self, RestoreFailure> {
        let path = directory.join(NAME);
        let links = chain::follow(directory, opener)?;
        let Some(Link { manifest, .. }) = links.first() else {
            let directory = directory.to_owned();
            return Err(RestoreFailure::Nothing { directory });
        };
        let refused = |reason: String| RestoreFailure::Config { path, reason };
        let config: Result<VmConfig, _> = serde_json::from_value(manifest.config.clone());
        let config = config.map_err(|error| error.to_string());
        let config = config.and_then(|mut config| {
            config.complete(MODELS);
            let valid = config.validate(MODELS, &HostLimits::read());
            valid.map(|()| config).map_err(|error| chain(&error))
        });
        let config = config.map_err(refused)?;
        let (id, described) = (manifest.id.clone(), manifest.config.clone());
        let sealed = manifest.template.clone();
        let mut set = match links.first() {
            Some(link) => chain::read_state(link, opener)?,
            None => SectionSet::default(),
        };
        let ranges = ram_ranges(config.memory.size);
        let memory = chain::open_memory(&links, &mut set, &ranges, opener)?;
        Ok(Self {
            directory: directory.to_owned(),
            id,
            config,
            described,
            set,
            memory,
            sealed,
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
            set,
            memory,
            id,
            way,
            sealed,
            ..
        } = self;
        let ram = SnapshotRam::new(GuestMap::clone(ram), false);
        check_ranges(&memory, &ram.ranges()).map_err(|source| RestoreFailure::State {
            path: directory.clone(),
            source,
        })?;
        let newest = memory.layers().first().map(|layer| layer.path.clone());
        let path = newest.unwrap_or_default();
        let mut take = |address, bytes: &[u8]| ram.write(address, bytes);
        let refused = |(address, source)| RestoreFailure::Memory {
            path: path.clone(),
            source: PagesError::Memory { address, source },
        };
        match mode {
            MemoryRestoreMode::Mmap if way.template.is_some() => {
                let mut template = way.template.iter();
                let mapped = template.try_for_each(|template| restored.map_template(template));
                mapped.map_err(refused)?;
            }
            MemoryRestoreMode::Mmap if memory.is_packed() => {
                return Err(RestoreFailure::Excluded(Excluded::PACKED));
            }
            MemoryRestoreMode::Mmap => {
                let painting = memory.paint(PIECES);
                let mapped = restored.map(&memory, &painting.mapped);
                mapped.map_err(refused)?;
                let copied = memory.copy(&painting, &mut take, &mut || needed());
                copied.map_err(RestoreFailure::memory)?;
            }
            MemoryRestoreMode::OnDemand => {
                let working = WorkingSet::of(&directory, &id, opener).sealed(sealed.is_some());
                let begun = restored.on_demand(memory, working);
                begun.map_err(RestoreFailure::Demand)?;
            }
            MemoryRestoreMode::Copy => {
                let read = memory.read(&mut take, &mut |_| needed());
                read.map_err(RestoreFailure::memory)?;
                if way.prefault {
                    restored.populate().map_err(refused)?;
                }
                restored.copied(&path);
            }
        }
        for &(address, bytes) in own {
            let written = ram.write(address, bytes);
            written.map_err(|source| refused((address, source)))?;
        }
        let renewal = way.renewal;
        Ok(SavedState {
            directory,
            set,
            renewal,
        })
    }
}

/// That the machine has the memory that its snapshot is of.
fn check_ranges(memory: &Layers, ranges: &[(u64, u64)]) -> Result<(), RestoreError> {
    if memory.ranges() == ranges {
        return Ok(());
    }
    Err(RestoreError::Invalid {
        schema: PageIndex::SCHEMA,
        reason: "the machine has other memory".to_owned(),
    })
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
