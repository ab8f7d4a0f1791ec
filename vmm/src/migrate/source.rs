//! The side that gives the machine away: one thread, which owns the protocol's [`Source`] and does what it says.
//!
//! ```text
//!   orders ──────────┐                         ┌── pages, state, words ──► peer
//!   words of the peer├─► events ─► [`Source`] ─┤
//!   (a reader each)──┘                         └── pause, locks, resume ─► control thread ([`Departing`])
//! ```
//!
//! A second thread, the watch, tells of progress, and looks whether time has run out or a cancelled round does not end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use api::wire::{MigrationPhase, MigrationResolution};
use migration::pages::PageSet;
use migration::transport::channel::{
    ChannelError, Clock as _, Incoming, Progress, Sending, StreamReceiver, StreamSender, scoped,
    send_round,
};
use migration::transport::frame::{FrameError, Preamble};
use migration::transport::message::{Capabilities, Message, Offer};
use migration::transport::pages::{Codec, PAGE};
use migration::transport::precopy::{Decision, Round, Strategy};
use migration::transport::protocol::{
    Outcome, Resolution, Source, SourceAction, SourceEvent, SourceState, Word,
};

use super::departing::{Connect, Departing, Plan, TakenBack};
use super::facts;
use super::limits::Shared;
use super::link::{Link, PATIENCE};
use super::memory::NoMemory;
use super::status::{Order, Status};
use crate::error::chain;

/// How long the destination may take to build the machine.
const BUILDING: Duration = Duration::from_secs(120);
/// After so long a connection on which nothing comes is taken for lost. How long is waited for an answer is looked at elsewhere.
const SILENCE: Duration = Duration::from_secs(180);
/// How often progress is told.
const TICK: Duration = Duration::from_millis(250);
/// How long is waited at first, and at most, before a peer is sought again, or locks are.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How long is waited for what a peer has said before it hung up.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// With fewer bytes left than this a round is hardly worth its way.
const LITTLE: u64 = 1 << 20;
/// How much that has been heard may wait; who says more waits.
const EVENTS: usize = 64;
/// How long then is waited before the next.
const BREATH: Duration = Duration::from_millis(10);

/// Something that the thread hears.
enum Event {
    Message(Message),
    /// The peer lives.
    Alive,
    /// Of which connection.
    Lost(u32, String),
    Order(Order),
}

/// Gives a machine away, on the calling thread. `tell` hears from time to time that something has been done, and `told` how it ended, and why where it did not go.
pub fn give_away(
    guest: Box<dyn Departing>,
    connect: Connect,
    plan: Plan,
    (status, orders): (Arc<Status>, Receiver<Order>),
    (tell, told): (impl FnMut() + Send, impl FnOnce(&(Outcome, String))),
) {
    let Plan {
        parameters,
        streams,
        codec,
        cache,
        session,
        tls: _,
        offer,
    } = plan;
    let memory = offer.ranges.iter().map(|range| range.1).sum();
    let shared = Arc::new(Shared::new(parameters, memory, status));
    let (sender, events) = sync_channel(EVENTS);
    listen_to(orders, sender.clone(), Arc::clone(&shared));
    let mut giver = Giver {
        guest,
        connect,
        shared: Arc::clone(&shared),
        source: Source::new(),
        sender,
        events,
        kept: VecDeque::new(),
        wanted: (streams.max(1), codec, cache),
        session,
        offer,
        streams: Vec::new(),
        links: Vec::new(),
        connection: 0,
        broken: true,
        round: 0,
        rest: None,
        state: Vec::new(),
        state_len: 0,
        paused: None,
        wait: AGAIN.0,
        reason: String::new(),
        outcome: None,
    };
    let ended = std::thread::scope(|scope| {
        let mut tell = tell;
        let watch = Builder::new().name("migration-watch".to_owned());
        let watched = Arc::clone(&shared);
        // Without it, progress is not told and limits of time are looked at after rounds.
        let _watch = watch.spawn_scoped(scope, move || {
            while !watched.status.wait_for_end(TICK) {
                watched.look();
                tell();
            }
        });
        let outcome = giver.run();
        let reason = giver.reason();
        if outcome == Outcome::Resumed {
            // Who hears of that finds the machine free.
            giver.guest.end(outcome);
        }
        match outcome {
            Outcome::Moved => shared.status.enter(MigrationPhase::Completed),
            Outcome::Resumed | Outcome::Abandoned => shared.status.fail(&reason),
        }
        (outcome, reason)
    });
    // Who hears of its end here has been told of it before: the process may end with it.
    told(&ended);
    if ended.0 != Outcome::Resumed {
        giver.guest.end(ended.0);
    }
}

