//! Making image files.
//!
//! A new file gets its name only when it is complete: until then it is a hidden one next to it. Where there is a file
//! already, it is locked before anything in it is changed, and keeps its name, links and rights.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use crate::file::Kind;
use crate::open::resolve;
use crate::opener::{Access, Opener};
use crate::qcow2::create::{self as qcow2};
use crate::raw::{OpenError, open_file};
use crate::storage::{FileStorage, Storage};
use crate::{CreateError, CreateOptions, Preallocation};

/// The unit of a disk's size, in bytes.
const SECTOR: u64 = 512;

/// How many hidden names are tried.
const TRIES: u32 = 100;

/// What is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewImage {
    /// A file whose bytes are the disk's.
    Raw {
        /// The disk's size in bytes; it is rounded up to a sector of 512 bytes.
        size: u64,
        /// Off, falloc or full.
        preallocation: Preallocation,
    },
    /// A qcow2 image.
    Qcow2(Box<CreateOptions>),
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateImageError {
    /// What is there cannot be opened or locked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A file cannot be created.
    #[error("cannot create {}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The image cannot be made.
    #[error("cannot make an image of {}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: CreateError,
    },
    /// A raw image has no tables.
    #[error("{}: a raw image has no metadata: preallocation can be off, falloc or full", path.display())]
    RawMetadata {
        /// The file.
        path: PathBuf,
    },
    /// A block device is smaller than the disk.
    #[error("{}: it has {have} bytes, but the disk {needed}", path.display())]
    DeviceTooSmall {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        have: u64,
        /// The disk's.
        needed: u64,
    },
}

/// A new image that does not have its final name yet. Unless [`NewFile::finish`] is called, what was created is
/// removed; a file that was there before stays, with whatever is in it by then.
pub struct NewFile<'a> {
    opener: &'a dyn Opener,
    path: PathBuf,
    /// Where it is until then, if it is new.
    hidden: Option<PathBuf>,
    /// A data file that is new as well.
    data: Option<PathBuf>,
    zeroed: bool,
}

impl<'a> NewFile<'a> {
    /// Makes an image for `path`.
    ///
    /// # Errors
    ///
    /// [`CreateImageError`]; a file that was there is unchanged, unless the host failed.
    pub fn begin(
        path: &Path,
        opener: &'a dyn Opener,
        image: &NewImage,
    ) -> Result<Self, CreateImageError> {
        Self::begin_on(path, opener, image, false)
    }

    /// The same where there is no file, or one that is empty when it is locked.
    ///
    /// # Errors
    ///
    /// As of [`NewFile::begin`]; `AlreadyExists` for any other file.
    pub(crate) fn begin_fresh(
        path: &Path,
        opener: &'a dyn Opener,
        image: &NewImage,
    ) -> Result<Self, CreateImageError> {
        Self::begin_on(path, opener, image, true)
    }

    fn begin_on(
        path: &Path,
        opener: &'a dyn Opener,
        image: &NewImage,
        fresh: bool,
    ) -> Result<Self, CreateImageError> {
        let mut new = NewFile {
            opener,
            path: path.to_owned(),
            hidden: None,
            data: None,
            zeroed: true,
        };
        let storage = match new.existing(path)? {
            Some(storage) if fresh && storage.len().map_or(true, |len| len > 0) => {
                return Err(CreateImageError::Create {
                    path: path.to_owned(),
                    source: io::ErrorKind::AlreadyExists.into(),
                });
            }
            Some(storage) => storage,
            None => new.hide()?,
        };
        new.zeroed = storage.grows_zeroed();
        match image {
            NewImage::Raw {
                size,
                preallocation,
            } => new.raw(&storage, *size, *preallocation)?,
            NewImage::Qcow2(options) => {
                // Its own tables tell what is zero, wherever they are.
                new.zeroed = true;
                let data = match &options.data_file {
                    None => None,
                    Some(name) => Some(new.data_file(OsStr::new(name))?),
                };
                let data = data.as_ref().map(|data| data as &dyn Storage);
                qcow2::create(&storage, data, options).map_err(|source| {
                    CreateImageError::Format {
                        path: path.to_owned(),
                        source,
                    }
                })?;
            }
        }
        Ok(new)
    }

