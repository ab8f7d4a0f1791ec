//! A network behind a unix stream socket, as `passt` and QEMU's `-netdev stream` speak it.
//!
//! Each frame has its length in front, 32 bits, big endian. There is no header
//! for offloads, and none are offered. A peer that ends, or says a length that no frame has, is
//! a network that is gone, until somebody listens at the socket again.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::backend::{Backend, Offloads, Port};
use crate::frame::{HEADER_LEN, Pieces};

/// The bytes of a length.
const PREFIX: usize = 4;

/// The longest frame, in bytes: the longest IP packet behind a tagged Ethernet header.
const MAX_FRAME: usize = 65_535 + 18;

/// Room for what is read at once: two of the longest frames.
const INBOX: usize = 2 * (PREFIX + MAX_FRAME);

/// Why a network behind a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Nobody listens.
    #[error("cannot connect to {}: start its server first, as in passt --socket {}", path.display(), path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// There is one pair.
    #[error(
        "a network behind a socket has one pair of queues, and {pairs} are asked for: ask for one"
    )]
    Pairs {
        /// How many were asked for.
        pairs: u16,
    },
}

/// A network behind a socket.
#[derive(Debug)]
pub struct Stream {
    label: String,
    path: PathBuf,
    socket: UnixStream,
}

impl Stream {
    /// Connects to the server at `path`.
    ///
    /// # Errors
    ///
    /// [`StreamError`]
    pub fn connect(path: &Path, pairs: u16) -> Result<Self, StreamError> {
        if pairs != 1 {
            return Err(StreamError::Pairs { pairs });
        }
        let socket = reach(path).map_err(|source| StreamError::Connect {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            label: format!("socket {}", path.display()),
            path: path.to_owned(),
            socket,
        })
    }
}

/// Connects without waiting: a server that takes nobody is none.
#[expect(unsafe_code, reason = "the standard library's way may wait")]
fn reach(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: zeros are an address without a path.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or_default();
    let bytes = path.as_os_str().as_bytes();
    // The last byte stays zero.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in address.sun_path.iter_mut().zip(bytes) {
        *place = byte.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: numbers alone.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or_default();
    // SAFETY: the address is as long as is said, ends with a zero and lives as long as the call.
    if unsafe { libc::connect(fd, (&raw const address).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

impl Backend for Stream {
    fn name(&self) -> &str {
        &self.label
    }

    fn pairs(&self) -> u16 {
        1
    }

    fn offloads(&self) -> Offloads {
        Offloads::empty()
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn attach(&mut self, _pairs: u16) -> io::Result<()> {
        Ok(())
    }

    fn renews(&self) -> bool {
        true
    }

    fn renew(&mut self) -> io::Result<()> {
        // A server that takes one connection at a time has done with this one first. It may be gone long since.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let path = self.path.clone();
        // A card's thread asks for it, which may not connect.
        self.socket = threads::errand(move || reach(&path))?;
        Ok(())
    }

    fn port(&self, _pair: u16) -> io::Result<Box<dyn Port>> {
        Ok(Box::new(StreamPort {
            socket: self.socket.try_clone()?,
            inbox: vec![0; INBOX].into_boxed_slice(),
            filled: 0..0,
            outbox: Vec::new(),
        }))
    }
}

/// One end of the stream, with what is half read and half written.
struct StreamPort {
    socket: UnixStream,
    inbox: Box<[u8]>,
    /// Where what was read is that has not been taken.
    filled: std::ops::Range<usize>,
    /// What of the last frame, or frames, has not been written.
    outbox: Vec<u8>,
}

/// What a peer says that no frame is.
fn nonsense() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

impl StreamPort {
    /// Where the next frame is in the inbox, if it is there as a whole.
    fn next(&self) -> io::Result<Option<std::ops::Range<usize>>> {
        let there = self.inbox.get(self.filled.clone()).unwrap_or_default();
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
        if len == 0 || len > MAX_FRAME {
            return Err(nonsense());
        }
        let start = self.filled.start + PREFIX;
        Ok((rest.len() >= len).then(|| start..start + len))
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.filled.end == self.inbox.len() {
            self.inbox.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        let room = self.inbox.get_mut(self.filled.end..).unwrap_or_default();
        match self.socket.read(room)? {
            0 => Err(nonsense()),
            len => {
                self.filled.end += len;
                Ok(())
            }
        }
    }
}

impl Port for StreamPort {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self, into: Pieces<'_>) -> io::Result<usize> {
        let place = loop {
            if let Some(place) = self.next()? {
                break place;
            }
            self.fill()?;
        };
        let frame = self.inbox.get(place.clone()).unwrap_or_default();
        let header = into.copy_from(0, &[0; HEADER_LEN]);
        let len = header + into.copy_from(HEADER_LEN, frame);
        self.filled.start = place.end;
        if self.filled.is_empty() {
            self.filled = 0..0;
        }
        Ok(len)
    }

    fn send(&mut self, frame: Pieces<'_>) -> io::Result<()> {
        self.flush()?;
        let len = frame.len().saturating_sub(HEADER_LEN);
        let prefix = u32::try_from(len)
            .ok()
            .filter(|_| (1..=MAX_FRAME).contains(&len));
        let prefix = prefix.ok_or(io::ErrorKind::InvalidInput)?;
        self.outbox.extend(prefix.to_be_bytes());
        self.outbox.resize(PREFIX + len, 0);
        frame.copy_to(
            HEADER_LEN,
            self.outbox.get_mut(PREFIX..).unwrap_or_default(),
        );
        match self.flush() {
            // Nothing of it has gone: it is to be sent again.
            Err(error) if self.outbox.len() == PREFIX + len => {
                self.outbox.clear();
                Err(error)
            }
            // The rest is kept here.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            let written = self.socket.write(&self.outbox)?;
            self.outbox.drain(..written);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
