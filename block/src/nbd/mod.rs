//! Disks that are the exports of NBD servers: a client of the protocol that the document proto.md of the NBD
//! project defines, over unix sockets and TCP.
//!
//! * [`NbdDisk`]: an export as a raw disk, with an [`crate::IoQueue`] for each worker. `NbdStorage`: an export as bytes at
//!   offsets, blocking, for image formats.
//! * Exports are named by URIs, `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`; [`is_uri`]
//!   tells them from paths.
//! * Connections come from the caller's [`crate::Opener`].
//!
//! # What is promised
//!
//! * Every request ends exactly once, whatever the server does. A server that breaks the protocol, hangs up or stays
//!   silent over TCP loses its connection: all requests then end with `ENOTCONN`, and one line in the log
//!   names the URI and the reason. There is no second attempt.
//! * Nothing that a server sends panics, takes unbounded memory or is written anywhere but to
//!   the part of the read that it was asked for.
//! * A flush covers what had completed before it was sent, as far as the server keeps its word ([`NbdDisk`]).
//!
//! # How it is built
//!
//! ```text
//!  worker ── Request ──► NbdQueue        depth; the place to wait         (queue.rs)
//!                           │ Task       parts, durability, fallbacks     (task.rs)
//!                           ▼
//!                        Channel         one queue, or all of a disk      (channel.rs)
//!                           ▼
//!     NbdStorage ───────► Link           many commands on one connection  (link.rs)
//!     (storage.rs)          │ │
//!                     Slots ┘ └ Replies  what is asked, what is answered  (slots.rs, reply.rs)
//! ```
//!
//! Data goes between the request's own memory and the socket by vectored calls without copies, but for up to 8 KiB at the
//! start of a reply, where a copy is cheaper than a system call.

mod blocking;
mod channel;
mod disk;
mod handshake;
mod link;
mod queue;
mod reply;
mod session;
mod slots;
mod socket;
mod storage;
mod task;
#[cfg(test)]
mod tests;
mod uri;
mod wire;

pub use disk::NbdDisk;
pub use handshake::HandshakeError;
pub use session::NbdError;
pub(crate) use storage::NbdStorage;
pub use uri::{UriError, is_uri};
