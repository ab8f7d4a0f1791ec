//! What a monitor has open to the outside: the API socket, with its file and the lock that
//! keeps a second monitor away, and where events are written.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::opener::{OpenError, Opener, SocketFile};

/// Where a monitor listens or writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket or file that it makes.
    Path(PathBuf),
    /// What it has been started with: a listening socket, or anything that can be written.
    Descriptor(RawFd),
}

impl Place {
    /// Where this is found as long as it is open.
    #[must_use]
    pub fn to_path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Descriptor(fd) => Path::new("/proc/self/fd").join(fd.to_string()),
        }
    }
}

/// Opens what events are written to.
///
/// # Errors
///
/// [`OpenError`], which names the path.
pub fn event_sink(place: &Place, opener: &Opener) -> Result<OwnedFd, OpenError> {
    match place {
        Place::Path(path) => Ok(opener.create_event_output(path)?.into()),
        Place::Descriptor(fd) => {
            // SAFETY: F_GETFL reads flags, and fails for what is no descriptor.
            #[expect(unsafe_code, reason = "fcntl is a system call")]
            let flags = unsafe { libc::fcntl(*fd, libc::F_GETFL) };
            if flags < 0 || *fd <= 2 || flags & libc::O_ACCMODE == libc::O_RDONLY {
                return Err(OpenError::WrongType {
                    path: Path::new("/dev/fd").join(fd.to_string()),
                    found: "nothing that can be written",
                    wanted: "a file, pipe or socket that was passed to this process",
                });
            }
            Ok(take(*fd))
        }
    }
}

/// Makes a descriptor that the process was started with its own.
fn take(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller has found it open, and it belongs to nobody else in this process: one
    // flag names it, and that is read once.
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

    /// Listens at `place`. Of several monitors that try one path, one succeeds; the
    /// file of one that has been killed is replaced.
    ///
    /// # Errors
    ///
    /// [`OpenError`], which names the path.
    pub fn listen(place: &Place, opener: &Opener) -> Result<Self, OpenError> {
        match place {
            Place::Path(path) => {
                let lock = opener.lock_beside(path)?;
                let listener = opener.listen_unix(path)?;
                Ok(Self {
                    listener,
                    _file: Some(opener.own_socket(path)?),
                    _lock: Some(lock),
                })
            }
            Place::Descriptor(fd) => Ok(Self {
                listener: given(*fd)?,
                _file: None,
                _lock: None,
            }),
        }
    }
}

/// The socket that the process was started with as descriptor `fd`.
fn given(fd: RawFd) -> Result<UnixListener, OpenError> {
    let listening = fd > 2 && option(fd, libc::SO_ACCEPTCONN) == Some(1);
    if !listening || option(fd, libc::SO_DOMAIN) != Some(libc::AF_UNIX) {
        return Err(OpenError::WrongType {
            path: Path::new("/dev/fd").join(fd.to_string()),
            found: "no listening unix socket",
            wanted: "one that was passed to this process",
        });
    }
    Ok(take(fd).into())
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
        let place = Place::Path(path.clone());
        let opener = Opener::new();
        let first = ApiSocket::listen(&place, &opener).unwrap();
        let error = ApiSocket::listen(&place, &opener).err().unwrap();
        assert!(matches!(error, OpenError::SocketInUse { .. }), "{error}");
        UnixStream::connect(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        drop(first);
        assert!(!path.exists());
        drop(ApiSocket::listen(&place, &opener).unwrap());
    }

    #[test]
    fn what_a_killed_monitor_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let opener = Opener::new();
        ApiSocket::listen(&Place::Path(path), &opener).unwrap();
    }

    #[test]
    fn a_descriptor_that_is_no_listening_socket_is_refused() {
        for fd in [-1, 0, 2, 9999] {
            assert!(ApiSocket::listen(&Place::Descriptor(fd), &Opener::new()).is_err());
        }
    }

    #[test]
    fn events_go_to_a_pipe_that_nobody_reads_yet_and_not_to_what_cannot_be_written() {
        use std::io::Read;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let opener = Opener::new();
        let sink = event_sink(&Place::Path(path.clone()), &opener).unwrap();
        std::io::Write::write_all(&mut File::from(sink.try_clone().unwrap()), b"early").unwrap();
        let mut reader = File::open(&path).unwrap();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
        for fd in [-1, 2, 9999] {
            assert!(event_sink(&Place::Descriptor(fd), &opener).is_err(), "{fd}");
        }
        let wrong = event_sink(&Place::Path(directory.path().to_owned()), &opener);
        assert!(wrong.is_err());
    }
}
