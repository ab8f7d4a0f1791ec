//! The worker of one pair of queues, and, with the first pair, of the control queue.
//!
//! It sleeps in one epoll that has the doorbells, the way to the network and its [`Wake`]. Before it does it looks for a
//! while, if that has paid ([`Window`]): the driver then need not kick. The network is
//! watched by edges: what it has said is remembered until a call says `WouldBlock`, so that neither a guest without
//! buffers nor a network without room makes the worker spin, and no call but the
//! frames' own is made while there is traffic.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::LogLimit;
use net::{Mirror, Pieces, Port, Watch};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::control::Control;
use super::filter::Filter;
use super::receive::{Receiver, sooner};
use super::shared::{Shared, is_gone};
use super::tally::PairTally;
use super::transmit::Transmitter;
use crate::device::{ActivateError, Notifier, StoppedQueue};
use crate::limit::Clock;
use crate::memory::{GuestMap, GuestMemory};
use crate::models::poll::Window;
use crate::ring::{Ring, RingError};
use crate::worker::{QueueWorker, Turn, Wake};

/// Why a queue has not been served further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The driver has put nothing into it. It does not kick.
    Empty,
    /// The network has no room.
    Full,
    /// The network has no frame.
    Quiet,
    /// The next frame has to wait so long.
    Limited(Duration),
    /// It was enough for one turn.
    More,
}

/// What the halves of a pair work with.
pub struct Pair {
    /// Which one it is.
    pub index: u16,
    /// What all workers of the device share.
    pub shared: Arc<Shared>,
    /// What it counts.
    pub tally: Arc<PairTally>,
    /// What limits are timed by.
    pub clock: Clock,
    /// Which frames the driver wants.
    pub filter: Arc<Filter>,
    /// What gets copies of the frames.
    mirror: Option<Arc<Mirror>>,
    /// The number of that filter and that mirror.
    generation: u64,
    notifier: Arc<dyn Notifier>,
    log: LogLimit,
}

impl Pair {
    /// The pair of this number.
    pub fn new(
        index: u16,
        shared: &Arc<Shared>,
        tally: Arc<PairTally>,
        clock: Clock,
        notifier: Arc<dyn Notifier>,
    ) -> Self {
        Self {
            index,
            generation: shared.generation(),
            filter: shared.filter(),
            mirror: shared.mirror(),
            shared: Arc::clone(shared),
            tally,
            clock,
            notifier,
            log: LogLimit::new(),
        }
    }

    /// The network has refused a frame, or to give one.
    pub fn refused(&self, error: &io::Error) {
        if is_gone(error) {
            // The port of a pair that is not used is detached.
            if self.shared.uses(self.index) {
                self.shared.lost(error, &*self.notifier);
            }
        } else if let Some(suppressed) = self.log.allow() {
            tracing::warn!(
                device = %self.shared.id,
                network = %self.shared.label,
                %error,
                suppressed,
                "the network has refused a frame",
            );
        }
    }

    fn refresh(&mut self) {
        let generation = self.shared.generation();
        if generation != self.generation {
            self.generation = generation;
            self.filter = self.shared.filter();
            self.mirror = self.shared.mirror();
        }
    }

    /// Copies the first `len` bytes, a frame with its header, if somebody looks on.
    pub fn copy(&self, frame: Pieces<'_>, len: usize) {
        if let Some(mirror) = &self.mirror {
            mirror.copy(frame, len);
        }
    }
}

/// How often a network that has ended is asked for, at first.
pub const RETRY: Duration = Duration::from_millis(500);

/// How often at least, once it has been found in vain.
pub const LONGEST_RETRY: Duration = Duration::from_secs(8);

const RECEIVE: u64 = 0;
const TRANSMIT: u64 = 1;
const CONTROL: u64 = 2;
const WAKE: u64 = 3;
const PORT: u64 = 4;
const WATCH: u64 = 5;

