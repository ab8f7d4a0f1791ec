//! The server's thread.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::answer::{self, Answer};
use super::client::{Asked, Client, Gone};
use super::door::Refusal;
use super::request::{Request, RequestError, Verb};
use super::serial::Serial;
use super::socket::WebSocket;
use super::stream::Listener;
use super::{Desk, End, SerialLine, Tokens, assets};
use crate::http::brake::Brake;

/// Clients that have not opened a stream.
pub const MAX_CLIENTS: usize = 64;
/// Terminals at the serial console.
pub const MAX_SERIALS: usize = 16;
/// Clients that are let in before others have their turn.
const ACCEPTS: usize = 16;
/// How long nobody is let in after that has failed: the host is out of descriptors.
const REST: Duration = Duration::from_millis(100);

/// The streams' paths.
const SCREEN: &str = "/screen";
const SERIAL: &str = "/serial";

/// The server, before and in its thread.
pub(super) struct Server {
    listener: Listener,
    desk: Arc<dyn Desk>,
    cookie: String,
    tokens: Tokens,
    end: Arc<End>,
    clients: Vec<Client>,
    serials: Vec<Serial>,
    /// When clients are let in again.
    rests: Option<Instant>,
    started: Instant,
    /// How often it is told that a token is wrong.
    wrong: Brake,
}

/// What a request leads to.
enum Reply {
    Answer(Answer),
    /// A stream, for whom this is the server's half of the handshake.
    Screen(Vec<u8>),
    Serial(Vec<u8>, SerialLine),
}

impl Server {
    pub fn new(
        listener: Listener,
        desk: Arc<dyn Desk>,
        cookie: String,
        tokens: Tokens,
        end: Arc<End>,
    ) -> Self {
        Self {
            listener,
            desk,
            cookie,
            tokens,
            end,
            clients: Vec::new(),
            serials: Vec::new(),
            rests: None,
            started: Instant::now(),
            wrong: Brake::default(),
        }
    }

    /// Serves until it is told to end.
    pub fn run(mut self) {
        let mut more = false;
        while !self.end.asked.load(Ordering::Acquire) {
            let Some((door, ready)) = self.wait(more) else {
                return;
            };
            let now = Instant::now();
            if self.rests.is_some_and(|until| until <= now) {
                self.rests = None;
            }
            let mut ready = ready.into_iter();
            for client in std::mem::take(&mut self.clients) {
                let is_ready = ready.next().unwrap_or(false);
                self.serve(client, is_ready, now);
            }
            if door {
                self.accept(now);
            }
            more = false;
            self.serials.retain_mut(|serial| {
                let late = serial.deadline().is_some_and(|end| end <= now);
                let pumped = serial.pump(now);
                more |= matches!(pumped, Ok(true));
                pumped.is_ok() && !late
            });
        }
    }

    /// Waits for something to do. Whether somebody is at the door, and which clients are ready.
    fn wait(&self, more: bool) -> Option<(bool, Vec<bool>)> {
        let mut fds = vec![PollFd::new(&self.end.wake, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| {
            let (fd, flags) = client.interest();
            PollFd::from_borrowed_fd(fd, flags)
        }));
        let serials = self.serials.iter().flat_map(Serial::interests);
        fds.extend(serials.map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        if self.rests.is_none() {
            fds.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        let times = self.clients.iter().map(Client::deadline);
        let times = times.chain(self.serials.iter().filter_map(Serial::deadline));
        let until = times.chain(self.rests).min();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // Rounded up, so that it has passed when it wakes.
        let left = left.map(|left| left + Duration::from_millis(1));
        let left = if more { Some(Duration::ZERO) } else { left };
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR | Errno::NOMEM) => (),
            Err(error) => {
                tracing::error!(%error, "the web console cannot wait");
                return None;
            }
        }
        let told = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let door = self.rests.is_none() && fds.last().is_some_and(told);
        let clients = fds.iter().skip(1).take(self.clients.len());
        Some((door, clients.map(told).collect()))
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPTS {
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    if self.clients.len() >= MAX_CLIENTS {
                        let oldest = self.clients.iter().enumerate();
                        let oldest = oldest.min_by_key(|(_, client)| client.since());
                        if let Some((oldest, _)) = oldest {
                            self.clients.swap_remove(oldest);
                        }
                    }
                    // What it asks for may be there already.
                    self.serve(Client::new(stream, peer, now), true, now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => (),
                Err(error) => {
                    tracing::warn!(%error, "no browsers are let in for a moment");
                    self.rests = Some(now + REST);
                    return;
                }
            }
        }
    }

