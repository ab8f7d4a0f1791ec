//! Copying a disk in use to where its user sends it: to another host, with the machine.
//!
//! 1. [`Transfer::of`] looks at the disk, which goes on with [`Transfer::begin`] when its queues have been ended once: changes are noted, and nothing else is
//!    different for the disk.
//! 2. Its user goes through all of it by [`Transfer::piece`], and then through what has been changed by [`Transfer::changed`] and [`Transfer::piece`].
//! 3. When the queues are ended, nothing is left to be changed: what [`Transfer::changed`] gives then is the rest.
//!
//! [`Landing`](super::Landing) is the other end.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::changes::{Changes, Tracked};
use super::layers::check_same;
use super::{Live, MirrorError, Top};
use crate::disk::Disk;
use crate::image::Image;
use crate::open::{ImageOptions, allowed, backing_format, unusable};
use crate::opener::Opener;
use crate::ops::status;
use crate::options::Format;
use crate::qcow2::header::Header;
use crate::qcow2::image::Qcow2;
use crate::raw::OpenError;

/// The most bytes of a disk that are in memory for one piece.
pub const PIECE: u64 = 512 << 10;
/// How far is looked at once where nothing is read.
const REACH: u64 = 1 << 30;

/// What lies below an image that is copied alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// As the image names it: relative to the image's directory, or not.
    pub name: String,
    /// What it is.
    pub format: Format,
    /// The size of the disk in it, in bytes.
    pub size: u64,
}

/// What a disk holds in some place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// These bytes.
    Data(Vec<u8>),
    /// So many zeros.
    Zeros(u64),
    /// For so many bytes what the image below holds.
    Below(u64),
}

impl Piece {
    /// How many bytes of the disk it stands for.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Zeros(len) | Self::Below(len) => *len,
        }
    }

    /// Whether it stands for nothing, which no piece does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A disk that is being copied elsewhere.
pub struct Transfer {
    plain: Arc<dyn Disk>,
    noting: Arc<dyn Disk>,
    source: Arc<dyn Image>,
    changes: Arc<Changes>,
    /// What is not copied.
    base: Option<Base>,
}

impl std::fmt::Debug for Transfer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transfer")
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

impl Transfer {
    /// Of `disk`, whose image is at `path` and was opened with `options`; it may be in use. With `alone` what lies below its image is not copied, where there
    /// is anything.
    ///
    /// # Errors
    ///
    /// [`MirrorError`]: the disk cannot be read here, or what lies below it not be named.
    pub fn of(
        disk: Arc<dyn Disk>,
        path: &Path,
        alone: bool,
        opener: &dyn Opener,
        options: &ImageOptions,
    ) -> Result<Self, MirrorError> {
        let live = disk.live().ok_or(MirrorError::Fixed)?;
        let base = match &live {
            Live(Top::Qcow2(image)) if alone && image.backing().is_some() => {
                Some(base_of(image, path, opener, options)?)
            }
            _ => None,
        };
        let changes = Arc::new(Changes::new(disk.info().size));
        let noting = Tracked::new(Arc::clone(&disk), Arc::clone(&changes));
        Ok(Self {
            plain: disk,
            noting: Arc::new(noting),
            source: live.source(),
            changes,
            base,
        })
    }

    /// What lies below what is copied.
    #[must_use]
    pub fn base(&self) -> Option<&Base> {
        self.base.as_ref()
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
        // What ends within a sector is not the guest's.
        self.source.size().min(self.plain.info().size)
    }

    /// What the disk holds from `range.start` on, at least a byte and at most to the end of the range, which lies within the size. Any thread may ask while the disk is
    /// worked on.
    ///
    /// # Errors
    ///
    /// The host's, and `EIO` for an image that contradicts itself.
    pub fn piece(&self, range: Range<u64>) -> io::Result<Piece> {
        let max = range.end.saturating_sub(range.start).min(REACH);
        if max == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let found = status(&*self.source, range.start, max)?;
        if self.base.is_some() && found.depth > 0 {
            return Ok(Piece::Below(found.len));
        }
        if found.zero || !found.present {
            return Ok(Piece::Zeros(found.len));
        }
        let len = found.len.min(PIECE);
        let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
        self.source.read(range.start, &mut data)?;
        if data.iter().all(|byte| *byte == 0) {
            return Ok(Piece::Zeros(len));
        }
        Ok(Piece::Data(data))
    }

    /// Takes the note of a part that has been changed, the next one from `at` on: it is to be copied from now on.
    #[must_use]
    pub fn changed(&self, at: u64) -> Option<Range<u64>> {
        self.changes.take(at, PIECE)
    }

    /// How much has been changed and not taken, in bytes, at most.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.changes.left()
    }

    /// Holds up who changes the disk while there are more than so many bytes left. `u64::MAX`: nobody.
    pub fn hold_up(&self, bytes: u64) {
        self.changes.hold_up(bytes);
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // Nobody waits for copies that will not be made.
        self.hold_up(u64::MAX);
    }
}

/// What lies below `image`, which is at `path`.
fn base_of(
    image: &Qcow2,
    path: &Path,
    opener: &dyn Opener,
    options: &ImageOptions,
) -> Result<Base, OpenError> {
    let header =
        Header::load(&*image.storages().0).map_err(|error| unusable(path, "qcow2", error))?;
    let unnamed = |why: &'static str| unusable(path, "qcow2", why);
    let name = header.backing.as_deref();
    let name = name.ok_or_else(|| unnamed("it does not name what lies below it"))?;
    let format = backing_format(path, &header)?;
    let format = format.ok_or_else(|| {
        unnamed("it does not say what format its backing file has: state that with 'vireo image amend' or rebase it")
    })?;
    check_same(image, 1, &allowed(options.backing, path, name)?, opener)?;
    let text = name.to_str();
    let text = text.ok_or_else(|| unnamed("the name of its backing file is no UTF-8"))?;
    Ok(Base {
        name: text.to_owned(),
        format,
        size: image.backing().map_or(0, Image::size),
    })
}
