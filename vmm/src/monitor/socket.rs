//! What a monitor has open to the outside: the API socket, with its file and the lock that
//! keeps a second monitor away, and where events are written.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use api::http::Clients;
use rustix::fs::{Mode, OFlags};

use crate::opener::{OpenError, Opener, SocketFile};

/// Where a monitor listens or writes.
#[derive(Debug)]
pub enum Place {
    /// A socket or file that it makes.
    Path(PathBuf),
    /// What it has been started with, from [`Inherited::take`].
    Descriptor(OwnedFd),
}

impl Place {
    /// Where this is found as long as it is open.
    #[must_use]
    pub fn to_path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Descriptor(fd) => Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string()),
        }
    }
}

/// Why a descriptor is not what its flag needs.
#[derive(Debug, thiserror::Error)]
pub enum InheritedError {
    /// There is none of this number.
    #[error(
        "{flag} fd={fd}: this process was not started with it: pass it open, or give path=PATH"
    )]
    Closed {
        /// The flag.
        flag: &'static str,
        /// The number.
        fd: RawFd,
    },
    /// There is none of this number for a card.
    #[error("--net fd={fd}: this process was not started with it: pass it open, or give tap=NAME")]
    NoTap {
        /// The number.
        fd: RawFd,
    },
    /// There is none of this number for a migration.
    #[error(
        "fd:{fd}: this process was not started with it: pass it open, with a number of 3 or more"
    )]
    NoConnection {
        /// The number.
        fd: RawFd,
    },
    /// It is for two things.
    #[error("{SOCKET} and {EVENTS} have the same fd={fd}: give each one of its own")]
    Twice {
        /// The number.
        fd: RawFd,
    },
    /// Nobody can connect to it.
    #[error("{SOCKET} fd={fd}: it is no listening unix socket: pass one, or give path=PATH")]
    NotListening {
        /// The number.
        fd: RawFd,
    },
    /// Nothing can be written to it.
    #[error(
        "{EVENTS} fd={fd}: it is {found}, and cannot be written: pass a file, a pipe or a connected socket that can, or \
         give path=PATH"
    )]
    NotWritable {
        /// The number.
        fd: RawFd,
        /// What it is.
        found: &'static str,
    },
}

const SOCKET: &str = "--api-socket";
const EVENTS: &str = "--event-monitor";
const ROOT: u32 = 0;

/// The descriptors that the process was started with for the monitor.
#[derive(Debug, Default)]
pub struct Inherited {
    /// The control socket, which listens.
    pub socket: Option<OwnedFd>,
    /// What events are written to.
    pub events: Option<OwnedFd>,
    /// Over which a machine goes or comes.
    pub connection: Option<OwnedFd>,
}

impl Inherited {
    /// Takes the socket over which a machine goes or comes, as [`Inherited::take`] takes others, where nothing else is taken.
    ///
    /// # Errors
    ///
    /// [`InheritedError::NoConnection`], also for the standard descriptors. What kind of socket it is, is looked at by whoever uses it.
    pub fn take_connection(fd: RawFd) -> Result<Self, InheritedError> {
        if fd <= 2 || status(fd).is_none() {
            return Err(InheritedError::NoConnection { fd });
        }
        let connection = take(fd);
        leave_to_it(&connection);
        Ok(Self {
            connection: Some(connection),
            ..Self::default()
        })
    }

