//! Post-copy: the guest runs here, and memory of it comes.
//!
//! Who loads or runs the guest may wait for a page, so that pages are never brought by the thread that has that done: each connection has one that reads,
//! another one hears who waits and asks for pages, and a third one takes connections in the place of one that was lost. Words wait until the taker hears them.
//!
//! Whatever is lost before COMMIT frees all who wait: the guest never runs here then. Afterwards they wait until a source comes again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use migration::pages::PageSet;
use migration::transport::channel::{Incoming, StreamReceiver, StreamSender};
use migration::transport::frame::Kind;
use migration::transport::message::{Capabilities, Message};
use migration::transport::pages::{Codec, Run};
use migration::transport::protocol::{DestinationEvent, DestinationState};

use super::{ALIVE, Ended, Link, Listener, NoMemory, Shared, Taker, Timed};
use crate::error::chain;
use crate::memory::missing::Missing;
use crate::sandbox::{self, Builder};

/// How many words may wait to be heard. A source says one and waits for the answer; who says more is hung up on.
const WORDS: usize = 64;
/// How long is waited for somebody who wants pages before it is looked whether all are here.
const LOOK: Duration = Duration::from_millis(100);
/// How often it is tried to let a guest go on whose processors wait for pages still.
const RETRY: Duration = Duration::from_millis(20);
/// The bytes of a page.
const PAGE: u64 = 4096;

/// What the taker hears.
enum Event {
    /// Over which connection.
    Came(u32, Incoming),
    Lost(u32, String),
    /// Another connection of the same session.
    Connected(u32, Link),
    /// It is to look what there is to do.
    Look,
}

/// What all threads know of memory that follows.
pub(super) struct Follows {
    ranges: Vec<(u64, u64)>,
    /// What the source has said that will follow.
    told: Mutex<PageSet>,
    missing: Mutex<Option<Arc<Missing>>>,
    /// The connection that counts, and its number.
    current: Mutex<Option<Link>>,
    connection: AtomicU32,
    /// Ends with who reads from it.
    reads: Mutex<Option<Receiver<()>>>,
    /// Who is told that all is here.
    taker: Mutex<Option<SyncSender<Event>>>,
    /// The source has been told that its state is loaded, so that it may say COMMIT.
    ready: AtomicBool,
    /// It has been: from then on the guest may run here, whatever is lost.
    committed: AtomicBool,
    /// A state waits to be heard; it may be long.
    state: AtomicBool,
    /// Nothing follows any more.
    over: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Follows {
    pub fn new(ranges: &[(u64, u64)]) -> Self {
        Self {
            ranges: ranges.to_vec(),
            told: Mutex::new(PageSet::new(ranges)),
            missing: Mutex::default(),
            current: Mutex::default(),
            connection: AtomicU32::new(0),
            reads: Mutex::default(),
            taker: Mutex::default(),
            ready: AtomicBool::new(false),
            committed: AtomicBool::new(false),
            state: AtomicBool::new(false),
            over: AtomicBool::new(false),
        }
    }

    fn missing(&self) -> Option<Arc<Missing>> {
        locked(&self.missing).clone()
    }

    fn is_committed(&self) -> bool {
        self.committed.load(Ordering::SeqCst)
    }

    /// The source hears next that its state is loaded, or that it is no more.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::SeqCst);
    }

    /// Another stream is lost: what was to come over it comes over another connection. Later ones have no others.
    pub fn lose_streams(&self) {
        let current = locked(&self.current);
        let is_first = self.connection.load(Ordering::SeqCst) == 0;
        if is_first && self.missing().is_some_and(|missing| missing.left() > 0) {
            current.iter().for_each(Link::hang_up);
        }
    }

    /// Waits a while until all is heard that has come over the connection that counts: a COMMIT that a source said before it was cut off is not lost with it.
    fn hear_out(&self) {
        let current = locked(&self.current).clone();
        current.iter().for_each(Link::stop_reading);
        if let Some(reads) = locked(&self.reads).take() {
            // It has ended, or the time has: who is hung up on then ends soon.
            let _ended = reads.recv_timeout(ALIVE);
        }
    }

    /// The guest never runs on what has come: nobody waits for the rest.
    pub fn forget(&self) {
        if !self.is_committed()
            && let Some(missing) = self.missing()
        {
            missing.give_up();
        }
    }

    /// The guest never runs.
    pub fn give_up(&self) {
        self.missing().iter().for_each(|missing| missing.give_up());
    }

    fn is_whole(&self) -> bool {
        self.missing().is_none_or(|missing| missing.left() == 0)
    }
}