/// Serves a pair of queues.
pub struct Worker {
    pair: Pair,
    port: Box<dyn Port>,
    memory: GuestMemory,
    /// The memory that posted buffers are in.
    view: Arc<GuestMap>,
    epoll: Epoll,
    wake: Wake,
    receiver: Option<Receiver>,
    transmitter: Option<Transmitter>,
    control: Option<Control>,
    /// There may be a command. The driver kicks for the next one.
    commanded: bool,
    /// There may be a frame.
    readable: bool,
    /// There may be room for one.
    writable: bool,
    /// For waits that nothing but an event ends.
    window: Window,
    /// What tells that the network may be gone, beside its port.
    watch: Option<Watch>,
    /// When a network that has ended was asked for.
    tried: Option<Instant>,
    /// How long it is left alone from then on. Doubled by each time that it was found and had nothing to say.
    gap: Duration,
    /// When it was found the last time.
    found: Option<Instant>,
}

/// The queues of a worker.
pub struct Queues {
    /// Frames to the guest.
    pub receiver: Option<Receiver>,
    /// Frames from the guest.
    pub transmitter: Option<Transmitter>,
    /// Commands.
    pub control: Option<Control>,
}

/// What is waited for at the port. It says so by edges.
fn port_event() -> EpollEvent {
    let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
    EpollEvent::new(events, PORT)
}