/// Brings orders to where the thread listens; limits count at once.
fn listen_to(orders: Receiver<Order>, sender: SyncSender<Event>, shared: Arc<Shared>) {
    let run = move || {
        for order in orders {
            if let Order::Set(set) = &order {
                shared.set(set);
            }
            if sender.send(Event::Order(order)).is_err() {
                return;
            }
        }
    };
    let started = Builder::new()
        .name("migration-orders".to_owned())
        .spawn(run);
    if let Err(error) = started {
        tracing::warn!("the migration takes no orders: {error}");
    }
}

/// The thread's own.
struct Giver {
    guest: Box<dyn Departing>,
    connect: Connect,
    shared: Arc<Shared>,
    source: Source,
    sender: SyncSender<Event>,
    events: Receiver<Event>,
    /// Taken, and to be heard before others.
    kept: VecDeque<Event>,
    /// Streams, how pages go, and bytes for differences.
    wanted: (u16, Codec, usize),
    session: [u8; 16],
    offer: Offer,
    streams: Vec<StreamSender<Link>>,
    links: Vec<Link>,
    /// Counts connections; what an earlier one says is not heard.
    connection: u32,
    /// There is nothing to send over.
    broken: bool,
    round: u32,
    /// What is to be sent next; `None`: all.
    rest: Option<PageSet>,
    state: Vec<u8>,
    /// How long it was the last time.
    state_len: u64,
    paused: Option<Instant>,
    wait: Duration,
    reason: String,
    outcome: Option<Outcome>,
}

