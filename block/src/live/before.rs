//! A disk in use, of which what it holds at one instant is kept: a part is copied before it is changed for the first time.
//!
//! Each part is copied once, by whoever comes first: the one who goes through the disk, or a request that is about to change it. The
//! request waits for that in a queue of its own, without holding up others. Where a copy fails, nothing is kept any more, and requests go on
//! as they are: the guest does not suffer for a backup. So it is where a copy does not end within [`Patience`], which whoever waits for the
//! queue sees: threads may hang in it.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Live;
use crate::crew::{Crew, Mailbox, Task};
use crate::disk::{Completed, Disk, DiskInfo, IoQueue, Op, QueueError, Request, Token, Watch};
use crate::events::Observer;

/// How many bytes of a disk are kept together, at least.
const GRAIN: u64 = 64 << 10;

/// How many such parts a disk has at most: 4 MiB of notes.
const PARTS: u64 = 32 << 20;

/// How many bytes are copied at once, at most.
const CHUNK: u64 = 2 << 20;

/// How many requests wait for their copies in threads at once.
const THREADS: usize = 4;

/// By what a queue hears that requests need not wait any more. No worker has so many descriptors.
const BELL: Watch = Watch(u32::MAX);

/// Copies a range of the disk, in bytes; gives how many bytes were moved.
type Copying = Box<dyn Fn(Range<u64>) -> io::Result<u64> + Send + Sync>;

/// How long a request waits for its copies, at most.
pub(super) struct Patience {
    pub(super) limit: Duration,
    /// Where copies go, for whoever is told that they do not get there.
    pub(super) target: PathBuf,
    pub(super) now: Box<dyn Fn() -> Instant + Send + Sync>,
}

impl Patience {
    fn reason(&self) -> String {
        format!(
            "{}: for {} s it has not taken what the guest is about to replace, and the guest has gone on without it",
            self.target.display(),
            self.limit.as_secs()
        )
    }
}

/// What a disk held at one instant, as far as it has to be kept still.
pub(super) struct Instants {
    size: u64,
    grain: u64,
    state: Mutex<State>,
    /// A copy has ended.
    copied: Condvar,
    copy: Copying,
}

impl fmt::Debug for Instants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instants").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct State {
    /// Which parts are to be copied, by their numbers.
    todo: Vec<u64>,
    /// Those that are being copied.
    busy: Vec<Range<u64>>,
    /// Nothing is kept any more.
    over: bool,
    /// Why not, if a copy has failed.
    failure: Option<(io::ErrorKind, String)>,
}

impl State {
    fn has(&self, part: u64) -> bool {
        let (word, bit) = place(part);
        self.todo.get(word).is_some_and(|word| word & bit != 0)
    }

    fn is_busy(&self, parts: &Range<u64>) -> bool {
        let meets = |busy: &Range<u64>| busy.start < parts.end && parts.start < busy.end;
        self.busy.iter().any(meets)
    }

    /// The next part to be copied of these.
    fn next(&self, parts: &Range<u64>) -> Option<u64> {
        let mut part = parts.start;
        while part < parts.end {
            let (word, _) = place(part);
            if self.todo.get(word).is_none_or(|word| *word == 0) {
                part = (part / 64 + 1) * 64;
            } else if self.has(part) {
                return Some(part);
            } else {
                part += 1;
            }
        }
        None
    }

    /// Takes the next parts to be copied of these, at most so many; they are busy from now on.
    fn take(&mut self, parts: &Range<u64>, most: u64) -> Option<Range<u64>> {
        let first = self.next(parts)?;
        let mut end = first;
        while end < parts.end && end - first < most.max(1) && self.has(end) {
            let (word, bit) = place(end);
            if let Some(word) = self.todo.get_mut(word) {
                *word &= !bit;
            }
            end += 1;
        }
        self.busy.push(first..end);
        Some(first..end)
    }

    fn failed(&self) -> Option<io::Error> {
        let (kind, text) = self.failure.as_ref()?;
        Some(io::Error::new(*kind, text.clone()))
    }
}

fn place(part: u64) -> (usize, u64) {
    let word = usize::try_from(part / 64).unwrap_or(usize::MAX);
    (word, 1 << (part % 64))
}

/// Parts that are being copied. They are not any more when it is dropped, whatever has become of them.
struct Claim<'a> {
    owner: &'a Instants,
    parts: Range<u64>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.owner.lock();
        let found = state.busy.iter().position(|busy| *busy == self.parts);
        if let Some(found) = found {
            state.busy.swap_remove(found);
        }
        drop(state);
        self.owner.copied.notify_all();
    }
}

