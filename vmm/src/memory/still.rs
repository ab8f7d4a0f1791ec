//! Memory as it was at one instant, while the guest goes on.
//!
//! # How
//!
//! 1. [`Still::begin`], while the guest runs: all memory is protected against writing, chunk by chunk. What is written
//!    meanwhile is freed again and remembered.
//! 2. [`Held::hold`], while vCPUs and devices stand: what has been freed is protected once more. This is the instant. It
//!    costs as much as the guest has written in the meantime, and not as much as there is memory.
//! 3. The guest goes on. One thread takes chunk by chunk from [`Still::next`], copies it, and says so ([`Still::saved`]), which
//!    frees it. Who wants to write a chunk before waits, and the chunk is next.
//!
//! Chunks of which the host has no page at all are zeros and cost nothing: they are not protected, and seen at the instant to be so still
//! ([`Still::zeros`]). Where the host does not tell ([`Presence`]) they are as any other.
//!
//! # Who may wait for whom
//!
//! * Whoever writes guest memory waits for the thread that copies, and that one for storage. It never writes guest memory,
//!   and takes no lock that is held by who does.
//! * Storage that takes nothing for [`LIMIT`] while somebody waits loses the copy, not the guest: everything is freed.
//! * So it is when the copy is cancelled, fails or is dropped, and when the thread that hears of faults dies.
//! * Pages that are given back ([`Still::give_back`]) are copied before.
//! * There is one copy at a time ([`StillError::Busy`]).

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::pages::CHUNK;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::mapping::Mapping;
use super::presence::Presence;
use super::userfault::{UserFault, Waits};
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// How long somebody waits for storage that takes nothing.
pub const LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether the copy is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// Why memory cannot be held still while the guest goes on.
#[derive(Debug, thiserror::Error)]
pub enum StillError {
    /// There is no userfaultfd.
    #[error(
        "no userfaultfd that sees KVM's writes: it takes Linux 6.4 and the capability SYS_PTRACE or a /dev/userfaultfd \
         that may be opened"
    )]
    Userfault(#[source] io::Error),
    /// The kernel does not do it for such memory.
    #[error("userfaultfd does not take guest memory of this kind")]
    Kind(#[source] io::Error),
    /// It is of a snapshot, of which userfaultfd takes nothing.
    #[error(
        "memory is mapped from the file of the snapshot that the machine was restored from: 'vireo \
         snapshot copy-in' makes it the machine's own, and with memory_restore_mode=copy it is that from the start"
    )]
    OfFile,
    /// Memory is not what it was a moment before.
    #[error("guest memory has been added or removed meanwhile")]
    Changed,
    /// One copy at a time: what one protects, another would free.
    #[error("guest memory is held still for another copy: wait for its end")]
    Busy,
    /// The host has no more of something.
    #[error("guest memory could not be protected")]
    Host(#[source] io::Error),
}

/// Guest memory as this module sees it. Clones are handles on the same memory.
#[derive(Clone)]
pub struct RamParts {
    /// In ascending order of guest-physical addresses, which come with them.
    parts: Vec<(u64, Arc<Mapping>)>,
    keeper: Arc<Mutex<Keeper>>,
}

/// What guest memory keeps from one copy to the next.
#[derive(Default)]
pub(super) struct Keeper {
    /// Made with the first copy and kept: to give memory back costs as much as to take it.
    fault: Option<Arc<UserFault>>,
    /// There as long as somebody hears of the faults of the last copy: he frees what is not protected by that one.
    heard: Weak<()>,
}

impl RamParts {
    /// The memory of `parts`, guest-physical addresses with what is there.
    pub(super) fn new(mut parts: Vec<(u64, Arc<Mapping>)>, keeper: Arc<Mutex<Keeper>>) -> Self {
        parts.sort_by_key(|(guest, _)| *guest);
        Self { parts, keeper }
    }

