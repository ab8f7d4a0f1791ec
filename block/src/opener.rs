//! How this crate gets files and connections: through its caller.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::lease::Lease;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Open for writing as well as reading.
    pub write: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket. A path that begins with a zero byte is a name in the abstract namespace.
    Unix(PathBuf),
    /// A TCP port.
    Tcp {
        /// A host name or an address; an IPv6 address without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Makes connections to one server, as often as its holder wants.
pub trait Connector: Send + Sync + fmt::Debug {
    /// A new connection: a stream socket with `O_CLOEXEC`. Gives up in bounded time.
    ///
    /// # Errors
    ///
    /// The system's error.
    fn connect(&self) -> io::Result<OwnedFd>;

    /// As [`Connector::connect`], but never waits, and the socket is non-blocking.
    ///
    /// Unless it is implemented, no server can be connected to like that.
    ///
    /// # Errors
    ///
    /// The system's error; `WouldBlock` while the server has as many connections waiting as it may.
    fn connect_now(&self) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A unix socket to which others connect.
#[derive(Debug)]
pub struct Listening {
    /// The socket.
    pub socket: UnixListener,
    /// What removes its file when it is dropped.
    pub file: Box<dyn Any + Send>,
}

/// Opens files on behalf of this crate, by the policy of whoever implements it.
///
/// The monitor implements it once, for every file that it ever opens.
pub trait Opener: Send + Sync {
    /// Opens an existing file or block device. Never creates one.
    ///
    /// Opens with `O_CLOEXEC`, and with `O_NONBLOCK` so that a fifo cannot
    /// hold up the caller; [`crate::RawDisk::open`] takes `O_NONBLOCK` off again.
    ///
    /// # Errors
    ///
    /// The system's error, or `PermissionDenied` when policy forbids the path.
    fn open(&self, path: &Path, access: Access) -> io::Result<File>;

    /// Asks for the right to connect to a server. The policy is asked once: whoever has the
    /// [`Connector`] can make several connections, at any later time.
    ///
    /// Unless it is implemented, every address is refused.
    ///
    /// # Errors
    ///
    /// `PermissionDenied` when policy forbids the address.
    fn connector(&self, address: &Address) -> io::Result<Box<dyn Connector>> {
        let _ = address;
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "connections are not allowed here",
        ))
    }

    /// Listens at a new unix socket that only its owner can connect to. One that a dead process left
    /// behind is replaced.
    ///
    /// Unless it is implemented, every path is refused.
    ///
    /// # Errors
    ///
    /// The system's error, or what the policy says of the path: one at which a process listens is refused.
    fn listen(&self, path: &Path) -> io::Result<Listening> {
        let _ = path;
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "sockets are not allowed here",
        ))
    }

    /// Has `program` permit the use of the image at `path`, for reading or for writing too. Called before the
    /// image is opened; the lease is dropped once it has been closed.
    ///
    /// Unless it is implemented, every lease is refused.
    ///
    /// # Errors
    ///
    /// The system's error, `PermissionDenied` when the program refuses or policy forbids it.
    fn lease(&self, program: &Path, path: &Path, write: bool) -> io::Result<Box<dyn Lease>> {
        let _ = (program, path, write);
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "leases are not to be had here",
        ))
    }

    /// Creates a regular file for reading and writing, which must not exist, and opens it as
    /// [`Opener::open`] does. Only operations that make images ask for it.
    ///
    /// # Errors
    ///
    /// The system's error, `AlreadyExists` among them, or `PermissionDenied` when policy forbids the path,
    /// as it does unless the implementer says otherwise.
    fn create(&self, path: &Path, access: Access) -> io::Result<File> {
        let _ = (path, access);
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Gives a file that [`Opener::create`] made its final name in the same directory, if that name is
    /// free.
    ///
    /// # Errors
    ///
    /// As [`Opener::create`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _ = (from, to);
        Err(io::ErrorKind::PermissionDenied.into())
    }

    /// Removes a file that [`Opener::create`] made, or that its user asked to be rid of.
    ///
    /// # Errors
    ///
    /// As [`Opener::create`].
    fn remove(&self, path: &Path) -> io::Result<()> {
        let _ = path;
        Err(io::ErrorKind::PermissionDenied.into())
    }
}
