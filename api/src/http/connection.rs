//! One connection: from bytes to requests, from answers to bytes.

use std::io::IoSliceMut;
use std::mem::{MaybeUninit, take};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use super::ServerOptions;
use super::answer::{self, After, Answer};
use super::brake::Brake;
use super::dispatch::{self, CONSOLE, Dispatcher, Outcome, Request};
use super::events;
use super::head::{Chunks, Framing, Head, Target, Wishes};
use super::peer::Peer;
use super::tunnel::Tunnel;
use crate::routes::{Method, Route};
use crate::{ControlError, Reply};

/// How many descriptors the kernel lets a message have, and a request may have.
const DESCRIPTORS: usize = 253;
/// How many descriptors all requests that are under way may have.
const ALL_DESCRIPTORS: usize = 2 * DESCRIPTORS;
/// Requests are not carried out, and events not written, while more bytes wait to be sent.
const UNSENT: usize = 64 << 10;
/// How many events are taken from the log at once.
const BATCH: usize = 32;
/// Buffers above this size are given back when they are empty.
const BUFFER: usize = 4 << 10;
/// How much of a refused request is read so that its sender gets to read why, in bytes.
const LINGER: usize = 64 << 20;

/// What all connections share.
pub(super) struct Shared {
    pub dispatcher: Dispatcher,
    pub options: ServerOptions,
    /// Where bytes are received.
    pub scratch: Box<[u8]>,
    /// How many bytes of requests all connections hold.
    pub held: usize,
    /// How many descriptors all connections hold.
    pub held_descriptors: usize,
    /// The time at which the present round of events was taken up.
    pub now: Instant,
    /// How often readers of events are told of that are too slow.
    pub slow: Brake,
}

/// The connection is over.
#[derive(Debug)]
pub(super) struct Gone;

/// What epoll is to be told of a descriptor.
#[derive(Debug)]
pub(super) enum Change {
    None,
    Add(EventFlags),
    Modify(EventFlags),
    Delete,
}

/// Where a connection is.
#[derive(Debug, Default)]
enum Phase {
    /// A head is to come, or part of it has.
    #[default]
    Head,
    /// A body is to come.
    Body(Box<Head>, Chunks),
    /// A command has been submitted; how its client wants to know of errors.
    Submitted(&'static Route, Wishes),
    /// It carries events; this is the last that was written.
    Events(u64),
    /// It is joined to a console.
    Console(Box<Tunnel>),
    /// It is closed as soon as what is written has been sent.
    Closing,
    /// All is sent; what the client still sends is thrown away, at most so many bytes.
    Lingering(usize),
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    /// By this it is known to epoll and to the mailbox.
    key: u64,
    phase: Phase,
    input: Vec<u8>,
    /// Up to here there is no head in `input`.
    scanned: usize,
    /// How many bytes have been received.
    received: u64,
    /// Descriptors, each with how many bytes had been received with it.
    descriptors: Vec<(u64, OwnedFd)>,
    output: Vec<u8>,
    sent: usize,
    /// The client sends no more.
    ended: bool,
    /// Since when it is as it is: a request begun, bytes unsent, or idle.
    since: Instant,
    /// What is counted in [`Shared`].
    counted: (usize, usize),
    /// What it is registered for, once it is.
    registered: Option<EventFlags>,
}

impl Connection {
    pub fn new(stream: UnixStream, key: u64, now: Instant) -> Self {
        Self {
            stream,
            key,
            phase: Phase::Head,
            input: Vec::new(),
            scanned: 0,
            received: 0,
            descriptors: Vec::new(),
            output: Vec::new(),
            sent: 0,
            ended: false,
            since: now,
            counted: (0, 0),
            registered: None,
        }
    }

