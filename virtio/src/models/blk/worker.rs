//! The worker of one queue of a block device.
//!
//! It sleeps in its [`IoQueue`] alone, which watches the doorbell too. Before
//! it does it looks for a while, if that has paid ([`Window`]): at the ring,
//! whose driver then need not kick, and for completions. Every
//! request has at most one operation at the disk at a time, so that the depth
//! of the queue bounds everything: a discard's ranges go one after the other,
//! and a write that must be durable is followed by a flush.
//!
//! # Counting
//!
//! Requests that went to the disk are counted in the queue's [`QueueTally`]. The clock
//! is read once a turn for those that begin. Those that end, end when the worker woke: it has
//! looked at the clock then for its [`Window`].
//!
//! # Limits
//!
//! A request that is over a limit ([`Throttle`]) is put back, and so is what
//! comes behind it. The worker sleeps for the time that it is told, or until
//! something else wakes it, and looks at the request anew. Other queues go on.
//!
//! # Requests that wait
//!
//! A request that fails and is to stop the machine ([`ErrorAction::Stop`]) is
//! not answered. Its head is put aside, its slot is free again, and nothing
//! new is taken any more. What is at the disk goes on, and is put aside too if
//! it fails. The heads are given back with the queue as parked ones, in the order in which they came,
//! and begin anew from their chains at the next start: a request that was half
//! done is done again whole. When a stop is given up that happens at once.

use std::collections::BTreeSet;
use std::io;
use std::iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{Buffers, Completed, Disk, IoQueue, IoVec, Op, Request, Token, Watch};
use devices::LogLimit;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::config::{OnReadError, OnWriteError};
use super::request::{Ask, Limits, Parsed, Range, Status, buffers, mark_dirty, parse};
use super::tally::{Kind, QueueTally};
use crate::device::{ActivateError, DiskReport, ErrorAction, Notifier, StoppedQueue};
use crate::limit::{Clock, Throttle};
use crate::memory::{GuestMap, GuestMemory};
use crate::models::poll::Window;
use crate::ring::{Chain, Extent, Ring, RingError, total};
use crate::worker::{QueueWorker, Turn, Wake};

/// The most requests at the disk at once. A deeper queue waits in the ring;
/// no host device that is known gains from more.
const MAX_DEPTH: u16 = 1024;

const DOORBELL: Watch = Watch(0);
const WAKE: Watch = Watch(1);

/// What the workers of a device are given.
#[derive(Clone)]
pub struct Service {
    /// The device's id, for messages.
    pub id: String,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// What requests are held against.
    pub limits: Limits,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The disk makes every write durable by itself.
    pub write_through: bool,
    /// The driver can flush. If not, every write must be durable at once.
    pub flushes: bool,
    /// Where failures are told.
    pub notifier: Arc<dyn Notifier>,
    /// What becomes of a read that fails.
    pub rerror: OnReadError,
    /// What becomes of any other request that fails.
    pub werror: OnWriteError,
    /// The configuration space's writeback field, which may change at any time.
    pub writeback: Arc<AtomicBool>,
    /// The limits that requests wait for.
    pub throttle: Throttle,
    /// What polling is timed by, and limits.
    pub clock: Clock,
}

/// Why no more requests were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// There are none. The driver does not kick.
    Empty,
    /// The disk has as many as it is to have, or some wait for the next
    /// start. The driver does not kick.
    Full,
    /// The next one has to wait so long. The driver does not kick.
    Limited(Duration),
    /// It was enough for one turn.
    More,
}

/// What a request is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Read,
    Write,
    Flush,
    Discard,
    Zeroes,
    /// The flush that makes a write durable.
    Sync,
}

impl Job {
    fn kind(self) -> Kind {
        match self {
            Self::Read => Kind::Read,
            Self::Write => Kind::Write,
            Self::Flush | Self::Sync => Kind::Flush,
            Self::Discard => Kind::Discard,
            Self::Zeroes => Kind::Zeroes,
        }
    }
}

/// A request at the disk. Slots are used again, with their lists' memory.
struct Slot {
    head: u16,
    status_at: GuestAddress,
    job: Job,
    /// Where on the disk, in bytes, the operation under way is.
    offset: u64,
    /// Its place among all requests that were taken.
    order: u64,
    /// What it is counted as, and how many bytes it moves.
    kind: Kind,
    bytes: u64,
    /// When the worker took it; `None` when the slot is free.
    begun: Option<Instant>,
    /// The memory it was parsed in; `None` when the slot is free.
    view: Option<Arc<GuestMap>>,
    /// Where the data of a read goes.
    data: Vec<Extent>,
    /// What is left of a discard or write-zeroes, last first.
    ranges: Vec<Range>,
}

