//! Changing what the header of a qcow2 image says about its format.

use std::path::{Path, PathBuf};

use crate::open::{prepare, unusable};
use crate::opener::{Access, Opener};
use crate::qcow2::header::{Header, LAZY_REFCOUNTS};
use crate::raw::{OpenError, open_file};
use crate::storage::{FileStorage, Storage};

/// What is to be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// Make a version 2 image one of version 3.
    pub upgrade: bool,
    /// Whether refcount updates may be put off; `None`: as it is.
    pub lazy_refcounts: Option<bool>,
}

/// Why an image cannot be amended.
#[derive(Debug, thiserror::Error)]
pub enum AmendError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Only version 3 has that.
    #[error("image {} is of compat=0.10, and lazy_refcounts need 1.1: say compat=1.1 as well", path.display())]
    Version2 {
        /// The image.
        path: PathBuf,
    },
    /// The header could not be written.
    #[error("cannot write the header of image {}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Changes what the header of a qcow2 image says. It is durable when this returns.
///
/// # Errors
///
/// [`AmendError`]; the image is as it was then, unless the host failed.
pub fn amend(path: &Path, opener: &dyn Opener, change: Amend) -> Result<(), AmendError> {
    let access = Access {
        write: true,
        direct: false,
    };
    let storage = FileStorage::new(open_file(path, opener, access, true)?.into());
    let mut header = Header::load(&storage).map_err(|error| unusable(path, "qcow2", error))?;
    prepare(path, &mut header, &storage)?;
    if change.upgrade && header.version < 3 {
        header.version = 3;
        header.header_length = Header::LENGTH;
    }
    match change.lazy_refcounts {
        Some(true) if header.version < 3 => {
            let path = path.to_owned();
            return Err(AmendError::Version2 { path });
        }
        Some(true) => header.compatible |= LAZY_REFCOUNTS,
        Some(false) => header.compatible &= !LAZY_REFCOUNTS,
        None => {}
    }
    header
        .store(&storage)
        .and_then(|()| storage.sync())
        .map_err(|source| AmendError::Header {
            path: path.to_owned(),
            source,
        })
}
