//! Live migration, as far as it needs no machine: what goes over the wire, who runs the guest, and when to switch.
//!
//! # The parts
//!
//! | module | what it is |
//! |---|---|
//! | [`protocol`] | both sides' state machines, as values without I/O or time; the rule that at most one side runs |
//! | [`compare`] | what both sides say of themselves, as a list of differences |
//! | [`precopy`] | when to switch, slow the guest or give up; the limit of bandwidth |
//! | [`message`] | what both sides tell each other |
//! | [`pages`] | pages as frames: zeros, raw, compressed, as differences |
//! | [`frame`] | the bytes of a connection: preamble and frames; the specification of the format |
//! | [`disks`] | what disks hold that go along, on a connection of their own |
//! | [`samples`] | what images hold in a few places that both sides are to reach |
//! | [`channel`] | rounds over 1 to 64 connections, and what comes out of them |
//!
//! # A migration from end to end
//!
//! 1. The source connects all streams, each of which begins with a [`frame::Preamble`] of the same session. It sends
//!    [`Message::Offer`](message::Message::Offer) on stream 0. The destination [compares](compare::compare), builds the machine and answers.
//! 2. Rounds: the source sends all pages, then those that the guest has written meanwhile, with [`channel::send_round`]; the destination acknowledges each when its
//!    [`channel::Barrier`] says that all streams have brought it. [`precopy::Policy`] decides after each.
//! 3. The switch: the source pauses the guest, sends the last round and the state; the destination loads it behind the round's barrier
//!    and says that it is ready. The source gives the locks of the disks up, tells what they hold in a few places ([`samples`]) and sends `Commit`; the
//!    destination takes them, looks whether it has the same images, runs the guest and says so.
//! 4. In post-copy the source tells with the state which pages are missing ([`frame::Kind::Missing`]), and the destination asks for those that the guest needs
//!    ([`frame::Kind::Want`]), while the source sends the others by itself.
//!
//! Steps 3 and 4 are [`protocol`]'s, which also says what happens when any of it fails.
//!
//! Disks that go along ([`message::Disks::Mirrored`]) are copied on a connection of their own ([`disks`]) from the acceptance on. The switch comes when all of them have been, and in the pause
//! what has been changed meanwhile goes, is durable there and acknowledged before the state is sent.
//!
//! # Who is trusted
//!
//! Nobody. Each side takes the other's bytes as hostile: they are bounded before anything is allocated, and wrong ones are errors. What a configuration
//! or a state means is checked by those who restore it. Who may connect at all is the business of whoever opens connections.

pub mod channel;
pub mod compare;
pub mod disks;
pub mod frame;
pub mod message;
pub mod pages;
pub mod precopy;
pub mod protocol;
pub mod samples;
