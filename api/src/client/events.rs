//! Events as they happen (`text/event-stream`; HTML standard, section 9.2).

use std::time::Duration;

use super::connection::{Connection, Deadline};
use super::{ClientError, Event};

/// The longest line of a stream of events, in bytes.
const LINE: usize = 1 << 20;

/// An event as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToldEvent {
    /// Its number, from which [`super::Client::events`] can go on.
    pub id: u64,
    /// Its kind, such as `state`.
    pub kind: String,
    /// All of it, as a JSON object.
    pub json: String,
}

impl ToldEvent {
    /// The event, when it is one that this client knows: a newer monitor may have others.
    #[must_use]
    pub fn event(&self) -> Option<Event> {
        serde_json::from_str(&self.json).ok()
    }
}

/// A stream of events. As an iterator it waits for the next one without a limit,
/// as long as the monitor shows that it lives, and ends with the monitor.
#[derive(Debug)]
pub struct Events {
    connection: Connection,
    /// How long the monitor may be silent; it gives a sign of life every 15 seconds.
    silence: Duration,
    /// What has come of the next event.
    partial: ToldEvent,
    ended: bool,
}

impl Events {
    pub(super) fn new(connection: Connection, silence: Duration) -> Self {
        Self {
            connection,
            silence,
            partial: nothing(),
            ended: false,
        }
    }

    /// The next event, waited for at most `time`; `Ok(None)` when it ended without one.
    ///
    /// # Errors
    ///
    /// [`ClientError::Closed`] when the stream has ended.
    pub fn next_within(&mut self, time: Duration) -> Result<Option<ToldEvent>, ClientError> {
        match self.read(Deadline::after(time), None) {
            Err(ClientError::TimedOut { .. }) => Ok(None),
            other => other,
        }
    }

    /// Reads lines until an event is complete. With `silence` each line may take that long.
    fn read(
        &mut self,
        mut deadline: Deadline,
        silence: Option<Duration>,
    ) -> Result<Option<ToldEvent>, ClientError> {
        loop {
            let Some(line) = self.connection.line(LINE, deadline)? else {
                self.ended = true;
                return Err(self.connection.closed());
            };
            if let Some(silence) = silence {
                deadline = Deadline::after(silence);
            }
            let text = String::from_utf8(line);
            let text = text.map_err(|_| self.connection.malformed("an event is no UTF-8"))?;
            if text.is_empty() {
                let event = std::mem::replace(&mut self.partial, nothing());
                if !event.json.is_empty() {
                    return Ok(Some(event));
                }
                continue;
            }
            let (field, value) = text.split_once(':').unwrap_or((&text, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => {
                    let id = value.parse();
                    let malformed = |_| self.connection.malformed("an event's id is no number");
                    self.partial.id = id.map_err(malformed)?;
                }
                "event" => value.clone_into(&mut self.partial.kind),
                "data" => {
                    if self.partial.json.len().saturating_add(value.len()) > LINE {
                        return Err(self.connection.malformed("an event is too long"));
                    }
                    self.partial.json.push_str(value);
                }
                // Signs of life are comments; fields of later versions mean nothing here.
                _ => (),
            }
        }
    }
}

fn nothing() -> ToldEvent {
    ToldEvent {
        id: 0,
        kind: String::new(),
        json: String::new(),
    }
}

impl Iterator for Events {
    type Item = Result<ToldEvent, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        match self.read(Deadline::after(self.silence), Some(self.silence)) {
            Ok(event) => event.map(Ok),
            Err(_) if self.ended => None,
            Err(error) => {
                self.ended = true;
                Some(Err(error))
            }
        }
    }
}
