//! Both sides, what is between them, and what may happen to them.

use std::collections::VecDeque;

use super::*;

/// A rule that is broken, to see that it is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Break {
    /// The source in doubt takes a lost connection for a failure.
    ResumeOnLoss,
    /// The destination takes a lost connection for COMMIT.
    RunOnLoss,
    /// The destination does not look whether it has the locks.
    IgnoreLocks,
    /// The destination calls locks shared that are not.
    CallShared,
    /// The source does not look whether images have been touched.
    HideTouch,
    /// The destination answers a question before it knows.
    FailedTooEarly,
    /// The destination says that it has failed while it has the locks.
    FailedBeforeRelease,
    /// Which state has been loaded is not looked at.
    AnyLoad,
    /// The destination does not answer questions.
    AnswerNothing,
    /// A process that knows nothing of the session says that it has failed.
    FailedUnknown,
    /// The guest runs on while pages cannot be had.
    KeepRunning,
}

/// What comes out of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Word(Word),
    End,
}

/// One process, as the host sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Host<A> {
    alive: bool,
    /// The guest runs here.
    runs: bool,
    /// It has the locks of the disks.
    locks: bool,
    /// What it has to do, in order.
    ops: VecDeque<A>,
    /// Its end of the connection is open.
    open: bool,
    /// What is on the way to it.
    inbox: VecDeque<Item>,
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub source: Source,
    pub destination: Destination,
    here: Host<SourceAction>,
    there: Host<DestinationAction>,
    /// Nothing that is sent arrives any more.
    cut: bool,
    /// The source looks for a new connection.
    wanted: bool,
    /// COMMIT has been sent.
    committed: bool,
    /// The guest has run at the destination.
    pub ran: bool,
    /// Which state is loaded there.
    loaded: u32,
    /// The process there is not the one that the source has spoken to at first.
    another: bool,
    kind: Locks,
    postcopy: bool,
    rule: Option<Break>,
    /// What an action has been found to be against.
    wrong: Option<&'static str>,
}

/// What may happen next.
pub struct Move {
    pub world: World,
    pub name: String,
    /// It need not happen.
    pub fault: bool,
}

impl World {
    pub fn new(kind: Locks, postcopy: bool, rule: Option<Break>) -> Self {
        fn host<A>(runs: bool) -> Host<A> {
            Host {
                alive: true,
                runs,
                locks: runs,
                ops: VecDeque::new(),
                open: false,
                inbox: VecDeque::new(),
            }
        }
        Self {
            source: Source::new(),
            destination: Destination::new(),
            here: host(true),
            there: host(false),
            cut: false,
            wanted: true,
            committed: false,
            ran: false,
            loaded: 0,
            another: false,
            kind,
            postcopy,
            rule,
            wrong: None,
        }
    }

    fn is(&self, rule: Break) -> bool {
        self.rule == Some(rule)
    }

    /// What must hold in each state.
    pub fn check(&self) -> Result<(), String> {
        let fail = |what: &str| Err(what.to_owned());
        if let Some(what) = self.wrong {
            return fail(what);
        }
        if self.here.runs && self.there.runs {
            return fail("both run");
        }
        if self.kind == Locks::Shared && self.here.locks && self.there.locks {
            return fail("both have the locks");
        }
        if self.here.runs && !self.here.locks || self.there.runs && !self.there.locks {
            return fail("one runs without its locks");
        }
        if self.here.runs && self.ran {
            return fail("the source runs a guest that has run there");
        }
        if self.there.runs && self.destination.state() == DestinationState::PostcopyLost {
            return fail("the guest runs without its pages");
        }
        let dead = self.destination.state() == DestinationState::Failed;
        if dead && (self.there.runs || self.there.locks || !self.there.ops.is_empty()) {
            return fail("a destination that has failed has something still");
        }
        Ok(())
    }

    /// Whether it has ended as it should, as far as it goes by itself.
    pub fn is_settled(&self) -> bool {
        let (here, there) = (self.here.alive, self.there.alive);
        if self.here.runs || self.there.runs || (!here && !there) {
            return true;
        }
        let (source, destination) = (self.source.state(), self.destination.state());
        if source == SourceState::Abandoned {
            return true;
        }
        // Nobody can know any more what the guest has done, or it has died.
        let gone = self.another || !there;
        if here && gone && (self.ran || (self.committed && self.kind != Locks::Shared)) {
            return true;
        }
        match (here, there) {
            // Nothing has come, or it has never been here whole; or it waits for pages of a source that is gone.
            (false, true) => matches!(
                destination,
                DestinationState::Waiting
                    | DestinationState::Failed
                    | DestinationState::PostcopyLost
            ),
            _ => false,
        }
    }

