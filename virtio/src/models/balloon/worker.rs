//! The thread that serves a balloon's queues: all of them, because what one of them gives back another takes again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use devices::LogLimit;
use vm_memory::{Address, Bytes, GuestAddressSpace, GuestMemory as _, Permissions};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use zerocopy::FromBytes;

use super::pages::{self, Runs};
use super::spec::{PAGE, STATISTICS, Statistic, feature};
use super::view::{BalloonView, count, lock};
use crate::device::{ActiveQueue, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Extent, Ring, RingError, take_front, total};
use crate::worker::{QueueWorker, Turn, Wake};

/// What a queue is for (Virtio 1.2, 5.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hints,
    Reports,
    /// For nothing: its feature was not accepted.
    Idle,
}

impl Role {
    /// In the order of the specification, with the feature that each depends on.
    const ALL: [(Self, u64); 5] = [
        (Self::Inflate, 0),
        (Self::Deflate, 0),
        (Self::Statistics, feature::STATS_VQ),
        (Self::Hints, feature::FREE_PAGE_HINT),
        (Self::Reports, feature::PAGE_REPORTING),
    ];

    /// What the queues with these indexes are for. By the specification a queue has its number whether those before it
    /// exist or not; Linux leaves no gaps. Which of them a driver means shows where it enables a queue that the
    /// other does not have; where all features are accepted they are the same.
    pub fn of(features: u64, indexes: &[u16]) -> Vec<Self> {
        let all = (0u16..).zip(Self::ALL);
        let there = all.filter(|(_, (_, needs))| features & needs == *needs);
        let spec: Vec<(u16, Self)> = there.map(|(index, (role, _))| (index, role)).collect();
        let dense: Vec<(u16, Self)> = (0..).zip(spec.iter().map(|(_, role)| *role)).collect();
        let known = |list: &[(u16, Self)], index| list.iter().any(|(i, _)| *i == index);
        let list = if indexes.iter().all(|index| known(&spec, *index)) {
            spec
        } else {
            dense
        };
        let role = |index| list.iter().find(|(i, _)| *i == index);
        let role = |index| role(index).map_or(Self::Idle, |(_, role)| *role);
        indexes.iter().map(|index| role(*index)).collect()
    }
}

/// How many pages one turn takes out of a queue, and one buffer may name; the rest of a buffer stays the
/// guest's. Linux names 256 in one.
pub const TURN_PAGES: usize = 16 << 10;

/// Pages wait for their neighbours until there are so many, or so many pieces, or the driver has been still for so long.
const ENOUGH_PAGES: u64 = 8 << 10;
const ENOUGH_PIECES: usize = 512;
const STILL: Duration = Duration::from_millis(2);

/// The most bytes of statistics that are looked at. Linux gives 160.
const STATISTICS_LIMIT: usize = 1024;

/// What [`EpollEvent`]s of the wake-up carry; those of doorbells carry their place in the list.
const WAKE: u64 = u64::MAX;

/// A balloon's worker.
pub struct Worker {
    posts: Vec<Post>,
    desk: Desk,
    epoll: Epoll,
    wake: Wake,
    /// The driver broke a queue: all are left alone.
    failed: bool,
}

/// One queue.
struct Post {
    role: Role,
    ring: Ring,
    /// There may be something in it.
    due: bool,
}

/// What the worker has besides its queues.
struct Desk {
    view: Arc<BalloonView>,
    memory: GuestMemory,
    features: u64,
    interval: Option<Duration>,
    chain: Chain,
    heads: Vec<u16>,
    /// In the balloon, and not given back to the host yet.
    waiting: Runs,
    /// Pages that are looked at and forgotten.
    scratch: Runs,
    /// The statistics buffer, which the device keeps until it wants new ones.
    held: Option<u16>,
    /// How many of the first statistics buffers were held when the device was stopped.
    seen_before: usize,
    /// When statistics were taken.
    asked: Instant,
    log: LogLimit,
}