    /// By guest-physical address.
    pub(super) fn parts(&self) -> &[(u64, Arc<Mapping>)] {
        &self.parts
    }

    /// The faults of this memory, which are the caller's until what comes with them is dropped.
    fn take(&self, opener: &Opener) -> Result<(Arc<UserFault>, Arc<()>), StillError> {
        if self.parts.iter().any(|(_, mapping)| mapping.is_of_file()) {
            return Err(StillError::OfFile);
        }
        let mut keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner);
        if keeper.heard.strong_count() > 0 {
            return Err(StillError::Busy);
        }
        let fault = match &keeper.fault {
            Some(fault) => Arc::clone(fault),
            None => {
                Arc::new(UserFault::open(opener, Waits::ToWrite).map_err(StillError::Userfault)?)
            }
        };
        for (_, mapping) in &self.parts {
            let registered = fault.register(mapping.address(), mapping.len());
            registered.map_err(StillError::Kind)?;
        }
        let hears = Arc::new(());
        keeper.fault = Some(Arc::clone(&fault));
        keeper.heard = Arc::downgrade(&hears);
        Ok((fault, hears))
    }

    fn is(&self, other: &Self) -> bool {
        let same = |((guest, mapping), (other, there)): (&(u64, _), &(u64, _))| {
            guest == other && Arc::ptr_eq(mapping, there)
        };
        self.parts.len() == other.parts.len() && self.parts.iter().zip(&other.parts).all(same)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The instant has not come.
    Arming,
    /// It has.
    Holding,
    /// Nothing is protected any more.
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chunk {
    /// Somebody may have written it.
    Loose,
    /// The host had none of it, and nothing protects it: somebody may have written it since.
    Empty,
    /// Nobody has written it since.
    Armed,
    /// There is a copy.
    Saved,
}

struct Inner {
    phase: Phase,
    chunks: Vec<Chunk>,
    /// Somebody waits for these.
    urgent: VecDeque<usize>,
    /// Since when nothing has been copied while somebody waits.
    since: Option<Instant>,
    /// All before have been given to who copies.
    next: usize,
    /// Why it was released early.
    why: Option<&'static str>,
    /// Of each chunk, whether nobody had written it at the instant since it was protected.
    untouched: Vec<bool>,
    /// Of which the host had nothing at the instant.
    zeros: Vec<usize>,
}

/// Memory that is held still. Shared by those who copy it and those who hear of faults.
pub struct Still {
    fault: Arc<UserFault>,
    ram: RamParts,
    /// Of each chunk the host virtual address and the length.
    places: Vec<(u64, u64)>,
    inner: Mutex<Inner>,
    changed: Condvar,
    stop: OwnedFd,
    /// Tells what the host has, where it does.
    presence: Option<Presence>,
    /// Whether somebody wants the copy.
    wanted: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    limit: Duration,
}

/// Memory goes free when this is dropped.
pub struct Held {
    still: Arc<Still>,
    thread: Option<JoinHandle<()>>,
}

impl Still {
    /// Protects `ram`, while the guest runs. Storage may take nothing for as long as `limit`.
    ///
    /// # Errors
    ///
    /// [`StillError`]; nothing is protected then.
    pub fn begin(ram: RamParts, opener: &Opener, limit: Duration) -> Result<Held, StillError> {
        Self::begin_some(ram, None, opener, limit)
    }

    /// The same of the chunks that `only` says alone, in the order in which a file of memory counts them. More may be added at the
    /// instant ([`Held::hold_some`]).
    ///
    /// # Errors
    ///
    /// [`StillError`]; nothing is protected then.
    pub fn begin_some(
        ram: RamParts,
        only: Option<&[bool]>,
        opener: &Opener,
        limit: Duration,
    ) -> Result<Held, StillError> {
        let (fault, hears) = ram.take(opener)?;
        let places: Vec<_> = ram
            .parts
            .iter()
            .flat_map(|(_, mapping)| {
                let (start, len) = (mapping.address(), mapping.len());
                (0..len.div_ceil(CHUNK)).map(move |index| {
                    let at = index.saturating_mul(CHUNK);
                    (start.saturating_add(at), len.saturating_sub(at).min(CHUNK))
                })
            })
            .collect();
        let inner = Inner {
            phase: Phase::Arming,
            chunks: vec![Chunk::Loose; places.len()],
            urgent: VecDeque::new(),
            since: None,
            next: 0,
            why: None,
            untouched: Vec::new(),
            zeros: Vec::new(),
        };
        let stop = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
        let still = Arc::new(Self {
            fault,
            ram,
            places,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            stop: stop.map_err(|error| StillError::Host(error.into()))?,
            presence: Presence::open(opener).ok(),
            wanted: OnceLock::new(),
            limit,
        });
        for (_, mapping) in &still.ram.parts {
            mapping.held_by(Arc::downgrade(&still));
        }
        let watcher = Arc::clone(&still);
        let run = move || {
            // Dropped last.
            let _hears = hears;
            let _freed = Freed(&watcher);
            watcher.hear();
        };
        let thread = Builder::new(Kind::Job)
            .name("page-faults".to_owned())
            .spawn(run);
        let held = Held {
            still: Arc::clone(&still),
            thread: Some(thread.map_err(StillError::Host)?),
        };
        still.arm(only)?;
        Ok(held)
    }

    /// Protects the chunks that `only` says, but for those of which the host has nothing.
    fn arm(&self, only: Option<&[bool]>) -> Result<(), StillError> {
        let empty = self.empty(|index| is_wanted(only, index));
        for (index, ((start, len), empty)) in self.places.iter().zip(empty).enumerate() {
            if !is_wanted(only, index) {
                continue;
            }
            let mut inner = self.lock();
            // First: a fault tells of a chunk that is armed.
            if let Some(chunk) = inner.chunks.get_mut(index) {
                *chunk = if empty { Chunk::Empty } else { Chunk::Armed };
            }
            if empty {
                continue;
            }
            let armed = self.fault.protect(*start, *len, true);
            drop(inner);
            armed.map_err(StillError::Host)?;
        }
        Ok(())
    }

    /// Of each chunk, whether it is among `those` and the host has nothing of it at this moment, and it is private: nobody else
    /// has any of it.
    fn empty(&self, those: impl Fn(usize) -> bool) -> Vec<bool> {
        let private = self.ram.parts.iter().flat_map(|(_, mapping)| {
            let chunks = usize::try_from(mapping.len().div_ceil(CHUNK)).unwrap_or(0);
            std::iter::repeat_n(mapping.is_private(), chunks)
        });
        let mut places = self.places.iter().zip(private).enumerate().peekable();
        let mut empty = vec![false; self.places.len()];
        let Some(presence) = &self.presence else {
            return empty;
        };
        while let Some((first, ((start, len), private))) = places.next() {
            if !private || !those(first) {
                continue;
            }
            let (mut count, mut end) = (1_usize, start.saturating_add(*len));
            let follows = |(index, ((start, _), private)): &(usize, (&(u64, u64), bool)), end| {
                *private && *start == end && those(*index)
            };
            while let Some((_, ((_, len), _))) = places.next_if(|next| follows(next, end)) {
                count = count.saturating_add(1);
                end = end.saturating_add(*len);
            }
            let run = empty.get_mut(first..first.saturating_add(count));
            if find_empty(presence, (*start, end), run.unwrap_or_default()).is_err() {
                // An old kernel: what was found is so nevertheless.
                break;
            }
        }
        empty
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole before anything that may fail.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunk that is to be copied now; `None` when there is none left, or it has been released ([`Still::why`]).
    /// Chunks are counted as a file of memory counts them.
    pub fn next(&self) -> Option<usize> {
        let mut inner = self.lock();
        if inner.phase != Phase::Holding {
            return None;
        }
        while let Some(index) = inner.urgent.pop_front() {
            if inner.chunks.get(index) == Some(&Chunk::Armed) {
                return Some(index);
            }
        }
        let armed = |chunk: &Chunk| *chunk == Chunk::Armed;
        let rest = inner.chunks.iter().skip(inner.next);
        let index = rest.clone().position(armed)?.saturating_add(inner.next);
        inner.next = index;
        Some(index)
    }

    /// There is a copy of the chunk: who waits to write it goes on.
    pub fn saved(&self, index: usize) {
        let mut inner = self.lock();
        if inner.phase != Phase::Holding {
            return;
        }
        if self.free(&mut inner, index)
            && let Some(chunk) = inner.chunks.get_mut(index)
        {
            *chunk = Chunk::Saved;
        }
        // Who came while it was being copied does not wait for it any more.
        inner.urgent.retain(|other| *other != index);
        inner.since = if inner.urgent.is_empty() {
            None
        } else {
            Some(Instant::now())
        };
        drop(inner);
        self.changed.notify_all();
    }

    /// Why it was released before all was copied, if it was.
    pub fn why(&self) -> Option<&'static str> {
        let inner = self.lock();
        let copied = inner.chunks.iter().all(|chunk| *chunk == Chunk::Saved);
        match inner.phase {
            Phase::Released if !copied => Some(inner.why.unwrap_or("it was given up")),
            _ => None,
        }
    }

    /// What nobody wrote from [`Still::begin`] until the instant, as ranges of guest-physical bytes in ascending order; nothing before
    /// the instant. What has been given back to the host counts as written.
    pub fn untouched(&self) -> Vec<Range<u64>> {
        let starts = self.ram.parts.iter().flat_map(|(guest, mapping)| {
            let chunks = 0..mapping.len().div_ceil(CHUNK);
            chunks.map(move |index| guest.saturating_add(index.saturating_mul(CHUNK)))
        });
        let inner = self.lock();
        let all = starts.zip(&self.places).zip(&inner.untouched);
        all.filter(|(_, untouched)| **untouched)
            .map(|((start, (_, len)), _)| start..start.saturating_add(*len))
            .collect()
    }

    /// The chunks that held zeros at the instant, which [`Still::next`] does not give: what is there may have been written since.
    pub fn zeros(&self) -> Vec<usize> {
        self.lock().zeros.clone()
    }

    /// Has it be released as soon as `wanted` says so. Once, before the guest goes on.
    pub fn heed(&self, wanted: impl Fn() -> bool + Send + Sync + 'static) {
        // A second one would be a mistake, not a danger.
        let _ = self.wanted.set(Box::new(wanted));
    }

    /// Before pages from `start` on are given back to the host: returns when there are copies of them, or nobody wants any.
    pub(super) fn give_back(&self, start: u64, len: u64) {
        let touched = |index: &usize| self.overlaps(*index, start, len);
        let touched: Vec<usize> = (0..self.places.len()).filter(touched).collect();
        let mut inner = self.lock();
        for index in &touched {
            self.want(&mut inner, *index);
        }
        let waits = |inner: &mut Inner| {
            let armed = |index: &usize| inner.chunks.get(*index) == Some(&Chunk::Armed);
            inner.phase == Phase::Holding && touched.iter().any(armed)
        };
        drop(self.changed.wait_while(inner, waits));
    }

    /// After that: what is protected is so page by page, and those pages are gone.
    pub(super) fn given_back(&self, start: u64, len: u64) {
        let mut inner = self.lock();
        if inner.phase != Phase::Arming {
            return;
        }
        for index in 0..self.places.len() {
            if self.overlaps(index, start, len)
                && let Some(chunk) = inner.chunks.get_mut(index)
            {
                *chunk = Chunk::Loose;
            }
        }
    }

    fn overlaps(&self, index: usize, start: u64, len: u64) -> bool {
        let place = self.places.get(index);
        place.is_some_and(|(at, here)| {
            start < at.saturating_add(*here) && *at < start.saturating_add(len)
        })
    }

    /// Somebody waits for the chunk.
    fn want(&self, inner: &mut Inner, index: usize) {
        if inner.phase == Phase::Holding
            && inner.chunks.get(index) == Some(&Chunk::Armed)
            && !inner.urgent.contains(&index)
        {
            inner.urgent.push_back(index);
            inner.since.get_or_insert_with(Instant::now);
            self.changed.notify_all();
        }
    }

    /// Frees a chunk. Where the host does not do that, all is free and the copy is lost, also when this was its last chunk.
    fn free(&self, inner: &mut Inner, index: usize) -> bool {
        let Some((start, len)) = self.places.get(index) else {
            return true;
        };
        let Err(error) = self.fault.protect(*start, *len, false) else {
            return true;
        };
        tracing::error!("guest memory is given up by userfaultfd: {error}");
        inner.phase = Phase::Released;
        inner.why.get_or_insert("userfaultfd gave guest memory up");
        if let Some(chunk) = inner.chunks.get_mut(index) {
            *chunk = Chunk::Armed;
        }
        self.abandon();
        self.tell();
        false
    }

    /// It has been released: nobody waits any more.
    fn tell(&self) {
        self.changed.notify_all();
        // A full eventfd wakes as well as one more count would.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// The last resort: nobody waits for memory that is nobody's.
    fn abandon(&self) {
        for (_, mapping) in &self.ram.parts {
            if let Err(error) = self.fault.unregister(mapping.address(), mapping.len()) {
                tracing::error!("UFFDIO_UNREGISTER of guest memory: {error}");
            }
        }
    }

    /// Frees everything. What has not been copied is lost; `why` tells so.
    fn release(&self, why: &'static str) {
        let mut inner = self.lock();
        if inner.phase == Phase::Released {
            return;
        }
        inner.phase = Phase::Released;
        inner.why = Some(why);
        for index in 0..self.places.len() {
            if inner.chunks.get(index) != Some(&Chunk::Saved) && !self.free(&mut inner, index) {
                break;
            }
        }
        drop(inner);
        self.tell();
    }

    /// Hears of those who wait until it is released.
    fn hear(&self) {
        let look = Timespec {
            tv_sec: 0,
            tv_nsec: i64::try_from(LOOK.as_nanos()).unwrap_or(0),
        };
        while self.lock().phase != Phase::Released {
            let mut fds = [
                PollFd::new(&*self.fault, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&look)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => (),
                Err(error) => {
                    tracing::error!("faults of guest memory cannot be waited for: {error}");
                    return;
                }
            }
            loop {
                match self.fault.next() {
                    Ok(Some(address)) => self.on_fault(address),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!("faults of guest memory cannot be read: {error}");
                        return;
                    }
                }
            }
            self.look();
        }
    }

    fn on_fault(&self, address: u64) {
        let index = (0..self.places.len()).find(|index| self.overlaps(*index, address, 1));
        let Some(index) = index else {
            return;
        };
        let mut inner = self.lock();
        let held = inner.phase == Phase::Holding;
        let Some(chunk) = inner.chunks.get_mut(index) else {
            return;
        };
        match chunk {
            Chunk::Armed if held => self.want(&mut inner, index),
            chunk => {
                if *chunk == Chunk::Armed {
                    *chunk = Chunk::Loose;
                }
                // Under the lock: what is held afterwards is not freed by what was before.
                self.free(&mut inner, index);
            }
        }
    }

    /// Whether there is still somebody who wants it, and storage that takes it.
    fn look(&self) {
        let since = self.lock().since;
        if since.is_some_and(|since| since.elapsed() >= self.limit) {
            self.release("storage took no memory while the guest waited to write it");
        } else if self.wanted.get().is_some_and(|wanted| !wanted()) {
            self.release("it was cancelled");
        }
    }
}

/// Whether the chunk `index` is among those of `only`, if there are such.
fn is_wanted(only: Option<&[bool]>, index: usize) -> bool {
    only.is_none_or(|only| only.get(index) == Some(&true))
}

/// Marks those chunks of memory from `start` to `end` as empty of which the host has nothing.
fn find_empty(
    presence: &Presence,
    (start, end): (u64, u64),
    mut chunks: &mut [bool],
) -> io::Result<()> {
    let mut at = start;
    while at < end && !chunks.is_empty() {
        let found = presence.first(at, end.saturating_sub(at))?;
        let before = found.map_or(end, |found| found.max(at)).saturating_sub(at);
        let before = if found.is_some() {
            before / CHUNK
        } else {
            before.div_ceil(CHUNK)
        };
        let count = usize::try_from(before).unwrap_or(usize::MAX);
        let (empty, rest) = chunks.split_at_mut(count.min(chunks.len()));
        empty.fill(true);
        // The next one is not.
        chunks = rest.get_mut(1..).unwrap_or_default();
        at = at.saturating_add(before.saturating_add(1).saturating_mul(CHUNK));
    }
    Ok(())
}

/// Frees memory whose faults nobody hears of any more.
struct Freed<'a>(&'a Still);

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.0
            .release("the thread that hears of page faults has ended");
    }
}

