//! What a management layer says to a machine and hears from it.
//!
//! This crate holds the types of the control interface and the [`Control`]
//! trait that the monitor implements. The HTTP server, the wire structs and
//! the client join it with the control socket.

mod control;
mod event;

pub use control::{Command, Control, ControlError, PauseReason, Reply, VmState};
pub use event::{DiskErrorAction, Event, EventKind, ExitReason};
