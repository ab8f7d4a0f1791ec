//! Guest memory that comes from the file of a snapshot.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::wire::{MemoryRestoreMode, MemoryRestored};
use migration::pages::{ChunkPlace, Layers, Placed};

use super::demand::{Demand, DemandError, Piece, RUNS, WorkingSet};
use super::lost::Bell;
pub use super::lost::check;
use super::mapping::Mapping;
use super::template::Template;
use crate::config::MemoryConfig;
use crate::opener::Opener;

/// Two things that are asked for and exclude each other.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory_restore_mode={mode} and {other} exclude each other: {why}: {mend}")]
pub struct Excluded {
    /// The mode, as the flag has it.
    pub mode: &'static str,
    /// The other.
    pub other: &'static str,
    /// What it is about.
    pub why: &'static str,
    /// What can be done.
    pub mend: &'static str,
}

impl Excluded {
    /// A file that is to be mapped, and is compressed.
    pub const PACKED: Self = Self {
        mode: "mmap",
        other: "a snapshot that is compressed",
        why: "its file is not as memory is",
        mend: "take ondemand or copy, or map what 'vireo snapshot flatten' makes of it",
    };
}

/// How memory of this kind comes from a snapshot: as `asked`, or as is best. With `prefault` all of it is to be there before
/// the guest goes on. The snapshot's own, or one that it needs, is `packed`: what is compressed cannot be mapped.
///
/// # Errors
///
/// What is asked for is not possible with such memory.
pub fn choose(
    asked: Option<MemoryRestoreMode>,
    memory: &MemoryConfig,
    prefault: bool,
    packed: bool,
) -> Result<MemoryRestoreMode, Excluded> {
    use MemoryRestoreMode::{Copy, Mmap, OnDemand};
    if packed && asked == Some(Mmap) {
        return Err(Excluded::PACKED);
    }
    let other = [
        (
            prefault,
            "prefault=on",
            "what is there at once is not read later",
        ),
        (
            memory.prefault,
            "--memory prefault=on",
            "what is there at once is not read later",
        ),
        (
            memory.hugepages,
            "--memory hugepages=on",
            "the file has no huge pages",
        ),
        (
            memory.shared,
            "--memory shared=on",
            "what others map is not the file's",
        ),
    ];
    let against = other.into_iter().find(|(is, ..)| *is);
    let mode = match asked {
        None if against.is_some() || packed => return Ok(Copy),
        None => return Ok(Mmap),
        Some(Copy) => return Ok(Copy),
        Some(Mmap) => "mmap",
        Some(OnDemand) => "ondemand",
    };
    match against {
        None => Ok(asked.unwrap_or(Mmap)),
        Some((_, other, why)) => Err(Excluded {
            mode,
            other,
            why,
            mend: "leave one of them out",
        }),
    }
}

/// The file that memory came from.
struct Origin {
    mode: MemoryRestoreMode,
    path: PathBuf,
    /// The files that still give bytes, and what they were.
    files: Vec<Source>,
}

/// A file that gives bytes.
struct Source {
    path: PathBuf,
    file: File,
    /// Its length in bytes when it was opened.
    len: u64,
}

impl Source {
    /// The length that it has now, if that is another one.
    fn cut(&self) -> Option<u64> {
        let facts = self.file.metadata().ok()?;
        (facts.len() != self.len).then_some(facts.len())
    }
}

/// What memory is said to be of, where it is of several files.
fn newest(layers: &Layers) -> PathBuf {
    let newest = layers.layers().first();
    newest.map(|layer| layer.path.clone()).unwrap_or_default()
}

/// How memory came from a snapshot. It keeps the mappings that are of the file.
pub struct Restored {
    bell: Arc<Bell>,
    /// By guest-physical address.
    mappings: Vec<(u64, Arc<Mapping>)>,
    origin: Mutex<Option<Origin>>,
    /// Who reads it where it is not there yet.
    demand: Mutex<Option<Arc<Demand>>>,
}