impl Held {
    /// The instant: vCPUs and devices stand, and nobody else writes guest memory, which is `ram`.
    ///
    /// # Errors
    ///
    /// [`StillError`]; it is to be dropped then.
    pub fn hold(&self, ram: &RamParts) -> Result<(), StillError> {
        self.hold_some(ram, None)
    }

    /// The same of the chunks that `only` says alone. Of all others nobody wants a copy.
    ///
    /// # Errors
    ///
    /// [`StillError`]; it is to be dropped then.
    pub fn hold_some(&self, ram: &RamParts, only: Option<&[bool]>) -> Result<(), StillError> {
        let still = &self.still;
        if !still.ram.is(ram) {
            return Err(StillError::Changed);
        }
        let mut inner = still.lock();
        if inner.phase != Phase::Arming {
            let gone = io::Error::from(io::ErrorKind::BrokenPipe);
            return Err(StillError::Host(gone));
        }
        let was_empty = |index| inner.chunks.get(index) == Some(&Chunk::Empty);
        let empty = still.empty(|index| was_empty(index) && is_wanted(only, index));
        let Inner {
            chunks,
            untouched,
            zeros,
            ..
        } = &mut *inner;
        let places = still.places.iter().zip(empty).enumerate();
        for (chunk, (index, ((start, len), empty))) in chunks.iter_mut().zip(places) {
            let (wanted, armed) = (is_wanted(only, index), *chunk == Chunk::Armed);
            untouched.push(armed || empty);
            if empty {
                zeros.push(index);
                *chunk = Chunk::Saved;
                continue;
            }
            if wanted != armed {
                let changed = still.fault.protect(*start, *len, wanted);
                changed.map_err(StillError::Host)?;
            }
            *chunk = if wanted { Chunk::Armed } else { Chunk::Saved };
        }
        inner.phase = Phase::Holding;
        Ok(())
    }

    /// What is held.
    #[must_use]
    pub fn still(&self) -> &Arc<Still> {
        &self.still
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.still.release("it was given up");
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but what has just been said.
            drop(thread.join());
        }
    }
}

/// What a mapping knows of who holds it still.
#[derive(Default)]
pub(super) struct Watcher(Mutex<Weak<Still>>);

impl Watcher {
    pub(super) fn set(&self, still: Weak<Still>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = still;
    }

    pub(super) fn get(&self) -> Option<Arc<Still>> {
        let still = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        still.upgrade()
    }
}

#[cfg(test)]
mod tests;
