//! What a management layer says to a monitor and hears from it.
//!
//! * [`wire`]: the JSON objects of the socket.
//! * [`Control`], [`Command`]: what can be asked; `vmm` implements it.
//! * [`routes`]: the endpoints; [`openapi`]: the document that describes them.
//! * [`EventLog`], [`Event`]: what has happened.
//! * [`http`]: the server.

mod control;
mod event;
mod event_log;
pub mod http;
pub mod openapi;
pub mod routes;
pub mod wire;

pub use control::{
    AddDevice, Answer, Command, Control, ControlError, ErrorKind, PauseReason, Reply, VmState,
};
pub use event::{DiskErrorAction, Event, EventKind, ExitReason};
pub use event_log::{Alert, EventLog, Subscription};
