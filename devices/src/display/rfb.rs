//! A server of the remote framebuffer protocol, version 3.8 (RFC 6143), which is VNC's.
//!
//! # What it serves
//!
//! Versions 3.3, 3.7 and 3.8. Everybody, those with a password (VNC authentication), or those who speak TLS by VeNCrypt
//! with the server's certificate, with or without a password. Pixels of 8, 16 and 32 bits in any true-colour
//! format, and of 8 bits with a colour map. Raw, CopyRect for what scrolls, Hextile, ZRLE, Tight with JPEG where the client
//! gives a quality. The pseudo-encodings `Cursor` (a dot: guests draw their own), `DesktopSize`,
//! `ExtendedDesktopSize` (the guest alone sets the size), `DesktopName`, `LastRect` (which needs nothing), QEMU's extended key events and
//! pointer motion, `ContinuousUpdates` and `Fence`. Text that clients cut is typed into the guest where that is wanted, and passed over elsewhere.
//!
//! # Threads and costs
//!
//! One thread serves all clients of a [`Screen`]. It sleeps while nobody waits for a picture, and looks at
//! the screen ever more rarely while nothing changes. A client that does not read is sent nothing
//! more and listened to no more; it holds some hundred kibibytes and the others do not notice.
//!
//! # Bad clients
//!
//! All that a client says is read by two parsers, of the handshake and of messages, which hold no more of it than the longest message.
//! Clients that are not in after ten seconds are sent away, and the oldest of them when many come at once. After five
//! wrong passwords none is looked at for a while, then for longer and longer.
//!
//! [`Screen`]: super::Screen

mod auth;
mod connection;
mod encode;
mod format;
mod hands;
mod handshake;
mod message;
mod paste;
mod server;
mod service;
mod stream;
mod viewer;

pub use auth::{CHALLENGE, Password, PasswordError, Security};
pub use server::Server;
pub use service::{MAX_GREETINGS, MAX_VIEWERS, Options, Service, Sharing};
pub use stream::{Stream, TlsAcceptor};
