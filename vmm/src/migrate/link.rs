//! Connections between two monitors.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::{ControlError, ErrorKind};
use block::{Address, Opener as _};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrAny, recvmsg, sendmsg, sockopt,
};

use super::listener::{Listener, Wake};
use super::secure::Secure;
use crate::opener::{Opener, Tunnel};
use crate::tls::{ClientTls, ServerTls};

/// How long a peer may be silent, and how long it may not take what it is sent. Both sides say that they are alive more often.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where a peer is, or is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A host's name or address, and a port.
    Tcp {
        /// Without brackets.
        host: String,
        /// 0, where the system is to choose one.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
    /// A command for a shell, whose input and output lead there.
    Exec(String),
    /// A socket that comes beside what names it, of this number to who has passed it.
    Descriptor(u32),
}

/// Why a text names no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}: it is none of {PLACES}")]
pub struct PlaceError {
    text: String,
}

/// The forms of a place.
pub const PLACES: &str = "tcp:HOST:PORT, unix:PATH, exec:COMMAND and fd:NUMBER";

impl Place {
    /// Of `tcp:HOST:PORT` or `unix:PATH`, each also with `//` behind the colon, `exec:COMMAND`, or `fd:NUMBER`.
    ///
    /// # Errors
    ///
    /// [`PlaceError`].
    pub fn parse(text: &str) -> Result<Self, PlaceError> {
        let wrong = || PlaceError {
            text: text.to_owned(),
        };
        if let Some(command) = text.strip_prefix("exec:") {
            if command.trim().is_empty() || command.contains('\0') {
                return Err(wrong());
            }
            return Ok(Self::Exec(command.to_owned()));
        }
        if let Some(number) = text.strip_prefix("fd:") {
            let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
            // What no descriptor can be is none.
            let number = number.parse().ok();
            let number = number.filter(|number| is_plain && i32::try_from(*number).is_ok());
            return number.map(Self::Descriptor).ok_or_else(wrong);
        }
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() || path.contains('\0') {
                return Err(wrong());
            }
            return Ok(Self::Unix(path.into()));
        }
        let place = text.strip_prefix("tcp:").ok_or_else(wrong)?;
        let place = place.strip_prefix("//").unwrap_or(place);
        let (host, port) = place.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let host = match host.strip_prefix('[') {
            Some(inside) => inside.strip_suffix(']').ok_or_else(wrong)?,
            None if host.contains(':') => return Err(wrong()),
            None => host,
        };
        if host.is_empty() {
            return Err(wrong());
        }
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }

    /// Whether what is said there can be heard on this host alone; of a command, or a connection that somebody else has made, whose matter it is, that is
    /// believed. A socket that listens is looked at by who has it ([`Listener::is_private`]).
    #[must_use]
    pub fn is_private(&self) -> bool {
        match self {
            Self::Unix(_) | Self::Exec(_) | Self::Descriptor(_) => true,
            Self::Tcp { host, .. } => {
                let address: Result<std::net::IpAddr, _> = host.parse();
                host == "localhost" || address.is_ok_and(|address| address.is_loopback())
            }
        }
    }
}

/// That a guest's memory goes over a network only if it cannot be heard or changed there, or somebody has said that it may be.
///
/// # Errors
///
/// [`ErrorKind::Invalid`]; also for TLS where it is not spoken.
pub fn check_private(place: &Place, tls: bool, insecure: bool) -> Result<(), ControlError> {
    if tls && !matches!(place, Place::Tcp { .. }) {
        let message = format!("{place}: TLS (--tls; \"tls_dir\") is for tcp: alone: leave it out");
        return Err(ControlError::new(ErrorKind::Invalid, message));
    }
    if tls || insecure || place.is_private() {
        return Ok(());
    }
    let message = format!(
        "{place} is not on this host alone, and whoever is on the way could read and change the guest's memory: give --tls DIR \
         (\"tls_dir\") on both sides, or --insecure (\"insecure\": true) where the network keeps others out"
    );
    Err(ControlError::new(ErrorKind::Invalid, message))
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

/// One connection. One thread may read while another writes, each with a clone.
#[derive(Clone)]
pub struct Link(Arc<Inner>);

struct Inner {
    // Goes before the command, which has to see its input end.
    socket: UnixStream,
    secure: Option<Secure>,
    tunnel: Option<Tunnel>,
    /// Something has come.
    heard: AtomicBool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Link")
    }
}

