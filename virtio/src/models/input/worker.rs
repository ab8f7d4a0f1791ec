//! The worker of an input device, which serves both of its queues.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use devices::input::event_type;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use zerocopy::{FromBytes, IntoBytes};

use super::spec::{EVENT_LEN, EVENTS, Event, STATUS};
use super::{Shared, count};
use crate::device::{ActiveQueue, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Extent, Ring, RingError, fill_front, take_front, total};
use crate::worker::{QueueWorker, Turn, Wake};

/// What the wake-up's events carry; those of doorbells carry their place in the list.
const WAKE: u64 = u64::MAX;

/// A buffer of the driver's for one event.
struct Buffer {
    head: u16,
    extents: Vec<Extent>,
}

/// What has come of looking for buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gathered {
    /// There are as many as are wanted.
    Enough,
    /// The driver has to give more, and kicks then.
    TooFew,
    /// There were many that hold no event, and may be others behind them.
    Bad,
}

/// Serves both queues.
pub struct Worker {
    rings: Vec<Ring>,
    /// What each of them is for.
    indexes: Vec<u16>,
    shared: Arc<Shared>,
    memory: GuestMemory,
    epoll: Epoll,
    wake: Wake,
    chain: Chain,
    /// The driver broke a queue: both are left alone.
    failed: bool,
}

impl Worker {
    /// Takes the queues over.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(
        (queues, features, notifier): (Vec<ActiveQueue>, u64, &Arc<dyn Notifier>),
        memory: GuestMemory,
        shared: &Arc<Shared>,
        wake: &Wake,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, wake.fd().as_raw_fd(), event)?;
        let (mut rings, mut indexes) = (Vec::new(), Vec::new());
        for active in queues {
            indexes.push(active.index);
            let ring = Ring::new(active, features, Arc::clone(notifier));
            let event = EpollEvent::new(EventSet::IN, rings.len() as u64);
            epoll.ctl(ControlOperation::Add, ring.doorbell().as_raw_fd(), event)?;
            rings.push(ring);
        }
        Ok(Self {
            rings,
            indexes,
            shared: Arc::clone(shared),
            memory,
            epoll,
            wake: wake.clone(),
            chain: Chain::default(),
            failed: false,
        })
    }

    /// Serves both queues once; `true` when there may be more.
    fn serve(&mut self) -> bool {
        let view = self.memory.memory();
        let mut more = false;
        for (ring, index) in self.rings.iter_mut().zip(&self.indexes) {
            let served = match *index {
                EVENTS => tell(ring, &view, &self.shared, &mut self.chain),
                STATUS => hear(ring, &view, &self.shared, &mut self.chain),
                _ => Ok(false),
            };
            match served.and_then(|more| ring.notify(&view).map(|()| more)) {
                Ok(again) => more |= again,
                Err(error) => {
                    ring.fail(&error);
                    self.failed = true;
                    return false;
                }
            }
        }
        more
    }

    fn sleep(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 3];
        let ready = match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            let place = usize::try_from(event.data()).ok();
            match place.and_then(|place| self.rings.get_mut(place)) {
                Some(ring) => ring.silence(),
                None => self.wake.reset(),
            }
        }
        Ok(())
    }
}

/// Gives the driver the reports that it has buffers for, as many as one turn may take; `true` when there may be more.
fn tell(
    ring: &mut Ring,
    view: &GuestMap,
    shared: &Shared,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    let mut told = 0;
    while told < ring.size() {
        let Some(report) = shared.queue.take() else {
            return Ok(false);
        };
        // Of what is returned together the driver sees all or nothing, and that is fewer than all.
        if report.len() >= usize::from(ring.size()) {
            shared.queue.lose();
            continue;
        }
        let mut buffers = Vec::new();
        ring.quiet(view)?;
        let gathered = gather(ring, view, shared, (chain, &mut buffers), report.len());
        if !matches!(gathered, Ok(Gathered::Enough)) {
            ring.put_back(buffers.iter().map(|buffer| buffer.head));
            shared.queue.put_back(report);
            return gathered.map(|gathered| gathered == Gathered::Bad);
        }
        let mut written = Vec::new();
        for (buffer, event) in buffers.iter().zip(report) {
            let event = Event::from(event);
            let filled = fill_front(view, &buffer.extents, event.as_bytes());
            written.push((buffer.head, filled));
        }
        count(&shared.tally.reports);
        ring.complete_together(view, &written)?;
        told = told.saturating_add(u16::try_from(written.len()).unwrap_or(u16::MAX));
    }
    Ok(true)
}

/// Takes buffers for `wanted` events. Those that hold no event go back empty.
fn gather(
    ring: &mut Ring,
    view: &GuestMap,
    shared: &Shared,
    (chain, buffers): (&mut Chain, &mut Vec<Buffer>),
    wanted: usize,
) -> Result<Gathered, RingError> {
    for _ in 0..ring.size() {
        if buffers.len() == wanted {
            return Ok(Gathered::Enough);
        }
        if !ring.take(view, chain)? {
            return Ok(Gathered::TooFew);
        }
        let twice = buffers.iter().any(|buffer| buffer.head == chain.head);
        if twice || total(&chain.writable) < EVENT_LEN as u64 {
            count(&shared.tally.bad_buffers);
            ring.complete(view, chain.head, 0)?;
            continue;
        }
        buffers.push(Buffer {
            head: chain.head,
            extents: std::mem::take(&mut chain.writable),
        });
    }
    Ok(Gathered::Bad)
}

/// Takes what the driver says of lights; `true` when there may be more.
fn hear(
    ring: &mut Ring,
    view: &GuestMap,
    shared: &Shared,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    ring.quiet(view)?;
    for _ in 0..ring.size() {
        if !ring.take(view, chain)? {
            return Ok(false);
        }
        let mut bytes = [0; EVENT_LEN];
        let mut any = false;
        // A buffer has one event; more are taken as they come, up to as many as fit a page.
        for _ in 0..512 {
            if !take_front(view, &mut chain.readable, &mut bytes) {
                break;
            }
            any = true;
            if let Ok(event) = Event::read_from_bytes(&bytes) {
                count(&shared.tally.status_events);
                if event.kind.get() == event_type::LED {
                    let on = event.value.get() != 0;
                    shared.queue.set_led(event.code.get(), on);
                }
            }
        }
        if !any {
            count(&shared.tally.bad_buffers);
        }
        ring.complete(view, chain.head, 0)?;
    }
    Ok(true)
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        if serve && !self.failed && self.serve() {
            return Turn::Again;
        }
        match self.sleep() {
            Ok(()) => Turn::Again,
            Err(error) => {
                if let Some(ring) = self.rings.first_mut() {
                    ring.fail(&error);
                }
                Turn::Halt
            }
        }
    }

    fn in_flight(&self) -> usize {
        0
    }

    fn finish(self) -> Vec<StoppedQueue> {
        let rings = self.rings.into_iter();
        rings.map(|ring| ring.stop([])).collect()
    }
}
