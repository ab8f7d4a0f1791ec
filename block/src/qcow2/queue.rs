//! A queue of a qcow2 disk.
//!
//! Requests whose clusters are mapped become jobs on the host files at once: one job with
//! the request's own buffers where its bytes lie together, else one on a slice for each piece. Nothing is
//! copied, locked or allocated for that.
//!
//! A write to clusters that are not mapped yet takes part in the image's mapping by a plan: it gets clusters,
//! moves its data there, and enters them into the mapping when the last job has ended. A write
//! that meets clusters of another's plan parks until that has ended. Everything that would have to wait, for
//! copies or for decompression, goes to the image's threads. For what lacks a table they only load
//! that, and the queue begins it again.
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
use super::map::{Cursor, Miss, Piece};
use super::slow::{Reply, Slow};
use super::write::{Plan, Refusal};
use crate::buffers::Buffers;
use crate::crew::Mailbox;
use crate::disk::{Completed, IoQueue, Op, Request, Token, Watch};
use crate::engine::{FileId, Job, Until};
use crate::jobs::{End, JobQueue};

/// The longest write that is planned here, in bytes; longer ones are written a part at a time by a thread.
const MAX_PLAN: u64 = 2 << 20;

/// The note of a job that is a part of the request in the slot that its tag names. Other notes are the
/// epoch that is pinned for the one job of the request whose token the tag is.
const PART: u64 = u64::MAX;

/// A queue of a qcow2 disk.
#[derive(Debug)]
pub(crate) struct Qcow2Queue {
    jobs: JobQueue,
    book: Book,
    /// Some file demands alignment.
    strict: bool,
    cursor: Cursor,
    /// Writes that wait for clusters in flight, and whatever waits for tables.
    parked: VecDeque<Pending>,
    mail: Arc<Mailbox<Reply>>,
    // Kept for their memory; empty between calls.
    pieces: Vec<Piece>,
    letters: Vec<Reply>,
}

/// What is on its way.
#[derive(Debug)]
struct Book {
    pins: ChainPins,
    core: Arc<Core>,
    /// How many requests are one job, and in no slot.
    single: usize,
    /// Other requests that have jobs or are with a thread.
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// How many of them are with a thread.
    slow: usize,
    /// Which parts of the disk tables are being loaded for.
    loading: Vec<u64>,
    /// Clusters in flight have been released since somebody last looked.
    released: bool,
    ready: Vec<Completed>,
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
    /// The tables that it needs have been loaded for it.
    loaded: bool,
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
    epoch: Option<u64>,
    /// What its success enters into the mapping.
    plan: Option<Box<Plan>>,
    zeros: u64,
    /// What is begun again with the answer: the thread has only loaded tables for it.
    again: Option<Box<Pending>>,
}

impl Book {
    /// A place for a request that is begun.
    fn occupy(&mut self, slot: Slot) -> usize {
        let index = self.free.pop().unwrap_or(self.slots.len());
        match self.slots.get_mut(index) {
            Some(place) => *place = slot,
            None => self.slots.push(slot),
        }
        index
    }

    /// Reports an end when the queue is next waited on.
    fn end(&mut self, token: Token, result: io::Result<()>, bytes: u64) {
        self.ready.push(Completed::Request {
            token,
            result,
            bytes,
        });
    }

    /// A job has ended.
    fn ended(&mut self, end: End, out: &mut Vec<Completed>) {
        if end.note != PART {
            self.single = self.single.saturating_sub(1);
            self.pins.leave(end.note);
            return out.push(end.into());
        }
        let index = usize::try_from(end.tag).unwrap_or(usize::MAX);
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        slot.left = slot.left.saturating_sub(1);
        slot.bytes += end.bytes;
        if let Err(error) = end.result {
            slot.error.get_or_insert(error);
        }
        if slot.left == 0 {
            self.complete(index, out);
        }
    }

    /// A thread has ended its work. The result is to be begun again.
    fn answered(&mut self, reply: Reply, out: &mut Vec<Completed>) -> Option<Pending> {
        self.slow = self.slow.saturating_sub(1);
        let slot = self.slots.get_mut(reply.slot)?;
        if let Some(pending) = slot.again.take() {
            // If that has failed, so does the request itself.
            self.free.push(reply.slot);
            let part = self.core.image.loaded_with(pending.offset);
            self.loading.retain(|other| *other != part);
            return Some(*pending);
        }
        slot.bytes = match &reply.result {
            Ok(()) => reply.bytes.max(slot.zeros),
            Err(_) => reply.bytes,
        };
        slot.error = reply.result.err();
        self.complete(reply.slot, out);
        None
    }

