//! A queue of a qcow2 disk.
//!
//! Requests whose clusters are mapped become jobs on the host files at once: one job with
//! the request's own buffers where its bytes lie together, else one on a slice for each piece. Nothing is
//! copied, locked or allocated for that.
//!
//! A write to clusters that are not mapped yet takes part in the image's mapping by a plan: it gets clusters,
//! moves its data there, and enters them into the mapping when the last job has ended. A write
//! that meets clusters of another's plan parks until that has ended. Everything that would have to wait, for a
//! table, for copies or for decompression, goes to the image's threads.
//!
//! While a queue has jobs on host offsets that it looked up, it keeps an epoch pinned, so that no
//! cluster is used anew under them.
//!
//! A write parks until the other's plan has been published, and a plan is published when its queue is waited
//! on. So whoever drives several queues with one thread must not wait for one of them without a limit.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::disk::Core;
use super::image::ChainPins;
use super::map::{Cursor, Piece};
use super::slow::{Reply, Slow};
use super::write::{Plan, Refusal};
use crate::buffers::Buffers;
use crate::crew::Mailbox;
use crate::disk::{Completed, IoQueue, Op, Request, Token, Watch};
use crate::engine::{FileId, Job, Until};
use crate::jobs::JobQueue;

/// The longest write that is planned here, in bytes; longer ones are written a part at a time by a thread.
const MAX_PLAN: u64 = 2 << 20;

/// A queue of a qcow2 disk.
#[derive(Debug)]
pub(crate) struct Qcow2Queue {
    core: Arc<Core>,
    jobs: JobQueue,
    /// Some file demands alignment.
    strict: bool,
    cursor: Cursor,
    pins: ChainPins,
    /// Requests that have jobs or are with a thread; a job's tag is its request's index.
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// How many of them are with a thread.
    slow: usize,
    /// Writes that wait for clusters in flight.
    parked: VecDeque<Pending>,
    mail: Arc<Mailbox<Reply>>,
    ready: Vec<Completed>,
    // Kept for their memory; empty between calls.
    pieces: Vec<Piece>,
    ended: Vec<Completed>,
    letters: Vec<Reply>,
}

/// A request that is to be begun.
#[derive(Debug)]
struct Pending {
    token: Token,
    op: Op,
    offset: u64,
    buffers: Buffers,
    /// It was a write of so many zeros.
    zeros: u64,
}

/// A request that has been begun.
#[derive(Debug, Default)]
struct Slot {
    token: Token,
    /// Jobs that have not ended.
    left: usize,
    bytes: u64,
    error: Option<io::Error>,
    /// The epoch that is pinned for it.
    epoch: u64,
    /// What its success enters into the mapping.
    plan: Option<Box<Plan>>,
    zeros: u64,
}

impl Qcow2Queue {
    /// A queue of the disk; `jobs` knows no file yet.
    ///
    /// # Errors
    ///
    /// The host's, when it has no descriptor to give.
    pub(crate) fn new(core: Arc<Core>, mut jobs: JobQueue) -> io::Result<Self> {
        let mail = Arc::new(Mailbox::new()?);
        jobs.watch_bell(mail.bell())?;
        let mut strict = false;
        // In this order, so that a piece's file is the engine's.
        for file in core.image.files() {
            let id = jobs.add_file(file);
            strict |= jobs.abilities(id).align.offset > 1;
        }
        Ok(Self {
            cursor: Cursor::new(&core.image),
            pins: core.image.pins(),
            core,
            jobs,
            strict,
            slots: Vec::new(),
            free: Vec::new(),
            slow: 0,
            parked: VecDeque::new(),
            mail,
            ready: Vec::new(),
            pieces: Vec::new(),
            ended: Vec::new(),
            letters: Vec::new(),
        })
    }

    fn begin(&mut self, pending: Pending) {
        match pending.op {
            Op::Read => self.read(pending),
            Op::Write => self.write(pending),
            Op::Flush if !self.core.image.is_dirty() => {
                // All tables are durable; what was written in place is in the first file.
                let slot = self.occupy(pending.token);
                self.start(slot, 0, Op::Flush, 0, Buffers::none());
            }
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => self.delegate(pending),
        }
    }

    fn read(&mut self, pending: Pending) {
        let len = pending.buffers.len();
        let epoch = self.pins.enter();
        let image = &self.core.image;
        let found = image.map_read(&mut self.cursor, pending.offset, len, &mut self.pieces);
        if found && (!self.strict || self.suits()) {
            self.transfer(pending, epoch, None);
        } else {
            self.pins.leave(epoch);
            self.delegate(pending);
        }
    }

