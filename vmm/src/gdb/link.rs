//! A debugger's connection, which the machine's end interrupts.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use gdbstub::conn::{Connection, ConnectionExt};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::driver::ppoll;

/// How long a debugger may take to read an answer. Answers are small and wait
/// in the socket; one that is not read at all must not hold up the end.
const PATIENCE: Duration = Duration::from_secs(5);

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// The connection. Answers are collected, and sent whole.
pub struct Link {
    fd: RawFd,
    stream: Box<dyn Stream>,
    answer: Vec<u8>,
    ended: Arc<EventFd>,
}

impl Link {
    /// A connection over a unix socket. `ended` is readable when the machine has ended.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn unix(stream: UnixStream, ended: Arc<EventFd>) -> io::Result<Self> {
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::new(stream.as_raw_fd(), Box::new(stream), ended))
    }

    /// A connection over TCP.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn tcp(stream: TcpStream, ended: Arc<EventFd>) -> io::Result<Self> {
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self::new(stream.as_raw_fd(), Box::new(stream), ended))
    }

    fn new(fd: RawFd, stream: Box<dyn Stream>, ended: Arc<EventFd>) -> Self {
        Self {
            fd,
            stream,
            answer: Vec::new(),
            ended,
        }
    }

    /// The socket, to wait on.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd
    }

    /// Sends what has been collected.
    ///
    /// # Errors
    ///
    /// The host's, when the debugger is gone or does not read.
    pub fn send(&mut self) -> io::Result<()> {
        let result = self.stream.write_all(&self.answer);
        self.answer.clear();
        result
    }
}

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.answer.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.answer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl ConnectionExt for Link {
    fn read(&mut self) -> io::Result<u8> {
        self.send()?;
        if !wait_for(self.fd, &self.ended)? {
            let reason = "the machine has ended";
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason));
        }
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Waits until `fd` is readable; `false` when the machine has ended first.
///
/// # Errors
///
/// The host's.
pub fn wait_for(fd: RawFd, ended: &EventFd) -> io::Result<bool> {
    let mut fds = [fd, ended.as_raw_fd()].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        ppoll(&mut fds, None)?;
        match fds.map(|fd| fd.revents != 0) {
            [_, true] => return Ok(false),
            [true, false] => return Ok(true),
            // A signal came in between.
            [false, false] => (),
        }
    }
}
