//! Giving an overlay another backing file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::commit::{find, guard, unlocked};
use super::share::{Turns, share};
use super::zeros::is_zero;
use super::{Control, OpError, chain, status};
use crate::image::{Image, Kept};
use crate::open::{ImageOptions, open_image, prepare, resolve, unusable};
use crate::opener::{Access, Opener};
use crate::options::Format;
use crate::qcow2::header::Header;
use crate::raw::{OpenError, open_file};
use crate::storage::{FileStorage, Storage};

/// The most bytes that are one piece of work.
const PIECE: u64 = 1 << 20;

/// The longest name of a backing file, in bytes.
const NAME_MAX: usize = 1023;

/// A backing file, as an image names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBacking {
    /// Its name; relative to the directory of the image.
    pub name: OsString,
    /// Its format.
    pub format: Format,
}

/// Why an overlay keeps its backing file.
#[derive(Debug, thiserror::Error)]
pub enum RebaseError {
    /// An image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Only qcow2 images have backing files.
    #[error("image {}: only qcow2 images have a backing file", path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// The name is too long.
    #[error("the backing file's name has {0} bytes, more than the {NAME_MAX} that fit")]
    LongName(usize),
    /// What differs could not be copied. The image still has its old backing file and contents.
    #[error("image {}: it keeps its backing file", path.display())]
    Copy {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: OpError,
    },
    /// The header could not be written.
    #[error("image {}: its header cannot be written", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Changes the name of a qcow2 image's backing file, and nothing else: what the disk holds stays the same only if the
/// new file holds the same.
///
/// # Errors
///
/// [`RebaseError`].
pub fn set_backing(
    path: &Path,
    opener: &dyn Opener,
    lock: bool,
    backing: Option<&NewBacking>,
) -> Result<(), RebaseError> {
    let access = Access {
        write: true,
        direct: false,
    };
    let storage = FileStorage::new(open_file(path, opener, access, lock)?.into());
    let mut header = Header::load(&storage).map_err(|error| unusable(path, "qcow2", error))?;
    prepare(path, &mut header, &storage)?;
    if let Some(long) = backing
        .map(|new| new.name.len())
        .filter(|&len| len > NAME_MAX)
    {
        return Err(RebaseError::LongName(long));
    }
    header.backing = backing.map(|new| new.name.clone());
    header.backing_format = backing.map(|new| new.format.name().to_owned());
    header
        .store(&storage)
        .and_then(|()| storage.sync())
        .map_err(|source| RebaseError::Header {
            path: path.to_owned(),
            source,
        })
}

/// Gives a qcow2 image another backing file, or none. Where the new one holds something else than the old one and the image
/// says nothing, it is first copied into the image, so that the disk stays as it is. `options` say how the image and its present chain
/// are opened.
///
/// # Errors
///
/// [`RebaseError`].
pub fn rebase(
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
    backing: Option<&NewBacking>,
    threads: usize,
    control: &Control<'_>,
) -> Result<(), RebaseError> {
    if options.disk.format != Some(Format::Qcow2) {
        return Err(RebaseError::NotQcow2 {
            path: path.to_owned(),
        });
    }
    let images = chain(path, opener, Format::Qcow2, options.backing, false)?;
    let mut locks = Vec::new();
    for (depth, image) in images.iter().enumerate() {
        locks.push(guard(&image.path, opener, options, depth == 0)?);
    }
    let top = open_image(path, opener, &unlocked(options, Format::Qcow2, false))?;
    let (mut below, mut shared) = (None, None);
    if let Some(new) = backing {
        let other = resolve(path, &new.name);
        shared = find(&other, images.iter().map(|image| image.path.as_path()));
        if shared.is_none() {
            locks.push(guard(&other, opener, options, false)?);
        }
        below = Some(open_image(
            &other,
            opener,
            &unlocked(options, new.format, true),
        )?);
    }
    let job = Job {
        unit: top.as_qcow2().map_or(512, |top| top.geometry().grain()),
        top: &*top,
        below: below.as_deref(),
        shared,
        control,
        done: AtomicU64::new(0),
    };
    let copied = job
        .run(threads)
        .and_then(|()| top.flush().map_err(OpError::Flush));
    copied.map_err(|source| RebaseError::Copy {
        path: path.to_owned(),
        source,
    })?;
    drop(top);
    // The overlay is still locked by its guard.
    let done = set_backing(path, opener, false, backing);
    drop(locks);
    done
}

struct Job<'a> {
    top: &'a dyn Image,
    /// What the image allocates at once, in bytes.
    unit: u64,
    /// The new backing file.
    below: Option<&'a dyn Image>,
    /// Where in the old chain that is.
    shared: Option<usize>,
    control: &'a Control<'a>,
    done: AtomicU64,
}

