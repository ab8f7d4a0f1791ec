//! Merging images of the chain of a disk in use into one below them, so that they are needed no more.
//!
//! 1. [`Merge::of`] opens the base for writing. Nobody else may use it.
//! 2. Its user ends all queues of the disk, and [`Merge::begin`] puts it on a chain whose base can change: what is read
//!    through it is seen to change. Where the disk's own image is merged, its changes are noted from then on.
//! 3. [`Merge::step`], over all of it, copies into the base what the images above it hide of it; then [`Merge::catch_up`] what has been
//!    changed meanwhile. [`Merge::name`] has the image above name the base as its backing file, where there is one above.
//! 4. The queues are ended once more, and [`Merge::finish`] lets go of what is needed no more: the disk is on a shorter chain.
//!
//! The base is marked from its first change until it holds all: by itself it shows nothing that the disk ever was in between.
//!
//! The base is changed only where images above it hide it. So at every instant the chain holds the disk, whoever is killed: what is
//! not finished is as it was, and can begin again. When the disk's own image has been merged that image is emptied, by one
//! write, before anybody writes to the base: who opens it afterwards sees the base.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::changes::{Changes, Tracked};
use super::copy::Copier;
use super::layers::{Files, Layer, Opening, Unlike, check_alike, stack};
use super::stream::{Cut, reopen};
use super::{Covered, Live, Top, name_of};
use crate::disk::Disk;
use crate::image::Image;
use crate::open::{ImageOptions, unusable};
use crate::opener::Opener;
use crate::ops::{chain, find};
use crate::options::Format;
use crate::qcow2::disk::Qcow2Disk;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, Qcow2};
use crate::raw::{OpenError, RawDisk, RawImage};
use crate::storage::FileStorage;
use crate::unfinished;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Why images are not merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// Only qcow2 images have something below them.
    #[error("its image is not of format qcow2: there is nothing below it")]
    NotQcow2,
    /// There is nothing below.
    #[error("{}: it has no backing file: there is nothing to merge it into", .0.display())]
    NoBacking(PathBuf),
    /// It is not written to.
    #[error("the disk is read-only: its images cannot be merged")]
    ReadOnly,
    /// Not an image of the chain.
    #[error("{}: it is not in the disk's chain", .0.display())]
    NotInChain(PathBuf),
    /// The wrong way round.
    #[error("{}: it does not lie below {}", base.display(), top.display())]
    NotBelow {
        /// What was to be merged.
        top: PathBuf,
        /// What it was to be merged into.
        base: PathBuf,
    },
    /// Their internal snapshots need what is below as it is.
    #[error("{}: its {count} internal snapshots lean on what is below it: delete them first", path.display())]
    Snapshots {
        /// The image.
        path: PathBuf,
        /// How many it has.
        count: u32,
    },
    /// The guest would see another disk.
    #[error(transparent)]
    Unlike(#[from] Unlike),
    /// The base cannot be named.
    #[error("{}: its name is no UTF-8, so that an image cannot name it", .0.display())]
    Name(PathBuf),
    /// An image cannot be opened, or not for writing.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The chain cannot be changed.
    #[error("the disk's images cannot be exchanged")]
    Exchange(#[source] Failure),
    /// What is left cannot be copied, or not be made durable.
    #[error("what is merged cannot be made durable")]
    Copy(#[source] io::Error),
}

/// Images of a disk, which are to be merged.
pub struct Merge {
    /// What has been taken out of the base is freed when nobody looks at it any more: it is let go of before the base is closed.
    pinned: Option<crate::qcow2::epoch::Pins>,
    opener: Arc<dyn Opener>,
    options: ImageOptions,
    /// The disk's own image.
    image: Arc<Qcow2>,
    /// The chain's files, from the disk's own one to the base.
    paths: Vec<PathBuf>,
    /// The topmost that is merged.
    top: usize,
    /// What takes them.
    base: Layer,
    format: Format,
    /// The mark of the base until it holds all.
    mark: Option<String>,
    /// The base has it.
    marked: AtomicBool,
    /// A disk of the base alone, for the end.
    alone: Arc<dyn Disk>,
    /// What the disk is put on at the beginning.
    chain: Option<Backing>,
    /// What it is put on at the end.
    shorter: Option<Backing>,
    /// The disk, whose changes are not noted.
    plain: Option<Arc<dyn Disk>>,
    copier: Option<Copier>,
    /// The image above those that are merged, if it has been opened for writing.
    above: Option<Live>,
}

impl std::fmt::Debug for Merge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Merge")
            .field("paths", &self.paths)
            .field("top", &self.top)
            .finish_non_exhaustive()
    }
}

