//! All connections of a device, and the socket at which clients on the host ask for them.
//!
//! The hub knows nothing of queues: it is handed the packets of the guest, and asked for those that are
//! for it. It outlives the workers, so that connections stay while the device is stopped.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Address, Listening, Opener};
use devices::LogLimit;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Departing, MAX_PACKET, PATIENCE, RETRY, Stage};
use super::greeting::{self, Greeting, Progress};
use super::spec::{self, HEADER_LEN, Header, OP_RST, TYPE_STREAM};
use super::tally::Tally;

/// The most connections at a time.
pub const MAX_CONNECTIONS: usize = 256;

/// The most clients at a time that have not said what they want. Others wait to be let in.
pub const MAX_GREETINGS: usize = 32;

/// The most refusals that wait for buffers of the guest. With more, its packets wait.
pub const MAX_REFUSALS: usize = 256;

/// After what time clients are let in again when none could be.
const REST: Duration = Duration::from_secs(1);

/// The ports of the host's side of what clients ask for: others are those of servers.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// How the socket of clients is known by its events; connections and greetings count on.
const LISTENER: u64 = 0;

/// The ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    host: u32,
    guest: u32,
}

/// Whose a token is.
enum Place {
    Greeting(Greeting),
    Connection(Key),
    /// The guest has closed it, and the host has not taken all. It counts as a connection.
    Departing(Departing),
}

/// Where the hub is, and how it gets its sockets.
pub struct Setup {
    /// The device's id, for messages.
    pub id: String,
    /// The guest's address.
    pub guest_cid: u64,
    /// The socket of clients; servers are at this path with `_` and the port behind it.
    pub path: PathBuf,
    /// The way to servers.
    pub opener: Arc<dyn Opener>,
    /// What is counted.
    pub tally: Arc<Tally>,
}

/// All connections.
pub struct Hub {
    setup: Setup,
    listening: Listening,
    /// Clients are let in.
    admits: bool,
    /// When that is tried again.
    admit_at: Option<Instant>,
    epoll: Epoll,
    connections: BTreeMap<Key, Connection>,
    places: BTreeMap<u64, Place>,
    greetings: usize,
    departing: usize,
    next_token: u64,
    next_port: u32,
    /// Connections with something for the guest, each once.
    due: VecDeque<Key>,
    /// Refusals of what belongs to no connection.
    refusals: VecDeque<Header>,
    /// No deadline is before this.
    wake_at: Option<Instant>,
    /// The driver is to be told that all connections are gone.
    pub reset_untold: bool,
}

