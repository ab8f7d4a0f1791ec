//! A VNC server's door: where viewers connect, and who is let through to the server behind it.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use api::wire::{VncConfig, VncShare};
use devices::LogLimit;
use devices::display::Screen;
use devices::display::rfb::{Options, Password, Security, Server, Sharing, Stream};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::socket_peercred;

use super::Hands;
use crate::config::display::{VncAddress, VncAddressError};
use crate::machine::alarm::SteadyClock;
use crate::opener::{OpenError, Opener, SocketFile};

/// How long nobody is let in after that has failed: the host is out of descriptors.
const REST: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A brake for what those at the door can cause to be logged.
static LOG: LogLimit = LogLimit::new();

/// Why viewers cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum VncError {
    /// The address is none.
    #[error("vnc")]
    Address(#[from] VncAddressError),
    /// It cannot be listened at.
    #[error("vnc")]
    Open(#[from] OpenError),
    /// The host refused something.
    #[error("vnc: {what}")]
    Host {
        /// What.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// A server and its door. Both are closed when it is dropped.
pub struct Vnc {
    config: VncConfig,
    password: Option<Password>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

/// What is to be opened: a server and its door.
pub struct WantedVnc {
    pub(super) config: VncConfig,
    pub(super) password: Option<Password>,
    pub(super) name: Option<String>,
    pub(super) screen: Arc<Screen>,
    pub(super) hands: Arc<Hands>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }

    /// Somebody who waits at the door, and who that is.
    fn accept(&self) -> io::Result<(Box<dyn Stream>, String)> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                let peer = match socket_peercred(&stream) {
                    Ok(peer) => format!("process {}", peer.pid.as_raw_nonzero()),
                    Err(_) => "a process".to_owned(),
                };
                Ok((Box::new(stream), peer))
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok((Box::new(stream), peer.to_string()))
            }
        }
    }
}

impl WantedVnc {
    /// Listens, and serves. Not on the control thread: storage may stop where the socket's file is to be.
    ///
    /// # Errors
    ///
    /// [`VncError`]; nothing is left behind.
    pub fn open(self, opener: &Opener) -> Result<Vnc, VncError> {
        let Self {
            config,
            password,
            name,
            screen,
            hands,
        } = self;
        let host = |what| move |source| VncError::Host { what, source };
        let mut file = None;
        let listener = match config.address.parse()? {
            VncAddress::Unix(path) => {
                let listener = opener.listen_unix(&path)?;
                file = Some(opener.own_socket(&path)?);
                let set = listener.set_nonblocking(true);
                set.map_err(host("the socket"))?;
                Listener::Unix(listener)
            }
            VncAddress::Tcp { host: at, port } => {
                let listener = opener.listen_tcp(&at, port)?;
                let set = listener.set_nonblocking(true);
                set.map_err(host("the socket"))?;
                Listener::Tcp(listener)
            }
        };
        let options = Options {
            name: name.unwrap_or_else(|| "vireo".to_owned()),
            sharing: match config.share {
                VncShare::AllowExclusive => Sharing::AllowExclusive,
                VncShare::ForceShared => Sharing::ForceShared,
                VncShare::Ignore => Sharing::Ignore,
            },
            pastes: config.paste,
        };
        let server = Server::start(screen, hands, Arc::new(SteadyClock), options);
        let server = server.map_err(host("no thread to serve viewers"))?;
        let security = Security {
            password: password.clone(),
            tls: None,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| host("no descriptor to serve viewers")(error.into()))?;
        let wake = Arc::new(wake);
        let told = Arc::clone(&wake);
        let work = move || guard(&listener, &told, &server, &security);
        let thread = Builder::new().name("vnc".to_owned()).spawn(work);
        Ok(Vnc {
            config,
            password,
            wake,
            thread: Some(thread.map_err(host("no thread to let viewers in"))?),
            _file: file,
        })
    }
}

impl Vnc {
    /// Whether it is what `config` and `password` ask for.
    pub fn is(&self, config: &VncConfig, password: Option<&Password>) -> bool {
        self.config == *config && self.password.as_ref() == password
    }
}

impl Drop for Vnc {
    fn drop(&mut self) {
        // Full means that it is awake already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// Lets in who comes, until it is woken.
fn guard(listener: &Listener, wake: &OwnedFd, server: &Server, security: &Security) {
    let mut rests = false;
    loop {
        let door = if rests {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut fds = [
            PollFd::new(wake, PollFlags::IN),
            PollFd::from_borrowed_fd(listener.as_fd(), door),
        ];
        let polled = poll(&mut fds, rests.then_some(&REST));
        if polled.is_ok() && !fds[0].revents().is_empty() {
            return;
        }
        rests = false;
        let came = listener.accept().and_then(|(stream, peer)| {
            if let Some(suppressed) = LOG.allow() {
                tracing::info!(%peer, suppressed, "a viewer connects");
            }
            server.connect(stream, security, peer)
        });
        match came {
            Ok(()) => (),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(error) => {
                if let Some(suppressed) = LOG.allow() {
                    tracing::warn!(%error, suppressed, "a viewer could not be let in");
                }
                rests = true;
            }
        }
    }
}
