//! A disk in use whose changes are noted, so that a copy of it can be brought up to date.
//!
//! A change is noted when it has been made, before who asked for it hears so. Who copies takes the note away, and
//! reads only then: what is changed later is noted again.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::Live;
use crate::disk::{Completed, Disk, DiskInfo, IoQueue, Op, QueueError, Request, Token, Watch};
use crate::events::Observer;

/// How many bytes of a disk are noted together, at least.
const GRAIN: u64 = 64 << 10;

/// How many notes there are for a disk, at most: 4 MiB of them.
const NOTES: u64 = 32 << 20;

/// How long changes are held up for who copies, at most, before they go on nevertheless.
const HOLD: Duration = Duration::from_millis(200);

/// Which parts of a disk have changed.
pub(crate) struct Changes {
    size: u64,
    grain: u64,
    notes: Vec<AtomicU64>,
    /// How many there are.
    count: AtomicU64,
    /// With more notes than these, changes are held up.
    limit: AtomicU64,
    fewer: (Mutex<()>, Condvar),
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl Changes {
    /// None, of a disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        let mut grain = GRAIN;
        while size.div_ceil(grain) > NOTES && grain < 1 << 62 {
            grain *= 2;
        }
        let words = size.div_ceil(grain).div_ceil(64);
        Self {
            size,
            grain,
            notes: (0..words).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            fewer: Default::default(),
        }
    }

    /// How much of the disk there is to be copied once more, in bytes, at most.
    pub(crate) fn left(&self) -> u64 {
        self.count.load(Ordering::SeqCst).saturating_mul(self.grain)
    }

