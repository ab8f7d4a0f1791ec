//! Who runs the guest: both sides of a live migration as values that hear events and answer with actions.
//!
//! # Contract
//!
//! * Nothing here does I/O, looks at a clock or starts a thread. Whoever owns a [`Source`] or a [`Destination`] performs the actions of
//!   one call in their order, and gives the results back as events in that order. Time that has run out is an event, too.
//! * **At most one side ever runs the guest**, whatever is lost, late or killed, as long as actions are performed as their names say. A side that
//!   runs has the locks of the disks.
//! * The source keeps everything until it has heard that the guest runs at the destination.
//! * An event that a state has no use for changes nothing. A word that the peer may not say at that time ends the migration
//!   where it may still be ended, and is passed over where not.
//!
//! # The source
//!
//! | state | the guest | leaves it by |
//! |---|---|---|
//! | `Connecting` | runs | a connection: `Offer` is sent, `Offering` |
//! | `Offering` | runs | `Accept`: `Precopy`; `Refuse`: `Resumed` |
//! | `Precopy` | runs | the decision to switch: `Stopping` |
//! | `Stopping` | is being paused | paused: last pages and `State` are sent, `Stopped` |
//! | `Stopped` | paused | `Ready`: the locks are given up, `Releasing` |
//! | `Releasing` | paused | locks given up: `Commit` is sent, `InDoubt` |
//! | `InDoubt` | paused; runs there or will, or never | see below |
//! | `Retaking` | paused, and never ran there | locks taken: `Resumed`, or `Precopy` after too long a pause |
//! | `Postcopy` | runs there, pages are asked for here | `Complete`: `Done`; a lost connection: `PostcopyLost` |
//! | `PostcopyLost` | paused there | a connection over which `Query` is answered with `Running`: `Postcopy` |
//! | `Done` | runs there | – |
//! | `Abandoned` | is given up here by an operator | – |
//! | `Resumed` | runs here; the migration has failed | – |
//!
//! Before `Commit` has been sent every failure (an abort, a cancellation, a lost connection, time that has run out, the peer's failure) leads to
//! `Resumed`, by way of `Retaking` where the locks had been given up; a pause over the limit leads back to `Precopy`. From then on the source is *in doubt*, and
//! only these end it:
//!
//! 1. `Running` is heard: `Done`, or `Postcopy`.
//! 2. `Failed` is heard: the destination has not run the guest, has given the locks back, and never will. The locks are taken and the guest resumes.
//! 3. The connection is lost, and all locks could be taken again, where both sides are known to see the same locks ([`Locks::Shared`]), and the images are
//!    as they were when the locks were given up. A destination that comes later fails, because it does not get them. Images that have been touched mean that the guest has
//!    run there: the locks are given back, and the doubt stays, because memory here is older than the disks.
//! 4. An operator says so ([`Resolution`]), and answers for it that the guest neither runs there nor will.
//!
//! # The destination
//!
//! | state | the guest | leaves it by |
//! |---|---|---|
//! | `Waiting` | – | `Offer`: it is compared, `Checking` |
//! | `Checking` | – | it fits: `Accept`, `Receiving`; not: `Refuse`, `Failed` |
//! | `Receiving` | comes | `State`: `Loading` |
//! | `Loading` | comes | loaded: `Ready` is sent, `Loaded` |
//! | `Loaded` | is whole, does not run | `Commit`: `Committing`; `Continue`: `Receiving` |
//! | `Committing` | will run | all locks taken: `Starting`; not: `Failed` |
//! | `Starting` | is being started | it runs: `Running` or `Postcopy`; it does not: `GivingBack` |
//! | `GivingBack` | has not run | the locks are given back: `Failed` is sent, `Failed` |
//! | `Running` | runs | – |
//! | `Postcopy` | runs, pages are missing | all pages: `Running`; a lost connection: `PostcopyLost` |
//! | `PostcopyLost` | paused | `Query` over a new connection: `Postcopy` |
//! | `Failed` | never ran and never will | – |
//!
//! A connection that is lost before `Commit` has been heard is `Failed`. After that it is not: the destination goes on and runs if it gets the locks. It answers `Query`, which a source in doubt sends over a
//! new connection, with `Running` or `Failed` as soon as it knows. A process that has not heard the session's offer itself says
//! `Unknown`, which ends no doubt: the guest may have run in a process before it.
//!
//! # Proof
//!
//! The tests walk through every interleaving of both sides with a network that delays, cuts and reconnects, locks of each kind, processes that are killed and
//! operators, and see that the rules hold in each state; and that they do not when a rule is broken.

mod destination;
mod source;

pub use destination::{Destination, DestinationAction, DestinationEvent, DestinationState};
pub use source::{Outcome, Resolution, Source, SourceAction, SourceEvent, SourceState};

/// What locks of disks can tell about the other side.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Locks {
    /// There is nothing to lock at the destination.
    #[default]
    None,
    /// The destination takes locks, but has not seen those of the source: each side has its own.
    Separate,
    /// The destination has seen that the source holds every lock that it will take itself: who has them all keeps the other out.
    Shared,
}

/// What one side says to the other, as far as it matters for who runs the guest. [`Message::word`](super::message::Message::word) gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Word {
    /// Source: what the machine is.
    Offer,
    /// Destination: it can be had.
    Accept,
    /// Destination: it cannot.
    Refuse,
    /// Source: the guest is paused, and this is its state; the pages before it were the last.
    State {
        /// Counts from 1, one more for each pause.
        attempt: u32,
        /// Pages are missing that come while the guest runs.
        postcopy: bool,
    },
    /// Destination: the state is loaded.
    Ready {
        /// That of the state.
        attempt: u32,
        /// What locks will tell.
        locks: Locks,
    },
    /// Source: the pause took too long, the guest runs on here; forget the state.
    Continue,
    /// Source: run it. From here on the source does not.
    Commit {
        /// That of the state.
        attempt: u32,
    },
    /// Destination: it runs.
    Running,
    /// Destination: it has all pages.
    Complete,
    /// Destination: it has not run the guest, has no locks and never will.
    Failed,
    /// Source: it is over.
    Abort,
    /// Source: what has become of it? The first word of a new connection of an old session.
    Query,
    /// Destination: the session is not known.
    Unknown,
}

#[cfg(test)]
mod tests;
