//! Taking what lies below a disk in use into its own image, so that images of the chain are needed no more.
//!
//! 1. [`Stream::step`], over the whole disk, has the image hold itself what images below it hold. The disk is worked on meanwhile.
//! 2. Its user ends all queues of the disk.
//! 3. [`Stream::finish`] makes that durable and then has the header name another backing file, or none, in one write. [`Cut::disk`]
//!    is the disk on the shorter chain.
//!
//! At every instant the file alone says what the disk holds: before the header changes it merely holds more than it need. So
//! whoever is killed in between can begin again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Live, Top, name_of};
use crate::disk::Disk;
use crate::image::Image;
use crate::open::{ImageOptions, settings, unusable};
use crate::opener::Opener;
use crate::ops::{chain, find};
use crate::options::Format;
use crate::qcow2::disk::Qcow2Disk;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, CHUNK, Qcow2, RawBacking};
use crate::raw::{OpenError, RawImage};

/// Why a chain stays as long as it is.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Only qcow2 images have something below them.
    #[error("its image is not of format qcow2: there is nothing below it")]
    NotQcow2,
    /// There is nothing below.
    #[error("its image has no backing file: there is nothing to take in")]
    NoBacking,
    /// It is not written to.
    #[error("the disk is read-only: nothing can be taken into its image")]
    ReadOnly,
    /// Its internal snapshots need what is below, which is taken in for the disk as it is now alone.
    #[error(
        "its image has {0} internal snapshots, which lean on what is below it: delete them first"
    )]
    Snapshots(u32),
    /// The base is not in the chain, or is the first one below already.
    #[error("{}: there is no image between it and the disk's: give one that lies further below", .0.display())]
    NotBelow(PathBuf),
    /// The base cannot be named.
    #[error("{}: its name is no UTF-8, so that the image cannot name it", .0.display())]
    Name(PathBuf),
    /// The chain cannot be looked at.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What has been taken in cannot be made durable, or the header cannot be changed.
    #[error("the image cannot be made independent of what is below it")]
    Cut(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The image of a disk, which is to hold more itself.
#[derive(Debug)]
pub struct Stream {
    image: Arc<Qcow2>,
    /// What stays below: its depth, and how the image is to name it.
    base: Option<(usize, String, Format)>,
}

impl Stream {
    /// Looks at the chain of `disk`, whose image is at `path` and was opened with `options`. `base` is what stays below it;
    /// `None`: nothing.
    ///
    /// # Errors
    ///
    /// [`StreamError`].
    pub fn of(
        disk: &dyn Disk,
        path: &Path,
        base: Option<&Path>,
        opener: &dyn Opener,
        options: &ImageOptions,
    ) -> Result<Self, StreamError> {
        let Some(Live(Top::Qcow2(image))) = disk.live() else {
            return Err(StreamError::NotQcow2);
        };
        if disk.info().read_only {
            return Err(StreamError::ReadOnly);
        }
        if image.backing().is_none() {
            return Err(StreamError::NoBacking);
        }
        let header =
            Header::load(&*image.storages().0).map_err(|error| unusable(path, "qcow2", error))?;
        check_no_snapshots(&header)?;
        let Some(base) = base else {
            return Ok(Self { image, base: None });
        };
        // They are locked, by this disk.
        let images = chain(path, opener, Format::Qcow2, options.backing, false)?;
        let depth = find(base, images.iter().map(|image| image.path.as_path()));
        let not_below = || StreamError::NotBelow(base.to_owned());
        let depth = depth.filter(|&depth| depth > 1).ok_or_else(not_below)?;
        let found = images.get(depth).ok_or_else(not_below)?;
        let name = name_of(&found.path, path).map_err(|_| StreamError::Name(base.to_owned()))?;
        let base = Some((depth, name, found.format));
        Ok(Self { image, base })
    }

    /// The disk's size in bytes: what there is to be gone through.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.image.size()
    }

    /// Deals with at most 2 MiB from `offset` on, which is less than the size; gives how many bytes have been dealt with,
    /// at least 1, and how many have been copied. Any thread may do it while the disk is worked on.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` for an image that contradicts itself; the disk is as it was then.
    pub fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        let depth = self.base.as_ref().map(|(depth, ..)| *depth);
        self.image.populate(offset, CHUNK, depth)
    }

    /// Makes what has been taken in durable.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    /// Cuts the chain. All of the disk has been gone through, and there is no queue of it any more. `options` are those
    /// that the disk was opened with.
    ///
    /// # Errors
    ///
    /// [`StreamError::Cut`]; the disk is as it was then.
    pub fn finish(self, options: &ImageOptions) -> Result<Cut, StreamError> {
        self.image
            .seal()
            .map_err(|error| StreamError::Cut(error.into()))?;
        match self.cut(options) {
            Ok(disk) => Ok(Cut {
                disk: Some(Arc::new(disk)),
                before: self.image,
                kept: false,
            }),
            Err(error) => {
                self.image.unseal();
                Err(StreamError::Cut(error))
            }
        }
    }

    fn cut(
        &self,
        options: &ImageOptions,
    ) -> Result<Qcow2Disk, Box<dyn std::error::Error + Send + Sync>> {
        let (storage, data) = self.image.storages();
        let before = Header::load(&*storage)?;
        check_no_snapshots(&before)?;
        let mut header = before.clone();
        header.backing = self.base.as_ref().map(|(_, name, _)| name.into());
        header.backing_format = self
            .base
            .as_ref()
            .map(|(.., format)| format.name().to_owned());
        let settings = settings(options, true);
        let backing = match &self.base {
            Some((depth, ..)) => {
                Some(below(&self.image, *depth, settings.sync).ok_or("the base is gone")?)
            }
            None => None,
        };
        let image = Qcow2::open(
            header.clone(),
            Arc::clone(&storage),
            data,
            backing,
            settings,
        )?;
        let disk = Qcow2Disk::new(Arc::new(image), &options.disk)?;
        let stored = header.store(&*storage).and_then(|()| storage.sync());
        if let Err(error) = stored {
            // With either header the disk holds the same.
            if let Err(error) = before.store(&*storage) {
                tracing::warn!(%error, "the header of an image was not put back");
            }
            return Err(error.into());
        }
        Ok(disk)
    }
}

