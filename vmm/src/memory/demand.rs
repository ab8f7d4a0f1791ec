//! Guest memory that is read from a snapshot's file when the guest touches it.
//!
//! # Contract
//!
//! * A chunk is read as a whole, and its checksum compared, before anybody sees a byte of it. What is damaged is lost memory:
//!   it reads as zeros, and the bell rings ([`super::lost`]).
//! * A thread of its own serves those who wait, and reads what nobody has touched in between: what the guest needed first the last
//!   time ([`WorkingSet`]), then all else. When everything is there, memory is as any other.
//! * What is given back before it was read is never read.
//! * When that thread ends early, nobody waits, and what has not been read is lost memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use migration::pages::{CHUNK, Layers};
use migration::{RestoreError, SavedState, Section, SectionSet};
use serde::{Deserialize, Serialize};

use super::lost;
use super::mapping::Mapping;
use super::userfault::{UserFault, Waits};
use crate::error::chain;
use crate::machine::driver::{ppoll, readable};
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// What the guest touches in this time after it first runs is its working set. One that does not run in this time after
/// it was restored is not waited for: its memory is read ahead, and nothing is recorded.
const RECORDED: Duration = Duration::from_secs(2);
/// The most runs of chunks that are registered each by itself. One, and what lies before it, cost the host a mapping each, of
/// which a process has some ten thousand.
pub(super) const RUNS: usize = 1024;
/// The host's page, in bytes.
const PAGE: u64 = 4096;
/// The file of the working set, beside the manifest.
const NAME: &str = "working_set";
/// The most bytes of a working set that are read.
const LIMIT: u64 = 16 << 20;
/// The unit of its section.
const UNIT: &str = "memory";

