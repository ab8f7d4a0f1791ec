//! The side that takes the machine: first a thread that waits for an offer ([`wait`]), and once the machine is built from that, one that takes memory and state
//! into it ([`take`]), which owns the protocol's [`Destination`] and does what it says.
//!
//! Each stream has a thread that writes pages where they belong; the first stream's hears words, too. The machine itself is the control thread's
//! ([`Arriving`]).

mod greeting;
mod postcopy;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::wire::MigrationPhase;
use migration::transport::channel::{
    Barrier, ChannelError, Incoming, Progress, StreamReceiver, StreamSender,
};
use migration::transport::compare::Difference;
use migration::transport::frame::Preamble;
use migration::transport::message::{Capabilities, Disks, Message, Offer};
use migration::transport::pages::{Codec, PageSink};
use migration::transport::protocol::{
    Destination, DestinationAction, DestinationEvent, DestinationState, Locks, Word,
};
use migration::transport::samples::Samples;

use self::greeting::{Greeting, Timed, greet, handed_over};
use self::postcopy::Follows;
use super::link::{Link, PATIENCE};
use super::listener::Listener;
use super::memory::NoMemory;
use super::status::Status;
use super::storage::coming::Landings;
use crate::error::chain;
use crate::memory::missing::Missing;
use crate::sandbox::{Builder, Kind};

/// How often a source hears that this side is alive, and progress is told.
const ALIVE: Duration = Duration::from_secs(1);
/// How long a source that has not heard what became of the guest can ask.
const ANSWERING: Duration = Duration::from_secs(600);
/// After so long a source of which nothing comes is taken for lost: it may pause its guest, and write out its disks, meanwhile.
const SILENCE: Duration = Duration::from_secs(120);

/// Why no machine came.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// Somebody has wanted the end of it.
    #[error("it was cancelled")]
    Cancelled,
    /// None has come in time.
    #[error("no machine has come in time")]
    Late,
    /// Nobody can connect any more.
    #[error("it cannot be waited for a source any longer")]
    Listen(#[source] io::Error),
    /// The only connection that comes brings none.
    #[error("no machine came over the connection, which is the only one here (exec:, fd:): {0}")]
    Only(String),
}

/// The machine, as who takes it sees it. Each call may wait for the control thread; an error names what failed, or that the machine has ended.
pub trait Arriving: Send {
    /// Its memory, which reads as zeros before anything is written to it.
    fn memory(&self) -> Arc<dyn PageSink + Send + Sync>;

    /// Puts this state into it: the bytes of sections, which are not trusted. What locks will tell of the disks.
    ///
    /// # Errors
    ///
    /// Why it is not its state.
    fn load(&mut self, sections: &[u8]) -> Result<Locks, String>;

    /// Has pages be missing, guest-physical addresses and lengths in bytes: they come while it runs. Before [`Arriving::load`].
    ///
    /// # Errors
    ///
    /// Why that cannot be.
    fn miss(&mut self, runs: &[(u64, u64)]) -> Result<Arc<Missing>, String>;

    /// Stops it, because pages cannot come. Waits for nobody who waits for pages.
    fn stand(&mut self);

    /// Lets it go on after [`Arriving::stand`]: whether it does, or a processor of it has still to be waited for.
    fn go_on(&mut self) -> bool;

    /// No page is missing any more.
    fn is_whole(&mut self);

    /// Forgets the state.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    fn unload(&mut self) -> Result<(), String>;

    /// What disks hold at the source, which [`Arriving::take_locks`] looks for in the images that it opens.
    fn expect(&mut self, samples: Vec<Samples>);

    /// Opens all its disks, under their locks, or none.
    ///
    /// # Errors
    ///
    /// Why none is open.
    fn take_locks(&mut self) -> Result<(), String>;

    /// Closes them again.
    ///
    /// # Errors
    ///
    /// They may still be open.
    fn give_back(&mut self) -> Result<(), String>;

    /// Lets it go on, or leaves it paused if its user had paused it.
    ///
    /// # Errors
    ///
    /// Why it has not begun.
    fn run(&mut self) -> Result<(), String>;