impl Shared {
    /// Has a thread [read](Shared::read).
    fn begin_to_read(
        shared: &Arc<Self>,
        connection: u32,
        receiver: StreamReceiver<Timed>,
        to: &SyncSender<Event>,
    ) -> std::io::Result<()> {
        let (ends, reads) = sync_channel(0);
        *locked(&shared.follows.reads) = Some(reads);
        let (shared, to) = (Arc::clone(shared), to.clone());
        let read = move || {
            // Dropped at its end.
            let _ends: SyncSender<()> = ends;
            shared.read(connection, receiver, &to);
        };
        let thread = Builder::new(sandbox::Kind::Stream).name("migration-read".to_owned());
        thread.spawn(read).map(drop)
    }

    /// Reads what comes over a connection until it ends.
    fn read(&self, connection: u32, mut receiver: StreamReceiver<Timed>, to: &SyncSender<Event>) {
        let reason = loop {
            match receiver.next(&*self.memory, &self.status.progress) {
                Ok(Incoming::Keepalive) => {}
                Ok(Incoming::RoundEnd(round)) => {
                    if let Err(error) = self.round_end(0, round) {
                        break chain(&error);
                    }
                }
                Ok(Incoming::Missing(runs)) => {
                    let follows = &self.follows;
                    let mut told = locked(&follows.told);
                    for run in runs {
                        told.insert(&follows.ranges, run.address, run.len());
                    }
                }
                Ok(incoming) => {
                    if let Err(reason) = self.pass_on(connection, incoming, to) {
                        break reason;
                    }
                }
                Err(error) => break chain(&error),
            }
        };
        let current = locked(&self.follows.current);
        let counts = self.follows.connection.load(Ordering::SeqCst) == connection;
        if counts && let Some(missing) = self.follows.missing() {
            missing.set_lost(true);
        }
        drop(current);
        if counts {
            self.follows.forget();
        }
        // Where the taker has no room, it finds out when it says something.
        let _ = to.try_send(Event::Lost(connection, reason));
    }

    /// Lets the taker know. It may be waiting for pages itself, so that nobody waits for it.
    fn pass_on(
        &self,
        connection: u32,
        incoming: Incoming,
        to: &SyncSender<Event>,
    ) -> Result<(), String> {
        let follows = &self.follows;
        match &incoming {
            Incoming::State { .. } if follows.state.swap(true, Ordering::SeqCst) => {
                return Err("it sends a second state before the first has been heard".to_owned());
            }
            // Before anything else can be heard: a connection that ends right behind it frees nobody who waits for pages.
            Incoming::Message(Message::Commit { .. }) if follows.ready.load(Ordering::SeqCst) => {
                follows.committed.store(true, Ordering::SeqCst);
            }
            // Who loads the state before is to come to an end.
            Incoming::Message(Message::Continue | Message::Abort { .. }) => follows.forget(),
            Incoming::Want(_) => return Err("it asks for pages, which are its own".to_owned()),
            _ => {}
        }
        to.try_send(Event::Came(connection, incoming))
            .map_err(|error| match error {
                TrySendError::Full(_) => "it says more than it is asked".to_owned(),
                TrySendError::Disconnected(_) => "nobody hears it any more".to_owned(),
            })
    }

    /// Asks for what somebody waits for, until all is here.
    fn ask_for_pages(&self, missing: &Missing) {
        while missing.left() > 0 && !self.follows.over.load(Ordering::SeqCst) {
            match missing.wait(LOOK) {
                Ok(wanted) => self.ask(&wanted),
                Err(error) => {
                    tracing::error!("it is not known which pages the guest waits for: {error}");
                    break;
                }
            }
        }
        // Who has much to hear looks by itself.
        let taker = locked(&self.follows.taker).clone();
        taker
            .into_iter()
            .for_each(|to| drop(to.try_send(Event::Look)));
    }

    fn ask(&self, wanted: &[u64]) {
        let run = |address: &u64| Run {
            address: *address,
            pages: 1,
        };
        let runs: Vec<Run> = wanted.iter().map(run).collect();
        if runs.is_empty() {
            return;
        }
        // Over the next connection it is asked again.
        let _lost = self.answers().list(Kind::Want, &runs);
    }
}

/// Takes connections in the place of one that was lost.
struct Door<'a> {
    shared: &'a Arc<Shared>,
    listener: &'a Listener,
    session: [u8; 16],
    to: SyncSender<Event>,
}

