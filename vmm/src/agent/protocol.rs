//! The language of QEMU's guest agent: a JSON object on a line each way (QEMU's
//! `docs/interop/qemu-ga.rst`).
//!
//! Each exchange begins by agreeing on where the conversation is: the byte 0xFF, which is
//! in no JSON text, and a number that the agent repeats behind such a byte. So the late answer to
//! a question that was given up is no answer to the next one.
//!
//! The agent is part of the guest, and so is whatever answers in its place: what
//! it sends has bounds in time, in length and in depth.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The most that is read for one exchange, in bytes.
const MOST: usize = 1 << 20;

/// How long it takes at most to notice that the guest has closed the port.
const LOOK: Duration = Duration::from_millis(100);

/// In no JSON text.
const SENTINEL: u8 = 0xff;

/// The longest text of the agent's that is passed on, in characters.
const LONGEST: usize = 256;

/// Why the agent was not asked, or has not answered.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The machine has no port for it.
    #[error(
        "--agent: the machine has no port for a guest agent: it is one called org.qemu.guest_agent.0 that leads nowhere else"
    )]
    NoPort,
    /// Nothing in the guest has the port open.
    #[error(
        "no agent: nothing in the guest has the agent's port open: start qemu-guest-agent there"
    )]
    Absent,
    /// The port is open, and nothing comes.
    #[error("no answer: the agent's port is open, but nothing was answered within {} s", patience.as_secs())]
    Silent {
        /// How long was waited.
        patience: Duration,
    },
    /// Too many questions at once.
    #[error("{waiting} questions to the agent are waiting: ask again later")]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// It goes on and on.
    #[error("the agent has sent {MOST} bytes without an answer")]
    Endless,
    /// It has said what is no answer.
    #[error("the agent has sent what is no answer")]
    Senseless(#[source] serde_json::Error),
    /// It has answered something else than was asked.
    #[error("the agent has not answered what was asked: {what} is missing")]
    Unexpected {
        /// What is not in the answer.
        what: &'static str,
    },
    /// It will not, or cannot.
    #[error("the agent refuses: {reason}")]
    Refused {
        /// What it says.
        reason: String,
    },
    /// The host refuses.
    #[error("the agent cannot be reached")]
    Host(#[from] io::Error),
}

/// A conversation of a question and an answer.
pub struct Exchange<'a> {
    stream: &'a UnixStream,
    is_open: &'a dyn Fn() -> bool,
    patience: Duration,
    deadline: Instant,
    buffer: Vec<u8>,
    /// How much may still be read.
    left: usize,
}

impl<'a> Exchange<'a> {
    /// With whoever is behind `stream`, for at most `patience`; `is_open` tells whether anybody is.
    #[must_use]
    pub fn new(stream: &'a UnixStream, is_open: &'a dyn Fn() -> bool, patience: Duration) -> Self {
        Self {
            stream,
            is_open,
            patience,
            deadline: Instant::now() + patience,
            buffer: Vec::new(),
            left: MOST,
        }
    }

    /// Agrees with the agent on where the conversation is, by a number that was used for nothing else.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub fn agree(&mut self, number: u64) -> Result<(), AgentError> {
        let question = json!({"execute": "guest-sync-delimited", "arguments": {"id": number}});
        self.say(&[SENTINEL])?;
        self.say_line(&question)?;
        loop {
            self.skip_to_sentinel()?;
            let line = self.line()?;
            let answer = serde_json::from_slice::<Value>(&line).unwrap_or_default();
            if answer.get("return").and_then(Value::as_u64) == Some(number) {
                return Ok(());
            }
        }
    }

    /// Asks, and gives what is returned.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub fn ask(&mut self, question: &Value) -> Result<Value, AgentError> {
        self.say_line(question)?;
        let line = self.line()?;
        let mut answer: Value = serde_json::from_slice(&line).map_err(AgentError::Senseless)?;
        if let Some(error) = answer.get("error") {
            let told = error.get("desc").or_else(|| error.get("class"));
            let told = told
                .and_then(Value::as_str)
                .unwrap_or("it does not say why");
            let reason = plain(told);
            return Err(AgentError::Refused { reason });
        }
        let returned = answer.get_mut("return").map(Value::take);
        returned.ok_or(AgentError::Unexpected { what: "'return'" })
    }

    fn say_line(&mut self, question: &Value) -> Result<(), AgentError> {
        self.say(format!("{question}\n").as_bytes())
    }

    fn say(&mut self, mut bytes: &[u8]) -> Result<(), AgentError> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(Some(self.slice()?))?;
            match (&*self.stream).write(bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) => waiting(error)?,
            }
        }
        Ok(())
    }

    /// How long to wait now. There is no use in waiting for a port that is closed.
    fn slice(&self) -> Result<Duration, AgentError> {
        if !(self.is_open)() {
            return Err(AgentError::Absent);
        }
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let patience = self.patience;
            return Err(AgentError::Silent { patience });
        }
        Ok(left.min(LOOK))
    }

    /// Reads more.
    fn more(&mut self) -> Result<(), AgentError> {
        let mut piece = [0; 4096];
        loop {
            self.stream.set_read_timeout(Some(self.slice()?))?;
            match (&*self.stream).read(&mut piece) {
                Ok(0) => return Err(AgentError::Absent),
                Ok(count) => {
                    self.left = self.left.checked_sub(count).ok_or(AgentError::Endless)?;
                    self.buffer
                        .extend_from_slice(piece.get(..count).unwrap_or_default());
                    return Ok(());
                }
                Err(error) => waiting(error)?,
            }
        }
    }

    /// Drops all that was sent up to the sentinel.
    fn skip_to_sentinel(&mut self) -> Result<(), AgentError> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == SENTINEL) {
                self.buffer.drain(..=at);
                return Ok(());
            }
            self.buffer.clear();
            self.more()?;
        }
    }

    /// The next line, without its end.
    fn line(&mut self) -> Result<Vec<u8>, AgentError> {
        let mut looked = 0;
        loop {
            let new = self.buffer.get(looked..).unwrap_or_default();
            if let Some(at) = new.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(looked + at + 1);
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            looked = self.buffer.len();
            self.more()?;
        }
    }
}

/// That nothing could be done yet is no failure.
fn waiting(error: io::Error) -> Result<(), io::Error> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// A text of the guest's as it can be shown: no control characters, and not too long.
#[must_use]
pub fn plain(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(LONGEST)
        .collect()
}