    /// It does not come, for this reason.
    fn discard(&mut self, reason: &str);
}

/// A source that has made its offer.
pub struct Caller {
    /// Where others connect.
    pub listener: Listener,
    link: Link,
    sender: StreamSender<Link>,
    receiver: StreamReceiver<Timed>,
    preamble: Preamble,
    /// What it offers.
    pub offer: Offer,
    /// The machine's memory, where that is handed over.
    pub memory: Option<Arc<File>>,
    /// Its disks, where they are copied: whoever reads the offer makes them.
    pub landings: Option<Arc<Landings>>,
    /// Over which it came.
    beside: Option<Link>,
}

/// Waits for a source that makes an offer. One that does not is hung up on, and waited on for another, where others can come.
///
/// # Errors
///
/// [`ReceiveError`].
pub fn wait(
    listener: Listener,
    status: &Status,
    deadline: Option<Instant>,
) -> Result<Caller, ReceiveError> {
    status.when_cancelled(listener.stopper());
    loop {
        let accepted = listener.accept(deadline).map_err(ReceiveError::Listen)?;
        if status.is_cancelled() {
            return Err(ReceiveError::Cancelled);
        }
        let Some(link) = accepted else {
            return Err(ReceiveError::Late);
        };
        status.over(vec![link.clone()]);
        let only = listener.is_single();
        match greet(&link, only.then_some(deadline)) {
            Ok(Greeting::Offer(sender, receiver, preamble, offer)) => {
                let handed = if only {
                    // The offer is refused for it.
                    Ok(None)
                } else {
                    handed_over(&listener, &preamble, &offer)
                };
                let (memory, beside) = match handed {
                    Ok(handed) => handed.unzip(),
                    Err(error) => {
                        link.hang_up();
                        tracing::warn!("a source that hands memory over is hung up on: {error}");
                        continue;
                    }
                };
                status.enter(MigrationPhase::Checking);
                return Ok(Caller {
                    memory: memory.map(Arc::new),
                    landings: None,
                    beside,
                    listener,
                    link,
                    sender: *sender,
                    receiver: *receiver,
                    preamble,
                    offer: *offer,
                });
            }
            Ok(Greeting::Answered) => {
                link.hang_up();
                if only {
                    let what = "the source asked what became of a guest that is not known here";
                    return Err(ReceiveError::Only(what.to_owned()));
                }
            }
            Err(error) => {
                link.hang_up();
                if only {
                    return Err(match deadline {
                        _ if status.is_cancelled() => ReceiveError::Cancelled,
                        Some(deadline) if Instant::now() >= deadline => ReceiveError::Late,
                        _ => ReceiveError::Only(error),
                    });
                }
                tracing::warn!("who connected to send a machine is hung up on: {error}");
            }
        }
    }
}

impl Caller {
    /// That all the connections can come that the source is going to make.
    ///
    /// # Errors
    ///
    /// What cannot come.
    pub fn check_connections(&self) -> Result<(), String> {
        let what = match (self.offer.disks, self.preamble.streams) {
            _ if !self.listener.is_single() => return Ok(()),
            (Disks::Mirrored, _) => "disks that are copied (--copy-storage) go",
            (_, 2..) => "more than one stream (--streams) goes",
            _ if self.offer.capabilities.has(Capabilities::LOCAL) => {
                "memory that is handed over (--local) goes"
            }
            _ => return Ok(()),
        };
        Err(format!(
            "{what} over connections beside the first, and none comes but the one that the destination has (exec:, fd:): wait for the machine \
             at tcp:HOST:PORT or unix:PATH there"
        ))
    }

    /// Tells the source why its machine is not taken.
    pub fn refuse(mut self, differences: &[Difference], reason: &str) {
        // What was made is gone when it is told.
        self.landings = None;
        let refusal = Message::Refuse {
            differences: differences.to_vec(),
            reason: reason.to_owned(),
        };
        if let Err(error) = self.sender.message(&refusal) {
            tracing::warn!(
                "the source does not hear why its machine is refused: {}",
                chain(&error)
            );
        }
        self.link.hang_up();
    }
}