impl Restored {
    /// Nothing has come yet.
    pub(super) fn new(mappings: Vec<(u64, Arc<Mapping>)>) -> io::Result<Self> {
        Ok(Self {
            bell: Arc::new(Bell::new()?),
            mappings,
            origin: Mutex::new(None),
            demand: Mutex::new(None),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Origin>> {
        // It is written whole; a panic elsewhere leaves it sound.
        self.origin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it has been copied from the file at `path`.
    pub fn copied(&self, path: &Path) {
        *self.lock() = Some(Origin {
            mode: MemoryRestoreMode::Copy,
            path: path.to_owned(),
            files: Vec::new(),
        });
    }

    /// Maps `pieces`, each of one of the files of `layers`, privately in the place of memory.
    ///
    /// # Errors
    ///
    /// The guest-physical address of the piece that the host refuses, and why.
    pub fn map(&self, layers: &Layers, pieces: &[(usize, Placed)]) -> Result<(), (u64, io::Error)> {
        for (start, mapping) in &self.mappings {
            let watched = mapping.watch(&self.bell);
            watched.map_err(|error| (*start, error))?;
        }
        for (layer, Placed { start, len, offset }) in pieces {
            let found = layers.layers().get(*layer).zip(self.mapping_of(*start));
            let mapped = found.map_or_else(
                || Err(io::ErrorKind::InvalidInput.into()),
                |(layer, (mapping, inside))| mapping.map_file(inside, *len, &layer.file, *offset),
            );
            mapped.map_err(|error| (*start, error))?;
        }
        let files = layers.layers().iter().enumerate();
        let files = files.filter(|(layer, _)| pieces.iter().any(|(of, _)| of == layer));
        let files = files.map(|(_, layer)| {
            let file = layer.file.try_clone()?;
            let len = file.metadata()?.len();
            let path = layer.path.clone();
            Ok(Source { path, file, len })
        });
        let files: io::Result<Vec<Source>> = files.collect();
        *self.lock() = Some(Origin {
            mode: MemoryRestoreMode::Mmap,
            path: newest(layers),
            files: files.map_err(|error| (0, error))?,
        });
        Ok(())
    }

    /// Maps the memory of `template` privately in the place of memory.
    ///
    /// # Errors
    ///
    /// The guest-physical address of the piece that the host refuses, and why.
    pub fn map_template(&self, template: &Template) -> Result<(), (u64, io::Error)> {
        for Placed { start, len, offset } in template.pieces() {
            let found = self.mapping_of(*start);
            let mapped = found.map_or_else(
                || Err(io::ErrorKind::InvalidInput.into()),
                |(mapping, inside)| mapping.map_file(inside, *len, template.file(), *offset),
            );
            mapped.map_err(|error| (*start, error))?;
        }
        *self.lock() = Some(Origin {
            mode: MemoryRestoreMode::Mmap,
            path: template.path().to_owned(),
            // It cannot be cut short, nor fail.
            files: Vec::new(),
        });
        Ok(())
    }

    /// Has memory be read from `layers` when somebody touches it.
    ///
    /// # Errors
    ///
    /// [`DemandError`]: the host gives no userfaultfd, or none for this memory.
    pub fn on_demand(&self, layers: Layers, working: WorkingSet) -> Result<(), DemandError> {
        let demand = self.prepare(layers, (&working.opener, RUNS))?;
        Ok(demand.start(working)?)
    }

    /// As [`Restored::on_demand`], but nobody reads yet. Of what is read up to `runs` runs are watched by themselves.
    pub(super) fn prepare(
        &self,
        layers: Layers,
        (opener, runs): (&Opener, usize),
    ) -> Result<Arc<Demand>, DemandError> {
        let mut pieces = Vec::new();
        for ChunkPlace { number, place } in layers.written() {
            let (mapping, inside) = self
                .mapping_of(place.start)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
            pieces.push(Piece {
                number,
                host: mapping.address().saturating_add(inside),
                len: place.len,
            });
        }
        for (_, mapping) in &self.mappings {
            mapping.watch(&self.bell)?;
        }
        let mappings: Vec<_> = self.mappings.iter().map(|(_, m)| Arc::clone(m)).collect();
        let path = newest(&layers);
        let demand = Demand::new(layers, &pieces, mappings, (opener, runs))?;
        self.mappings.iter().for_each(|(_, m)| m.read_by(&demand));
        *self.demand.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&demand));
        *self.lock() = Some(Origin {
            mode: MemoryRestoreMode::OnDemand,
            path,
            files: Vec::new(),
        });
        Ok(demand)
    }

    /// The guest runs from now on.
    pub fn runs(&self) {
        if let Some(demand) = self.demand() {
            demand.runs();
        }
    }

    fn demand(&self) -> Option<Arc<Demand>> {
        let demand = self.demand.lock();
        demand.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has nothing more be read; what is not there is zeros.
    pub(super) fn give_up(&self) {
        if let Some(demand) = self.demand() {
            demand.give_up();
        }
    }

    /// Has all pages be there.
    ///
    /// # Errors
    ///
    /// The guest-physical address of the range of which the host has not enough, and why.
    pub fn populate(&self) -> Result<(), (u64, io::Error)> {
        let mut all = self.mappings.iter();
        all.try_for_each(|(start, mapping)| mapping.populate().map_err(|error| (*start, error)))
    }

    /// Memory, by guest-physical address.
    pub(super) fn mappings(&self) -> &[(u64, Arc<Mapping>)] {
        &self.mappings
    }

    /// Whether it is mapped from a file, of which some may be left.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        let origin = self.lock();
        let mode = origin.as_ref().map(|origin| origin.mode);
        mode == Some(MemoryRestoreMode::Mmap)
    }

    /// All of it is the machine's own: the files are needed no more.
    pub fn let_go(&self) {
        if let Some(origin) = self.lock().as_mut() {
            origin.files.clear();
        }
    }

    /// The mapping of a guest-physical address, and where in it that is.
    fn mapping_of(&self, address: u64) -> Option<(&Mapping, u64)> {
        let below = |(start, _): &&(u64, Arc<Mapping>)| *start <= address;
        let (start, mapping) = self.mappings.iter().rev().find(below)?;
        Some((mapping, address.saturating_sub(*start)))
    }

    /// Readable when memory may be lost.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.bell.raw_fd()
    }

    /// Whether memory is lost, now that the bell has rung; it is silent afterwards.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.bell.quiet();
        self.mappings
            .iter()
            .any(|(_, mapping)| mapping.lost().is_some())
    }

