//! Frames from the network to the guest.
//!
//! Buffers of the driver are taken ahead, as many as the longest frame that may come needs, and the network
//! fills them in place, by one call for each frame. Those that it did not fill
//! are there for the next one. When the device is stopped they go back into the ring, as if nobody had taken them.
//!
//! ```text
//!   posted buffers:  │ b0 │ b1 │ b2 │ … │ bn │ spare room (the device's own)
//!   one call:         ─────frame─────►
//!   to the driver:    b0, b1, with num_buffers = 2, together
//! ```
//!
//! While short frames come ([`Reach`]) a call lends the first buffers and the spare room alone.
//!
//! A frame that is longer than what the driver has posted ends in the spare
//! room. It is held until there are more buffers and the rest is copied. A frame that
//! a limit does not let through yet is held where it is. One that can never fit is dropped.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use net::{HEADER_LEN, IoVec, MAX_PIECES, Port};

use super::pieces::{lend, mark_dirty, read_at, resolve, write_at};
use super::reach::Reach;
use super::spec::{MAX_FRAME, MIN_FRAME, NUM_BUFFERS_OFFSET, TAGGED_LEN};
use super::worker::{Pair, Served};
use crate::limit::Throttle;
use crate::memory::GuestMap;
use crate::ring::{Chain, Extent, Ring, RingError};

/// The most frames in one turn.
const BATCH: usize = 64;

/// Cursors are moved back to the start of their lists when they have come so far.
const COMPACT: usize = 512;

/// The most pieces that a call lends for a short frame, the spare room among them. The host has room for as many without
/// asking its allocator (`UIO_FASTIOV`).
const FEW: usize = 8;

/// A buffer that the driver has posted.
#[derive(Clone, Copy, Debug)]
struct Posted {
    head: u16,
    /// How many extents and pieces of the lists are its own.
    extents: usize,
    pieces: usize,
    bytes: usize,
}

/// A frame in the posted buffers that the driver does not know of yet.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// How long it is with its header.
    len: usize,
    /// How much of it is in posted buffers; the rest is in the spare room.
    placed: usize,
}

/// How frames are given to the driver.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// A frame may be cut into several buffers.
    pub mergeable: bool,
    /// How many bytes of buffers are wanted before a frame is received.
    pub wanted: usize,
}

/// The receiving half of a pair.
pub struct Receiver {
    /// The queue.
    pub ring: Ring,
    shape: Shape,
    throttle: Throttle,
    chain: Chain,
    posted: VecDeque<Posted>,
    /// The sum of their bytes.
    room: usize,
    /// Where the posted buffers are, from the cursors on.
    extents: Vec<Extent>,
    first_extent: usize,
    pieces: Vec<IoVec>,
    first_piece: usize,
    spare: Box<[u8]>,
    /// What frame is expected.
    reach: Reach,
    held: Option<Held>,
    used: Vec<(u16, u32)>,
    /// Nothing but the driver can bring more work: it is to kick before the worker sleeps.
    pub listens: bool,
    /// The network has sent a frame since somebody took this back.
    pub heard: bool,
}

impl Receiver {
    /// Nothing has been received.
    pub fn new(ring: Ring, shape: Shape, throttle: Throttle) -> Self {
        Self {
            ring,
            shape,
            throttle,
            chain: Chain::default(),
            posted: VecDeque::new(),
            room: 0,
            extents: Vec::new(),
            first_extent: 0,
            pieces: Vec::new(),
            first_piece: 0,
            // Zeros that nobody has written take no memory.
            spare: vec![0; MAX_FRAME + 1].into_boxed_slice(),
            reach: Reach::default(),
            held: None,
            used: Vec::new(),
            listens: false,
            heard: false,
        }
    }

    /// Receives some frames.
    ///
    /// # Errors
    ///
    /// [`RingError`]
    pub fn serve(
        &mut self,
        view: &GuestMap,
        pair: &Pair,
        port: &mut dyn Port,
    ) -> Result<Served, RingError> {
        self.ring.quiet(view)?;
        for _ in 0..BATCH {
            let held = match self.held {
                Some(held) => held,
                None => {
                    self.post(view, pair, self.shape.wanted)?;
                    if self.posted.is_empty() {
                        return Ok(Served::Empty);
                    }
                    match self.receive(view, pair, port) {
                        Some(held) => held,
                        None => return Ok(Served::Quiet),
                    }
                }
            };
            self.held = None;
            match self.judge(view, pair, held)? {
                Verdict::Deliver => self.deliver(view, pair, held)?,
                Verdict::Drop => {}
                Verdict::Wait(served) => {
                    self.held = Some(held);
                    return Ok(served);
                }
            }
        }
        Ok(Served::More)
    }

