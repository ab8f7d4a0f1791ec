//! A client that has not opened a stream: requests and answers, one after the other.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{Shutdown, shutdown};

use super::answer::Answer;
use super::request::{self, HEAD, Request, RequestError};
use super::stream::{Stream, is_for_later};

/// How long a head may take to come.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// How long a client may read nothing of its answer.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// How long it is waited for the end of what a client sends that has been refused.
const REST_TIME: Duration = Duration::from_secs(2);

/// What a client wants to be done.
pub(super) enum Asked {
    /// Nothing yet.
    Nothing,
    /// This.
    Request(Request),
}

/// A client's end.
#[derive(Debug)]
pub(super) struct Client {
    stream: Stream,
    pub peer: String,
    input: Vec<u8>,
    answer: Option<Answer>,
    sent: usize,
    /// The last answer has been sent, and what still comes is passed over: a close would have it lost.
    leaving: bool,
    /// Since when it is waited for what the state needs.
    since: Instant,
}

/// The client has gone.
#[derive(Debug)]
pub(super) struct Gone;

impl From<io::Error> for Gone {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl Client {
    pub fn new(stream: Stream, peer: String, now: Instant) -> Self {
        Self {
            stream,
            peer,
            input: Vec::new(),
            answer: None,
            sent: 0,
            leaving: false,
            since: now,
        }
    }

    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        let flags = match self.answer {
            Some(_) => PollFlags::OUT,
            None => PollFlags::IN,
        };
        (self.stream.as_fd(), flags)
    }

    /// Whether it is being answered.
    pub fn is_answered(&self) -> bool {
        self.answer.is_some()
    }

    /// Since when nothing has come of it.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When it has had enough time.
    pub fn deadline(&self) -> Instant {
        self.since
            + match (&self.answer, self.leaving) {
                (Some(_), _) => ANSWER_TIME,
                (None, false) => HEAD_TIME,
                (None, true) => REST_TIME,
            }
    }

    /// Reads what there is, and what it asks for with the cookies named `cookie`.
    pub fn read(&mut self, cookie: &str) -> Result<Asked, Gone> {
        if self.answer.is_some() {
            return Ok(Asked::Nothing);
        }
        let mut bytes = [0; HEAD];
        let room = HEAD - self.input.len().min(HEAD);
        let room = bytes.get_mut(..room).unwrap_or_default();
        match self.stream.read(room) {
            Ok(0) if !room.is_empty() => return Err(Gone),
            Ok(count) => self.input.extend(bytes.iter().take(count)),
            Err(error) if is_for_later(&error) => (),
            Err(error) => return Err(error.into()),
        }
        if self.leaving {
            self.input.clear();
            return Ok(Asked::Nothing);
        }
        Ok(self.next(cookie))
    }

    /// What it asks for next, of what has been read.
    pub fn next(&mut self, cookie: &str) -> Asked {
        match request::parse(&self.input, cookie) {
            Ok(None) => Asked::Nothing,
            Ok(Some((length, request))) => {
                self.input.drain(..length);
                Asked::Request(request)
            }
            Err(error) => {
                self.refuse(error);
                Asked::Nothing
            }
        }
    }

    pub fn refuse(&mut self, error: RequestError) {
        self.answer(error.into(), Instant::now());
    }

    /// Is answered.
    pub fn answer(&mut self, answer: Answer, now: Instant) {
        self.answer = Some(answer);
        self.sent = 0;
        self.since = now;
    }

    /// Sends what the stream takes. Whether the answer has been sent, and another request may be there.
    pub fn write(&mut self, now: Instant) -> Result<bool, Gone> {
        let Some(answer) = &self.answer else {
            return Ok(false);
        };
        loop {
            let rest = match answer.head.get(self.sent..) {
                Some(rest @ [_, ..]) => rest,
                _ => {
                    let at = self.sent.saturating_sub(answer.head.len());
                    answer.body.get(at..).unwrap_or_default()
                }
            };
            if rest.is_empty() {
                break;
            }
            match self.stream.write(rest) {
                Ok(0) => return Err(Gone),
                Ok(count) => {
                    self.sent = self.sent.saturating_add(count);
                    self.since = now;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) if is_for_later(&error) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        self.leaving = answer.last;
        self.answer = None;
        if self.leaving {
            shutdown(&self.stream, Shutdown::Write).map_err(io::Error::from)?;
            self.input.clear();
            return Ok(false);
        }
        Ok(true)
    }

    /// Its stream, and what has come behind its last request.
    pub fn into_parts(self) -> (Stream, Vec<u8>, String) {
        (self.stream, self.input, self.peer)
    }
}