impl Merge {
    /// Looks at the chain of `disk`, whose image is at `path` and was opened with `options`, and opens the base. What is merged is
    /// everything from `top` (`None`: the disk's own image) down to what is right above `base` (`None`: the image right below `top`). The disk
    /// may be in use.
    ///
    /// # Errors
    ///
    /// [`MergeError`]; the disk is as it was.
    pub fn of(
        disk: &dyn Disk,
        path: &Path,
        (top, base): (Option<&Path>, Option<&Path>),
        opener: Arc<dyn Opener>,
        options: &ImageOptions,
    ) -> Result<Self, MergeError> {
        let Some(Live(Top::Qcow2(image))) = disk.live() else {
            return Err(MergeError::NotQcow2);
        };
        if disk.info().read_only {
            return Err(MergeError::ReadOnly);
        }
        let images = chain(path, &*opener, Format::Qcow2, options.backing, false)?;
        let all: Vec<PathBuf> = images.iter().map(|image| image.path.clone()).collect();
        let place = |wanted: &Path| {
            let found = find(wanted, all.iter().map(PathBuf::as_path));
            found.ok_or_else(|| MergeError::NotInChain(wanted.to_owned()))
        };
        let top = top.map_or(Ok(0), place)?;
        let base = base.map_or(Ok(top + 1), place)?;
        let named = |depth: usize| all.get(depth).cloned().unwrap_or_default();
        let Some(below) = images.get(base) else {
            return Err(MergeError::NoBacking(named(top)));
        };
        if base <= top {
            return Err(MergeError::NotBelow {
                top: named(top),
                base: named(base),
            });
        }
        let mark = unfinished::of_merge(&images, (top, base))?;
        let (options, format) = (options.clone(), below.format);
        let merged = layer(&image, top).ok_or_else(|| gone(&named(top)))?;
        for depth in top..base {
            let layer = layer(&image, depth).ok_or_else(|| gone(&named(depth)))?;
            check_snapshots(layer, &named(depth))?;
        }
        let opening = Opening {
            opener: &*opener,
            options: &options,
        };
        let opened = opening.writable(&image, base, &named(base), merged.size())?;
        let alone = opened.disk(&options, &named(base))?;
        if top == 0 {
            // It takes the disk's place.
            check_alike(&*alone, disk, &named(base))?;
        }
        let files = between(&image, base).ok_or_else(|| gone(&named(0)))?;
        let on = stack(files, opened.backing(&options), &options).map_err(MergeError::Exchange)?;
        Ok(Self {
            pinned: opened.pin(),
            paths: all.into_iter().take(base + 1).collect(),
            opener,
            options,
            image,
            top,
            base: opened,
            format,
            mark,
            marked: AtomicBool::new(false),
            alone,
            chain: Some(on),
            shorter: None,
            plain: None,
            copier: None,
            above: None,
        })
    }

    /// The images that are needed no more at the end.
    #[must_use]
    pub fn merged(&self) -> &[PathBuf] {
        let base = self.paths.len().saturating_sub(1);
        self.paths.get(self.top..base).unwrap_or_default()
    }

    /// The image that takes what is merged.
    #[must_use]
    pub fn base(&self) -> &Path {
        self.paths.last().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Where the disk is from the end on, and what that is, if it is on another image then.
    #[must_use]
    pub fn moves_to(&self) -> Option<(&Path, Format)> {
        let base = self.paths.last().filter(|_| self.top == 0)?;
        Some((base, self.format))
    }

    /// How much there is to be gone through, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.copier.as_ref().map_or(0, Copier::size)
    }

    /// Puts the disk on a chain whose base can change. There is no queue of it any more. `go` is asked once, before anything is
    /// changed: where it is `false`, nobody waits any more, and the disk may be in use again.
    ///
    /// # Errors
    ///
    /// [`MergeError::Exchange`]; the disk is as it was.
    pub fn begin(&mut self, go: &dyn Fn() -> bool) -> Result<Cut, MergeError> {
        let chain = self.chain.take();
        let cut = reopen(&self.image, chain, &self.options, go).map_err(MergeError::Exchange)?;
        let image = Arc::clone(cut.image());
        let changes = (self.top == 0).then(|| Arc::new(Changes::new(image.disk_size())));
        self.copier = Some(Copier {
            image: Arc::clone(&image) as Arc<dyn Image>,
            from: self.top,
            layers: Some(self.paths.len().saturating_sub(self.top + 1)),
            target: self.base.image(&self.options),
            changes: changes.clone(),
        });
        self.image = image;
        let plain = cut.disk();
        self.plain = Some(Arc::clone(&plain));
        Ok(match changes {
            Some(changes) => cut.with(Arc::new(Tracked::new(plain, changes))),
            None => cut,
        })
    }

