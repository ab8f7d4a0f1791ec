//! The guest agent: asks QEMU's agent in the guest over its port.
//!
//! # Contract
//!
//! * One question at a time, in the order in which they were asked; a bounded number
//!   waits. They are asked on a thread of their own, which is there only while there are some.
//! * Every question has an end: an answer, or why there is none. That nothing in the guest has the
//!   port open is known at once; that nobody answers, after [`PATIENCE`].
//! * What the agent says is the guest's: it is read with bounds ([`protocol`]) and
//!   passed on as plain text and checked addresses.

mod answers;
mod protocol;

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::wire::AgentShutdownMode;
use api::{AgentCommand, AgentReply, Answer, ControlError, ErrorKind, Reply};
use serde_json::{Value, json};

pub use protocol::AgentError;
use protocol::Exchange;

use crate::console::port::GuestSide;
use crate::random::random;
use crate::sandbox::{Builder, Kind};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// How long it may take to freeze or thaw: all that is unwritten is written first.
const PATIENCE_FREEZE: Duration = Duration::from_secs(60);

/// How long an agent that ends its guest may take to say that it will not.
const PATIENCE_END: Duration = Duration::from_secs(1);

/// How many questions wait at most.
const MOST_WAITING: usize = 16;

/// Where they may begin: agents read what is up to 2^53 exactly, and there is room for all that can be asked.
const NUMBERS: u64 = (1 << 48) - 1;

/// The stack of the thread, in bytes: reading JSON nests, up to a limit.
const STACK: usize = 512 << 10;

/// The monitor's end of the agent's port.
#[derive(Clone)]
struct Line {
    stream: Arc<UnixStream>,
    guest: Arc<GuestSide>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(AgentCommand, Answer)>,
    /// There is a thread.
    served: bool,
}

#[derive(Default)]
struct Desk {
    line: Mutex<Option<Line>>,
    queue: Mutex<Queue>,
    /// What the agent is agreed with on next.
    numbers: Numbers,
    /// Instead of [`PATIENCE`].
    patience: Option<Duration>,
}

/// Numbers each unlike those before. They begin anywhere: an agent may still say what it was to say to another process, from which
/// the machine was restored.
struct Numbers(AtomicU64);

impl Default for Numbers {
    fn default() -> Self {
        let begin =
            random().map_or_else(|_| u64::from(std::process::id()) << 16, u64::from_le_bytes);
        Self(AtomicU64::new(begin & NUMBERS))
    }
}

impl Numbers {
    fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// Where questions to the guest agent are left. Clones are the same desk.
#[derive(Clone, Default)]
pub struct AgentDesk(Arc<Desk>);

impl AgentDesk {
    /// The agent is behind `stream` from now on; `guest` tells whether the port is open.
    pub fn connect(&self, stream: UnixStream, guest: Arc<GuestSide>) {
        let stream = Arc::new(stream);
        self.replace(Some(Line { stream, guest }));
    }

    /// There is no port any more.
    pub fn disconnect(&self) {
        self.replace(None);
    }