/// Serves one queue.
pub struct Worker {
    service: Service,
    tally: Arc<QueueTally>,
    /// The time, if it has been asked for since requests were last taken or waited for.
    now: Option<Instant>,
    ring: Ring,
    io: Box<dyn IoQueue>,
    wake: Wake,
    depth: usize,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// How many requests have been taken.
    taken: u64,
    /// Requests that failed and wait for the next start, by their place among
    /// all and their heads. No head is there twice.
    parked: Vec<(u64, u16)>,
    chain: Chain,
    ranges: Vec<Range>,
    pieces: Vec<IoVec>,
    completed: Vec<Completed>,
    /// For waits with nothing at the disk, for the driver alone.
    idle: Window,
    /// For waits with requests at the disk.
    busy: Window,
    log: LogLimit,
}

impl Worker {
    /// Opens the worker's path to the disk.
    ///
    /// # Errors
    ///
    /// [`ActivateError`] when the host lacks resources.
    pub fn new(
        service: Service,
        tally: Arc<QueueTally>,
        ring: Ring,
        wake: &Wake,
    ) -> Result<Self, ActivateError> {
        let failed = |error: &dyn std::fmt::Display| ActivateError {
            what: "a disk queue",
            reason: error.to_string(),
        };
        let depth = ring.size().min(MAX_DEPTH);
        let mut io = service.disk.queue(depth.into()).map_err(|e| failed(&e))?;
        io.watch(ring.doorbell(), DOORBELL)
            .and_then(|()| io.watch(wake.fd(), WAKE))
            .map_err(|e| failed(&e))?;
        Ok(Self {
            service,
            tally,
            now: None,
            ring,
            io,
            wake: wake.clone(),
            depth: depth.into(),
            slots: Vec::new(),
            free: Vec::new(),
            taken: 0,
            parked: Vec::new(),
            chain: Chain::default(),
            ranges: Vec::new(),
            pieces: Vec::new(),
            completed: Vec::new(),
            idle: Window::new(),
            busy: Window::new(),
            log: LogLimit::new(),
        })
    }

    /// Takes new requests: at most one ring full, and no more than the disk
    /// is to have at once.
    fn serve(&mut self, view: &Arc<GuestMap>) -> Result<Served, RingError> {
        self.ring.quiet(view)?;
        if !self.parked.is_empty() {
            return Ok(Served::Full);
        }
        for _ in 0..self.ring.size() {
            if self.in_flight() >= self.depth {
                return Ok(Served::Full);
            }
            if !self.ring.next(view, &mut self.chain)? {
                return Ok(Served::Empty);
            }
            if let Some(wait) = self.begin(view)? {
                return Ok(Served::Limited(wait));
            }
        }
        Ok(Served::More)
    }

    /// Submits, and waits until there is something to do: looks for a while,
    /// then sleeps. What the ring has to say of errors it says again to the next turn.
    fn rest(&mut self, view: &GuestMap, served: Served) -> io::Result<()> {
        if let Served::Limited(wait) = served {
            return self.io.wait(Some(wait), &mut self.completed);
        }
        let listens = served == Served::Empty;
        let begin = (self.service.clock)();
        let span = self.window().span();
        while !span.is_zero() {
            self.io.wait(Some(Duration::ZERO), &mut self.completed)?;
            let found =
                !self.completed.is_empty() || listens && self.ring.pending(view).unwrap_or(true);
            let passed = self.passed_since(begin);
            if found {
                self.window().found(passed);
                return Ok(());
            }
            if passed >= span {
                break;
            }
            std::hint::spin_loop();
        }
        if listens && self.ring.invite(view).unwrap_or(true) {
            return self.io.wait(Some(Duration::ZERO), &mut self.completed);
        }
        self.io.wait(None, &mut self.completed)?;
        let passed = self.passed_since(begin);
        self.window().slept(passed);
        Ok(())
    }

    /// Looks at the clock.
    fn passed_since(&mut self, begin: Instant) -> Duration {
        let now = (self.service.clock)();
        self.now = Some(now);
        now.saturating_duration_since(begin)
    }