impl Worker {
    /// A worker for these queues, of which statistics are asked for every `interval`.
    pub fn new(
        queues: Vec<ActiveQueue>,
        features: u64,
        memory: GuestMemory,
        view: &Arc<BalloonView>,
        interval: Option<Duration>,
        (notifier, wake): (&Arc<dyn Notifier>, &Wake),
    ) -> io::Result<Self> {
        let indexes: Vec<u16> = queues.iter().map(|queue| queue.index).collect();
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, wake.fd().as_raw_fd(), event)?;
        let mut seen_before = 0;
        let mut posts = Vec::new();
        for (role, queue) in Role::of(features, &indexes).into_iter().zip(queues) {
            if role == Role::Statistics {
                seen_before = queue.parked.len();
            }
            let ring = Ring::new(queue, features, Arc::clone(notifier));
            let event = EpollEvent::new(EventSet::IN, posts.len() as u64);
            epoll.ctl(ControlOperation::Add, ring.doorbell().as_raw_fd(), event)?;
            let due = true;
            posts.push(Post { role, ring, due });
        }
        let desk = Desk {
            view: Arc::clone(view),
            memory,
            features,
            interval,
            chain: Chain::default(),
            heads: Vec::new(),
            waiting: Runs::default(),
            scratch: Runs::default(),
            held: None,
            seen_before,
            asked: Instant::now(),
            log: LogLimit::new(),
        };
        Ok(Self {
            posts,
            desk,
            epoll,
            wake: wake.clone(),
            failed: false,
        })
    }

    /// Serves every queue that has something once; `true` when there may be more.
    fn serve(&mut self) -> bool {
        let view = self.desk.memory.memory();
        let mut more = false;
        for Post { role, ring, due } in self.posts.iter_mut().filter(|post| post.due) {
            let served = self.desk.serve(*role, ring, &view);
            match served.and_then(|more| ring.notify(&view).map(|()| more)) {
                Ok(again) => {
                    *due = again;
                    more |= again;
                }
                Err(error) => {
                    ring.fail(&error);
                    self.failed = true;
                    return false;
                }
            }
        }
        if self.desk.is_enough() {
            self.desk.flush(&view);
        }
        more
    }

    /// Sleeps until there is something to do.
    fn sleep(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 8];
        let limit = self.desk.patience(self.failed).map_or(-1, |limit| {
            // Rounded up: it is not to wake before it is time.
            let millis = limit.as_nanos().div_ceil(1_000_000);
            i32::try_from(millis).unwrap_or(i32::MAX)
        });
        let ready = match self.epoll.wait(limit, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            ready => ready?,
        };
        if ready == 0 {
            let view = self.desk.memory.memory();
            self.desk.flush(&view);
            self.look_up();
        }
        for event in events.iter().take(ready) {
            let post = usize::try_from(event.data()).ok();
            match post.and_then(|post| self.posts.get_mut(post)) {
                Some(Post { ring, due, .. }) => {
                    ring.silence();
                    *due = true;
                }
                None => {
                    self.wake.reset();
                    self.look_up();
                }
            }
        }
        Ok(())
    }

    /// Every queue is looked at in the next turn.
    fn look_up(&mut self) {
        for post in &mut self.posts {
            post.due = true;
        }
    }
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve && !self.failed && self.serve() {
            return Turn::Again;
        }
        match self.sleep() {
            Ok(()) => Turn::Again,
            Err(error) => {
                if let Some(post) = self.posts.first_mut() {
                    post.ring.fail(&error);
                }
                Turn::Halt
            }
        }
    }

    fn resume(&mut self) {
        self.look_up();
    }

    fn in_flight(&self) -> usize {
        // The statistics buffer is the device's to keep, and goes back with the queues.
        0
    }

    fn finish(mut self) -> Vec<StoppedQueue> {
        let view = self.desk.memory.memory();
        self.desk.flush(&view);
        let held = self.desk.held;
        let stop =
            |Post { role, ring, .. }: Post| ring.stop(held.filter(|_| role == Role::Statistics));
        self.posts.into_iter().map(stop).collect()
    }
}

impl Desk {
    fn serve(&mut self, role: Role, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        match role {
            Role::Inflate => self.inflate(ring, view),
            Role::Deflate => self.deflate(ring, view),
            Role::Statistics => self.statistics(ring, view),
            Role::Hints => self.hints(ring, view),
            Role::Reports => self.reports(ring, view),
            Role::Idle => Ok(false),
        }
    }