    /// What must hold where nothing more happens by itself.
    pub fn check_end(&self) -> Result<(), String> {
        if !self.is_settled() {
            return Err("nobody runs at the end".to_owned());
        }
        let failed = self.here.alive && !self.committed;
        if failed && !self.here.runs && self.source.state() != SourceState::Abandoned {
            return Err("the source does not run, and has not sent COMMIT".to_owned());
        }
        Ok(())
    }

    /// All that may happen now.
    pub fn moves(&self) -> Vec<Move> {
        let mut moves = Vec::new();
        self.deliveries(&mut moves);
        self.source_ops(&mut moves);
        self.destination_ops(&mut moves);
        self.decisions(&mut moves);
        self.connections(&mut moves);
        self.faults(&mut moves);
        self.deaths(&mut moves);
        moves
    }

    fn step(&self, name: &str, fault: bool, moves: &mut Vec<Move>, act: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        act(&mut world);
        let name = name.to_owned();
        moves.push(Move { world, name, fault });
    }

    /// The source hears an event.
    fn tell(&mut self, mut event: SourceEvent) {
        let doubt = self.source.state() == SourceState::InDoubt;
        if self.is(Break::ResumeOnLoss) && doubt && event == SourceEvent::Lost {
            event = SourceEvent::Resolve(Resolution::Resume);
        }
        for action in self.source.on(event) {
            match action {
                SourceAction::Send(word) => {
                    self.committed |= matches!(word, Word::Commit { .. });
                    if self.here.open && !self.cut && self.there.open {
                        self.there.inbox.push_back(Item::Word(word));
                    }
                }
                SourceAction::Close => {
                    self.here.open = false;
                    self.here.inbox.clear();
                    if !self.cut && self.there.open {
                        self.there.inbox.push_back(Item::End);
                    }
                    self.cut = true;
                }
                SourceAction::Reconnect => self.wanted = true,
                SourceAction::SendRest | SourceAction::ServePages => {}
                // A connection that was asked for may still come.
                SourceAction::Finish(_) => {}
                op => self.here.ops.push_back(op),
            }
        }
    }

    /// The destination hears an event.
    fn tell_destination(&mut self, mut event: DestinationEvent) {
        use DestinationState as S;
        let state = self.destination.state();
        if self.is(Break::RunOnLoss) && state == S::Loaded && event == DestinationEvent::Lost {
            let attempt = self.loaded;
            event = DestinationEvent::Received(Word::Commit { attempt });
        }
        let committed = matches!(state, S::Committing | S::Starting);
        if event == DestinationEvent::Received(Word::Query) {
            if self.is(Break::FailedTooEarly) && committed {
                self.send_back(Word::Failed);
            }
            if self.is(Break::AnswerNothing) {
                return;
            }
            if self.is(Break::FailedUnknown) && self.another {
                return self.send_back(Word::Failed);
            }
        }
        if self.is(Break::FailedBeforeRelease) && event == DestinationEvent::StartFailed {
            self.destination.on(event);
            event = DestinationEvent::LocksReleased;
        }
        for action in self.destination.on(event) {
            match action {
                DestinationAction::Send(word) => self.send_back(word),
                DestinationAction::Close => {
                    self.there.open = false;
                    self.there.inbox.clear();
                    if !self.cut && self.here.open {
                        self.here.inbox.push_back(Item::End);
                    }
                    self.cut = true;
                }
                DestinationAction::PauseGuest => self.there.runs = self.is(Break::KeepRunning),
                DestinationAction::ResumeGuest => self.there.runs = true,
                DestinationAction::Unload => self.there.ops.push_back(action),
                // What is not done yet need not be.
                DestinationAction::Discard => self.there.ops.clear(),
                op => self.there.ops.push_back(op),
            }
        }
    }

    fn send_back(&mut self, word: Word) {
        if self.there.open && !self.cut && self.here.open {
            self.here.inbox.push_back(Item::Word(word));
        }
    }

