//! Copying what a disk in use holds at one instant, all of it or what has been written since an earlier backup.
//!
//! 1. [`Backup::of`] makes the target, under a hidden name.
//! 2. Its user ends all queues of the disk, and goes on with those of [`Backup::begin`]: what the disk holds then is what is copied.
//!    A part is copied before it is changed for the first time, and a change waits for that: for 20 s, after which there is no backup.
//! 3. [`Backup::step`], over all of the disk, copies the rest, and [`Backup::prepare`] makes the target durable.
//! 4. The queues are ended once more, and [`Backup::finish`] gives the target its name. Then the disk goes on as before.
//!
//! A bitmap tells what is copied, and is left with what has been written since the instant. It changes only when the target has its
//! name. Before that, and where anything fails, it records as if there were no backup.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::before::{Guarded, Instants, Patience};
use super::copy::clear;
use super::layers::Layer;
use super::{Live, Made, name_of, policy_for};
use crate::disk::Disk;
use crate::image::Image;
use crate::open::{ImageOptions, Opened, open_chain};
use crate::opener::{Access, Opener};
use crate::ops::{CreateImageError, NewFile, NewImage, status};
use crate::options::{DiskOptions, Format};
use crate::qcow2::{ChangeError, Qcow2};
use crate::raw::{OpenError, open_file};
use crate::size::Size;
use crate::{CreateOptions, Preallocation};

/// The most bytes that are read at once.
const PIECE: u64 = 2 << 20;

/// How long a change of the disk waits for a target that does not answer. Guests give up on disks that are silent for 30 s.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a backup is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupRequest {
    /// The file, which is not there yet.
    pub path: PathBuf,
    /// What it is.
    pub format: Format,
    /// The bitmap that tells what has been written since. One that is not there is made for a full backup.
    pub bitmap: Option<String>,
    /// Only what the bitmap marks is copied.
    pub incremental: bool,
    /// The earlier backup, which becomes the backing file of an incremental one. Without it, the target is of use only together
    /// with that.
    pub base: Option<(PathBuf, Format)>,
}

