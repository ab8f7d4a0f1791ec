//! The loop of the server's thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{SendFlags, SocketFlags, accept_with, send};

use super::ServerOptions;
use super::answer::{After, Answer};
use super::brake::Brake;
use super::connection::{Change, Connection, Gone, Shared};
use super::dispatch::Dispatcher;
use super::json::Reader;
use super::mailbox::Mailbox;
use super::peer::Peer;
use super::requests::Requests;
use crate::{Alert, Control, Subscription};

/// How epoll names the listener and the mailbox; connections have other numbers.
const LISTENER: u64 = u64::MAX;
const MAILBOX: u64 = u64::MAX - 1;
/// Set in the number of a connection's console.
const CONSOLE: u64 = 1;
/// How many events are taken up at once.
const EVENTS: usize = 32;
/// How many bytes are received at once.
const SCRATCH: usize = 8 << 10;
/// How long no connections are taken up when the host is out of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// A place for a connection. Who knows the connection by an old generation
/// finds none.
struct Slot {
    generation: u32,
    connection: Option<Box<Connection>>,
}

/// The server, before and in its thread.
pub(super) struct Server {
    epoll: OwnedFd,
    /// Gone once the server has been stopped.
    listener: Option<UnixListener>,
    mailbox: Arc<Mailbox>,
    shared: Shared,
    slots: Vec<Slot>,
    open: usize,
    /// No later than the next deadline of a connection.
    next: Option<Instant>,
    /// When connections are taken up again.
    paused: Option<Instant>,
    /// How often clients are told of that find no place.
    crowded: Brake,
    /// How often those are that are not served.
    strangers: Brake,
    /// Rings the mailbox for each event while somebody reads them.
    subscription: Option<Subscription>,
    /// When the server ends, whatever is unfinished.
    end: Option<Instant>,
}

