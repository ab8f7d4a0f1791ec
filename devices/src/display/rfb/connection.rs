//! One stream: its bytes both ways, from the first word to the last.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::super::canvas::Canvas;
use super::super::input::InputSink;
use super::auth::{CHALLENGE, Security};
use super::encode::EncodeError;
use super::handshake::{Gate, Handshake, HandshakeError, Progress};
use super::message::MessageError;
use super::service::Options;
use super::stream::{Stream, TlsAcceptor};
use super::viewer::{Sending, Viewer};

/// How long a client may take until it is in.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a client that is sent away may take to read why.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long a client may read nothing of what it is sent.
pub const STALLED: Duration = Duration::from_secs(120);
/// Bytes read at a time.
const READ: usize = 16 << 10;
/// Reads of a client in a row before others have their turn.
const READS: usize = 4;

/// Why a connection ends.
#[derive(Debug, Error)]
pub enum Ended {
    /// The client closed it.
    #[error("it was closed")]
    Closed,
    /// Reading or writing failed.
    #[error("it broke")]
    Stream(#[from] io::Error),
    /// The client was not let in.
    #[error("not let in")]
    Handshake(#[from] HandshakeError),
    /// The client sent what has no meaning.
    #[error("not understood")]
    Message(#[from] MessageError),
    /// Its picture could not be made.
    #[error("its picture could not be made")]
    Encode(#[from] EncodeError),
    /// It said more before TLS than was to be said.
    #[error("words before TLS that are not of the handshake")]
    BeforeTls,
    /// It did not finish the handshake in time.
    #[error("the handshake took too long")]
    Slow,
    /// It read nothing for long.
    #[error("it read nothing for {} seconds", STALLED.as_secs())]
    Stalled,
    /// Others came before it was let in.
    #[error("too many that are not let in yet")]
    Crowded,
    /// Enough viewers are there.
    #[error("too many viewers")]
    Full,
    /// Another viewer wants the screen for itself.
    #[error("a viewer has the screen for itself")]
    Exclusive,
}

/// How far a client has come.
enum State {
    Greeting(Handshake),
    /// TLS begins when all has been sent.
    Upgrading(Handshake),
    Viewing(Box<Viewer>),
    /// It is sent the rest, and then away.
    Leaving,
    Gone,
}

/// One client's end.
pub struct Connection {
    /// Gone for as long as it is being put inside TLS.
    stream: Option<Box<dyn Stream>>,
    tls: Option<Arc<dyn TlsAcceptor>>,
    /// Who it is, for the log.
    pub peer: String,
    state: State,
    input: Vec<u8>,
    out: Vec<u8>,
    sent: usize,
    /// When the state began, or something was last sent.
    since: Duration,
    /// Whether it wants the screen for itself.
    pub exclusive: bool,
    /// Whether there may be more to read without the descriptor telling.
    pub unread: bool,
    /// Whether it has said more than it has been answered.
    ahead: bool,
}

impl Connection {
    /// A client that has just connected.
    pub fn new(
        stream: Box<dyn Stream>,
        security: Security,
        challenge: [u8; CHALLENGE],
        peer: String,
        now: Duration,
    ) -> Self {
        let mut out = Vec::new();
        let tls = security.tls.clone();
        let state = State::Greeting(Handshake::new(security, challenge, &mut out));
        Self {
            stream: Some(stream),
            tls,
            peer,
            state,
            input: Vec::new(),
            out,
            sent: 0,
            since: now,
            exclusive: false,
            unread: false,
            ahead: false,
        }
    }

    /// The descriptor to poll, and whether for reading and for writing.
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, bool, bool)> {
        let stream = self.stream.as_ref()?;
        let reads = match &self.state {
            State::Greeting(_) => true,
            State::Upgrading(_) | State::Leaving | State::Gone => false,
            State::Viewing(viewer) => viewer.listens(),
        };
        let amid = self.viewer().is_some_and(Viewer::is_amid);
        Some((stream.as_fd(), reads, amid || !self.is_sent()))
    }

    /// The client, once it is in.
    pub fn viewer(&self) -> Option<&Viewer> {
        match &self.state {
            State::Viewing(viewer) => Some(viewer),
            _ => None,
        }
    }

    /// Whether it is still to be let in.
    pub fn is_greeting(&self) -> bool {
        matches!(self.state, State::Greeting(_) | State::Upgrading(_))
    }

    fn is_sent(&self) -> bool {
        let holds_back = self.stream.as_ref().is_some_and(|s| s.holds_back());
        self.sent == self.out.len() && !holds_back
    }

    /// Reads what there is. `Some` once the client is in; then [`Connection::admit`] is to be called.
    pub fn read(&mut self, gate: &mut Gate<'_>) -> Result<Option<bool>, Ended> {
        self.unread = false;
        for _ in 0..READS {
            let listens = self.interest().is_some_and(|(_, reads, _)| reads);
            let Some(stream) = self.stream.as_mut().filter(|_| listens) else {
                return Ok(None);
            };
            let mut bytes = [0; READ];
            let result = stream.read(&mut bytes);
            match result {
                Ok(0) => return Err(Ended::Closed),
                Ok(len) => self.input.extend(bytes.iter().take(len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            if let Some(shared) = self.greet(gate)? {
                return Ok(Some(shared));
            }
            // What a viewer says is heard by the server before more is read.
            if self.viewer().is_some() {
                break;
            }
        }
        self.unread = true;
        Ok(None)
    }

    fn greet(&mut self, gate: &mut Gate<'_>) -> Result<Option<bool>, Ended> {
        let State::Greeting(handshake) = &mut self.state else {
            return Ok(None);
        };
        match handshake.advance(&mut self.input, &mut self.out, gate)? {
            Progress::More => Ok(None),
            Progress::Done { shared } => Ok(Some(shared)),
            Progress::Tls => {
                if let State::Greeting(handshake) = std::mem::replace(&mut self.state, State::Gone)
                {
                    self.state = State::Upgrading(handshake);
                }
                Ok(None)
            }
        }
    }

    /// The client is in and sees `canvas`.
    pub fn admit(&mut self, options: &Options, canvas: &Canvas, now: Duration) {
        let viewer = Viewer::new(options, canvas, &mut self.out);
        self.state = State::Viewing(Box::new(viewer));
        self.since = now;
        self.unread = true;
    }

    /// Obeys what the client has said. Whether its user did something.
    pub fn hear(&mut self, sink: &dyn InputSink) -> Result<bool, Ended> {
        match &mut self.state {
            State::Viewing(viewer) => {
                let active = viewer.hear(&mut self.input, sink)?;
                self.ahead = !viewer.listens();
                Ok(active)
            }
            _ => Ok(false),
        }
    }

    /// Types the letter that is due of a text that the client has cut. Whether there was one.
    pub fn type_on(&mut self, now: Duration, sink: &dyn InputSink) -> bool {
        match &mut self.state {
            State::Viewing(viewer) => viewer.type_on(now, sink),
            _ => false,
        }
    }

    /// Whether the client waits for a picture, and if so whether for any.
    pub fn waits(&mut self) -> Option<bool> {
        let State::Viewing(viewer) = &self.state else {
            return None;
        };
        let sending = Sending {
            out: &mut self.out,
            sent: self.sent,
        };
        viewer.waits(&sending).then(|| viewer.is_urgent())
    }

    /// Begins an update, where the client waits for one.
    pub fn begin(&mut self, canvas: &Canvas, sink: &dyn InputSink) {
        if self.waits().is_none() {
            return;
        }
        if let State::Viewing(viewer) = &mut self.state {
            let mut sending = Sending {
                out: &mut self.out,
                sent: self.sent,
            };
            viewer.begin(canvas, sink, &mut sending);
        }
    }

    /// Encodes more of an update and sends what the stream takes.
    pub fn send(&mut self, canvas: &Canvas, now: Duration) -> Result<(), Ended> {
        if matches!(self.state, State::Gone) {
            return Ok(());
        }
        if let State::Viewing(viewer) = &mut self.state {
            let mut sending = Sending {
                out: &mut self.out,
                sent: self.sent,
            };
            viewer.go_on(canvas, &mut sending)?;
            if self.ahead && viewer.listens() {
                (self.ahead, self.unread) = (false, true);
            }
        }
        if self.is_sent() {
            // A client that owes nothing is not late.
            if self.viewer().is_some() {
                self.since = now;
            }
        } else {
            self.flush(now)?;
        }
        if matches!(self.state, State::Upgrading(_)) && self.is_sent() {
            self.upgrade()?;
        }
        Ok(())
    }

    fn flush(&mut self, now: Duration) -> Result<(), Ended> {
        let Some(stream) = &mut self.stream else {
            return Err(Ended::Closed);
        };
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match stream.write(rest) {
                Ok(0) => return Err(Ended::Closed),
                Ok(len) => {
                    self.sent = self.sent.saturating_add(len).min(self.out.len());
                    if matches!(self.state, State::Viewing(_)) {
                        self.since = now;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        match stream.flush() {
            Err(error) if !is_for_later(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn upgrade(&mut self) -> Result<(), Ended> {
        if !self.input.is_empty() {
            return Err(Ended::BeforeTls);
        }
        let (Some(stream), Some(tls)) = (self.stream.take(), &self.tls) else {
            return Err(Ended::Closed);
        };
        self.stream = Some(tls.accept(stream)?);
        if let State::Upgrading(mut handshake) = std::mem::replace(&mut self.state, State::Gone) {
            handshake.inside_tls(&mut self.out);
            self.state = State::Greeting(handshake);
        }
        self.unread = true;
        Ok(())
    }

    /// By when something must have happened, and what it means if not.
    pub fn deadline(&self) -> Option<(Duration, Ended)> {
        let (within, ended) = match self.state {
            State::Greeting(_) | State::Upgrading(_) => (HANDSHAKE, Ended::Slow),
            State::Leaving => (FAREWELL, Ended::Closed),
            State::Gone => return None,
            State::Viewing(_) if self.is_sent() => return None,
            State::Viewing(_) => (STALLED, Ended::Stalled),
        };
        Some((self.since.saturating_add(within), ended))
    }

    /// Lets its keys go, and sends it away once it has been sent why.
    pub fn leave(&mut self, why: &Ended, sink: &dyn InputSink, now: Duration) {
        let reads_why = matches!(why, Ended::Handshake(_)) && self.is_greeting();
        if let State::Viewing(viewer) = &mut self.state {
            viewer.leave(sink);
        }
        self.state = State::Leaving;
        self.since = now;
        self.unread = false;
        if !reads_why || self.flush(now).is_err() || self.is_sent() {
            self.state = State::Gone;
        }
    }

    /// Whether it has been sent away and has been sent why.
    pub fn is_gone(&self) -> bool {
        match self.state {
            State::Leaving => self.is_sent(),
            _ => matches!(self.state, State::Gone),
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
