//! The side that takes the guest.

use super::{Locks, Word};

/// Where the destination is. See the [module](super) for what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// No offer has been heard.
    Waiting,
    /// The offer is compared with what there is.
    Checking,
    /// Pages come.
    Receiving,
    /// The state has come and is being loaded.
    Loading,
    /// The guest could run.
    Loaded,
    /// COMMIT has been heard; the locks are being taken.
    Committing,
    /// The guest is being started.
    Starting,
    /// The guest did not start; the locks are being given back.
    GivingBack,
    /// The guest runs, and all its memory is here.
    Running,
    /// The guest runs, and pages of it are at the source.
    Postcopy,
    /// As before, but paused, because there is no connection.
    PostcopyLost,
    /// The guest has not run here and never will.
    Failed,
}

/// What the destination hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// The peer has said something.
    Received(Word),
    /// The connection is gone, or has brought what is no part of the format. Also when another one of the same session has come:
    /// this first, nothing more of the old connection, and then what the new one brings.
    Lost,
    /// The peer has been silent for longer than it may.
    TimedOut,
    /// A user wants it to end.
    Cancel,
    /// [`DestinationAction::Check`] is done: whether the machine can be had.
    Checked(bool),
    /// [`DestinationAction::Load`] is done.
    Loaded {
        /// Which.
        attempt: u32,
        /// What locks will tell.
        locks: Locks,
    },
    /// [`DestinationAction::TakeLocks`] has taken all, or there are none.
    LocksTaken,
    /// [`DestinationAction::TakeLocks`] has taken none, because another has one.
    LocksBusy,
    /// [`DestinationAction::Run`] is done: the guest runs.
    Started,
    /// [`DestinationAction::Run`] has failed, and no instruction of the guest has run.
    StartFailed,
    /// [`DestinationAction::ReleaseLocks`] is done.
    LocksReleased,
    /// No page is missing any more.
    PagesComplete,
    /// Something failed here: memory cannot be had, the state does not fit.
    Failed,
}

/// What the destination has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Tells the peer.
    Send(Word),
    /// Closes the connection; nothing is heard of it any more.
    Close,
    /// Compares the offer with what there is: [`DestinationEvent::Checked`].
    Check,
    /// Loads the state: [`DestinationEvent::Loaded`] or [`DestinationEvent::Failed`].
    Load {
        /// Which.
        attempt: u32,
    },
    /// Forgets the state that was loaded; more pages come.
    Unload,
    /// Takes the locks of all disks, or none: [`DestinationEvent::LocksTaken`] or [`DestinationEvent::LocksBusy`].
    TakeLocks,
    /// Runs the guest, or leaves it paused if its user had paused it: [`DestinationEvent::Started`] or [`DestinationEvent::StartFailed`].
    Run,
    /// Gives the locks back: [`DestinationEvent::LocksReleased`].
    ReleaseLocks,
    /// Stops the guest until its pages can be had again.
    PauseGuest,
    /// Lets it go on.
    ResumeGuest,
    /// Forgets all of the guest. Questions about the session are still answered for a while.
    Discard,
}

/// The side that takes the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    state: DestinationState,
    /// There is a connection.
    linked: bool,
    attempt: u32,
    /// The state was one for post-copy.
    postcopy: bool,
    /// An offer has been heard: the session is one of this process, from its beginning.
    known: bool,
}

impl Default for Destination {
    fn default() -> Self {
        Self::new()
    }
}

impl Destination {
    /// There is a connection, and nothing has been heard.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: DestinationState::Waiting,
            linked: true,
            attempt: 0,
            postcopy: false,
            known: false,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// Hears `event`, and says what to do, in this order.
    pub fn on(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationState as S;
        match event {
            DestinationEvent::Lost => self.linked = false,
            DestinationEvent::Received(_) => self.linked = true,
            _ => {}
        }
        match self.state {
            S::Waiting | S::Checking | S::Receiving | S::Loading | S::Loaded => {
                self.on_coming(event)
            }
            S::Committing | S::Starting | S::GivingBack => self.on_committed(event),
            S::Running | S::Postcopy | S::PostcopyLost => self.on_running(event),
            S::Failed => match event {
                DestinationEvent::Received(Word::Query) if self.known => {
                    vec![DestinationAction::Send(Word::Failed)]
                }
                // The guest may have run in a process before this one.
                DestinationEvent::Received(Word::Query) => {
                    vec![DestinationAction::Send(Word::Unknown)]
                }
                _ => Vec::new(),
            },
        }
    }

