//! The worker of a socket device, which serves all of its queues.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::BUFFER;
use super::hub::Hub;
use super::spec::{self, HEADER_LEN, Header};
use crate::device::{ActiveQueue, Notifier, StoppedQueue};
use crate::limit::Clock;
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Ring, RingError, fill_front, take_front, total};
use crate::worker::{QueueWorker, Turn, Wake};

/// What wakes the worker, beside the doorbells of the queues by their indexes.
const HUB: u64 = 1 << 16;
const WAKE: u64 = u64::MAX;

/// What the worker is given.
#[derive(Clone)]
pub struct Service {
    /// The features that the driver has accepted.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The way back to the driver.
    pub notifier: Arc<dyn Notifier>,
    /// The connections.
    pub hub: Arc<Mutex<Hub>>,
    /// What time it is.
    pub clock: Clock,
}

/// The connections of a device. Not held while anybody waits.
pub fn lock(hub: &Mutex<Hub>) -> MutexGuard<'_, Hub> {
    // A panic elsewhere leaves every connection as sound as it was.
    hub.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves all queues.
pub struct Worker {
    service: Service,
    /// By their indexes.
    rings: [Option<Ring>; spec::QUEUES],
    epoll: Epoll,
    wake: Wake,
    chain: Chain,
    packet: Vec<u8>,
}