    /// Deals with at most 2 MiB from `offset` on, which is less than the size; gives how many bytes have been dealt with,
    /// at least 1, and how many have been copied. Any thread may do it while the disk is worked on.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` for an image that contradicts itself; the disk is as it was.
    pub fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        self.mark()?;
        self.copier()?.step(offset)
    }

    /// Copies once more a part that has been changed, the next one from `at` on: how many bytes, and where it ends.
    ///
    /// # Errors
    ///
    /// As [`Merge::step`].
    pub fn catch_up(&self, at: u64) -> io::Result<Option<(u64, u64)>> {
        self.mark()?;
        self.copier()?.catch_up(at)
    }

    /// Marks the base, which is about to be changed.
    fn mark(&self) -> io::Result<()> {
        if let (Layer::Qcow2(base), Some(mark)) = (&self.base, &self.mark)
            && !self.marked.load(Ordering::Acquire)
        {
            base.mark_unfinished(Some(mark))?;
            self.marked.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The base holds all, durably.
    fn unmark(&self) -> Result<(), MergeError> {
        if let Layer::Qcow2(base) = &self.base
            && self.marked.load(Ordering::Acquire)
        {
            let unmarked = base.mark_unfinished(None);
            unmarked.map_err(|error| MergeError::Copy(error.into()))?;
            self.marked.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// How much is to be copied once more, in bytes, at most.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.copier.as_ref().map_or(0, Copier::left)
    }

    /// Holds up who changes the disk while there are more than so many bytes to be copied once more.
    pub fn hold_up(&self, bytes: u64) {
        if let Some(copier) = &self.copier {
            copier.hold_up(bytes);
        }
    }

    fn copier(&self) -> io::Result<&Copier> {
        self.copier
            .as_ref()
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Makes the base durable; where there is an image above those that are merged, that names the base from then on. All has been gone
    /// through; the disk may be worked on.
    ///
    /// # Errors
    ///
    /// [`MergeError`]; the disk is as it was.
    pub fn name(&mut self) -> Result<(), MergeError> {
        let base = self.base.image(&self.options);
        base.flush().map_err(MergeError::Copy)?;
        let Some(above) = self.top.checked_sub(1) else {
            return Ok(());
        };
        self.unmark()?;
        let (path, base) = match (self.paths.get(above), self.paths.last()) {
            (Some(path), Some(base)) => (path, base),
            _ => return Err(gone(Path::new(""))),
        };
        let name = name_of(base, path).map_err(|_| MergeError::Name(base.clone()))?;
        let mut files: Vec<Files> = Vec::new();
        for depth in 1..above {
            let found = layer(&self.image, depth).map(Qcow2::storages);
            files.push(found.ok_or_else(|| gone(path))?);
        }
        if above == 0 {
            self.image
                .name_backing(Some((&name, self.format)))
                .map_err(|error| MergeError::Exchange(error.into()))?;
        } else {
            let found = layer(&self.image, above).ok_or_else(|| gone(path))?;
            let opening = Opening {
                opener: &*self.opener,
                options: &self.options,
            };
            let (mut header, opened) = opening.qcow2(path, found)?;
            header.backing = Some(name.into());
            header.backing_format = Some(self.format.name().to_owned());
            let stored = header.store(&*opened.0).and_then(|()| opened.0.sync());
            stored.map_err(|error| MergeError::Exchange(error.into()))?;
            self.above = opened.0.host_file().map(|file| Live::raw(Arc::clone(file)));
            files.push(opened);
        }
        let below = self.base.backing(&self.options);
        let shorter = stack(files, below, &self.options).map_err(MergeError::Exchange)?;
        self.shorter = Some(shorter);
        Ok(())
    }

    /// Lets go of what is needed no more. There is no queue of the disk any more. `go` as with [`Merge::begin`].
    ///
    /// # Errors
    ///
    /// [`MergeError`]; the disk is as it was.
    pub fn finish(&mut self, go: &dyn Fn() -> bool) -> Result<Merged, MergeError> {
        if self.top > 0 {
            let shorter = self.shorter.take();
            let cut = reopen(&self.image, shorter, &self.options, go);
            return Ok(Merged::Shorter(cut.map_err(MergeError::Exchange)?));
        }
        self.mark()
            .and_then(|()| self.copier()?.complete())
            .map_err(MergeError::Copy)?;
        if !go() {
            // The disk may have gone on by now, and what the base holds be of no one instant.
            return Err(MergeError::Exchange("nobody waits for it any more".into()));
        }
        self.unmark()?;
        let before = self.empty()?;
        let image = Arc::clone(&self.image);
        let emptied = Emptied { image, before };
        Ok(Merged::Base(Arc::clone(&self.alone), emptied))
    }

    /// Empties the disk's own image, which the base holds all of. What it held.
    fn empty(&self) -> Result<Vec<u64>, MergeError> {
        let name = match &self.paths[..] {
            // What lies between would hide the base.
            [own, _, .., base] => {
                Some(name_of(base, own).map_err(|_| MergeError::Name(base.clone()))?)
            }
            _ => None,
        };
        let base = name.as_deref().map(|name| (name, self.format));
        let emptied = self.image.vacate(base);
        emptied.map_err(|error| MergeError::Exchange(error.into()))
    }

    /// The disk on its whole chain, whose changes are not noted any more: where it is given up.
    #[must_use]
    pub fn given_up(&self) -> Option<Arc<dyn Disk>> {
        self.plain.clone()
    }

    /// Lets others read what is only read from now on. The disk has been exchanged, and may be worked on.
    ///
    /// # Errors
    ///
    /// The host's; what is not durable keeps others out until it is closed.
    pub fn settle(mut self) -> Result<(), MergeError> {
        self.copier = None;
        // The disk is on other images, and the base is about to be closed: what was taken out of it is freed.
        self.pinned = None;
        let settled = |live: Live| match Covered(live).settle() {
            Ok(()) => Ok(()),
            Err(super::OverlayError::Flush(error)) => Err(MergeError::Copy(error)),
            Err(error) => Err(MergeError::Exchange(error.into())),
        };
        if let Some(above) = self.above.take() {
            settled(above)?;
        }
        settled(match &self.base {
            Layer::Raw(file) => Live::raw(Arc::clone(file)),
            Layer::Qcow2(image) => Live::qcow2(Arc::clone(image)),
        })
    }
}

/// What a disk goes on with whose images have been merged.
pub enum Merged {
    /// Its own image, on a shorter chain.
    Shorter(Cut),
    /// The base. The image before is an empty one on top of it.
    Base(Arc<dyn Disk>, Emptied),
}

/// An image that has been emptied, and whose space is to be given back.
#[derive(Debug)]
pub struct Emptied {
    image: Arc<Qcow2>,
    /// What it held.
    before: Vec<u64>,
}

impl Emptied {
    pub(super) fn new(image: Arc<Qcow2>, before: Vec<u64>) -> Self {
        Self { image, before }
    }

    /// Gives its space back and closes it. It holds nothing whether or not this succeeds.
    pub fn free(self) {
        self.image.free_all(&self.before);
    }
}

impl Layer {
    /// As a disk of its own.
    pub(super) fn disk(
        &self,
        options: &ImageOptions,
        path: &Path,
    ) -> Result<Arc<dyn Disk>, OpenError> {
        Ok(match self {
            Self::Raw(file) => Arc::new(RawDisk::of(Arc::clone(file), &options.disk)),
            Self::Qcow2(image) => {
                let disk = Qcow2Disk::new(Arc::clone(image), &options.disk);
                Arc::new(disk.map_err(|error| unusable(path, "qcow2", error))?)
            }
        })
    }

    /// As the target of copies.
    pub(super) fn image(&self, options: &ImageOptions) -> Arc<dyn Image> {
        match self {
            Self::Raw(file) => {
                let storage = Arc::new(FileStorage::new(Arc::clone(file)));
                let sync = !options.disk.cache.ignores_flush();
                Arc::new(RawImage::new(storage, file.size(), false, sync))
            }
            Self::Qcow2(image) => Arc::clone(image) as Arc<dyn Image>,
        }
    }

    /// Has no space that is freed be used anew until the result is dropped: who reads through images above knows nothing of
    /// that.
    fn pin(&self) -> Option<crate::qcow2::epoch::Pins> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => {
                let mut pins = image.shared().epochs.join();
                pins.enter();
                Some(pins)
            }
        }
    }
}

/// The qcow2 image at a depth of a chain.
fn layer(top: &Qcow2, depth: usize) -> Option<&Qcow2> {
    let mut image: &dyn Image = top;
    for _ in 0..depth {
        image = image.backing()?;
    }
    image.as_qcow2()
}

/// The files of the images between a disk's own and the one at `base`, the topmost first.
pub(super) fn between(top: &Qcow2, base: usize) -> Option<Vec<Files>> {
    let files = (1..base).map(|depth| layer(top, depth).map(Qcow2::storages));
    files.collect()
}

fn gone(path: &Path) -> MergeError {
    unusable(path, "qcow2", "it is not below the disk any more").into()
}

fn check_snapshots(image: &Qcow2, path: &Path) -> Result<(), MergeError> {
    let header = Header::load(image.storage());
    let header = header.map_err(|error| unusable(path, "qcow2", error))?;
    match header.snapshots {
        0 => Ok(()),
        count => Err(MergeError::Snapshots {
            path: path.to_owned(),
            count,
        }),
    }
}
