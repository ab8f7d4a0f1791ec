//! The server of the control socket, seen from its clients.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod captures;
mod client;
mod commands;
mod consoles;
mod descriptors;
mod events;
mod fake;
mod framing;
mod hostile;
mod migrations;
mod segments;
