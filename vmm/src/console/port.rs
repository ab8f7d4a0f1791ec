//! The host's ends of virtio ports: the hub of a console, sockets,
//! pseudo-terminals, files.
//!
//! Unlike a console's sinks, these lose nothing: who does not read makes the guest's port
//! wait. They belong to the machine and are made anew with it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::LogLimit;
use devices::serial::InputReady;
use virtio::models::console::{HostEnd, Look, PortHost, Size};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ConsoleError;
use super::hub::{ConsoleHub, ConsoleWriter, InputPort};
use super::terminal::open_pty;
use crate::config::PortConfig;
use crate::config::port::{PortEnd, end_of};
use crate::machine::driver::ppoll;
use crate::opener::{Opener, SocketFile};

/// The ends that a machine's ports have not taken over yet, by name.
#[derive(Default)]
pub struct PortBoard(Mutex<Vec<Waiting>>);

struct Waiting {
    name: Option<String>,
    end: Box<dyn HostEnd>,
}

impl PortBoard {
    /// Keeps `end` for the port `name`, or the console.
    pub fn put(&self, name: Option<&str>, end: Box<dyn HostEnd>) {
        let name = name.map(str::to_owned);
        self.lock().push(Waiting { name, end });
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PortHost for PortBoard {
    fn take(&self, name: Option<&str>) -> Option<Box<dyn HostEnd>> {
        let mut ends = self.lock();
        let index = ends
            .iter()
            .position(|waiting| waiting.name.as_deref() == name)?;
        Some(ends.swap_remove(index).end)
    }
}

/// An end that has been opened.
pub struct OpenPort {
    /// What the device is given.
    pub end: Box<dyn HostEnd>,
    /// The far end of the pseudo-terminal that it is.
    pub pty: Option<PathBuf>,
}

/// Opens where `port` leads; `None` for what the monitor has itself, or nobody.
///
/// # Errors
///
/// [`ConsoleError`], for what the host refuses.
pub fn open(port: &PortConfig, opener: &Opener) -> Result<Option<OpenPort>, ConsoleError> {
    let host = |what| move |source| ConsoleError::Host { what, source };
    let (end, pty): (Box<dyn HostEnd>, _) = match end_of(port) {
        Ok(PortEnd::Socket(path)) => {
            let listener = opener.listen_unix(path)?;
            let file = opener.own_socket(path)?;
            let end = SocketEnd::listening(listener, file);
            (
                Box::new(end.map_err(host("the socket cannot be used"))?),
                None,
            )
        }
        Ok(PortEnd::File(path)) => {
            let file = opener.create_output(path)?;
            let end = FileEnd::new(file, path.to_owned());
            (
                Box::new(end.map_err(host("the file cannot be used"))?),
                None,
            )
        }
        Ok(PortEnd::Pty) => {
            let made = open_pty().and_then(|(near, far, path)| Ok((PtyEnd::new(near, far)?, path)));
            let (end, path) = made.map_err(host("a pseudo-terminal cannot be made"))?;
            (Box::new(end), Some(PathBuf::from(path)))
        }
        Ok(PortEnd::Null | PortEnd::Agent) | Err(_) => return Ok(None),
    };
    Ok(Some(OpenPort { end, pty }))
}

/// An epoll instance that is readable when what is wanted of one descriptor is possible.
struct Interest {
    epoll: Epoll,
    file: OwnedFd,
    now: Option<(RawFd, EventSet)>,
}

impl Interest {
    fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let file = borrow(&epoll).try_clone_to_owned()?;
        Ok(Self {
            epoll,
            file,
            now: None,
        })
    }

    /// Waits for `events` of `fd`, or only for its end with none; for nothing without.
    fn set(&mut self, wanted: Option<(RawFd, EventSet)>) {
        if self.now == wanted {
            return;
        }
        if let Some((fd, _)) = self.now.take() {
            // It may have been closed already, which takes it out too.
            let _ = self
                .epoll
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        if let Some((fd, events)) = wanted
            && self
                .epoll
                .ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
                .is_ok()
        {
            self.now = wanted;
        }
    }
}

#[expect(
    unsafe_code,
    reason = "Epoll has no AsFd; the borrow cannot outlive it"
)]
fn borrow(epoll: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the Epoll lives, and the
    // result's lifetime is tied to that of the reference.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}

fn events(read: bool, write: bool) -> EventSet {
    let mut events = EventSet::empty();
    events.set(EventSet::IN, read);
    events.set(EventSet::OUT, write);
    events
}

/// Whether nobody will ever write to the other end, or read from it.
fn has_hung_up(fd: RawFd) -> bool {
    let mut fds = [libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    }];
    ppoll(&mut fds, Some(Duration::ZERO)).is_ok()
        && fds[0].revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Whether there are bytes to be read.
fn has_unread(stream: &UnixStream) -> bool {
    let mut byte = [0u8; 1];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is as long as stated.
    #[expect(unsafe_code, reason = "recv is a system call")]
    let peeked = unsafe { libc::recv(stream.as_raw_fd(), byte.as_mut_ptr().cast(), 1, flags) };
    peeked > 0
}

struct Client {
    stream: UnixStream,
    /// It writes no more.
    silent: bool,
    /// It is gone, and what it has written is still to be read.
    gone: bool,
}

/// A unix socket with one client at a time, or a stream by itself. Other clients
/// wait to be let in until the one that is there goes. What one has
/// written before it goes reaches a guest that has the port open.
pub struct SocketEnd {
    listener: Option<(UnixListener, SocketFile)>,
    client: Option<Client>,
    interest: Interest,
    wanted: (bool, bool),
    changed: bool,
    /// Nobody can be let in: that is tried again when something else happens.
    resting: bool,
    guest: Arc<GuestSide>,
}

/// What is known of the guest's side of a port.
#[derive(Debug, Default)]
pub struct GuestSide(AtomicBool);

impl GuestSide {
    /// Whether the guest has the port open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The guest has opened or closed it.
    pub fn set(&self, open: bool) {
        self.0.store(open, Ordering::Release);
    }
}

impl SocketEnd {
    fn new(
        listener: Option<(UnixListener, SocketFile)>,
        client: Option<UnixStream>,
    ) -> io::Result<Self> {
        let mut end = Self {
            listener,
            client: None,
            interest: Interest::new()?,
            wanted: (false, false),
            changed: false,
            resting: false,
            guest: Arc::default(),
        };
        if let Some(stream) = client {
            stream.set_nonblocking(true)?;
            end.greet(stream);
        }
        end.watch();
        Ok(end)
    }

    fn listening(listener: UnixListener, file: SocketFile) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Self::new(Some((listener, file)), None)
    }

    /// An end that is a stream alone, and what is known of the guest's side.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn stream(stream: UnixStream) -> io::Result<(Self, Arc<GuestSide>)> {
        let end = Self::new(None, Some(stream))?;
        let guest = Arc::clone(&end.guest);
        Ok((end, guest))
    }

    fn greet(&mut self, stream: UnixStream) {
        self.changed = true;
        self.client = Some(Client {
            stream,
            silent: false,
            gone: false,
        });
    }

    /// Waits for what is wanted of the client, or for one.
    fn watch(&mut self) {
        let (read, write) = self.wanted;
        let wanted = match (&self.client, &self.listener) {
            (Some(client), _) => {
                let events = events(read && !client.silent, write && !client.gone);
                // The end of one that has gone is known, and would be told again and again.
                let told = client.gone && events.is_empty();
                (!told).then(|| (client.stream.as_raw_fd(), events))
            }
            (None, Some((listener, _))) if !self.resting => {
                Some((listener.as_raw_fd(), EventSet::IN))
            }
            (None, _) => None,
        };
        self.interest.set(wanted);
    }

    fn let_in(&mut self) {
        static LIMIT: LogLimit = LogLimit::new();
        self.resting = false;
        let Some((listener, _)) = &self.listener else {
            return;
        };
        let accepted = listener.accept().and_then(|(stream, _)| {
            stream.set_nonblocking(true)?;
            Ok(stream)
        });
        match accepted {
            Ok(stream) => self.greet(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(error) => {
                self.resting = true;
                if let Some(suppressed) = LIMIT.allow() {
                    tracing::warn!(suppressed, "--port: no client is let in: {error}");
                }
            }
        }
    }
}

