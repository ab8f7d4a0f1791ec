//! The thread that answers a memory device's driver.

use std::io;
use std::sync::Arc;

use vm_memory::GuestAddressSpace;
use zerocopy::{FromBytes, IntoBytes};

use super::spec::{Answer, REQUEST_LEN, RESPONSE_LEN, Request, Response, request};
use super::view::{MemoryView, count};
use crate::device::{Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Ring, RingError, fill_front, take_front, total};
use crate::worker::{QueueWorker, Sleeper, Turn, Wake};

/// How many requests one turn takes: each may make the host find much memory.
const TURN: usize = 4;

/// Serves the queue of requests.
pub struct Worker {
    ring: Ring,
    memory: GuestMemory,
    view: Arc<MemoryView>,
    notifier: Arc<dyn Notifier>,
    sleeper: Sleeper,
    chain: Chain,
}

impl Worker {
    /// Takes the queue over.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(
        ring: Ring,
        memory: GuestMemory,
        (view, notifier): (Arc<MemoryView>, Arc<dyn Notifier>),
        wake: &Wake,
    ) -> io::Result<Self> {
        Ok(Self {
            sleeper: Sleeper::new(&ring, wake)?,
            ring,
            memory,
            view,
            notifier,
            chain: Chain::default(),
        })
    }

    /// Answers some requests; `true` when there may be more.
    fn serve(&mut self) -> Result<bool, RingError> {
        for _ in 0..TURN {
            // Each request may change what memory there is.
            let view = self.memory.memory();
            self.ring.quiet(&view)?;
            if !self.ring.take(&view, &mut self.chain)? {
                return Ok(false);
            }
            let answered = self.answer(&view);
            // The map before this request holds the rings: who unplugs them has himself to blame.
            self.ring.complete(&view, self.chain.head, answered)?;
            self.ring.notify(&view)?;
            if let Some(plugged) = self.view.take_news() {
                self.notifier.memory_reached(plugged);
            }
        }
        Ok(true)
    }

    /// Does what the chain asks for, and returns how many bytes are the answer.
    fn answer(&mut self, view: &GuestMap) -> u32 {
        let mut bytes = [0; REQUEST_LEN];
        let read = take_front(view, &mut self.chain.readable, &mut bytes);
        let room = total(&self.chain.writable) >= RESPONSE_LEN as u64;
        let found = Request::read_from_bytes(&bytes).ok();
        let Some(asked) = found.filter(|_| read && room) else {
            // Nothing is done of what nobody would hear of.
            count(&self.view.tally.invalid, 1);
            let response = Response::from(Answer::Error);
            return fill_front(view, &self.chain.writable, response.as_bytes());
        };
        let (address, blocks) = (asked.addr.get(), asked.blocks.get());
        let answer = match asked.kind.get() {
            request::PLUG => self.view.plug(address, blocks),
            request::UNPLUG => self.view.unplug(address, blocks),
            request::UNPLUG_ALL => self.view.unplug_each(),
            request::STATE => self.view.state(address, blocks),
            _ => {
                count(&self.view.tally.invalid, 1);
                Answer::Error
            }
        };
        fill_front(
            view,
            &self.chain.writable,
            Response::from(answer).as_bytes(),
        )
    }
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve && !self.ring.failed() {
            match self.serve() {
                Ok(true) => return Turn::Again,
                Ok(false) => {}
                Err(error) => self.ring.fail(&error),
            }
        }
        match self.sleeper.sleep(&mut self.ring) {
            Ok(()) => Turn::Again,
            Err(error) => {
                self.ring.fail(&error);
                Turn::Halt
            }
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        vec![self.ring.stop([])]
    }
}