/// Refuses an image with internal snapshots: only clusters of the disk as it is now are taken in.
fn check_no_snapshots(header: &Header) -> Result<(), StreamError> {
    match header.snapshots {
        0 => Ok(()),
        count => Err(StreamError::Snapshots(count)),
    }
}

/// What is at a depth of the chain.
fn below(image: &Qcow2, depth: usize, sync: bool) -> Option<Backing> {
    let mut image = image;
    for _ in 1..depth {
        match image.below()? {
            Backing::Qcow2(next) => image = next,
            Backing::Raw(_) => return None,
        }
    }
    Some(match image.below()? {
        Backing::Qcow2(base) => Backing::Qcow2(Arc::clone(base)),
        Backing::Raw(raw) => {
            let storage = Arc::clone(&raw.storage);
            let image = RawImage::new(Arc::clone(&storage), raw.size, true, sync);
            Backing::Raw(RawBacking {
                image: Box::new(image),
                storage,
                size: raw.size,
            })
        }
    })
}

/// A disk on a shorter chain. Unless it is kept, the disk before is as it was; all queues and other users of
/// [`Cut::disk`] have gone before.
#[derive(Debug)]
pub struct Cut {
    /// Always there, but at the end.
    disk: Option<Arc<Qcow2Disk>>,
    before: Arc<Qcow2>,
    kept: bool,
}

impl Cut {
    /// The disk.
    #[must_use]
    pub fn disk(&self) -> Option<Arc<dyn Disk>> {
        self.disk.clone().map(|disk| disk as Arc<dyn Disk>)
    }

    /// Stays with it. The images that are needed no more are closed with the disk before.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.disk = None;
        if !self.kept {
            self.before.unseal();
        }
    }
}