/// How records of TLS begin that a peer sends first: an alert, and what shakes hands. The stream of a migration begins otherwise.
const TLS_RECORDS: [u8; 2] = [0x15, 0x16];

impl Link {
    /// Of a connected socket of any family.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self::of(prepared(socket)?, None, None))
    }

    /// The same of one that somebody else has made.
    ///
    /// # Errors
    ///
    /// The host's, and `InvalidInput` for what is no connected stream socket.
    pub fn given(socket: OwnedFd) -> io::Result<Self> {
        Self::check(&socket)?;
        Self::new(socket)
    }

    /// That [`Link::given`] takes a descriptor.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn check(socket: &OwnedFd) -> io::Result<()> {
        if Listener::check(socket)? {
            let what = "the descriptor is a socket that listens: give one that is connected";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        Ok(())
    }

    fn of(socket: UnixStream, secure: Option<Secure>, tunnel: Option<Tunnel>) -> Self {
        Self(Arc::new(Inner {
            socket,
            secure,
            tunnel,
            heard: AtomicBool::new(false),
        }))
    }

    /// Of a command that is run for it.
    pub(super) fn run(command: &str, opener: &Opener) -> io::Result<Self> {
        let (socket, tunnel) = opener.tunnel(command)?;
        Ok(Self::of(prepared(socket)?, None, Some(tunnel)))
    }

    /// Of a connection that has come, when the sender has proven who it is.
    pub(super) fn accept(socket: OwnedFd, tls: &ServerTls, wake: &Wake) -> io::Result<Self> {
        let socket = prepared(socket)?;
        let secure = Secure::accept(&socket, tls, wake).map_err(late)?;
        Ok(Self::of(socket, Some(secure), None))
    }

    #[cfg(test)]
    pub(super) fn secure(&self) -> &Secure {
        self.0.secure.as_ref().unwrap()
    }

    #[cfg(test)]
    pub(super) fn socket(&self) -> &UnixStream {
        &self.0.socket
    }

    /// From here on it is waited so long for what is to be read, or without an end.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn set_patience(&self, patience: impl Into<Option<Duration>>) -> io::Result<()> {
        self.0.socket.set_read_timeout(patience.into())
    }

    /// Sends a descriptor. Of a unix socket alone, and once.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let descriptors = [descriptor];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let socket = &self.0.socket;
        sendmsg(
            socket,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Waits for what [`Link::send_descriptor`] sends. Nothing has been read that came with it.
    ///
    /// # Errors
    ///
    /// The host's, and `InvalidData` where none comes.
    pub fn receive_descriptor(&self) -> io::Result<OwnedFd> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let (mut byte, flags) = ([0], RecvFlags::CMSG_CLOEXEC);
        let mut vectors = [IoSliceMut::new(&mut byte)];
        recvmsg(&self.0.socket, &mut vectors, &mut control, flags)
            .map_err(|error| late(error.into()))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message
                && let Some(descriptor) = descriptors.next()
            {
                return Ok(descriptor);
            }
        }
        let what = "no descriptor came along";
        Err(io::Error::new(io::ErrorKind::InvalidData, what))
    }

    /// The socket itself, where what is written to it goes as it is and within this host, which keeps it whole.
    pub fn direct(&self) -> Option<OwnedFd> {
        if self.0.secure.is_some() || self.0.tunnel.is_some() {
            return None;
        }
        let peer = rustix::net::getpeername(&self.0.socket).ok()??;
        let socket = self.0.socket.as_fd().try_clone_to_owned();
        socket.ok().filter(|_| stays_here(peer))
    }

    /// Nothing more is heard: who reads finds the end. It can be written to as before.
    pub fn stop_reading(&self) {
        // It may have ended by itself.
        let _ = self.0.socket.shutdown(Shutdown::Read);
        if let Some(tunnel) = &self.0.tunnel {
            tunnel.forget();
        }
    }

    /// Ends it, for both sides and all threads. Waits for nobody; what has been written still gets there, if the network lives.
    pub fn hang_up(&self) {
        self.0.end();
    }
}

