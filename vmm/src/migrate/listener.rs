//! Where monitors are waited for.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{SocketFlags, SocketType, accept_with, sockopt};

use super::link::{Given, Link, Place, stays_here};
use crate::opener::{OpenError, Opener, SocketFile};
use crate::tls::ServerTls;

/// How many peers that are not let in are logged.
const LOGGED: usize = 16;

/// What ends a wait.
#[derive(Clone, Debug)]
pub(super) struct Wake(Arc<OwnedFd>);

impl Wake {
    fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(fd)))
    }

    fn stop(&self) {
        // It counts, and cannot be full.
        let _ = rustix::io::write(&*self.0, &1_u64.to_ne_bytes());
    }
}

/// How a wait ended.
pub(super) enum Event {
    /// There is something to be read.
    Ready,
    /// The deadline has come.
    Late,
    /// Somebody wants an end of it.
    Stopped,
}

/// Until there is something to be read from `fd`.
pub(super) fn wait(
    fd: impl AsFd,
    wake: Option<&Wake>,
    deadline: Option<Instant>,
) -> io::Result<Event> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let time = left.map(|left| Timespec {
            // A minute at a time.
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(60).min(60),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut polled = vec![PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        polled.extend(wake.map(|wake| PollFd::from_borrowed_fd(wake.0.as_fd(), PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut polled, time.as_ref()))?;
        let mut polled = polled.iter().map(|fd| !fd.revents().is_empty());
        let (ready, stopped) = (polled.next() == Some(true), polled.next() == Some(true));
        if stopped {
            return Ok(Event::Stopped);
        }
        if ready {
            return Ok(Event::Ready);
        }
        if left.is_some_and(|left| left == Duration::ZERO) {
            return Ok(Event::Late);
        }
    }
}

enum Source {
    Tcp(std::net::TcpListener),
    Unix {
        listener: UnixListener,
        /// Goes with this.
        _file: SocketFile,
    },
    /// A command that is run once, when somebody waits for a connection.
    Exec(String, Opener, AtomicBool),
    /// A listening socket that somebody else has made.
    Given(OwnedFd),
    /// A connection of the same kind.
    Connected(Given),
}

/// Waits for monitors. Each connection is a [`Link`] of its own.
pub struct Listener {
    source: Source,
    tls: Option<ServerTls>,
    wake: Wake,
    /// Why peers were not let in, and how many.
    refused: Mutex<(usize, Option<String>)>,
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// Why nobody can be waited for.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The place is not to be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host has not what is needed.
    #[error("cannot wait for a connection")]
    Host(#[from] io::Error),
}

impl Listener {
    /// Listens at `place`; with `tls` only senders are let in that prove who they are. An `exec:` command is run by the first
    /// [`Listener::accept`], and is the only connection.
    ///
    /// # Errors
    ///
    /// [`ListenError`].
    pub fn open(
        place: &Place,
        opener: &Opener,
        tls: Option<ServerTls>,
    ) -> Result<Self, ListenError> {
        let source = match place {
            Place::Tcp { host, port } => {
                let listener = opener.listen_tcp(host, *port)?;
                listener.set_nonblocking(true)?;
                Source::Tcp(listener)
            }
            Place::Unix(path) => {
                let listener = opener.listen_unix(path)?;
                let file = opener.own_socket(path)?;
                listener.set_nonblocking(true)?;
                Source::Unix {
                    listener,
                    _file: file,
                }
            }
            Place::Exec(command) => {
                Source::Exec(command.clone(), opener.clone(), AtomicBool::new(false))
            }
            Place::Descriptor(_) => {
                let what = "the descriptor has to come along";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what).into());
            }
        };
        Self::of(source, tls)
    }

    /// Waits at a stream socket of any family that somebody else has made, which listens already, or is a connection: the only one then.
    ///
    /// # Errors
    ///
    /// [`ListenError::Host`]: `InvalidInput` for what is no such socket.
    pub fn given(socket: OwnedFd) -> Result<Self, ListenError> {
        let source = if Self::check(&socket)? {
            rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
            Source::Given(socket)
        } else {
            Source::Connected(Given::new(Link::given(socket)?))
        };
        Self::of(source, None)
    }

    /// Whether a descriptor is a stream socket that listens; otherwise it is a connection.
    ///
    /// # Errors
    ///
    /// `InvalidInput`: it is neither.
    pub fn check(socket: impl AsFd) -> io::Result<bool> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
        let kind = sockopt::socket_type(&socket).map_err(|_| {
            wrong("the descriptor is no socket: give one that is connected, or listens")
        })?;
        if kind != SocketType::STREAM {
            return Err(wrong(
                "the descriptor is no stream socket: give one that is connected, or listens",
            ));
        }
        if sockopt::socket_acceptconn(&socket).map_err(io::Error::from)? {
            return Ok(true);
        }
        rustix::net::getpeername(&socket)
            .map(|_| false)
            .map_err(|_| wrong("the descriptor is a socket that is neither connected nor listens"))
    }

    fn of(source: Source, tls: Option<ServerTls>) -> Result<Self, ListenError> {
        Ok(Self {
            source,
            tls,
            wake: Wake::new()?,
            refused: Mutex::default(),
        })
    }

    /// The port, where it is one; the system may have chosen it.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match &self.source {
            Source::Tcp(listener) => listener.local_addr().ok().map(|address| address.port()),
            _ => None,
        }
    }

    /// Whether one connection comes, and no other.
    #[must_use]
    pub fn is_single(&self) -> bool {
        matches!(self.source, Source::Exec(..) | Source::Connected(_))
    }

    /// Whether nobody of another host can connect, as far as this process sees: of a socket that somebody else has made.
    #[must_use]
    pub fn is_private(&self) -> bool {
        let Source::Given(socket) = &self.source else {
            return true;
        };
        rustix::net::getsockname(socket).is_ok_and(stays_here)
    }

    /// What ends all waiting, that which is under way and that which comes: [`Listener::accept`] then gives nothing. Any thread
    /// may call it, also when the listener is gone.
    pub fn stopper(&self) -> impl Fn() + Clone + Send + Sync + 'static + use<> {
        let wake = self.wake.clone();
        move || wake.stop()
    }

    /// Why the last peer that came was not let in.
    #[must_use]
    pub fn refused(&self) -> Option<String> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.1.clone()
    }

    /// The next connection, which is waited for until the `deadline`, or without an end. `None`: the deadline has come, or somebody
    /// has called the [stopper](Listener::stopper). A peer that does not prove who it is is sent away, and the next one waited for
    /// ([`Listener::refused`]). It has 10 s for that, in which others wait, and the deadline too.
    ///
    /// # Errors
    ///
    /// The host's: nobody else can come either.
    pub fn accept(&self, deadline: Option<Instant>) -> io::Result<Option<Link>> {
        loop {
            let Some(socket) = self.next(deadline)? else {
                return Ok(None);
            };
            let link = match (socket, &self.tls) {
                (Came::Link(link), _) => Ok(link),
                (Came::Socket(socket), None) => Link::new(socket),
                (Came::Socket(socket), Some(tls)) => Link::accept(socket, tls, &self.wake),
            };
            match link {
                Ok(link) => return Ok(Some(link)),
                Err(error) => self.refuse(&error),
            }
        }
    }

    fn refuse(&self, error: &io::Error) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.0 = refused.0.saturating_add(1);
        refused.1 = Some(error.to_string());
        if refused.0 <= LOGGED {
            tracing::warn!("a connection for a migration is not accepted: {error}");
        }
    }

    /// Nothing else comes, but the end.
    fn nothing(&self, deadline: Option<Instant>) -> io::Result<Option<Came>> {
        wait(&*self.wake.0, None, deadline)?;
        Ok(None)
    }

    fn next(&self, deadline: Option<Instant>) -> io::Result<Option<Came>> {
        loop {
            let listener = match &self.source {
                Source::Tcp(listener) => listener.as_fd(),
                Source::Unix { listener, .. } => listener.as_fd(),
                Source::Given(listener) => listener.as_fd(),
                Source::Exec(command, opener, run) => {
                    if !run.swap(true, Ordering::SeqCst) {
                        return Link::run(command, opener).map(Came::Link).map(Some);
                    }
                    return self.nothing(deadline);
                }
                Source::Connected(given) => match given.take() {
                    Ok(link) => return Ok(Some(Came::Link(link))),
                    Err(_) => return self.nothing(deadline),
                },
            };
            let Event::Ready = wait(listener, Some(&self.wake), deadline)? else {
                return Ok(None);
            };
            let accepted = accept_with(listener, SocketFlags::CLOEXEC);
            match accepted.map_err(io::Error::from) {
                Ok(socket) => return Ok(Some(Came::Socket(socket))),
                // Whoever came has gone again.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::ConnectionAborted
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What came.
enum Came {
    Socket(OwnedFd),
    Link(Link),
}

#[cfg(test)]
mod tests;