    fn write(&mut self, pending: Pending) {
        let len = pending.buffers.len();
        let (offset, durable) = (pending.offset, self.core.policy.durable);
        if len == 0 {
            return self.end(pending.token, Ok(()), 0);
        }
        let epoch = self.pins.enter();
        let image = &self.core.image;
        if image.map_write(&mut self.cursor, offset, len, &mut self.pieces) {
            // The mapping may be newer than what is on disk of it.
            if !durable || !image.is_dirty() {
                return self.transfer(pending, epoch, None);
            }
        } else if !durable && len <= MAX_PLAN {
            match image.plan_quick(offset, len, self.mail.ringer()) {
                Ok(plan) => {
                    self.pieces.clear();
                    let pieces = plan.pieces.iter();
                    self.pieces.extend(pieces.map(|&(offset, len)| Piece::File {
                        file: 0,
                        offset,
                        len,
                    }));
                    return self.transfer(pending, epoch, Some(Box::new(plan)));
                }
                Err(Refusal::Busy) => {
                    self.pins.leave(epoch);
                    return self.parked.push_back(pending);
                }
                Err(Refusal::Failed(error)) => {
                    self.pins.leave(epoch);
                    self.core.tell_corruption();
                    return self.end(pending.token, Err(error), 0);
                }
                Err(Refusal::Slow | Refusal::Checkpoint) => {}
            }
        }
        self.pins.leave(epoch);
        self.delegate(pending);
    }

    /// Whether the pieces suit the files that they are in.
    fn suits(&self) -> bool {
        self.pieces.iter().all(|piece| match *piece {
            Piece::Zero { .. } => true,
            Piece::File { file, offset, len } => {
                let unit = self.jobs.abilities(FileId(file)).align.offset;
                (offset | len).is_multiple_of(unit.into())
            }
        })
    }

    /// Moves the data of a read or write from or to the pieces that were found.
    fn transfer(&mut self, pending: Pending, epoch: u64, plan: Option<Box<Plan>>) {
        let slot = self.occupy(pending.token);
        if let Some(slot) = self.slots.get_mut(slot) {
            (slot.epoch, slot.plan) = (epoch, plan);
        }
        let Pending { op, buffers, .. } = pending;
        if let [Piece::File { file, offset, .. }] = self.pieces[..] {
            return self.start(slot, file, op, offset, buffers);
        }
        let mut done = 0;
        let pieces = std::mem::take(&mut self.pieces);
        for piece in &pieces {
            match *piece {
                Piece::File { file, offset, len } => {
                    self.start(slot, file, op, offset, buffers.slice(done, len));
                    done += len;
                }
                Piece::Zero { len } => {
                    buffers.fill_zero(done..done + len);
                    done += len;
                    if let Some(slot) = self.slots.get_mut(slot) {
                        slot.bytes += len;
                    }
                }
            }
        }
        self.pieces = pieces;
        if self.slots.get(slot).is_some_and(|slot| slot.left == 0) {
            self.complete(slot);
        }
    }