/// Why memory cannot be read when the guest touches it.
#[derive(Debug, thiserror::Error)]
pub enum DemandError {
    /// The host gives no userfaultfd.
    #[error("this host gives no userfaultfd for guest memory: take mmap or copy")]
    Open(#[source] io::Error),
    /// It gives one, and something else is missing.
    #[error("memory cannot be read on demand")]
    Memory(#[from] io::Error),
}

/// The chunks that a guest needed first, in that order.
#[derive(Serialize, Deserialize)]
pub struct WorkingSetV1 {
    /// Of the snapshot that it is for.
    id: String,
    /// Numbers of chunks.
    chunks: Vec<u32>,
}

impl SavedState for WorkingSetV1 {
    const SCHEMA: &'static str = "working-set";
    const VERSION: u16 = 1;
}

impl WorkingSetV1 {
    /// Reads the bytes of a file, which are not trusted, as of the snapshot `id`.
    ///
    /// # Errors
    ///
    /// Damaged, or of another snapshot.
    pub fn parse(bytes: &[u8], id: &str) -> Result<Self, RestoreError> {
        let mut set = SectionSet::from_bytes(bytes)?;
        let found: Self = set.take(UNIT, Self::SCHEMA)?.decode()?;
        set.finish()?;
        if found.id == id {
            return Ok(found);
        }
        Err(RestoreError::Invalid {
            schema: Self::SCHEMA,
            reason: "it is of another snapshot".to_owned(),
        })
    }

    fn to_bytes(&self) -> Option<Vec<u8>> {
        let mut set = SectionSet::default();
        set.push(Section::encode(UNIT, self).ok()?);
        Some(set.to_bytes())
    }
}

/// What the guest needed first the last time, or needs now.
pub struct WorkingSet {
    path: PathBuf,
    id: String,
    pub(super) opener: Arc<Opener>,
    /// Read from the file; empty: to be recorded.
    known: Vec<u32>,
    /// Nothing is written beside the snapshot.
    sealed: bool,
}

impl WorkingSet {
    /// That of the snapshot `id` in `directory`. One that is damaged or of another snapshot is passed over with a warning.
    pub fn of(directory: &Path, id: &str, opener: &Arc<Opener>) -> Self {
        let path = directory.join(NAME);
        let read = opener.read_document(&path, LIMIT).ok();
        let parsed = read.map(|bytes| WorkingSetV1::parse(&bytes, id));
        let known = match parsed {
            None => Vec::new(),
            Some(Ok(set)) => set.chunks,
            Some(Err(error)) => {
                tracing::warn!("{}: it is passed over: {}", path.display(), chain(&error));
                Vec::new()
            }
        };
        Self {
            path,
            id: id.to_owned(),
            opener: Arc::clone(opener),
            known,
            sealed: false,
        }
    }

    /// Has nothing be recorded: the snapshot's directory is not written to.
    #[must_use]
    pub fn sealed(self, sealed: bool) -> Self {
        Self { sealed, ..self }
    }

    fn write(self, chunks: Vec<u32>) {
        let Self {
            path,
            id,
            opener,
            sealed,
            ..
        } = self;
        if sealed {
            return;
        }
        let Some(bytes) = WorkingSetV1 { id, chunks }.to_bytes() else {
            return;
        };
        if let Err(error) = opener.replace_file(&path, &bytes) {
            tracing::warn!("the working set is not recorded: {}", chain(&error));
        }
    }
}

/// A chunk that is to be read.
#[derive(Clone, Copy)]
struct Wanted {
    number: u32,
    /// Host virtual addresses.
    host: u64,
    len: u64,
    there: bool,
}

struct Chunks {
    /// By address.
    all: Vec<Wanted>,
    left: u64,
    buffer: Vec<u8>,
}

/// Memory that is being read. Dropped when nobody has the memory any more.
pub struct Demand {
    fault: UserFault,
    layers: Layers,
    chunks: Mutex<Chunks>,
    /// Bytes that are not there yet.
    left: AtomicU64,
    reason: Mutex<Option<String>>,
    /// When the guest first ran.
    ran: OnceLock<Instant>,
    /// What the userfaultfd has until all is there: the host's addresses.
    registered: Vec<Range<u64>>,
    /// They stay mapped as long as pages are put there.
    _mappings: Vec<Arc<Mapping>>,
}

/// A piece of memory that is read from the file: the mapping, and where in it each chunk is.
pub(super) struct Piece {
    pub number: u32,
    pub host: u64,
    pub len: u64,
}

impl Demand {
    /// Has `pieces` of `mappings` be read from `layers`, once it is started ([`Demand::start`]). Where they make
    /// more than `runs` runs, who touches what lies between them waits too.
    ///
    /// # Errors
    ///
    /// [`DemandError`]: the host gives no userfaultfd, or none for this memory.
    pub(super) fn new(
        layers: Layers,
        pieces: &[Piece],
        mappings: Vec<Arc<Mapping>>,
        (opener, runs): (&Opener, usize),
    ) -> Result<Arc<Self>, DemandError> {
        let fault = UserFault::open(opener, Waits::ForPages).map_err(DemandError::Open)?;
        let wanted = |piece: &Piece| Wanted {
            number: piece.number,
            host: piece.host,
            len: piece.len,
            there: false,
        };
        let mut all: Vec<Wanted> = pieces.iter().map(wanted).collect();
        all.sort_unstable_by_key(|chunk| chunk.host);
        let registered = to_register(&all, &mappings, runs);
        for Range { start, end } in &registered {
            fault.register(*start, end.saturating_sub(*start))?;
        }
        let left = all.iter().map(|chunk| chunk.len).sum();
        let buffer = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
        Ok(Arc::new(Self {
            fault,
            layers,
            chunks: Mutex::new(Chunks { all, left, buffer }),
            left: AtomicU64::new(left),
            reason: Mutex::new(None),
            ran: OnceLock::new(),
            registered,
            _mappings: mappings,
        }))
    }

    /// Starts the thread that reads. Once.
    ///
    /// # Errors
    ///
    /// The host gives no thread.
    pub(super) fn start(self: &Arc<Self>, working: WorkingSet) -> io::Result<()> {
        let own = Arc::clone(self);
        Builder::new(Kind::Job)
            .name("restore".to_owned())
            .spawn(move || own.serve(working))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Chunks> {
        // Each step leaves it sound; a panic elsewhere does too.
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest runs from now on, if it has not before.
    pub fn runs(&self) {
        self.ran.get_or_init(Instant::now);
    }

    /// How many bytes are not there yet.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    /// Why memory is lost, if it is.
    pub fn reason(&self) -> Option<String> {
        let reason = self.reason.lock();
        reason.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nothing more is read: what is not there yet is zeros. Nobody waits any more.
    pub fn give_up(&self) {
        self.all_there(&mut self.lock());
    }

    fn all_there(&self, chunks: &mut Chunks) {
        chunks.all.iter_mut().for_each(|chunk| chunk.there = true);
        self.settle(chunks, 0);
    }

    /// Memory is lost, from the host's address `host` on.
    fn lose(&self, host: u64, reason: String) {
        tracing::error!("memory of the guest is lost: {reason}");
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
        if let Ok(address) = usize::try_from(host) {
            lost::note(address);
        }
    }

    /// Nobody serves any more, because of `reason`: nobody waits, and what is not there is lost where the memory is still in use.
    fn end(self: &Arc<Self>, reason: Option<String>) {
        let mut chunks = self.lock();
        let first = chunks.all.iter().find(|chunk| !chunk.there);
        let Some(host) = first.map(|chunk| chunk.host) else {
            return;
        };
        if self.is_wanted() {
            let unknown = || "the thread that reads it on demand has ended".to_owned();
            self.lose(host, reason.unwrap_or_else(unknown));
        }
        self.all_there(&mut chunks);
    }

    /// Sees that no byte of the host's `range` comes from the file later, and gives it back by `discard`.
    ///
    /// # Errors
    ///
    /// As of `discard`.
    pub fn discard(
        &self,
        range: &Range<u64>,
        discard: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let mut chunks = self.lock();
        let touches = |c: &Wanted| c.host < range.end && range.start < c.host.saturating_add(c.len);
        let first = chunks
            .all
            .partition_point(|c| c.host.saturating_add(c.len) <= range.start);
        let mut place = first;
        while let Some(chunk) = chunks.all.get(place).copied().filter(touches) {
            let whole =
                range.start <= chunk.host && chunk.host.saturating_add(chunk.len) <= range.end;
            if whole && !chunk.there {
                self.there(&mut chunks, place);
            } else {
                self.load(&mut chunks, place);
            }
            place = place.saturating_add(1);
        }
        discard()
    }

    /// The chunk at `place` is there.
    fn there(&self, chunks: &mut Chunks, place: usize) {
        let Some(chunk) = chunks.all.get_mut(place).filter(|chunk| !chunk.there) else {
            return;
        };
        chunk.there = true;
        let left = chunks.left.saturating_sub(chunk.len);
        self.settle(chunks, left);
    }

    fn settle(&self, chunks: &mut Chunks, left: u64) {
        let before = std::mem::replace(&mut chunks.left, left);
        self.left.store(left, Ordering::Relaxed);
        // Once: somebody else may have it afterwards.
        if left == 0 && before > 0 {
            for Range { start, end } in &self.registered {
                // The memory may be mapped anew by now, which ends it too.
                let _ = self.fault.unregister(*start, end.saturating_sub(*start));
            }
        }
    }

    /// Reads the chunk at `place`, unless it is there.
    fn load(&self, chunks: &mut Chunks, place: usize) {
        let Some(chunk) = chunks.all.get(place).copied().filter(|chunk| !chunk.there) else {
            return;
        };
        let Wanted {
            number, host, len, ..
        } = chunk;
        let read = self.layers.load(number, &mut chunks.buffer);
        let pages = read.map_err(|error| chain(&error)).and_then(|pages| {
            let put = self.put(&chunks.buffer, pages, (host, len));
            put.map_err(|error| format!("pages cannot be put into the guest's memory: {error}"))
        });
        if let Err(reason) = pages {
            self.lose(host, reason);
            // Nobody waits for ever for what does not come.
            let _ = self.fault.zero(host, len);
        }
        self.there(chunks, place);
    }

    /// Puts what was read of a chunk into its place, and zeros between.
    fn put(
        &self,
        buffer: &[u8],
        pages: Vec<Range<usize>>,
        (host, len): (u64, u64),
    ) -> io::Result<()> {
        let mut at = 0;
        for Range { start, end } in pages {
            self.gap(host, at..start as u64)?;
            let bytes = buffer.get(start..end).unwrap_or_default();
            self.fault.fill(host.saturating_add(start as u64), bytes)?;
            at = end as u64;
        }
        self.gap(host, at..len)
    }

    fn gap(&self, host: u64, Range { start, end }: Range<u64>) -> io::Result<()> {
        if start >= end {
            return Ok(());
        }
        self.fault
            .zero(host.saturating_add(start), end.saturating_sub(start))
    }

    /// Serves who waits at `address`; the number of the chunk that was read for it.
    fn answer(&self, address: u64) -> Option<u32> {
        let mut chunks = self.lock();
        let below = chunks.all.partition_point(|c| c.host <= address);
        let place = below.saturating_sub(1);
        let holds = |c: &Wanted| {
            let inside = address.checked_sub(c.host);
            inside.is_some_and(|inside| inside < c.len)
        };
        let chunk = chunks.all.get(place).copied().filter(holds);
        if let Some(chunk) = chunk.filter(|chunk| !chunk.there) {
            self.load(&mut chunks, place);
            return Some(chunk.number);
        }
        // It was given back after it was there, has come meanwhile, or lies between what is read.
        let _ = self.fault.zero(address & !(PAGE - 1), PAGE);
        None
    }

    /// The thread: until all is there, or nobody else has the memory any more.
    fn serve(self: Arc<Self>, mut working: WorkingSet) {
        let mut serving = Serving {
            demand: &self,
            failed: None,
        };
        let known = std::mem::take(&mut working.known);
        let mut order = self.order(&known).into_iter();
        let mut recorder = Recorder {
            working: known.is_empty().then_some(working),
            chunks: Vec::new(),
            restored: Instant::now(),
        };
        while self.left() > 0 && self.is_wanted() {
            match self.fault.next() {
                Ok(Some(address)) => {
                    recorder.chunks.extend(self.answer(address));
                    continue;
                }
                Ok(None) => (),
                Err(error) => {
                    serving.failed = Some(format!("it cannot be read on demand: {error}"));
                    break;
                }
            }
            let ran = self.ran.get().copied();
            if let Some(rest) = recorder.rest(ran, Instant::now()) {
                // Ended by whoever waits; looks now and then whether anybody is left.
                let rest = rest.min(Duration::from_millis(100));
                let mut fds = [readable(Some(self.fault.as_fd().as_raw_fd()))];
                let _ = ppoll(&mut fds, Some(rest));
                continue;
            }
            recorder.end(ran);
            match order.next() {
                Some(place) => self.load(&mut self.lock(), place),
                None => break,
            }
        }
        // Nobody waits for the working set's file.
        drop(serving);
        recorder.end(self.ran.get().copied());
    }

    /// Whether anybody else has the memory.
    fn is_wanted(self: &Arc<Self>) -> bool {
        Arc::strong_count(self) > 1
    }

    /// The places of all chunks: those that are known to be needed first.
    fn order(&self, known: &[u32]) -> Vec<usize> {
        let chunks = self.lock();
        let numbers = chunks.all.iter().map(|chunk| chunk.number);
        let places: BTreeMap<u32, usize> = numbers.zip(0..).collect();
        let first = known.iter().take(chunks.all.len());
        let first = first.filter_map(|number| places.get(number).copied());
        first.chain(0..chunks.all.len()).collect()
    }
}

/// What is registered for the chunks `all`, which ascend: the runs of those that touch, or, where these are more than `most`, the
/// `mappings` that hold any.
fn to_register(all: &[Wanted], mappings: &[Arc<Mapping>], most: usize) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for Wanted { host, len, .. } in all {
        let end = host.saturating_add(*len);
        match runs.last_mut() {
            Some(run) if run.end == *host => run.end = end,
            _ => runs.push(*host..end),
        }
    }
    if runs.len() <= most {
        return runs;
    }
    let whole = |m: &Arc<Mapping>| m.address()..m.address().saturating_add(m.len());
    let mappings = mappings.iter().map(whole);
    let holds_any = |range: &Range<u64>| all.iter().any(|chunk| range.contains(&chunk.host));
    mappings.filter(holds_any).collect()
}

/// Held by who serves those who wait: it ends as [`Demand::end`] says however that comes, a panic too.
struct Serving<'a> {
    demand: &'a Arc<Demand>,
    failed: Option<String>,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.demand.end(self.failed.take());
    }
}

/// Takes note of what a guest needs first.
struct Recorder {
    /// `None`: nothing is recorded any more.
    working: Option<WorkingSet>,
    /// What was needed, in that order.
    chunks: Vec<u32>,
    /// When the memory could first be touched.
    restored: Instant,
}

impl Recorder {
    /// How much longer at `now` only what is touched is read, for a guest that first ran at `ran`.
    fn rest(&self, ran: Option<Instant>, now: Instant) -> Option<Duration> {
        self.working.as_ref()?;
        let gone = now.saturating_duration_since(ran.unwrap_or(self.restored));
        RECORDED.checked_sub(gone).filter(|rest| !rest.is_zero())
    }

    /// Writes the file, if the guest `ran`: what devices touch before that is no working set.
    fn end(&mut self, ran: Option<Instant>) {
        let chunks = std::mem::take(&mut self.chunks);
        let working = self.working.take();
        if let Some(working) = working.filter(|_| ran.is_some() && !chunks.is_empty()) {
            working.write(chunks);
        }
    }
}

#[cfg(test)]
mod tests;
