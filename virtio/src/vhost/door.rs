//! Peers that connect to a socket of this process.

use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use block::{Connector, Listening, Opener};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The socket at which one peer after the other is expected.
pub(super) struct Door {
    socket: UnixListener,
    /// What removes the socket's file.
    _file: Mutex<Box<dyn Any + Send>>,
}

impl Door {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// The opener's.
    pub fn open(opener: &dyn Opener, path: &Path) -> io::Result<Self> {
        let Listening { socket, file } = opener.listen(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            _file: Mutex::new(file),
        })
    }

    /// Readable when somebody is there.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whoever is there, if anybody is. Never waits.
    ///
    /// # Errors
    ///
    /// The host's, when it lacks descriptors.
    pub fn answer(&self) -> io::Result<Option<Arc<dyn Connector>>> {
        match self.socket.accept() {
            Ok((socket, _)) => {
                let visitor = Visitor(Mutex::new(Some(socket.into())));
                Ok(Some(Arc::new(visitor)))
            }
            Err(error) => match error.kind() {
                // Who has left again was not there.
                io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted => Ok(None),
                io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// As [`Door::answer`], but waits up to `patience`.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn wait(&self, patience: Duration) -> io::Result<Option<Arc<dyn Connector>>> {
        let begun = Instant::now();
        loop {
            let left = patience.saturating_sub(begun.elapsed());
            let time = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut fds, Some(&time)) {
                Ok(0) => return Ok(None),
                Ok(_) => match self.answer()? {
                    // It has left again.
                    None => (),
                    visitor => return Ok(visitor),
                },
                Err(rustix::io::Errno::INTR) => (),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A connection that is there already.
#[derive(Debug)]
struct Visitor(Mutex<Option<OwnedFd>>);

impl Connector for Visitor {
    fn connect(&self) -> io::Result<OwnedFd> {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        socket
            .take()
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}
