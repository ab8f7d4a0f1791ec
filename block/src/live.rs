//! Changes of the chain of a disk that is in use.
//!
//! # A new overlay
//!
//! 1. [`Overlay::create`] makes an empty image that names the disk's present one as its backing file, complete and durable,
//!    and opens it. The disk is worked on meanwhile.
//! 2. Its user ends all queues of the disk.
//! 3. [`Overlay::attach`] puts the overlay on top of the present image. Storage is not touched: what the present image has
//!    in memory the overlay owes, and its flushes, from the first one on, make that durable too.
//! 4. Queues of [`Attached::disk`] take the place of the old ones. [`Attached::keep`] stays with them, and [`Covered::settle`]
//!    pays, while the disk is worked on: the present image is written out, refuses changes, and becomes one that is read, so
//!    that other readers may come. It is the same opened file under the same locks, less those of a writer, so there is no
//!    instant in which another writer could get it.
//!
//! Whoever drops an [`Attached`] without keeping it has the old disk as it was, writable. So several disks can be
//! switched together: keep all, or none.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::Disk;
use crate::file::HostFile;
use crate::image::Image;
use crate::open::{BackingPolicy, ImageOptions, settings};
use crate::opener::{Access, Opener};
use crate::ops::{CreateImageError, NewFile, NewImage};
use crate::options::Format;
use crate::qcow2::ChangeError;
use crate::qcow2::disk::Qcow2Disk;
use crate::qcow2::header::Header;
use crate::qcow2::image::{Backing, Qcow2, RawBacking};
use crate::raw::{OpenError, RawImage, open_file};
use crate::storage::{FileStorage, Storage};
use crate::track::{LiveBitmap, LiveBitmapChange};
use crate::{CreateOptions, size::Size};

/// The image behind a disk in use.
#[derive(Clone, Debug)]
pub struct Live(Top);

#[derive(Clone, Debug)]
enum Top {
    Raw(Arc<HostFile>),
    Qcow2(Arc<Qcow2>),
}