    /// The requests that are at the disk and those that the driver makes have their own times.
    fn window(&mut self) -> &mut Window {
        if self.in_flight() > 0 {
            &mut self.busy
        } else {
            &mut self.idle
        }
    }

    /// Begins what the chain asks for, or answers it at once. A request that
    /// is over a limit goes back to the front of the queue, and is read anew
    /// when it has waited; how long that is, is returned.
    fn begin(&mut self, view: &Arc<GuestMap>) -> Result<Option<Duration>, RingError> {
        let head = self.chain.head;
        let limits = &self.service.limits;
        let parsed = parse(view, &mut self.chain, limits, &mut self.ranges);
        let Some(Parsed { status_at, ask }) = parsed else {
            return self.ring.complete(view, head, 0).map(|()| None);
        };
        match ask.and_then(|ask| self.first_step(view, ask)) {
            Ok(Step::Disk(job, op, offset, buffers)) => {
                let Service {
                    throttle, clock, ..
                } = &self.service;
                if let Err(wait) = throttle.take(buffers.len(), clock) {
                    self.ring.put_back(iter::once(head));
                    return Ok(Some(wait));
                }
                let token = self.occupy(view, status_at, job, buffers.len());
                self.push(token, op, offset, buffers);
                Ok(None)
            }
            Ok(Step::Answer(written)) => {
                let written = put_status(view, status_at, Status::Ok, written);
                self.ring.complete(view, head, written).map(|()| None)
            }
            Err(status) => {
                self.tally.failed();
                let written = put_status(view, status_at, status, 0);
                self.ring.complete(view, head, written).map(|()| None)
            }
        }
    }

    /// What there is to do first for the chain that was just parsed.
    fn first_step(&mut self, view: &Arc<GuestMap>, ask: Ask) -> Result<Step, Status> {
        let (job, op, offset, data) = match ask {
            Ask::Answered(written) => return Ok(Step::Answer(written)),
            Ask::Read(offset) => (Job::Read, Op::Read, offset, &self.chain.writable),
            Ask::Write(offset) => (Job::Write, Op::Write, offset, &self.chain.readable),
            Ask::Flush => return Ok(Step::Disk(Job::Flush, Op::Flush, 0, Buffers::none())),
            Ask::Discard | Ask::Zeroes => {
                let discard = ask == Ask::Discard;
                let job = if discard { Job::Discard } else { Job::Zeroes };
                self.ranges.reverse();
                let first = self.ranges.pop();
                return Ok(first.map_or(Step::Answer(0), |range| {
                    Step::Disk(job, range_op(job, range), range.offset, Buffers::none())
                }));
            }
        };
        if data.is_empty() {
            return Ok(Step::Answer(0));
        }
        let buffers = buffers(view, data, &mut self.pieces).ok_or(Status::IoErr)?;
        Ok(Step::Disk(job, op, offset, buffers))
    }

    /// Puts the chain that was just parsed into a slot.
    fn occupy(
        &mut self,
        view: &Arc<GuestMap>,
        status_at: GuestAddress,
        job: Job,
        bytes: u64,
    ) -> usize {
        let now = *self.now.get_or_insert_with(|| (self.service.clock)());
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        if let Some(slot) = self.slots.get_mut(index) {
            slot.head = self.chain.head;
            slot.status_at = status_at;
            slot.job = job;
            slot.order = self.taken;
            slot.kind = job.kind();
            slot.bytes = bytes;
            slot.begun = Some(now);
            slot.view = Some(Arc::clone(view));
            std::mem::swap(&mut slot.ranges, &mut self.ranges);
            if job == Job::Read {
                std::mem::swap(&mut slot.data, &mut self.chain.writable);
            }
        }
        self.taken = self.taken.wrapping_add(1);
        index
    }

