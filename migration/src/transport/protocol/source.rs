//! The side that gives the guest away.

use super::{Locks, Word};

/// Where the source is. See the [module](super) for what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// There is no connection yet.
    Connecting,
    /// The offer has been made.
    Offering,
    /// Pages are sent while the guest runs.
    Precopy,
    /// The guest is being paused.
    Stopping,
    /// The guest is paused; the last pages and the state are on their way.
    Stopped,
    /// The locks are being given up.
    Releasing,
    /// COMMIT may have been heard.
    InDoubt,
    /// The guest is to run here again, once the locks are taken.
    Retaking,
    /// The guest runs at the destination, which asks for pages.
    Postcopy,
    /// As before, without a connection.
    PostcopyLost,
    /// The guest is at the destination.
    Done,
    /// An operator has given the guest up here.
    Abandoned,
    /// The migration has failed, and the guest runs here.
    Resumed,
}

/// What an operator says of a guest in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resolution {
    /// It neither runs at the destination nor ever will: it resumes here.
    Resume,
    /// It runs at the destination, or is not wanted: it ends here.
    Abandon,
}

/// What the source hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// There is a connection: the first, or one that was asked for by [`SourceAction::Reconnect`].
    Connected,
    /// The peer has said something.
    Received(Word),
    /// The connection is gone, or has brought what is no part of the format.
    Lost,
    /// The peer has been silent for longer than it may.
    TimedOut,
    /// A user wants the migration to end.
    Cancel,
    /// It is time to switch.
    SwitchOver {
        /// Pages that are missing follow while the guest runs there.
        postcopy: bool,
    },
    /// [`SourceAction::Pause`] is done.
    Paused,
    /// [`SourceAction::ReleaseLocks`] is done.
    LocksReleased,
    /// [`SourceAction::TakeLocks`] has taken them all.
    LocksTaken {
        /// An image has been written, or marked by a destination that was about to run the guest, since its lock was given up.
        touched: bool,
    },
    /// [`SourceAction::TakeLocks`] has taken none, because another has one.
    LocksBusy,
    /// The pause lasts longer than it may.
    DowntimePassed,
    /// Something failed here: memory cannot be read, the state cannot be saved.
    Failed,
    /// It is time to try again what did not succeed: locks, a connection.
    Again,
    /// An operator has decided.
    Resolve(Resolution),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest is at the destination.
    Moved,
    /// The guest is here.
    Resumed,
    /// An operator has ended it here.
    Abandoned,
}

/// What the source has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Tells the peer.
    Send(Word),
    /// Closes the connection; nothing is heard of it any more.
    Close,
    /// Tries to reach the peer again: [`SourceEvent::Connected`], or nothing.
    Reconnect,
    /// Pauses the guest: [`SourceEvent::Paused`].
    Pause,
    /// Sends the pages that are left, or which are missing.
    SendRest,
    /// Gives the locks of the disks up: [`SourceEvent::LocksReleased`].
    ReleaseLocks,
    /// Takes the locks of all disks, or none: [`SourceEvent::LocksTaken`] or [`SourceEvent::LocksBusy`].
    TakeLocks,
    /// The guest is this side's and goes on; one that its user had paused stays so.
    Resume,
    /// Answers requests for pages, and sends those that nobody asks for.
    ServePages,
    /// It has ended; nothing follows.
    Finish(Outcome),
}

/// Where a guest that is resumed goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Back {
    /// With another round.
    Precopy,
    /// Without a migration.
    Resumed,
}

/// The side that gives the guest away.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    state: SourceState,
    /// There is a connection.
    linked: bool,
    attempt: u32,
    /// The last pause was one for post-copy.
    postcopy: bool,
    locks: Locks,
    /// Locks are being taken.
    taking: bool,
    back: Back,
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

impl Source {
    /// A guest that runs here, with its locks, and no connection yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: SourceState::Connecting,
            linked: false,
            attempt: 0,
            postcopy: false,
            locks: Locks::None,
            taking: false,
            back: Back::Resumed,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Which pause it is, from 1, or was.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether the last pause is, or was, one for post-copy.
    #[must_use]
    pub fn is_postcopy(&self) -> bool {
        self.postcopy
    }

    /// What locks tell, as the destination has said.
    #[must_use]
    pub fn locks(&self) -> Locks {
        self.locks
    }

    /// Whether a user may still cancel: COMMIT has not been sent.
    #[must_use]
    pub fn may_cancel(&self) -> bool {
        use SourceState as S;
        matches!(
            self.state,
            S::Connecting | S::Offering | S::Precopy | S::Stopping | S::Stopped | S::Releasing
        ) || (self.state == S::Retaking && self.back == Back::Precopy)
    }

