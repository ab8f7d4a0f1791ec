//! Taking what lies below a disk in use into its own image, so that images of the chain are needed no more.
//!
//! 1. [`Stream::step`], over the whole disk, has the image hold itself what images below it hold. The disk is worked on meanwhile.
//! 2. [`Stream::name`] makes that durable and then has the header name another backing file, or none, in one write.
//! 3. Its user ends all queues of the disk.
//! 4. [`Stream::finish`] opens the image anew, without the images that it needs no more. [`Cut::disk`] is the disk on the shorter
//!    chain.
//!
//! At every instant the file alone says what the disk holds: with either header it holds the same. So whoever is killed in
//! between can begin again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::layers::check_same;
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
use crate::unfinished;

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
    /// Only an image below the disk's own takes in what is below that.
    #[error("{}: it does not lie below the disk's image, and is to take in what lies below it", .0.display())]
    NotInMiddle(PathBuf),
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
        // What goes may be what makes an image whole that stays.
        unfinished::check(images.iter().take(1).chain(images.iter().skip(depth)))?;
        check_same(&image, depth, &found.path, opener)?;
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

    /// Has the header name what stays below. All of the disk has been gone through; it may be worked on meanwhile.
    ///
    /// # Errors
    ///
    /// [`StreamError`]; the disk is as it was then.
    pub fn name(&self) -> Result<(), StreamError> {
        let cut = |error: io::Error| StreamError::Cut(error.into());
        self.image.flush().map_err(cut)?;
        check_no_snapshots(&self.image.lock().header)?;
        let base = self.base.as_ref();
        self.image
            .name_backing(base.map(|(_, name, format)| (name.as_str(), *format)))
            .map_err(|error| StreamError::Cut(error.into()))?;
        // So that little is left to be written when queues are stopped.
        self.image.flush().map_err(cut)
    }

    /// Lets go of what is needed no more. The header has been changed, and there is no queue of the disk any more. `options` are
    /// those that the disk was opened with. `go` is asked once, when all has been written out and before anything is changed: where it
    /// is `false`, nobody waits for the end any more, and the disk may be in use again.
    ///
    /// # Errors
    ///
    /// [`StreamError::Cut`]; the disk is as it was then.
    pub fn finish(self, options: &ImageOptions, go: &dyn Fn() -> bool) -> Result<Cut, StreamError> {
        let settings = settings(options, true);
        let backing = match &self.base {
            Some((depth, ..)) => {
                let found = below(&self.image, *depth, settings.sync);
                Some(found.ok_or_else(|| StreamError::Cut("the base is gone".into()))?)
            }
            None => None,
        };
        reopen(&self.image, backing, options, go).map_err(StreamError::Cut)
    }
}

/// Opens a disk's image anew, on top of `backing`; its header names that already.
pub(super) fn reopen(
    image: &Arc<Qcow2>,
    backing: Option<Backing>,
    options: &ImageOptions,
    go: &dyn Fn() -> bool,
) -> Result<Cut, Box<dyn std::error::Error + Send + Sync>> {
    image.bring_out()?;
    if !go() {
        return Err("nobody waits for it any more".into());
    }
    image.refuse_changes()?;
    let opened = || -> Result<Qcow2Disk, Box<dyn std::error::Error + Send + Sync>> {
        let (storage, data) = image.storages();
        let header = Header::load(&*storage)?;
        let new = Qcow2::open(header, storage, data, backing, settings(options, true))?;
        Ok(Qcow2Disk::new(Arc::new(new), &options.disk)?)
    };
    match opened() {
        Ok(disk) => Ok(Cut {
            image: Arc::clone(disk.image()),
            disk: Arc::new(disk),
            before: Before(Some(Arc::clone(image))),
        }),
        Err(error) => {
            image.unseal();
            Err(error)
        }
    }
}

/// Refuses an image with internal snapshots: only clusters of the disk as it is now are taken in.
pub(super) fn check_no_snapshots(header: &Header) -> Result<(), StreamError> {
    match header.snapshots {
        0 => Ok(()),
        count => Err(StreamError::Snapshots(count)),
    }
}

/// What is at a depth of the chain.
pub(super) fn below(image: &Qcow2, depth: usize, sync: bool) -> Option<Backing> {
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

/// A disk on another chain. Unless it is kept, the disk before is as it was; all queues and other users of
/// [`Cut::disk`] have gone before.
pub struct Cut {
    // Closed before the image before is written to again.
    disk: Arc<dyn Disk>,
    image: Arc<Qcow2>,
    before: Before,
}

/// The image before, which is written to again unless it is taken away.
#[derive(Debug)]
struct Before(Option<Arc<Qcow2>>);

impl Drop for Before {
    fn drop(&mut self) {
        if let Some(image) = &self.0 {
            image.unseal();
        }
    }
}

impl Cut {
    /// The disk.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.disk)
    }

    /// Its image.
    pub(super) fn image(&self) -> &Arc<Qcow2> {
        &self.image
    }

    /// With another disk in front of the image.
    pub(super) fn with(mut self, disk: Arc<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }

    /// Stays with it. The images that are needed no more are closed with the disk before.
    pub fn keep(mut self) {
        self.before.0 = None;
    }
}