    /// Where the image is now, to be filled.
    #[must_use]
    pub fn place(&self) -> &Path {
        self.hidden.as_deref().unwrap_or(&self.path)
    }

    /// Whether all of the disk reads as zeros, apart from a backing file.
    #[must_use]
    pub fn reads_as_zeros(&self) -> bool {
        self.zeroed
    }

    /// Leaves the image where it is, and to whoever gives it its name later or removes it. `None`: it is no new file and has its
    /// name.
    pub(crate) fn leave(mut self) -> Option<PathBuf> {
        self.data = None;
        self.hidden.take()
    }

    /// Gives the image its name. Its users have closed it before.
    ///
    /// # Errors
    ///
    /// [`CreateImageError::Create`], also when a file has appeared there meanwhile.
    pub fn finish(mut self) -> Result<(), CreateImageError> {
        if let Some(hidden) = &self.hidden {
            self.opener
                .rename(hidden, &self.path)
                .map_err(|source| CreateImageError::Create {
                    path: self.path.clone(),
                    source,
                })?;
        }
        self.hidden = None;
        self.data = None;
        Ok(())
    }

    /// What is at a path already, locked.
    fn existing(&self, path: &Path) -> Result<Option<FileStorage>, OpenError> {
        let access = Access {
            write: true,
            direct: false,
        };
        match open_file(path, self.opener, access, true) {
            Ok(file) => Ok(Some(FileStorage::new(file.into()))),
            Err(OpenError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a file, and gives its storage.
    fn created(&self, path: &Path) -> io::Result<FileStorage> {
        let access = Access {
            write: true,
            direct: false,
        };
        let file = self.opener.create(path, access)?;
        let file = crate::file::HostFile::new(file, Kind::Regular, false)?;
        Ok(FileStorage::new(file.into()))
    }

    fn hide(&mut self) -> Result<FileStorage, CreateImageError> {
        let failed = |source| CreateImageError::Create {
            path: self.path.clone(),
            source,
        };
        let name = self
            .path
            .file_name()
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        for number in 0..TRIES {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}-{number}.new", std::process::id()));
            let hidden = self.path.with_file_name(hidden);
            match self.created(&hidden) {
                Ok(storage) => {
                    self.hidden = Some(hidden);
                    return Ok(storage);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }

    fn data_file(&mut self, name: &OsStr) -> Result<FileStorage, CreateImageError> {
        let path = resolve(&self.path, name);
        if let Some(storage) = self.existing(&path)? {
            return Ok(storage);
        }
        let storage = self
            .created(&path)
            .map_err(|source| CreateImageError::Create {
                path: path.clone(),
                source,
            })?;
        self.data = Some(path);
        Ok(storage)
    }

    fn raw(
        &self,
        storage: &FileStorage,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<(), CreateImageError> {
        let path = || self.path.clone();
        if preallocation == Preallocation::Metadata {
            return Err(CreateImageError::RawMetadata { path: path() });
        }
        let failed = |source: io::Error| CreateImageError::Format {
            path: path(),
            source: source.into(),
        };
        let size = size.next_multiple_of(SECTOR);
        if !storage.grows_zeroed() {
            let have = storage.len().map_err(failed)?;
            if have < size {
                return Err(CreateImageError::DeviceTooSmall {
                    path: path(),
                    have,
                    needed: size,
                });
            }
        }
        storage
            .set_len(0)
            .and_then(|()| storage.set_len(size))
            .and_then(|()| qcow2::preallocate(storage, 0, size, preallocation))
            .and_then(|()| storage.sync())
            .map_err(failed)
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        for path in [self.hidden.take(), self.data.take()].into_iter().flatten() {
            if let Err(error) = self.opener.remove(&path) {
                tracing::warn!(%error, path = %path.display(), "an unfinished image stays behind");
            }
        }
    }
}

/// Makes an image at `path`.
///
/// # Errors
///
/// As [`NewFile::begin`] and [`NewFile::finish`].
pub fn create(path: &Path, opener: &dyn Opener, image: &NewImage) -> Result<(), CreateImageError> {
    NewFile::begin(path, opener, image)?.finish()
}