    /// Gives a client its turn, and its place again unless it has gone or become a stream.
    fn serve(&mut self, mut client: Client, ready: bool, now: Instant) {
        // One that sends and does not come to an end has no more time than one that is silent.
        if now >= client.deadline() && !(ready && client.is_answered()) {
            return;
        }
        if !ready {
            return self.clients.push(client);
        }
        let Ok(mut asked) = client.read(&self.cookie) else {
            return;
        };
        loop {
            if let Asked::Request(request) = asked {
                match self.reply(&request, &client.peer, now) {
                    Reply::Answer(mut answer) => {
                        answer.last |= request.last;
                        client.answer(answer, now);
                    }
                    reply => return self.open(reply, client, now),
                }
            }
            match client.write(now) {
                Err(Gone) => return,
                Ok(false) => break,
                Ok(true) => asked = client.next(&self.cookie),
            }
        }
        self.clients.push(client);
    }

    fn reply(&mut self, request: &Request, peer: &str, now: Instant) -> Reply {
        let path = request.path.as_str();
        if let SCREEN | SERIAL = path {
            return self.stream(request);
        }
        Reply::Answer(match (request.verb, path) {
            (Verb::Post, "/session") => self.exchange(request, peer, now),
            (Verb::Get, "/session") if self.is_known(request) => Answer::empty(),
            (Verb::Get, "/session") => Answer::refusal(401, "there is no such session", &[]),
            (Verb::Get, path) => Self::file(path, request),
            (Verb::Head, path) => Self::file(path, request).without_body(),
            _ => Answer::refusal(405, "nothing is done so here", &[("Allow", "GET, HEAD")]),
        })
    }

    fn file(path: &str, request: &Request) -> Answer {
        if let "/" | "/index.html" = path {
            let page = Answer::page(assets::PAGE);
            return page.unwrap_or_else(|error| Answer::refusal(503, &error.to_string(), &[]));
        }
        match assets::find(path) {
            Some(_) if !request.accepts_gzip => {
                Answer::refusal(406, "this is kept compressed: accept gzip", &[])
            }
            Some(asset) => Answer::file(asset.kind, asset.gzip),
            None => Answer::refusal(404, "there is nothing here", &[]),
        }
    }

    fn is_known(&self, request: &Request) -> bool {
        let key = request.key.as_deref().unwrap_or_default();
        let door = self.tokens.door();
        let cookies = request.cookies.iter();
        cookies.fold(false, |any, cookie| any | door.knows(cookie, key))
    }

    /// The token for a session.
    fn exchange(&mut self, request: &Request, peer: &str, now: Instant) -> Answer {
        if !request.same_origin {
            return RequestError::Origin.into();
        }
        let token = request.token.as_deref().unwrap_or_default();
        let at = now.saturating_duration_since(self.started);
        let exchanged = self.tokens.door().exchange(token, at);
        match exchanged {
            Ok(session) => {
                tracing::info!(%peer, "a session of the web console begins");
                let (name, value) = (&self.cookie, session.cookie.as_str());
                let cookie = format!("{name}={value}; Path=/; HttpOnly; SameSite=Strict");
                let body = serde_json::json!({ "key": session.key.as_str() }).to_string();
                Answer::text(200, "application/json", &body, &[("Set-Cookie", &cookie)])
            }
            Err(Refusal::Wrong) => {
                if let Some(suppressed) = self.wrong.allow(now) {
                    tracing::warn!(%peer, suppressed, "a wrong token for the web console");
                }
                Answer::refusal(401, "the token is wrong, or has been used", &[])
            }
            Err(Refusal::Blocked(left)) => {
                let seconds = left.as_secs().saturating_add(1).to_string();
                let headers = [("Retry-After", seconds.as_str())];
                Answer::refusal(429, "too many wrong tokens: try again later", &headers)
            }
            Err(Refusal::Host(error)) => Answer::refusal(503, &error.to_string(), &[]),
        }
    }