impl Door<'_> {
    fn keep(&self) {
        while !self.shared.follows.over.load(Ordering::SeqCst) {
            let deadline = Instant::now() + ALIVE;
            match self.listener.accept(Some(deadline)) {
                Ok(Some(link)) => {
                    if let Err(error) = self.welcome(&link) {
                        tracing::info!("who connects beside a migration: {error}");
                        link.hang_up();
                    }
                }
                // Somebody wants nobody to come any more.
                Ok(None) if Instant::now() < deadline => return,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("no connection in the place of one that is lost: {error}");
                    // The host may have room again.
                    if self.shared.status.wait_for_end(ALIVE) {
                        return;
                    }
                }
            }
        }
    }

    fn welcome(&self, link: &Link) -> Result<(), String> {
        let told = |error| chain(&error);
        let follows = &self.shared.follows;
        let (timed, limit) = Timed::greeting(link);
        let (preamble, mut receiver) = StreamReceiver::open(timed).map_err(told)?;
        let mut sender = StreamSender::answer(link.clone(), Codec::Raw, 0).map_err(told)?;
        let progress = &self.shared.status.progress;
        let first = receiver.next(&NoMemory, progress).map_err(told)?;
        if first != Incoming::Message(Message::Query) {
            return Err("it asks for nothing".to_owned());
        }
        if preamble.session != self.session || !preamble.again || preamble.stream != 0 {
            sender.message(&Message::Unknown).map_err(told)?;
            return Err("it asks for another machine".to_owned());
        }
        limit.lift(link)?;
        receiver.set_ranges(&follows.ranges);
        follows.hear_out();
        // Who writes to the old one ends.
        let mut current = locked(&follows.current);
        let connection = follows.connection.fetch_add(1, Ordering::SeqCst);
        let connection = connection.wrapping_add(1);
        let old = current.replace(link.clone());
        follows.missing().iter().for_each(|m| m.set_lost(false));
        drop(current);
        old.iter().for_each(Link::hang_up);
        *self.shared.answers() = sender;
        let full = |_| "it comes too often".to_owned();
        let connected = Event::Connected(connection, link.clone());
        self.to.try_send(connected).map_err(full)?;
        let asked = Event::Came(connection, first);
        self.to.try_send(asked).map_err(full)?;
        if let Some(missing) = follows.missing() {
            self.shared.ask(&missing.awaited());
        }
        let started = Shared::begin_to_read(self.shared, connection, receiver, &self.to);
        started.map_err(|error| {
            follows.missing().iter().for_each(|m| m.set_lost(true));
            error.to_string()
        })
    }
}

impl Taker {
    /// Hears the source until nothing follows.
    pub(super) fn receive_all(
        &mut self,
        mut receiver: StreamReceiver<Timed>,
        listener: &Listener,
    ) -> Ended {
        if self.capabilities.has(Capabilities::POSTCOPY) {
            self.receive_apart(receiver, listener)
        } else {
            self.receive(&mut receiver)
        }
    }

    pub(super) fn stand(&mut self) -> Option<DestinationEvent> {
        self.resuming = false;
        self.guest.stand();
        None
    }

    pub(super) fn go_on(&mut self) -> Option<DestinationEvent> {
        self.resuming = !self.guest.go_on();
        None
    }

    /// As [`Taker::receive`], where memory may follow the guest.
    fn receive_apart(&mut self, receiver: StreamReceiver<Timed>, listener: &Listener) -> Ended {
        let (to, events) = sync_channel(WORDS);
        let shared = Arc::clone(&self.shared);
        *locked(&shared.follows.current) = Some(self.link.clone());
        *locked(&shared.follows.taker) = Some(to.clone());
        if let Err(error) = Shared::begin_to_read(&shared, 0, receiver, &to) {
            self.because(format!("no thread that reads: {error}"));
            self.step(DestinationEvent::Failed);
            return Ended::Heard;
        }
        let door = Door {
            shared: &shared,
            listener,
            session: self.preamble.session,
            to: to.clone(),
        };
        let ended = std::thread::scope(|scope| {
            let keeper = Builder::new(sandbox::Kind::Job).name("migration-door".to_owned());
            let kept = keeper.spawn_scoped(scope, || door.keep());
            if let Err(error) = kept {
                tracing::warn!("no connection can come in the place of one that is lost: {error}");
            }
            let ended = self.hear(&events);
            shared.follows.over.store(true, Ordering::SeqCst);
            ended
        });
        if ended == Ended::Unheard {
            // One that has come meanwhile has not been heard: it is to come again.
            locked(&shared.follows.current)
                .take()
                .iter()
                .for_each(Link::hang_up);
        }
        ended
    }

