//! Guest memory that is at another monitor while the guest runs here: post-copy.
//!
//! # Contract
//!
//! * From [`Missing::begin`] on whoever touches a page that is missing waits: vCPUs, devices and the kernel on their behalf.
//! * A page comes once ([`Missing::fill`], [`Missing::zero`]). What comes for a page that is here is passed over, whoever sends it: nothing
//!   that the guest has written is written over.
//! * What is given back before it has come never comes: it reads as zeros.
//! * When all is here nobody waits, and memory is as any other.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::mapping::Mapping;
use super::still::RamParts;
use super::userfault::{UserFault, Waits};
use crate::machine::driver::{ppoll, readable};
use crate::opener::Opener;

/// The host's page, in bytes.
const PAGE: u64 = 4096;
/// The pages of a word.
const WORD: u64 = 64;

/// One mapping.
struct Part {
    /// Where the guest sees it.
    guest: u64,
    mapping: Arc<Mapping>,
    /// A bit for each page that is missing.
    bits: Vec<u64>,
    /// The userfaultfd has it.
    registered: bool,
}

impl Part {
    fn holds(&self, page: u64) -> bool {
        let word = usize::try_from(page / WORD).ok();
        let word = word.and_then(|word| self.bits.get(word));
        word.is_some_and(|word| word >> (page % WORD) & 1 == 1)
    }

    /// Marks a page as missing or as here: whether it was missing.
    fn set(&mut self, page: u64, missing: bool) -> bool {
        let before = self.holds(page);
        let word = usize::try_from(page / WORD).ok();
        if let Some(word) = word.and_then(|word| self.bits.get_mut(word)) {
            let bit = 1 << (page % WORD);
            *word = if missing { *word | bit } else { *word & !bit };
        }
        before
    }

    fn host(&self, page: u64) -> u64 {
        self.mapping
            .address()
            .saturating_add(page.saturating_mul(PAGE))
    }

    /// The page at a guest-physical address.
    fn page_of(&self, address: u64) -> Option<u64> {
        let inside = address.checked_sub(self.guest)?;
        (inside < self.mapping.len()).then_some(inside / PAGE)
    }
}

struct Inner {
    /// By guest-physical address.
    parts: Vec<Part>,
    /// Guest-physical addresses of pages that somebody waits for.
    awaited: BTreeSet<u64>,
    left: u64,
}

/// Memory that comes while the guest runs.
pub struct Missing {
    fault: UserFault,
    inner: Mutex<Inner>,
    /// Pages.
    left: AtomicU64,
    /// There is no connection over which any could come.
    lost: AtomicBool,
}

/// Whether this host can have memory come while the guest runs.
///
/// # Errors
///
/// The host's: it gives no userfaultfd.
pub fn check(opener: &Opener) -> io::Result<()> {
    UserFault::open(opener, Waits::ForPages).map(drop)
}

impl Missing {
    /// Has the pages of `runs`, guest-physical addresses and lengths in bytes, be missing; what is there of them is given back. Nobody uses
    /// the memory yet. What is not in it is passed over.
    ///
    /// # Errors
    ///
    /// The host's: it gives no userfaultfd, or none for this memory. All is there then, of what was to be missing as zeros.
    pub fn begin(ram: &RamParts, runs: &[(u64, u64)], opener: &Opener) -> io::Result<Arc<Self>> {
        let fault = UserFault::open(opener, Waits::ForPages)?;
        let part = |(guest, mapping): &(u64, Arc<Mapping>)| {
            let words = mapping.len().div_ceil(PAGE).div_ceil(WORD);
            Ok(Part {
                guest: *guest,
                mapping: Arc::clone(mapping),
                bits: vec![0; usize::try_from(words).map_err(io::Error::other)?],
                registered: false,
            })
        };
        let parts: io::Result<Vec<Part>> = ram.parts().iter().map(part).collect();
        let mut inner = Inner {
            parts: parts?,
            awaited: BTreeSet::new(),
            left: 0,
        };
        // First: the kernel may put zeros, as parts of huge pages, into holes that it need not tell of.
        for part in &mut inner.parts {
            if runs
                .iter()
                .any(|(address, _)| part.page_of(*address).is_some())
            {
                fault.register(part.mapping.address(), part.mapping.len())?;
                part.registered = true;
            }
        }
        for &(address, len) in runs {
            inner.miss(address, len)?;
        }
        let missing = Arc::new(Self {
            fault,
            left: AtomicU64::new(inner.left),
            inner: Mutex::new(inner),
            lost: AtomicBool::new(false),
        });
        let parts = ram.parts().iter();
        parts.for_each(|(_, mapping)| mapping.misses(&missing));
        Ok(missing)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each step leaves it sound; a panic elsewhere does too.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages are missing.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// Takes note whether any can come now.
    pub fn set_lost(&self, lost: bool) {
        self.lost.store(lost, Ordering::Relaxed);
    }

    /// Whether pages are missing, and none can come now.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed) && self.left() > 0
    }