    fn replace(&self, line: Option<Line>) {
        let before = std::mem::replace(&mut *self.0.line(), line);
        if let Some(Line { stream, .. }) = before {
            // Who waits for an answer hears that there will be none.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Leaves a question. Never blocks.
    pub fn submit(&self, command: AgentCommand, answer: Answer) {
        match self.0.admit() {
            Ok(mut queue) => {
                queue.waiting.push_back((command, answer));
                if queue.served {
                    return;
                }
                queue.served = true;
                drop(queue);
                let desk = Arc::clone(&self.0);
                let thread = Builder::new(Kind::Api)
                    .name("agent".to_owned())
                    .stack_size(STACK);
                if let Err(error) = thread.spawn(move || desk.serve()) {
                    self.0.refuse_all(&error.into());
                }
            }
            Err(error) => answer(Err(to_control(&error))),
        }
    }
}

impl Desk {
    fn line(&self) -> MutexGuard<'_, Option<Line>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue, if there is room in it and somebody who could answer.
    fn admit(&self) -> Result<MutexGuard<'_, Queue>, AgentError> {
        let line = self.line().clone().ok_or(AgentError::NoPort)?;
        if !line.guest.is_open() {
            return Err(AgentError::Absent);
        }
        let queue = self.queue();
        let waiting = queue.waiting.len();
        if waiting >= MOST_WAITING {
            return Err(AgentError::Busy { waiting });
        }
        Ok(queue)
    }

    fn refuse_all(&self, error: &AgentError) {
        let mut queue = self.queue();
        queue.served = false;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        for (_, answer) in waiting {
            answer(Err(to_control(error)));
        }
    }

    /// The thread: until nothing waits.
    fn serve(&self) {
        loop {
            let mut queue = self.queue();
            let Some((command, answer)) = queue.waiting.pop_front() else {
                queue.served = false;
                return;
            };
            drop(queue);
            let line = self.line().clone();
            let answered = line
                .ok_or(AgentError::NoPort)
                .and_then(|line| self.carry_out(&line, command));
            answer(answered.map_err(|error| to_control(&error)));
        }
    }

    fn carry_out(&self, line: &Line, command: AgentCommand) -> Result<Reply, AgentError> {
        let patience = match command {
            AgentCommand::FsFreeze | AgentCommand::FsThaw => PATIENCE_FREEZE,
            _ => PATIENCE,
        };
        let is_open = || line.guest.is_open();
        // The first word is answered at once, or never.
        let first = self.patience.unwrap_or(PATIENCE);
        let number = self.numbers.next();
        Exchange::new(&line.stream, &is_open, first).agree(number)?;
        let patience = self.patience.unwrap_or(patience);
        let mut exchange = Exchange::new(&line.stream, &is_open, patience);
        let mut ask = |name: &str| exchange.ask(&json!({ "execute": name }));
        let reply = match command {
            AgentCommand::Ping => {
                ask("guest-ping")?;
                return Ok(Reply::Done);
            }
            AgentCommand::Shutdown(mode) => {
                let end = self.patience.unwrap_or(PATIENCE_END);
                let mut exchange = Exchange::new(&line.stream, &is_open, end);
                return ended(exchange.ask(&end_question(mode))).map(|()| Reply::Done);
            }
            AgentCommand::Info => AgentReply::Info(answers::info(&ask("guest-info")?)?),
            AgentCommand::FsFreeze => {
                AgentReply::Filesystems(answers::count(&ask("guest-fsfreeze-freeze")?)?)
            }
            AgentCommand::FsThaw => {
                AgentReply::Filesystems(answers::count(&ask("guest-fsfreeze-thaw")?)?)
            }
            AgentCommand::FsStatus => {
                AgentReply::FsStatus(answers::status(&ask("guest-fsfreeze-status")?)?)
            }
            AgentCommand::Network => {
                AgentReply::Network(answers::interfaces(&ask("guest-network-get-interfaces")?)?)
            }
        };
        Ok(Reply::Agent(reply))
    }
}

fn end_question(mode: AgentShutdownMode) -> Value {
    let mode = match mode {
        AgentShutdownMode::Powerdown => "powerdown",
        AgentShutdownMode::Halt => "halt",
        AgentShutdownMode::Reboot => "reboot",
    };
    json!({"execute": "guest-shutdown", "arguments": {"mode": mode}})
}

/// An agent that ends its guest says nothing, and soon is there no more.
fn ended(answer: Result<Value, AgentError>) -> Result<(), AgentError> {
    match answer {
        Ok(_) | Err(AgentError::Silent { .. } | AgentError::Absent) => Ok(()),
        Err(error) => Err(error),
    }
}

fn to_control(error: &AgentError) -> ControlError {
    let kind = match error {
        AgentError::NoPort | AgentError::Absent => ErrorKind::Conflict,
        AgentError::Busy { .. } => ErrorKind::Busy,
        _ => ErrorKind::Failed,
    };
    ControlError::from_error(kind, error)
}

#[cfg(test)]
pub(crate) mod tests;