impl Instants {
    /// Nothing of a disk of `size` bytes is to be kept yet.
    pub(super) fn new(size: u64, copy: Copying) -> Self {
        let mut grain = GRAIN;
        while size.div_ceil(grain) > PARTS && grain < 1 << 62 {
            grain *= 2;
        }
        let words = usize::try_from(size.div_ceil(grain).div_ceil(64)).unwrap_or(0);
        Self {
            size,
            grain,
            state: Mutex::new(State {
                todo: vec![0; words],
                ..State::default()
            }),
            copied: Condvar::new(),
            copy,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The parts that a range of bytes meets.
    fn parts(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0..0;
        }
        offset / self.grain..(end - 1) / self.grain + 1
    }

    /// All of the disk is to be kept.
    pub(super) fn keep_all(&self) {
        self.lock().todo.fill(u64::MAX);
    }

    /// This range is to be kept, and all that is together with it.
    pub(super) fn keep(&self, offset: u64, len: u64) {
        let mut state = self.lock();
        for part in self.parts(offset, len) {
            let (word, bit) = place(part);
            if let Some(word) = state.todo.get_mut(word) {
                *word |= bit;
            }
        }
    }

    /// Copies the next parts from the byte `at` on; how many bytes have been dealt with, at least 1, and how many of them moved.
    pub(super) fn step(&self, at: u64) -> io::Result<(u64, u64)> {
        let rest = self.size.saturating_sub(at);
        if rest == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let parts = self.parts(at, rest);
        let taken = {
            let mut state = self.lock();
            if let Some(error) = state.failed() {
                return Err(error);
            }
            state.take(&parts, CHUNK / self.grain)
        };
        let Some(taken) = taken else {
            return Ok((rest, 0));
        };
        let end = taken.end.saturating_mul(self.grain).min(self.size);
        let moved = self.copy_taken(taken);
        if let Some(error) = self.lock().failed() {
            return Err(error);
        }
        Ok((end.saturating_sub(at).max(1), moved))
    }

    /// Copies parts that have been taken. A failure is noted.
    fn copy_taken(&self, parts: Range<u64>) -> u64 {
        let start = parts.start.saturating_mul(self.grain);
        let end = parts.end.saturating_mul(self.grain).min(self.size);
        let _claim = Claim { owner: self, parts };
        match (self.copy)(start..end) {
            Ok(moved) => moved,
            Err(error) => {
                self.fail(error.kind(), error.to_string());
                0
            }
        }
    }

    /// Whether a change of this range would have to wait.
    fn touches(&self, offset: u64, len: u64) -> bool {
        let parts = self.parts(offset, len);
        let state = self.lock();
        !state.over && (state.is_busy(&parts) || state.next(&parts).is_some())
    }

    /// Has this range copied, or nothing kept any more.
    fn make_way(&self, offset: u64, len: u64) {
        let parts = self.parts(offset, len);
        let mut state = self.lock();
        while !state.over {
            if let Some(taken) = state.take(&parts, CHUNK / self.grain) {
                drop(state);
                self.copy_taken(taken);
                state = self.lock();
            } else if state.is_busy(&parts) {
                let woken = self.copied.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            } else {
                return;
            }
        }
    }

    /// Nothing is kept any more, for a reason.
    fn fail(&self, kind: io::ErrorKind, reason: String) {
        let mut state = self.lock();
        state.over = true;
        state.failure.get_or_insert((kind, reason));
        drop(state);
        self.copied.notify_all();
    }

    /// Whether nothing is kept any more.
    fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Waits for what is being copied, unless a copy has failed. All has been taken before.
    pub(super) fn settle(&self) -> io::Result<()> {
        let mut state = self.lock();
        while !state.busy.is_empty() && state.failure.is_none() {
            let woken = self.copied.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        state.failed().map_or(Ok(()), Err)
    }

    /// Nothing is kept from now on; waits for what is being copied.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.over = true;
        while !state.busy.is_empty() {
            let woken = self.copied.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.copied.notify_all();
    }
}

/// A change that waits for its copies in a thread.
struct Wait {
    instants: Arc<Instants>,
    range: (u64, u64),
    mail: Arc<Mailbox<u64>>,
    key: u64,
}

impl Task for Wait {
    fn run(self) {
        self.instants.make_way(self.range.0, self.range.1);
        self.mail.put(self.key);
    }
}

/// A disk whose changes wait until what they replace has been copied.
pub(super) struct Guarded {
    inner: Arc<dyn Disk>,
    instants: Arc<Instants>,
    patience: Arc<Patience>,
    crew: Arc<Crew<Wait>>,
}

impl Guarded {
    pub(super) fn new(
        inner: Arc<dyn Disk>,
        instants: Arc<Instants>,
        patience: Patience,
    ) -> io::Result<Self> {
        Ok(Self {
            inner,
            instants,
            patience: Arc::new(patience),
            crew: Arc::new(Crew::new("block-before", THREADS)?),
        })
    }
}

impl Disk for Guarded {
    fn info(&self) -> DiskInfo {
        self.inner.info()
    }

    fn queue(&self, depth: u32) -> Result<Box<dyn IoQueue>, QueueError> {
        let failed = |source| QueueError { depth, source };
        let mut inner = self.inner.queue(depth)?;
        let mail = Mailbox::new().map_err(failed)?;
        inner.watch(mail.bell(), BELL).map_err(failed)?;
        Ok(Box::new(GuardedQueue {
            inner,
            instants: Arc::clone(&self.instants),
            patience: Arc::clone(&self.patience),
            crew: Arc::clone(&self.crew),
            mail: Arc::new(mail),
            held: HashMap::new(),
            key: 0,
            ended: Vec::new(),
            keys: Vec::new(),
        }))
    }

    // It keeps a disk of one size: it is not resized meanwhile.

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

struct GuardedQueue {
    inner: Box<dyn IoQueue>,
    instants: Arc<Instants>,
    patience: Arc<Patience>,
    crew: Arc<Crew<Wait>>,
    mail: Arc<Mailbox<u64>>,
    /// Requests that wait, by their keys, and until when.
    held: HashMap<u64, (Request, Option<Instant>)>,
    key: u64,
    /// Requests that have ended without having been done.
    ended: Vec<Token>,
    keys: Vec<u64>,
}

impl GuardedQueue {
    /// Passes on the requests that need not wait any more.
    fn go_on(&mut self) {
        // Emptied first: what is put in after that rings again. Nothing in it is no harm.
        let _ = self.mail.ringer().read();
        let mut keys = std::mem::take(&mut self.keys);
        self.mail.take(&mut keys);
        for key in keys.drain(..) {
            if let Some((request, _)) = self.held.remove(&key) {
                self.inner.push(request);
            }
        }
        self.keys = keys;
        self.inner.submit();
    }

    /// Passes on all requests where nothing is kept any more, or one has waited for too long. How long they may wait otherwise.
    fn lose_patience(&mut self) -> Option<Duration> {
        if self.held.is_empty() {
            return None;
        }
        let first = self.held.values().filter_map(|(_, until)| *until).min();
        let left = first.map(|first| first.saturating_duration_since((self.patience.now)()));
        if left.is_some_and(|left| left.is_zero()) {
            let reason = self.patience.reason();
            self.instants.fail(io::ErrorKind::TimedOut, reason);
        }
        if !self.instants.is_over() {
            return left;
        }
        // In the order in which they came.
        let mut held: Vec<_> = self.held.drain().collect();
        held.sort_unstable_by_key(|(key, _)| *key);
        for (_, (request, _)) in held {
            self.inner.push(request);
        }
        self.inner.submit();
        None
    }
}

impl IoQueue for GuardedQueue {
    fn push(&mut self, request: Request) {
        let len = match request.op {
            Op::Read | Op::Flush => 0,
            Op::Write => request.buffers.len(),
            Op::Discard { len } | Op::WriteZeroes { len, .. } => len,
        };
        if len == 0 || !self.instants.touches(request.offset, len) {
            return self.inner.push(request);
        }
        if matches!(request.op, Op::Discard { .. }) && self.within(&request, len) {
            // It need not be done, and much would have to be copied for it.
            return self.ended.push(request.token);
        }
        self.key = self.key.wrapping_add(1);
        let wait = Wait {
            instants: Arc::clone(&self.instants),
            range: (request.offset, len),
            mail: Arc::clone(&self.mail),
            key: self.key,
        };
        let until = (self.patience.now)().checked_add(self.patience.limit);
        self.held.insert(self.key, (request, until));
        self.crew.start([wait]);
    }

    fn submit(&mut self) {
        self.inner.submit();
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        if watch == BELL {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.inner.watch(fd, watch)
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let before = out.len();
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let ended = self.ended.drain(..);
        out.extend(ended.map(|token| Completed::Request {
            token,
            result: Ok(()),
            bytes: 0,
        }));
        loop {
            let patience = self.lose_patience();
            let left = if out.len() > before {
                Some(Duration::ZERO)
            } else {
                until.map(|until| until.saturating_duration_since(Instant::now()))
            };
            let found = out.len();
            let shorter = left.into_iter().chain(patience).min();
            self.inner.wait(shorter, out)?;
            let is_bell = |it: &Completed| matches!(it, Completed::Watch(watch) if *watch == BELL);
            let rung = out.iter().skip(found).any(is_bell);
            if rung {
                out.retain(|it| !is_bell(it));
                self.go_on();
            }
            let late = left.is_some_and(|left| left.is_zero());
            if out.len() > before || (late && !rung) {
                return Ok(());
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.held.len() + self.ended.len()
    }
}

impl GuardedQueue {
    /// Whether a request is one that the disk would not refuse.
    fn within(&self, request: &Request, len: u64) -> bool {
        let end = request.offset.checked_add(len);
        end.is_some_and(|end| end <= self.instants.size)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::open::ImageOptions;
    use crate::testing::{AnyPath, Arena, finish, request};

    /// The ranges that have been copied, in order.
    type Copied = Arc<Mutex<Vec<Range<u64>>>>;

    fn instants(size: u64) -> (Arc<Instants>, Copied) {
        let copied = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&copied);
        let copy = move |range: Range<u64>| {
            let moved = range.end - range.start;
            log.lock().unwrap().push(range);
            Ok(moved)
        };
        (Arc::new(Instants::new(size, Box::new(copy))), copied)
    }

    #[test]
    fn each_part_that_is_kept_is_copied_once_and_no_other() {
        let size = (8 << 20) + 512;
        let (instants, copied) = instants(size);
        instants.keep(GRAIN - 1, 2);
        instants.keep(8 << 20, 1);
        instants.keep(4 << 20, 1);
        instants.make_way((4 << 20) + 5, 1);
        instants.make_way((4 << 20) + 5, 1);
        instants.make_way(6 << 20, 1 << 20);
        assert!(!instants.touches(4 << 20, 1) && instants.touches(0, size));
        let mut at = 0;
        while at < size {
            at += instants.step(at).unwrap().0;
        }
        instants.settle().unwrap();
        let expected = [4 << 20..(4 << 20) + GRAIN, 0..2 * GRAIN, 8 << 20..size];
        assert_eq!(*copied.lock().unwrap(), expected);
    }

    #[test]
    fn a_copy_that_fails_ends_the_keeping_and_holds_nobody_up() {
        let copy = |_| Err(io::Error::other("full"));
        let instants = Instants::new(1 << 20, Box::new(copy));
        instants.keep(0, 1 << 20);
        instants.make_way(0, 1);
        assert!(!instants.touches(1 << 19, 1));
        instants.make_way(1 << 19, 1);
        assert_eq!(instants.step(0).unwrap_err().to_string(), "full");
        assert_eq!(instants.settle().unwrap_err().to_string(), "full");
    }

    /// A write of one byte at the disk's beginning.
    fn write(token: Token) -> Request {
        let arena = Arena::new(512);
        arena.put(0, &[7; 512]);
        request(token, Op::Write, 0, arena.buffers(&[(0, 512)]))
    }

    #[test]
    fn a_write_waits_no_longer_for_a_target_that_hangs_than_it_has_patience_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = ImageOptions::default();
        let disk = crate::open_disk(file.path(), &AnyPath, &options).unwrap();
        let (hang, hung) = sync_channel::<()>(0);
        let (entered, enters) = sync_channel(1);
        let hung = Mutex::new(hung);
        let copy = move |_| {
            entered.send(()).unwrap();
            // Until the test lets go of its end.
            let _ = hung.lock().unwrap().recv();
            Ok(1)
        };
        let instants = Arc::new(Instants::new(1 << 20, Box::new(copy)));
        instants.keep_all();
        let start = Instant::now();
        let passed = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&passed);
        let patience = Patience {
            limit: Duration::from_secs(20),
            target: "/backups/monday".into(),
            now: Box::new(move || start + Duration::from_millis(clock.load(Ordering::SeqCst))),
        };
        let guarded = Guarded::new(disk, Arc::clone(&instants), patience).unwrap();
        let mut queue = guarded.queue(4).unwrap();
        let mut out = Vec::new();
        queue.push(write(1));
        enters.recv().unwrap();
        passed.store(15_000, Ordering::SeqCst);
        queue.push(write(2));
        passed.store(19_999, Ordering::SeqCst);
        queue.wait(Some(Duration::ZERO), &mut out).unwrap();
        assert!(out.is_empty() && queue.in_flight() == 2);
        // Both go on when the first has waited for too long.
        passed.store(20_000, Ordering::SeqCst);
        let ended = finish(&mut *queue, 2);
        assert!(ended.iter().all(|(_, result, _)| result.is_ok()));
        for failed in [instants.settle(), instants.step(0).map(drop)] {
            let failed = failed.unwrap_err();
            assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
            assert!(
                failed.to_string().starts_with("/backups/monday: for 20 s"),
                "{failed}"
            );
        }
        // The next one does not wait at all.
        queue.push(write(3));
        assert_eq!(finish(&mut *queue, 1).len(), 1);
        drop(hang);
        instants.end();
        assert_eq!(std::fs::read(file.path()).unwrap()[..512], [7; 512]);
    }

    #[test]
    fn the_largest_disk_takes_bounded_memory() {
        let (instants, _) = instants(u64::MAX);
        assert!(instants.lock().todo.len() as u64 * 64 <= PARTS);
        instants.keep(u64::MAX - 1, 1);
        assert!(instants.touches(u64::MAX - 1, 1) && !instants.touches(0, 1));
    }
}
