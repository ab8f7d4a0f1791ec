//! A VNC server's door: where viewers connect, and who is let through to the server behind it.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;

use api::wire::VncConfig;
use devices::LogLimit;
use devices::display::rfb::{Password, Security, Server, Stream};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt::socket_peercred;

use super::ViewersError;
use crate::config::display::VncAddress;
use crate::opener::{Opener, SocketFile};
use crate::sandbox::{Builder, Kind};
use crate::tls::ServerTls;

/// How long nobody is let in after that has failed: the host is out of descriptors.
const REST: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A brake for what those at the door can cause to be logged.
static LOG: LogLimit = LogLimit::new();

/// What viewers are let in by, read from its files.
#[derive(Clone, Default, PartialEq)]
pub struct Secrets {
    /// They must know this.
    pub password: Option<Password>,
    /// They must use TLS with this certificate.
    pub tls: Option<ServerTls>,
}

/// A door. It is closed when it is dropped.
pub struct Vnc {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

/// A door that is to be opened.
pub struct WantedVnc {
    pub(super) config: VncConfig,
    pub(super) secrets: Secrets,
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
    /// Listens, and lets viewers through to `server`.
    pub(super) fn open(&self, server: Arc<Server>, opener: &Opener) -> Result<Vnc, ViewersError> {
        let host = |what| move |source| ViewersError::Host { what, source };
        let mut file = None;
        let address = self.config.address.parse();
        let listener = match address.map_err(ViewersError::VncAddress)? {
            VncAddress::Unix(path) => {
                let listener = opener.listen_unix(&path).map_err(ViewersError::Vnc)?;
                file = Some(opener.own_socket(&path).map_err(ViewersError::Vnc)?);
                let set = listener.set_nonblocking(true);
                set.map_err(host("the socket"))?;
                Listener::Unix(listener)
            }
            VncAddress::Tcp { host: at, port } => {
                let listener = opener.listen_tcp(&at, port).map_err(ViewersError::Vnc)?;
                let set = listener.set_nonblocking(true);
                set.map_err(host("the socket"))?;
                Listener::Tcp(listener)
            }
        };
        let security = Security {
            password: self.secrets.password.clone(),
            tls: self.secrets.tls.clone().map(|tls| Arc::new(tls) as _),
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| host("no descriptor to serve viewers")(error.into()))?;
        let wake = Arc::new(wake);
        let told = Arc::clone(&wake);
        let work = move || guard(&listener, &told, &server, &security);
        let thread = Builder::new(Kind::Display)
            .name("vnc".to_owned())
            .spawn(work);
        Ok(Vnc {
            wake,
            thread: Some(thread.map_err(host("no thread to let viewers in"))?),
            _file: file,
        })
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