    /// Starts a job for the request in `slot`.
    fn start(&mut self, slot: usize, file: usize, op: Op, offset: u64, buffers: Buffers) {
        if op == Op::Write {
            self.core
                .events
                .writes_to(offset.saturating_add(buffers.len()));
        }
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.left += 1;
        }
        let durable = self.core.policy.durable;
        let job = Job::new(slot as u64, FileId(file), op, offset, buffers, durable);
        self.jobs.push(job.endless());
    }

    /// Gives a request to a thread.
    fn delegate(&mut self, pending: Pending) {
        let slot = self.occupy(pending.token);
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.zeros = pending.zeros;
            slot.left = 1;
        }
        self.slow += 1;
        self.core.slow.start([Slow {
            image: Arc::clone(&self.core.image),
            events: Arc::clone(&self.core.events),
            op: pending.op,
            offset: pending.offset,
            buffers: pending.buffers,
            durable: self.core.policy.durable,
            slot,
            reply: Arc::clone(&self.mail),
        }]);
    }

    /// A place for a request that is begun.
    fn occupy(&mut self, token: Token) -> usize {
        let fresh = Slot {
            token,
            epoch: ChainPins::NONE,
            ..Slot::default()
        };
        let index = self.free.pop().unwrap_or(self.slots.len());
        match self.slots.get_mut(index) {
            Some(slot) => *slot = fresh,
            None => self.slots.push(fresh),
        }
        index
    }

    fn end(&mut self, token: Token, result: io::Result<()>, bytes: u64) {
        self.ready.push(Completed::Request {
            token,
            result,
            bytes,
        });
    }

    /// The last part of a request has ended.
    fn complete(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let (token, bytes, epoch) = (slot.token, slot.bytes, slot.epoch);
        let result = slot.error.take().map_or(Ok(()), Err);
        let plan = slot.plan.take();
        self.free.push(index);
        if let Some(plan) = plan {
            match &result {
                Ok(()) => self.core.image.publish(*plan),
                Err(_) => self.core.image.abandon(*plan),
            }
        }
        if epoch != ChainPins::NONE {
            self.pins.leave(epoch);
        }
        if result.is_err() {
            self.core.tell_corruption();
        }
        self.end(token, result, bytes);
    }

    /// Takes note of the ends of jobs; watches are passed on. Whether clusters were released.
    fn take_ended(&mut self, out: &mut Vec<Completed>) -> bool {
        let mut released = false;
        let mut ended = std::mem::take(&mut self.ended);
        for completed in ended.drain(..) {
            let Completed::Request {
                token,
                result,
                bytes,
            } = completed
            else {
                out.push(completed);
                continue;
            };
            let index = usize::try_from(token).unwrap_or(usize::MAX);
            let Some(slot) = self.slots.get_mut(index) else {
                continue;
            };
            slot.left = slot.left.saturating_sub(1);
            slot.bytes += bytes;
            if let Err(error) = result {
                slot.error.get_or_insert(error);
            }
            if slot.left == 0 {
                released |= slot.plan.is_some();
                self.complete(index);
            }
        }
        self.ended = ended;
        released
    }

    /// Takes the threads' answers.
    fn take_mail(&mut self) {
        let mut letters = std::mem::take(&mut self.letters);
        self.mail.take(&mut letters);
        for reply in letters.drain(..) {
            self.slow = self.slow.saturating_sub(1);
            if let Some(slot) = self.slots.get_mut(reply.slot) {
                slot.bytes = match &reply.result {
                    Ok(()) => reply.bytes.max(slot.zeros),
                    Err(_) => reply.bytes,
                };
                slot.error = reply.result.err();
                self.complete(reply.slot);
            }
        }
        self.letters = letters;
    }

    /// Begins again what waits for clusters; what still has to, parks again.
    fn unpark(&mut self) {
        for _ in 0..self.parked.len() {
            if let Some(pending) = self.parked.pop_front() {
                self.begin(pending);
            }
        }
        self.jobs.submit();
    }

    /// Waits for jobs and answers, and deals with them.
    fn turn(&mut self, until: Until, out: &mut Vec<Completed>) -> io::Result<()> {
        let rung = self.jobs.wait(until, &mut self.ended)?;
        let released = self.take_ended(out);
        if rung {
            self.take_mail();
        }
        if (rung || released) && !self.parked.is_empty() {
            self.unpark();
        }
        out.append(&mut self.ready);
        Ok(())
    }
}

impl IoQueue for Qcow2Queue {
    fn push(&mut self, request: Request) {
        let (size, unit) = (self.core.size(), self.core.unit);
        match self.core.policy.admit(&request, size, unit) {
            Ok(Some(work)) => self.begin(Pending {
                token: request.token,
                op: work.op,
                offset: request.offset,
                buffers: request.buffers,
                zeros: work.zeros,
            }),
            Ok(None) => self.end(request.token, Ok(()), 0),
            Err(error) => self.end(request.token, Err(error), 0),
        }
    }

    fn submit(&mut self) {
        self.jobs.submit();
    }

    fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        self.jobs.watch(fd, watch)
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Completed>) -> io::Result<()> {
        let limit = Until::new(timeout);
        let before = out.len();
        out.append(&mut self.ready);
        loop {
            let until = if out.len() > before {
                Until::Now
            } else {
                limit
            };
            self.turn(until, out)?;
            if out.len() > before || limit.left() == Some(Duration::ZERO) {
                return Ok(());
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len() + self.parked.len() + self.ready.len()
    }
}

impl Drop for Qcow2Queue {
    /// Waits for all that is at the host or with a thread, so that no plan stays open.
    fn drop(&mut self) {
        self.parked.clear();
        let mut out = Vec::new();
        while self.jobs.in_flight() > 0 || self.slow > 0 {
            if self.turn(Until::Forever, &mut out).is_err() {
                // What the host may still write to stays in flight, and is never used for anything else.
                return;
            }
            out.clear();
        }
    }
}

#[cfg(test)]
mod tests;