    /// Those that are missing, as guest-physical addresses and lengths in bytes.
    #[must_use]
    pub fn runs(&self) -> Vec<(u64, u64)> {
        let inner = self.lock();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for part in &inner.parts {
            let pages = part.mapping.len().div_ceil(PAGE);
            for page in (0..pages).filter(|page| part.holds(*page)) {
                let address = part.guest.saturating_add(page.saturating_mul(PAGE));
                match runs.last_mut() {
                    Some((start, len)) if start.saturating_add(*len) == address => {
                        *len = len.saturating_add(PAGE);
                    }
                    _ => runs.push((address, PAGE)),
                }
            }
        }
        runs
    }

    /// The guest-physical addresses of pages that somebody waits for.
    #[must_use]
    pub fn awaited(&self) -> Vec<u64> {
        self.lock().awaited.iter().copied().collect()
    }

    /// Whole pages that have come, from a guest-physical address on.
    ///
    /// # Errors
    ///
    /// The host's: it has no memory for them.
    pub fn fill(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.come(address, bytes.len() as u64, |fault, host, run| {
            let part = usize::try_from(run.start)
                .ok()
                .zip(usize::try_from(run.end).ok());
            let part = part.and_then(|(start, end)| bytes.get(start..end));
            fault.fill(host, part.unwrap_or_default())
        })
    }

    /// The same of pages that are zeros.
    ///
    /// # Errors
    ///
    /// As of [`Missing::fill`].
    pub fn zero(&self, address: u64, len: u64) -> io::Result<()> {
        self.come(address, len, |fault, host, run| {
            fault.zero(host, run.end.saturating_sub(run.start))
        })
    }

    /// Has `put` put those of the pages of `len` bytes from `address` on that are missing: at the host's address, what part of the bytes.
    fn come(
        &self,
        address: u64,
        len: u64,
        put: impl Fn(&UserFault, u64, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut inner = self.lock();
        let mut at = 0;
        while at < len {
            let start = address.saturating_add(at);
            let pages = inner.run_of(start, len.saturating_sub(at));
            let Some((host, count)) = pages else {
                // It is here, or nowhere.
                at = at.saturating_add(PAGE);
                continue;
            };
            let end = at.saturating_add(count.saturating_mul(PAGE));
            put(&self.fault, host, at..end)?;
            inner.here(start, count);
            at = end;
        }
        self.settle(&mut inner);
        Ok(())
    }

    /// Whoever waits at a host's address: the guest-physical address of the page, where that is missing. Else he goes on, with zeros where nothing was.
    fn touched(&self, host: u64) -> Option<u64> {
        let mut inner = self.lock();
        let found = inner.parts.iter().find_map(|part| {
            let inside = host.checked_sub(part.mapping.address())?;
            let page = (inside < part.mapping.len()).then_some(inside / PAGE)?;
            Some((
                part.guest.saturating_add(page.saturating_mul(PAGE)),
                part.holds(page),
            ))
        });
        if let Some((address, true)) = found {
            inner.awaited.insert(address);
            return Some(address);
        }
        // It has come meanwhile, or was zeros.
        let _ = self.fault.zero(host & !(PAGE - 1), PAGE);
        None
    }

    /// Waits for somebody who touches missing pages, for so long at most: their guest-physical addresses.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn wait(&self, time: Duration) -> io::Result<Vec<u64>> {
        let mut fds = [readable(Some(self.fault.as_fd().as_raw_fd()))];
        ppoll(&mut fds, Some(time))?;
        let mut wanted = Vec::new();
        while let Some(host) = self.fault.next()? {
            wanted.extend(self.touched(host));
        }
        Ok(wanted)
    }