impl Worker {
    /// Takes the queues over and waits for everything that there is.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(service: Service, queues: Vec<ActiveQueue>, wake: &Wake) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: &dyn AsRawFd, data| {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
        };
        add(&wake.fd(), WAKE)?;
        add(lock(&service.hub).epoll(), HUB)?;
        let mut rings = [None, None, None];
        for active in queues {
            let index = active.index;
            let ring = Ring::new(active, service.features, Arc::clone(&service.notifier));
            add(&ring.doorbell(), index.into())?;
            if let Some(place) = rings.get_mut(usize::from(index)) {
                *place = Some(ring);
            }
        }
        Ok(Self {
            service,
            rings,
            epoll,
            wake: wake.clone(),
            chain: Chain::default(),
            packet: Vec::new(),
        })
    }

    /// Does what there is to do; `true` when there may be more.
    fn serve(&mut self, view: &GuestMap) -> Result<bool, RingError> {
        let shared = Arc::clone(&self.service.hub);
        let mut hub = lock(&shared);
        let now = (self.service.clock)();
        if let Err(error) = hub.look(now) {
            hub.wrong(&format!("the host's sockets cannot be looked at: {error}"));
        }
        let mut more = self.take(view, &mut hub)?;
        more |= self.give(view, &mut hub)?;
        self.tell(view, &mut hub)?;
        drop(hub);
        for ring in self.rings.iter_mut().flatten() {
            ring.notify(view)?;
        }
        Ok(more)
    }

    /// Takes the guest's packets. Whether there may be more that can be taken.
    fn take(&mut self, view: &GuestMap, hub: &mut Hub) -> Result<bool, RingError> {
        let [_, Some(ring), _] = &mut self.rings else {
            return Ok(false);
        };
        ring.quiet(view)?;
        let now = (self.service.clock)();
        for _ in 0..ring.size() {
            // Without room for refusals the driver has to take some first (5.10.6.1).
            if !hub.takes() {
                return Ok(false);
            }
            if !ring.take(view, &mut self.chain)? {
                return Ok(false);
            }
            let mut bytes = [0; HEADER_LEN];
            if take_front(view, &mut self.chain.readable, &mut bytes) {
                let header = Header::read(&bytes);
                let whole = body(view, &mut self.chain, &header, &mut self.packet);
                hub.receive(&header, whole.then_some(&self.packet), now);
            } else {
                hub.wrong("a packet is shorter than its header");
            }
            ring.complete(view, self.chain.head, 0)?;
        }
        Ok(true)
    }

    /// Gives the guest what there is for it. Whether there may be more that it has buffers for.
    fn give(&mut self, view: &GuestMap, hub: &mut Hub) -> Result<bool, RingError> {
        let [Some(ring), ..] = &mut self.rings else {
            return Ok(false);
        };
        let full = !hub.takes();
        let now = (self.service.clock)();
        ring.quiet(view)?;
        for _ in 0..ring.size() {
            if !hub.is_due() {
                break;
            }
            if !ring.take(view, &mut self.chain)? {
                // Refusals may have gone, and then packets can be taken again.
                return Ok(full && hub.takes());
            }
            let head = self.chain.head;
            let room = usize::try_from(total(&self.chain.writable)).unwrap_or(usize::MAX);
            let Some(room) = room.checked_sub(HEADER_LEN) else {
                hub.wrong("a buffer is shorter than a packet's header");
                ring.complete(view, head, 0)?;
                continue;
            };
            match hub.next(room, &mut self.packet, now) {
                Some(sent) => {
                    let written = fill_front(view, &self.chain.writable, &self.packet);
                    if usize::try_from(written) != Ok(self.packet.len()) {
                        hub.lost(&sent);
                    }
                    ring.complete(view, head, written)?;
                }
                None if room == 0 => {
                    hub.wrong("a buffer has no room for bytes");
                    ring.complete(view, head, 0)?;
                }
                None => ring.put_back([head].into_iter()),
            }
        }
        Ok(hub.is_due() || full && hub.takes())
    }

    /// Tells the driver that there are no connections any more, once it has given a buffer for that.
    fn tell(&mut self, view: &GuestMap, hub: &mut Hub) -> Result<(), RingError> {
        let [_, _, Some(ring)] = &mut self.rings else {
            return Ok(());
        };
        if hub.reset_untold && ring.take(view, &mut self.chain)? {
            let event = spec::EVENT_TRANSPORT_RESET.to_le_bytes();
            let written = fill_front(view, &self.chain.writable, &event);
            ring.complete(view, self.chain.head, written)?;
            hub.reset_untold = false;
        }
        Ok(())
    }

    fn sleep(&mut self) -> io::Result<()> {
        let wake_at = lock(&self.service.hub).wake_at();
        let timeout = wake_at.map_or(-1, |at| {
            let left = at.saturating_duration_since((self.service.clock)());
            // Rounded up: not before it is time.
            let left = left.saturating_add(Duration::from_micros(999));
            i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); 8];
        let ready = match self.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            match event.data() {
                WAKE => self.wake.reset(),
                // It is looked at before the next packet.
                HUB => {}
                data => {
                    let index = usize::try_from(data).unwrap_or(usize::MAX);
                    if let Some(Some(ring)) = self.rings.get_mut(index) {
                        ring.silence();
                    }
                }
            }
        }
        Ok(())
    }

    fn fail(&mut self, error: &dyn std::error::Error) {
        if let Some(ring) = self.rings.iter_mut().flatten().next() {
            ring.fail(error);
        }
    }
}

/// Reads the bytes of a packet into `packet`. `false` when they are not there, or more than any
/// connection has room for.
fn body(view: &GuestMap, chain: &mut Chain, header: &Header, packet: &mut Vec<u8>) -> bool {
    packet.clear();
    let there = total(&chain.readable) >= u64::from(header.len) && header.len <= BUFFER;
    let Some(len) = usize::try_from(header.len).ok().filter(|_| there) else {
        return false;
    };
    packet.resize(len, 0);
    take_front(view, &mut chain.readable, packet)
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve {
            let view = self.service.memory.memory();
            match self.serve(&view) {
                Ok(true) => return Turn::Again,
                Ok(false) => {}
                Err(error) => {
                    self.fail(&error);
                    return Turn::Halt;
                }
            }
        }
        match self.sleep() {
            Ok(()) => Turn::Again,
            Err(error) => {
                self.fail(&error);
                Turn::Halt
            }
        }
    }

    /// A packet is taken whole, or not at all.
    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        let rings = self.rings.into_iter().flatten();
        rings.map(|ring| ring.stop([])).collect()
    }
}
