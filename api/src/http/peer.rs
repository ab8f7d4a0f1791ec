//! Who is at the other end of a connection.

use std::fmt;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// The process that connected, or listened, as the kernel knew it then.
pub(crate) struct Peer(Option<libc::ucred>);

impl Peer {
    /// Asks the kernel.
    pub fn of(stream: &UnixStream) -> Self {
        let mut peer = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let Ok(mut length) = libc::socklen_t::try_from(size_of::<libc::ucred>()) else {
            return Self(None);
        };
        // rustix has this call too, but takes it for granted that no process is 0:
        // one of another namespace is.
        // SAFETY: the descriptor is open for as long as `stream` is borrowed, and the kernel
        // writes at most `length` bytes, the size of `peer`, where any bytes are valid.
        #[expect(unsafe_code, reason = "getsockopt is a system call")]
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut peer).cast(),
                &raw mut length,
            )
        };
        Self((result == 0).then_some(peer))
    }

    /// Its user, as this process's namespace knows it.
    pub fn user(&self) -> Option<u32> {
        Some(self.0.as_ref()?.uid)
    }

    /// Its number, unless it is one of another namespace.
    pub fn process(&self) -> Option<u32> {
        let pid = self.0.as_ref()?.pid;
        u32::try_from(pid).ok().filter(|&pid| pid > 0)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(libc::ucred { pid, uid, gid }) => {
                write!(f, "process {pid}, user {uid}, group {gid}")
            }
            None => f.write_str("unknown"),
        }
    }
}