impl Worker {
    /// Opens the pair's way to the network.
    ///
    /// # Errors
    ///
    /// [`ActivateError`] when the host lacks descriptors.
    pub fn new(
        pair: Pair,
        memory: GuestMemory,
        queues: Queues,
        wake: &Wake,
    ) -> Result<Self, ActivateError> {
        let failed = |error: io::Error| ActivateError {
            what: "a pair of queues",
            reason: error.to_string(),
        };
        let Queues {
            receiver,
            transmitter,
            control,
        } = queues;
        let port = pair.shared.backend().port(pair.index).map_err(failed)?;
        // One worker is enough.
        let watch = (pair.index == 0).then(|| pair.shared.watch()).flatten();
        let epoll = Epoll::new().map_err(failed)?;
        let rings = [
            (receiver.as_ref().map(|half| &half.ring), RECEIVE),
            (transmitter.as_ref().map(|half| &half.ring), TRANSMIT),
            (control.as_ref().map(|control| &control.ring), CONTROL),
        ];
        let doorbells = rings
            .into_iter()
            .filter_map(|(ring, data)| Some((ring?.doorbell(), data)));
        let watched = watch.as_ref().map(|watch| (watch.fd(), WATCH));
        for (fd, data) in doorbells.chain([(wake.fd(), WAKE)]).chain(watched) {
            let event = EpollEvent::new(EventSet::IN, data);
            let added = epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event);
            added.map_err(failed)?;
        }
        let fd = port.fd().as_raw_fd();
        epoll
            .ctl(ControlOperation::Add, fd, port_event())
            .map_err(failed)?;
        Ok(Self {
            pair,
            port,
            view: memory.memory().into_inner(),
            memory,
            epoll,
            wake: wake.clone(),
            receiver,
            transmitter,
            control,
            commanded: true,
            readable: true,
            writable: true,
            window: Window::new(),
            watch,
            tried: None,
            gap: RETRY,
            found: None,
        })
    }

    /// Serves all queues; says how long to sleep: not at all, for so long, or (`None`) until
    /// something happens.
    fn serve(&mut self) -> Option<Duration> {
        let view = self.memory.memory().into_inner();
        if !Arc::ptr_eq(&view, &self.view) {
            if let Some(receiver) = &mut self.receiver {
                receiver.unpost(&view, &self.pair);
            }
            self.view = view;
        }
        let wait = self.obey();
        if !self.pair.shared.uses(self.pair.index) {
            return wait;
        }
        self.pair.refresh();
        let sent = self.transmit();
        let received = self.receive();
        let renewed = self.renew();
        sooner(sooner(wait, renewed), sooner(sent, received))
    }

    /// Carries out commands, if there may be any. Frames do not have the control queue looked at.
    fn obey(&mut self) -> Option<Duration> {
        let control = self.control.as_mut()?;
        if control.ring.failed() || !self.commanded {
            return None;
        }
        let served = control.serve(&self.view);
        let served = served.and_then(|more| control.ring.notify(&self.view).map(|()| more));
        match served {
            Ok(true) => Some(Duration::ZERO),
            Ok(false) => {
                self.commanded = false;
                None
            }
            Err(error) => {
                control.ring.fail(&error);
                None
            }
        }
    }

    /// Asks for a network that has ended; how long until it is asked for the next time.
    fn renew(&mut self) -> Option<Duration> {
        if !self.pair.shared.awaits() {
            return None;
        }
        let heard = self.receiver.as_mut().map(|half| &mut half.heard);
        let now = (self.pair.clock)();
        let since = self.found.take();
        let stayed = since.is_some_and(|at| now.saturating_duration_since(at) >= LONGEST_RETRY);
        if heard.is_some_and(std::mem::take) || stayed {
            self.gap = RETRY;
        }
        let gap = self.gap;
        let wait = self
            .tried
            .map(|tried| gap.saturating_sub(now.saturating_duration_since(tried)));
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            return Some(wait);
        }
        self.tried = Some(now);
        if self.reopen().is_err() {
            return Some(gap);
        }
        // A server may do no more than to take connections.
        self.gap = gap.saturating_mul(2).min(LONGEST_RETRY);
        self.found = Some(now);
        self.pair.shared.found(&*self.pair.notifier);
        Some(Duration::ZERO)
    }

    fn reopen(&mut self) -> io::Result<()> {
        let mut backend = self.pair.shared.backend();
        backend.renew()?;
        let port = backend.port(self.pair.index)?;
        let (before, after) = (self.port.fd().as_raw_fd(), port.fd().as_raw_fd());
        self.epoll.ctl(ControlOperation::Add, after, port_event())?;
        // The network's own descriptor may keep the one before open.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, before, port_event());
        self.port = port;
        self.readable = true;
        self.writable = true;
        Ok(())
    }

    fn transmit(&mut self) -> Option<Duration> {
        let half = self.transmitter.as_mut()?;
        if half.ring.failed() || !self.writable {
            return None;
        }
        let view = &self.view;
        // Errors come up again with the next frame.
        let full = self.port.flush();
        let served = match full {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Served::Full),
            _ => half.serve(view, &self.pair, &mut *self.port),
        };
        let served = settle(&mut half.ring, view, served)?;
        half.listens = served == Served::Empty;
        if served == Served::Full {
            self.writable = false;
            // Asked again, it tells of room that there has been meanwhile.
            let fd = self.port.fd().as_raw_fd();
            let _ = self.epoll.ctl(ControlOperation::Modify, fd, port_event());
        }
        pause(served)
    }

    fn receive(&mut self) -> Option<Duration> {
        let half = self.receiver.as_mut()?;
        if half.ring.failed() || !self.readable {
            return None;
        }
        let view = &self.view;
        let served = half.serve(view, &self.pair, &mut *self.port);
        let served = settle(&mut half.ring, view, served)?;
        half.listens = served == Served::Empty;
        if served == Served::Quiet {
            self.readable = false;
        }
        pause(served)
    }

    /// The queues whose drivers are to be asked to kick before a sleep.
    fn listening(&mut self) -> impl Iterator<Item = &mut Ring> {
        let receiver = self.receiver.as_mut().filter(|half| half.listens);
        let transmitter = self.transmitter.as_mut().filter(|half| half.listens);
        let rings = [
            receiver.map(|half| &mut half.ring),
            transmitter.map(|half| &mut half.ring),
        ];
        let rings = rings.into_iter().flatten();
        rings.filter(|ring| !ring.failed())
    }

    /// Waits until there is something to do: looks for a while, then sleeps. What the
    /// rings have to say of errors they say again to the next turn.
    fn rest(&mut self, wait: Option<Duration>) -> io::Result<()> {
        if wait == Some(Duration::ZERO) {
            return self.sleep(wait).map(drop);
        }
        let begin = (self.pair.clock)();
        let span = self.window.span();
        while wait.is_none() && !span.is_zero() {
            let view = Arc::clone(&self.view);
            let told = self.sleep(Some(Duration::ZERO))?;
            let found = told
                || self
                    .listening()
                    .any(|ring| ring.pending(&view).unwrap_or(true));
            let passed = (self.pair.clock)().saturating_duration_since(begin);
            if found {
                self.window.found(passed);
                return Ok(());
            }
            if passed >= span {
                break;
            }
            std::hint::spin_loop();
        }
        let view = Arc::clone(&self.view);
        let mut more = false;
        for ring in self.listening() {
            more |= ring.invite(&view).unwrap_or(true);
        }
        if more {
            return self.sleep(Some(Duration::ZERO)).map(drop);
        }
        self.sleep(wait)?;
        if wait.is_none() {
            let passed = (self.pair.clock)().saturating_duration_since(begin);
            self.window.slept(passed);
        }
        Ok(())
    }

    /// Sleeps, and takes up what has happened. Whether anything has.
    fn sleep(&mut self, wait: Option<Duration>) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 6];
        let ready = match self.epoll.wait(milliseconds(wait), &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            let ring = match event.data() {
                RECEIVE => self.receiver.as_mut().map(|half| &mut half.ring),
                TRANSMIT => self.transmitter.as_mut().map(|half| &mut half.ring),
                CONTROL => {
                    self.commanded = true;
                    self.control.as_mut().map(|control| &mut control.ring)
                }
                PORT => {
                    let told = event.event_set();
                    let broken = EventSet::ERROR | EventSet::HANG_UP;
                    self.readable |= told.intersects(EventSet::IN | broken);
                    self.writable |= told.intersects(EventSet::OUT | broken);
                    None
                }
                WATCH => {
                    if let Some(watch) = &self.watch {
                        watch.take();
                    }
                    self.pair.shared.check(&*self.pair.notifier);
                    None
                }
                _ => {
                    self.wake.reset();
                    None
                }
            };
            if let Some(ring) = ring {
                ring.silence();
            }
        }
        Ok(ready > 0)
    }

    fn rings(&mut self) -> impl Iterator<Item = &mut Ring> {
        let receiver = self.receiver.as_mut().map(|half| &mut half.ring);
        let transmitter = self.transmitter.as_mut().map(|half| &mut half.ring);
        let control = self.control.as_mut().map(|control| &mut control.ring);
        [receiver, transmitter, control].into_iter().flatten()
    }
}

