//! The server of the control socket: HTTP/1.1 on a unix socket.
//!
//! [`serve`] takes a listening socket and a [`Control`] and answers requests by
//! [`crate::routes::ROUTES`] until the [`ServerHandle`] stops it. What goes over the
//! wire is what Cloud Hypervisor's v1 clients expect, byte for byte: a status
//! line without a reason phrase, `Server`, `Connection`, `Content-Type`,
//! `Content-Length` in that order and spelling, ASCII bodies, errors as a JSON
//! array of strings with the outermost cause first, and a connection that stays open.
//!
//! One thread, woken by epoll, holds all connections, and nothing in it blocks: reads of
//! [`Control`] are answered at once, commands are submitted and answered when the
//! monitor's thread has carried them out. Requests of one connection are
//! answered in order; a connection that waits holds no other up.
//!
//! What a client can make the server keep is bounded by [`ServerOptions`]: connections, bytes of a
//! request, bytes of all requests together, descriptors, and the time that a
//! request may take to arrive or an answer to be read.
//!
//! Heads are parsed by `httparse`, the parser beneath hyper. hyper itself
//! answers what it cannot parse without asking, with a reason phrase, no body
//! and its own headers; answers HTTP/1.0 in kind; says `100 Continue`; and closes
//! when told to. v1's clients and captures want each of these otherwise.

mod answer;
pub(crate) mod brake;
mod connection;
mod dispatch;
mod events;
mod fields;
mod head;
mod json;
mod mailbox;
mod objects;
pub(crate) mod peer;
mod requests;
mod server;
mod tunnel;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::Control;
use mailbox::Mailbox;
use server::Server;

/// The server's thread has this much stack. It is reserved, not used: a request
/// touches a few pages of it.
const STACK: usize = 512 << 10;

/// Whose processes are served. What a client may do is what the monitor may, so who connects counts beside the mode of the
/// socket's file, which says nothing once it has been widened or the socket passed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Clients {
    /// Whoever can connect.
    #[default]
    Anyone,
    /// Those whose effective user was one of these when they connected. Users that the namespace of this process does not
    /// know are all the same one, 65534.
    Users(Vec<u32>),
}

impl Clients {
    /// Whether a process of `user` is served; one that the kernel does not name is not.
    fn include(&self, user: Option<u32>) -> bool {
        match self {
            Self::Anyone => true,
            Self::Users(users) => user.is_some_and(|user| users.contains(&user)),
        }
    }
}

/// What the server bears, and how strict it is.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Whose requests are looked at. Others are answered 403 and closed.
    pub clients: Clients,
    /// Whether v1's endpoints refuse unknown fields too. Otherwise an event tells of them.
    pub strict: bool,
    /// How many connections may be open. The next one makes one that has been
    /// idle for [`Self::idle_timeout`] go, or is answered 503 and closed.
    pub max_connections: usize,
    /// How many commands may be under way. They count until they are answered, even when
    /// their clients have gone.
    pub max_commands: usize,
    /// How many bytes a request may have before its body.
    pub head_limit: usize,
    /// How many bytes a body may have.
    pub body_limit: usize,
    /// How many bytes all requests that are under way may have together.
    pub total_limit: usize,
    /// How long a request may take to arrive in full.
    pub request_timeout: Duration,
    /// How long a client may not read while an answer waits for it.
    pub write_timeout: Duration,
    /// How long a connection is kept without a request when all are in use.
    pub idle_timeout: Duration,
    /// How often a stream of events says that it lives.
    pub heartbeat: Duration,
    /// How long a server that is stopped waits for answers to be given and read.
    pub stop_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            clients: Clients::default(),
            strict: false,
            max_connections: 128,
            max_commands: 32,
            head_limit: 16 << 10,
            body_limit: 4 << 20,
            total_limit: 16 << 20,
            request_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(1),
            heartbeat: Duration::from_secs(15),
            stop_timeout: Duration::from_secs(2),
        }
    }
}

/// A server that runs. Dropping it stops it.
#[derive(Debug)]
pub struct ServerHandle {
    mailbox: Arc<Mailbox>,
    thread: Option<JoinHandle<()>>,
}

impl ServerHandle {
    /// Takes no more connections and requests, waits until the answers to
    /// commands under way have been given and read, at most
    /// [`ServerOptions::stop_timeout`], and ends the thread.
    ///
    /// A command that was answered before this call has its answer sent. Must not be called from
    /// within a call of the server's [`Control`].
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.mailbox.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the control socket panicked");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Serves `control` on `listener`, in a thread of its own.
///
/// The listener is made nonblocking. The socket's file is the caller's.
///
/// # Errors
///
/// When the host has no descriptors or threads left.
pub fn serve(
    listener: UnixListener,
    control: Arc<dyn Control>,
    options: ServerOptions,
) -> io::Result<ServerHandle> {
    let mailbox = Arc::new(Mailbox::new()?);
    let server = Server::new(listener, control, options, Arc::clone(&mailbox))?;
    let thread = std::thread::Builder::new()
        .name("api".to_owned())
        .stack_size(STACK);
    let thread = threads::spawn(thread, threads::Role::Api, move || server.run())?;
    Ok(ServerHandle {
        mailbox,
        thread: Some(thread),
    })
}