    /// The driver gives pages (5.5.6.1). Where it has promised to tell before it uses them again
    /// they may wait for their neighbours; else they are gone before it hears.
    fn inflate(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        let (pages, more) = self.gather(ring, view, |desk| {
            let Self { chain, waiting, .. } = desk;
            read_pages(view, &chain.readable, |page| waiting.push(page))
        })?;
        count(&self.view.tally.inflated, pages as u64);
        if self.features & feature::MUST_TELL_HOST == 0 {
            self.flush(view);
        }
        self.give_back(ring, view)?;
        Ok(more)
    }

    /// The driver takes pages back (5.5.6.1). What has gone to the host comes back as zeros; what has not is to be gone before.
    fn deflate(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        let tracked = pages::has_larger_pages(view);
        let (pages, more) = self.gather(ring, view, |desk| {
            let Self { chain, scratch, .. } = desk;
            if tracked {
                return read_pages(view, &chain.readable, |page| scratch.push(page));
            }
            let bytes = usize::try_from(total(&chain.readable)).unwrap_or(usize::MAX);
            bytes / size_of::<u32>()
        })?;
        count(&self.view.tally.deflated, pages as u64);
        if !self.heads.is_empty() {
            self.flush(view);
        }
        if !self.scratch.is_empty() {
            let mut partial = lock(&self.view.partial);
            for run in self.scratch.settle() {
                partial.deflate(view, run);
            }
            self.scratch.clear();
        }
        self.give_back(ring, view)?;
        Ok(more)
    }

    /// The driver fills in statistics (5.5.6.3). The device keeps the buffer until it wants newer ones.
    fn statistics(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        ring.quiet(view)?;
        for _ in 0..ring.size() {
            if !ring.take(view, &mut self.chain)? {
                return self.renew_statistics(ring, view).map(|()| false);
            }
            // A driver has one buffer. One that has more gets them back.
            if let Some(other) = self.held.replace(self.chain.head) {
                ring.complete(view, other, 0)?;
            }
            match self.seen_before.checked_sub(1) {
                Some(left) => self.seen_before = left,
                None => self.read_statistics(view),
            }
        }
        Ok(true)
    }

    fn read_statistics(&mut self, view: &GuestMap) {
        let len = usize::try_from(total(&self.chain.readable)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len.min(STATISTICS_LIMIT)];
        if !take_front(view, &mut self.chain.readable, &mut bytes) {
            return;
        }
        let mut values = [None; STATISTICS.len()];
        for entry in bytes.chunks_exact(size_of::<Statistic>()) {
            // Tags that are not known are younger than this.
            if let Ok(entry) = Statistic::read_from_bytes(entry)
                && let Some(value) = values.get_mut(usize::from(entry.tag.get()))
            {
                *value = Some(entry.value.get());
            }
        }
        if values.iter().any(Option::is_some) {
            self.view.filled(values);
        }
    }