    /// Takes the descriptors of these numbers, which other programs do not get from now on. To be called once, before the process
    /// opens anything: a number that it was not started with could be that of a file of its own afterwards.
    ///
    /// # Errors
    ///
    /// [`InheritedError`], also for the standard descriptors, and where there is none of the `taps`, which stay; nothing has been taken then.
    pub fn take(
        socket: Option<RawFd>,
        events: Option<RawFd>,
        taps: &[RawFd],
    ) -> Result<Self, InheritedError> {
        if let Some(fd) = taps.iter().copied().find(|fd| status(*fd).is_none()) {
            return Err(InheritedError::NoTap { fd });
        }
        for (flag, given) in [(SOCKET, socket), (EVENTS, events)] {
            if let Some(fd) = given.filter(|fd| *fd <= 2 || status(*fd).is_none()) {
                return Err(InheritedError::Closed { flag, fd });
            }
        }
        if let Some(fd) = socket {
            if events == socket {
                return Err(InheritedError::Twice { fd });
            }
            if !listens(fd) || option(fd, libc::SO_DOMAIN) != Some(libc::AF_UNIX) {
                return Err(InheritedError::NotListening { fd });
            }
        }
        if let Some(fd) = events {
            let found = if listens(fd) {
                Some("a listening socket")
            } else if status(fd).is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDONLY) {
                Some("open for reading alone")
            } else {
                None
            };
            if let Some(found) = found {
                return Err(InheritedError::NotWritable { fd, found });
            }
        }
        Ok(Self {
            socket: socket.map(take),
            events: events.map(take),
            connection: None,
        })
    }
}

/// Has the standard descriptors that are the same socket be nothing: what is read there, or written, would be of the connection (`3<&0`).
fn leave_to_it(connection: &OwnedFd) {
    let file = |fd: BorrowedFd<'_>| {
        let found = rustix::fs::fstat(fd).ok()?;
        Some((found.st_dev, found.st_ino))
    };
    let socket = file(connection.as_fd());
    let null = || rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    type Replace = fn(OwnedFd) -> rustix::io::Result<()>;
    let standard: [(BorrowedFd<'_>, Replace); 3] = [
        (rustix::stdio::stdin(), rustix::stdio::dup2_stdin),
        (rustix::stdio::stdout(), rustix::stdio::dup2_stdout),
        (rustix::stdio::stderr(), rustix::stdio::dup2_stderr),
    ];
    for (fd, replace) in standard {
        if file(fd) == socket {
            // Where there is no such device it stays what it is.
            let _ = null().and_then(replace);
        }
    }
}

/// The flags of an open file; `None` when there is no such descriptor.
fn status(fd: RawFd) -> Option<libc::c_int> {
    // SAFETY: F_GETFL reads flags, and fails for what is no descriptor.
    #[expect(unsafe_code, reason = "fcntl is a system call")]
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    (flags >= 0).then_some(flags)
}

fn listens(fd: RawFd) -> bool {
    option(fd, libc::SO_ACCEPTCONN) == Some(1)
}

/// Makes a descriptor that the process was started with its own.
fn take(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller has found it open, and it belongs to nobody else in this process, which has opened
    // nothing yet: one flag names it, and that is read once.
    #[expect(unsafe_code, reason = "takes ownership of an inherited descriptor")]
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // It must not reach other programs.
    // SAFETY: the descriptor is open.
    #[expect(unsafe_code, reason = "fcntl is a system call")]
    unsafe {
        libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
    }
    owned
}

/// Opens what events are written to.
///
/// # Errors
///
/// [`OpenError`], which names the path.
pub fn event_sink(place: Place, opener: &Opener) -> Result<OwnedFd, OpenError> {
    match place {
        Place::Path(path) => Ok(opener.create_event_output(&path)?.into()),
        Place::Descriptor(fd) => Ok(fd),
    }
}

/// A listening socket. Its file goes when this is dropped; the lock's file stays,
/// because removing it would let two monitors each lock a file of their own.
pub struct ApiSocket {
    /// The socket.
    pub listener: UnixListener,
    _file: Option<SocketFile>,
    _lock: Option<File>,
}

impl ApiSocket {
    /// The file of the lock that a socket at `place` has, where it has one.
    #[must_use]
    pub fn lock_of(place: &Place) -> Option<PathBuf> {
        let Place::Path(path) = place else {
            return None;
        };
        Some(Opener::lock_path(path))
    }

    /// Whom a socket at `place` serves where nobody has said so: on one that the monitor makes, its own user and root,
    /// whatever becomes of the file's mode; on one that it was started with, whoever its maker lets in.
    #[must_use]
    pub fn clients(place: &Place) -> Clients {
        match place {
            Place::Path(_) => Self::clients_with(&[]),
            Place::Descriptor(_) => Clients::Anyone,
        }
    }

    /// The monitor's own user, root, and `others`.
    #[must_use]
    pub fn clients_with(others: &[u32]) -> Clients {
        Clients::Users([&[own_user(), ROOT], others].concat())
    }

