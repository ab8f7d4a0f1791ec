//! Devices whose requests another process serves (vhost-user).
//!
//! A peer is a program that listens on a unix socket, or connects to one of ours: it is told where the guest's memory is, and serves
//! requests in it. What a model with a peer is made of:
//!
//! | part | what it does |
//! |---|---|
//! | [`Front`] | the device's side: connects, keeps configuration space, starts and stops the worker |
//! | `door` | the socket to which peers connect, where they are to |
//! | `session` | one connection: the messages of the protocol, on a thread of its own |
//! | `record` | what the peer itself notes down of its requests, for its successor |
//! | `wire` | messages that the crate of the protocol does not have |
//! | `notes` | what the peer says unasked: that configuration space has changed |
//! | `rings` | the available and used rings that the peer sees, in memory of ours |
//! | `relay` | the worker: passes heads between the guest's rings and the peer's; without rings it keeps the connection of a device that is not in use |
//! | `lane` | one queue, both sides of it |
//! | `bells` | kicks that a peer cannot hold up |
//! | `backoff` | when a peer that is gone is tried again |
//!
//! # The peer has rings of its own
//!
//! The peer reads the guest's descriptors and moves the data itself, but its available and used rings are not
//! the guest's: the worker passes the heads on, in both directions. So it is known at any moment
//! which requests the peer has. They are given to its successor when it dies, whatever order it works in; they are drained before
//! a pause; the pages that they write are marked in the guest's memory log; and a peer
//! that returns what it was never given is found out before the guest sees it.
//!
//! # Who makes the requests of a dead peer again
//!
//! The rings tell what the peer has returned. What it has done and not returned they do not: it is made twice, which
//! the guest cannot tell and a disk bears. A peer that offers a record of what is in flight (`INFLIGHT_SHMFD`) may know
//! better: when its connection has ended, its successor gets the same rings and the same record, and decides.
//! The rings are given to nobody, and all that is not returned is made again from here,
//!
//! * when the successor keeps no record, or the guest's memory is another one meanwhile;
//! * when the peer was sent away: it may be at work still, and has not been found reliable;
//! * when the successor itself ends before anything has come of it: what is in the record may be the cause;
//! * when the device is stopped: what is not returned is parked, in order.
//!
//! No record is asked for where requests are answered for the dead ([`PeerOptions::epitaph`]).
//!
//! # What a peer's mistake does
//!
//! A peer that dies, contradicts itself, or does not answer a message within [`ANSWER`] is
//! disconnected, and observers are told ([`PeerReport`]). The guest's requests wait, and it is tried to
//! connect again, at first soon and then at longer intervals up to [`LONGEST_PAUSE`]. Nothing here waits for a peer
//! but the thread of its session.

mod backoff;
mod bells;
mod door;
mod front;
mod lane;
mod notes;
mod record;
mod relay;
mod rings;
mod session;
mod wire;

#[cfg(test)]
pub(crate) mod peer;
#[cfg(test)]
pub(crate) mod tests;

use std::time::Duration;

pub use front::{Front, Nature, PeerOptions, Steering};
pub use session::PeerError;

/// How long a peer may take for what it is told in one go: a set-up, a stop, a look at its configuration.
pub const ANSWER: Duration = Duration::from_secs(5);
/// How long it is waited before the first attempt to connect again.
pub const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long it is waited between attempts at most.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What has become of a device's peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerReport {
    /// It is connected again and serves the device.
    Connected,
    /// It is gone, or was disconnected. Reported once until it is connected again.
    Lost {
        /// Why.
        reason: String,
    },
}