    /// Hears until nothing follows, or the source may ask what became of its guest.
    fn hear(&mut self, events: &Receiver<Event>) -> Ended {
        let mut connection = 0;
        let mut since = Instant::now();
        loop {
            let state = self.destination.state();
            if state == DestinationState::Failed {
                return if self.ready && !self.aborted {
                    Ended::Unheard
                } else {
                    Ended::Heard
                };
            }
            if state == DestinationState::GivingBack {
                // It is not known whether they have been given back: nobody is told anything, and the machine ends.
                self.shared.follows.give_up();
                return Ended::Unheard;
            }
            if state == DestinationState::Running && self.broken && since.elapsed() >= ALIVE {
                return Ended::Unheard;
            }
            let time = if self.resuming { RETRY } else { ALIVE };
            match events.recv_timeout(time) {
                Ok(Event::Came(from, incoming)) if from == connection => {
                    if let Some(ended) = self.on_came(incoming) {
                        return ended;
                    }
                }
                Ok(Event::Lost(from, reason)) if from == connection => {
                    since = Instant::now();
                    self.on_lost_apart(&reason);
                }
                Ok(Event::Connected(number, link)) => {
                    if !self.broken {
                        self.on_lost_apart("another one has come in its place");
                    }
                    connection = number;
                    self.link = link;
                    self.broken = false;
                }
                // Of a connection that is gone, or nothing new.
                _ => {}
            }
            self.look();
        }
    }

    /// What has changed without a word.
    fn look(&mut self) {
        if self.resuming {
            self.resuming = !self.guest.go_on();
            if !self.resuming && self.destination.state() == DestinationState::Running {
                self.guest.is_whole();
            }
        }
        let follows = matches!(
            self.destination.state(),
            DestinationState::Postcopy | DestinationState::PostcopyLost
        );
        if follows {
            let left = self
                .shared
                .follows
                .missing()
                .map_or(0, |missing| missing.left());
            self.shared.status.progress.set_remaining(left);
            if self.shared.follows.is_whole() {
                self.step(DestinationEvent::PagesComplete);
                self.guest.is_whole();
            }
        }
    }

    fn on_came(&mut self, incoming: Incoming) -> Option<Ended> {
        let running = self.destination.state() == DestinationState::Running;
        match incoming {
            Incoming::State {
                attempt,
                round,
                postcopy,
                sections,
            } => {
                self.shared.follows.state.store(false, Ordering::SeqCst);
                self.postcopy = postcopy;
                self.on_state(attempt, round, sections);
            }
            Incoming::Message(Message::Bye) if running => return Some(Ended::Heard),
            Incoming::Message(Message::Bye) => {
                self.because("the source takes its leave before the guest runs here");
                self.step(DestinationEvent::Failed);
            }
            Incoming::Message(message) => {
                self.on_message(&message);
            }
            // They are heard by whoever reads.
            Incoming::RoundEnd(_)
            | Incoming::Keepalive
            | Incoming::Missing(_)
            | Incoming::Want(_) => {}
        }
        None
    }

    fn on_lost_apart(&mut self, reason: &str) {
        let note = format!("the connection to the source is lost: {reason}");
        let cancelled = self.shared.status.is_cancelled();
        self.broken = !cancelled;
        if !self.shared.follows.is_committed() {
            if cancelled {
                self.step(DestinationEvent::Cancel);
            } else {
                self.because(note);
            }
            return self.step(DestinationEvent::Lost);
        }
        // Also where only this side hears nothing more.
        self.broken = true;
        self.link.hang_up();
        self.links.drain(..).for_each(|link| link.hang_up());
        self.step(DestinationEvent::Lost);
        if self.destination.state() == DestinationState::PostcopyLost {
            tracing::warn!("the guest waits for memory: {note}");
            self.shared.status.note(Some(note));
        }
    }

    /// Has memory be missing, where the state that is loaded now is one for post-copy.
    pub(super) fn begin_to_miss(&mut self) -> Result<(), String> {
        let follows = &self.shared.follows;
        let ranges = &follows.ranges;
        let told = std::mem::replace(&mut *locked(&follows.told), PageSet::new(ranges));
        if !self.postcopy {
            return Ok(());
        }
        let missing = self.guest.miss(&told.runs(ranges))?;
        *locked(&follows.missing) = Some(Arc::clone(&missing));
        let shared = Arc::clone(&self.shared);
        let ask = move || shared.ask_for_pages(&missing);
        let started = Builder::new(sandbox::Kind::Stream)
            .name("migration-want".to_owned())
            .spawn(ask);
        started.map(drop).map_err(|error| error.to_string())
    }

    /// Over another connection the source is told what has not come, before it hears that the guest runs.
    pub(super) fn tell_missing(&mut self) {
        let follows = &self.shared.follows;
        if follows.connection.load(Ordering::SeqCst) == 0 {
            return;
        }
        let Some(missing) = follows.missing() else {
            return;
        };
        let run = |(address, len): (u64, u64)| Run {
            address,
            pages: u32::try_from(len / PAGE).unwrap_or(u32::MAX),
        };
        let runs: Vec<Run> = missing.runs().into_iter().map(run).collect();
        self.shared.status.note(None);
        // Whoever reads hears of it, too.
        let _lost = self.shared.answers().list(Kind::Missing, &runs);
    }
}