/// What the threads of streams share.
struct Shared {
    status: Arc<Status>,
    barrier: Barrier,
    memory: Arc<dyn PageSink + Send + Sync>,
    /// The first stream's other direction.
    answers: Mutex<StreamSender<Link>>,
    /// What follows the guest.
    follows: Follows,
}

impl Shared {
    fn answers(&self) -> MutexGuard<'_, StreamSender<Link>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn round_end(&self, stream: u16, round: u32) -> Result<(), ChannelError> {
        if self.barrier.arrive(stream, round) {
            self.answers().message(&Message::RoundAck { round })?;
        }
        Ok(())
    }

    /// A stream beside the first: pages and ends of rounds.
    fn serve(&self, stream: u16, mut receiver: StreamReceiver<Timed>) {
        let reason = loop {
            match receiver.next(&*self.memory, &self.status.progress) {
                Ok(Incoming::RoundEnd(round)) => {
                    if let Err(error) = self.round_end(stream, round) {
                        break chain(&error);
                    }
                }
                Ok(Incoming::Keepalive) => {}
                Ok(_) => break "it brings what belongs on the first".to_owned(),
                Err(error) => break chain(&error),
            }
        };
        self.barrier.fail(&format!("stream {stream}: {reason}"));
        self.follows.lose_streams();
    }
}

/// Takes the machine that `caller` has offered into the one that has been built, on the calling thread, until the source needs no answers any more.
pub fn take(
    caller: Caller,
    guest: Box<dyn Arriving>,
    status: Arc<Status>,
    mut tell: impl FnMut() + Send,
) {
    let Caller {
        listener,
        link,
        sender,
        mut receiver,
        preamble,
        offer,
        memory: _,
        landings,
        beside,
    } = caller;
    receiver.set_ranges(&offer.ranges);
    link.direct()
        .into_iter()
        .for_each(|from| receiver.direct(from));
    let shared = Arc::new(Shared {
        status,
        barrier: Barrier::new(preamble.streams),
        memory: guest.memory(),
        answers: Mutex::new(sender),
        follows: Follows::new(&offer.ranges),
    });
    let mut taker = Taker {
        guest,
        shared: Arc::clone(&shared),
        destination: Destination::new(),
        link,
        links: beside.into_iter().collect(),
        landings,
        state: Vec::new(),
        capabilities: offer.capabilities.and(Capabilities::KNOWN),
        ranges: offer.ranges,
        preamble,
        reason: String::new(),
        postcopy: false,
        resuming: false,
        broken: false,
        ready: false,
        aborted: false,
    };
    let reads = taker.link.clone();
    shared.status.when_cancelled(move || reads.stop_reading());
    std::thread::scope(|scope| {
        let alive = Builder::new(Kind::Job).name("migration-alive".to_owned());
        let live = Arc::clone(&shared);
        let _alive = alive.spawn_scoped(scope, move || {
            while !live.status.wait_for_end(ALIVE) {
                tell();
                // One that is gone is heard of by whoever reads.
                let _gone = live.answers().keepalive();
            }
        });
        taker.step(DestinationEvent::Received(Word::Offer));
        if taker.destination.state() == DestinationState::Receiving {
            taker.join(&listener);
        }
        let ended = taker.receive_all(receiver, &listener);
        if ended == Ended::Unheard {
            shared.status.answers(listener.stopper());
            taker.answer(&listener);
        }
        drop(listener);
        taker.links.iter().for_each(Link::hang_up);
        taker.link.hang_up();
    });
    shared.status.part();
}

/// How receiving has ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The source knows what became of the guest.
    Heard,
    /// It may ask.
    Unheard,
}

/// The thread's own.
struct Taker {
    guest: Box<dyn Arriving>,
    shared: Arc<Shared>,
    destination: Destination,
    link: Link,
    /// Of the other streams.
    links: Vec<Link>,
    /// Disks that come along.
    landings: Option<Arc<Landings>>,
    /// What is to be loaded.
    state: Vec<u8>,
    capabilities: Capabilities,
    ranges: Vec<(u64, u64)>,
    preamble: Preamble,
    reason: String,
    /// The state is one for post-copy.
    postcopy: bool,
    /// The guest is to go on as soon as it can.
    resuming: bool,
    /// There is nobody to be told anything.
    broken: bool,
    /// The source has heard that its state is loaded.
    ready: bool,
    /// It has ended it itself.
    aborted: bool,
}

