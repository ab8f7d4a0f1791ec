//! Frames from the guest to the network.
//!
//! A chain is a frame with its header in front, wherever the driver cuts it.
//! It goes to the network from where it lies, by one call. A chain that is no frame is given back and
//! counted, as is a frame that the network refuses.

use std::io;

use net::{HEADER_LEN, IoVec, MAX_PIECES, Port};

use super::pieces::{lend, resolve};
use super::spec::{MAX_FRAME, MIN_FRAME};
use super::worker::{Pair, Served};
use crate::limit::Throttle;
use crate::memory::GuestMap;
use crate::ring::{Chain, Ring, RingError, total};

/// The sending half of a pair.
pub struct Transmitter {
    /// The queue.
    pub ring: Ring,
    throttle: Throttle,
    chain: Chain,
    list: Vec<IoVec>,
    /// The frame that is next has been let go by the limits, and the network had no room.
    paid: bool,
    /// Nothing but the driver can bring more work: it is to kick before the worker sleeps.
    pub listens: bool,
}

impl Transmitter {
    /// Nothing has been sent.
    pub fn new(ring: Ring, throttle: Throttle) -> Self {
        Self {
            ring,
            throttle,
            chain: Chain::default(),
            list: Vec::new(),
            paid: false,
            listens: false,
        }
    }

    /// Sends at most one ring full of frames.
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
        for _ in 0..self.ring.size() {
            if !self.ring.next(view, &mut self.chain)? {
                return Ok(Served::Empty);
            }
            let head = self.chain.head;
            match self.send(view, pair, port) {
                Sent::Done => self.ring.complete(view, head, 0)?,
                Sent::Full => {
                    self.ring.untake(head);
                    return Ok(Served::Full);
                }
                Sent::Limited(wait) => {
                    self.ring.untake(head);
                    return Ok(Served::Limited(wait));
                }
            }
        }
        Ok(Served::More)
    }

    fn send(&mut self, view: &GuestMap, pair: &Pair, port: &mut dyn Port) -> Sent {
        let counts = &pair.tally.tx;
        let len = usize::try_from(total(&self.chain.readable)).unwrap_or(usize::MAX);
        self.list.clear();
        if !self.chain.writable.is_empty()
            || !(MIN_FRAME..=MAX_FRAME).contains(&len)
            || !resolve(view, &self.chain.readable, &mut self.list, MAX_PIECES)
        {
            counts.failed();
            return Sent::Done;
        }
        if !pair.shared.link() {
            counts.dropped();
            return Sent::Done;
        }
        let frame = len - HEADER_LEN;
        if !self.paid
            && let Err(wait) = self.throttle.take(frame as u64, &pair.clock)
        {
            return Sent::Limited(wait);
        }
        self.paid = false;
        match port.send(lend(view, &self.list)) {
            Ok(()) => {
                counts.passed(frame);
                pair.copy(lend(view, &self.list), len);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.paid = true;
                return Sent::Full;
            }
            Err(error) => {
                counts.failed();
                pair.refused(&error);
            }
        }
        Sent::Done
    }
}

/// What has become of a chain.
enum Sent {
    /// It can be given back.
    Done,
    /// The network has no room now.
    Full,
    /// It is over a limit for so long.
    Limited(std::time::Duration),
}
