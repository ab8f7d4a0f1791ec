//! What a disk is, told without having it: for a machine that is to get it from another, which still uses it.
//!
//! # Contract
//!
//! * The disk's files are opened as they would be for the disk, for writing where it is to be written, so that what can be reached and
//!   what not is told before anybody relies on it. They are closed again.
//! * Nothing is written: no locks are taken, no lease is asked for, nothing is repaired. Of the files' times at most that of the last
//!   access changes.
//! * Of qcow2 images the headers are read and nothing else. Who has the disk may write to it meanwhile.
//! * Of an export of an NBD server a connection is made, and ended.

use std::path::Path;

use crate::disk::DiskInfo;
use crate::lock::{self, Intent, LockError};
use crate::nbd::{self, NbdDisk};
use crate::open::{Headers, ImageOptions};
use crate::opener::Opener;
use crate::options::{DiskOptions, Format};
use crate::raw::{OpenError, RawDisk};
use crate::storage::Storage;

/// What can be seen of the locks that others have on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeenLocks {
    /// The disk would take none that keep others out: it is only read, is without locks, or is no file of this host.
    None,
    /// Somebody could be kept out, and is not seen to have each of the locks that keep others out of all that the disk writes to.
    Free,
    /// Others have every one of them: as long as that is so, nobody gets the disk, and who has it could see it by them.
    Held,
}

/// A disk that has been looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookedAt {
    /// What it is when it is opened with the same options.
    pub info: DiskInfo,
    /// What can be seen of the locks that others have on it.
    pub locks: SeenLocks,
}

/// Looks at the disk that [`crate::open_disk`] would open, whoever uses it now.
///
/// # Errors
///
/// [`OpenError`]: it could not be opened, though nobody used it. Also [`OpenError::NoLocks`], where it would be locked and its file system cannot tell of locks.
pub fn look_at_disk(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<LookedAt, OpenError> {
    let unlocked = ImageOptions {
        disk: DiskOptions {
            lock: false,
            lease: None,
            ..options.disk.clone()
        },
        ..options.clone()
    };
    let (disk, unlocked) = (&options.disk, &unlocked);
    let probe = |file: &dyn Storage| match file.host_file() {
        Some(file) if disk.lock && !disk.read_only => seen(path, file.file()),
        _ => Ok(SeenLocks::None),
    };
    if disk.format != Some(Format::Qcow2) && nbd::is_uri(path) {
        return Ok(LookedAt {
            info: crate::Disk::info(&NbdDisk::open(path, opener, &unlocked.disk)?),
            locks: SeenLocks::None,
        });
    }
    if disk.format != Some(Format::Qcow2) {
        let raw = RawDisk::open(path, opener, &unlocked.disk)?;
        let storage = crate::storage::FileStorage::new(raw.file());
        return Ok(LookedAt {
            info: crate::Disk::info(&raw),
            locks: probe(&storage)?,
        });
    }
    let Headers { info, written } = Headers::read(path, opener, unlocked)?;
    let mut locks = SeenLocks::None;
    for file in written {
        locks = locks.and(probe(&*file)?);
    }
    Ok(LookedAt { info, locks })
}

impl SeenLocks {
    /// Of two files of one disk, or two disks of one machine, all of which are needed.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, seen) | (seen, Self::None) => seen,
            (Self::Held, Self::Held) => Self::Held,
            _ => Self::Free,
        }
    }
}

/// What a writer of this opened file, which has no locks itself, would find.
fn seen(path: &Path, file: &std::fs::File) -> Result<SeenLocks, OpenError> {
    match lock::is_held(file, Intent::Write) {
        Ok(true) => Ok(SeenLocks::Held),
        Ok(false) | Err(LockError::Held { .. }) => Ok(SeenLocks::Free),
        Err(LockError::Unsupported { source, .. }) => Err(OpenError::NoLocks {
            path: path.to_owned(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests;
