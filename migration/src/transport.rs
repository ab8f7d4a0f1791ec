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
//!
//! # Who is trusted
//!
//! Nobody. Each side takes the other's bytes as hostile: they are bounded before anything is allocated, and wrong ones are errors. What a configuration
//! or a state means is checked by those who restore it. Who may connect at all is the business of whoever opens connections.

pub mod compare;
pub mod frame;
pub mod message;
pub mod pages;
pub mod precopy;
pub mod protocol;