    fn push(&mut self, slot: usize, op: Op, offset: u64, buffers: Buffers) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.offset = offset;
        }
        self.io.push(Request {
            token: slot as Token,
            op,
            offset,
            buffers,
        });
    }

    /// Goes on with a request of which one operation has ended.
    fn advance(
        &mut self,
        view: &GuestMap,
        token: Token,
        result: io::Result<()>,
    ) -> Result<(), RingError> {
        let index = usize::try_from(token).unwrap_or(usize::MAX);
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let Some(slot_view) = slot.view.clone() else {
            return Ok(());
        };
        let (job, offset) = (slot.job, slot.offset);
        if job == Job::Read {
            // A read that failed may have written some of its data.
            mark_dirty(&slot_view, &slot.data);
        }
        if let Err(error) = result {
            match self.judge(job, offset, &error) {
                ErrorAction::Stop => {
                    self.park(index);
                    return Ok(());
                }
                ErrorAction::Report => {
                    return self.end(view, index, &slot_view, failure(&error), 0);
                }
                // As if it had been done: the rest of the request follows.
                ErrorAction::Ignore => {}
            }
        }
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        if let Some(range) = slot.ranges.pop() {
            self.push(index, range_op(job, range), range.offset, Buffers::none());
            return Ok(());
        }
        if matches!(job, Job::Write | Job::Zeroes) && self.service.must_sync() {
            slot.job = Job::Sync;
            self.push(index, Op::Flush, 0, Buffers::none());
            return Ok(());
        }
        let written = u32::try_from(total(&slot.data)).unwrap_or(0);
        self.end(view, index, &slot_view, Status::Ok, written)
    }

    /// Tells the driver how a request ended, and frees its slot.
    fn end(
        &mut self,
        view: &GuestMap,
        index: usize,
        slot_view: &GuestMap,
        status: Status,
        written: u32,
    ) -> Result<(), RingError> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        let head = slot.head;
        match (status, slot.begun) {
            (Status::Ok, Some(begun)) => {
                let now = *self.now.get_or_insert_with(|| (self.service.clock)());
                let time = now.saturating_duration_since(begun);
                self.tally.done(slot.kind, slot.bytes, time);
            }
            _ => self.tally.failed(),
        }
        let written = put_status(slot_view, slot.status_at, status, written);
        slot.release();
        self.free.push(index);
        self.ring.complete(view, head, written)
    }

    /// Puts a request aside until the device is started again. The driver hears nothing.
    fn park(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            // A driver that offered a head twice is answered once.
            if !self.parked.iter().any(|(_, head)| *head == slot.head) {
                self.parked.push((slot.order, slot.head));
            }
            slot.release();
            self.free.push(index);
        }
    }

    /// What becomes of an operation that failed; tells those who watch. The
    /// first request that waits asks for the machine to be stopped, whatever
    /// has been told before.
    fn judge(&self, job: Job, offset: u64, error: &io::Error) -> ErrorAction {
        let action = if self.ring.failed() {
            // The driver has to reset the device: no request of it is done again.
            ErrorAction::Report
        } else {
            self.service.action(job, error)
        };
        let allowed = self.log.allow();
        if allowed.is_some() || action == ErrorAction::Stop && self.parked.is_empty() {
            self.service.tell(job, offset, error, action);
        }
        if let Some(suppressed) = allowed {
            tracing::warn!(
                device = %self.service.id,
                request = ?job,
                %error,
                ?action,
                suppressed,
                "a disk request failed",
            );
        }
        action
    }

    /// Does what the disk and the descriptors have reported.
    fn collect(&mut self, view: &GuestMap) -> Result<(), RingError> {
        let mut completed = std::mem::take(&mut self.completed);
        let mut outcome = Ok(());
        for event in completed.drain(..) {
            match event {
                Completed::Watch(DOORBELL) => self.ring.silence(),
                Completed::Watch(_) => self.wake.reset(),
                Completed::Request { token, result, .. } => {
                    outcome = outcome.and(self.advance(view, token, result));
                }
            }
        }
        self.completed = completed;
        outcome.and_then(|()| self.ring.notify(view))
    }
}

/// The first thing to do for a request.
enum Step {
    /// An operation at the disk.
    Disk(Job, Op, u64, Buffers),
    /// Success, with this many bytes of data given to the driver.
    Answer(u32),
}

impl Service {
    /// What becomes of a request that has failed.
    fn action(&self, job: Job, error: &io::Error) -> ErrorAction {
        // What the disk cannot do, or not there, it can do at no other time.
        if matches!(
            error.kind(),
            io::ErrorKind::Unsupported
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::ReadOnlyFilesystem
        ) {
            return ErrorAction::Report;
        }
        if job == Job::Read {
            return match self.rerror {
                OnReadError::Report => ErrorAction::Report,
                OnReadError::Ignore => ErrorAction::Ignore,
                OnReadError::Stop => ErrorAction::Stop,
            };
        }
        match self.werror {
            OnWriteError::Enospc if no_space(error) => ErrorAction::Stop,
            OnWriteError::Enospc | OnWriteError::Report => ErrorAction::Report,
            OnWriteError::Ignore => ErrorAction::Ignore,
            OnWriteError::Stop => ErrorAction::Stop,
        }
    }