    /// COMMIT has not been heard.
    fn on_coming(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationAction as A;
        use DestinationEvent as E;
        use DestinationState as S;
        match (self.state, event) {
            (S::Waiting, E::Received(Word::Offer)) => {
                self.known = true;
                self.go(S::Checking, vec![A::Check])
            }
            (S::Waiting, E::Received(Word::Query)) => vec![A::Send(Word::Unknown)],
            (S::Checking, E::Checked(true)) => self.go(S::Receiving, vec![A::Send(Word::Accept)]),
            (S::Checking, E::Checked(false)) => self.fail(Some(Word::Refuse)),
            (S::Receiving, E::Received(Word::State { attempt, postcopy }))
                if attempt > self.attempt =>
            {
                self.attempt = attempt;
                self.postcopy = postcopy;
                self.go(S::Loading, vec![A::Load { attempt }])
            }
            (S::Loading, E::Loaded { attempt, locks }) if attempt == self.attempt => {
                let ready = Word::Ready { attempt, locks };
                self.go(S::Loaded, vec![A::Send(ready)])
            }
            (S::Loading | S::Loaded, E::Received(Word::Continue)) => {
                self.go(S::Receiving, vec![A::Unload])
            }
            (S::Loaded, E::Received(Word::Commit { attempt })) if attempt == self.attempt => {
                self.go(S::Committing, vec![A::TakeLocks])
            }
            (_, E::Received(Word::Abort)) | (_, E::Lost) => self.fail(None),
            (_, E::Received(_) | E::TimedOut | E::Cancel | E::Failed) => {
                self.fail(Some(Word::Failed))
            }
            _ => Vec::new(),
        }
    }

    /// COMMIT has been heard, and the guest has not run.
    fn on_committed(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationAction as A;
        use DestinationEvent as E;
        use DestinationState as S;
        match (self.state, event) {
            (S::Committing, E::LocksTaken) => self.go(S::Starting, vec![A::Run]),
            (S::Committing, E::LocksBusy) => self.fail(Some(Word::Failed)),
            (S::Starting, E::Started) => self.started(),
            (S::Starting, E::StartFailed) => self.go(S::GivingBack, vec![A::ReleaseLocks]),
            (S::GivingBack, E::LocksReleased) => self.fail(Some(Word::Failed)),
            // The answer to a question comes when it is known.
            _ => Vec::new(),
        }
    }

    fn on_running(&mut self, event: DestinationEvent) -> Vec<DestinationAction> {
        use DestinationAction as A;
        use DestinationEvent as E;
        use DestinationState as S;
        match (self.state, event) {
            (S::Running, E::Received(Word::Query)) if self.postcopy => {
                vec![A::Send(Word::Running), A::Send(Word::Complete)]
            }
            (S::Running | S::Postcopy, E::Received(Word::Query)) => {
                vec![A::Send(Word::Running)]
            }
            (S::PostcopyLost, E::Received(Word::Query)) => {
                self.go(S::Postcopy, vec![A::Send(Word::Running), A::ResumeGuest])
            }
            (S::Postcopy, E::PagesComplete) => self.go(S::Running, vec![A::Send(Word::Complete)]),
            (S::PostcopyLost, E::PagesComplete) => self.go(S::Running, vec![A::ResumeGuest]),
            (S::Postcopy, E::Lost) => self.go(S::PostcopyLost, vec![A::PauseGuest]),
            (S::Postcopy, E::TimedOut) => {
                self.linked = false;
                self.go(S::PostcopyLost, vec![A::PauseGuest, A::Close])
            }
            _ => Vec::new(),
        }
    }

    fn started(&mut self) -> Vec<DestinationAction> {
        use DestinationAction as A;
        use DestinationState as S;
        match (self.postcopy, self.linked) {
            (true, false) => self.go(S::PostcopyLost, vec![A::PauseGuest]),
            (true, true) => self.go(S::Postcopy, vec![A::Send(Word::Running)]),
            (false, true) => self.go(S::Running, vec![A::Send(Word::Running)]),
            (false, false) => self.go(S::Running, Vec::new()),
        }
    }

    fn go(
        &mut self,
        state: DestinationState,
        actions: Vec<DestinationAction>,
    ) -> Vec<DestinationAction> {
        self.state = state;
        actions
    }

    /// The guest never runs here. The peer is told so, if it can be.
    fn fail(&mut self, word: Option<Word>) -> Vec<DestinationAction> {
        use DestinationAction as A;
        self.state = DestinationState::Failed;
        let mut actions = vec![A::Discard];
        // Whoever connects may be a source in doubt, whose guest a process before this one may have run.
        let word = word.map(|word| if self.known { word } else { Word::Unknown });
        if self.linked {
            actions.extend(word.map(A::Send));
            actions.push(A::Close);
            self.linked = false;
        }
        actions
    }
}