impl HostEnd for SocketEnd {
    fn event(&self) -> BorrowedFd<'_> {
        self.interest.file.as_fd()
    }

    fn want(&mut self, read: bool, write: bool) {
        self.wanted = (read, write);
        self.watch();
    }

    fn look(&mut self, reading: bool) -> Look {
        if let Some(client) = &mut self.client {
            client.gone |= has_hung_up(client.stream.as_raw_fd());
            if client.gone && !(reading && !client.silent && has_unread(&client.stream)) {
                self.interest.set(None);
                self.client = None;
            }
        }
        if self.client.is_none() {
            self.let_in();
        }
        self.watch();
        Look {
            connected: self.client.is_some(),
            changed: std::mem::take(&mut self.changed),
            size: None,
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(client) = &mut self.client else {
            return Err(io::ErrorKind::WouldBlock.into());
        };
        match client.stream.read(into) {
            Ok(0) => {
                client.silent = true;
                Err(io::ErrorKind::WouldBlock.into())
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                client.silent |= error.kind() != io::ErrorKind::Interrupted;
                Err(io::ErrorKind::WouldBlock.into())
            }
            read => read,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.client {
            Some(client) => client.stream.write(bytes),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn guest_opened(&mut self, open: bool) {
        self.guest.set(open);
    }
}

/// A pseudo-terminal. Its far end is held open, so that somebody is always there.
struct PtyEnd {
    near: File,
    _far: OwnedFd,
    interest: Interest,
}

impl PtyEnd {
    fn new(near: File, far: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            near,
            _far: far,
            interest: Interest::new()?,
        })
    }
}

impl HostEnd for PtyEnd {
    fn event(&self) -> BorrowedFd<'_> {
        self.interest.file.as_fd()
    }

    fn want(&mut self, read: bool, write: bool) {
        let wanted = (read || write).then(|| (self.near.as_raw_fd(), events(read, write)));
        self.interest.set(wanted);
    }

    fn look(&mut self, _reading: bool) -> Look {
        Look {
            connected: true,
            ..Look::default()
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.near.read(into) {
            Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
            read => read,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.near.write(bytes)
    }
}

/// A file that gets what the guest writes.
struct FileEnd {
    file: File,
    path: PathBuf,
    never: Interest,
}

impl FileEnd {
    fn new(file: File, path: PathBuf) -> io::Result<Self> {
        Ok(Self {
            file,
            path,
            never: Interest::new()?,
        })
    }
}

impl HostEnd for FileEnd {
    fn event(&self) -> BorrowedFd<'_> {
        self.never.file.as_fd()
    }

    fn want(&mut self, _read: bool, write: bool) {
        // It may be a pipe. A regular file is always ready, and never waited for.
        let wanted = write.then(|| (self.file.as_raw_fd(), EventSet::OUT));
        self.never.set(wanted);
    }

    fn look(&mut self, _reading: bool) -> Look {
        Look {
            connected: true,
            ..Look::default()
        }
    }

    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static LIMIT: LogLimit = LogLimit::new();
        let written = self.file.write(bytes);
        if let Err(error) = &written
            && error.kind() != io::ErrorKind::WouldBlock
            && let Some(suppressed) = LIMIT.allow()
        {
            let path = self.path.display();
            tracing::warn!(suppressed, "--port file={path}: output is lost: {error}");
        }
        written
    }
}