    /// Listens at `place`. Of several monitors that try one path, one succeeds; the
    /// file of one that has been killed is replaced.
    ///
    /// # Errors
    ///
    /// [`OpenError`], which names the path.
    pub fn listen(place: Place, opener: &Opener) -> Result<Self, OpenError> {
        match place {
            Place::Path(path) => {
                let lock = opener.lock_beside(&path)?;
                let listener = opener.listen_unix(&path)?;
                Ok(Self {
                    listener,
                    _file: Some(opener.own_socket(&path)?),
                    _lock: Some(lock),
                })
            }
            Place::Descriptor(fd) => Ok(Self {
                listener: fd.into(),
                _file: None,
                _lock: None,
            }),
        }
    }
}

/// Who files are made as, which is whom the mode of the socket's file lets in.
fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// An integer option of a socket; `None` when `fd` is none.
fn option(fd: RawFd, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of_val(&value)).ok()?;
    // SAFETY: value and length are as long as stated and outlive the call.
    #[expect(unsafe_code, reason = "getsockopt is a system call")]
    let result = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn one_monitor_has_a_socket_and_the_next_is_told_so() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let place = || Place::Path(path.clone());
        let opener = Opener::new();
        let first = ApiSocket::listen(place(), &opener).unwrap();
        let error = ApiSocket::listen(place(), &opener).err().unwrap();
        assert!(matches!(error, OpenError::SocketInUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        drop(first);
        assert!(!path.exists());
        drop(ApiSocket::listen(place(), &opener).unwrap());
    }

    #[test]
    fn what_a_killed_monitor_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let opener = Opener::new();
        ApiSocket::listen(Place::Path(path), &opener).unwrap();
    }

    #[test]
    fn descriptors_are_taken_when_they_are_what_their_flags_need() {
        let directory = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(directory.path().join("s")).unwrap();
        let (near, _far) = UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let read = File::open("/dev/null").unwrap();
        let write = File::create(directory.path().join("events")).unwrap();
        let (listening, near) = (listening.as_raw_fd(), near.as_raw_fd());
        let (tcp, read) = (tcp.as_raw_fd(), read.as_raw_fd());
        for (socket, events, says) in [
            (Some(0), None, "--api-socket fd=0: this process"),
            (Some(-1), None, "--api-socket fd=-1: this process"),
            (Some(9999), None, "--api-socket fd=9999: this process"),
            (None, Some(2), "--event-monitor fd=2: this process"),
            (None, Some(9999), "--event-monitor fd=9999: this process"),
            (Some(listening), Some(listening), "have the same fd="),
            (Some(near), None, "no listening unix socket"),
            (Some(tcp), None, "no listening unix socket"),
            (Some(read), None, "no listening unix socket"),
            (None, Some(listening), "a listening socket"),
            (None, Some(tcp), "a listening socket"),
            (None, Some(read), "reading alone"),
        ] {
            let refused = Inherited::take(socket, events, &[])
                .unwrap_err()
                .to_string();
            assert!(refused.contains(says), "{refused}");
        }
        let write = std::os::fd::IntoRawFd::into_raw_fd(write);
        let taken = Inherited::take(None, Some(write), &[write]).unwrap();
        let refused = Inherited::take(None, None, &[write, 9998]).unwrap_err();
        assert!(
            refused
                .to_string()
                .starts_with("--net fd=9998: this process"),
            "{refused}"
        );
        assert!(taken.socket.is_none());
        assert_eq!(taken.events.unwrap().as_raw_fd(), write);
    }

    #[test]
    fn events_go_to_a_pipe_that_nobody_reads_yet_and_not_to_what_cannot_be_written() {
        use std::io::Read;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let opener = Opener::new();
        let sink = event_sink(Place::Path(path.clone()), &opener).unwrap();
        std::io::Write::write_all(&mut File::from(sink.try_clone().unwrap()), b"early").unwrap();
        let mut reader = File::open(&path).unwrap();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
        let wrong = event_sink(Place::Path(directory.path().to_owned()), &opener);
        assert!(wrong.is_err());
    }
}
