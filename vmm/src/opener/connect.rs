//! Connections to servers that disks are at, made in bounded time.

use std::io;
use std::mem::offset_of;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use block::Address;

use crate::sandbox;

/// How long one address is tried.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many addresses of a host name are tried.
const MAX_ADDRESSES: usize = 4;

/// Connects to an address with the rights of this process.
#[derive(Debug)]
pub(super) struct Connector(pub(super) Address);

impl block::Connector for Connector {
    /// Gives up after 5 s for each of a host's first four addresses, beside the time that the system's
    /// resolver takes.
    fn connect(&self) -> io::Result<OwnedFd> {
        let address = self.0.clone();
        // A disk's thread asks for it when a server has come back.
        sandbox::as_job(move || {
            let socket = match &address {
                Address::Unix(path) => unix(path),
                Address::Tcp { host, port } => tcp(host, *port),
            }?;
            tracing::debug!(?address, "connected");
            Ok(socket)
        })
    }

    /// Only unix sockets: whether another host answers is not known at once.
    fn connect_now(&self) -> io::Result<OwnedFd> {
        let Address::Unix(path) = &self.0 else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let path = path.clone();
        sandbox::at_once(move || {
            let socket = UnixStream::from(unix_socket()?);
            socket.set_nonblocking(true)?;
            connect_to(&socket, &path)?;
            Ok(socket.into())
        })
    }
}

fn tcp(host: &str, port: u16) -> io::Result<OwnedFd> {
    let mut result = Err(io::Error::new(
        io::ErrorKind::NotFound,
        "the host name has no address",
    ));
    for address in sandbox::resolve(host, port)?.iter().take(MAX_ADDRESSES) {
        result = TcpStream::connect_timeout(address, PATIENCE).map(OwnedFd::from);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Connects to a unix socket. The standard library would wait without limit for a server that does not
/// accept; the time for sending limits that too (unix(7), `SO_SNDTIMEO`).
fn unix(path: &Path) -> io::Result<OwnedFd> {
    let socket = UnixStream::from(unix_socket()?);
    socket.set_write_timeout(Some(PATIENCE))?;
    connect_to(&socket, path).map_err(|error| match error.kind() {
        // How the kernel says that the time is up.
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    })?;
    socket.set_write_timeout(None)?;
    Ok(socket.into())
}

fn connect_to(socket: &UnixStream, path: &Path) -> io::Result<()> {
    let (address, len) = unix_address(path)?;
    #[expect(
        unsafe_code,
        reason = "connect(2) on a socket that exists has no safe wrapper"
    )]
    // SAFETY: the address is a whole `sockaddr_un`, of which `len` bytes are in use.
    let rc = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "a socket that is not connected yet has no safe wrapper"
)]
fn unix_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it has just been made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The address of a path, or of an abstract name after a zero byte; and its length.
fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    let (abstract_name, zero_inside) = match bytes.split_first() {
        Some((0, _)) => (true, false),
        _ => (false, bytes.contains(&0)),
    };
    #[expect(unsafe_code, reason = "a socket's address is plain data")]
    // SAFETY: all bytes zero are a valid `sockaddr_un`.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    // A path ends with a zero byte.
    let len = bytes.len() + usize::from(!abstract_name);
    if bytes.is_empty() || zero_inside || len > address.sun_path.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no path of a unix socket",
        ));
    }
    address.sun_family = libc::AF_UNIX.try_into().map_err(io::Error::other)?;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let len = offset_of!(libc::sockaddr_un, sun_path) + len;
    Ok((address, len.try_into().map_err(io::Error::other)?))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    use std::path::PathBuf;

    use block::{Connector as _, Opener as _};

    use super::*;
    use crate::opener::Opener;

    fn connect(address: Address) -> io::Result<UnixStream> {
        let connector = Opener::new().connector(&address)?;
        connector.connect().map(UnixStream::from)
    }

    #[test]
    fn a_path_an_abstract_name_and_a_port_are_connected_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let name = format!("vireo-test-{}", std::process::id());
        let named = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, address) in [
            (UnixListener::bind(&path).unwrap(), Address::Unix(path)),
            (
                UnixListener::bind_addr(&named).unwrap(),
                Address::Unix(PathBuf::from(format!("\0{name}"))),
            ),
        ] {
            let mut ours = connect(address).unwrap();
            ours.write_all(b"hello").unwrap();
            let mut got = [0; 5];
            listener.accept().unwrap().0.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"hello");
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let host = "localhost".to_owned();
        let socket = Connector(Address::Tcp { host, port }).connect().unwrap();
        listener.accept().unwrap();
        drop(socket);
    }

    #[test]
    fn what_does_not_answer_or_is_no_address_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let long = PathBuf::from("x".repeat(108));
        for (path, kind) in [
            (dir.path().join("none"), io::ErrorKind::NotFound),
            (PathBuf::new(), io::ErrorKind::InvalidInput),
            (PathBuf::from("a\0b"), io::ErrorKind::InvalidInput),
            (long, io::ErrorKind::InvalidInput),
        ] {
            assert_eq!(connect(Address::Unix(path)).unwrap_err().kind(), kind);
        }
        let socket = dir.path().join("socket");
        drop(UnixListener::bind(&socket).unwrap());
        let refused = connect(Address::Unix(socket)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_server_that_lets_nobody_in_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let connector = Connector(Address::Unix(path));
        #[expect(unsafe_code, reason = "a queue's length has no safe wrapper")]
        // SAFETY: the descriptor is that of a listener, and the rest a number.
        let shortened = unsafe { libc::listen(listener.as_raw_fd(), 0) };
        assert_eq!(shortened, 0);
        let mut waiting = Vec::new();
        let error = loop {
            match connector.connect_now() {
                Ok(socket) => waiting.push(socket),
                Err(error) => break error,
            }
            assert!(waiting.len() < 10);
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let (_theirs, _) = listener.accept().unwrap();
        let ours = UnixStream::from(connector.connect_now().unwrap());
        let empty = (&ours).read(&mut [0]).unwrap_err();
        assert_eq!(empty.kind(), io::ErrorKind::WouldBlock);
        let tcp = Connector(Address::Tcp {
            host: "localhost".to_owned(),
            port: 1,
        });
        let refused = tcp.connect_now().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    }
}