/// The console's place between its hub, which offers input, and its device.
pub struct HubPort {
    input: Mutex<Vec<u8>>,
    event: EventFd,
}

impl HubPort {
    fn input(&self) -> MutexGuard<'_, Vec<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rouse(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.event.write(1);
    }
}

impl InputPort for HubPort {
    /// Takes some, when all that was taken before has reached the guest.
    fn input(&self, bytes: &[u8]) -> usize {
        let mut input = self.input();
        if !input.is_empty() {
            return 0;
        }
        input.extend_from_slice(bytes);
        drop(input);
        self.rouse();
        bytes.len()
    }

    fn window_changed(&self) {
        self.rouse();
    }
}

/// The end of a console: its hub takes everything at once.
pub struct HubEnd {
    hub: ConsoleHub,
    writer: ConsoleWriter,
    port: Arc<HubPort>,
    event: OwnedFd,
}

impl HubEnd {
    /// An end at `hub`, and what is to be connected to that.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(hub: &ConsoleHub) -> io::Result<(Self, Arc<HubPort>)> {
        let event = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let copy = event.try_clone()?;
        let port = Arc::new(HubPort {
            input: Mutex::default(),
            event,
        });
        let end = Self {
            hub: hub.clone(),
            writer: hub.writer(),
            port: Arc::clone(&port),
            event: owned(copy),
        };
        Ok((end, port))
    }
}

#[expect(
    unsafe_code,
    reason = "EventFd gives its descriptor up as a number alone"
)]
fn owned(event: EventFd) -> OwnedFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is open, and nobody else has it any more.
    unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) }
}

impl HostEnd for HubEnd {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn want(&mut self, read: bool, _write: bool) {
        if read && !self.port.input().is_empty() {
            self.port.rouse();
        }
    }

    fn look(&mut self, _reading: bool) -> Look {
        // Cleared before looking; it fails when there is nothing to clear.
        let _ = self.port.event.read();
        Look {
            connected: true,
            changed: false,
            size: self.hub.window().map(|(cols, rows)| Size { cols, rows }),
        }
    }

    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut input = self.port.input();
        let count = into.len().min(input.len());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in into.iter_mut().zip(input.drain(..count)) {
            *to = from;
        }
        let all = input.is_empty();
        drop(input);
        if all {
            self.hub.ready();
        }
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }
}

#[cfg(test)]
mod tests;