/// Why a disk has not got an overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Nothing can be put on top of it.
    #[error(
        "a disk of this kind cannot have overlays: only files and block devices, raw or qcow2, can"
    )]
    Fixed,
    /// Nothing is written to it.
    #[error("the disk is read-only: an overlay of it would stay empty")]
    ReadOnly,
    /// There is something of that name.
    #[error("{}: there is a file of that name: give one that does not exist yet", path.display())]
    Exists {
        /// The name.
        path: PathBuf,
    },
    /// The next boot would refuse it.
    #[error(
        "{}: it is not in the directory of {}, and the disk may refer to no other files: make it there, or add the disk \
         with backing=any", path.display(), base.display()
    )]
    Elsewhere {
        /// The overlay.
        path: PathBuf,
        /// The present image.
        base: PathBuf,
    },
    /// The present image has a name that cannot be written down.
    #[error("{}: its name is no UTF-8, so that an overlay cannot name it", .0.display())]
    Name(PathBuf),
    /// It cannot be made.
    #[error(transparent)]
    Create(#[from] CreateImageError),
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk has been resized in between.
    #[error("the disk has {} now, and had {} when its overlay was made: try again", Size(*now), Size(*then))]
    Resized {
        /// Its size in bytes.
        now: u64,
        /// What it was.
        then: u64,
    },
    /// The disk has got another image in between.
    #[error("the disk has another image now than when its overlay was made: try again")]
    Replaced,
    /// What the present image has in memory cannot be written out.
    #[error("what the disk holds cannot be made durable")]
    Flush(#[source] io::Error),
    /// The overlay cannot be read, or the host lacks resources.
    #[error("{}: it cannot be put on the disk", path.display())]
    Attach {
        /// The overlay.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Live {
    pub(crate) fn raw(file: Arc<HostFile>) -> Self {
        Self(Top::Raw(file))
    }

    pub(crate) fn qcow2(image: Arc<Qcow2>) -> Self {
        Self(Top::Qcow2(image))
    }

    /// What the image is.
    #[must_use]
    pub fn format(&self) -> Format {
        match &self.0 {
            Top::Raw(_) => Format::Raw,
            Top::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Makes completed writes durable, so that less is left to be written when queues are stopped. They need not be.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        match &self.0 {
            Top::Raw(file) => FileStorage::new(Arc::clone(file)).sync(),
            Top::Qcow2(image) => image.flush(),
        }
    }

    /// Makes all durable that the disk holds, and leaves nothing to be written when it is closed. Nobody changes it meanwhile.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn bring_out(&self) -> io::Result<()> {
        match &self.0 {
            Top::Raw(_) => self.flush(),
            Top::Qcow2(image) => image.bring_out(),
        }
    }

    /// The bitmaps that tell what has been written to the disk.
    ///
    /// # Errors
    ///
    /// [`ChangeError`], where the image's directory of them cannot be read.
    pub fn bitmaps(&self) -> Result<Vec<LiveBitmap>, ChangeError> {
        match &self.0 {
            Top::Raw(file) => Ok(file.tracks().list()),
            Top::Qcow2(image) => image.live_bitmaps(),
        }
    }

    /// Changes bitmap `name`. The disk's queues have ended, and none is made meanwhile. What is kept in an image is durable when
    /// this returns.
    ///
    /// # Errors
    ///
    /// [`ChangeError`]; the bitmaps are as they were then. [`ChangeError::Busy`] where requests are under way.
    pub fn change_bitmap(&self, name: &str, change: LiveBitmapChange) -> Result<(), ChangeError> {
        let image = match &self.0 {
            Top::Raw(file) => return file.tracks().change(name, change, file.size()),
            Top::Qcow2(image) => image,
        };
        match change {
            LiveBitmapChange::Add {
                granularity,
                enabled,
            } => image.add_bitmap(name, granularity, enabled),
            LiveBitmapChange::Remove => image.remove_bitmap(name),
            LiveBitmapChange::Clear => image.clear_bitmap(name),
            LiveBitmapChange::Enable => image.enable_bitmap(name, true),
            LiveBitmapChange::Disable => image.enable_bitmap(name, false),
        }
    }

    /// Begins to record anew beside bitmap `name`, which is made if it is not there and `fresh`. The disk's queues have ended.
    /// `each` is called with what it marks.
    fn begin_next(
        &self,
        name: &str,
        fresh: bool,
        each: impl FnMut(u64, u64),
    ) -> Result<(), ChangeError> {
        match &self.0 {
            Top::Raw(file) => file.tracks().begin_next(name, (fresh, file.size()), each),
            Top::Qcow2(image) => image.begin_next(name, fresh, each),
        }
    }

    /// Bitmap `name` tells what has been written since then alone.
    fn adopt_next(&self, name: &str) -> Result<(), ChangeError> {
        match &self.0 {
            Top::Raw(file) => file.tracks().adopt_next(name),
            Top::Qcow2(image) => image.adopt_next(name),
        }
    }

    /// The bitmap goes on as if nothing had begun.
    fn forget_next(&self) {
        match &self.0 {
            Top::Raw(file) => file.tracks().forget_next(),
            Top::Qcow2(image) => image.forget_next(),
        }
    }

    /// What the disk holds, to be read beside its queues.
    fn source(&self) -> Arc<dyn Image> {
        match &self.0 {
            Top::Raw(file) => {
                let (file, size) = (Arc::clone(file), file.size());
                Arc::new(RawImage::new(
                    Arc::new(FileStorage::new(file)),
                    size,
                    true,
                    true,
                ))
            }
            Top::Qcow2(image) => Arc::clone(image) as Arc<dyn Image>,
        }
    }

    fn seal(&self) -> io::Result<()> {
        match &self.0 {
            Top::Raw(_) => self.flush(),
            Top::Qcow2(image) => image.seal(),
        }
    }

    /// Whether it is the same opened image.
    fn is(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Top::Raw(a), Top::Raw(b)) => Arc::ptr_eq(a, b),
            (Top::Qcow2(a), Top::Qcow2(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    fn keep_reading(&self) {
        match &self.0 {
            Top::Raw(file) => file.keep_reading(),
            Top::Qcow2(image) => image.keep_reading(),
        }
    }

    fn as_backing(&self, sync: bool) -> Backing {
        match &self.0 {
            Top::Raw(file) => {
                let size = file.size();
                let storage: Arc<dyn Storage> = Arc::new(FileStorage::new(Arc::clone(file)));
                let image = RawImage::new(Arc::clone(&storage), size, true, sync);
                Backing::Raw(RawBacking {
                    image: Box::new(image),
                    storage,
                    size,
                })
            }
            Top::Qcow2(image) => Backing::Qcow2(Arc::clone(image)),
        }
    }
}

/// The policy under which a disk with the image `base` may have an overlay at `path`; `None`: under none that is as
/// strict as `policy`. An overlay needs one under which an image may refer to others at all.
fn policy_for(policy: BackingPolicy, base: &Path, path: &Path) -> Option<BackingPolicy> {
    match policy {
        BackingPolicy::Any => Some(BackingPolicy::Any),
        // Without any, the present image refers to none.
        BackingPolicy::Deny | BackingPolicy::Directory => {
            (base.parent() == path.parent()).then_some(BackingPolicy::Directory)
        }
    }
}

/// An empty image that is to be put on top of a disk's present one. Unless it is attached and kept, its file is removed.
pub struct Overlay {
    // Closed before its file is removed.
    disk: Arc<Qcow2Disk>,
    file: Made,
    /// How it is opened.
    options: ImageOptions,
    below: Live,
    size: u64,
}

/// A file that has been made. Unless it is kept, it is removed, where no other has its name by then.
struct Made {
    opener: Arc<dyn Opener>,
    path: PathBuf,
    /// Device and inode, where they can be told.
    identity: Option<(u64, u64)>,
    kept: bool,
}

impl Made {
    fn new(opener: Arc<dyn Opener>, path: PathBuf) -> Self {
        let identity = identity(&*opener, &path);
        Self {
            opener,
            path,
            identity,
            kept: false,
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let same = |made| identity(&*self.opener, &self.path) == Some(made);
        if self.identity.is_none_or(same) {
            remove(&*self.opener, &self.path);
        }
    }
}

/// Device and inode of what is at `path`.
fn identity(opener: &dyn Opener, path: &Path) -> Option<(u64, u64)> {
    let facts = opener
        .open(path, Access::default())
        .and_then(|file| file.metadata());
    facts.ok().map(|facts| (facts.dev(), facts.ino()))
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay")
            .field("path", &self.file.path)
            .finish_non_exhaustive()
    }
}

impl Overlay {
    /// Makes an overlay at `path`, where nothing is, for `disk`, whose present image is at `base` and was opened
    /// with `options`. The disk may be in use.
    ///
    /// # Errors
    ///
    /// [`OverlayError`]; nothing is left then.
    pub fn create(
        disk: &dyn Disk,
        base: &Path,
        path: &Path,
        opener: Arc<dyn Opener>,
        options: &ImageOptions,
    ) -> Result<Self, OverlayError> {
        let live = disk.live().ok_or(OverlayError::Fixed)?;
        let info = disk.info();
        if info.read_only {
            return Err(OverlayError::ReadOnly);
        }
        let elsewhere = || OverlayError::Elsewhere {
            path: path.to_owned(),
            base: base.to_owned(),
        };
        let policy = policy_for(options.backing, base, path).ok_or_else(elsewhere)?;
        let create = CreateOptions {
            size: info.size,
            backing: Some((name_of(base, path)?, Some(live.format().name().to_owned()))),
            ..CreateOptions::default()
        };
        check_absent(path, &*opener)?;
        NewFile::begin(path, &*opener, &NewImage::Qcow2(Box::new(create)))?.finish()?;
        let file = Made::new(opener, path.to_owned());
        let mut options = options.clone();
        options.disk.format = Some(Format::Qcow2);
        options.backing = policy;
        let access = Access {
            write: true,
            direct: options.disk.access().direct,
        };
        let opened = open_file(path, &*file.opener, access, options.disk.keep())?;
        let storage = Arc::new(FileStorage::new(Arc::new(opened)));
        let disk = above(storage, &live, &options).map_err(|source| OverlayError::Attach {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            disk: Arc::new(disk),
            file,
            options,
            below: live,
            size: info.size,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// How the disk is opened from now on.
    #[must_use]
    pub fn options(&self) -> &ImageOptions {
        &self.options
    }

    /// Puts it on top of `below`, of which there is no queue any more. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`OverlayError`]; `below` is as it was then, and the overlay is gone.
    pub fn attach(self, below: &dyn Disk) -> Result<Attached, OverlayError> {
        let live = below.live().ok_or(OverlayError::Fixed)?;
        if !live.is(&self.below) {
            return Err(OverlayError::Replaced);
        }
        let (now, then) = (below.info().size, self.size);
        if now != then {
            return Err(OverlayError::Resized { now, then });
        }
        self.disk.image().owe(live);
        Ok(Attached(self))
    }
}

/// The disk of the image in `storage`, which is on top of `below`.
fn above(
    storage: Arc<dyn Storage>,
    below: &Live,
    options: &ImageOptions,
) -> Result<Qcow2Disk, Box<dyn std::error::Error + Send + Sync>> {
    let header = Header::load(&*storage)?;
    let settings = settings(options, true);
    let backing = Some(below.as_backing(settings.sync));
    let image = Qcow2::open(header, storage, None, backing, settings)?;
    Ok(Qcow2Disk::new(Arc::new(image), &options.disk)?)
}

/// A disk with a new overlay. Unless it is kept, the disk before is as it was, and the overlay is removed; all queues
/// and other users of [`Attached::disk`] have gone before.
#[derive(Debug)]
pub struct Attached(Overlay);

impl Attached {
    /// The disk, whose changes go to the overlay.
    #[must_use]
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.0.disk) as Arc<dyn Disk>
    }

    /// Where the overlay is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// How the disk is opened from now on.
    #[must_use]
    pub fn options(&self) -> &ImageOptions {
        self.0.options()
    }

    /// Stays with the overlay.
    #[must_use = "what is below is to be written out"]
    pub fn keep(self) -> Covered {
        let Overlay {
            mut file, below, ..
        } = self.0;
        file.kept = true;
        Covered(below)
    }
}

/// An image that is only read from now on, and has not been written out yet.
#[derive(Debug)]
pub struct Covered(Live);

impl Covered {
    /// Writes it out, and lets others read it. The disk may be worked on meanwhile.
    ///
    /// # Errors
    ///
    /// [`OverlayError::Flush`]: flushes of the disk fail then as well, and nobody else gets the image before it is closed.
    pub fn settle(self) -> Result<(), OverlayError> {
        self.0.seal().map_err(OverlayError::Flush)?;
        self.0.keep_reading();
        Ok(())
    }
}

/// How an image at `path` names the one at `base`: by its name alone where they are in one directory.
fn name_of(base: &Path, path: &Path) -> Result<String, OverlayError> {
    let unnamed = || OverlayError::Name(base.to_owned());
    let name = match base.file_name() {
        Some(name) if base.parent() == path.parent() => PathBuf::from(name),
        _ => std::path::absolute(base).map_err(|_| unnamed())?,
    };
    let name = name.into_os_string().into_string().map_err(|_| unnamed())?;
    // What comes before a colon would be read as a protocol.
    Ok(if name.contains(':') && !name.starts_with('/') {
        format!("./{name}")
    } else {
        name
    })
}

/// Refuses a name that something has; what appears there later is not replaced either.
fn check_absent(path: &Path, opener: &dyn Opener) -> Result<(), OverlayError> {
    let access = Access {
        write: false,
        direct: false,
    };
    match opener.open(path, access) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(OverlayError::Exists {
            path: path.to_owned(),
        }),
    }
}

fn remove(opener: &dyn Opener, path: &Path) {
    if let Err(error) = opener.remove(path) {
        tracing::warn!(%error, path = %path.display(), "an image that is not used stays behind");
    }
}

mod absorb;
mod away;
mod backup;
mod before;
mod changes;
mod copy;
mod landing;
mod layers;
mod merge;
mod mirror;
mod revert;
mod samples;
mod stream;
#[cfg(test)]
mod tests;
mod transfer;

pub use absorb::Absorb;
pub use away::{Away, AwayError, Back};
pub use backup::{Backup, BackupError, BackupRequest};
pub use landing::{Landing, LandingError};
pub use layers::Unlike;
pub use merge::{Emptied, Merge, MergeError, Merged};
pub use mirror::{Mirror, MirrorError, MirrorTarget};
pub use revert::{Revert, RevertError, revert};
pub use stream::{Cut, Stream, StreamError};
pub use transfer::{Base, PIECE, Piece, Transfer};
