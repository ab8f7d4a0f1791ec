//! The GDB server: debugs the guest from outside (`--gdb`).
//!
//! One thread serves one debugger at a time over the GDB remote protocol.
//! vCPUs are its threads, numbered from 1; those that come later are among them, and meet its breakpoints. The machine waits for the first
//! debugger before its first instruction. When a debugger attaches, all vCPUs
//! stop; when it detaches or goes away, its breakpoints are taken out and they
//! run on; when it kills, the machine ends. While the debugger holds the vCPUs the machine's state does not
//! change: to the API it still runs.
//!
//! The thread never touches a vCPU or guest memory by itself: it sends the
//! control thread errands ([`crate::machine::inbox::Errand`]).

mod link;
mod registers;
mod target;

use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use api::Command;
use devices::LogLimit;
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::machine::inbox::{Mailbox, Message};
use crate::opener::SocketFile;
use crate::sandbox::{Builder, Kind};
use link::{Link, wait_for};
use target::{Guest, GuestError};

/// Where debuggers connect.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket and its file.
    Unix(UnixListener, SocketFile),
    /// A TCP port.
    Tcp(TcpListener),
}

/// The thread that serves debuggers. Drop it after the machine: it then says
/// goodbye to a debugger, ends the thread and removes the socket's file.
pub struct Server {
    ended: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // An eventfd that is full has been heard.
        let _ = self.ended.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Serves debuggers on `listener` until the server is dropped.
///
/// # Errors
///
/// The host's, when it has no more threads or descriptors.
pub fn serve(listener: Listener, mailbox: Mailbox) -> io::Result<Server> {
    let ended = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let heard = Arc::clone(&ended);
    let limit = LogLimit::new();
    let thread = Builder::new(Kind::Console)
        .name("gdb".to_owned())
        .spawn(move || {
            while let Some(link) = listener.accept(&heard) {
                let session = catch_unwind(AssertUnwindSafe(|| session(link, &mailbox)));
                if let Ok(Err(error)) = session
                    && let Some(suppressed) = limit.allow()
                {
                    tracing::warn!(suppressed, "debugger: {error}");
                }
            }
        })?;
    Ok(Server {
        ended,
        thread: Some(thread),
    })
}

fn session(link: Link, mailbox: &Mailbox) -> Result<(), String> {
    let mut guest = Guest::attach(mailbox.clone(), link.raw_fd()).map_err(|e| e.to_string())?;
    let reason = GdbStub::new(link)
        .run_blocking::<Events>(&mut guest)
        .map_err(|error| error.to_string())?;
    if matches!(reason, DisconnectReason::Kill) {
        // Nobody waits for the answer, which comes when the machine has ended.
        mailbox.send(Message::Command(Command::Quit, Box::new(|_| ())));
    }
    Ok(())
}

impl Listener {
    /// The next debugger; `None` once `ended` is readable.
    fn accept(&self, ended: &Arc<EventFd>) -> Option<Link> {
        loop {
            let fd = match self {
                Self::Unix(listener, _) => listener.as_raw_fd(),
                Self::Tcp(listener) => listener.as_raw_fd(),
            };
            if !wait_for(fd, ended).ok()? {
                return None;
            }
            let link = match self {
                Self::Unix(listener, _) => listener
                    .accept()
                    .and_then(|(stream, _)| Link::unix(stream, Arc::clone(ended))),
                Self::Tcp(listener) => listener
                    .accept()
                    .and_then(|(stream, _)| Link::tcp(stream, Arc::clone(ended))),
            };
            match link {
                Ok(link) => return Some(link),
                // A debugger that has gone again is none; the next may stay.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => (),
                Err(error) => {
                    tracing::warn!("no more debuggers are served: {error}");
                    return None;
                }
            }
        }
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
        link.send().map_err(WaitForStopReasonError::Connection)?;
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
