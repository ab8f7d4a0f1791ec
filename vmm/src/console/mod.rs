//! Host ends of the guest's consoles: terminal, pseudo-terminal, files, sockets.
//!
//! [`Consoles`] belongs to the process and outlives its machines. Each console
//! is a [`ConsoleHub`] with any number of sinks, which come and go while the
//! guest runs. When the process ends, [`Consoles::finish`] gives readers the
//! guest's last output; dropping restores the terminal, also in a panic.

mod escape;
mod file;
mod history;
mod hub;
pub mod port;
mod reader;
mod scribe;
mod sink;
mod source;
mod state;
mod terminal;

pub(crate) use escape::{Escape, EscapeFilter};
pub use hub::{ConsoleHub, ConsoleWriter, InputPort, OpenedSink, PortLink};
pub use sink::{Opened as OpenSink, SinkId, SinkIdError, SinkInfo, SinkKind};
pub use terminal::{RawMode, open_pty, size as terminal_size};

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use api::wire::ConsolePort;

use crate::agent::AgentDesk;
use crate::config::files::OwnFiles;
use crate::config::serial::{MAX_SINKS, SinkError};
use crate::config::{COMS, CONSOLE_FLAGS};
use crate::display::DisplayDesk;
use crate::machine::driver::{ppoll, readable};
use crate::opener::OpenError;

/// How often it is looked whether a pseudo-terminal has been read.
const PEEK: Duration = Duration::from_millis(5);
/// After so many looks in a row that found nothing, it has been read.
const QUIET: u32 = 3;

/// Why a sink cannot be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// Its file or socket cannot be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its description breaks a rule.
    #[error(transparent)]
    Config(#[from] SinkError),
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// There is one terminal.
    #[error("the terminal is a sink of this console already: remove that first")]
    TerminalTaken,
    /// Too many sinks.
    #[error("a console has at most {MAX_SINKS} sinks: remove one first")]
    TooManySinks,
    /// Too many files that have been removed and hang.
    #[error(
        "{MAX_SINKS} files that were removed still wait for their storage: try again when it answers"
    )]
    TooManyFiles,
    /// Too many clients.
    #[error(
        "a console has at most {} clients: close another first",
        state::MAX_CLIENTS
    )]
    TooManyClients,
    /// There is no such sink.
    #[error("there is no sink {id}: it has gone, or never was")]
    Unknown {
        /// The id.
        id: SinkId,
    },
    /// The hub has been closed.
    #[error("the console is closed")]
    Closed,
}

/// The consoles of this process. Dropping them removes all sinks, which
/// restores the terminal.
pub struct Consoles {
    serials: [ConsoleHub; COMS],
    virtio: ConsoleHub,
    debugcon: ConsoleHub,
    agent: AgentDesk,
    display: DisplayDesk,
    own: OnceLock<OwnFiles>,
}

/// What makes [`Consoles::finish`] wait for readers no longer.
pub struct Interrupt<'a> {
    /// Readable when it is to be asked.
    pub fd: Option<RawFd>,
    /// Whether nobody wants the output any more.
    pub asked: &'a dyn Fn() -> bool,
}