    /// Whether a file that still gives bytes has not the length that it had.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        let origin = self.lock();
        let mut files = origin.iter().flat_map(|origin| &origin.files);
        files.any(|file| file.cut().is_some())
    }

    /// What is wrong with the file.
    #[must_use]
    pub fn reason(&self) -> String {
        if let Some(reason) = self.demand().and_then(|demand| demand.reason()) {
            return reason;
        }
        let origin = self.lock();
        let Some(Origin { path, files, .. }) = origin.as_ref() else {
            return "the host does not give the guest's memory".to_owned();
        };
        for Source { path, file, len } in files {
            let path = path.display();
            match file.metadata() {
                Ok(facts) if facts.len() != *len => {
                    return format!("{path} has {} bytes, not {len} as before", facts.len());
                }
                Err(error) => return format!("{path}: {error}"),
                Ok(_) => (),
            }
        }
        let path = path.display();
        let others = if files.len() > 1 {
            " or of those that it needs"
        } else {
            ""
        };
        format!("the storage of {path}{others} does not give its bytes any more")
    }

    /// Memory has been cleared: nothing is of the snapshot any more.
    pub(super) fn forget(&self) {
        self.mappings.iter().for_each(|(_, m)| m.forget_lost());
        self.bell.quiet();
        *self.demand.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.lock() = None;
    }

    /// How memory came, until it is cleared.
    #[must_use]
    pub fn info(&self) -> Option<MemoryRestored> {
        let origin = self.lock();
        let Origin { mode, path, .. } = origin.as_ref()?;
        let left = self.demand().map(|demand| demand.left());
        let left = left.filter(|left| *left > 0);
        let of_file = left.is_some() || self.mappings.iter().any(|(_, m)| m.is_of_file());
        Some(MemoryRestored {
            mode: *mode,
            file: of_file.then(|| path.clone()),
            left,
        })
    }
}