    /// Asks for newer statistics, when it is time, by giving the buffer back.
    fn renew_statistics(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<(), RingError> {
        let due = self.until_statistics().is_some_and(|left| left.is_zero());
        let Some(head) = self.held else {
            return Ok(());
        };
        if self.view.take_wanted() || due {
            self.asked = Instant::now();
            self.held = None;
            ring.complete(view, head, 0)?;
        }
        Ok(())
    }

    /// The driver begins or ends a round of hints, or tells of free pages (5.5.6.4). With pages that it fills with something
    /// hints are of no use: what leaves them out finds zeros.
    fn hints(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        let poisoned = self.poisoned();
        let (_, more) = self.gather(ring, view, |desk| {
            let mut id = [0; size_of::<u32>()];
            if take_front(view, &mut desk.chain.readable, &mut id) {
                desk.view.hint_command(u32::from_le_bytes(id));
            }
            for Extent { addr, len } in &desk.chain.writable {
                let bytes = usize::try_from(*len).unwrap_or(usize::MAX);
                if !poisoned && view.check_range(*addr, bytes, Permissions::ReadWrite) {
                    let run = pages::whole_pages(*addr, (*len).into());
                    desk.view.hint(run.start * PAGE..run.end * PAGE);
                }
            }
            desk.chain.writable.len()
        })?;
        self.give_back(ring, view)?;
        Ok(more)
    }

    /// The driver tells of pages that it does not use, and waits until it may again (5.5.6.5). Those that it has filled
    /// with something keep that.
    fn reports(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<bool, RingError> {
        let poisoned = self.poisoned();
        let (_, more) = self.gather(ring, view, |desk| {
            for Extent { addr, len } in &desk.chain.writable {
                desk.scratch
                    .push_run(pages::whole_pages(*addr, (*len).into()));
            }
            desk.chain.writable.len()
        })?;
        if !poisoned {
            for run in self.scratch.settle() {
                let outcome = pages::discard_free(view, run, &self.log);
                count(&self.view.tally.reported, outcome.discarded);
                self.view.tally.outcome(outcome);
            }
        }
        self.scratch.clear();
        self.give_back(ring, view)?;
        Ok(more)
    }

    /// Takes chains out of the queue and has `look` at each, which returns how many pages or pieces it found. They are given back
    /// by [`Desk::give_back`]. Returns how many were found in all, and whether there may be more.
    fn gather(
        &mut self,
        ring: &mut Ring,
        view: &GuestMap,
        mut look: impl FnMut(&mut Self) -> usize,
    ) -> Result<(usize, bool), RingError> {
        ring.quiet(view)?;
        self.heads.clear();
        let mut looked = 0;
        for _ in 0..ring.size() {
            if !ring.take(view, &mut self.chain)? {
                return Ok((looked, false));
            }
            self.heads.push(self.chain.head);
            looked += look(self).min(TURN_PAGES);
            if looked >= TURN_PAGES {
                break;
            }
        }
        Ok((looked, true))
    }

    fn give_back(&mut self, ring: &mut Ring, view: &GuestMap) -> Result<(), RingError> {
        for head in self.heads.drain(..) {
            ring.complete(view, head, 0)?;
        }
        Ok(())
    }

    /// Gives the pages that wait back to the host.
    fn flush(&mut self, view: &GuestMap) {
        if self.waiting.is_empty() {
            return;
        }
        let mut partial = lock(&self.view.partial);
        for run in self.waiting.settle() {
            let outcome = partial.inflate(view, run, &self.log);
            self.view.tally.outcome(outcome);
        }
        self.waiting.clear();
    }

    fn is_enough(&self) -> bool {
        let (pages, pieces) = self.waiting.size();
        pages >= ENOUGH_PAGES || pieces >= ENOUGH_PIECES
    }

    /// Free pages are not to become zeros (5.5.6.2).
    fn poisoned(&self) -> bool {
        self.features & feature::PAGE_POISON != 0 && self.view.poison.load(Ordering::Acquire) != 0
    }

    /// How long it is until statistics are to be asked for; `None` while there is no buffer or no interval.
    fn until_statistics(&self) -> Option<Duration> {
        self.held?;
        Some(self.interval?.saturating_sub(self.asked.elapsed()))
    }

    /// How long the worker may sleep.
    fn patience(&self, failed: bool) -> Option<Duration> {
        let still = (!self.waiting.is_empty()).then_some(STILL);
        let statistics = self.until_statistics().filter(|_| !failed);
        [still, statistics].into_iter().flatten().min()
    }
}

/// Hands each number of a page in `extents` to `push`, as far as they are memory and no more than
/// [`TURN_PAGES`], and returns how many there were. One may lie across two extents.
fn read_pages(view: &GuestMap, extents: &[Extent], mut push: impl FnMut(u64)) -> usize {
    let mut buffer = [0; 1024];
    let mut begun = 0;
    let mut pages = 0;
    for extent in extents {
        let mut at = extent.addr;
        let mut left = usize::try_from(extent.len).unwrap_or(usize::MAX);
        while left > 0 {
            let part = left.min(buffer.len() - begun);
            let filled = begun + part;
            if view.read_slice(&mut buffer[begun..filled], at).is_err() {
                return pages;
            }
            let (numbers, rest) = buffer[..filled].as_chunks();
            for number in numbers {
                push(u32::from_le_bytes(*number).into());
            }
            pages += numbers.len();
            if pages >= TURN_PAGES {
                return pages;
            }
            begun = rest.len();
            buffer.copy_within(filled - begun..filled, 0);
            left -= part;
            // The bytes were just read, so the address does not wrap.
            at = at.unchecked_add(part as u64);
        }
    }
    pages
}
