//! What a management layer says to a monitor and hears from it.
//!
//! * [`wire`]: the JSON objects of the socket.
//! * [`Control`], [`Command`]: what can be asked; `vmm` implements it.
//! * [`routes`]: the endpoints; [`openapi`]: the document that describes them.
//! * [`EventLog`], [`Event`]: what has happened; [`EventMonitor`] tells it as v1 does.
//! * [`http`]: the server; [`client`]: a client.
//! * [`web`]: the web console's server.
//! * [`spelling`]: what a misspelt word was to be.

pub mod client;
mod control;
mod event;
mod event_log;
mod event_v1;
pub mod http;
pub mod openapi;
mod passed;
mod reason;
pub mod routes;
pub mod spelling;
pub mod web;
pub mod wire;

pub use control::{
    AddDevice, AgentCommand, AgentReply, Answer, Command, Control, ControlError, ErrorKind,
    PauseReason, Reply, VmState,
};
pub use event::{DiskErrorAction, Event, EventKind, ExitReason};
pub use event_log::{Alert, EventLog, Subscription};
pub use event_v1::EventMonitor;
pub use passed::Passed;
pub use reason::{Reason, UnknownReason};
