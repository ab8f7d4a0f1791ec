//! The side that gives the machine away: one thread, which owns the protocol's [`Source`] and does what it says.
//!
//! ```text
//!   orders ──────────┐                         ┌── pages, state, words ──► peer
//!   words of the peer├─► events ─► [`Source`] ─┤
//!   (a reader each)──┘                         └── pause, locks, resume ─► control thread ([`Departing`])
//! ```
//!
//! A second thread, the watch, tells of progress, and looks whether time has run out or a cancelled round does not end.

mod disks;
mod peer;
mod postcopy;
mod rounds;

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use api::wire::{MigrationPhase, MigrationResolution};
use migration::pages::PageSet;
use migration::transport::channel::StreamSender;
use migration::transport::message::{Message, Offer};
use migration::transport::pages::{Codec, Run};
use migration::transport::precopy::Strategy;
use migration::transport::protocol::{
    Outcome, Resolution, Source, SourceAction, SourceEvent, SourceState,
};

use super::departing::{Connect, Departing, Plan, TakenBack};
use super::facts;
use super::limits::Shared;
use super::link::{Link, PATIENCE};
use super::status::{Order, Status};
use super::storage::leaving::Copying;
use crate::sandbox::{Builder, Kind};

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
    /// Over which connection pages are asked for.
    Want(u32, Vec<Run>),
    /// Over which connection pages are told of that have not come.
    Missing(u32, Vec<Run>),
    /// Of which connection.
    Lost(u32, String),
    Order(Order),
    /// Something has come of the disks, which is looked at.
    Disks,
}

/// Gives a machine away, on the calling thread. `tell` hears from time to time that something has been done, and `told` how it ended, and why where it did not go.
pub fn give_away(
    guest: Box<dyn Departing>,
    connect: Connect,
    plan: Plan,
    (status, orders): (Arc<Status>, Receiver<Order>),
    (tell, told): (impl FnMut() + Send, impl FnOnce(&(Outcome, String))),
) {
    let memory = plan.offer.ranges.iter().map(|range| range.1).sum::<u64>();
    let all = memory.saturating_add(plan.storage);
    let shared = Arc::new(Shared::new(plan.parameters.clone(), all, status));
    let (sender, events) = sync_channel(EVENTS);
    listen_to(orders, sender.clone(), Arc::clone(&shared));
    let mut giver = Giver::new((guest, connect), plan, &shared, (sender, events));
    let ended = std::thread::scope(|scope| {
        let _watched = Unwinding(&shared.status);
        let mut tell = tell;
        let watch = Builder::new(Kind::Job).name("migration-watch".to_owned());
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

/// Ends the migration for all who watch, should the thread that does it panic: the scope waits for them.
struct Unwinding<'a>(&'a Status);

impl Drop for Unwinding<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail("an error of this program has ended it");
        }
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
    let started = Builder::new(Kind::Job)
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
    /// Whether free pages stay behind.
    hints: bool,
    /// The destination compares what images hold.
    samples: bool,
    session: [u8; 16],
    /// Memory, where that is handed over.
    file: Option<Arc<File>>,
    offer: Offer,
    streams: Vec<StreamSender<Link>>,
    links: Vec<Link>,
    /// Disks that go along.
    copying: Option<Copying>,
    /// Counts connections; what an earlier one says is not heard.
    connection: u32,
    /// There is nothing to send over.
    broken: bool,
    round: u32,
    /// What is to be sent next; `None`: all.
    rest: Option<PageSet>,
    /// What follows the guest.
    missing: Option<postcopy::Rest>,
    state: Vec<u8>,
    /// How long it was the last time.
    state_len: u64,
    paused: Option<Instant>,
    wait: Duration,
    reason: String,
    outcome: Option<Outcome>,
}

impl Giver {
    fn new(
        (guest, connect): (Box<dyn Departing>, Connect),
        plan: Plan,
        shared: &Arc<Shared>,
        (sender, events): (SyncSender<Event>, Receiver<Event>),
    ) -> Self {
        Self {
            guest,
            connect,
            shared: Arc::clone(shared),
            source: Source::new(),
            sender,
            events,
            kept: VecDeque::new(),
            wanted: (plan.streams.max(1), plan.codec, plan.cache),
            hints: plan.hints,
            samples: false,
            session: plan.session,
            file: plan.memory,
            offer: plan.offer,
            streams: Vec::new(),
            links: Vec::new(),
            copying: None,
            connection: 0,
            broken: true,
            round: 0,
            rest: None,
            missing: None,
            state: Vec::new(),
            state_len: 0,
            paused: None,
            wait: AGAIN.0,
            reason: String::new(),
            outcome: None,
        }
    }

    fn run(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.outcome {
                self.copying = None;
                self.hang_up();
                return outcome;
            }
            match self.source.state() {
                SourceState::Connecting => self.begin(),
                SourceState::Precopy => self.precopy(),
                SourceState::Postcopy => self.postcopy(),
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
            SourceAction::SendRest if self.source.is_postcopy() => self.tell_missing(),
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
            SourceAction::ServePages => {
                self.begin_to_serve();
                None
            }
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
                Some(self.drain_disks().err().unwrap_or(SourceEvent::Paused))
            }
            Err(error) => {
                self.because(format!("the guest could not be paused: {error}"));
                Some(SourceEvent::Failed)
            }
        }
    }

    fn release(&mut self) -> Option<SourceEvent> {
        match self.guest.let_go() {
            Ok(()) => self.tell_samples().or(Some(SourceEvent::LocksReleased)),
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
        // Pages that have gone meanwhile are not taken back: with post-copy the pause, which has no memory in it, comes to its end.
        if parameters.strategy == Strategy::Ignore || self.missing.is_some() {
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
            Event::Alive | Event::Disks => {}
            Event::Want(connection, runs) if connection == self.connection => self.on_want(runs),
            Event::Missing(connection, runs) if connection == self.connection => {
                self.on_missing(&runs);
            }
            Event::Want(..) | Event::Missing(..) => {}
            Event::Lost(connection, reason) if connection == self.connection && !self.broken => {
                self.because(format!(
                    "the connection to the destination is lost: {reason}"
                ));
                self.note_loss(&reason);
                self.hang_up();
                self.step(SourceEvent::Lost);
            }
            Event::Lost(..) => {}
            Event::Order(Order::Cancel) => self.step(SourceEvent::Cancel),
            Event::Order(Order::Set(set)) if set.throttle == Some(false) => {
                self.guest.throttle(0);
                self.copying.iter().for_each(Copying::let_run);
            }
            Event::Order(Order::Set(_)) => {}
            Event::Order(Order::Resolve(resolution)) => {
                let resolution = match resolution {
                    MigrationResolution::Resume => Resolution::Resume,
                    MigrationResolution::Abandon => Resolution::Abandon,
                };
                let state = self.source.state();
                if matches!(state, SourceState::InDoubt | SourceState::PostcopyLost) {
                    self.reason.clear();
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
            Message::Unknown if self.source.state() == SourceState::PostcopyLost => {
                let note = "the destination's monitor knows nothing of the guest: it was ended there, and the guest with it";
                self.status().note(Some(note.to_owned()));
            }
            Message::Failed { reason } => {
                self.because(format!("the destination has failed: {reason}"));
            }
            _ => {}
        }
        word.into_iter()
            .for_each(|word| self.step(SourceEvent::Received(word)));
    }
}