    /// Nothing more comes, and nobody waits: what is missing reads as zeros. Only where nothing of the guest will ever run on it.
    pub fn give_up(&self) {
        let mut inner = self.lock();
        for part in &mut inner.parts {
            part.bits.fill(0);
        }
        inner.left = 0;
        self.settle(&mut inner);
    }

    /// Sees that no page of the host's `range` comes later, and gives it back by `discard`.
    ///
    /// # Errors
    ///
    /// As of `discard`.
    pub(super) fn discard(
        &self,
        range: &Range<u64>,
        discard: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut inner = self.lock();
        let mut gone = Vec::new();
        for part in &inner.parts {
            let (base, len) = (part.mapping.address(), part.mapping.len());
            let start = range.start.clamp(base, base.saturating_add(len));
            let end = range.end.clamp(start, base.saturating_add(len));
            let pages = start.saturating_sub(base) / PAGE..end.saturating_sub(base).div_ceil(PAGE);
            let address = |page: u64| part.guest.saturating_add(page.saturating_mul(PAGE));
            gone.extend(pages.filter(|page| part.holds(*page)).map(address));
        }
        for address in gone {
            if let Some((host, _)) = inner.run_of(address, PAGE) {
                // Who waits for it goes on.
                self.fault.zero(host, PAGE)?;
                inner.here(address, 1);
            }
        }
        let given = discard();
        self.settle(&mut inner);
        given
    }

    /// When all is here the memory is nobody's.
    fn settle(&self, inner: &mut Inner) {
        self.left.store(inner.left, Ordering::Relaxed);
        if inner.left > 0 {
            return;
        }
        inner.awaited.clear();
        for part in inner.parts.iter_mut().filter(|part| part.registered) {
            part.registered = false;
            // The memory may be mapped anew by now, which ends it too.
            let _ = self
                .fault
                .unregister(part.mapping.address(), part.mapping.len());
        }
    }
}

impl Inner {
    /// Gives pages back and marks them.
    fn miss(&mut self, address: u64, len: u64) -> io::Result<()> {
        let part = self
            .parts
            .iter_mut()
            .find(|part| part.page_of(address).is_some());
        let Some(part) = part else {
            return Ok(());
        };
        let offset = address.saturating_sub(part.guest);
        let len = len.min(part.mapping.len().saturating_sub(offset));
        virtio::memory::Backing::discard(&*part.mapping, offset, len)?;
        let first = offset / PAGE;
        for page in first..first.saturating_add(len / PAGE) {
            if !part.set(page, true) {
                self.left = self.left.saturating_add(1);
            }
        }
        Ok(())
    }

    /// The missing pages that begin at `address`, of `len` bytes at most: the host's address, and how many.
    fn run_of(&self, address: u64, len: u64) -> Option<(u64, u64)> {
        let mut parts = self.parts.iter();
        let (part, first) = parts.find_map(|part| Some((part, part.page_of(address)?)))?;
        let most = first.saturating_add(len / PAGE);
        let count = (first..most).take_while(|page| part.holds(*page)).count() as u64;
        (count > 0).then(|| (part.host(first), count))
    }

    /// They are here.
    fn here(&mut self, address: u64, count: u64) {
        let part = self
            .parts
            .iter_mut()
            .find(|part| part.page_of(address).is_some());
        let Some(part) = part else { return };
        let first = part.page_of(address).unwrap_or(0);
        for page in first..first.saturating_add(count) {
            if part.set(page, false) {
                self.left = self.left.saturating_sub(1);
                let address = part.guest.saturating_add(page.saturating_mul(PAGE));
                self.awaited.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests;