impl Hub {
    /// One without connections.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(setup: Setup, listening: Listening) -> io::Result<Self> {
        listening.socket.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, listening.socket.as_raw_fd(), event)?;
        Ok(Self {
            setup,
            listening,
            admits: true,
            admit_at: None,
            epoll,
            connections: BTreeMap::new(),
            places: BTreeMap::new(),
            greetings: 0,
            departing: 0,
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            due: VecDeque::new(),
            refusals: VecDeque::new(),
            wake_at: None,
            reset_untold: false,
        })
    }

    /// Readable when [`Hub::look`] has something to do.
    pub fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// When [`Hub::look`] is to be called whatever happens.
    pub fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    /// Whether a packet of the guest can be taken.
    pub fn takes(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// Whether there may be something for the guest.
    pub fn is_due(&self) -> bool {
        !self.refusals.is_empty() || !self.due.is_empty()
    }

    /// The driver has been reset, or knows that there are no connections: there are none. Who is connected on
    /// the host sees the end.
    pub fn forget(&mut self) {
        self.connections.clear();
        self.places.clear();
        self.greetings = 0;
        self.departing = 0;
        self.due.clear();
        self.refusals.clear();
        self.wake_at = None;
        self.reset_untold = false;
        self.count();
        self.admit();
    }

    /// Does what there is to do on the host's side.
    ///
    /// # Errors
    ///
    /// The host's, when it cannot be looked any more.
    pub fn look(&mut self, now: Instant) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 64];
        let ready = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            ready => ready?,
        };
        for event in events.iter().take(ready) {
            match event.data() {
                LISTENER => self.accept(now),
                token => self.stir(token, event.event_set(), now),
            }
        }
        if self.wake_at.is_some_and(|at| at <= now) {
            self.expire(now);
        }
        Ok(())
    }

    /// Lets in those clients that there is room for.
    fn accept(&mut self, now: Instant) {
        while self.greetings < MAX_GREETINGS {
            let accepted = self.listening.socket.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                let token = self.watch(&stream)?;
                Ok((token, stream))
            });
            match accepted {
                Ok((token, stream)) => {
                    let deadline = now.checked_add(greeting::PATIENCE).unwrap_or(now);
                    self.remember(deadline);
                    let greeting = Greeting::new(stream, deadline);
                    self.places.insert(token, Place::Greeting(greeting));
                    self.greetings += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.complain(&format!("no client is let in: {error}"));
                    break;
                }
            }
        }
        // Nobody is asked for until there is room again.
        let event = EpollEvent::new(EventSet::empty(), LISTENER);
        let fd = self.listening.socket.as_raw_fd();
        self.admits = self.epoll.ctl(ControlOperation::Modify, fd, event).is_err();
        self.admit_at = now.checked_add(REST);
        if let Some(at) = self.admit_at {
            self.remember(at);
        }
    }

    /// Lets clients in again.
    fn admit(&mut self) {
        if self.admits {
            return;
        }
        let event = EpollEvent::new(EventSet::IN, LISTENER);
        let fd = self.listening.socket.as_raw_fd();
        self.admits = self.epoll.ctl(ControlOperation::Modify, fd, event).is_ok();
        if self.admits {
            self.admit_at = None;
        }
    }

    /// Waits for what happens at a socket: for each change once. Its token.
    fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        let event = EpollEvent::new(changes(), token);
        self.epoll
            .ctl(ControlOperation::Add, stream.as_raw_fd(), event)?;
        Ok(token)
    }

    fn remember(&mut self, deadline: Instant) {
        self.wake_at = Some(self.wake_at.map_or(deadline, |at| at.min(deadline)));
    }

    fn stir(&mut self, token: u64, events: EventSet, now: Instant) {
        match self.places.get_mut(&token) {
            Some(Place::Connection(key)) => {
                let key = *key;
                let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
                let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP) || hung_up;
                let writable = events.contains(EventSet::OUT) || hung_up;
                self.change(key, |connection| {
                    connection.stir(readable, writable, hung_up)
                });
            }
            Some(Place::Greeting(greeting)) => match greeting.read() {
                Progress::More => {}
                Progress::Wrong => self.dismiss(token),
                Progress::Port(port) => {
                    let place = self.places.remove(&token);
                    self.greetings = self.greetings.saturating_sub(1);
                    self.admit();
                    if let Some(Place::Greeting(Greeting { stream, .. })) = place {
                        self.ask_guest(token, port, stream, now);
                    }
                }
            },
            Some(Place::Departing(departing)) => {
                let more = departing.give();
                if !more {
                    self.places.remove(&token);
                    self.departing = self.departing.saturating_sub(1);
                    self.count();
                }
            }
            // It has been closed meanwhile.
            None => {}
        }
    }

    /// A client goes without having got anything.
    fn dismiss(&mut self, token: u64) {
        self.places.remove(&token);
        self.greetings = self.greetings.saturating_sub(1);
        Tally::add(&self.setup.tally.refused, 1);
        self.admit();
    }

    /// A client wants port `guest` of the guest. Where that cannot be asked, the client sees its socket closed.
    fn ask_guest(&mut self, token: u64, guest: u32, stream: UnixStream, now: Instant) {
        let host = self.free_port(guest);
        let Some(host) = host.filter(|_| self.has_room()) else {
            Tally::add(&self.setup.tally.refused, 1);
            return;
        };
        let deadline = now.checked_add(PATIENCE).unwrap_or(now);
        self.remember(deadline);
        // What has happened before it was known what it wants is told once more.
        let event = EpollEvent::new(changes(), token);
        let again = self
            .epoll
            .ctl(ControlOperation::Modify, stream.as_raw_fd(), event);
        if again.is_ok() {
            let stage = Stage::Requested { told: false };
            let connection = Connection::new(token, stage, Some(stream), deadline);
            self.insert(Key { host, guest }, connection);
        }
    }

    fn free_port(&mut self, guest: u32) -> Option<u32> {
        for _ in 0..=MAX_CONNECTIONS {
            let host = self.next_port;
            self.next_port = if host >= LAST_PORT {
                FIRST_PORT
            } else {
                host + 1
            };
            if !self.connections.contains_key(&Key { host, guest }) {
                return Some(host);
            }
        }
        None
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.places.insert(connection.token, Place::Connection(key));
        self.connections.insert(key, connection);
        self.count();
        self.enqueue(key);
    }

    /// A connection is gone, and the guest knows it.
    fn remove(&mut self, key: Key) {
        if let Some(connection) = self.connections.remove(&key) {
            let token = connection.token;
            self.places.remove(&token);
            if connection.queued {
                self.due.retain(|due| *due != key);
            }
            if let Some(departing) = connection.leave() {
                self.places.insert(token, Place::Departing(departing));
                self.departing += 1;
            }
            self.count();
        }
    }

    /// How many connections there are, with those that only the host still has.
    fn held(&self) -> usize {
        self.connections.len().saturating_add(self.departing)
    }

    fn has_room(&self) -> bool {
        self.held() < MAX_CONNECTIONS
    }

    fn count(&self) {
        let count = u64::try_from(self.held()).unwrap_or(0);
        let counter = &self.setup.tally.connections;
        counter.store(count, std::sync::atomic::Ordering::Relaxed);
    }

    /// Does something to a connection, which ends when that says `false`.
    fn change(&mut self, key: Key, change: impl FnOnce(&mut Connection) -> bool) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !change(connection)
        {
            connection.end();
        }
        self.enqueue(key);
    }

    /// Has a connection be asked, if it has something for the guest.
    fn enqueue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && connection.is_due()
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.due.push_back(key);
        }
    }

    /// A packet of the guest. `body`: its bytes, unless they are not there.
    pub fn receive(&mut self, header: &Header, body: Option<&[u8]>, now: Instant) {
        let &Header {
            src_cid, dst_cid, ..
        } = header;
        Tally::add(&self.setup.tally.tx_packets, 1);
        if src_cid != self.setup.guest_cid || dst_cid != spec::HOST_CID {
            self.wrong("a packet is from or for another address");
            return;
        }
        if header.kind != TYPE_STREAM {
            self.wrong("a packet is for no stream socket");
            self.refuse(header);
            return;
        }
        let key = Key {
            host: header.dst_port,
            guest: header.src_port,
        };
        let Some(connection) = self.connections.get_mut(&key) else {
            match header.op {
                spec::OP_REQUEST => self.connect(key, header, now),
                _ => self.refuse(header),
            }
            return;
        };
        connection.heard(header);
        let tally = &self.setup.tally;
        let taken = match header.op {
            OP_RST => {
                if matches!(connection.stage, Stage::Requested { .. }) {
                    Tally::add(&tally.refused, 1);
                }
                self.remove(key);
                return;
            }
            // The guest does not know yet.
            _ if matches!(connection.stage, Stage::Over) => return,
            spec::OP_RW => body.is_some_and(|body| {
                let taken = connection.take(body);
                Tally::add(&tally.tx_bytes, if taken { body.len() } else { 0 });
                taken
            }),
            spec::OP_RESPONSE => {
                let accepted = connection.accepted(key.host);
                Tally::add(&tally.connected, accepted.into());
                accepted
            }
            spec::OP_SHUTDOWN => {
                // That both sides have ended is no mistake, but it ends it.
                self.change(key, |connection| connection.shut(header.flags));
                return;
            }
            spec::OP_CREDIT_REQUEST => {
                connection.asked_for_room();
                true
            }
            spec::OP_CREDIT_UPDATE => true,
            // Also a second request.
            _ => false,
        };
        if !taken {
            connection.end();
            self.wrong("a packet does not fit its connection");
        }
        self.enqueue(key);
    }

    /// Answers what belongs to no connection (5.10.6.4.1). A refusal is not answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != OP_RST && self.takes() {
            self.refusals.push_back(Header {
                src_cid: spec::HOST_CID,
                dst_cid: self.setup.guest_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: OP_RST,
                ..Header::default()
            });
        }
    }

    /// The guest wants a port of the host.
    fn connect(&mut self, key: Key, header: &Header, now: Instant) {
        let mut path = self.setup.path.clone().into_os_string();
        path.push(format!("_{}", key.host));
        let server = self.setup.opener.connector(&Address::Unix(path.into()));
        let (true, Ok(server)) = (self.has_room(), server) else {
            Tally::add(&self.setup.tally.refused, 1);
            self.refuse(header);
            return;
        };
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        let deadline = now.checked_add(PATIENCE).unwrap_or(now);
        let stage = Stage::Connecting { server, again: now };
        let mut connection = Connection::new(token, stage, None, deadline);
        connection.heard(header);
        self.insert(key, connection);
        self.try_server(key, now);
    }

    /// Tries the server of a connection that has none yet.
    fn try_server(&mut self, key: Key, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        let late = connection.is_late(now);
        let Stage::Connecting { server, again } = &mut connection.stage else {
            return;
        };
        let reached = server.connect_now().map(UnixStream::from);
        match reached {
            Ok(stream) => {
                let old = connection.token;
                self.places.remove(&old);
                match self.watch(&stream) {
                    Ok(token) => {
                        self.places.insert(token, Place::Connection(key));
                        self.reached(key, token, stream);
                    }
                    Err(_) => self.give_up(key),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !late => {
                *again = now.checked_add(RETRY).unwrap_or(now);
                let at = *again;
                self.remember(at);
            }
            Err(_) => self.give_up(key),
        }
    }

    fn reached(&mut self, key: Key, token: u64, stream: UnixStream) {
        Tally::add(&self.setup.tally.connected, 1);
        self.change(key, |connection| {
            connection.token = token;
            connection.reached(stream);
            true
        });
    }

    fn give_up(&mut self, key: Key) {
        Tally::add(&self.setup.tally.refused, 1);
        self.change(key, |_| false);
    }

    /// Ends what has taken too long, and tries again what is to be.
    fn expire(&mut self, now: Instant) {
        let late = |place: &Place| match place {
            Place::Greeting(greeting) => greeting.deadline <= now,
            Place::Connection(_) | Place::Departing(_) => false,
        };
        let silent: Vec<u64> = self
            .places
            .iter()
            .filter(|(_, place)| late(place))
            .map(|(token, _)| *token)
            .collect();
        for token in silent {
            self.dismiss(token);
        }
        let keys: Vec<Key> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.deadline().is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            match self
                .connections
                .get(&key)
                .map(|connection| &connection.stage)
            {
                Some(Stage::Connecting { .. }) => self.try_server(key, now),
                Some(Stage::Requested { .. }) => self.give_up(key),
                _ => self.change(key, |_| false),
            }
        }
        if self.admit_at.is_some_and(|at| at <= now) {
            self.admit();
        }
        let greetings = self.places.values().filter_map(|place| match place {
            Place::Greeting(greeting) => Some(greeting.deadline),
            Place::Connection(_) | Place::Departing(_) => None,
        });
        let connections = self.connections.values().filter_map(Connection::deadline);
        self.wake_at = greetings.chain(connections).chain(self.admit_at).min();
    }

    /// Makes the next packet for the guest, which has room for `room` bytes behind the header.
    pub fn next(&mut self, room: usize, packet: &mut Vec<u8>, now: Instant) -> Option<Sent> {
        packet.clear();
        if let Some(refusal) = self.refusals.pop_front() {
            refusal.write(packet);
            Tally::add(&self.setup.tally.rx_packets, 1);
            return Some(Sent(None));
        }
        // Each that has nothing after all leaves the queue.
        while let Some(key) = self.due.pop_front() {
            packet.clear();
            packet.resize(HEADER_LEN, 0);
            let Some(connection) = self.connections.get_mut(&key) else {
                continue;
            };
            connection.queued = false;
            let message = connection.next(room.min(MAX_PACKET), packet, now);
            let deadline = connection.deadline();
            let Some(message) = message else {
                // What is due and needs more room than there is waits for another buffer.
                self.enqueue(key);
                if room == 0 {
                    return None;
                }
                continue;
            };
            let (buf_alloc, fwd_cnt) = connection.tell_room();
            let len = packet.len().saturating_sub(HEADER_LEN);
            let header = Header {
                src_cid: spec::HOST_CID,
                dst_cid: self.setup.guest_cid,
                src_port: key.host,
                dst_port: key.guest,
                len: u32::try_from(len).unwrap_or(0),
                kind: TYPE_STREAM,
                op: message.op,
                flags: message.flags,
                buf_alloc,
                fwd_cnt,
            };
            let mut bytes = Vec::with_capacity(HEADER_LEN);
            header.write(&mut bytes);
            for (to, from) in packet.iter_mut().zip(bytes) {
                *to = from;
            }
            Tally::add(&self.setup.tally.rx_packets, 1);
            Tally::add(&self.setup.tally.rx_bytes, len);
            if let Some(deadline) = deadline {
                self.remember(deadline);
            }
            if message.op == OP_RST {
                self.remove(key);
            } else {
                self.enqueue(key);
            }
            return Some(Sent(Some(key)));
        }
        None
    }

    /// The guest has got less than the whole packet: its connection has a gap.
    pub fn lost(&mut self, sent: &Sent) {
        self.wrong("a packet has no place in the buffer that it is for");
        if let Sent(Some(key)) = sent {
            self.change(*key, |_| false);
        }
    }

    /// Counts what makes no sense.
    pub fn wrong(&self, what: &str) {
        Tally::add(&self.setup.tally.errors, 1);
        self.complain(what);
    }

    fn complain(&self, what: &str) {
        static LIMIT: LogLimit = LogLimit::new();
        if let Some(suppressed) = LIMIT.allow() {
            tracing::warn!(suppressed, "{}: {what}", self.setup.id);
        }
    }
}

/// The events of a socket, each told once when it comes about.
fn changes() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED
}

/// A packet that has been made, whose connection is known by it.
pub struct Sent(Option<Key>);

#[cfg(test)]
mod tests;
