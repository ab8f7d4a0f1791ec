//! One connection between a port of the guest and a unix socket of the host.
//!
//! What the guest sends is written to the host's socket, and kept as far as that takes no more: never
//! more than [`BUFFER`] bytes, which is what the guest is told that there is room for. What
//! the host sends stays in its socket until the guest has room for it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use block::Connector;

use super::spec::{self, Header};

/// The most bytes that are kept of what a guest has sent.
pub const BUFFER: u32 = 128 << 10;

/// The most bytes in one packet to the guest.
pub const MAX_PACKET: usize = 64 << 10;

/// How long a connection may take to come about, and one that the host has closed to end.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// After what time a server that has enough connections waiting is tried again.
pub const RETRY: Duration = Duration::from_millis(20);

/// Where a connection is in its life.
#[derive(Debug)]
pub enum Stage {
    /// The guest has asked, and the server on the host is to be tried again.
    Connecting {
        /// The way to the server.
        server: Box<dyn Connector>,
        /// When it is tried.
        again: Instant,
    },
    /// The host has asked. `told`: the guest knows.
    Requested {
        /// See above.
        told: bool,
    },
    /// Bytes go both ways. `told`: the guest, which has asked, knows.
    Open {
        /// See above.
        told: bool,
    },
    /// It is over, and the guest is to be told.
    Over,
}

/// What is sent to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The operation.
    pub op: u16,
    /// Its flags.
    pub flags: u32,
}

impl Message {
    fn of(op: u16) -> Self {
        Self { op, flags: 0 }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// What its socket's events are known by.
    pub token: u64,
    /// Where it is in its life.
    pub stage: Stage,
    /// The host's end, while it is there.
    stream: Option<UnixStream>,
    /// It is in the queue of those that have something for the guest.
    pub queued: bool,
    /// When it has taken too long.
    deadline: Option<Instant>,
    /// What the guest has sent and the host has not taken.
    kept: VecDeque<u8>,
    /// How many bytes the host has taken, and how many the guest knows of.
    taken: u32,
    told_taken: u32,
    /// How many bytes were sent to the guest; those that have left its buffer, and how large that is.
    sent: u32,
    guest_taken: u32,
    guest_room: u32,
    /// The guest has been asked for room since it had some.
    asked: bool,
    /// It wants to know how much room there is here.
    tell_room: bool,
    /// There may be something to read from the host, and it may take something.
    readable: bool,
    writable: bool,
    /// The host sends no more; and takes no more.
    ended: bool,
    hung_up: bool,
    /// What the guest sends is dropped, because nobody will ever read it. What the host has sent is still given.
    deaf: bool,
    /// What the guest does no more, and what it was told that the host does no more: flags of `SHUTDOWN`.
    guest_shut: u32,
    told_shut: u32,
    /// The host knows that the guest sends no more.
    ended_host: bool,
}

impl Connection {
    /// A new one, whose socket will have `token`.
    #[must_use]
    pub fn new(token: u64, stage: Stage, stream: Option<UnixStream>, deadline: Instant) -> Self {
        Self {
            token,
            stage,
            stream,
            queued: false,
            deadline: Some(deadline),
            kept: VecDeque::new(),
            taken: 0,
            told_taken: 0,
            sent: 0,
            guest_taken: 0,
            guest_room: 0,
            asked: false,
            tell_room: false,
            readable: false,
            writable: true,
            ended: false,
            hung_up: false,
            deaf: false,
            guest_shut: 0,
            told_shut: 0,
            ended_host: false,
        }
    }

    /// The server has been reached.
    pub fn reached(&mut self, stream: UnixStream) {
        self.stream = Some(stream);
        self.stage = Stage::Open { told: false };
        self.deadline = None;
    }

    /// The guest has accepted what the host asked for, which is told the host. `false`: it had not been asked for, or
    /// the host is gone.
    pub fn accepted(&mut self, port: u32) -> bool {
        if !matches!(self.stage, Stage::Requested { told: true }) {
            return false;
        }
        self.stage = Stage::Open { told: true };
        self.deadline = None;
        let line = format!("OK {port}\n");
        let written = self.stream.as_mut().map(|s| s.write(line.as_bytes()));
        matches!(written, Some(Ok(written)) if written == line.len())
    }

    /// It ends at once: the host sees its socket closed, and the guest will be told.
    pub fn end(&mut self) {
        self.stage = Stage::Over;
        self.stream = None;
        self.kept = VecDeque::new();
        self.deadline = None;
    }

