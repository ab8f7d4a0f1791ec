//! One queue of a device with a peer, both sides of it.

use std::sync::Arc;

use virtio_queue::QueueT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::PeerError;
use super::front::Epitaph;
use super::rings::PeerRing;
use crate::device::{ActiveQueue, Notifier};
use crate::memory::GuestMap;
use crate::ring::{Chain, Extent, Ring, RingError};

/// The driver has offered a chain that it has offered before and not got back.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: the chain at {head} is offered while it is in use")]
struct Doubled {
    queue: u16,
    head: u16,
}

/// A buffer of the driver's is not all memory. Programs for the protocol end when they find one.
#[derive(Debug, thiserror::Error)]
#[error("queue {queue}: the chain at {head} has a buffer outside of memory")]
struct Outside {
    queue: u16,
    head: u16,
}

/// What has come of a look at what the driver wants.
pub(super) struct Submitted {
    /// Whether there may be more, or what the driver has done that it may not.
    pub more: Result<bool, Box<dyn std::error::Error>>,
    /// The peer is to be kicked.
    pub kick: bool,
}

/// By what chains are taken off the driver's rings.
pub(super) struct Taker<'a> {
    pub chain: &'a mut Chain,
    /// The number of the next request.
    pub number: &'a mut u64,
    /// What the driver sends is kept.
    pub keep: bool,
    /// The guest's memory is other than the one that was looked at.
    pub stale: &'a dyn Fn() -> bool,
}

/// A chain that the peer has.
pub(super) struct Request {
    /// Counts up: the order in which the driver has made them available.
    number: u64,
    writable: Vec<Extent>,
    /// What the driver sent, where an answer may have to be made of it.
    said: Vec<u8>,
}

/// One queue, both sides of it.
pub(super) struct Lane {
    pub ring: Ring,
    /// Guest-physical address of the descriptor table.
    pub table: u64,
    pub index: u16,
    /// The peer's rings, while it has some. They may outlast it.
    pub rings: Option<PeerRing>,
    /// While there is a connection.
    pub events: Option<Events>,
    /// By head, of the chains that the peer has.
    requests: Vec<Option<Request>>,
    in_flight: usize,
}

/// How the peer and its device have each other look up.
pub(super) struct Events {
    pub kick: Arc<EventFd>,
    pub call: Arc<EventFd>,
}

impl Lane {
    /// A queue of which the peer has nothing yet.
    pub fn new(queue: ActiveQueue, features: u64, notifier: &Arc<dyn Notifier>) -> Self {
        let size = queue.queue.size();
        Self {
            table: queue.queue.desc_table(),
            index: queue.index,
            ring: Ring::new(queue, features, Arc::clone(notifier)),
            rings: None,
            events: None,
            requests: (0..size).map(|_| None).collect(),
            in_flight: 0,
        }
    }

    /// How many chains the peer has.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many chains are looked at in a row.
    pub fn round(&self) -> usize {
        self.requests.len()
    }

    /// Takes at most one ring full of what the peer has returned; tells how many.
    pub fn collect(&mut self, view: &GuestMap) -> (usize, Option<PeerError>) {
        let Some(rings) = &mut self.rings else {
            return (0, None);
        };
        for count in 0..self.requests.len() {
            let Some(returned) = rings.pop() else {
                return (count, None);
            };
            let head = returned.head;
            let slot = usize::try_from(head).unwrap_or(usize::MAX);
            let request = self.requests.get_mut(slot).and_then(Option::take);
            let (Some(request), Ok(head)) = (request, u16::try_from(head)) else {
                let what = format!("has returned chain {head}, which it does not have");
                return (count, Some(PeerError::Garbage { what }));
            };
            self.in_flight -= 1;
            let room = mark_dirty(view, &request.writable);
            let written = returned.written.min(room);
            if let Err(error) = self.ring.complete(view, head, written) {
                self.ring.fail(&error);
            }
        }
        (self.requests.len(), None)
    }

    /// Gives the peer at most one ring full of chains.
    pub fn submit(&mut self, view: &GuestMap, taker: &mut Taker<'_>) -> Submitted {
        let mut given = false;
        let more = self.give(view, taker, &mut given);
        let kick = given && self.rings.as_mut().is_some_and(PeerRing::publish);
        Submitted { more, kick }
    }