    /// Takes buffers until there are `wanted` bytes, or as many as there can be.
    fn post(&mut self, view: &GuestMap, pair: &Pair, wanted: usize) -> Result<(), RingError> {
        while (self.room < wanted && self.shape.mergeable || self.posted.is_empty())
            && self.live_pieces() < MAX_PIECES / 2
            && self.posted.len() < usize::from(self.ring.size())
        {
            if !self.ring.next(view, &mut self.chain)? {
                break;
            }
            let Chain {
                head,
                readable,
                writable,
                ..
            } = &self.chain;
            let before = self.pieces.len();
            // With the pieces that are there and the spare room it is what one call takes.
            let most = before.saturating_add(MAX_PIECES / 2 - 1);
            let bytes = writable.iter().map(|extent| extent.len as usize).sum();
            if !readable.is_empty()
                || bytes < HEADER_LEN
                || !resolve(view, writable, &mut self.pieces, most)
            {
                pair.tally.rx.failed();
                self.ring.complete(view, *head, 0)?;
                // What is bad is taken one at a time, so that turns stay short.
                break;
            }
            self.extents.extend_from_slice(writable);
            self.room = self.room.saturating_add(bytes);
            self.posted.push_back(Posted {
                head: *head,
                extents: writable.len(),
                pieces: self.pieces.len() - before,
                bytes,
            });
        }
        Ok(())
    }

    fn live_pieces(&self) -> usize {
        self.pieces.len() - self.first_piece
    }

