//! The web console's server: one page, and the streams that it needs, for browsers on this host.
//!
//! # Contract
//!
//! [`serve`] takes a listener and a [`Desk`]. `GET /` and the files it names are for everybody and hold nothing of the
//! machine. `POST /session` exchanges the token for a session, once; `/screen` and `/serial` are WebSockets (RFC 6455) for those who have one:
//! the remote framebuffer protocol, which the desk speaks, and the serial console's bytes. Before these comes a message with the number of those
//! that had been written before (32 bits, big-endian): what a terminal answers to them nobody has asked.
//!
//! # Who gets in
//!
//! * The token is used once; then there is another ([`Tokens`]). After ten wrong ones who brings another one waits ten seconds, then longer;
//!   the right one is always taken: it cannot be guessed, and nobody is to be kept out by others' guesses.
//! * A session takes a cookie (`HttpOnly`, `SameSite=Strict`) and a key that the page alone has: browsers send cookies to every
//!   port of a host, and other programs may listen at those.
//! * A request names the loopback as its host, and one that changes or opens something comes from the page's own origin: neither another
//!   name for this address (DNS rebinding) nor another page (cross-site WebSockets) gets through.
//! * Secrets are in no request line and no log, and are compared in a time that tells nothing.
//!
//! # Costs
//!
//! One thread polls; nothing in it blocks. Of a client it keeps 8 KiB of a head, or what one message of a stream takes. There are
//! [`MAX_CLIENTS`] that have not opened a stream, of which the one that has waited longest goes for the next, and [`MAX_SERIALS`] that
//! have the console. Heads have ten seconds to come, answers and output half a minute to be read.

mod answer;
mod assets;
mod client;
mod door;
pub mod frame;
mod request;
mod serial;
mod server;
mod socket;
mod stream;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use crate::ControlError;
use door::Door;

pub use server::{MAX_CLIENTS, MAX_SERIALS};
pub use socket::WebSocket;
pub use stream::Listener;

/// The server's thread has this much stack, in bytes.
const STACK: usize = 256 << 10;

/// What the page leads to. Called on the server's thread; must not block.
pub trait Desk: Send + Sync {
    /// Speaks the remote framebuffer protocol with somebody who has been let in, as its server. `peer` names them in the log.
    ///
    /// # Errors
    ///
    /// The host's; the client is sent away then.
    fn screen(&self, socket: WebSocket, peer: String) -> io::Result<()>;

    /// A stream to the serial console, with the latest output first.
    ///
    /// # Errors
    ///
    /// When there is none to be had, with the reason.
    fn serial(&self) -> Result<SerialLine, ControlError>;
}

/// A way to the serial console.
#[derive(Debug)]
pub struct SerialLine {
    /// Its bytes, both ways.
    pub stream: UnixStream,
    /// How many of the first bytes were written before this was opened.
    pub replayed: u32,
}

/// Where the token is found that is exchanged next. Clones are of the same server.
#[derive(Debug, Clone)]
pub struct Tokens(Arc<Mutex<Door>>);

impl Tokens {
    /// The token: hexadecimal digits.
    #[must_use]
    pub fn current(&self) -> String {
        self.door().token().to_owned()
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A server that runs. Dropping it stops it.
#[derive(Debug)]
pub struct WebServer {
    tokens: Tokens,
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread is told to end.
#[derive(Debug)]
struct End {
    wake: OwnedFd,
    asked: AtomicBool,
}

impl WebServer {
    /// Where its tokens are found.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        self.tokens.clone()
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.end.asked.store(true, Ordering::Release);
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.end.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// Serves `desk` on `listener`, in a thread of its own. The sessions' cookie is named `cookie`, which tells this server from others
/// of the same host: browsers keep one jar for all ports.
///
/// # Errors
///
/// When the host has no descriptor, thread or random number left.
pub fn serve(listener: Listener, desk: Arc<dyn Desk>, cookie: String) -> io::Result<WebServer> {
    listener.set_nonblocking()?;
    let tokens = Tokens(Arc::new(Mutex::new(Door::new()?)));
    let end = Arc::new(End {
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        asked: AtomicBool::new(false),
    });
    let server = server::Server::new(listener, desk, cookie, tokens.clone(), Arc::clone(&end));
    let thread = std::thread::Builder::new()
        .name("web".to_owned())
        .stack_size(STACK);
    let thread = threads::spawn(thread, threads::Role::Api, move || server.run())?;
    Ok(WebServer {
        tokens,
        end,
        thread: Some(thread),
    })
}

#[cfg(test)]
mod tests;