    fn deliveries(&self, moves: &mut Vec<Move>) {
        if let Some(item) = self.here.inbox.front() {
            let name = format!("the source hears {item:?}");
            self.step(&name, false, moves, |world| {
                world.here.inbox.pop_front();
                match *item {
                    Item::Word(word) => world.tell(SourceEvent::Received(word)),
                    Item::End => {
                        world.here.open = false;
                        world.tell(SourceEvent::Lost);
                    }
                }
            });
        }
        if let Some(item) = self.there.inbox.front() {
            let name = format!("the destination hears {item:?}");
            self.step(&name, false, moves, |world| {
                world.there.inbox.pop_front();
                match *item {
                    Item::Word(word) => world.tell_destination(DestinationEvent::Received(word)),
                    Item::End => {
                        world.there.open = false;
                        world.tell_destination(DestinationEvent::Lost);
                    }
                }
            });
        }
    }

    fn source_ops(&self, moves: &mut Vec<Move>) {
        let Some(op) = self.here.ops.front().copied() else {
            return;
        };
        let name = format!("the source does {op:?}");
        self.step(&name, false, moves, |world| {
            world.here.ops.pop_front();
            match op {
                SourceAction::Pause => {
                    world.here.runs = false;
                    world.tell(SourceEvent::Paused);
                }
                SourceAction::ReleaseLocks => {
                    world.here.locks = false;
                    world.tell(SourceEvent::LocksReleased);
                }
                SourceAction::TakeLocks if world.kind == Locks::Shared && world.there.locks => {
                    world.tell(SourceEvent::LocksBusy);
                }
                SourceAction::TakeLocks => {
                    world.here.locks = true;
                    let touched = world.ran && !world.is(Break::HideTouch);
                    world.tell(SourceEvent::LocksTaken { touched });
                }
                SourceAction::Resume => world.here.runs = true,
                _ => world.wrong = Some("the source has no such operation"),
            }
        });
        if op == SourceAction::TakeLocks {
            self.step("the source gets no locks", true, moves, |world| {
                world.here.ops.pop_front();
                world.tell(SourceEvent::LocksBusy);
            });
        }
    }

    fn destination_ops(&self, moves: &mut Vec<Move>) {
        use DestinationAction as A;
        use DestinationEvent as E;
        let Some(op) = self.there.ops.front().copied() else {
            return;
        };
        let name = format!("the destination does {op:?}");
        self.step(&name, false, moves, |world| {
            world.there.ops.pop_front();
            let event = world.perform(op);
            event.into_iter().for_each(|e| world.tell_destination(e));
        });
        let failure = match op {
            A::Check => E::Checked(false),
            A::Load { .. } => E::Failed,
            A::TakeLocks => E::LocksBusy,
            A::Run => E::StartFailed,
            _ => return,
        };
        let name = format!("the destination cannot do {op:?}");
        self.step(&name, true, moves, |world| {
            world.there.ops.pop_front();
            world.tell_destination(failure);
        });
    }

    fn perform(&mut self, op: DestinationAction) -> Option<DestinationEvent> {
        use DestinationAction as A;
        use DestinationEvent as E;
        Some(match op {
            A::Check => E::Checked(true),
            A::Load { attempt } => {
                self.loaded = attempt;
                let shared = self.is(Break::CallShared);
                let locks = if shared { Locks::Shared } else { self.kind };
                E::Loaded { attempt, locks }
            }
            A::Unload => {
                self.loaded = 0;
                return None;
            }
            A::TakeLocks => {
                let busy = self.kind == Locks::Shared && self.here.locks;
                if busy && !self.is(Break::IgnoreLocks) {
                    return Some(E::LocksBusy);
                }
                self.there.locks = true;
                E::LocksTaken
            }
            A::Run => {
                if self.loaded != self.source.attempt() {
                    self.wrong = Some("what runs is not loaded");
                }
                self.there.runs = true;
                self.ran = true;
                E::Started
            }
            A::ReleaseLocks => {
                self.there.locks = false;
                E::LocksReleased
            }
            _ => {
                self.wrong = Some("the destination has no such operation");
                return None;
            }
        })
    }

