//! Live migration: how a machine goes to another monitor while its guest runs.
//!
//! What is said, by whom and when, and how pages go over the wire, is the migration crate's
//! ([`migration::transport`]). Here is what that leaves open: connections ([`link`], waited for by a [`listener`], with TLS by
//! [`secure`]), the guest's memory ([`memory`]), what both sides say of the machine before any of it moves ([`facts`]), the thread of either side
//! ([`source`], [`destination`]), and where it can be seen and steered ([`board`], [`status`]). The machine itself is the control thread's: the threads ask it by a
//! [`Desk`](crate::machine::driver::Desk).

pub mod board;
pub mod departing;
pub mod destination;
pub mod facts;
pub mod limits;
pub mod link;
pub mod listener;
pub mod memory;
pub mod secure;
pub mod source;
pub mod status;
pub mod storage;