    /// The last part of a request has ended.
    fn complete(&mut self, index: usize, out: &mut Vec<Completed>) {
        let Some(slot) = self.slots.get_mut(index) else {
            return;
        };
        let slot = std::mem::take(slot);
        self.free.push(index);
        let result = slot.error.map_or(Ok(()), Err);
        if let Some(plan) = slot.plan {
            match &result {
                Ok(()) => self.core.image.publish(*plan),
                Err(_) => self.core.image.abandon(*plan),
            }
            self.released = true;
        }
        if let Some(epoch) = slot.epoch {
            self.pins.leave(epoch);
        }
        if result.is_err() {
            self.core.tell_corruption();
        }
        out.push(Completed::Request {
            token: slot.token,
            result,
            bytes: slot.bytes,
        });
    }
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
            jobs,
            strict,
            parked: VecDeque::new(),
            mail,
            pieces: Vec::new(),
            letters: Vec::new(),
            book: Book {
                pins: core.image.pins(),
                core,
                single: 0,
                slots: Vec::new(),
                free: Vec::new(),
                slow: 0,
                loading: Vec::new(),
                released: false,
                ready: Vec::new(),
            },
        })
    }

    fn begin(&mut self, pending: Pending) {
        match pending.op {
            Op::Read => self.read(pending),
            Op::Write => self.write(pending),
            Op::Flush if !self.book.core.image.is_dirty() => {
                // All tables are durable; what was written in place is in the first file.
                let slot = self.book.occupy(Slot {
                    token: pending.token,
                    left: 1,
                    ..Slot::default()
                });
                let flush = self.job(slot as u64, 0, Op::Flush, 0, Buffers::none());
                self.jobs.push(flush.noted(PART));
            }
            Op::Flush | Op::Discard { .. } | Op::WriteZeroes { .. } => self.delegate(pending),
        }
    }

    fn read(&mut self, pending: Pending) {
        let len = pending.buffers.len();
        let epoch = self.book.pins.enter();
        let image = &self.book.core.image;
        let found = image.map_read(&mut self.cursor, pending.offset, len, &mut self.pieces);
        if found.is_ok() && (!self.strict || self.suits()) {
            return self.transfer(pending, epoch, None);
        }
        self.book.pins.leave(epoch);
        if found == Err(Miss::Unloaded) && !pending.loaded {
            self.load(pending);
        } else {
            self.delegate(pending);
        }
    }

    fn write(&mut self, pending: Pending) {
        let len = pending.buffers.len();
        let core = &self.book.core;
        let (offset, durable) = (pending.offset, core.policy.durable);
        let epoch = self.book.pins.enter();
        let found = core
            .image
            .map_write(&mut self.cursor, offset, len, &mut self.pieces);
        if found == Err(Miss::Unloaded) && !pending.loaded {
            self.book.pins.leave(epoch);
            return self.load(pending);
        }
        if found.is_ok() {
            // The mapping may be newer than what is on disk of it.
            if !durable || !core.image.is_dirty() {
                return self.transfer(pending, epoch, None);
            }
        } else if !durable && len <= MAX_PLAN {
            match core.image.plan_quick(offset, len, self.mail.ringer()) {
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
                    self.book.pins.leave(epoch);
                    return self.parked.push_back(pending);
                }
                Err(Refusal::Failed(error)) => {
                    core.tell_corruption();
                    self.book.pins.leave(epoch);
                    return self.book.end(pending.token, Err(error), 0);
                }
                Err(Refusal::Slow | Refusal::Checkpoint) => {}
            }
        }
        self.book.pins.leave(epoch);
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
        let Pending {
            token, op, buffers, ..
        } = pending;
        if let ([Piece::File { file, offset, .. }], None) = (&self.pieces[..], &plan) {
            let job = self.job(token, *file, op, *offset, buffers);
            self.book.single += 1;
            return self.jobs.push(job.noted(epoch));
        }
        let slot = self.book.occupy(Slot {
            token,
            epoch: Some(epoch),
            plan,
            ..Slot::default()
        });
        let (mut done, mut left, mut zeros) = (0, 0, 0);
        let pieces = std::mem::take(&mut self.pieces);
        for piece in &pieces {
            match *piece {
                Piece::File { file, offset, len } => {
                    let part = buffers.slice(done, len);
                    let job = self.job(slot as u64, file, op, offset, part);
                    self.jobs.push(job.noted(PART));
                    left += 1;
                    done += len;
                }
                Piece::Zero { len } => {
                    buffers.fill_zero(done..done + len);
                    zeros += len;
                    done += len;
                }
            }
        }
        self.pieces = pieces;
        // No end is looked at before the next wait, so that this comes in time.
        if let Some(slot) = self.book.slots.get_mut(slot) {
            (slot.left, slot.bytes) = (left, zeros);
        }
        if left == 0 {
            let mut ready = std::mem::take(&mut self.book.ready);
            self.book.complete(slot, &mut ready);
            self.book.ready = ready;
        }
    }

    /// A job on one of the files.
    fn job(&self, tag: u64, file: usize, op: Op, offset: u64, buffers: Buffers) -> Job {
        let core = &self.book.core;
        if op == Op::Write {
            core.events.writes_to(offset.saturating_add(buffers.len()));
        }
        Job::new(tag, FileId(file), op, offset, buffers, core.policy.durable).endless()
    }

    /// Gives a request to a thread.
    fn delegate(&mut self, pending: Pending) {
        let slot = Slot {
            token: pending.token,
            zeros: pending.zeros,
            ..Slot::default()
        };
        let Pending {
            op,
            offset,
            buffers,
            ..
        } = pending;
        self.hand_over(slot, false, op, offset, buffers);
    }

    /// Has a thread load the tables that a request needs, and then begins that again. What needs tables near those
    /// waits as well: most likely they come together.
    fn load(&mut self, mut pending: Pending) {
        let part = self.book.core.image.loaded_with(pending.offset);
        if self.book.loading.contains(&part) {
            return self.parked.push_back(pending);
        }
        self.book.loading.push(part);
        pending.loaded = true;
        let (op, offset) = (pending.op, pending.offset);
        let buffers = pending.buffers.slice(0, u64::MAX);
        let slot = Slot {
            again: Some(Box::new(pending)),
            ..Slot::default()
        };
        self.hand_over(slot, true, op, offset, buffers);
    }

    /// Gives work to a thread, whose answer goes to `slot`.
    fn hand_over(&mut self, slot: Slot, load: bool, op: Op, offset: u64, buffers: Buffers) {
        let slot = self.book.occupy(slot);
        self.book.slow += 1;
        let core = &self.book.core;
        core.slow.start([Slow {
            image: Arc::clone(&core.image),
            events: Arc::clone(&core.events),
            load,
            op,
            offset,
            buffers,
            durable: core.policy.durable,
            slot,
            reply: Arc::clone(&self.mail),
        }]);
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
        let book = &mut self.book;
        let rung = self
            .jobs
            .wait(until, out, |end, out| book.ended(end, out))?;
        if rung {
            self.mail.take(&mut self.letters);
            for reply in self.letters.drain(..) {
                self.parked.extend(book.answered(reply, out));
            }
        }
        let released = std::mem::take(&mut book.released);
        if (rung || released) && !self.parked.is_empty() {
            self.unpark();
        }
        out.append(&mut self.book.ready);
        Ok(())
    }
}

impl IoQueue for Qcow2Queue {
    fn push(&mut self, request: Request) {
        let core = &self.book.core;
        let result = match core.policy.admit(&request, core.size(), core.unit) {
            Ok(Some(work)) if work.op != Op::Write || !request.buffers.is_empty() => {
                return self.begin(Pending {
                    token: request.token,
                    op: work.op,
                    offset: request.offset,
                    buffers: request.buffers,
                    zeros: work.zeros,
                    loaded: false,
                });
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        self.book.end(request.token, result, 0);
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
        out.append(&mut self.book.ready);
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
        let book = &self.book;
        book.single + book.slots.len() - book.free.len() + self.parked.len() + book.ready.len()
    }
}

impl Drop for Qcow2Queue {
    /// Waits for all that is at the host or with a thread, so that no plan stays open.
    fn drop(&mut self) {
        self.parked.clear();
        let mut out = Vec::new();
        while self.jobs.in_flight() > 0 || self.book.slow > 0 {
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
