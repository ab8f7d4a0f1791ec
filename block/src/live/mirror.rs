//! Copying a disk in use to another image, until both hold the same.
//!
//! 1. [`Mirror::of`] makes the target, or opens one that is there.
//! 2. Its user ends all queues of the disk, and goes on with those of [`Mirror::begin`], which note changes. Nothing else is
//!    different for the disk.
//! 3. [`Mirror::step`], over all of it, copies; then [`Mirror::catch_up`] what has been changed meanwhile.
//! 4. The queues are ended once more, and [`Mirror::finish`] copies the rest. Then the disk goes on at the target, or as before; and the
//!    target holds what the disk held at that instant.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::Made;
use super::changes::{Changes, Tracked};
use super::copy::Copier;
use super::layers::{Layer, Unlike, check_alike};
use crate::disk::Disk;
use crate::open::{ImageOptions, Opened, open_chain};
use crate::opener::{Access, Opener};
use crate::ops::{CreateImageError, NewFile, NewImage};
use crate::options::Format;
use crate::raw::{OpenError, open_file};
use crate::{CreateOptions, Preallocation};

/// Where a disk is copied to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorTarget {
    /// The file or block device.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// It is there already, and what it holds is overwritten. Otherwise it is made, and goes unless all is copied.
    pub existing: bool,
}

/// Why a disk is not copied.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// It cannot be read here.
    #[error(
        "a disk of this kind cannot be copied: only files and block devices, raw or qcow2, can"
    )]
    Fixed,
    /// There is something of that name.
    #[error("{}: there is a file of that name: give one that does not exist yet, or say that it may be overwritten", .0.display())]
    Exists(PathBuf),
    /// The guest would see another disk.
    #[error(transparent)]
    Unlike(#[from] Unlike),
    /// The target cannot be made.
    #[error(transparent)]
    Create(#[from] CreateImageError),
    /// The target cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What is left cannot be copied, or not be made durable.
    #[error("the copy cannot be completed")]
    Copy(#[source] io::Error),
}

/// A disk that is being copied.
pub struct Mirror {
    plain: Arc<dyn Disk>,
    noting: Arc<dyn Disk>,
    // Closed before its file is removed.
    copier: Copier,
    alone: Arc<dyn Disk>,
    target: MirrorTarget,
    made: Option<Made>,
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

impl Mirror {
    /// Makes or opens the target, for `disk`, which was opened with `options` and may be in use.
    ///
    /// # Errors
    ///
    /// [`MirrorError`]; nothing that was made is left then.
    pub fn of(
        disk: Arc<dyn Disk>,
        target: MirrorTarget,
        opener: Arc<dyn Opener>,
        options: &ImageOptions,
    ) -> Result<Self, MirrorError> {
        let source = disk.live().ok_or(MirrorError::Fixed)?.source();
        let size = disk.info().size;
        let mut options = options.clone();
        options.disk.format = Some(target.format);
        options.disk.read_only = false;
        let made = if target.existing {
            None
        } else {
            make(&target, size, &*opener)?;
            Some(Made::new(Arc::clone(&opener), target.path.clone()))
        };
        let layer = open(&target, &*opener, &options)?;
        let alone = layer.disk(&options, &target.path)?;
        check_alike(&*alone, &*disk, &target.path)?;
        let changes = Arc::new(Changes::new(size));
        let noting = Tracked::new(Arc::clone(&disk), Arc::clone(&changes));
        Ok(Self {
            plain: disk,
            noting: Arc::new(noting),
            copier: Copier {
                image: source,
                from: 0,
                layers: None,
                target: layer.image(&options),
                changes: Some(changes),
            },
            alone,
            target,
            made,
        })
    }

    /// Where the copy is.
    #[must_use]
    pub fn target(&self) -> &MirrorTarget {
        &self.target
    }

    /// The disk, whose changes are noted.
    #[must_use]
    pub fn begin(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.noting)
    }

    /// The disk as it was.
    #[must_use]
    pub fn given_up(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.plain)
    }

    /// How much there is to be gone through, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.copier.size()
    }

    /// Deals with at most 2 MiB from `offset` on, which is less than the size; gives how many bytes have been dealt with,
    /// at least 1, and how many have been copied. Any thread may do it while the disk is worked on.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` for an image that contradicts itself; the disk is as it was.
    pub fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        self.copier.step(offset)
    }

    /// Copies once more a part that has been changed, the next one from `at` on: how many bytes, and where it ends.
    ///
    /// # Errors
    ///
    /// As [`Mirror::step`].
    pub fn catch_up(&self, at: u64) -> io::Result<Option<(u64, u64)>> {
        self.copier.catch_up(at)
    }

    /// How much is to be copied once more, in bytes, at most.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.copier.left()
    }

    /// Holds up who changes the disk while there are more than so many bytes to be copied once more.
    pub fn hold_up(&self, bytes: u64) {
        self.copier.hold_up(bytes);
    }

    /// Makes what has been copied durable, so that little is left for the end.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.copier.target.flush()
    }

    /// Copies the rest. There is no queue of the disk any more. `go` is asked once, at the end: where it is `false`, nobody waits any
    /// more. The disk of the target is given, to go on with or not.
    ///
    /// # Errors
    ///
    /// [`MirrorError::Copy`]; the disk is as it was.
    pub fn finish(&mut self, go: &dyn Fn() -> bool) -> Result<Arc<dyn Disk>, MirrorError> {
        self.copier.complete().map_err(MirrorError::Copy)?;
        if !go() {
            // The disk may have gone on by now, and what was copied be of no one instant.
            return Err(MirrorError::Copy(io::ErrorKind::TimedOut.into()));
        }
        if let Some(target) = self.copier.target.as_qcow2() {
            // Whatever was merged into it before, it holds one disk now.
            let unmarked = target.mark_unfinished(None);
            unmarked.map_err(|error| MirrorError::Copy(error.into()))?;
        }
        if let Some(made) = &mut self.made {
            made.kept = true;
        }
        Ok(Arc::clone(&self.alone))
    }
}

fn make(target: &MirrorTarget, size: u64, opener: &dyn Opener) -> Result<(), MirrorError> {
    let there = opener.open(&target.path, Access::default());
    if !matches!(there, Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Err(MirrorError::Exists(target.path.clone()));
    }
    let image = match target.format {
        Format::Raw => NewImage::Raw {
            size,
            preallocation: Preallocation::Off,
        },
        Format::Qcow2 => NewImage::Qcow2(Box::new(CreateOptions {
            size,
            ..CreateOptions::default()
        })),
    };
    NewFile::begin(&target.path, opener, &image)?.finish()?;
    Ok(())
}

fn open(
    target: &MirrorTarget,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Layer, OpenError> {
    if target.format == Format::Qcow2
        && let Opened::Qcow2(image) = open_chain(&target.path, opener, options)?
    {
        return Ok(Layer::Qcow2(image));
    }
    let disk = &options.disk;
    let file = open_file(&target.path, opener, disk.access(), disk.keep())?;
    Ok(Layer::Raw(Arc::new(file)))
}
