//! The worker: passes heads between the guest's rings and the peer's.
//!
//! ```text
//!              connected              serves
//!   Absent ───────────────► Idle ─────────────► Serving
//!     ▲                      ▲  ▲                │  │
//!     │                      │  └─── stopped ────┘  │ (draining, nothing in flight)
//!     └──────────────────────┴──────────────────────┘
//!        the peer is lost: heads go back to their rings
//! ```
//!
//! What the peer is asked is answered later, so that nothing here waits for it: it has until [`Asked::until`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use virtio_queue::QueueT;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::front::{Epitaph, Hub, Nature};
use super::notes::Notes;
use super::rings::{PeerRing, RingMemory};
use super::session::{Answer, Offer, QueueSetup, Session, Setup};
use super::{FIRST_PAUSE, LONGEST_PAUSE, PeerError, is_ready};
use crate::device::{ActivateError, Activation, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::{Chain, Extent, Ring, RingError};
use crate::worker::{QueueWorker, Turn, Wake, borrow};

/// What an event is of; queues follow, two for each.
const WAKE: u64 = 0;
const ANSWERED: u64 = 1;
const HUNG_UP: u64 = 2;
const NOTED: u64 = 3;
const QUEUES: u64 = 4;

/// How long the peer stays stopped after a stop that was given up: who gives up usually asks again at once.
const HOLD: Duration = Duration::from_millis(50);

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

/// A chain that the peer has.
struct Request {
    /// Counts up: the order in which the driver has made them available.
    number: u64,
    writable: Vec<Extent>,
    /// What the driver sent, where an answer may have to be made of it.
    said: Vec<u8>,
}

/// One queue, both sides of it.
struct Lane {
    ring: Ring,
    /// Guest-physical address of the descriptor table.
    table: u64,
    index: u16,
    /// The peer's side, while it has one.
    peer: Option<PeerSide>,
    /// By head, of the chains that the peer has.
    requests: Vec<Option<Request>>,
    in_flight: usize,
}

struct PeerSide {
    ring: PeerRing,
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// There is no connection, or it is being made.
    Absent,
    /// Connected; no queue is served.
    Idle,
    Serving,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Question {
    Connect,
    Serve,
    Memory,
    Config,
    Stop,
}

struct Asked {
    what: Question,
    until: Instant,
}

/// The worker of a device with a peer: one for all its queues.
pub(super) struct Relay {
    hub: Arc<Hub>,
    features: u64,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
    lanes: Vec<Lane>,
    chain: Chain,
    epoll: Epoll,
    wake: Wake,
    session: Option<Session>,
    /// The socket of the session, watched for its end.
    watched: Option<Arc<UnixStream>>,
    notes: Option<Notes>,
    stage: Stage,
    asked: Option<Asked>,
    /// The memory that the peer knows of, and where its rings are.
    known: Option<(Arc<GuestMap>, Arc<RingMemory>)>,
    /// Configuration space is to be asked for.
    reread: bool,
    /// When to connect again, or to take a stopped peer into use again.
    next: Option<Instant>,
    pause: Duration,
    draining: bool,
    number: u64,
}

impl Relay {
    pub fn new(hub: Arc<Hub>, activation: Activation, wake: &Wake) -> Result<Self, ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        if memory.memory().iter().any(|r| r.file_offset().is_none()) {
            return Err(ActivateError {
                what: "the peer",
                reason: PeerError::Private.to_string(),
            });
        }
        let lanes = queues.into_iter().map(|queue| {
            let size = queue.queue.size();
            Lane {
                table: queue.queue.desc_table(),
                index: queue.index,
                ring: Ring::new(queue, features, Arc::clone(&notifier)),
                peer: None,
                requests: (0..size).map(|_| None).collect(),
                in_flight: 0,
            }
        });
        let failed = |error: io::Error| ActivateError {
            what: "the peer's worker",
            reason: error.to_string(),
        };
        let mut relay = Self {
            features,
            lanes: lanes.collect(),
            memory,
            notifier,
            chain: Chain::default(),
            epoll: Epoll::new().map_err(failed)?,
            wake: wake.clone(),
            session: None,
            watched: None,
            notes: None,
            stage: Stage::Absent,
            asked: None,
            known: None,
            reread: false,
            next: None,
            pause: FIRST_PAUSE,
            draining: false,
            number: 0,
            hub,
        };
        relay.watch_own().map_err(failed)?;
        let idle = relay.hub.idle().take();
        if let Some(session) = idle {
            relay.stage = Stage::Idle;
            let notes = session.notes().cloned();
            relay.adopt(session).map_err(failed)?;
            relay.listen(notes).map_err(failed)?;
        }
        Ok(relay)
    }

    fn watch_own(&self) -> io::Result<()> {
        self.watch(self.wake.fd(), EventSet::IN, WAKE)?;
        for (lane, token) in self.lanes.iter().zip((QUEUES..).step_by(2)) {
            self.watch(lane.ring.doorbell(), EventSet::IN, token)?;
        }
        Ok(())
    }

    fn watch(&self, fd: BorrowedFd<'_>, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// A descriptor that the peer shares stays in the set when it is closed here.
    fn unwatch(&self, fd: BorrowedFd<'_>) {
        let event = EpollEvent::default();
        // One that is not in the set need not be taken out.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd.as_raw_fd(), event);
    }

    fn adopt(&mut self, session: Session) -> io::Result<()> {
        self.watch(session.answered(), EventSet::IN, ANSWERED)?;
        if let Some(socket) = session.socket() {
            self.watch(socket.as_fd(), EventSet::READ_HANG_UP, HUNG_UP)?;
            self.watched = Some(socket);
        }
        self.session = Some(session);
        Ok(())
    }

    fn listen(&mut self, notes: Option<Arc<UnixStream>>) -> io::Result<()> {
        if let Some(socket) = notes {
            self.watch(socket.as_fd(), EventSet::IN, NOTED)?;
            self.notes = Some(Notes::new(Arc::clone(&socket)));
            if let Some(session) = &mut self.session {
                session.keep_notes(Some(socket));
            }
        }
        Ok(())
    }

    /// Takes the connection out of everything that looks at it.
    fn release(&mut self) -> Option<Session> {
        let session = self.session.take()?;
        self.unwatch(session.answered());
        if let Some(socket) = self.watched.take() {
            self.unwatch(socket.as_fd());
        }
        if let Some(socket) = session.notes() {
            self.unwatch(socket.as_fd());
        }
        self.notes = None;
        self.asked = None;
        self.known = None;
        for at in 0..self.lanes.len() {
            if let Some(peer) = self.lanes.get_mut(at).and_then(|lane| lane.peer.take()) {
                self.unwatch(borrow(&peer.call));
            }
        }
        Some(session)
    }

    /// The peer is gone, or is sent away: its requests are to be made again.
    fn lose(&mut self, error: &PeerError) {
        drop(self.release());
        self.stage = Stage::Absent;
        self.reread = false;
        self.next = Some(Instant::now() + self.pause);
        self.pause = self.pause.saturating_mul(2).min(LONGEST_PAUSE);
        let view = self.memory.memory();
        for lane in &mut self.lanes {
            lane.take_back(&view, self.hub.options.epitaph);
        }
        self.hub.lose(error, &*self.notifier);
    }

    /// A question is out, which may take so many times the patience that there is with a peer.
    fn ask(&mut self, what: Question, times: u32) {
        let until = Instant::now() + self.hub.options.patience.saturating_mul(times);
        self.asked = Some(Asked { what, until });
    }

    /// Does with the peer what is to be done next, unless it has a question to answer.
    fn advance(&mut self) -> Result<(), PeerError> {
        if let Some(asked) = &self.asked {
            return if Instant::now() < asked.until {
                Ok(())
            } else {
                Err(PeerError::Silent {
                    patience: self.hub.options.patience,
                })
            };
        }
        let due = self.next.is_none_or(|next| next <= Instant::now());
        match self.stage {
            Stage::Absent if due && !self.draining => self.connect(),
            Stage::Idle if due && !self.draining => self.set_up(),
            Stage::Serving if self.draining && self.is_done() => {
                let queues = self.lanes.iter().map(|lane| lane.index).collect();
                if let Some(session) = &self.session {
                    session.stop(queues);
                }
                self.ask(Question::Stop, 1);
                Ok(())
            }
            Stage::Serving if self.reread => {
                self.reread = false;
                if let Some(session) = &self.session {
                    session.config(self.hub.options.config_len);
                }
                self.ask(Question::Config, 1);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn connect(&mut self) -> Result<(), PeerError> {
        self.next = None;
        let what = "a thread for a peer";
        let host = |source| PeerError::Host { what, source };
        let connector = Arc::clone(&self.hub.connector);
        let wanted = self.hub.wanted(self.features);
        let session = Session::open(&self.hub.name, connector, wanted).map_err(host)?;
        self.adopt(session).map_err(host)?;
        self.ask(Question::Connect, 2);
        Ok(())
    }

    /// Gives the peer rings of its own, empty ones, and has it serve them.
    fn set_up(&mut self) -> Result<(), PeerError> {
        self.next = None;
        let what = "memory for a peer's rings";
        let host = |source| PeerError::Host { what, source };
        let sizes: Vec<u16> = self.lanes.iter().map(|lane| lane.ring.size()).collect();
        let (rings, sides) = RingMemory::new(&sizes).map_err(host)?;
        let mut queues = Vec::new();
        for (at, ring) in sides.into_iter().enumerate() {
            let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
            let (kick, call) = (event().map_err(host)?, event().map_err(host)?);
            let token = QUEUES + 2 * at as u64 + 1;
            self.watch(borrow(&call), EventSet::IN, token)
                .map_err(host)?;
            let Some(lane) = self.lanes.get_mut(at) else {
                continue;
            };
            let (avail, used) = ring.addresses();
            queues.push(QueueSetup {
                index: lane.index,
                size: ring.size(),
                table: lane.table,
                avail,
                used,
                kick: Arc::clone(&kick),
                call: Arc::clone(&call),
            });
            if let Some(old) = lane.peer.replace(PeerSide { ring, kick, call }) {
                self.unwatch(borrow(&old.call));
            }
        }
        let map = self.memory.memory().into_inner();
        if let Some(session) = &self.session {
            session.serve(Setup {
                features: self.hub.features_for_peer(self.features),
                map: Arc::clone(&map),
                rings: Arc::clone(&rings),
                queues,
            });
        }
        self.known = Some((map, rings));
        self.ask(Question::Serve, 1);
        Ok(())
    }

    /// Takes what the session has to say.
    fn hear(&mut self) -> Result<(), PeerError> {
        while let Some(answer) = self.session.as_mut().and_then(Session::answer) {
            let answer = answer?;
            self.asked = None;
            match answer {
                Answer::Connected(offer) => self.welcome(offer)?,
                Answer::Serving => {
                    self.stage = Stage::Serving;
                    self.pause = FIRST_PAUSE;
                    self.hub.found(&*self.notifier);
                }
                Answer::Informed => {}
                Answer::Config(config) => self.show(config),
                Answer::Stopped => self.take_all_back()?,
            }
        }
        Ok(())
    }

    fn welcome(&mut self, offer: Offer) -> Result<(), PeerError> {
        let what = "descriptors for a peer";
        let host = |source| PeerError::Host { what, source };
        self.stage = Stage::Idle;
        if let Some(socket) = self.session.as_ref().and_then(Session::socket) {
            self.watch(socket.as_fd(), EventSet::READ_HANG_UP, HUNG_UP)
                .map_err(host)?;
            self.watched = Some(socket);
        }
        self.show(offer.config);
        self.listen(offer.notes).map_err(host)
    }

    fn show(&self, config: Vec<u8>) {
        if self.hub.set_config(config) {
            self.notifier.config_changed();
        }
    }

    /// Whether the peer need not be waited for any more before a stop.
    fn is_done(&self) -> bool {
        self.heads() == 0 || self.hub.options.nature == Nature::Buffers
    }

    /// The peer serves no queue any more: what it has not used is the driver's again.
    fn take_all_back(&mut self) -> Result<(), PeerError> {
        self.stage = Stage::Idle;
        self.next = None;
        let view = self.memory.memory();
        self.collect(&view)?;
        for lane in &mut self.lanes {
            lane.take_back(&view, None);
        }
        Ok(())
    }

    /// How many requests the peer has.
    fn heads(&self) -> usize {
        self.lanes.iter().map(|lane| lane.in_flight).sum()
    }

    /// Passes on what the peer has done. `true` when there may be more.
    fn collect(&mut self, view: &GuestMap) -> Result<bool, PeerError> {
        let mut more = false;
        for lane in &mut self.lanes {
            let (count, error) = lane.collect(view);
            more |= count >= lane.requests.len();
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            self.hub.completed.fetch_add(count, Ordering::Relaxed);
            if let Err(error) = lane.ring.notify(view) {
                lane.ring.fail(&error);
            }
            if let Some(error) = error {
                return Err(error);
            }
        }
        Ok(more)
    }

    /// Passes on what the driver wants. `true` when there may be more.
    fn submit(&mut self, view: &GuestMap) -> bool {
        let keep = self.hub.options.epitaph.is_some();
        let mut more = false;
        for lane in &mut self.lanes {
            if lane.ring.failed() {
                continue;
            }
            match lane.submit(view, &mut self.chain, &mut self.number, keep) {
                Ok(again) => more |= again,
                Err(error) => lane.ring.fail(&*error),
            }
        }
        more
    }

    /// Has the peer learn of memory that has come or gone. Until it has, it is given nothing.
    fn inform(&mut self, map: &Arc<GuestMap>) {
        if let (Some(session), Some((known, rings))) = (&self.session, &mut self.known) {
            *known = Arc::clone(map);
            session.memory(Arc::clone(map), Arc::clone(rings));
            self.ask(Question::Memory, 1);
        }
    }

    /// One round of everything. `true` when there may be more to do.
    fn work(&mut self, serve: bool) -> Result<bool, PeerError> {
        self.hear()?;
        let view = self.memory.memory();
        let mut more = self.collect(&view)?;
        if serve && self.stage == Stage::Serving {
            let map = self.memory.memory().into_inner();
            let known = self
                .known
                .as_ref()
                .is_some_and(|(known, _)| Arc::ptr_eq(known, &map));
            match &self.asked {
                None if !known => self.inform(&map),
                None => more |= self.submit(&map),
                Some(asked) if asked.what == Question::Config && known => {
                    more |= self.submit(&map);
                }
                Some(_) => {}
            }
        }
        self.advance()?;
        Ok(more)
    }

    /// How long nothing has to be done unless something happens, in milliseconds.
    fn patience(&self) -> i32 {
        let next = self.next.filter(|_| !self.draining);
        let until = self.asked.as_ref().map(|asked| asked.until).or(next);
        let Some(until) = until else {
            return -1;
        };
        let left = until.saturating_duration_since(Instant::now());
        // Not a moment too early.
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX - 1) + 1
    }

    fn sleep(&mut self, timeout: i32) -> io::Result<Result<(), PeerError>> {
        let mut events = [EpollEvent::default(); 16];
        let ready = match self.epoll.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        let mut result = Ok(());
        for event in events.iter().take(ready) {
            match event.data() {
                WAKE => self.wake.reset(),
                // It has been looked at before every sleep, and is again.
                ANSWERED => {}
                HUNG_UP => result = Err(PeerError::Gone),
                NOTED => result = result.and(self.read_notes()),
                token => self.silence(token - QUEUES),
            }
        }
        Ok(result)
    }

    fn silence(&mut self, token: u64) {
        let lane = usize::try_from(token / 2).unwrap_or(usize::MAX);
        match self.lanes.get_mut(lane) {
            Some(lane) if token.is_multiple_of(2) => lane.ring.silence(),
            // It fails only when there is nothing to reset.
            Some(Lane {
                peer: Some(peer), ..
            }) if is_ready(&peer.call, PollFlags::IN) => drop(peer.call.read()),
            _ => {}
        }
    }

    fn read_notes(&mut self) -> Result<(), PeerError> {
        let Some(notes) = &mut self.notes else {
            return Ok(());
        };
        match notes.read() {
            Ok(changed) => self.reread |= changed,
            // It has nothing to say any more; whether it serves is another matter.
            Err(PeerError::Gone) => {
                self.notes = None;
                let socket = self.session.as_ref().and_then(Session::notes).cloned();
                if let Some(socket) = socket {
                    self.unwatch(socket.as_fd());
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

impl QueueWorker for Relay {
    fn turn(&mut self, serve: bool) -> Turn {
        self.draining = !serve;
        let more = self.work(serve).unwrap_or_else(|error| {
            self.lose(&error);
            false
        });
        // A stop is waited for that has come to its end.
        let more = more || self.draining && self.in_flight() == 0;
        let timeout = if more { 0 } else { self.patience() };
        match self.sleep(timeout) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                // What it has done before it went counts.
                let view = self.memory.memory();
                let last = self.collect(&view);
                self.lose(last.as_ref().err().unwrap_or(&error));
            }
            Err(error) => {
                for lane in &mut self.lanes {
                    lane.ring.fail(&error);
                }
                return Turn::Halt;
            }
        }
        Turn::Again
    }

    fn resume(&mut self) {
        if self.draining && self.stage != Stage::Absent {
            self.next = Some(Instant::now() + HOLD);
        }
        self.draining = false;
    }

    fn in_flight(&self) -> usize {
        let connecting = self.stage == Stage::Absent;
        let busy = !connecting && (self.stage == Stage::Serving || self.asked.is_some());
        self.heads() + usize::from(busy)
    }

    fn finish(mut self) -> Vec<StoppedQueue> {
        let quiet = self.stage == Stage::Idle && self.asked.is_none();
        let session = self.release();
        let view = self.memory.memory();
        if quiet {
            *self.hub.idle() = session;
        }
        self.lanes
            .into_iter()
            .map(|mut lane| {
                lane.take_back(&view, None);
                lane.ring.stop([])
            })
            .collect()
    }
}

impl Lane {
    /// Takes at most one ring full of what the peer has returned; tells how many.
    fn collect(&mut self, view: &GuestMap) -> (usize, Option<PeerError>) {
        let Some(peer) = &mut self.peer else {
            return (0, None);
        };
        for count in 0..self.requests.len() {
            let Some(returned) = peer.ring.pop() else {
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

    /// Gives the peer at most one ring full of chains. `true` when there may be more.
    fn submit(
        &mut self,
        view: &GuestMap,
        chain: &mut Chain,
        number: &mut u64,
        keep: bool,
    ) -> Result<bool, Box<dyn std::error::Error>> {
        let Some(peer) = &mut self.peer else {
            return Ok(false);
        };
        self.ring.quiet(view)?;
        let mut given = false;
        let mut result = Ok(true);
        for _ in 0..self.requests.len() {
            match self.ring.take(view, chain) {
                Ok(true) => {}
                Ok(false) => {
                    result = Ok(false);
                    break;
                }
                Err(error) => {
                    result = Err(error.into());
                    break;
                }
            }
            let head = chain.head;
            let free = self.requests.get_mut(usize::from(head));
            let Some(slot) = free.filter(|slot| slot.is_none()) else {
                let queue = self.index;
                result = Err(Doubled { queue, head }.into());
                break;
            };
            if !in_memory(view, chain) {
                let queue = self.index;
                result = Err(Outside { queue, head }.into());
                break;
            }
            *slot = Some(Request {
                number: *number,
                writable: std::mem::take(&mut chain.writable),
                said: if keep { said(view, chain) } else { Vec::new() },
            });
            *number = number.wrapping_add(1);
            self.in_flight += 1;
            peer.ring.push(head);
            given = true;
        }
        if given && peer.ring.publish() {
            // It fails only when the counter is full: then it is readable too. The peer shares it, and may have had it
            // block: a full one is not written to.
            if is_ready(&peer.kick, PollFlags::OUT) {
                let _ = peer.kick.write(1);
            }
        }
        result
    }

    /// Takes the peer's requests from it: they are answered with an epitaph, or to be taken again, first of all and in
    /// the order in which they came.
    fn take_back(&mut self, view: &GuestMap, epitaph: Option<Epitaph>) {
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