    /// Receives a frame into the posted buffers, if there is one.
    fn receive(&mut self, view: &GuestMap, pair: &Pair, port: &mut dyn Port) -> Option<Held> {
        let spare = IoVec {
            base: self.spare.as_mut_ptr(),
            len: self.spare.len(),
        };
        let mut few = [spare; FEW];
        loop {
            let lent = self.first_pieces(&mut few);
            let (received, room) =
                match lent.and_then(|(count, room)| Some((few.get(..=count)?, room))) {
                    Some((list, room)) => (port.receive(lend(view, list)), room),
                    None => {
                        self.pieces.push(spare);
                        let list = self.pieces.get(self.first_piece..).unwrap_or_default();
                        let received = port.receive(lend(view, list));
                        self.pieces.pop();
                        (received, self.room)
                    }
                };
            match received {
                Ok(0) => {
                    pair.refused(&io::ErrorKind::UnexpectedEof.into());
                    return None;
                }
                Ok(len) => {
                    self.reach.came(len);
                    let placed = len.min(room);
                    mark_dirty(view, self.live_extents(), placed);
                    return Some(Held { len, placed });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        pair.refused(&error);
                    }
                    return None;
                }
            }
        }
    }

    /// Copies those of the pieces to `few` that are to be lent, of which it keeps its last one; how many they are and how many
    /// bytes they have. `None`: all are to be lent.
    fn first_pieces(&self, few: &mut [IoVec; FEW]) -> Option<(usize, usize)> {
        let wanted = self.reach.room()?;
        let pieces = self.pieces.get(self.first_piece..)?;
        let mut room = 0_usize;
        let places = few.iter_mut().take(FEW - 1);
        for (count, (place, piece)) in places.zip(pieces).enumerate() {
            *place = *piece;
            room = room.saturating_add(piece.len);
            if room >= wanted {
                return Some((count + 1, room));
            }
        }
        None
    }

    fn live_extents(&self) -> &[Extent] {
        self.extents.get(self.first_extent..).unwrap_or_default()
    }

    /// What is to be done with a frame.
    fn judge(&mut self, view: &GuestMap, pair: &Pair, held: Held) -> Result<Verdict, RingError> {
        let counts = &pair.tally.rx;
        if !(MIN_FRAME..=MAX_FRAME).contains(&held.len) {
            counts.failed();
            return Ok(Verdict::Drop);
        }
        self.heard = true;
        if !pair.shared.link() || !self.is_wanted(view, pair) {
            counts.dropped();
            return Ok(Verdict::Drop);
        }
        if held.len > self.room {
            self.post(view, pair, held.len)?;
        }
        if held.len > self.room {
            let full = self.posted.len() >= usize::from(self.ring.size())
                || self.live_pieces() >= MAX_PIECES / 2;
            if full || !self.shape.mergeable {
                counts.dropped();
                return Ok(Verdict::Drop);
            }
            return Ok(Verdict::Wait(Served::Empty));
        }
        let frame = (held.len - HEADER_LEN) as u64;
        Ok(match self.throttle.take(frame, &pair.clock) {
            Ok(()) => Verdict::Deliver,
            Err(wait) => Verdict::Wait(Served::Limited(wait)),
        })
    }

    fn is_wanted(&self, view: &GuestMap, pair: &Pair) -> bool {
        if pair.filter.wants_everything() {
            return true;
        }
        let mut start = [0; TAGGED_LEN];
        read_at(view, self.live_extents(), HEADER_LEN, &mut start);
        pair.filter.wants(&start)
    }

    /// Gives a frame that fits to the driver.
    fn deliver(&mut self, view: &GuestMap, pair: &Pair, held: Held) -> Result<(), RingError> {
        let Held { len, placed } = held;
        if let Some(rest) = self.spare.get(..len - placed) {
            write_at(view, self.live_extents(), placed, rest);
        }
        self.used.clear();
        let mut left = len;
        for posted in &self.posted {
            let part = left.min(posted.bytes);
            left -= part;
            // A chain has no more bytes than a u32 counts.
            self.used
                .push((posted.head, u32::try_from(part).unwrap_or(u32::MAX)));
            if left == 0 {
                break;
            }
        }
        let buffers = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        let at = NUM_BUFFERS_OFFSET;
        write_at(view, self.live_extents(), at, &buffers.to_le_bytes());
        let pieces = self.pieces.get(self.first_piece..).unwrap_or_default();
        pair.copy(lend(view, pieces), len);
        for _ in 0..self.used.len() {
            self.forget_first();
        }
        pair.tally.rx.passed(len - HEADER_LEN);
        self.ring.complete_together(view, &self.used)
    }

    fn forget_first(&mut self) {
        if let Some(posted) = self.posted.pop_front() {
            self.room = self.room.saturating_sub(posted.bytes);
            self.first_extent = self.first_extent.saturating_add(posted.extents);
            self.first_piece = self.first_piece.saturating_add(posted.pieces);
        }
        if self.posted.is_empty() || self.first_piece >= COMPACT {
            let extents = self.first_extent.min(self.extents.len());
            let pieces = self.first_piece.min(self.pieces.len());
            self.extents.drain(..extents);
            self.pieces.drain(..pieces);
            self.first_extent = 0;
            self.first_piece = 0;
        }
    }

    /// Gives the posted buffers back to the queue: memory is another, or
    /// the queue is to be handed back. A frame that is held is lost, and counted.
    pub fn unpost(&mut self, view: &GuestMap, pair: &Pair) {
        if self.held.take().is_some() {
            pair.tally.rx.dropped();
        }
        let heads = self.posted.drain(..).map(|posted| posted.head);
        let heads: Vec<u16> = heads.collect();
        self.ring.untake_all(view, &heads);
        self.room = 0;
        self.extents.clear();
        self.pieces.clear();
        self.first_extent = 0;
        self.first_piece = 0;
    }

    /// Delivers a frame that is held, if it can be, whatever the limits say.
    ///
    /// # Errors
    ///
    /// [`RingError`]
    pub fn flush(&mut self, view: &GuestMap, pair: &Pair) -> Result<(), RingError> {
        match self.held.filter(|held| held.len <= self.room) {
            Some(held) => {
                self.held = None;
                self.deliver(view, pair, held)?;
                self.ring.notify(view)
            }
            None => Ok(()),
        }
    }
}

/// What is to be done with a frame.
enum Verdict {
    Deliver,
    Drop,
    /// It is to wait for this.
    Wait(Served),
}

/// The shorter of two waits; `None` does not end by itself.
pub fn sooner(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}