    fn tell(&self, job: Job, offset: u64, error: &io::Error, action: ErrorAction) {
        let everywhere = matches!(job, Job::Flush | Job::Sync);
        self.notifier.disk_report(&DiskReport::Error {
            offset: (!everywhere).then_some(offset),
            operation: match job {
                Job::Read => "read",
                Job::Write => "write",
                Job::Flush | Job::Sync => "flush",
                Job::Discard => "discard",
                Job::Zeroes => "write-zeroes",
            },
            reason: error.to_string(),
            no_space: no_space(error),
            action,
        });
    }

    /// Whether a write that has ended must be made durable before the driver
    /// learns of it (Virtio 1.2, 5.2.6.2). Asked when the write has ended: a
    /// driver that wants it has kept writeback at 0 all the while.
    fn must_sync(&self) -> bool {
        !self.write_through && (!self.flushes || !self.writeback.load(Ordering::Acquire))
    }
}

impl Slot {
    fn release(&mut self) {
        self.view = None;
        self.begun = None;
        self.data.clear();
        self.ranges.clear();
    }
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            head: 0,
            status_at: GuestAddress(0),
            job: Job::Flush,
            offset: 0,
            order: 0,
            kind: Kind::Flush,
            bytes: 0,
            begun: None,
            view: None,
            data: Vec::new(),
            ranges: Vec::new(),
        }
    }
}

fn range_op(job: Job, range: Range) -> Op {
    let Range { len, unmap, .. } = range;
    match job {
        Job::Discard => Op::Discard { len },
        _ => Op::WriteZeroes {
            len,
            may_unmap: unmap,
        },
    }
}

/// Whether the host has no space left, or no more for this user.
fn no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn failure(error: &io::Error) -> Status {
    match error.kind() {
        io::ErrorKind::Unsupported => Status::Unsupported,
        _ => Status::IoErr,
    }
}

/// Writes the status and returns how many bytes the driver has been given.
fn put_status(view: &GuestMap, at: GuestAddress, status: Status, written: u32) -> u32 {
    match view.write_obj(status.byte(), at) {
        Ok(()) => written.saturating_add(1),
        Err(_) => written,
    }
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        self.now = None;
        let waited = if serve && !self.ring.failed() {
            let view = self.service.memory.memory().into_inner();
            let served = self.serve(&view);
            // What ends ends after the wait.
            self.now = None;
            match served.and_then(|served| self.ring.notify(&view).map(|()| served)) {
                Ok(Served::More) => self.io.wait(Some(Duration::ZERO), &mut self.completed),
                Ok(served) => self.rest(&view, served),
                Err(error) => {
                    self.ring.fail(&error);
                    self.io.wait(None, &mut self.completed)
                }
            }
        } else {
            self.io.wait(None, &mut self.completed)
        };
        if let Err(error) = waited {
            tracing::error!(device = %self.service.id, %error, "the disk's I/O engine is broken");
            self.ring.fail(&error);
            return Turn::Halt;
        }
        let view = self.service.memory.memory();
        if let Err(error) = self.collect(&view) {
            self.ring.fail(&error);
        }
        Turn::Again
    }

    fn resume(&mut self) {
        self.parked.sort_unstable();
        self.ring
            .put_back(self.parked.drain(..).map(|(_, head)| head));
    }

    fn in_flight(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    fn finish(self) -> Vec<StoppedQueue> {
        let Self {
            service,
            mut ring,
            io,
            slots,
            mut parked,
            ..
        } = self;
        // Until here the host may still write what was to be read.
        drop(io);
        parked.extend(slots.iter().filter_map(|slot| {
            let view = slot.view.as_ref()?;
            mark_dirty(view, &slot.data);
            Some((slot.order, slot.head))
        }));
        parked.sort_unstable();
        // A broken driver may have offered a head twice.
        let mut seen = BTreeSet::new();
        let heads = parked.into_iter().map(|(_, head)| head);
        // Whoever goes on with the queue may wait for a kick first.
        if !ring.failed() {
            let _ = ring.invite(&service.memory.memory());
        }
        vec![ring.stop(heads.filter(|head| seen.insert(*head)))]
    }
}