impl Job<'_> {
    fn run(&self, threads: usize) -> Result<(), OpError> {
        let size = self.top.size();
        let mut at = 0;
        let next = || {
            self.control.go_on()?;
            while at < size {
                let (len, look) = self.piece(at)?;
                let before = at;
                at += len;
                if look {
                    // All of a grain is the image's own, or nothing of it.
                    at = at.next_multiple_of(self.unit).min(size);
                    self.count(at - before);
                    let start = before - before % self.unit;
                    return Ok(Some((start, at - start)));
                }
                self.count(len);
            }
            Ok(None)
        };
        share(threads, &Turns::new(), next, |_, (at, len)| {
            self.keep(at, len)
        })
    }

    fn count(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        (self.control.progress)(done, self.top.size());
    }

    /// How much from `at` on is of one kind, and whether it may have to be copied.
    fn piece(&self, at: u64) -> Result<(u64, bool), OpError> {
        let failed = |source| OpError::Status { offset: at, source };
        let max = self.top.size() - at;
        let own = self.top.extent(at, max).map_err(failed)?;
        if own.kept != Kept::Absent {
            return Ok((own.len, false));
        }
        let old = status(self.top, at, own.len).map_err(failed)?;
        if self.shared.is_some_and(|depth| old.depth >= depth) {
            return Ok((old.len, false));
        }
        let new_size = self.below.map_or(0, Image::size);
        let mut len = old.len;
        let mut zero = true;
        if let Some(below) = self.below.filter(|_| at < new_size) {
            let new = status(below, at, len.min(new_size - at)).map_err(failed)?;
            len = new.len;
            zero = new.zero;
        }
        if old.zero && zero {
            return Ok((len, false));
        }
        Ok((len.min(PIECE - at % PIECE), true))
    }

    /// Copies what differs into the image.
    fn keep(&self, at: u64, len: u64) -> Result<(), OpError> {
        let read = |source| OpError::Read { offset: at, source };
        let len = usize::try_from(len).unwrap_or(0);
        let mut old = vec![0; len];
        self.top.read(at, &mut old).map_err(read)?;
        let mut new = vec![0; len];
        if let Some(below) = self.below.filter(|below| at < below.size()) {
            let held = below.size().saturating_sub(at);
            let held = usize::try_from(held).unwrap_or(usize::MAX).min(len);
            below
                .read(at, new.get_mut(..held).unwrap_or_default())
                .map_err(read)?;
        }
        let unit = usize::try_from(self.unit).unwrap_or(len);
        let mut done = 0;
        while done < len {
            let offset = at + done as u64;
            let end = (done + unit).min(len);
            let part = old.get(done..end).unwrap_or_default();
            if Some(part) != new.get(done..end) {
                self.own(offset, part)
                    .map_err(|source| OpError::Write { offset, source })?;
            }
            done = end;
        }
        Ok(())
    }

    /// Makes the image itself hold these bytes. What reads as zeros only because the old backing file ends
    /// before it must become zeros too.
    fn own(&self, offset: u64, part: &[u8]) -> std::io::Result<()> {
        match self.top.as_qcow2() {
            Some(top) if is_zero(part) => top.hide(offset, part.len() as u64),
            _ => self.top.write(offset, part),
        }
    }
}
