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
//!
//! A worker without queues keeps the connection of a device that nobody uses: it hears when the peer goes, and has
//! another connection when the device is used again.
//!
//! # What the peer shares
//!
//! The eventfds of a queue are open files of the peer's too, and may block. The one for calls is never read: the
//! place where the worker sleeps tells each call once. The one for kicks is never written to: see `bells`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PeerError;
use super::backoff::Backoff;
use super::bells::Bells;
use super::front::{Epitaph, Hub, Nature};
use super::lane::{Events, Lane, Taker};
use super::notes::Notes;
use super::record::Record;
use super::rings::{PeerRing, RingMemory};
use super::session::{Answer, Offer, QueueSetup, Session, Setup};
use crate::device::{ActivateError, Activation, Notifier, StoppedQueue};
use crate::memory::{GuestMap, GuestMemory};
use crate::ring::Chain;
use crate::worker::{QueueWorker, Turn, Wake, borrow};

/// What an event is of; queues follow, two for each.
const WAKE: u64 = 0;
const ANSWERED: u64 = 1;
const HUNG_UP: u64 = 2;
const NOTED: u64 = 3;
const DOOR: u64 = 4;
const QUEUES: u64 = 5;

/// How long the peer stays stopped after a stop that was given up: who gives up usually asks again at once.
const HOLD: Duration = Duration::from_millis(50);

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
    Enable,
    Announce,
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
    /// The peer's own record of what it has, where it keeps one.
    record: Option<Arc<Record>>,
    /// The rings and the record are its predecessor's, and nothing has come of them yet.
    inherited: bool,
    /// Configuration space is to be asked for.
    reread: bool,
    /// How many queues the peer has been told to serve.
    served: u16,
    /// When to connect again, or to take a stopped peer into use again.
    backoff: Backoff,
    bells: Bells,
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
        let lanes = queues.into_iter();
        let lanes = lanes.map(|queue| Lane::new(queue, features, &notifier));
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
            record: None,
            inherited: false,
            reread: false,
            served: 0,
            backoff: Backoff::new(),
            bells: Bells::default(),
            draining: false,
            number: 0,
            hub,
        };
        relay.watch_own().map_err(failed)?;
        relay.hub.set_wake(wake);
        let idle = relay.hub.idle().take();
        let wanted = relay.hub.wanted(features);
        if let Some(session) = idle.filter(|session| session.suits(&wanted)) {
            relay.stage = Stage::Idle;
            let notes = session.notes().cloned();
            relay.adopt(session).map_err(failed)?;
            relay.listen(notes).map_err(failed)?;
        }
        Ok(relay)
    }

    fn watch_own(&self) -> io::Result<()> {
        self.watch(self.wake.fd(), EventSet::IN, WAKE)?;
        if let Some(door) = self.hub.way.door() {
            // Told once for each that comes: while one peer is there, others wait.
            self.watch(door.fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, DOOR)?;
        }
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
        self.session = Some(session);
        self.watch_socket()
    }

    /// Watches the socket for its end, as soon as there is one.
    fn watch_socket(&mut self) -> io::Result<()> {
        let socket = self.session.as_ref().and_then(Session::socket);
        if let Some(socket) = socket.filter(|_| self.watched.is_none()) {
            self.watch(socket.as_fd(), EventSet::READ_HANG_UP, HUNG_UP)?;
            self.watched = Some(socket);
        }
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
        for at in 0..self.lanes.len() {
            if let Some(old) = self.lanes.get_mut(at).and_then(|lane| lane.events.take()) {
                self.unwatch(borrow(&old.call));
            }
        }
        Some(session)
    }

    /// The peer is gone, or is sent away: its requests are made again, unless its successor will know what is left to do.
    fn lose(&mut self, error: &PeerError) {
        let view = self.memory.memory();
        // What it has done before it went counts.
        let last = self.collect(&view);
        let asked = self.asked.as_ref().map(|asked| asked.what);
        let had_rings = self.stage == Stage::Serving || asked == Some(Question::Serve);
        // One that was sent away may be at work still; and what a successor has ended with may be the cause.
        let leaves = !had_rings || matches!(error, PeerError::Gone) && !self.inherited;
        drop(self.release());
        self.stage = Stage::Absent;
        self.reread = false;
        self.backoff.lost(self.hub.now());
        if self.record.is_none() || last.is_err() || !leaves {
            self.take_all_back(&view, self.hub.options.epitaph);
        }
        let error = last.as_ref().err().unwrap_or(error);
        self.hub.lose(error, &*self.notifier);
    }

    /// Takes all requests from the peer, and what it or its successor would know of them.
    fn take_all_back(&mut self, view: &GuestMap, epitaph: Option<Epitaph>) {
        self.record = None;
        self.known = None;
        for lane in &mut self.lanes {
            lane.take_back(view, epitaph);
            lane.rings = None;
        }
    }

    /// A question is out, which may take so many times the patience that there is with a peer.
    fn ask(&mut self, what: Question, times: u32) {
        let until = self.hub.now() + self.hub.options.patience.saturating_mul(times);
        self.asked = Some(Asked { what, until });
    }

    /// Does with the peer what is to be done next, unless it has a question to answer.
    fn advance(&mut self) -> Result<(), PeerError> {
        if let Some(asked) = &self.asked {
            return if self.hub.now() < asked.until {
                Ok(())
            } else {
                Err(PeerError::Silent {
                    patience: self.hub.options.patience,
                })
            };
        }
        let due = self.backoff.is_due(self.hub.now());
        match self.stage {
            Stage::Absent if due && !self.draining => self.connect(),
            Stage::Idle if due && !self.draining && !self.lanes.is_empty() => self.set_up(),
            Stage::Serving if self.draining && self.is_done() => {
                let queues = self.lanes.iter().map(|lane| lane.index).collect();
                if let Some(session) = &self.session {
                    session.stop(queues);
                }
                self.ask(Question::Stop, 1);
                Ok(())
            }
            Stage::Serving if self.served != self.hub.served() => {
                self.steer();
                Ok(())
            }
            Stage::Idle | Stage::Serving if self.reread && !self.draining => {
                self.reread = false;
                if let Some(session) = &self.session {
                    session.config(self.hub.options.config_len);
                }
                self.ask(Question::Config, 1);
                Ok(())
            }
            Stage::Serving if !self.draining => {
                self.announce();
                Ok(())
            }
            Stage::Idle | Stage::Absent | Stage::Serving => Ok(()),
        }
    }

    /// Has the peer tell the network where the guest is, where the guest does not do so itself.
    fn announce(&mut self) {
        let able = |session: &&Session| session.abilities().announces;
        let Some(session) = self.session.as_ref().filter(able) else {
            return;
        };
        if let Some(address) = self.hub.take_address() {
            session.announce(address);
            self.ask(Question::Announce, 1);
        }
    }

    /// Has the peer serve as many queues as the device is to have.
    fn steer(&mut self) {
        let (before, served) = (self.served, self.hub.served());
        let indexes = self.lanes.iter().map(|lane| lane.index);
        let changed = indexes.filter(|index| (*index < before) != (*index < served));
        let changed = changed.map(|index| (index, index < served)).collect();
        if let Some(session) = &self.session {
            session.enable(changed);
        }
        self.served = served;
        self.ask(Question::Enable, 1);
    }

    fn connect(&mut self) -> Result<(), PeerError> {
        self.backoff.forget();
        let what = "a thread for a peer";
        let host = |source| PeerError::Host { what, source };
        // Whoever is still to come wakes this up.
        let Some(connector) = self.hub.way.lead().map_err(host)? else {
            return Ok(());
        };
        let wanted = self.hub.wanted(self.features);
        let session = Session::open(&self.hub.name, connector, wanted).map_err(host)?;
        self.adopt(session).map_err(host)?;
        self.ask(Question::Connect, 2);
        Ok(())
    }

    /// Gives the peer rings of its own, and has it serve them: empty ones, or those of its predecessor.
    fn set_up(&mut self) -> Result<(), PeerError> {
        self.backoff.forget();
        let what = "memory for a peer's rings";
        let host = |source| PeerError::Host { what, source };
        let map = self.memory.memory().into_inner();
        let rings = match self.inherit(&map) {
            Some(rings) => rings,
            None => self.new_rings(&map).map_err(host)?,
        };
        self.served = self.hub.served();
        let mut queues = Vec::new();
        for at in 0..self.lanes.len() {
            queues.extend(self.set_up_lane(at).map_err(host)?);
        }
        if let Some(session) = &self.session {
            session.serve(Setup {
                features: self.hub.features_for_peer(self.features),
                map: Arc::clone(&map),
                rings: Arc::clone(&rings),
                queues,
                record: self.record.clone(),
            });
        }
        self.known = Some((map, rings));
        self.ask(Question::Serve, 1);
        Ok(())
    }

    /// The rings that the last peer has left as they must be, if this one goes on with its record. Once only: a peer that ends with
    /// them may do so because of what is in them.
    fn inherit(&mut self, map: &Arc<GuestMap>) -> Option<Arc<RingMemory>> {
        self.record.as_ref()?;
        let able = self.session.as_ref()?.abilities().records;
        let (known, rings) = self.known.as_ref()?;
        // Chains are checked when they are given to a peer: they may lead to memory that is not there any more.
        let parts = || self.lanes.iter().map(|lane| lane.rings.as_ref());
        let sound = || parts().all(|part| part.is_some_and(PeerRing::is_sound));
        let fits = able && Arc::ptr_eq(known, map) && sound();
        self.inherited = fits;
        if fits {
            parts().flatten().for_each(PeerRing::renew);
        }
        fits.then(|| Arc::clone(rings))
    }

    /// Makes empty rings for all queues.
    fn new_rings(&mut self, view: &GuestMap) -> io::Result<Arc<RingMemory>> {
        self.take_all_back(view, None);
        self.inherited = false;
        let sizes: Vec<u16> = self.lanes.iter().map(|lane| lane.ring.size()).collect();
        let (rings, parts) = RingMemory::new(&sizes)?;
        for (lane, part) in self.lanes.iter_mut().zip(parts) {
            lane.rings = Some(part);
        }
        Ok(rings)
    }

    /// Makes the eventfds of a queue, and tells what the peer is to know of it.
    fn set_up_lane(&mut self, at: usize) -> io::Result<Option<QueueSetup>> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new);
        let (kick, call) = (event()?, event()?);
        let token = QUEUES + 2 * at as u64 + 1;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.watch(borrow(&call), events, token)?;
        let Some(lane) = self.lanes.get_mut(at) else {
            return Ok(None);
        };
        let (new, index, table) = (Arc::clone(&call), lane.index, lane.table);
        let old = lane.events.replace(Events {
            kick: Arc::clone(&kick),
            call: new,
        });
        let setup = lane.rings.as_ref().map(|rings| {
            let (avail, used) = rings.addresses();
            QueueSetup {
                index,
                size: rings.size(),
                table,
                avail,
                used,
                base: rings.returned(),
                kick,
                call,
                enabled: index < self.served,
            }
        });
        if let Some(old) = old {
            self.unwatch(borrow(&old.call));
        }
        Ok(setup)
    }

    /// The peer serves. What its predecessor has left it looks for when it is kicked.
    fn begin(&mut self, record: Option<Arc<Record>>) -> Result<(), PeerError> {
        self.record = record;
        self.stage = Stage::Serving;
        for lane in self.lanes.iter().filter(|lane| lane.in_flight() > 0) {
            if let Some(events) = &lane.events {
                ring(&mut self.bells, &events.kick)?;
            }
        }
        self.backoff.found(self.hub.now());
        self.hub.found(&*self.notifier);
        Ok(())
    }

    /// Takes what the session has to say.
    fn hear(&mut self) -> Result<(), PeerError> {
        while let Some(answer) = self.session.as_mut().and_then(Session::answer) {
            let answer = answer?;
            self.asked = None;
            match answer {
                Answer::Connected(offer) => self.welcome(offer)?,
                Answer::Serving(record) => self.begin(record)?,
                Answer::Informed | Answer::Enabled | Answer::Announced => {}
                Answer::Config(config) => self.show(config),
                Answer::Stopped => self.halt()?,
            }
        }
        Ok(())
    }

    fn welcome(&mut self, offer: Offer) -> Result<(), PeerError> {
        let what = "descriptors for a peer";
        let host = |source| PeerError::Host { what, source };
        self.stage = Stage::Idle;
        self.watch_socket().map_err(host)?;
        if let Some(session) = &mut self.session {
            session.keep_abilities(offer.abilities);
        }
        self.show(offer.config);
        self.listen(offer.notes).map_err(host)?;
        if self.lanes.is_empty() {
            self.backoff.found(self.hub.now());
            self.hub.found(&*self.notifier);
        }
        Ok(())
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
    fn halt(&mut self) -> Result<(), PeerError> {
        self.stage = Stage::Idle;
        self.backoff.forget();
        let view = self.memory.memory();
        self.collect(&view)?;
        self.record = None;
        for lane in &mut self.lanes {
            lane.take_back(&view, None);
        }
        Ok(())
    }

    /// How many requests the peer has.
    fn heads(&self) -> usize {
        self.lanes.iter().map(Lane::in_flight).sum()
    }

    /// Passes on what the peer has done. `true` when there may be more.
    fn collect(&mut self, view: &GuestMap) -> Result<bool, PeerError> {
        let mut more = false;
        for lane in &mut self.lanes {
            let (count, error) = lane.collect(view);
            more |= count >= lane.round();
            if count > 0 {
                self.backoff.serves();
                self.inherited = false;
            }
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
    fn submit(&mut self, view: &GuestMap) -> Result<bool, PeerError> {
        let keep = self.hub.options.epitaph.is_some();
        let mut more = false;
        let memory = &self.memory;
        // A driver may use memory as soon as it is there, which may be after the look at it.
        let stale = || !std::ptr::eq(&*memory.memory(), view);
        for lane in &mut self.lanes {
            if lane.ring.failed() {
                continue;
            }
            let mut taker = Taker {
                chain: &mut self.chain,
                number: &mut self.number,
                keep,
                stale: &stale,
            };
            let submitted = lane.submit(view, &mut taker);
            if let Some(events) = lane.events.as_ref().filter(|_| submitted.kick) {
                ring(&mut self.bells, &events.kick)?;
            }
            match submitted.more {
                Ok(again) => more |= again,
                Err(error) => lane.ring.fail(&*error),
            }
        }
        Ok(more)
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
                None => more |= self.submit(&map)?,
                Some(Asked {
                    what: Question::Config | Question::Enable | Question::Announce,
                    ..
                }) if known => {
                    more |= self.submit(&map)?;
                }
                Some(_) => {}
            }
        }
        self.advance()?;
        Ok(more)
    }

    /// How long nothing has to be done unless something happens, in milliseconds.
    fn patience(&self) -> i32 {
        let next = self.backoff.next().filter(|_| !self.draining);
        let until = self.asked.as_ref().map(|asked| asked.until).or(next);
        let Some(until) = until else {
            return -1;
        };
        let left = until.saturating_duration_since(self.hub.now());
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
                ANSWERED | DOOR => {}
                HUNG_UP => result = Err(PeerError::Gone),
                NOTED => result = result.and(self.read_notes()),
                token => self.silence(token - QUEUES),
            }
        }
        Ok(result)
    }

    /// A doorbell is reset. What the peer calls by is left as it is.
    fn silence(&mut self, token: u64) {
        let lane = usize::try_from(token / 2).unwrap_or(usize::MAX);
        let lane = self.lanes.get_mut(lane);
        if let Some(lane) = lane.filter(|_| token.is_multiple_of(2)) {
            lane.ring.silence();
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

fn ring(bells: &mut Bells, kick: &EventFd) -> Result<(), PeerError> {
    let what = "memory for a kick";
    let rung = bells.ring(kick);
    rung.map_err(|source| PeerError::Host { what, source })
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
            Ok(Err(error)) => self.lose(&error),
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
            self.backoff.hold(self.hub.now(), HOLD);
        }
        self.draining = false;
    }

    fn in_flight(&self) -> usize {
        // Without a queue nothing is waited for.
        let idle = self.stage == Stage::Absent || self.lanes.is_empty();
        let busy = !idle && (self.stage == Stage::Serving || self.asked.is_some());
        // What a peer that is gone has left is not waited for.
        if busy { self.heads() + 1 } else { 0 }
    }

    fn finish(mut self) -> Vec<StoppedQueue> {
        let quiet = self.stage == Stage::Idle && self.asked.is_none();
        let session = self.release();
        let view = self.memory.memory();
        // Whoever has left its rings to a successor may have used them last.
        let _ = self.collect(&view);
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