    /// The guest knows of it no more. What it has sent is still the host's, if it has also said that this was all.
    #[must_use]
    pub fn leave(self) -> Option<Departing> {
        let Self {
            stream,
            kept,
            guest_shut,
            ..
        } = self;
        let whole = guest_shut & spec::SHUTDOWN_SEND != 0 && !kept.is_empty();
        stream
            .filter(|_| whole)
            .map(|stream| Departing { stream, rest: kept })
    }

    /// When it is to be looked at, whatever happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match &self.stage {
            Stage::Connecting { again, .. } => self.deadline.map(|deadline| deadline.min(*again)),
            _ => self.deadline,
        }
    }

    /// Whether it has taken too long.
    #[must_use]
    pub fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Takes up what any packet says of the guest's room. A count that is none of bytes
    /// sent and not yet known to have left is passed over: packets may be made in another order than
    /// they come.
    pub fn heard(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        let outstanding = self.sent.wrapping_sub(self.guest_taken);
        if header.fwd_cnt.wrapping_sub(self.guest_taken) <= outstanding {
            self.guest_taken = header.fwd_cnt;
        }
        self.asked &= self.credit() == 0;
    }

    /// How many bytes the guest has room for.
    fn credit(&self) -> u32 {
        let outstanding = self.sent.wrapping_sub(self.guest_taken);
        self.guest_room.saturating_sub(outstanding)
    }

    /// The guest wants to know how much room there is.
    pub fn asked_for_room(&mut self) {
        self.tell_room = true;
    }

    /// The guest has sent these bytes. `false` when it may not.
    pub fn take(&mut self, bytes: &[u8]) -> bool {
        let open = matches!(self.stage, Stage::Open { told: true });
        if !open || self.guest_shut & spec::SHUTDOWN_SEND != 0 {
            return false;
        }
        let room = usize::try_from(BUFFER).unwrap_or(0);
        if bytes.len() > room.saturating_sub(self.kept.len()) {
            return false;
        }
        let mut bytes = bytes;
        if self.kept.is_empty() {
            let written = self.write(bytes);
            bytes = bytes.get(written..).unwrap_or_default();
        }
        self.kept.extend(bytes);
        true
    }

    /// The guest does no more of what `flags` say. `false`: it is over.
    pub fn shut(&mut self, flags: u32) -> bool {
        if !matches!(self.stage, Stage::Open { told: true }) {
            return false;
        }
        self.guest_shut |= flags & spec::SHUTDOWN_BOTH;
        if let Some(stream) = &self.stream
            && self.guest_shut & spec::SHUTDOWN_RECEIVE != 0
        {
            // It fails when the host is gone, which is told otherwise.
            let _ = stream.shutdown(Shutdown::Read);
        }
        self.flush()
    }

    /// Events of the host's socket. `false`: it is over.
    pub fn stir(&mut self, readable: bool, writable: bool, hung_up: bool) -> bool {
        self.readable |= readable;
        self.writable |= writable;
        self.hung_up |= hung_up;
        self.flush()
    }

    /// Gives the host what is kept, as far as it takes it. `false`: both sides of the guest have ended, and it is over.
    fn flush(&mut self) -> bool {
        while !self.kept.is_empty() && self.writable {
            let kept = std::mem::take(&mut self.kept);
            let written = self.write(kept.as_slices().0);
            self.kept = kept;
            self.kept.drain(..written);
        }
        if !self.kept.is_empty() || self.guest_shut & spec::SHUTDOWN_SEND == 0 {
            return true;
        }
        if !std::mem::replace(&mut self.ended_host, true)
            && let Some(stream) = &self.stream
        {
            let _ = stream.shutdown(Shutdown::Write);
        }
        self.guest_shut != spec::SHUTDOWN_BOTH
    }

    /// Writes some of `bytes`, or none when the host takes no more for now.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(stream) = self.stream.as_mut().filter(|_| self.writable) else {
            return 0;
        };
        let written = loop {
            match stream.write(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.writable = false;
                    break 0;
                }
                Ok(written) => break written,
                Err(_) => {
                    self.deaf = true;
                    break bytes.len();
                }
            }
        };
        let written = written.min(bytes.len());
        let count = u32::try_from(written).unwrap_or(0);
        self.taken = self.taken.wrapping_add(count);
        // A guest that has used up its room waits to hear of more.
        self.tell_room |= self.taken.wrapping_sub(self.told_taken) >= BUFFER / 2;
        written
    }

    /// Whether bytes of the host are to be given to the guest, once that has room.
    fn reads(&self) -> bool {
        self.readable && !self.ended && self.guest_shut & spec::SHUTDOWN_RECEIVE == 0
    }

    /// What the guest is to be told that the host does no more. What it has sent comes first.
    fn shut_by_host(&self) -> u32 {
        let unread = self.guest_shut & spec::SHUTDOWN_RECEIVE != 0;
        let over = self.hung_up && (self.ended || unread);
        let mut flags = 0;
        if self.ended || over {
            flags |= spec::SHUTDOWN_SEND;
        }
        if self.deaf || over {
            flags |= spec::SHUTDOWN_RECEIVE;
        }
        flags
    }

    /// Whether there is something for the guest.
    #[must_use]
    pub fn is_due(&self) -> bool {
        match self.stage {
            Stage::Connecting { .. } => false,
            Stage::Requested { told } => !told,
            Stage::Open { told: false } | Stage::Over => true,
            Stage::Open { told: true } => {
                let reads = self.reads() && (self.credit() > 0 || !self.asked);
                reads || self.tell_room || self.shut_by_host() & !self.told_shut != 0
            }
        }
    }

    /// The next thing for the guest. Bytes for it, no more than `room`, are appended to `packet`.
    pub fn next(&mut self, room: usize, packet: &mut Vec<u8>, now: Instant) -> Option<Message> {
        match &mut self.stage {
            Stage::Connecting { .. } => return None,
            Stage::Over => return Some(Message::of(spec::OP_RST)),
            Stage::Requested { told } => {
                let told = std::mem::replace(told, true);
                return (!told).then(|| Message::of(spec::OP_REQUEST));
            }
            Stage::Open { told } => {
                if !std::mem::replace(told, true) {
                    return Some(Message::of(spec::OP_RESPONSE));
                }
            }
        }
        if self.reads() {
            let most = usize::try_from(self.credit()).unwrap_or(0).min(room);
            if most > 0 {
                match self.read(most, packet) {
                    Ok(0) => {}
                    Ok(_) => return Some(Message::of(spec::OP_RW)),
                    Err(_) => {
                        self.end();
                        return Some(Message::of(spec::OP_RST));
                    }
                }
            } else if self.credit() == 0 && !std::mem::replace(&mut self.asked, true) {
                return Some(Message::of(spec::OP_CREDIT_REQUEST));
            }
        }
        if self.tell_room {
            return Some(Message::of(spec::OP_CREDIT_UPDATE));
        }
        let shut = self.shut_by_host();
        if shut & !self.told_shut == 0 {
            return None;
        }
        self.told_shut = shut;
        if shut == spec::SHUTDOWN_BOTH {
            self.deadline = now.checked_add(PATIENCE);
        }
        Some(Message {
            op: spec::OP_SHUTDOWN,
            flags: shut,
        })
    }

    /// Appends some bytes of the host; none when there are none for now, or no more.
    fn read(&mut self, most: usize, packet: &mut Vec<u8>) -> io::Result<usize> {
        let Some(stream) = &mut self.stream else {
            return Ok(0);
        };
        let before = packet.len();
        packet.resize(before + most.min(MAX_PACKET), 0);
        let read = loop {
            match stream.read(packet.get_mut(before..).unwrap_or_default()) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    break Ok(0);
                }
                Ok(0) => {
                    self.ended = true;
                    break Ok(0);
                }
                read => break read,
            }
        };
        let count = read.as_ref().map_or(0, |read| *read);
        packet.truncate(before + count);
        self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
        read
    }

    /// The room that every packet tells the guest of, and how much has left it.
    pub fn tell_room(&mut self) -> (u32, u32) {
        self.tell_room = false;
        self.told_taken = self.taken;
        (BUFFER, self.taken)
    }
}

/// The end of a connection that the guest has closed: the host is still to take what was sent before.
#[derive(Debug)]
pub struct Departing {
    stream: UnixStream,
    rest: VecDeque<u8>,
}

impl Departing {
    /// Gives the host what it takes. `false` when it has all, or is gone.
    pub fn give(&mut self) -> bool {
        while !self.rest.is_empty() {
            match self.stream.write(self.rest.as_slices().0) {
                Ok(0) => return false,
                Ok(written) => drop(self.rest.drain(..written.min(self.rest.len()))),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        let _ = self.stream.shutdown(Shutdown::Write);
        false
    }
}