    fn give(
        &mut self,
        view: &GuestMap,
        taker: &mut Taker<'_>,
        given: &mut bool,
    ) -> Result<bool, Box<dyn std::error::Error>> {
        let Taker {
            chain,
            number,
            keep,
            stale,
        } = taker;
        let Some(rings) = &mut self.rings else {
            return Ok(false);
        };
        self.ring.quiet(view)?;
        for _ in 0..self.requests.len() {
            if !self.ring.take(view, chain)? {
                return Ok(false);
            }
            let (queue, head) = (self.index, chain.head);
            let free = self.requests.get_mut(usize::from(head));
            let Some(slot) = free.filter(|slot| slot.is_none()) else {
                return Err(Doubled { queue, head }.into());
            };
            if !in_memory(view, chain) {
                if stale() {
                    self.ring.untake(head);
                    return Ok(true);
                }
                return Err(Outside { queue, head }.into());
            }
            *slot = Some(Request {
                number: **number,
                writable: std::mem::take(&mut chain.writable),
                said: if *keep { said(view, chain) } else { Vec::new() },
            });
            **number = number.wrapping_add(1);
            self.in_flight += 1;
            rings.push(head);
            *given = true;
        }
        Ok(true)
    }

    /// Takes the peer's requests from it: they are answered with an epitaph, or to be taken again, first of all and in
    /// the order in which they came.
    pub fn take_back(&mut self, view: &GuestMap, epitaph: Option<Epitaph>) {
        let mut requests: Vec<(u16, Request)> = (0..)
            .zip(&mut self.requests)
            .filter_map(|(head, slot)| Some((head, slot.take()?)))
            .collect();
        requests.sort_by_key(|(_, request)| request.number);
        self.in_flight = 0;
        for (_, request) in &requests {
            // What the peer has written so far.
            mark_dirty(view, &request.writable);
        }
        let Some(epitaph) = epitaph else {
            self.ring.put_back(requests.iter().map(|(head, _)| *head));
            return;
        };
        let answered = self.bury(view, &requests, epitaph);
        if let Err(error) = answered.and_then(|()| self.ring.notify(view)) {
            self.ring.fail(&error);
        }
    }

    fn bury(
        &mut self,
        view: &GuestMap,
        requests: &[(u16, Request)],
        epitaph: Epitaph,
    ) -> Result<(), RingError> {
        for (head, request) in requests {
            let answer = epitaph(&request.said);
            let mut rest = answer.as_slice();
            for extent in &request.writable {
                let len = usize::try_from(extent.len)
                    .unwrap_or(usize::MAX)
                    .min(rest.len());
                let (now, later) = rest.split_at(len);
                // A buffer that is not memory any more stays as it is.
                let _ = view.write_slice(now, extent.addr);
                rest = later;
            }
            let written = u32::try_from(answer.len() - rest.len()).unwrap_or(0);
            self.ring.complete(view, *head, written)?;
        }
        Ok(())
    }
}

fn in_memory(view: &GuestMap, chain: &Chain) -> bool {
    let mut extents = chain.readable.iter().chain(&chain.writable);
    extents.all(|extent| {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        GuestMemoryBackend::check_range(view, extent.addr, len)
    })
}

/// The first bytes that the driver sends.
fn said(view: &GuestMap, chain: &Chain) -> Vec<u8> {
    const ENOUGH: usize = 64;
    let Some(first) = chain.readable.first() else {
        return Vec::new();
    };
    let mut said = vec![0; usize::try_from(first.len).unwrap_or(ENOUGH).min(ENOUGH)];
    match view.read_slice(&mut said, first.addr) {
        Ok(()) => said,
        Err(_) => Vec::new(),
    }
}

/// Marks all that a peer may have written, and tells how many bytes it is.
fn mark_dirty(view: &GuestMap, extents: &[Extent]) -> u32 {
    for extent in extents {
        let len = usize::try_from(extent.len).unwrap_or(usize::MAX);
        for slice in GuestMemoryBackend::get_slices(view, extent.addr, len).flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
    extents
        .iter()
        .fold(0, |sum: u32, extent| sum.saturating_add(extent.len))
}
