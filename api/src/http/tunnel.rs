//! A connection that has become a stream to a console.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// How many bytes may wait in each direction.
const WAITING: usize = 16 << 10;
/// How often each direction is served before other connections are.
const ROUNDS: usize = 4;

/// Two streams joined. What one side does not read makes the other wait.
#[derive(Debug)]
pub(super) struct Tunnel {
    console: UnixStream,
    /// From the client to the console.
    inward: Pipe,
    /// From the console to the client.
    outward: Pipe,
    /// What the console is registered for; empty is not at all.
    registered: EventFlags,
}

/// One direction.
#[derive(Debug, Default)]
struct Pipe {
    bytes: Vec<u8>,
    sent: usize,
    /// The source has ended.
    ended: bool,
    /// The end has been passed on.
    closed: bool,
}

/// The connection is over.
#[derive(Debug)]
pub(super) struct Over;

impl Tunnel {
    /// Joins a console to a client that has already sent `inward` and is still to
    /// get `outward`.
    pub fn new(console: UnixStream, inward: Vec<u8>, outward: Vec<u8>) -> std::io::Result<Self> {
        console.set_nonblocking(true)?;
        let pipe = |bytes| Pipe {
            bytes,
            ..Pipe::default()
        };
        Ok(Self {
            console,
            inward: pipe(inward),
            outward: pipe(outward),
            registered: EventFlags::empty(),
        })
    }

    pub fn console(&self) -> &UnixStream {
        &self.console
    }

    /// Moves what can be moved. Returns whether there may be more.
    pub fn pump(&mut self, client: &UnixStream, scratch: &mut [u8]) -> Result<bool, Over> {
        let mut moved = true;
        for _ in 0..ROUNDS {
            let inward = self.inward.step(client, &self.console, scratch);
            // A console that takes nothing may still have something to give.
            let inward = inward.unwrap_or_else(|Over| self.inward.give_up());
            let outward = self.outward.step(&self.console, client, scratch)?;
            moved = inward || outward;
            if !moved {
                break;
            }
        }
        // A client whose input has ended may still want to see what the guest writes.
        if self.outward.closed {
            return Err(Over);
        }
        Ok(moved)
    }

    /// What to wait for at the client.
    pub fn wanted_of_client(&self) -> EventFlags {
        wanted(&self.inward, &self.outward)
    }

    /// What to change about the console's registration, which is taken for done.
    pub fn change_of_interest(&mut self) -> Change {
        let wanted = wanted(&self.outward, &self.inward);
        let change = match (self.registered.is_empty(), wanted.is_empty()) {
            _ if self.registered == wanted => Change::None,
            (true, _) => Change::Add(wanted),
            // Registered for nothing it would still report that the other end is closed.
            (_, true) => Change::Delete,
            (false, false) => Change::Modify(wanted),
        };
        self.registered = wanted;
        change
    }
}

fn wanted(from: &Pipe, to: &Pipe) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, from.takes());
    flags.set(EventFlags::OUT, to.waiting() > 0);
    flags
}

/// What epoll is to be told.
#[derive(Debug)]
pub(super) enum Change {
    None,
    Add(EventFlags),
    Modify(EventFlags),
    Delete,
}

impl Pipe {
    fn waiting(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Takes nothing more.
    fn give_up(&mut self) -> bool {
        self.bytes.clear();
        self.sent = 0;
        self.ended = true;
        self.closed = true;
        false
    }

    fn takes(&self) -> bool {
        !self.ended && self.waiting() < WAITING
    }

    /// Reads once and writes once. Returns whether it may be worth another go.
    fn step(
        &mut self,
        from: &UnixStream,
        to: &UnixStream,
        scratch: &mut [u8],
    ) -> Result<bool, Over> {
        let mut moved = false;
        if self.takes() {
            match recv(from.as_fd(), &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.ended = true,
                Ok((length, _)) => {
                    self.bytes.extend_from_slice(&scratch[..length]);
                    moved = true;
                }
                Err(Errno::AGAIN | Errno::INTR) => (),
                Err(_) => self.ended = true,
            }
        }
        if self.waiting() > 0 {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(to.as_fd(), &self.bytes[self.sent..], flags) {
                Ok(length) => self.sent += length,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Err(_) => return Err(Over),
            }
            if self.waiting() == 0 {
                self.bytes.clear();
                self.sent = 0;
            }
        }
        if self.ended && self.waiting() == 0 && !self.closed {
            self.closed = true;
            let _ = to.shutdown(Shutdown::Write);
        }
        Ok(moved)
    }
}