    /// Hears `event`, and says what to do, in this order.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceState as S;
        if event == SourceEvent::Lost {
            self.linked = false;
        }
        if matches!(
            event,
            SourceEvent::LocksTaken { .. } | SourceEvent::LocksBusy
        ) {
            self.taking = false;
        }
        match self.state {
            S::Connecting | S::Offering | S::Precopy => self.on_running(event),
            S::Stopping | S::Stopped | S::Releasing => self.on_paused(event),
            S::InDoubt => self.on_in_doubt(event),
            S::Retaking => self.on_retaking(event),
            S::Postcopy | S::PostcopyLost => self.on_postcopy(event),
            S::Done | S::Abandoned | S::Resumed => self.on_ended(event),
        }
    }

    /// The guest runs here.
    fn on_running(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceState as S;
        match (self.state, event) {
            (S::Connecting, SourceEvent::Connected) => {
                self.linked = true;
                self.state = S::Offering;
                vec![SourceAction::Send(Word::Offer)]
            }
            (S::Offering, SourceEvent::Received(Word::Accept)) => {
                self.state = S::Precopy;
                Vec::new()
            }
            (S::Precopy, SourceEvent::SwitchOver { postcopy }) => {
                self.state = S::Stopping;
                self.postcopy = postcopy;
                self.attempt = self.attempt.saturating_add(1);
                vec![SourceAction::Pause]
            }
            // An answer to the state of a pause that was too long.
            (S::Precopy, SourceEvent::Received(Word::Ready { .. })) => Vec::new(),
            (_, event) if ends(event) => {
                let mut actions = self.hang_up();
                self.state = S::Resumed;
                actions.push(SourceAction::Finish(Outcome::Resumed));
                actions
            }
            _ => Vec::new(),
        }
    }

    /// The guest is paused, or is about to be, and COMMIT has not been sent.
    fn on_paused(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceState as S;
        match (self.state, event) {
            (S::Stopping, SourceEvent::Paused) => {
                self.state = S::Stopped;
                let (attempt, postcopy) = (self.attempt, self.postcopy);
                let state = Word::State { attempt, postcopy };
                vec![SourceAction::SendRest, SourceAction::Send(state)]
            }
            (S::Stopped, SourceEvent::Received(Word::Ready { attempt, locks }))
                if attempt == self.attempt =>
            {
                self.state = S::Releasing;
                self.locks = locks;
                vec![SourceAction::ReleaseLocks]
            }
            (S::Releasing, SourceEvent::LocksReleased) => {
                self.state = S::InDoubt;
                let attempt = self.attempt;
                vec![SourceAction::Send(Word::Commit { attempt })]
            }
            // An answer to the state of a pause before.
            (S::Stopping | S::Stopped, SourceEvent::Received(Word::Ready { attempt, .. }))
                if attempt < self.attempt =>
            {
                Vec::new()
            }
            // The destination has not been told of a state that is not sent yet.
            (S::Stopping, SourceEvent::DowntimePassed) => self.step_back(Back::Precopy, Vec::new()),
            (S::Stopped | S::Releasing, SourceEvent::DowntimePassed) => {
                let told = vec![SourceAction::Send(Word::Continue)];
                self.step_back(Back::Precopy, told)
            }
            (_, event) if ends(event) => {
                let told = self.hang_up();
                self.step_back(Back::Resumed, told)
            }
            _ => Vec::new(),
        }
    }

    /// COMMIT has been sent, and the guest may run there.
    fn on_in_doubt(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        match event {
            SourceEvent::Received(Word::Running) if self.postcopy => {
                self.state = SourceState::Postcopy;
                vec![SourceAction::ServePages]
            }
            SourceEvent::Received(Word::Running) => self.end(SourceState::Done, Outcome::Moved),
            SourceEvent::Received(Word::Failed) => self.retake(),
            SourceEvent::Connected => {
                self.linked = true;
                vec![SourceAction::Send(Word::Query)]
            }
            SourceEvent::Lost => self.doubt_further(),
            // Another process than the one that heard COMMIT. It is asked again later.
            SourceEvent::Received(Word::Unknown) => {
                self.linked = false;
                let mut actions = vec![SourceAction::Close];
                actions.extend(self.take_telling_locks());
                actions
            }
            SourceEvent::TimedOut if self.linked => {
                self.linked = false;
                let mut actions = vec![SourceAction::Close];
                actions.extend(self.doubt_further());
                actions
            }
            SourceEvent::Again => self.doubt_further(),
            SourceEvent::LocksTaken { touched: false } => self.resume_alone(),
            SourceEvent::LocksTaken { touched: true } => {
                // The guest has run there: what is here is older than its disks.
                self.locks = Locks::Separate;
                vec![SourceAction::ReleaseLocks]
            }
            SourceEvent::Resolve(Resolution::Resume) => self.retake(),
            SourceEvent::Resolve(Resolution::Abandon) => {
                self.end(SourceState::Abandoned, Outcome::Abandoned)
            }
            _ => Vec::new(),
        }
    }

    /// The guest has not run there and will not.
    fn on_retaking(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        match event {
            SourceEvent::LocksTaken { .. } => match self.back {
                Back::Precopy => {
                    self.state = SourceState::Precopy;
                    vec![SourceAction::Resume]
                }
                Back::Resumed => self.resume_alone(),
            },
            SourceEvent::LocksBusy => Vec::new(),
            SourceEvent::Again => self.take_locks(),
            // One that was asked for in doubt, which is no more.
            SourceEvent::Connected => vec![SourceAction::Close],
            SourceEvent::Resolve(Resolution::Abandon) => {
                self.end(SourceState::Abandoned, Outcome::Abandoned)
            }
            SourceEvent::Received(Word::Ready { .. }) if self.back == Back::Precopy => Vec::new(),
            event if self.back == Back::Precopy && ends(event) => {
                self.back = Back::Resumed;
                self.hang_up()
            }
            _ => Vec::new(),
        }
    }

    /// The guest runs there and must not here, whatever comes.
    fn on_postcopy(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceState as S;
        match event {
            SourceEvent::Received(Word::Complete) => self.end(S::Done, Outcome::Moved),
            SourceEvent::Received(Word::Running) if self.state == S::PostcopyLost => {
                self.state = S::Postcopy;
                vec![SourceAction::ServePages]
            }
            SourceEvent::Connected => {
                self.linked = true;
                vec![SourceAction::Send(Word::Query)]
            }
            SourceEvent::Lost => {
                self.state = S::PostcopyLost;
                vec![SourceAction::Reconnect]
            }
            SourceEvent::Received(Word::Unknown) => {
                self.linked = false;
                self.state = S::PostcopyLost;
                vec![SourceAction::Close]
            }
            SourceEvent::TimedOut if self.linked => {
                self.linked = false;
                self.state = S::PostcopyLost;
                vec![SourceAction::Close, SourceAction::Reconnect]
            }
            SourceEvent::Again if !self.linked => vec![SourceAction::Reconnect],
            SourceEvent::Resolve(Resolution::Abandon) if self.state == S::PostcopyLost => {
                self.end(S::Abandoned, Outcome::Abandoned)
            }
            // Locks that were asked for while in doubt; the destination that had them is gone.
            SourceEvent::LocksTaken { .. } => vec![SourceAction::ReleaseLocks],
            _ => Vec::new(),
        }
    }

    fn on_ended(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        match event {
            SourceEvent::LocksTaken { .. } if self.state != SourceState::Resumed => {
                vec![SourceAction::ReleaseLocks]
            }
            SourceEvent::Connected => vec![SourceAction::Close],
            _ => Vec::new(),
        }
    }

    /// Back to a guest that runs here: at once where the locks are here still.
    fn step_back(&mut self, back: Back, mut actions: Vec<SourceAction>) -> Vec<SourceAction> {
        self.back = back;
        if self.state == SourceState::Releasing {
            self.state = SourceState::Retaking;
            actions.extend(self.take_locks());
            return actions;
        }
        actions.push(SourceAction::Resume);
        match back {
            Back::Precopy => self.state = SourceState::Precopy,
            Back::Resumed => {
                self.state = SourceState::Resumed;
                actions.push(SourceAction::Finish(Outcome::Resumed));
            }
        }
        actions
    }

    /// The guest is known not to run there: it resumes once the locks are here.
    fn retake(&mut self) -> Vec<SourceAction> {
        self.state = SourceState::Retaking;
        self.back = Back::Resumed;
        let mut actions = self.hang_up();
        actions.extend(self.take_locks());
        actions
    }

    /// All locks are here.
    fn resume_alone(&mut self) -> Vec<SourceAction> {
        self.state = SourceState::Resumed;
        let mut actions = self.hang_up();
        actions.push(SourceAction::Resume);
        actions.push(SourceAction::Finish(Outcome::Resumed));
        actions
    }

    fn take_locks(&mut self) -> Vec<SourceAction> {
        if self.taking {
            return Vec::new();
        }
        self.taking = true;
        vec![SourceAction::TakeLocks]
    }

    /// Without a connection: another one is tried, and the locks, where they tell anything.
    fn doubt_further(&mut self) -> Vec<SourceAction> {
        if self.linked {
            return Vec::new();
        }
        let mut actions = vec![SourceAction::Reconnect];
        actions.extend(self.take_telling_locks());
        actions
    }

    /// Takes the locks, if having them tells that the guest does not run there.
    fn take_telling_locks(&mut self) -> Vec<SourceAction> {
        if self.locks == Locks::Shared {
            self.take_locks()
        } else {
            Vec::new()
        }
    }

    /// Tells the peer that it is over, if there is one.
    fn hang_up(&mut self) -> Vec<SourceAction> {
        if !self.linked {
            return Vec::new();
        }
        self.linked = false;
        vec![SourceAction::Send(Word::Abort), SourceAction::Close]
    }

    fn end(&mut self, state: SourceState, outcome: Outcome) -> Vec<SourceAction> {
        self.state = state;
        let mut actions = Vec::new();
        if self.linked {
            self.linked = false;
            actions.push(SourceAction::Close);
        }
        actions.push(SourceAction::Finish(outcome));
        actions
    }
}

/// Whether the event ends a migration that may still be ended. A word that is not one of those before is a fault of the peer.
fn ends(event: SourceEvent) -> bool {
    use SourceEvent as E;
    matches!(
        event,
        E::Received(_) | E::Lost | E::TimedOut | E::Cancel | E::Failed
    )
}