/// Tells the driver what has been done, and leaves a broken ring alone from now on: `None`.
fn settle(ring: &mut Ring, view: &GuestMap, served: Result<Served, RingError>) -> Option<Served> {
    let served = served.and_then(|served| ring.notify(view).map(|()| served));
    served.map_err(|error| ring.fail(&error)).ok()
}

/// How long to sleep for a queue that was served so far.
fn pause(served: Served) -> Option<Duration> {
    match served {
        Served::More => Some(Duration::ZERO),
        Served::Limited(wait) => Some(wait),
        Served::Full | Served::Quiet | Served::Empty => None,
    }
}

/// In the system's unit and rounded up, so that no wait ends early and is slept again.
fn milliseconds(wait: Option<Duration>) -> i32 {
    let Some(wait) = wait else {
        return -1;
    };
    let whole = wait.as_micros().div_ceil(1000);
    i32::try_from(whole).unwrap_or(i32::MAX)
}

impl QueueWorker for Worker {
    fn turn(&mut self, serve: bool) -> Turn {
        let waited = if serve {
            let wait = self.serve();
            self.rest(wait)
        } else {
            self.sleep(None).map(drop)
        };
        match waited {
            Ok(()) => Turn::Again,
            Err(error) => {
                for ring in self.rings() {
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
        let Self {
            pair,
            view,
            receiver,
            transmitter,
            control,
            ..
        } = self;
        // Whoever goes on with a queue may wait for a kick first.
        let invite = |ring: &mut Ring| {
            if !ring.failed() {
                let _ = ring.invite(&view);
            }
        };
        let mut stopped = Vec::new();
        if let Some(mut receiver) = receiver {
            if !receiver.ring.failed()
                && let Err(error) = receiver.flush(&view, &pair)
            {
                receiver.ring.fail(&error);
            }
            // The next kick is for what comes behind the buffers that go back.
            invite(&mut receiver.ring);
            receiver.unpost(&view, &pair);
            stopped.push(receiver.ring.stop([]));
        }
        let others = [
            transmitter.map(|half| half.ring),
            control.map(|control| control.ring),
        ];
        for mut ring in others.into_iter().flatten() {
            invite(&mut ring);
            stopped.push(ring.stop([]));
        }
        stopped
    }
}