    /// What time brings.
    fn decisions(&self, moves: &mut Vec<Move>) {
        let postcopy = self.postcopy;
        if self.here.alive {
            if self.source.state() == SourceState::Precopy && self.source.attempt() < 2 {
                self.step("it is time to switch", false, moves, |world| {
                    world.tell(SourceEvent::SwitchOver { postcopy });
                });
            }
            self.step("the source tries again", false, moves, |world| {
                world.tell(SourceEvent::Again);
            });
        }
        let serving = self.source.state() == SourceState::Postcopy && self.here.open;
        let complete = self.destination.state() == DestinationState::Postcopy && self.there.open;
        if serving && complete && self.there.alive && !self.cut {
            self.step("all pages are there", false, moves, |world| {
                world.tell_destination(DestinationEvent::PagesComplete);
            });
        }
        let early = self.is(Break::AnyLoad) && self.loaded != 0;
        if early && self.destination.state() == DestinationState::Loading {
            self.step("a load is taken for another", false, moves, |world| {
                let attempt = world.source.attempt();
                let locks = world.kind;
                world.tell_destination(DestinationEvent::Loaded { attempt, locks });
            });
        }
    }

    fn connections(&self, moves: &mut Vec<Move>) {
        if !(self.here.alive && self.there.alive && self.wanted && !self.here.open) {
            return;
        }
        self.step("a connection is made", false, moves, |world| {
            world.wanted = false;
            world.here.inbox.clear();
            world.there.inbox.clear();
            world.cut = false;
            if world.there.open {
                world.there.open = false;
                world.tell_destination(DestinationEvent::Lost);
            }
            world.cut = false;
            world.there.open = true;
            world.here.open = true;
            world.tell(SourceEvent::Connected);
        });
    }

    fn faults(&self, moves: &mut Vec<Move>) {
        if self.here.alive {
            let mut events = vec![
                SourceEvent::Cancel,
                SourceEvent::DowntimePassed,
                SourceEvent::Failed,
                SourceEvent::Resolve(Resolution::Abandon),
            ];
            if self.here.open || !self.committed {
                events.push(SourceEvent::TimedOut);
            }
            let failed = self.destination.state() == DestinationState::Failed;
            if (failed || self.another || !self.there.alive) && !self.ran {
                events.push(SourceEvent::Resolve(Resolution::Resume));
            }
            for event in events {
                let name = format!("to the source comes {event:?}");
                self.step(&name, true, moves, |world| world.tell(event));
            }
        }
        if self.there.alive {
            for event in [
                DestinationEvent::TimedOut,
                DestinationEvent::Cancel,
                DestinationEvent::Failed,
            ] {
                let name = format!("to the destination comes {event:?}");
                self.step(&name, true, moves, |world| world.tell_destination(event));
            }
        }
        if !self.cut && (self.here.open || self.there.open) {
            for to_here in 0..=self.here.inbox.len() {
                for to_there in 0..=self.there.inbox.len() {
                    self.step("the connection is cut", true, moves, |world| {
                        world.cut = true;
                        world.here.inbox.truncate(to_here);
                        world.there.inbox.truncate(to_there);
                        world.end_inboxes();
                    });
                }
            }
        }
    }

    /// Who still listens hears the end of the connection.
    fn end_inboxes(&mut self) {
        if self.here.open && self.here.alive {
            self.here.inbox.push_back(Item::End);
        }
        if self.there.open && self.there.alive {
            self.there.inbox.push_back(Item::End);
        }
    }

    /// Killed: what runs there stops, its locks are gone, and what it has sent may arrive or not.
    fn deaths(&self, moves: &mut Vec<Move>) {
        if self.here.alive {
            for kept in 0..=self.there.inbox.len() {
                self.step("the source is killed", true, moves, |world| {
                    world.here.alive = false;
                    world.here.runs = false;
                    world.here.locks = false;
                    world.here.ops.clear();
                    world.here.inbox.clear();
                    if !world.cut {
                        world.there.inbox.truncate(kept);
                        world.end_inboxes();
                    }
                    world.here.open = false;
                    world.cut = true;
                });
            }
        }
        if !self.there.alive {
            self.step("another process waits there", true, moves, |world| {
                world.there.alive = true;
                world.another |= world.source.state() != SourceState::Connecting;
                world.loaded = 0;
                world.destination = Destination::new();
            });
        }
        if self.there.alive {
            for kept in 0..=self.here.inbox.len() {
                self.step("the destination is killed", true, moves, |world| {
                    world.there.alive = false;
                    world.there.runs = false;
                    world.there.locks = false;
                    world.there.ops.clear();
                    world.there.inbox.clear();
                    if !world.cut {
                        world.here.inbox.truncate(kept);
                        world.end_inboxes();
                    }
                    world.there.open = false;
                    world.cut = true;
                });
            }
        }
    }
}