    fn note(&self, offset: u64, len: u64) {
        if len == 0 || offset >= self.size {
            return;
        }
        let last = offset.saturating_add(len).min(self.size) - 1;
        for number in offset / self.grain..=last / self.grain {
            let (word, bit) = place(number);
            let Some(word) = self.notes.get(word) else {
                return;
            };
            // Counted first: who takes the note away counts it, too.
            self.count.fetch_add(1, Ordering::SeqCst);
            if word.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
                self.count.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    /// Takes away the next note that begins at `offset` or later, and those right behind it, for at most `max` bytes and at least one note; which part of
    /// the disk that is.
    pub(crate) fn take(&self, offset: u64, max: u64) -> Option<std::ops::Range<u64>> {
        let total = self.size.div_ceil(self.grain);
        let mut number = offset.div_ceil(self.grain);
        while number < total {
            let (word, bit) = place(number);
            let notes = self.notes.get(word)?.load(Ordering::SeqCst);
            if notes == 0 {
                number = (number / 64 + 1) * 64;
            } else if notes & bit == 0 {
                number += 1;
            } else {
                break;
            }
        }
        let (first, most) = (number, (max / self.grain).max(1));
        while number < total && number - first < most && self.take_one(number) {
            number += 1;
        }
        if number == first {
            return None;
        }
        self.fewer.1.notify_all();
        let end = number.saturating_mul(self.grain).min(self.size);
        Some(first * self.grain..end)
    }

    fn take_one(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        let Some(word) = self.notes.get(word) else {
            return false;
        };
        let was = word.fetch_and(!bit, Ordering::SeqCst) & bit != 0;
        if was {
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
        was
    }

    /// Puts a note back: what was taken could not be copied.
    pub(crate) fn put_back(&self, range: std::ops::Range<u64>) {
        self.note(range.start, range.end.saturating_sub(range.start));
    }

    /// Holds up who changes the disk from now on while there are more than so many bytes to be copied. `u64::MAX`: nobody.
    pub(crate) fn hold_up(&self, bytes: u64) {
        self.limit.store(bytes / self.grain, Ordering::SeqCst);
        self.fewer.1.notify_all();
    }

    fn is_too_much(&self) -> bool {
        self.count.load(Ordering::SeqCst) > self.limit.load(Ordering::SeqCst)
    }

    fn wait_for_fewer(&self) {
        if self.is_too_much() {
            let (lock, fewer) = &self.fewer;
            let guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            // However it ends, the changes are told: who copies may have ended.
            let _ = fewer.wait_timeout_while(guard, HOLD, |()| self.is_too_much());
        }
    }
}

fn place(number: u64) -> (usize, u64) {
    let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
    (word, 1 << (number % 64))
}

/// A disk whose changes are noted.
pub(crate) struct Tracked {
    inner: Arc<dyn Disk>,
    changes: Arc<Changes>,
}

impl Tracked {
    pub(crate) fn new(inner: Arc<dyn Disk>, changes: Arc<Changes>) -> Self {
        Self { inner, changes }
    }
}

impl Disk for Tracked {
    fn info(&self) -> DiskInfo {
        self.inner.info()
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        Ok(Box::new(TrackedQueue {
            inner: self.inner.queue(depth)?,
            asked: Asked {
                changes: Arc::clone(&self.changes),
                under_way: Vec::new(),
            },
        }))
    }

    // Notes are for a disk of one size: it is not resized meanwhile.

    fn high_water(&self) -> Option<u64> {
        self.inner.high_water()
    }

    fn observe(&self, observer: Arc<dyn Observer>) {
        self.inner.observe(observer);
    }

    fn set_write_threshold(&self, threshold: Option<u64>) {
        self.inner.set_write_threshold(threshold);
    }

    fn plain(&self) -> Option<Arc<dyn Disk>> {
        Some(
            self.inner
                .plain()
                .unwrap_or_else(|| Arc::clone(&self.inner)),
        )
    }

    fn live(&self) -> Option<Live> {
        self.inner.live()
    }
}

struct TrackedQueue {
    // Dropped first: what was pushed may or may not have been done then.
    inner: Box<dyn IoQueue>,
    asked: Asked,
}

/// Changes that have been asked for.
struct Asked {
    changes: Arc<Changes>,
    under_way: Vec<(Token, u64, u64)>,
}

impl Drop for Asked {
    fn drop(&mut self) {
        for (_, offset, len) in self.under_way.drain(..) {
            self.changes.note(offset, len);
        }
    }
}

impl Asked {
    /// Notes what has ended; whether it was a change.
    fn ended(&mut self, token: Token) -> bool {
        let found = self.under_way.iter().position(|known| known.0 == token);
        let Some(found) = found else {
            return false;
        };
        let (_, offset, len) = self.under_way.swap_remove(found);
        // Whether it succeeded or not: a part may have been written.
        self.changes.note(offset, len);
        true
    }
}

impl IoQueue for TrackedQueue {
    fn push(&mut self, request: Request) {
        let len = match request.op {
            Op::Read | Op::Flush => 0,
            Op::Write => request.buffers.len(),
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        if len != 0 {
            let change = (request.token, request.offset, len);
            self.asked.under_way.push(change);
        }
        self.inner.push(request);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.inner.watch(fd, watch)
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let before = out.len();
        let waited = self.inner.wait(timeout, out);
        let mut noted = false;
        for completed in out.iter().skip(before) {
            if let Completed::Request { token, .. } = completed {
                noted |= self.asked.ended(*token);
            }
        }
        if noted {
            self.asked.changes.wait_for_fewer();
        }
        waited
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn notes_are_taken_in_runs_and_put_back_whole() {
        let changes = Changes::new((10 << 20) + 512);
        changes.note(GRAIN - 1, 2);
        changes.note(4 * GRAIN, 1);
        changes.note(10 << 20, 4096);
        changes.note(11 << 20, 4096);
        assert_eq!(changes.left(), 4 * GRAIN);
        assert_eq!(changes.take(0, 1 << 20), Some(0..2 * GRAIN));
        assert_eq!(changes.take(0, 1), Some(4 * GRAIN..5 * GRAIN));
        let end = (10 << 20)..(10 << 20) + 512;
        assert_eq!(changes.take(5 * GRAIN, 1 << 20), Some(end.clone()));
        assert_eq!((changes.take(0, 1), changes.left()), (None, 0));
        changes.put_back(end.clone());
        assert_eq!(changes.take(end.end, 1), None);
        assert_eq!(changes.take(0, u64::MAX), Some(end));
    }

    proptest! {
        /// As a set of grains would be, whatever is noted, taken and put back.
        #[test]
        fn notes_are_a_set_of_grains(
            size in 1..40 * GRAIN,
            steps in proptest::collection::vec((0..3_u8, 0..48 * GRAIN, 0..8 * GRAIN), 1..60),
        ) {
            let changes = Changes::new(size);
            let mut model = BTreeSet::new();
            let grains = |offset: u64, len: u64| {
                let end = offset.saturating_add(len).min(size);
                offset / GRAIN..if len == 0 || offset >= size { offset / GRAIN } else { (end - 1) / GRAIN + 1 }
            };
            let mut last = 0..0;
            for (what, offset, len) in steps {
                match what {
                    0 => {
                        changes.note(offset, len);
                        model.extend(grains(offset, len));
                    }
                    1 => {
                        changes.put_back(last.clone());
                        model.extend(grains(last.start, last.end - last.start));
                    }
                    _ => {
                        let first = model.range(offset.div_ceil(GRAIN)..).next().copied();
                        let taken = changes.take(offset, len);
                        prop_assert_eq!(taken.is_some(), first.is_some());
                        if let (Some(taken), Some(first)) = (taken, first) {
                            let most = (len / GRAIN).max(1);
                            let run = (first..first + most).take_while(|at| model.remove(at));
                            let end = first + run.count() as u64;
                            let held = first * GRAIN..(end * GRAIN).min(size);
                            prop_assert_eq!(&taken, &held);
                            last = taken;
                        }
                    }
                }
                prop_assert_eq!(changes.left(), model.len() as u64 * GRAIN);
            }
        }
    }

    #[test]
    fn the_largest_disk_takes_bounded_memory() {
        let changes = Changes::new(u64::MAX);
        assert!(changes.notes.len() as u64 * 64 <= NOTES);
        changes.note(u64::MAX - 512, 512);
        assert!(changes.take(0, 1).is_some());
    }
}
