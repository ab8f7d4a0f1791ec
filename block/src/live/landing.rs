//! An image that is made for a disk which comes from elsewhere ([`Transfer`](super::Transfer)), and is that disk when all has come.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Base, Live, Made, Top, identity};
use crate::disk::Disk;
use crate::image::Image;
use crate::nbd;
use crate::open::{ImageOptions, open_disk};
use crate::opener::{Access, Opener};
use crate::ops::{CreateImageError, NewFile, NewImage};
use crate::options::Format;
use crate::raw::{OpenError, RawImage};
use crate::size::Size;
use crate::storage::FileStorage;
use crate::{CreateOptions, Preallocation};

/// Where devices are, and no images.
const DEVICES: &str = "/dev";
/// Of its directories one is for files.
const MEMORY: &str = "/dev/shm";

/// Why there is no image for a disk.
#[derive(Debug, thiserror::Error)]
pub enum LandingError {
    /// There is something of that name.
    #[error("{}: there is a file of that name already, which is not overwritten: move it away, or say where else the disk is to be", .0.display())]
    Exists(PathBuf),
    /// What is there cannot be looked at.
    #[error("{}: it cannot be looked at", path.display())]
    Look {
        /// Where.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// It would not be a file.
    #[error("{}: no image is made there: say where else the disk is to be", .0.display())]
    Place(PathBuf),
    /// A raw image holds everything itself.
    #[error(
        "{}: only a qcow2 image can lie on another one: copy all that the disk holds", .0.display()
    )]
    Raw(PathBuf),
    /// What lies below is another image than at the source.
    #[error("{}: its backing file {base} has {} here, and {} at the source", path.display(), Size(*here), Size(*there))]
    Base {
        /// The image.
        path: PathBuf,
        /// The name of what lies below it.
        base: String,
        /// Its size here, in bytes.
        here: u64,
        /// What it is to be.
        there: u64,
    },
    /// The disk is to be written.
    #[error("{}: a disk that is copied cannot be read-only", .0.display())]
    ReadOnly(PathBuf),
    /// It cannot be made.
    #[error(transparent)]
    Create(#[from] CreateImageError),
    /// It cannot be opened, or what lies below it.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// An image for a disk that comes. Unless it is kept, it is removed when this is dropped; a file that was there, and empty, is emptied again.
pub struct Landing {
    // Closed before its file is removed.
    disk: Arc<dyn Disk>,
    image: Arc<dyn Image>,
    path: PathBuf,
    file: File,
}

/// What becomes of the file unless it is kept.
struct File {
    made: Option<Made>,
    /// Device and inode.
    identity: Option<(u64, u64)>,
    opener: Arc<dyn Opener>,
    path: PathBuf,
    /// Its file is nobody's business any more.
    kept: AtomicBool,
}

impl std::fmt::Debug for Landing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Landing")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Landing {
    /// Makes the image at `path` for a disk of `size` bytes which is to be opened with `options`, on top of `base`, and opens it. There is nothing, or an empty file.
    ///
    /// # Errors
    ///
    /// [`LandingError`]; nothing that was made is left then.
    pub fn create(
        path: &Path,
        size: u64,
        base: Option<&Base>,
        opener: Arc<dyn Opener>,
        options: &ImageOptions,
    ) -> Result<Self, LandingError> {
        if options.disk.read_only {
            return Err(LandingError::ReadOnly(path.to_owned()));
        }
        let image = plan(path, size, base, options)?;
        let was_there = is_empty_file(path, &*opener)?;
        NewFile::begin_fresh(path, &*opener, &image)?.finish()?;
        let made = (!was_there).then(|| Made::new(Arc::clone(&opener), path.to_owned()));
        let disk = open_disk(path, &*opener, options)?;
        let file = File {
            made,
            identity: identity(&*opener, path),
            opener: Arc::clone(&opener),
            path: path.to_owned(),
            kept: AtomicBool::new(false),
        };
        let live = disk.live();
        let live = live.ok_or_else(|| LandingError::Place(path.to_owned()))?;
        if let (Some(base), Live(Top::Qcow2(image))) = (base, &live) {
            let here = image.backing().map_or(0, Image::size);
            if here != base.size {
                return Err(LandingError::Base {
                    path: path.to_owned(),
                    base: base.name.clone(),
                    here,
                    there: base.size,
                });
            }
        }
        Ok(Self {
            image: live.target(),
            disk,
            path: path.to_owned(),
            file,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk, for when all has come.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.disk)
    }

    /// Writes what has come.
    ///
    /// # Errors
    ///
    /// The host's, and `InvalidInput` for what lies outside of the disk.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.image.write(offset, bytes)
    }

    /// Makes a part zeros, where it is not.
    ///
    /// # Errors
    ///
    /// As [`Landing::write`].
    pub fn clear(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.image.size()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        super::copy::clear(&*self.image, offset, len)
    }

    /// Makes all durable that has been written.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    /// Whether the file stays when this is dropped; at first it does not.
    pub fn keep(&self, kept: bool) {
        self.file.kept.store(kept, Ordering::SeqCst);
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let kept = self.kept.load(Ordering::SeqCst);
        match &mut self.made {
            Some(made) => made.kept = kept,
            None if kept => {}
            // Somebody has put another file there meanwhile.
            None if self.identity.is_none()
                || identity(&*self.opener, &self.path) != self.identity => {}
            None => {
                let access = Access {
                    write: true,
                    direct: false,
                };
                let emptied = self.opener.open(&self.path, access);
                if let Err(error) = emptied.and_then(|file| file.set_len(0)) {
                    tracing::warn!(%error, path = %self.path.display(), "an image that is not used stays behind");
                }
            }
        }
    }
}

impl Live {
    /// What the disk holds, to be written before there is any queue of it.
    fn target(&self) -> Arc<dyn Image> {
        match &self.0 {
            Top::Raw(file) => {
                let (file, size) = (Arc::clone(file), file.size());
                let storage = Arc::new(FileStorage::new(file));
                Arc::new(RawImage::new(storage, size, false, true))
            }
            Top::Qcow2(image) => Arc::clone(image) as Arc<dyn Image>,
        }
    }
}

fn plan(
    path: &Path,
    size: u64,
    base: Option<&Base>,
    options: &ImageOptions,
) -> Result<NewImage, LandingError> {
    let among_devices = path.starts_with(DEVICES) && !path.starts_with(MEMORY);
    if !path.is_absolute() || path.file_name().is_none() || among_devices || nbd::is_uri(path) {
        return Err(LandingError::Place(path.to_owned()));
    }
    match options.disk.format {
        Some(Format::Qcow2) => Ok(NewImage::Qcow2(Box::new(CreateOptions {
            size,
            backing: base.map(|base| (base.name.clone(), Some(base.format.name().to_owned()))),
            ..CreateOptions::default()
        }))),
        _ if base.is_some() => Err(LandingError::Raw(path.to_owned())),
        _ => Ok(NewImage::Raw {
            size,
            preallocation: Preallocation::Off,
        }),
    }
}

/// Whether there is a file that holds nothing, and not nothing at all.
fn is_empty_file(path: &Path, opener: &dyn Opener) -> Result<bool, LandingError> {
    let look = |source| LandingError::Look {
        path: path.to_owned(),
        source,
    };
    let facts = match opener.open(path, Access::default()) {
        Ok(file) => file.metadata().map_err(look)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(look(error)),
    };
    if facts.is_file() && facts.len() == 0 {
        return Ok(true);
    }
    Err(LandingError::Exists(path.to_owned()))
}