    fn stream(&self, request: &Request) -> Reply {
        let refused = |error: RequestError| Reply::Answer(error.into());
        let Some(nonce) = &request.upgrade else {
            return refused(RequestError::Upgrade);
        };
        if !request.same_origin {
            return refused(RequestError::Origin);
        }
        if !self.is_known(request) {
            return Reply::Answer(Answer::refusal(401, "there is no such session", &[]));
        }
        let switch = answer::switch(nonce);
        if request.path == SCREEN {
            return Reply::Screen(switch);
        }
        if self.serials.len() >= MAX_SERIALS {
            let why = "there are as many terminals as can be: close another first";
            return Reply::Answer(Answer::refusal(503, why, &[]));
        }
        match self.desk.serial() {
            Ok(console) => Reply::Serial(switch, console),
            Err(error) => Reply::Answer(Answer::refusal(503, &error.to_string(), &[])),
        }
    }

    /// The client goes on as a stream.
    fn open(&mut self, reply: Reply, client: Client, now: Instant) {
        let (stream, input, peer) = client.into_parts();
        let opened = match reply {
            Reply::Answer(_) => Ok(()),
            Reply::Screen(switch) => {
                let socket = WebSocket::new(stream, input, switch);
                self.desk.screen(socket, peer)
            }
            Reply::Serial(switch, console) => {
                let socket = WebSocket::new(stream, input, switch);
                Serial::new(socket, console, now).map(|serial| self.serials.push(serial))
            }
        };
        if let Err(error) = opened {
            tracing::warn!(%error, "a stream of the web console could not be opened");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;

    use rustix::event::{EventfdFlags, eventfd};

    use super::super::door::Door;
    use super::super::stream::Stream;
    use super::*;
    use crate::{ControlError, ErrorKind};

    struct Nothing;

    impl Desk for Nothing {
        fn screen(&self, _socket: WebSocket, _peer: String) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn serial(&self) -> Result<SerialLine, ControlError> {
            Err(ControlError::new(ErrorKind::Busy, "no console"))
        }
    }

    fn server() -> Server {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("web")).unwrap();
        let end = End {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            asked: AtomicBool::new(false),
        };
        Server::new(
            Listener::Unix(listener),
            Arc::new(Nothing),
            "vireo-1".to_owned(),
            Tokens(Arc::new(Mutex::new(Door::new().unwrap()))),
            Arc::new(end),
        )
    }

    /// A client that sends a part of something at each of so many seconds, and whether it was still there afterwards.
    fn sends_on(said: &[u8], seconds: u64) -> bool {
        let mut server = server();
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let begin = Instant::now();
        let client = Client::new(Stream::Unix(near), "a test".to_owned(), begin);
        far.write_all(said).unwrap();
        server.serve(client, true, begin);
        for second in 1..=seconds {
            if let Some(client) = server.clients.pop() {
                far.write_all(b"x").unwrap();
                server.serve(client, true, begin + Duration::from_secs(second));
            }
        }
        !server.clients.is_empty()
    }

    #[test]
    fn who_goes_on_sending_has_no_more_time_than_who_is_silent() {
        // It has been refused.
        let refused = b"RFB 003.008\n\x01\x02";
        assert!(sends_on(refused, 1));
        assert!(!sends_on(refused, 3));
        // Its head does not come to an end.
        let begun = b"GET / HTTP/1.1\r\nHost: ";
        assert!(sends_on(begun, 9));
        assert!(!sends_on(begun, 10));
    }

    #[test]
    fn who_reads_its_answer_slowly_is_not_late() {
        let mut server = server();
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let begin = Instant::now();
        let mut client = Client::new(Stream::Unix(near), "a test".to_owned(), begin);
        client.answer(Answer::refusal(400, "no", &[]), begin);
        // It can be written to just when its time is over.
        server.serve(client, true, begin + Duration::from_secs(30));
        assert_eq!(server.clients.len(), 1);
        let mut head = [0; 12];
        far.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"HTTP/1.1 400");
    }
}