impl Taker {
    fn step(&mut self, event: DestinationEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.destination.on(event) {
                events.extend(self.perform(action));
            }
        }
        let phase = match self.destination.state() {
            DestinationState::Waiting | DestinationState::Checking => MigrationPhase::Checking,
            DestinationState::Receiving => MigrationPhase::Precopy,
            DestinationState::Running => MigrationPhase::Completed,
            DestinationState::Postcopy => MigrationPhase::Postcopy,
            DestinationState::PostcopyLost => MigrationPhase::PostcopyLost,
            DestinationState::Failed => return,
            _ => MigrationPhase::Switching,
        };
        self.shared.status.enter(phase);
    }

    /// The first reason counts.
    fn because(&mut self, reason: impl Into<String>) {
        if self.reason.is_empty() {
            self.reason = reason.into();
        }
    }

    fn perform(&mut self, action: DestinationAction) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Send(word) => {
                self.send(word);
                None
            }
            DestinationAction::Close => {
                self.broken = true;
                self.links.iter().for_each(Link::hang_up);
                self.link.hang_up();
                None
            }
            // It has been compared, and built.
            DestinationAction::Check => Some(DestinationEvent::Checked(true)),
            DestinationAction::Load { attempt } => {
                let state = std::mem::take(&mut self.state);
                let missing = self.begin_to_miss();
                Some(match missing.and_then(|()| self.guest.load(&state)) {
                    Ok(locks) => DestinationEvent::Loaded { attempt, locks },
                    Err(reason) => {
                        self.because(reason);
                        DestinationEvent::Failed
                    }
                })
            }
            DestinationAction::Unload => self.unload(),
            DestinationAction::TakeLocks => Some(match self.guest.take_locks() {
                Ok(()) => DestinationEvent::LocksTaken,
                Err(reason) => {
                    self.because(reason);
                    DestinationEvent::LocksBusy
                }
            }),
            DestinationAction::Run => Some(match self.guest.run() {
                Ok(()) => DestinationEvent::Started,
                Err(reason) => {
                    self.because(reason);
                    DestinationEvent::StartFailed
                }
            }),
            DestinationAction::ReleaseLocks => match self.guest.give_back() {
                Ok(()) => Some(DestinationEvent::LocksReleased),
                Err(reason) => {
                    // Nothing is said that is not known: the source stays in doubt, and the end of this machine closes them.
                    self.because(reason);
                    self.broken = true;
                    self.link.hang_up();
                    let reason = self.reason.clone();
                    self.shared.status.fail(&reason);
                    self.guest.discard(&reason);
                    None
                }
            },
            DestinationAction::PauseGuest => self.stand(),
            DestinationAction::ResumeGuest => self.go_on(),
            DestinationAction::Discard => {
                self.shared.follows.give_up();
                let unwritten = self.landings.as_ref().and_then(|made| made.unwritten());
                if self.shared.status.is_cancelled() {
                    self.reason = "it was cancelled at the destination".to_owned();
                } else if let Some(unwritten) = unwritten {
                    // Whatever else has been heard comes of that.
                    self.reason = unwritten;
                }
                let reason = self.reason.clone();
                self.landings.iter().for_each(|made| made.let_go());
                self.shared.status.fail(&reason);
                self.guest.discard(&reason);
                None
            }
        }
    }

    fn send(&mut self, word: Word) {
        if self.broken {
            return;
        }
        if word == Word::Running {
            self.tell_missing();
        }
        let message = match word {
            Word::Accept => Some(Message::Accept {
                capabilities: self.capabilities,
            }),
            Word::Refuse => Some(Message::Refuse {
                differences: Vec::new(),
                reason: self.reason.clone(),
            }),
            word => Message::of(word, &self.reason),
        };
        let Some(message) = message else { return };
        if matches!(message, Message::Ready { .. }) {
            self.ready = true;
            self.shared.follows.set_ready(true);
        }
        let sent = self.shared.answers().message(&message);
        if let Err(error) = sent {
            // Whoever reads hears of it, too.
            tracing::info!(
                "the source does not hear what it is told: {}",
                chain(&error)
            );
        }
    }

    fn unload(&mut self) -> Option<DestinationEvent> {
        self.shared.follows.set_ready(false);
        self.shared.follows.forget();
        let failed = self.guest.unload().err();
        failed.map(|reason| {
            self.because(reason);
            DestinationEvent::Failed
        })
    }

    /// Takes the other streams, and the connection of the disks, in whatever order they come.
    fn join(&mut self, listener: &Listener) {
        let disks = u16::from(self.landings.is_some());
        for _ in 1..self.preamble.streams.saturating_add(disks) {
            if let Err(reason) = self.join_one(listener) {
                self.because(reason);
                return self.step(DestinationEvent::Failed);
            }
        }
    }

    fn join_one(&mut self, listener: &Listener) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let accepted = listener
                .accept(Some(deadline))
                .map_err(|error| error.to_string())?;
            let Some(link) = accepted else {
                return Err("the source has not opened all its streams in time".to_owned());
            };
            if self.shared.status.is_cancelled() {
                return Err("it was cancelled".to_owned());
            }
            let (timed, limit) = Timed::greeting(&link);
            let opened = StreamReceiver::open(timed).map_err(|error| chain(&error));
            let (preamble, mut receiver) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    tracing::warn!("a connection beside a migration is hung up: {error}");
                    link.hang_up();
                    continue;
                }
            };
            let wanted = Preamble {
                stream: preamble.stream,
                disks: preamble.disks,
                ..self.preamble
            };
            let landings = self.landings.clone().filter(|_| preamble.disks);
            if preamble != wanted || (preamble.stream == 0) != landings.is_some() {
                link.hang_up();
                continue;
            }
            limit.lift(&link)?;
            if let Some(landings) = landings {
                return self.begin_disks(landings, receiver.into_reader(), link);
            }
            receiver.set_ranges(&self.ranges);
            link.direct()
                .into_iter()
                .for_each(|from| receiver.direct(from));
            self.links.push(link);
            let shared = Arc::clone(&self.shared);
            let name = format!("migration-{}", preamble.stream);
            let run = move || shared.serve(preamble.stream, receiver);
            let started = Builder::new(Kind::Stream).name(name).spawn(run);
            return started.map(drop).map_err(|error| error.to_string());
        }
    }

    /// Has a thread write what comes of disks.
    fn begin_disks(
        &mut self,
        landings: Arc<Landings>,
        from: BufReader<Timed>,
        link: Link,
    ) -> Result<(), String> {
        self.links.push(link.clone());
        let run = move || {
            let mut to = link.clone();
            if let Err(why) = landings.take(from, &mut to) {
                tracing::info!("no more of the disks comes: {why}");
            }
            // The source is to hear of it.
            link.hang_up();
        };
        let name = "migration-disks".to_owned();
        let started = Builder::new(Kind::Job).name(name).spawn(run);
        started.map(drop).map_err(|error| error.to_string())
    }

    /// Hears the first stream until nothing follows.
    fn receive(&mut self, receiver: &mut StreamReceiver<Timed>) -> Ended {
        let shared = Arc::clone(&self.shared);
        loop {
            if self.destination.state() == DestinationState::Failed {
                return Ended::Heard;
            }
            match receiver.next(&*shared.memory, &shared.status.progress) {
                Ok(Incoming::RoundEnd(round)) => {
                    if let Err(error) = shared.round_end(0, round) {
                        self.because(chain(&error));
                        self.step(DestinationEvent::Lost);
                    }
                }
                Ok(Incoming::State {
                    attempt,
                    round,
                    postcopy: false,
                    sections,
                }) => self.on_state(attempt, round, sections),
                Ok(Incoming::Message(Message::Bye))
                    if self.destination.state() == DestinationState::Running =>
                {
                    return Ended::Heard;
                }
                Ok(Incoming::Message(Message::Bye)) => {
                    self.because("the source takes its leave before the guest runs here");
                    self.step(DestinationEvent::Failed);
                }
                Ok(Incoming::Message(message)) => self.on_message(&message),
                Ok(Incoming::Keepalive) => {}
                Ok(Incoming::State { .. } | Incoming::Missing(_) | Incoming::Want(_)) => {
                    self.because("the source begins post-copy, which was not agreed on");
                    self.step(DestinationEvent::Failed);
                }
                Err(error) => return self.on_lost(&error),
            }
        }
    }

    fn on_state(&mut self, attempt: u32, round: u32, sections: Vec<u8>) {
        if let Err(error) = self.shared.barrier.wait(round, SILENCE) {
            self.because(error.to_string());
            return self.step(DestinationEvent::Failed);
        }
        let whole = self.landings.as_ref().map(|disks| disks.check(attempt));
        if let Some(Err(reason)) = whole {
            self.because(reason);
            return self.step(DestinationEvent::Failed);
        }
        self.state = sections;
        let postcopy = self.postcopy;
        let word = Word::State { attempt, postcopy };
        self.step(DestinationEvent::Received(word));
    }

    fn on_message(&mut self, message: &Message) {
        match message {
            Message::Abort { reason } => {
                self.aborted = true;
                self.because(format!("the source has ended it: {reason}"));
            }
            Message::Samples(told) => self.guest.expect(told.clone()),
            _ => {}
        }
        let word = message.word();
        word.into_iter()
            .for_each(|word| self.step(DestinationEvent::Received(word)));
    }

    fn on_lost(&mut self, error: &ChannelError) -> Ended {
        self.broken = !self.shared.status.is_cancelled();
        if self.shared.status.is_cancelled() {
            self.step(DestinationEvent::Cancel);
        } else {
            let reason = chain(error);
            self.because(format!("the connection to the source is lost: {reason}"));
        }
        self.step(DestinationEvent::Lost);
        match self.destination.state() {
            DestinationState::Running => Ended::Unheard,
            // COMMIT may have been on its way.
            DestinationState::Failed if self.ready && !self.aborted => Ended::Unheard,
            _ => Ended::Heard,
        }
    }

    /// Answers a source that has not heard what became of its guest.
    fn answer(&mut self, listener: &Listener) {
        let deadline = Instant::now() + ANSWERING;
        while let Ok(Some(link)) = listener.accept(Some(deadline)) {
            match self.answer_one(&link) {
                Ok(true) => {
                    link.hang_up();
                    return;
                }
                Ok(false) => {}
                Err(error) => tracing::info!("a source that asks for its guest: {error}"),
            }
            link.hang_up();
        }
    }

    /// Whether the source has said that it has heard.
    fn answer_one(&mut self, link: &Link) -> Result<bool, String> {
        let told = |error: ChannelError| chain(&error);
        // All of it has to be said in this time.
        let (timed, _limit) = Timed::greeting(link);
        let (preamble, mut receiver) = StreamReceiver::open(timed).map_err(told)?;
        let mut sender = StreamSender::answer(link.clone(), Codec::Raw, 0).map_err(told)?;
        let ours = preamble.session == self.preamble.session && preamble.again;
        let progress = Progress::default();
        loop {
            match receiver.next(&NoMemory, &progress).map_err(told)? {
                Incoming::Message(Message::Query) if ours => {
                    for action in self.destination.on(DestinationEvent::Received(Word::Query)) {
                        if let DestinationAction::Send(word) = action
                            && let Some(message) = Message::of(word, &self.reason)
                        {
                            sender.message(&message).map_err(told)?;
                        }
                    }
                }
                Incoming::Message(Message::Query) => {
                    sender.message(&Message::Unknown).map_err(told)?;
                }
                Incoming::Message(Message::Bye) => return Ok(ours),
                _ => return Err("it asks for nothing".to_owned()),
            }
        }
    }
}