/// Why there is no backup of a disk.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It cannot be read here.
    #[error(
        "a disk of this kind cannot be backed up: only files and block devices, raw or qcow2, can"
    )]
    Fixed,
    /// There is something of that name.
    #[error("{}: there is a file of that name: give one that does not exist yet", .0.display())]
    Exists(PathBuf),
    /// Nothing tells what is to be copied.
    #[error("an incremental backup needs the name of the bitmap that tells what has been written")]
    NoBitmap,
    /// A raw image cannot tell what it does not hold.
    #[error("only a qcow2 image can be an incremental backup: say format=qcow2")]
    Raw,
    /// It holds everything itself.
    #[error(
        "a full backup needs no earlier one below it: leave the base out, or make it incremental"
    )]
    Base,
    /// The disk's user wants images to refer to files of their directory alone.
    #[error(
        "{}: it is not in the directory of {}, and images may refer to no other files: make it there, or add the disk \
         with backing=any", path.display(), base.display()
    )]
    Elsewhere {
        /// The target.
        path: PathBuf,
        /// The earlier backup.
        base: PathBuf,
    },
    /// The earlier backup has a name that cannot be written down.
    #[error("{}: its name is no UTF-8, so that a backup cannot name it", .0.display())]
    Name(PathBuf),
    /// The target cannot be made, or not get its name.
    #[error(transparent)]
    Create(#[from] CreateImageError),
    /// The target, or the earlier backup, cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host has no thread.
    #[error("the disk cannot be kept as it is")]
    Keep(#[source] io::Error),
    /// The disk has been resized in between.
    #[error("the disk has {} now, and had {} when the backup was made: try again", Size(*now), Size(*then))]
    Resized {
        /// Its size in bytes.
        now: u64,
        /// What it was.
        then: u64,
    },
    /// The bitmap is of no use.
    #[error("the bitmap cannot be used")]
    Bitmap(#[source] ChangeError),
    /// Not all could be copied, or not be made durable.
    #[error("the backup cannot be completed")]
    Copy(#[source] io::Error),
    /// The backup is there, and the bitmap is as before.
    #[error("{}: the backup is complete, but the bitmap still marks what is in it", path.display())]
    Kept {
        /// The target.
        path: PathBuf,
        /// Why.
        #[source]
        source: ChangeError,
    },
}

/// A disk of which a backup is made.
pub struct Backup {
    plain: Arc<dyn Disk>,
    guarded: Arc<dyn Disk>,
    live: Live,
    instants: Arc<Instants>,
    // Closed before its file is removed.
    target: Arc<dyn Image>,
    request: BackupRequest,
    size: u64,
    made: Made,
    /// The bitmap has a second one beside it.
    following: bool,
}

impl std::fmt::Debug for Backup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backup")
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl Backup {
    /// Makes the target, for `disk`, which was opened with `options` and may be in use.
    ///
    /// # Errors
    ///
    /// [`BackupError`]; nothing that was made is left then.
    pub fn of(
        disk: Arc<dyn Disk>,
        request: BackupRequest,
        opener: Arc<dyn Opener>,
        options: &ImageOptions,
    ) -> Result<Self, BackupError> {
        let live = disk.live().ok_or(BackupError::Fixed)?;
        check(&request)?;
        let size = disk.info().size;
        let (made, target) = make(&request, size, opener, options)?;
        let (source, copied) = (live.source(), Arc::clone(&target));
        // Without an image below, what is not written to it is not in it.
        let told = request.incremental && request.base.is_none();
        let copy = move |range| copy(&*source, &*copied, range, told);
        let instants = Arc::new(Instants::new(size, Box::new(copy)));
        if !request.incremental {
            instants.keep_all();
        }
        let patience = Patience {
            limit: PATIENCE,
            target: request.path.clone(),
            now: Box::new(Instant::now),
        };
        let guarded = Guarded::new(Arc::clone(&disk), Arc::clone(&instants), patience);
        Ok(Self {
            guarded: Arc::new(guarded.map_err(BackupError::Keep)?),
            plain: disk,
            live,
            instants,
            target,
            request,
            size,
            made,
            following: false,
        })
    }

    /// Where it will be.
    #[must_use]
    pub fn path(&self) -> &std::path::Path {
        &self.request.path
    }

    /// The instant: what the disk holds now is copied. There is no queue of it any more, and what is given goes on.
    ///
    /// # Errors
    ///
    /// [`BackupError`]; the disk is as it was. So it is where `go`, which is asked once, says that nobody waits any more.
    pub fn begin(&mut self, go: &dyn Fn() -> bool) -> Result<Arc<dyn Disk>, BackupError> {
        let (now, then) = (self.plain.info().size, self.size);
        if now != then {
            return Err(BackupError::Resized { now, then });
        }
        if let Some(name) = &self.request.bitmap {
            let incremental = self.request.incremental;
            let keep = |offset, len| {
                if incremental {
                    self.instants.keep(offset, len);
                }
            };
            let begun = self.live.begin_next(name, !incremental, keep);
            begun.map_err(BackupError::Bitmap)?;
            self.following = true;
        }
        // The disk may have gone on without this while storage did not answer.
        if !go() {
            return Err(BackupError::Copy(io::ErrorKind::TimedOut.into()));
        }
        Ok(Arc::clone(&self.guarded))
    }

    /// The disk as it was.
    #[must_use]
    pub fn given_up(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.plain)
    }

    /// The disk's size in bytes: what there is to be gone through.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Deals with what comes next from `offset` on, which is less than the size: how many bytes have been dealt with, at least 1,
    /// and how many have been copied. Any thread may do it while the disk is worked on.
    ///
    /// # Errors
    ///
    /// The host's, of this copy or of one that a change had to wait for; the disk is as it was, and no change waits any more.
    pub fn step(&self, offset: u64) -> io::Result<(u64, u64)> {
        self.instants.step(offset)
    }

    /// Makes the target complete and durable. All has been gone through; the disk may be worked on.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn prepare(&self) -> io::Result<()> {
        self.instants.settle()?;
        self.target.flush()?;
        self.target.as_qcow2().map_or(Ok(()), Qcow2::close)
    }

    /// Gives the target, which [`Backup::prepare`] has made complete, its name: it stays from now on. The disk may be worked on.
    ///
    /// # Errors
    ///
    /// [`BackupError`]; there is nothing of that name, or what was there.
    pub fn name(&mut self) -> Result<(), BackupError> {
        let path = &self.request.path;
        let named = self.made.opener.rename(&self.made.path, path);
        named.map_err(|source| CreateImageError::Create {
            path: path.clone(),
            source,
        })?;
        self.made.kept = true;
        Ok(())
    }

    /// Has the bitmap forget what is in the target, which has its name. There is no queue of the disk any more. `go` is asked once, before that:
    /// where it is `false`, nobody waits any more.
    ///
    /// # Errors
    ///
    /// [`BackupError`]; the disk is as it was, and the bitmap too.
    pub fn finish(&mut self, go: &dyn Fn() -> bool) -> Result<(), BackupError> {
        if !self.made.kept {
            // What has no name is no backup, whatever the bitmap would forget.
            return Err(BackupError::Copy(io::ErrorKind::InvalidInput.into()));
        }
        if !go() {
            return Err(BackupError::Copy(io::ErrorKind::TimedOut.into()));
        }
        if let Some(name) = &self.request.bitmap {
            let adopted = self.live.adopt_next(name);
            let path = self.request.path.clone();
            adopted.map_err(|source| BackupError::Kept { path, source })?;
            self.following = false;
        }
        Ok(())
    }
}

impl Drop for Backup {
    fn drop(&mut self) {
        // Whoever still has the guarded disk goes on without it.
        self.instants.end();
        if self.following {
            self.live.forget_next();
        }
    }
}

fn check(request: &BackupRequest) -> Result<(), BackupError> {
    match request {
        BackupRequest {
            incremental: true,
            bitmap: None,
            ..
        } => Err(BackupError::NoBitmap),
        BackupRequest {
            incremental: true,
            format: Format::Raw,
            ..
        } => Err(BackupError::Raw),
        BackupRequest {
            incremental: false,
            base: Some(_),
            ..
        } => Err(BackupError::Base),
        _ => Ok(()),
    }
}

/// Makes an empty target under a hidden name, and opens it.
fn make(
    request: &BackupRequest,
    size: u64,
    opener: Arc<dyn Opener>,
    options: &ImageOptions,
) -> Result<(Made, Arc<dyn Image>), BackupError> {
    let path = &request.path;
    let there = opener.open(path, Access::default());
    if !matches!(there, Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Err(BackupError::Exists(path.clone()));
    }
    let mut opening = ImageOptions {
        disk: DiskOptions {
            format: Some(request.format),
            lock: options.disk.lock,
            ..DiskOptions::default()
        },
        ..ImageOptions::default()
    };
    let mut backing = None;
    if let Some((base, format)) = &request.base {
        let elsewhere = || BackupError::Elsewhere {
            path: path.clone(),
            base: base.clone(),
        };
        opening.backing = policy_for(options.backing, base, path).ok_or_else(elsewhere)?;
        let name = name_of(base, path).map_err(|_| BackupError::Name(base.clone()))?;
        backing = Some((name, Some(format.name().to_owned())));
    }
    let image = match request.format {
        Format::Raw => NewImage::Raw {
            size,
            preallocation: Preallocation::Off,
        },
        Format::Qcow2 => NewImage::Qcow2(Box::new(CreateOptions {
            size,
            backing,
            ..CreateOptions::default()
        })),
    };
    let hidden = NewFile::begin(path, &*opener, &image)?.leave();
    let hidden = hidden.ok_or_else(|| BackupError::Exists(path.clone()))?;
    let made = Made::new(opener, hidden);
    let opened = open(&made, &opening)?;
    Ok((made, opened.image(&opening)))
}

fn open(made: &Made, options: &ImageOptions) -> Result<Layer, OpenError> {
    if options.disk.format == Some(Format::Qcow2)
        && let Opened::Qcow2(image) = open_chain(&made.path, &*made.opener, options)?
    {
        return Ok(Layer::Qcow2(image));
    }
    let disk = &options.disk;
    let file = open_file(&made.path, &*made.opener, disk.access(), disk.keep())?;
    Ok(Layer::Raw(Arc::new(file)))
}

/// Copies a range; gives how many bytes were moved. `told`: the target says of zeros too that it holds them.
fn copy(source: &dyn Image, target: &dyn Image, range: Range<u64>, told: bool) -> io::Result<u64> {
    let (mut at, mut moved) = (range.start, 0);
    while at < range.end {
        // What is read at once is in memory.
        let found = status(source, at, (range.end - at).min(PIECE))?;
        let end = at.saturating_add(found.len).min(range.end);
        if !found.zero && found.present {
            let mut data = vec![0; usize::try_from(end - at).unwrap_or(0)];
            source.read(at, &mut data)?;
            target.write(at, &data)?;
            moved += end - at;
        } else if let Some(image) = target.as_qcow2().filter(|_| told) {
            hide(image, at..end)?;
        } else {
            clear(target, at, end - at)?;
        }
        at = end;
    }
    Ok(moved)
}

/// Has an image without a backing file say that a range is zeros.
fn hide(image: &Qcow2, range: Range<u64>) -> io::Result<()> {
    let cluster = image.geometry().cluster();
    let end = range.end - range.end % cluster;
    let end = if range.end == image.size() {
        range.end
    } else {
        end
    };
    let start = range.start.next_multiple_of(cluster);
    let zeros = |from: u64, to: u64| {
        let len = usize::try_from(to.saturating_sub(from)).unwrap_or(0);
        if len == 0 {
            return Ok(());
        }
        image.write(from, &vec![0; len])
    };
    if start >= end {
        return zeros(range.start, range.end);
    }
    zeros(range.start, start)?;
    image.hide(start, end - start)?;
    zeros(end, range.end)
}
