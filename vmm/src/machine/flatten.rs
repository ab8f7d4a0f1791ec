//! A snapshot that needs no other, made of one and those that it needs.
//!
//! # Contract
//!
//! * Every checksum of a page that is taken is compared; what is damaged is refused by name, and leaves nothing.
//! * The snapshots that it is made of stay as they are. The new one has an id of its own: what is compared with them, or needs
//!   them, does so as before.

use std::path::{Path, PathBuf};

use migration::SaveError;
use migration::pages::{CHUNK, Layers, PageIndex, PageWriter, PagesError};

use super::MachineError;
use super::manifest::NAME;
use super::saved::{RestoreFailure, Saved, Whole};
use super::saving::{Files, new_id};
use super::snapshot::index_section;
use crate::opener::{OpenError, Opener};

/// Why no whole snapshot was made.
#[derive(Debug, thiserror::Error)]
pub enum FlattenError {
    /// What it is to be made of is refused.
    #[error(transparent)]
    From(#[from] RestoreFailure),
    /// There is one already.
    #[error("{} holds a snapshot already: choose another directory", directory.display())]
    Exists {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory takes no files.
    #[error(transparent)]
    Open(OpenError),
    /// The host gives no random numbers for its id.
    #[error(transparent)]
    Id(#[from] MachineError),
    /// Its memory cannot be written.
    #[error("{}", directory.display())]
    Memory {
        /// The directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: PagesError,
    },
    /// Its index has no form.
    #[error("the index of memory")]
    Index(#[from] SaveError),
    /// The rest of it cannot be written.
    #[error("{}: {reason}", directory.display())]
    Write {
        /// The directory.
        directory: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What has been made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Flattened {
    /// Its id.
    pub id: String,
    /// Of how many snapshots.
    pub snapshots: usize,
    /// Bytes of guest memory that are not zeros.
    pub data: u64,
}

/// Makes a snapshot in the directory `to` of `saved`. `step` hears how many bytes of its memory have been gone through, and says
/// whether to go on.
///
/// # Errors
///
/// [`FlattenError`]; nothing is left then.
pub fn flatten(
    saved: Saved,
    to: &Path,
    opener: &Opener,
    step: &mut dyn FnMut(u64) -> bool,
) -> Result<Flattened, FlattenError> {
    let Whole {
        config,
        memory,
        mut set,
    } = saved.into_whole();
    let files = Files::begin(opener, to, new_id()?).map_err(|error| refused(to, error))?;
    let index = write(&memory, &files, to, step)?;
    set.push(index_section(&index)?);
    let filled = files.fill(&set, config, None);
    filled.map_err(|reason| FlattenError::Write {
        directory: to.to_owned(),
        reason,
    })?;
    let made = Flattened {
        id: files.id().to_owned(),
        snapshots: memory.layers().len(),
        data: index.data(),
    };
    files.keep(opener).map_err(|error| refused(to, error))?;
    Ok(made)
}

fn write(
    memory: &Layers,
    files: &Files,
    to: &Path,
    step: &mut dyn FnMut(u64) -> bool,
) -> Result<PageIndex, FlattenError> {
    let failed = |source| FlattenError::Memory {
        directory: to.to_owned(),
        source,
    };
    let mut writer = PageWriter::new(&memory.ranges());
    let mut buffer = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
    for number in 0..writer.count() {
        if !step(writer.done()) {
            return Err(failed(PagesError::Cancelled));
        }
        let there = memory.load(u32::try_from(number).unwrap_or(u32::MAX), &mut buffer);
        let there = there.map_err(RestoreFailure::memory)?;
        let put = writer.put(number, files.memory(), &buffer, &there);
        put.map_err(failed)?;
    }
    let index = writer.finish(files.memory()).map_err(failed)?;
    index.ok_or_else(|| failed(PagesError::Cancelled))
}

fn refused(directory: &Path, error: OpenError) -> FlattenError {
    match error {
        OpenError::Exists { path } if path.ends_with(NAME) => FlattenError::Exists {
            directory: directory.to_owned(),
        },
        error => FlattenError::Open(error),
    }
}