/// A connection that somebody else has made: it is there once.
pub struct Given(Mutex<Option<Link>>);

impl Given {
    /// Of [`Link::given`].
    #[must_use]
    pub fn new(link: Link) -> Self {
        Self(Mutex::new(Some(link)))
    }

    /// The connection.
    ///
    /// # Errors
    ///
    /// It has been used before.
    pub fn take(&self) -> io::Result<Link> {
        let link = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        link.ok_or_else(|| io::Error::other("the descriptor is one connection, and that has ended"))
    }
}

/// Whether an address is of this host alone.
pub(super) fn stays_here(address: SocketAddrAny) -> bool {
    let family = address.address_family();
    match SocketAddr::try_from(address) {
        Ok(address) => address.ip().to_canonical().is_loopback(),
        Err(_) => family == AddressFamily::UNIX,
    }
}

fn prepared(socket: OwnedFd) -> io::Result<UnixStream> {
    // Where it is no TCP socket there is nothing to be said.
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    // Whoever has made it may have wanted that its end is waited for; threads that close it wait for nobody.
    sockopt::set_socket_linger(&socket, None)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

impl Inner {
    fn end(&self) {
        if let Some(secure) = &self.secure {
            secure.part(&self.socket);
        }
        // It may have ended by itself.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(tunnel) = &self.tunnel {
            tunnel.end();
        }
    }

    fn read_plain(&self, buf: &mut [u8]) -> io::Result<usize> {
        let len = (&self.socket).read(buf)?;
        let first = buf.first().filter(|_| len > 0);
        if let Some(first) = first
            && !self.heard.swap(true, Ordering::Relaxed)
            && TLS_RECORDS.contains(first)
        {
            let what = "the other side speaks TLS, and this one does not: give both sides --tls DIR (\"tls_dir\"), or neither";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(len)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match &self.0.secure {
            Some(secure) => secure.read(&self.0.socket, buf),
            None => self.0.read_plain(buf),
        };
        if let (Ok(0), Some(tunnel), false) = (&read, &self.0.tunnel, buf.is_empty())
            && let Some(why) = tunnel.failure()
        {
            return Err(io::Error::other(why));
        }
        read.map_err(late)
    }
}

impl Write for Link {
    /// Takes part of it, where that is long.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let written = match &self.0.secure {
            Some(secure) => secure.write(&self.0.socket, buf),
            None => (&self.0.socket).write(buf),
        };
        if let (Err(error), Some(tunnel)) = (&written, &self.0.tunnel)
            && error.kind() == io::ErrorKind::BrokenPipe
            && let Some(why) = tunnel.failure()
        {
            return Err(io::Error::other(why));
        }
        written.map_err(late)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How the kernel says that the time is up, in words.
pub(super) fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

/// Connects to the monitor at `place`, with `tls` to one that proves who it is and accepts this one. That can take as long as the host's
/// name service, 5 s for each of four addresses, and [`PATIENCE`] for TLS.
///
/// # Errors
///
/// The host's, and with `tls` a [`SecureError`](super::secure::SecureError) inside. TLS where there is none (see [`check_private`]) is `Unsupported`.
pub fn connect(place: &Place, opener: &Opener, tls: Option<&ClientTls>) -> io::Result<Link> {
    let address = match place {
        Place::Tcp { host, port } => Address::Tcp {
            host: host.clone(),
            port: *port,
        },
        _ if tls.is_some() => return Err(io::ErrorKind::Unsupported.into()),
        Place::Unix(path) => Address::Unix(path.clone()),
        Place::Exec(command) => return Link::run(command, opener),
        // Whoever has it uses it ([`Given`]).
        Place::Descriptor(_) => return Err(io::ErrorKind::Unsupported.into()),
    };
    let socket = opener.connector(&address)?.connect()?;
    match (place, tls) {
        (Place::Tcp { host, .. }, Some(tls)) => {
            let socket = prepared(socket)?;
            let secure = Secure::connect(&socket, tls, host).map_err(late)?;
            Ok(Link::of(socket, Some(secure), None))
        }
        _ => Link::new(socket),
    }
}

#[cfg(test)]
mod tests;
