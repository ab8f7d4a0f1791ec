//! Comparing what two disks hold.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::share::{Turns, share};
use super::zeros::is_zero;
use super::{Control, OpError, Status, status};
use crate::image::Image;

/// The most bytes that are compared at once.
const PIECE: u64 = 1 << 20;

/// The unit of a reported offset, in bytes.
const SECTOR: usize = 512;

/// The first difference of two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Only asked for strictly: the sizes.
    Size,
    /// Only asked for strictly: one keeps this offset as data and the other not.
    Allocation(u64),
    /// The bytes of the sector at this offset.
    Content(u64),
}

/// Why a comparison ended early.
#[derive(Debug, thiserror::Error)]
#[error("image {}", image + 1)]
pub struct CompareError {
    /// Which image failed, 0 or 1.
    pub image: usize,
    /// How.
    #[source]
    pub source: OpError,
}

/// Compares two disks; where one is longer, the rest of it must be zeros. With `strict`, sizes and what is kept as data must
/// be the same as well. `None`: there is no difference.
///
/// # Errors
///
/// [`CompareError`].
pub fn compare(
    images: [&dyn Image; 2],
    strict: bool,
    threads: usize,
    control: &Control<'_>,
) -> Result<Option<Difference>, CompareError> {
    let sizes = images.map(Image::size);
    if strict && sizes[0] != sizes[1] {
        return Ok(Some(Difference::Size));
    }
    let job = Job {
        images,
        sizes,
        strict,
        total: sizes[0].max(sizes[1]),
        first: Mutex::new(None),
        blamed: Mutex::new(0),
        done: AtomicU64::new(0),
        control,
    };
    (control.progress)(0, job.total);
    let mut at = 0;
    let next = || {
        control.go_on()?;
        while at < job.total && !job.decided() {
            let (len, look) = job.piece(at)?;
            let start = at;
            at += len;
            if look {
                return Ok(Some((start, len)));
            }
            job.count(len);
        }
        Ok(None)
    };
    let work = |_, (at, len): (u64, u64)| {
        job.look(at, len)?;
        job.count(len);
        Ok(())
    };
    share(threads, &Turns::new(), next, work).map_err(|source| CompareError {
        image: *job.blamed.lock().unwrap_or_else(PoisonError::into_inner),
        source,
    })?;
    Ok(job
        .first
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner))
}

struct Job<'a> {
    images: [&'a dyn Image; 2],
    sizes: [u64; 2],
    strict: bool,
    total: u64,
    /// The difference with the lowest offset so far.
    first: Mutex<Option<Difference>>,
    /// The image that failed last.
    blamed: Mutex<usize>,
    done: AtomicU64,
    control: &'a Control<'a>,
}

impl Job<'_> {
    fn decided(&self) -> bool {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.is_some()
    }

    fn count(&self, len: u64) {
        let done = self.done.fetch_add(len, Ordering::Relaxed) + len;
        (self.control.progress)(done, self.total);
    }

    fn differs(&self, found: Difference) {
        let at = |difference: &Difference| match *difference {
            Difference::Size => 0,
            Difference::Allocation(at) | Difference::Content(at) => at,
        };
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none_or(|first| at(&found) < at(&first)) {
            *first = Some(found);
        }
    }

    fn blame(&self, image: usize) {
        *self.blamed.lock().unwrap_or_else(PoisonError::into_inner) = image;
    }

    /// How an image keeps what is at `at`; past its end there are zeros.
    fn status(&self, image: usize, at: u64) -> Result<Status, OpError> {
        let (disk, size) = (self.images[image & 1], self.sizes[image & 1]);
        if at >= size {
            return Ok(Status {
                start: at,
                len: self.total - at,
                depth: 0,
                present: false,
                zero: true,
                data: false,
                compressed: false,
                host: None,
            });
        }
        status(disk, at, size - at).map_err(|source| {
            self.blame(image);
            OpError::Status { offset: at, source }
        })
    }

    /// How much from `at` on is kept in one way by both, and whether its bytes must be looked at.
    fn piece(&self, at: u64) -> Result<(u64, bool), OpError> {
        let (a, b) = (self.status(0, at)?, self.status(1, at)?);
        let len = a.len.min(b.len);
        if self.strict && (a.data, a.zero, a.present) != (b.data, b.zero, b.present) {
            self.differs(Difference::Allocation(at));
            return Ok((len, false));
        }
        if a.zero && b.zero {
            return Ok((len, false));
        }
        Ok((len.min(PIECE - at % PIECE), true))
    }

    fn read(&self, image: usize, at: u64, len: usize) -> Result<Vec<u8>, OpError> {
        let mut data = vec![0; len];
        let held = self.sizes[image & 1].saturating_sub(at);
        let held = usize::try_from(held).unwrap_or(usize::MAX).min(len);
        let part = data.get_mut(..held).unwrap_or_default();
        if part.is_empty() {
            return Ok(data);
        }
        self.images[image & 1].read(at, part).map_err(|source| {
            self.blame(image);
            OpError::Read { offset: at, source }
        })?;
        Ok(data)
    }

    fn look(&self, at: u64, len: u64) -> Result<(), OpError> {
        let len = usize::try_from(len).unwrap_or(0);
        let (a, b) = (self.read(0, at, len)?, self.read(1, at, len)?);
        if a == b || (is_zero(&a) && is_zero(&b)) {
            return Ok(());
        }
        let sectors = a.chunks(SECTOR).zip(b.chunks(SECTOR));
        if let Some(sector) = sectors.enumerate().find(|(_, (a, b))| a != b) {
            self.differs(Difference::Content(at + (sector.0 * SECTOR) as u64));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
