//! Checking and repairing images.

use std::path::{Path, PathBuf};

use crate::open::unusable;
use crate::opener::{Access, Opener};
use crate::qcow2::check::{self, CheckError};
use crate::qcow2::repair;
use crate::raw::{OpenError, open_file};
use crate::storage::FileStorage;
use crate::{CheckReport, Finding, Format, Repair};

/// Why an image was not checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckImageError {
    /// Raw images have nothing to check.
    #[error("{}: a raw image has nothing that could be checked", path.display())]
    Raw {
        /// The image.
        path: PathBuf,
    },
    /// It cannot be opened, or it is so broken that there is no checking it.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Checks an image, and repairs what is asked for. Every finding goes to `sink`. `lock`: fail while somebody else
/// writes to it; a repair always locks.
///
/// # Errors
///
/// [`CheckImageError`].
pub fn check(
    path: &Path,
    opener: &dyn Opener,
    format: Format,
    mend: Option<Repair>,
    lock: bool,
    sink: &mut dyn FnMut(Finding),
) -> Result<CheckReport, CheckImageError> {
    if format == Format::Raw {
        return Err(CheckImageError::Raw {
            path: path.to_owned(),
        });
    }
    let access = Access {
        write: mend.is_some(),
        direct: false,
    };
    let file = open_file(path, opener, access, lock || mend.is_some())?;
    let storage = FileStorage::new(file.into());
    let report = match mend {
        None => check::check(&storage, sink),
        Some(mend) => repair::repair(&storage, mend, sink),
    };
    report.map_err(|error: CheckError| unusable(path, "qcow2", error).into())
}