impl Server {
    pub fn new(
        listener: UnixListener,
        control: Arc<dyn Control>,
        options: ServerOptions,
        mailbox: Arc<Mailbox>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let number = EventData::new_u64;
        epoll::add(&epoll, &listener, number(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, mailbox.bell(), number(MAILBOX), EventFlags::IN)?;
        Ok(Self {
            epoll,
            listener: Some(listener),
            shared: Shared {
                dispatcher: Dispatcher {
                    control,
                    mailbox: Arc::clone(&mailbox),
                    reader: Reader::new(options.strict),
                    max_commands: options.max_commands,
                    requests: Requests::default(),
                },
                options,
                scratch: vec![0; SCRATCH].into_boxed_slice(),
                held: 0,
                held_descriptors: 0,
                now: Instant::now(),
                slow: Brake::default(),
            },
            mailbox,
            slots: Vec::new(),
            open: 0,
            next: None,
            paused: None,
            crowded: Brake::default(),
            strangers: Brake::default(),
            subscription: None,
            end: None,
        })
    }

    /// Serves until the mailbox says that it is over.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let timeout = self.timeout();
            events.clear();
            let space = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, space, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => (),
                Err(error) => {
                    tracing::error!(%error, "the control socket cannot wait");
                    return;
                }
            }
            self.shared.now = Instant::now();
            let mut rung = false;
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    MAILBOX => rung = true,
                    key => self.ready(key, event.flags),
                }
            }
            if rung {
                self.hear();
            }
            self.expire();
            if self
                .end
                .is_some_and(|end| self.open == 0 || self.shared.now >= end)
            {
                return;
            }
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        let until = [self.next, self.paused, self.end]
            .into_iter()
            .flatten()
            .min()?;
        // The clock has gone on, but not by much: it is read once a round.
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up, so that it has passed when it wakes.
        let left = left + Duration::from_millis(1);
        Timespec::try_from(left).ok()
    }

    /// Takes up one connection: the next one is reported again, and mostly there is none.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match accept_with(listener, flags) {
            Ok(stream) => self.admit(UnixStream::from(stream)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => (),
            Err(error) => {
                tracing::warn!(%error, "no connections are taken for a moment");
                self.listen(EventFlags::empty());
                self.paused = self.shared.now.checked_add(PAUSE);
            }
        }
    }

    fn listen(&self, flags: EventFlags) {
        if let Some(listener) = &self.listener
            && let Err(error) =
                epoll::modify(&self.epoll, listener, EventData::new_u64(LISTENER), flags)
        {
            tracing::error!(%error, "the control socket is lost");
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        let peer = Peer::of(&stream);
        if !self.shared.options.clients.include(peer.user()) {
            self.warn_of_stranger(&peer);
            return reject(&stream, 403, &["Forbidden", &refusal(&peer)]);
        }
        if self.open >= self.shared.options.max_connections && !self.evict() {
            self.warn_of_crowd(&peer);
            let reason = format!(
                "{} connections are open already: try again in a second",
                self.open
            );
            return reject(&stream, 503, &["Service Unavailable", &reason]);
        }
        let index = match self.slots.iter().position(|slot| slot.connection.is_none()) {
            Some(index) => index,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    connection: None,
                });
                self.slots.len() - 1
            }
        };
        let slot = &mut self.slots[index];
        slot.generation = slot.generation.wrapping_add(1);
        // Not yet known to epoll: the first request is mostly answered before.
        let key = (u64::from(slot.generation) << 32) | (index as u64) << 1;
        tracing::debug!(by = %peer, "connection");
        slot.connection = Some(Box::new(Connection::new(stream, key, self.shared.now)));
        self.open += 1;
        self.ready(key, EventFlags::IN);
    }

    /// Tells of a client that finds no place: of many not every one.
    fn warn_of_crowd(&mut self, peer: &Peer) {
        if let Some(suppressed) = self.crowded.allow(self.shared.now) {
            tracing::warn!(by = %peer, suppressed, "too many connections");
        }
    }

    /// Tells of a client that is not served, as of one that finds no place.
    fn warn_of_stranger(&mut self, peer: &Peer) {
        if let Some(suppressed) = self.strangers.allow(self.shared.now) {
            tracing::warn!(by = %peer, suppressed, "a user who is not served has connected");
        }
    }

    /// Closes the connection that has been idle for longest, if that is long enough.
    fn evict(&mut self) -> bool {
        let idle = self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let since = slot.connection.as_ref()?.idle_since()?;
            Some((since, index))
        });
        let Some((since, index)) = idle.min() else {
            return false;
        };
        let long = self.shared.now.saturating_duration_since(since);
        if long < self.shared.options.idle_timeout {
            return false;
        }
        if let Some(connection) = self.slots[index].connection.take() {
            self.close(connection);
        }
        true
    }

    /// Has a connection do something, and does what follows from it.
    fn with(
        &mut self,
        key: u64,
        fired: EventFlags,
        act: impl FnOnce(&mut Connection, &mut Shared) -> Result<(), Gone>,
    ) {
        let Some(index) = self.index(key) else { return };
        let Some(mut connection) = self.slots[index].connection.take() else {
            return;
        };
        // What the connections share is counts and a buffer: closing this one sets its part of them right.
        let done = catch_unwind(AssertUnwindSafe(|| act(&mut connection, &mut self.shared)));
        let done = done.unwrap_or_else(|_| {
            tracing::error!("a request ends in an error of this program: its connection is closed");
            Err(Gone)
        });
        let alive = done.is_ok() && (self.end.is_none() || connection.is_busy());
        if !alive
            || self
                .register(&mut connection, key & !CONSOLE, fired)
                .is_err()
        {
            return self.close(connection);
        }
        if connection.is_stream() && self.subscription.is_none() {
            self.subscribe();
        }
        let deadline = connection.deadline(&self.shared.options);
        self.next = [self.next, deadline].into_iter().flatten().min();
        self.slots[index].connection = Some(connection);
    }

    fn index(&self, key: u64) -> Option<usize> {
        let index = usize::try_from((key & u64::from(u32::MAX)) >> 1).ok()?;
        let slot = self.slots.get(index)?;
        (u64::from(slot.generation) == key >> 32).then_some(index)
    }

    fn ready(&mut self, key: u64, flags: EventFlags) {
        // What is reported of a console is found out by looking.
        let of_client = if key & CONSOLE == 0 {
            flags
        } else {
            EventFlags::empty()
        };
        self.with(key, of_client, |connection, shared| {
            connection.ready(shared, of_client)
        });
    }

    /// Tells epoll what the connection waits for.
    fn register(&self, connection: &mut Connection, key: u64, fired: EventFlags) -> io::Result<()> {
        let change = connection.change_of_interest(fired);
        self.change(connection.stream(), key, change)?;
        if let Some(tunnel) = connection.tunnel() {
            let change = tunnel.change_of_interest();
            self.change(tunnel.console(), key | CONSOLE, change)?;
        }
        Ok(())
    }

    fn change(&self, stream: &UnixStream, key: u64, change: Change) -> io::Result<()> {
        let key = EventData::new_u64(key);
        match change {
            Change::None => (),
            Change::Add(flags) => epoll::add(&self.epoll, stream, key, flags)?,
            Change::Modify(flags) => epoll::modify(&self.epoll, stream, key, flags)?,
            Change::Delete => epoll::delete(&self.epoll, stream)?,
        }
        Ok(())
    }

    fn subscribe(&mut self) {
        let mailbox = Arc::clone(&self.mailbox);
        let alert: Alert = Arc::new(move || mailbox.ring());
        let log = self.shared.dispatcher.control.events();
        self.subscription = Some(log.subscribe(alert));
        // What has happened between its last look at the log and now.
        self.mailbox.ring();
    }

    fn close(&mut self, mut connection: Box<Connection>) {
        connection.discount(&mut self.shared);
        self.open -= 1;
    }

    /// Takes what other threads have left.
    fn hear(&mut self) {
        let (completions, stopped) = self.mailbox.take();
        for completion in completions {
            self.with(completion.key, EventFlags::empty(), |connection, shared| {
                connection.complete(shared, &completion.result)
            });
        }
        let mut streams = false;
        for key in self.keys(Connection::is_stream) {
            streams = true;
            self.with(key, EventFlags::empty(), Connection::advance);
        }
        if !streams {
            self.subscription = None;
        }
        if stopped && self.end.is_none() {
            if let Some(listener) = self.listener.take() {
                // Closing it is not enough where its owner has another descriptor of it:
                // epoll would report what nobody takes.
                let _ = epoll::delete(&self.epoll, &listener);
            }
            self.paused = None;
            let now = self.shared.now;
            let end = now.checked_add(self.shared.options.stop_timeout);
            self.end = Some(end.unwrap_or(now));
            for key in self.keys(|_| true) {
                self.with(key, EventFlags::empty(), Connection::stop);
            }
        }
    }

    fn keys(&self, which: impl Fn(&Connection) -> bool) -> Vec<u64> {
        let keys = self.slots.iter().filter_map(|slot| {
            let connection = slot.connection.as_ref()?;
            which(connection).then(|| connection.key())
        });
        keys.collect()
    }

    /// Looks for what has taken too long.
    fn expire(&mut self) {
        let now = self.shared.now;
        if self.paused.is_some_and(|paused| paused <= now) {
            self.paused = None;
            self.listen(EventFlags::IN);
        }
        if self.next.is_none_or(|next| next > now) {
            return;
        }
        self.next = None;
        let options = self.shared.options.clone();
        let late = |connection: &Connection| {
            connection
                .deadline(&options)
                .is_some_and(|deadline| deadline <= now)
        };
        for key in self.keys(late) {
            self.with(key, EventFlags::empty(), Connection::expire);
        }
        let deadlines = self
            .slots
            .iter()
            .filter_map(|slot| slot.connection.as_ref()?.deadline(&options));
        self.next = deadlines.min();
    }
}

/// Why a client is not served.
fn refusal(peer: &Peer) -> String {
    let who = peer.user().map_or_else(
        || "a user whom the kernel does not name".to_owned(),
        |user| format!("user {user}"),
    );
    format!("{who} may not control this monitor: ask as its own user or root")
}

/// Tells a client why it is not heard.
fn reject(stream: &UnixStream, status: u16, causes: &[&str]) {
    let mut output = Vec::new();
    Answer::error(status, causes).write(&mut output, After::Closed);
    // It fits into a new socket, or the client is gone.
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let _ = send(stream.as_fd(), &output, flags);
}
