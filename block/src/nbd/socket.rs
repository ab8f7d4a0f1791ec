//! A connected stream socket, used without blocking; and with patience up to a deadline.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::c_int;

use crate::buffers::IoVec;

/// The most pieces in one call (`IOV_MAX`).
pub(super) const MAX_PIECES: usize = 1024;

/// How a dead peer is noticed, for TCP only: after 15 s of silence it is asked up to three times,
/// every 5 s; and what it does not acknowledge for 30 s counts as lost.
const ALIVE: [(c_int, c_int, c_int); 6] = [
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 15),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 5),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 30_000),
];

/// What a socket is to be ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    Read,
    /// Reading or writing, whichever comes first.
    Either,
    Write,
}

/// The socket.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// Takes a connected stream socket.
    #[expect(unsafe_code, reason = "socket options have no safe wrapper")]
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        for (level, name, value) in ALIVE {
            // SAFETY: the option's value is one int, whose address and size are given. Failure
            // is no harm: a unix socket has no such options and needs none.
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    level,
                    name,
                    (&raw const value).cast(),
                    size_of_val(&value).try_into().unwrap_or_default(),
                );
            }
        }
        // SAFETY: both commands take and give plain integers.
        unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            let set = flags | libc::O_NONBLOCK;
            if flags < 0 || libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, set) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(fd))
    }

    /// Sends some of the pieces, at most [`MAX_PIECES`]; how many bytes. `WouldBlock` when there is no room.
    ///
    /// The pieces must be readable memory.
    #[expect(unsafe_code, reason = "vectored I/O on raw addresses")]
    pub(super) fn send(&self, pieces: &[IoVec]) -> io::Result<usize> {
        let message = message(pieces);
        // SAFETY: the message names pieces that are laid out as iovec, whose memory the caller keeps
        // valid; everything else in it is null.
        again(|| unsafe {
            libc::sendmsg(self.0.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
        })
    }

    /// Fills some of the pieces, at most [`MAX_PIECES`]; how many bytes, 0 at the end of the stream.
    /// `WouldBlock` when there is nothing.
    ///
    /// The pieces must be writable memory that nothing refers to.
    #[expect(unsafe_code, reason = "vectored I/O on raw addresses")]
    pub(super) fn receive(&self, pieces: &[IoVec]) -> io::Result<usize> {
        let mut message = message(pieces);
        // SAFETY: as for `send`; the memory is writable.
        again(|| unsafe {
            libc::recvmsg(self.0.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC)
        })
    }

    /// Waits until the socket is ready, or has failed.
    ///
    /// # Errors
    ///
    /// `TimedOut` after the deadline.
    #[expect(unsafe_code, reason = "poll has no safe wrapper")]
    pub(super) fn wait(&self, ready: Ready, deadline: Option<Instant>) -> io::Result<()> {
        let events = match ready {
            Ready::Read => libc::POLLIN,
            Ready::Write => libc::POLLOUT,
            Ready::Either => libc::POLLIN | libc::POLLOUT,
        };
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let time = left.map_or(-1, |left| {
                i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
            });
            let mut poll = libc::pollfd {
                fd: self.0.as_raw_fd(),
                events,
                revents: 0,
            };
            // SAFETY: one pollfd is given, and it outlives the call.
            match again(|| unsafe { libc::poll(&raw mut poll, 1, time) as isize })? {
                0 if left == Some(Duration::ZERO) => return Err(io::ErrorKind::TimedOut.into()),
                0 => {}
                _ => return Ok(()),
            }
        }
    }

    /// Ends the connection in both directions.
    #[expect(unsafe_code, reason = "shutdown has no safe wrapper")]
    pub(super) fn shut_down(&self) {
        // SAFETY: takes plain integers. It fails only when there is no connection any more.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[expect(unsafe_code, reason = "a message header is plain data")]
fn message(pieces: &[IoVec]) -> libc::msghdr {
    // SAFETY: all bytes zero are a valid `msghdr`: no name, no pieces, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut().cast();
    message.msg_iovlen = pieces.len().min(MAX_PIECES);
    message
}

/// Repeats a system call that a signal interrupts.
fn again(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Whole reads and writes on a socket, until a deadline.
#[derive(Debug)]
pub(super) struct Patient<'a> {
    pub(super) socket: &'a Socket,
    pub(super) deadline: Instant,
}

impl Patient<'_> {
    /// Fills the buffer.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` when the stream ends, `TimedOut` after the deadline.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            let piece = IoVec {
                base: rest.as_mut_ptr(),
                len: rest.len(),
            };
            match self.socket.receive(&[piece]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => rest = rest.get_mut(n..).unwrap_or_default(),
                Err(error) => self.blocked(error, Ready::Read)?,
            }
        }
        Ok(())
    }

    /// Writes the buffer.
    ///
    /// # Errors
    ///
    /// The system's, and `TimedOut` after the deadline.
    pub(super) fn write(&self, buf: &[u8]) -> io::Result<()> {
        let mut rest = buf;
        while !rest.is_empty() {
            let piece = IoVec {
                base: rest.as_ptr().cast_mut(),
                len: rest.len(),
            };
            match self.socket.send(&[piece]) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(error) => self.blocked(error, Ready::Write)?,
            }
        }
        Ok(())
    }

    fn blocked(&self, error: io::Error, ready: Ready) -> io::Result<()> {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.socket.wait(ready, Some(self.deadline))
        } else {
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Socket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Socket::new(ours.into()).unwrap(), theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn whole_reads_and_writes_outlast_a_full_and_an_empty_socket() {
        let (socket, mut theirs) = pair();
        let peer = std::thread::spawn(move || {
            let mut bytes = vec![0; 1 << 20];
            theirs.read_exact(&mut bytes).unwrap();
            for part in bytes.chunks(1000) {
                theirs.write_all(part).unwrap();
            }
        });
        let patient = Patient {
            socket: &socket,
            deadline: soon(),
        };
        let sent: Vec<u8> = (0..1 << 20)
            .map(|i| u8::try_from(i % 251).unwrap())
            .collect();
        patient.write(&sent).unwrap();
        let mut got = vec![0; 1 << 20];
        patient.read(&mut got).unwrap();
        assert!(got == sent);
        peer.join().unwrap();
        let end = patient.read(&mut [0]).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn patience_ends_at_the_deadline_and_with_the_connection() {
        let (socket, theirs) = pair();
        let late = Patient {
            socket: &socket,
            deadline: Instant::now(),
        };
        assert_eq!(
            late.read(&mut [0]).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        let full = late.write(&vec![0; 16 << 20]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::TimedOut);
        drop(theirs);
        assert!(late.write(&[0]).is_err());
        socket.shut_down();
        assert!(late.read(&mut [0]).is_err());
    }
}