impl Giver {
    fn run(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.outcome {
                self.hang_up();
                return outcome;
            }
            match self.source.state() {
                SourceState::Connecting => self.begin(),
                SourceState::Precopy => self.precopy(),
                _ => self.listen(),
            }
            self.show();
        }
    }

    fn status(&self) -> &Status {
        &self.shared.status
    }

    fn reason(&mut self) -> String {
        if let Some(late) = self.shared.late().take() {
            return late;
        }
        if self.status().is_cancelled() {
            return "it was cancelled".to_owned();
        }
        std::mem::take(&mut self.reason)
    }

    /// The first reason counts.
    fn because(&mut self, reason: impl Into<String>) {
        if self.reason.is_empty() {
            self.reason = reason.into();
        }
    }

    fn show(&self) {
        let phase = match self.source.state() {
            SourceState::Connecting => MigrationPhase::Connecting,
            SourceState::Offering => MigrationPhase::Checking,
            SourceState::Precopy => MigrationPhase::Precopy,
            SourceState::Stopping
            | SourceState::Stopped
            | SourceState::Releasing
            | SourceState::Retaking => MigrationPhase::Switching,
            SourceState::InDoubt => MigrationPhase::InDoubt,
            SourceState::Postcopy => MigrationPhase::Postcopy,
            SourceState::PostcopyLost => MigrationPhase::PostcopyLost,
            // Told when the machine has been dealt with.
            SourceState::Done | SourceState::Abandoned | SourceState::Resumed => return,
        };
        self.status().enter(phase);
    }

    /// Tells the protocol, and does what it says; what comes of that is told, too.
    fn step(&mut self, event: SourceEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.source.on(event) {
                events.extend(self.perform(action));
            }
        }
    }

    fn perform(&mut self, action: SourceAction) -> Option<SourceEvent> {
        match action {
            SourceAction::Send(word) => self.send(word),
            SourceAction::Close => {
                if self.source.state() == SourceState::Done {
                    // Where it does not arrive, the destination waits for questions a while.
                    let _unheard = self.say(&Message::Bye);
                }
                self.hang_up();
                None
            }
            SourceAction::Reconnect => self.reconnect(),
            SourceAction::Pause => self.pause(),
            SourceAction::SendRest => self.send_rest(),
            SourceAction::ReleaseLocks if self.source.state() == SourceState::Releasing => {
                self.release()
            }
            // Those that were taken again.
            SourceAction::ReleaseLocks => {
                self.guest.give_up();
                Some(SourceEvent::LocksReleased)
            }
            SourceAction::TakeLocks => self.take_back(),
            SourceAction::Resume => {
                self.paused = None;
                self.guest.resume();
                None
            }
            // Nothing here begins post-copy.
            SourceAction::ServePages => None,
            SourceAction::Finish(outcome) => {
                self.outcome = Some(outcome);
                if outcome == Outcome::Moved {
                    let stood = self.paused.map(|since| since.elapsed());
                    stood
                        .into_iter()
                        .for_each(|stood| self.status().stood(stood));
                }
                None
            }
        }
    }

    fn hang_up(&mut self) {
        self.broken = true;
        self.links.iter().for_each(Link::hang_up);
        self.links.clear();
        self.streams.clear();
        self.status().over(Vec::new());
    }

    /// A connection, of which stream, and a thread that hears what the peer says on the first.
    fn open(&mut self, stream: u16, again: bool) -> Result<(), String> {
        let link = (self.connect)().map_err(|error| error.to_string())?;
        link.set_patience(SILENCE)
            .map_err(|error| error.to_string())?;
        let preamble = Preamble {
            session: self.session,
            stream,
            streams: self.wanted.0,
            again,
        };
        let sender = StreamSender::open(link.clone(), &preamble, Codec::Raw, 0);
        let sender = sender.map_err(|error| chain(&error))?;
        if stream == 0 {
            self.connection = self.connection.wrapping_add(1);
            self.hear(link.clone())?;
            self.broken = false;
        }
        self.links.push(link);
        self.streams.push(sender);
        self.shared.status.over(self.links.clone());
        Ok(())
    }

    fn hear(&self, link: Link) -> Result<(), String> {
        let (connection, sender) = (self.connection, self.sender.clone());
        let run = move || {
            let progress = Progress::default();
            let lost = |error: &ChannelError| Event::Lost(connection, chain(error));
            let mut receiver = match StreamReceiver::answers(link) {
                Ok(receiver) => receiver,
                Err(error) => return drop(sender.send(lost(&error))),
            };
            loop {
                let event = match receiver.next(&NoMemory, &progress) {
                    Ok(Incoming::Message(message)) if message.is_an_answer() => {
                        Event::Message(message)
                    }
                    Ok(Incoming::Keepalive) => Event::Alive,
                    Ok(_) => {
                        Event::Lost(connection, "the peer sends what a source does".to_owned())
                    }
                    Err(error) => lost(&error),
                };
                let last = matches!(event, Event::Lost(..));
                if sender.send(event).is_err() || last {
                    return;
                }
            }
        };
        let started = Builder::new().name("migration-hear".to_owned()).spawn(run);
        started.map(drop).map_err(|error| error.to_string())
    }

    fn begin(&mut self) {
        match self.open(0, false) {
            Ok(()) => self.step(SourceEvent::Connected),
            Err(error) => {
                self.because(format!("the destination cannot be reached: {error}"));
                self.step(SourceEvent::Failed);
            }
        }
    }

    fn reconnect(&mut self) -> Option<SourceEvent> {
        self.hang_up();
        match self.open(0, true) {
            Ok(()) => Some(SourceEvent::Connected),
            Err(error) => {
                tracing::info!("the destination cannot be asked what became of the guest: {error}");
                None
            }
        }
    }

    fn say(&mut self, message: &Message) -> Result<(), ChannelError> {
        match self.streams.first_mut() {
            Some(stream) if !self.broken => stream.message(message),
            _ => Err(FrameError::Closed.into()),
        }
    }

    fn send(&mut self, word: Word) -> Option<SourceEvent> {
        if self.broken {
            return None;
        }
        let sent = match word {
            Word::Offer => self.say(&Message::Offer(Box::new(self.offer.clone()))),
            Word::State { attempt, postcopy } => {
                let (state, round) = (std::mem::take(&mut self.state), self.round);
                self.state_len = state.len() as u64;
                match self.streams.first_mut() {
                    Some(stream) => stream.state((attempt, round), postcopy, &state),
                    None => Err(FrameError::Closed.into()),
                }
            }
            Word::Commit { .. } => {
                self.status().enter(MigrationPhase::InDoubt);
                self.say_word(word)
            }
            Word::Continue => {
                self.shared.policy().pause_passed();
                self.say_word(word)
            }
            _ => self.say_word(word),
        };
        sent.err().and_then(|error| self.lose(&chain(&error)))
    }

    fn say_word(&mut self, word: Word) -> Result<(), ChannelError> {
        let reason = match word {
            Word::Abort if self.status().is_cancelled() => {
                "it was cancelled at the source".to_owned()
            }
            Word::Abort => {
                let late = self.shared.late().clone();
                late.unwrap_or_else(|| self.reason.clone())
            }
            _ => String::new(),
        };
        match Message::of(word, &reason) {
            Some(message) => self.say(&message),
            None => Ok(()),
        }
    }

    /// The connection is of no use any more.
    fn lose(&mut self, reason: &str) -> Option<SourceEvent> {
        if self.broken {
            return None;
        }
        self.hear_out();
        self.because(format!(
            "the connection to the destination is lost: {reason}"
        ));
        self.hang_up();
        Some(SourceEvent::Lost)
    }

    /// What the peer has said before it hung up is heard later, and why now.
    fn hear_out(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                return;
            };
            match &event {
                Event::Message(Message::Failed { reason }) => {
                    self.because(format!("the destination has failed: {reason}"));
                }
                Event::Lost(connection, _) if *connection == self.connection => return,
                _ => {}
            }
            self.kept.push_back(event);
        }
    }

    /// The next event, which is waited for.
    fn next(&mut self, time: Duration) -> Result<Event, RecvTimeoutError> {
        match self.kept.pop_front() {
            Some(event) => Ok(event),
            None => self.events.recv_timeout(time),
        }
    }

    fn pause(&mut self) -> Option<SourceEvent> {
        self.status().enter(MigrationPhase::Switching);
        let begun = Instant::now();
        match self.guest.pause() {
            Ok(state) => {
                self.paused = Some(begun);
                self.state = state;
                Some(SourceEvent::Paused)
            }
            Err(error) => {
                self.because(format!("the guest could not be paused: {error}"));
                Some(SourceEvent::Failed)
            }
        }
    }

    fn send_rest(&mut self) -> Option<SourceEvent> {
        let written = match self.guest.take_written() {
            Ok(written) => written,
            Err(error) => {
                self.because(error);
                return Some(SourceEvent::Failed);
            }
        };
        let mut rest = self
            .rest
            .take()
            .unwrap_or_else(|| PageSet::all(&self.guest.ram().ranges()));
        rest.add(&written);
        self.shared.limiter.set_rate(None, self.shared.clock.now());
        let sent = self.send_pages(&rest);
        let bandwidth = self.shared.policy().parameters().bandwidth;
        self.shared
            .limiter
            .set_rate(bandwidth, self.shared.clock.now());
        // Should the guest go on here, nothing is missing: what follows is told by the log.
        self.rest = Some(PageSet::new(&self.guest.ram().ranges()));
        sent.err()
    }

    fn release(&mut self) -> Option<SourceEvent> {
        match self.guest.let_go() {
            Ok(()) => Some(SourceEvent::LocksReleased),
            Err(error) => {
                self.because(error);
                Some(SourceEvent::Failed)
            }
        }
    }

    fn take_back(&mut self) -> Option<SourceEvent> {
        match self.guest.take_back() {
            Ok(TakenBack::Same) => Some(SourceEvent::LocksTaken { touched: false }),
            Ok(TakenBack::Touched) => Some(SourceEvent::LocksTaken { touched: true }),
            Ok(TakenBack::Busy) => Some(SourceEvent::LocksBusy),
            Err(error) => {
                tracing::warn!("the disks' locks cannot be taken: {error}");
                Some(SourceEvent::LocksBusy)
            }
        }
    }

    /// One round over all streams; the event, where it came to nothing.
    fn send_pages(&mut self, pages: &PageSet) -> Result<u64, SourceEvent> {
        self.round = self.round.saturating_add(1);
        if self.shared.late().is_some() {
            return Err(SourceEvent::Cancel);
        }
        if !self.status().is_cancelled() {
            self.status().stop.store(false, Ordering::Relaxed);
        }
        let shared = Arc::clone(&self.shared);
        let with = Sending {
            clock: &shared.clock,
            limiter: &shared.limiter,
            progress: &shared.status.progress,
            stop: &shared.status.stop,
        };
        let ram = self.guest.ram();
        let sent = send_round(&mut self.streams, ram, pages, self.round, with, &scoped);
        sent.map(|sent| sent.bytes).map_err(|error| match error {
            ChannelError::Stopped => SourceEvent::Cancel,
            ChannelError::Frame(_) => self.lose(&chain(&error)).unwrap_or(SourceEvent::Lost),
            error => {
                self.because(chain(&error));
                SourceEvent::Failed
            }
        })
    }

    fn precopy(&mut self) {
        let pages = match self.rest.take() {
            None => PageSet::all(&self.guest.ram().ranges()),
            Some(pages) => pages,
        };
        let begun = self.shared.clock.now();
        let sent = match self.send_pages(&pages) {
            Ok(sent) => sent,
            Err(event) => return self.step(event),
        };
        if !self.wait_for_ack() {
            return;
        }
        let now = self.shared.clock.now();
        let dirty = match self.guest.take_written() {
            Ok(dirty) => dirty,
            Err(error) => {
                self.because(error);
                return self.step(SourceEvent::Failed);
            }
        };
        let page = PAGE as u64;
        let round = Round {
            number: self.round,
            memory: pages.count().saturating_mul(page),
            sent,
            took: now.saturating_sub(begun),
            dirty: dirty.count(),
            page,
            state: self.state_len,
        };
        self.rest = Some(dirty);
        self.decide(now, &round);
    }

    /// Waits until all of the round is there; `false` where something else has come of it.
    fn wait_for_ack(&mut self) -> bool {
        let round = self.round;
        loop {
            match self.next(PATIENCE) {
                Ok(Event::Message(Message::RoundAck { round: there })) if there == round => {
                    return true;
                }
                Ok(event) => self.on(event),
                Err(_) => self.step(SourceEvent::TimedOut),
            }
            if self.source.state() == SourceState::Precopy && self.shared.late().is_some() {
                self.step(SourceEvent::Cancel);
            }
            if self.source.state() != SourceState::Precopy {
                return false;
            }
        }
    }

    fn decide(&mut self, now: Duration, round: &Round) {
        let mut policy = self.shared.policy();
        let decision = policy.on_round(now, round);
        let rates = (policy.rate(), policy.dirty_rate());
        let (expected, throttle) = (policy.expected_downtime(), policy.throttle());
        drop(policy);
        self.status().progress.set_rate(rates.0);
        self.status().measured(rates, expected, throttle);
        match decision {
            Decision::Continue => {}
            Decision::Throttle(percent) => self.guest.throttle(percent),
            Decision::SwitchOver => {
                return self.step(SourceEvent::SwitchOver { postcopy: false });
            }
            // The rule is never one for it.
            Decision::SwitchToPostcopy => {}
            Decision::Abort(reason) => {
                self.because(reason.to_string());
                return self.step(SourceEvent::Cancel);
            }
        }
        let rest = round.dirty.saturating_mul(round.page);
        let breath = if rest < LITTLE {
            BREATH
        } else {
            Duration::ZERO
        };
        self.listen_for(breath);
    }

    /// Hears what has come within `time`.
    fn listen_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while self.source.state() == SourceState::Precopy {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next(left) {
                Ok(event) => self.on(event),
                Err(_) => return,
            }
        }
    }

    /// Waits for what comes next, or for time to run out.
    fn listen(&mut self) {
        let (time, then) = self.limit();
        if time.is_zero() && then == SourceEvent::DowntimePassed {
            // Also where the answer has come by now.
            return self.step(then);
        }
        match self.next(time) {
            Ok(event) => self.on(event),
            Err(RecvTimeoutError::Timeout) => self.step(then),
            // It has a sender itself.
            Err(RecvTimeoutError::Disconnected) => self.step(SourceEvent::Failed),
        }
    }

    /// How long is waited where the protocol is now, and what it is told then.
    fn limit(&mut self) -> (Duration, SourceEvent) {
        match self.source.state() {
            SourceState::Offering => (BUILDING, SourceEvent::TimedOut),
            SourceState::Stopped | SourceState::Stopping => self.pause_limit(),
            SourceState::InDoubt if !self.broken => (PATIENCE, SourceEvent::TimedOut),
            SourceState::InDoubt | SourceState::Retaking | SourceState::PostcopyLost => {
                let wait = self.wait;
                self.wait = wait.saturating_mul(2).min(AGAIN.1);
                (wait, SourceEvent::Again)
            }
            _ => (PATIENCE, SourceEvent::TimedOut),
        }
    }

    fn pause_limit(&self) -> (Duration, SourceEvent) {
        let policy = self.shared.policy();
        let parameters = policy.parameters();
        let stood = self.paused.map_or(Duration::ZERO, |since| since.elapsed());
        if parameters.strategy == Strategy::Ignore {
            return (PATIENCE, SourceEvent::TimedOut);
        }
        let left = parameters.downtime.saturating_sub(stood);
        if left < PATIENCE {
            (left, SourceEvent::DowntimePassed)
        } else {
            (PATIENCE, SourceEvent::TimedOut)
        }
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Message(message) => self.on_message(message),
            Event::Alive => {}
            Event::Lost(connection, reason) if connection == self.connection && !self.broken => {
                self.because(format!(
                    "the connection to the destination is lost: {reason}"
                ));
                self.hang_up();
                {
                    let lost = SourceEvent::Lost;
                    self.step(lost);
                }
            }
            Event::Lost(..) => {}
            Event::Order(Order::Cancel) => self.step(SourceEvent::Cancel),
            Event::Order(Order::Set(set)) if set.throttle == Some(false) => self.guest.throttle(0),
            Event::Order(Order::Set(_)) => {}
            Event::Order(Order::Resolve(resolution)) => {
                let resolution = match resolution {
                    MigrationResolution::Resume => Resolution::Resume,
                    MigrationResolution::Abandon => Resolution::Abandon,
                };
                if self.source.state() == SourceState::InDoubt {
                    self.because("an operator has said what becomes of the guest");
                }
                self.step(SourceEvent::Resolve(resolution));
            }
        }
    }

    fn on_message(&mut self, message: Message) {
        let word = message.word();
        match message {
            Message::Accept { capabilities } => {
                if let Err(reason) = self.agree(capabilities) {
                    self.because(reason);
                    return self.step(SourceEvent::Failed);
                }
            }
            Message::Refuse {
                differences,
                reason,
            } => {
                let mut told = reason;
                if !differences.is_empty() {
                    told.push_str(&facts::refuse(&differences));
                }
                self.because(format!("the destination refuses the machine: {told}"));
            }
            Message::Failed { reason } => {
                self.because(format!("the destination has failed: {reason}"));
            }
            _ => {}
        }
        word.into_iter()
            .for_each(|word| self.step(SourceEvent::Received(word)));
    }

    /// The destination takes the machine, in these ways.
    fn agree(&mut self, there: Capabilities) -> Result<(), String> {
        let (streams, codec, cache) = self.wanted;
        let lacks = |what: &str| Err(format!("the destination cannot take {what}"));
        match codec {
            Codec::Zstd if !there.has(Capabilities::ZSTD) => return lacks("pages in zstd"),
            Codec::Lz4 if !there.has(Capabilities::LZ4) => return lacks("pages in LZ4"),
            _ => {}
        }
        let cache = if there.has(Capabilities::DELTA) {
            cache
        } else {
            0
        };
        if streams > 1 && !there.has(Capabilities::STREAMS) {
            return lacks("more than one stream");
        }
        for stream in 1..streams {
            self.open(stream, false)?;
        }
        let each = cache.checked_div(self.streams.len()).unwrap_or(0);
        for stream in &mut self.streams {
            stream.agree(codec, each).map_err(|error| chain(&error))?;
        }
        Ok(())
    }
}