    pub fn key(&self) -> u64 {
        self.key
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// How long it has waited for a request, if that is all that it does.
    pub fn idle_since(&self) -> Option<Instant> {
        let idle = matches!(self.phase, Phase::Head) && self.input.is_empty() && self.unsent() == 0;
        idle.then_some(self.since)
    }

    /// Whether an answer is still to be given or sent.
    pub fn is_busy(&self) -> bool {
        self.unsent() > 0 || matches!(self.phase, Phase::Submitted(..))
    }

    /// Whether it carries events.
    pub fn is_stream(&self) -> bool {
        matches!(self.phase, Phase::Events(_))
    }

    /// The console, when it has just been joined to one or is.
    pub fn tunnel(&mut self) -> Option<&mut Tunnel> {
        match &mut self.phase {
            Phase::Console(tunnel) => Some(tunnel),
            _ => None,
        }
    }

    /// What epoll has found.
    pub fn ready(&mut self, shared: &mut Shared, flags: EventFlags) -> Result<(), Gone> {
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if let Phase::Console(tunnel) = &mut self.phase
            && hung_up
        {
            while tunnel
                .pump(&self.stream, &mut shared.scratch)
                .is_ok_and(|more| more)
            {}
            return Err(Gone);
        }
        match self.phase {
            Phase::Console(_) => (),
            _ if self.wants_input() && (hung_up || flags.contains(EventFlags::IN)) => {
                self.receive(shared)?;
            }
            // Nobody is there to read the answer.
            _ if hung_up => return Err(Gone),
            _ => (),
        }
        self.advance(shared)
    }

    /// Carries requests out as far as there are any, and sends what there is to be sent.
    pub fn advance(&mut self, shared: &mut Shared) -> Result<(), Gone> {
        loop {
            if let Phase::Console(tunnel) = &mut self.phase {
                let pumped = tunnel.pump(&self.stream, &mut shared.scratch);
                self.count(shared);
                return pumped.map(|_| ()).map_err(|_| Gone);
            }
            while self.unsent() < UNSENT && self.step(shared) {}
            if let Phase::Events(seen) = self.phase {
                self.take_events(shared, seen);
            }
            let full = self.unsent() >= UNSENT;
            let blocked = !self.send(shared)?;
            let more = match self.phase {
                Phase::Head | Phase::Body(..) => full,
                Phase::Events(seen) => seen < shared.dispatcher.control.events().last(),
                Phase::Console(_) => true,
                _ => false,
            };
            if blocked || !more {
                break;
            }
        }
        if self.unsent() == 0 {
            self.finish(shared)?;
        }
        if self.input.is_empty() && self.input.capacity() > BUFFER {
            self.input = Vec::new();
        }
        self.count(shared);
        Ok(())
    }

    /// What there is to do when all is sent.
    fn finish(&mut self, shared: &Shared) -> Result<(), Gone> {
        match self.phase {
            Phase::Closing if self.ended => Err(Gone),
            Phase::Closing => {
                // Closed with bytes unread, the client would find its connection
                // reset before it has read the answer.
                let _ = self.stream.shutdown(Shutdown::Write);
                self.phase = Phase::Lingering(LINGER);
                self.since = shared.now;
                Ok(())
            }
            Phase::Head | Phase::Body(..) | Phase::Lingering(_) if self.ended => Err(Gone),
            _ => Ok(()),
        }
    }

    /// Carries the next step of a request out. Returns whether there was one.
    fn step(&mut self, shared: &mut Shared) -> bool {
        match take(&mut self.phase) {
            Phase::Head => self.step_head(shared),
            Phase::Body(head, chunks) => self.step_body(shared, head, chunks),
            other => {
                self.phase = other;
                false
            }
        }
    }

    fn step_head(&mut self, shared: &mut Shared) -> bool {
        let blank = self
            .input
            .iter()
            .take_while(|byte| b"\r\n".contains(byte))
            .count();
        if blank > 0 {
            self.input.drain(..blank);
            self.scanned = 0;
        }
        let limit = shared.options.head_limit;
        // A head ends with a line; without a new one there is nothing to find.
        if !self.input[self.scanned..].contains(&b'\n') && self.input.len() <= limit {
            self.scanned = self.input.len();
            return false;
        }
        match Head::parse(&self.input, limit, shared.options.body_limit) {
            Ok(None) => {
                self.scanned = self.input.len();
                false
            }
            Ok(Some(head)) => {
                self.input.drain(..head.length);
                self.scanned = 0;
                let whole = match head.framing {
                    Framing::Length(length) => self.input.len() >= length,
                    Framing::Chunked => !self.input.is_empty(),
                };
                if head.expects_continue && !whole {
                    answer::write_continue(&mut self.output);
                }
                self.phase = Phase::Body(Box::new(head), Chunks::default());
                true
            }
            Err(error) => {
                self.refuse(&Answer::bad(&error.to_string()));
                false
            }
        }
    }

    fn step_body(&mut self, shared: &mut Shared, head: Box<Head>, mut chunks: Chunks) -> bool {
        match head.framing {
            Framing::Length(length) if self.input.len() < length => {
                self.phase = Phase::Body(head, chunks);
                false
            }
            Framing::Length(length) => {
                let body: Vec<u8> = self.input.drain(..length).collect();
                self.carry_out(shared, &head, &body);
                true
            }
            Framing::Chunked => match chunks.feed(&self.input, shared.options.body_limit) {
                Ok((used, None)) => {
                    self.input.drain(..used);
                    self.phase = Phase::Body(head, chunks);
                    false
                }
                Ok((used, Some(body))) => {
                    self.input.drain(..used);
                    self.carry_out(shared, &head, &body);
                    true
                }
                Err(error) => {
                    self.refuse(&Answer::bad(&error.to_string()));
                    false
                }
            },
        }
    }

    /// Carries a request out that is all there. What is left in `input` comes after it.
    fn carry_out(&mut self, shared: &mut Shared, head: &Head, body: &[u8]) {
        let end = self.received - self.input.len() as u64;
        let later = self
            .descriptors
            .iter()
            .position(|(at, _)| *at > end)
            .unwrap_or(self.descriptors.len());
        let descriptors = self.descriptors.drain(..later).map(|(_, fd)| fd).collect();
        if let Target::Route(route, _) = &head.target
            && route.method == Method::Put
        {
            tracing::info!(endpoint = route.name, by = %Peer::of(&self.stream), "request");
        }
        self.phase = Phase::Head;
        self.since = shared.now;
        let outcome = shared.dispatcher.dispatch(Request {
            head,
            body,
            descriptors,
            key: self.key,
        });
        match outcome {
            Outcome::Answered(mut answer) => {
                // Whether the client reads a body is not certain, so none is promised either.
                answer.content.take_if(|_| head.head_only);
                let answer = answer.telling(head.wishes);
                answer.write(&mut self.output, After::Kept);
            }
            Outcome::Submitted(route) => {
                self.phase = Phase::Submitted(route, head.wishes);
            }
            Outcome::Events(seen) => {
                answer::write_events(&mut self.output);
                self.input.clear();
                self.phase = Phase::Events(seen);
            }
            Outcome::Console(console) => self.join(console),
        }
    }

    fn join(&mut self, console: UnixStream) {
        answer::write_upgrade(&mut self.output, CONSOLE);
        let unsent = self.output.split_off(self.sent);
        match Tunnel::new(console, take(&mut self.input), unsent) {
            Ok(tunnel) => {
                self.output = Vec::new();
                self.sent = 0;
                self.phase = Phase::Console(Box::new(tunnel));
            }
            Err(error) => {
                tracing::warn!(%error, "a console cannot be attached");
                self.phase = Phase::Closing;
            }
        }
    }

    /// A command has been carried out.
    pub fn complete(
        &mut self,
        shared: &mut Shared,
        result: &Result<Reply, ControlError>,
    ) -> Result<(), Gone> {
        if let Phase::Submitted(route, wishes) = self.phase {
            self.phase = Phase::Head;
            self.since = shared.now;
            let answer = dispatch::completed(route, result, wishes);
            answer.write(&mut self.output, After::Kept);
        }
        self.advance(shared)
    }

    /// Answers a request that cannot be carried out and will not be read to its end.
    fn refuse(&mut self, answer: &Answer) {
        answer.write(&mut self.output, After::Closed);
        self.input = Vec::new();
        self.descriptors.clear();
        self.phase = Phase::Closing;
    }

    /// The server ends: what is under way is finished, anything else is not begun.
    pub fn stop(&mut self, shared: &mut Shared) -> Result<(), Gone> {
        if matches!(self.phase, Phase::Events(_) | Phase::Console(_)) {
            self.advance(shared)?;
        }
        if self.is_busy() { Ok(()) } else { Err(Gone) }
    }

    fn take_events(&mut self, shared: &mut Shared, mut seen: u64) {
        if self.unsent() == 0 {
            self.since = shared.now;
        }
        let log = shared.dispatcher.control.events();
        while self.unsent() < UNSENT {
            let batch = log.after(seen, BATCH);
            let Some(first) = batch.first() else { break };
            // Behind by more than the log keeps. A client that comes back with the
            // number that it has seen learns by the next one what it has missed.
            if first.id > seen + 1 {
                if let Some(suppressed) = shared.slow.allow(shared.now) {
                    tracing::warn!(by = %Peer::of(&self.stream), suppressed, "a reader of events is too slow");
                }
                self.phase = Phase::Closing;
                return;
            }
            if self.unsent() == 0 {
                self.since = shared.now;
            }
            for event in &batch {
                events::write(&mut self.output, event);
                seen = event.id;
            }
        }
        self.phase = Phase::Events(seen);
    }

    /// Until when something must have happened, and [`Self::expire`] is to be called otherwise.
    pub fn deadline(&self, options: &ServerOptions) -> Option<Instant> {
        let time = match self.phase {
            _ if self.unsent() > 0 => options.write_timeout,
            Phase::Head if self.input.is_empty() => return None,
            Phase::Head | Phase::Body(..) | Phase::Lingering(_) => options.request_timeout,
            Phase::Events(_) => options.heartbeat,
            Phase::Submitted(..) | Phase::Console(_) | Phase::Closing => return None,
        };
        self.since.checked_add(time)
    }

    /// The deadline has passed.
    pub fn expire(&mut self, shared: &mut Shared) -> Result<(), Gone> {
        match self.phase {
            _ if self.unsent() > 0 => return Err(Gone),
            Phase::Head | Phase::Body(..) => {
                let seconds = shared.options.request_timeout.as_secs_f32();
                let reason = format!("the request was not all there after {seconds} s");
                self.refuse(&Answer::error(408, &["Bad Request", &reason]));
            }
            Phase::Events(_) => events::write_heartbeat(&mut self.output),
            Phase::Lingering(_) => return Err(Gone),
            Phase::Submitted(..) | Phase::Console(_) | Phase::Closing => (),
        }
        self.since = shared.now;
        self.advance(shared)
    }

    fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    fn wants_input(&self) -> bool {
        if self.ended {
            return false;
        }
        match self.phase {
            Phase::Head | Phase::Body(..) => self.unsent() < UNSENT,
            Phase::Events(_) | Phase::Lingering(_) => true,
            Phase::Submitted(..) | Phase::Console(_) | Phase::Closing => false,
        }
    }

    /// What to change about the registration, which is taken for done. `fired` is what has
    /// been reported: what is wanted no more stays registered until it is, which spares
    /// most changes.
    pub fn change_of_interest(&mut self, fired: EventFlags) -> Change {
        let mut wanted = EventFlags::empty();
        if let Phase::Console(tunnel) = &self.phase {
            wanted = tunnel.wanted_of_client();
        } else {
            wanted.set(EventFlags::IN, self.wants_input());
            wanted.set(EventFlags::OUT, self.unsent() > 0);
        }
        let Some(registered) = self.registered else {
            self.registered = Some(wanted);
            return Change::Add(wanted);
        };
        let unwanted = fired & registered & !wanted;
        if registered.contains(wanted) && unwanted.is_empty() {
            return Change::None;
        }
        self.registered = Some(wanted);
        Change::Modify(wanted)
    }

    fn receive(&mut self, shared: &mut Shared) -> Result<(), Gone> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut vectors = [IoSliceMut::new(&mut shared.scratch)];
        let message = match recvmsg(self.stream.as_fd(), &mut vectors, &mut control, flags) {
            Ok(message) => message,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(_) => return Err(Gone),
        };
        self.received += message.bytes as u64;
        let begun = self.descriptors.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                let at = self.received;
                self.descriptors.extend(descriptors.map(|fd| (at, fd)));
            }
        }
        let bytes = message.bytes.min(shared.scratch.len());
        match &mut self.phase {
            _ if bytes == 0 => self.ended = true,
            Phase::Events(_) => self.descriptors.clear(),
            Phase::Lingering(left) => {
                self.descriptors.clear();
                *left = left.checked_sub(bytes).ok_or(Gone)?;
            }
            _ => {
                if self.input.is_empty() && matches!(self.phase, Phase::Head) {
                    self.since = shared.now;
                }
                self.input.extend_from_slice(&shared.scratch[..bytes]);
                let lost = message.flags.contains(ReturnFlags::CTRUNC);
                self.check_limits(shared, bytes, self.descriptors.len() - begun, lost);
            }
        }
        Ok(())
    }

    fn check_limits(&mut self, shared: &Shared, bytes: usize, descriptors: usize, lost: bool) {
        let options = &shared.options;
        if lost
            || self.descriptors.len() > DESCRIPTORS
            || shared.held_descriptors + descriptors > ALL_DESCRIPTORS
        {
            self.refuse(&Answer::bad("too many descriptors came with the request"));
        } else if shared.held + bytes > options.total_limit {
            let limit = options.total_limit;
            let reason = format!("requests under way have more than {limit} bytes");
            self.refuse(&Answer::error(429, &["Too Many Requests", &reason]));
        }
    }

    /// Sends what there is. Returns whether all of it went.
    fn send(&mut self, shared: &Shared) -> Result<bool, Gone> {
        while self.unsent() > 0 {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(self.stream.as_fd(), &self.output[self.sent..], flags) {
                Ok(length) => {
                    self.sent += length;
                    self.since = shared.now;
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => (),
                Err(_) => return Err(Gone),
            }
        }
        self.sent = 0;
        self.output.clear();
        if self.output.capacity() > BUFFER {
            self.output = Vec::new();
        }
        Ok(true)
    }

    fn count(&mut self, shared: &mut Shared) {
        let body = match &self.phase {
            Phase::Body(_, chunks) => chunks.len(),
            _ => 0,
        };
        let counted = (self.input.len() + body, self.descriptors.len());
        shared.held = shared.held - self.counted.0 + counted.0;
        shared.held_descriptors = shared.held_descriptors - self.counted.1 + counted.1;
        self.counted = counted;
    }

    /// Takes it out of what is counted. To be called before it is dropped.
    pub fn discount(&mut self, shared: &mut Shared) {
        shared.held -= self.counted.0;
        shared.held_descriptors -= self.counted.1;
        self.counted = (0, 0);
    }
}