impl Consoles {
    /// Consoles without sinks; those of the serial ports and the virtio console keep the last `replay`
    /// bytes for clients that come late.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(replay: usize) -> io::Result<Self> {
        let numbers = Arc::default();
        let hub =
            |index: usize| ConsoleHub::numbered(CONSOLE_FLAGS[index], replay, Arc::clone(&numbers));
        Ok(Self {
            serials: [hub(0)?, hub(1)?, hub(2)?, hub(3)?],
            virtio: hub(4)?,
            debugcon: ConsoleHub::new("--debugcon", 0)?,
            agent: AgentDesk::default(),
            display: DisplayDesk::default(),
            own: OnceLock::new(),
        })
    }

    /// Keeps clients from having a console write to what the monitor writes for itself. Once.
    pub fn reserve(&self, own: OwnFiles) {
        // The files are open for the process's life: the first list stays true.
        let _ = self.own.set(own);
    }

    /// The screen.
    #[must_use]
    pub fn display(&self) -> &DisplayDesk {
        &self.display
    }

    /// The files that the monitor writes for itself.
    #[must_use]
    pub fn reserved(&self) -> &OwnFiles {
        self.own.get_or_init(OwnFiles::default)
    }

    /// The first serial port's.
    #[must_use]
    pub fn serial(&self) -> &ConsoleHub {
        &self.serials[0]
    }

    /// A console's.
    #[must_use]
    pub fn hub(&self, port: ConsolePort) -> &ConsoleHub {
        hub_of(self.hubs(), port)
    }

    /// The serial ports', then the virtio console's, as [`crate::config::VmConfig::consoles`] has them.
    #[must_use]
    pub fn hubs(&self) -> [&ConsoleHub; COMS + 1] {
        let [a, b, c, d] = &self.serials;
        [a, b, c, d, &self.virtio]
    }

    /// The terminal may have another size.
    pub fn window_changed(&self) {
        self.virtio.window_changed();
    }

    fn all(&self) -> impl Iterator<Item = &ConsoleHub> {
        self.hubs().into_iter().chain([&self.debugcon])
    }

    /// Removes all sinks for good.
    pub fn close(&self) {
        self.all().for_each(ConsoleHub::close);
    }

    /// Where the guest agent is asked.
    #[must_use]
    pub fn agent(&self) -> &AgentDesk {
        &self.agent
    }

    /// The debug console's.
    #[must_use]
    pub fn debugcon(&self) -> &ConsoleHub {
        &self.debugcon
    }

    /// Gives readers what waits for them before the process ends; no machine
    /// runs. With `wanted` the reader of a pipe, which may be a pager, has all the
    /// time it wants until `interrupt`. A terminal has as long as it takes some
    /// within each `patience`, a client of a socket and the reader of a
    /// pseudo-terminal have `patience` altogether: what the latter has not read when
    /// the near end closes is lost. Files have as long as a terminal.
    pub fn finish(&self, wanted: bool, patience: Duration, interrupt: &Interrupt<'_>) {
        let mut unwanted = false;
        while wanted && !unwanted && self.left().patient > 0 {
            unwanted = !self.wait(interrupt.fd, None) || (interrupt.asked)();
        }
        let begin = Instant::now();
        let (mut changed, mut before) = (begin, u64::MAX);
        loop {
            let left = self.left();
            let now = Instant::now();
            let patient = if unwanted { 0 } else { left.patient };
            let steady = patient
                .saturating_add(left.steady)
                .saturating_add(left.files);
            if steady != before {
                (changed, before) = (now, steady);
            }
            let ends = [
                (steady > 0).then(|| changed + patience),
                (left.brief > 0).then(|| begin + patience),
            ];
            let end = ends.into_iter().flatten().max();
            let Some(time) = end.and_then(|end| end.checked_duration_since(now)) else {
                break;
            };
            if time.is_zero() || !self.wait(None, Some(time)) {
                break;
            }
        }
        let end = Instant::now() + patience;
        for hub in self.all() {
            hub.peers().iter().for_each(|peer| await_reading(peer, end));
        }
    }

    /// Waits until files have all that the guest has written, for `patience` at most, and until `fd` is
    /// readable.
    pub fn settle(&self, patience: Duration, fd: Option<RawFd>) {
        // Each is asked, whatever the others have.
        let left = |end| {
            let files = self.all().map(|hub| hub.files_left(end));
            files.fold(0, u64::saturating_add) > 0
        };
        let end = Instant::now() + patience;
        while left(false) {
            let time = end.saturating_duration_since(Instant::now());
            let files = self.all().map(|hub| Some(hub.progress_fd()));
            let mut fds: Vec<_> = [fd].into_iter().chain(files).map(readable).collect();
            let waited = !time.is_zero() && ppoll(&mut fds, Some(time)).is_ok();
            if !waited || fds.first().is_some_and(|fd| fd.revents != 0) {
                break;
            }
        }
        left(true);
    }

    fn left(&self) -> state::Left {
        self.all()
            .map(ConsoleHub::left)
            .fold(state::Left::default(), |a, b| state::Left {
                patient: a.patient.saturating_add(b.patient),
                steady: a.steady.saturating_add(b.steady),
                brief: a.brief.saturating_add(b.brief),
                files: a.files.saturating_add(b.files),
            })
    }

    /// Waits for a reader to take something, for `fd`, or until `timeout` has passed.
    fn wait(&self, fd: Option<RawFd>, timeout: Option<Duration>) -> bool {
        let fds = self.all().map(ConsoleHub::progress_fd).chain(fd);
        let mut fds: Vec<_> = fds
            .map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        ppoll(&mut fds, timeout).is_ok()
    }
}

/// Of all consoles, in the order of [`Consoles::hubs`], that one.
#[must_use]
pub fn hub_of<T>(all: [T; COMS + 1], port: ConsolePort) -> T {
    let [a, b, c, d, console] = all;
    match port {
        ConsolePort::Serial => a,
        ConsolePort::Serial2 => b,
        ConsolePort::Serial3 => c,
        ConsolePort::Serial4 => d,
        ConsolePort::Console => console,
    }
}

impl Drop for Consoles {
    fn drop(&mut self) {
        self.close();
    }
}

/// Waits until `peer`, the far end of a pseudo-terminal, has nothing to be
/// read any more, or until `end`.
fn await_reading(peer: &OwnedFd, end: Instant) {
    let mut fds = [libc::pollfd {
        fd: peer.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }];
    // The kernel tells when there is something to read, and not when there
    // no longer is; what has just been written is on its way for a moment.
    let mut quiet = 0;
    while quiet < QUIET && Instant::now() < end {
        let waits = ppoll(&mut fds, Some(Duration::ZERO)).is_ok() && fds[0].revents != 0;
        quiet = if waits { 0 } else { quiet + 1 };
        thread::sleep(PEEK);
    }
}

#[cfg(test)]
mod tests;
