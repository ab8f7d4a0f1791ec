//! The GDB server: debugs the guest from outside (`--gdb`).
//!
//! One thread serves one debugger at a time over the GDB remote protocol.
//! vCPUs are its threads, numbered from 1. When a debugger attaches, all vCPUs
//! stop; when it detaches or goes away, its breakpoints are taken out and they
//! run on. While the debugger holds the vCPUs the machine's state does not
//! change: to the API it still runs.
//!
//! The thread never touches a vCPU or guest memory by itself: it sends the
//! control thread errands ([`super::machine::inbox::Errand`]).

mod registers;
mod target;

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::thread;

use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{GdbStub, MultiThreadStopReason};

use crate::machine::inbox::Mailbox;
use target::{Guest, GuestError};

/// Where debuggers connect.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

/// Serves debuggers on `listener` until the machine ends.
///
/// # Errors
///
/// The host's, when it has no more threads or descriptors.
pub fn serve(listener: Listener, mailbox: Mailbox, cpus: usize) -> io::Result<()> {
    thread::Builder::new()
        .name("gdb".to_owned())
        .spawn(move || {
            while let Ok(link) = listener.accept() {
                if let Err(error) = session(link, &mailbox, cpus) {
                    tracing::warn!("debugger: {error}");
                }
            }
        })
        .map(drop)
}

fn session(link: Link, mailbox: &Mailbox, cpus: usize) -> Result<(), String> {
    let mut guest = Guest::attach(mailbox.clone(), cpus, link.fd).map_err(|e| e.to_string())?;
    let result = GdbStub::new(link).run_blocking::<Events>(&mut guest);
    guest.detach();
    result.map(drop).map_err(|error| error.to_string())
}

impl Listener {
    fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                Ok(Link {
                    fd: stream.as_raw_fd(),
                    stream: Box::new(stream),
                })
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Link {
                    fd: stream.as_raw_fd(),
                    stream: Box::new(stream),
                })
            }
        }
    }
}

/// A debugger's connection.
struct Link {
    fd: RawFd,
    stream: Box<dyn ConnectionExt<Error = io::Error> + Send>,
}

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.stream.write(byte)
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl ConnectionExt for Link {
    fn read(&mut self) -> io::Result<u8> {
        self.stream.read()
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        self.stream.peek()
    }
}

/// Waits for the debugger and the guest at once.
enum Events {}

type StopReason = MultiThreadStopReason<u64>;
type WaitError = WaitForStopReasonError<GuestError, io::Error>;

impl BlockingEventLoop for Events {
    type Target = Guest;
    type Connection = Link;
    type StopReason = StopReason;

    fn wait_for_stop_reason(
        guest: &mut Guest,
        link: &mut Link,
    ) -> Result<Event<StopReason>, WaitError> {
        loop {
            if let Some(reason) = guest
                .stop_reason()
                .map_err(WaitForStopReasonError::Target)?
            {
                return Ok(Event::TargetStopped(reason));
            }
            if guest.wait().map_err(WaitForStopReasonError::Connection)? {
                let byte = link.read().map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(guest: &mut Guest) -> Result<Option<StopReason>, GuestError> {
        guest.interrupt().map(Some)
    }
}
