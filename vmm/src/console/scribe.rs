//! Files as sinks: each has a thread that writes it.
//!
//! # Contract
//!
//! * Nobody waits for a file: neither the guest nor who asks for the sinks, for as long as the
//!   host's storage takes.
//! * A file gets the output in order. What it has not got waits in the hub's history with that of all others,
//!   so it is bounded; who is too far behind misses the oldest, which is counted.
//! * A file that is removed gets what had been written by then. It is closed once it has.

use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use super::file::{LogFile, Trouble};
use super::history::{History, count};
use super::hub::{Hub, STACK};
use super::sink::SinkId;
use super::state::State;
use crate::sandbox::{Builder, Kind};

/// The most that is written at once: no more than the least limit of a file.
const PIECE: usize = 4096;

/// How far a file is behind the output. The file itself belongs to its thread.
#[derive(Debug)]
pub struct FilePlace {
    /// The place of the next byte that the thread takes.
    place: u64,
    /// How many bytes it has taken and not written yet.
    taken: u64,
    /// How many bytes the file has missed, or the host has refused.
    lost: u64,
    /// It has been removed: it gets nothing from this place on, and so much was lost by then.
    until: Option<(u64, u64)>,
    /// The thread waits.
    idle: bool,
}

/// What a file's thread is to do.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    /// Write the piece.
    Write,
    /// Wait for output.
    Wait,
    /// End; so many bytes have been lost since it was removed.
    End(u64),
}

impl FilePlace {
    /// One that gets what follows `place`.
    #[must_use]
    pub fn new(place: u64) -> Self {
        Self {
            place,
            taken: 0,
            lost: 0,
            until: None,
            idle: false,
        }
    }

    fn end(&self, history: &History) -> u64 {
        self.until.map_or(history.end(), |(until, _)| until)
    }

    /// How much output is not in the file yet, in bytes.
    #[must_use]
    pub fn waiting(&self, history: &History) -> u64 {
        let first = self.place.max(history.start());
        self.end(history)
            .saturating_sub(first)
            .saturating_add(self.taken)
    }

    /// How many bytes it has not got and will not get.
    #[must_use]
    pub fn lost(&self, history: &History) -> u64 {
        self.lost.saturating_add(self.missed(history))
    }

    fn missed(&self, history: &History) -> u64 {
        let start = history.start().min(self.end(history));
        start.saturating_sub(self.place)
    }

    /// The place of the first byte that is still to be kept for it.
    #[must_use]
    pub fn needs(&self) -> u64 {
        self.place
    }

    /// It gets what has been written, and nothing of what comes.
    pub fn leave(&mut self, history: &History) {
        self.until = Some((history.end(), self.lost(history)));
    }

    /// There is output: whether the thread is to be woken.
    #[must_use]
    pub fn rouse(&mut self) -> bool {
        std::mem::take(&mut self.idle)
    }

    fn next(&mut self, history: &History, piece: &mut Vec<u8>) -> Task {
        self.lost = self.lost(history);
        self.place = self.place.max(history.start().min(self.end(history)));
        let left = self.end(history).saturating_sub(self.place);
        let most = usize::try_from(left).map_or(PIECE, |left| left.min(PIECE));
        let bytes = history.piece(self.place);
        let bytes = bytes.get(..bytes.len().min(most)).unwrap_or_default();
        if bytes.is_empty() {
            self.idle = self.until.is_none();
            return match self.until {
                None => Task::Wait,
                Some((_, before)) => Task::End(self.lost.saturating_sub(before)),
            };
        }
        piece.clear();
        piece.extend_from_slice(bytes);
        self.taken = count(bytes.len());
        self.place = self.place.saturating_add(self.taken);
        Task::Write
    }

    /// What had been taken is written, but for `refused` bytes.
    fn wrote(&mut self, refused: u64) {
        self.taken = 0;
        self.lost = self.lost.saturating_add(refused);
    }
}

/// Starts the thread that writes `file`, the sink `id` of `hub`, until that is removed.
///
/// # Errors
///
/// The host's, when it has no more threads.
pub(super) fn start(hub: &Arc<Hub>, id: SinkId, file: LogFile) -> io::Result<()> {
    let hub = Arc::clone(hub);
    Builder::new(Kind::Job)
        .name("console-file".to_owned())
        .stack_size(STACK)
        .spawn(move || write(&hub, id, file))
        .map(|_| ())
}

fn write(hub: &Hub, id: SinkId, mut file: LogFile) {
    let mut piece = Vec::with_capacity(PIECE);
    loop {
        if let Err(missing) = take(hub, id, &mut piece) {
            if missing > 0 {
                let (flag, path) = (hub.flag, file.path().display());
                tracing::warn!("{flag} file={path}: removed; {missing} bytes are missing");
            }
            return;
        }
        let before = file.lost();
        let trouble = file.write(&piece);
        let refused = file.lost().saturating_sub(before);
        let reason = match &trouble {
            Some(Trouble::Began(reason)) => Some(reason.clone()),
            _ => None,
        };
        let mut state = hub.state();
        if let Some(place) = state.file(id) {
            place.wrote(refused);
        }
        let told = state.finishing;
        let loss = state.loss(id, reason);
        drop(state);
        if told {
            hub.progressed();
        }
        hub.tell_lost(loss);
        if let Some(trouble) = trouble {
            log(hub.flag, file.path(), &trouble);
        }
    }
}

/// Waits for output and takes a piece. When there is nothing more to be done, gives how many bytes have
/// been lost that nobody has been told of.
fn take(hub: &Hub, id: SinkId, piece: &mut Vec<u8>) -> Result<(), u64> {
    let mut state = hub.state();
    loop {
        let task = {
            let State {
                history,
                sinks,
                leaving,
                ..
            } = &mut *state;
            super::state::file_in(sinks, leaving, id)
                .map_or(Task::End(0), |place| place.next(history, piece))
        };
        match task {
            Task::Write => return Ok(()),
            Task::End(missing) => {
                state.forget_file(id);
                return Err(missing);
            }
            Task::Wait => {
                let waited = hub.output.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

fn log(flag: &str, path: &Path, trouble: &Trouble) {
    let path = path.display();
    match trouble {
        Trouble::Began(reason) => tracing::warn!(
            "{flag} file={path}: output is lost: {reason}: it is tried again from time to time"
        ),
        Trouble::Ended(missing) => {
            tracing::warn!("{flag} file={path}: output goes on; {missing} bytes are missing");
        }
    }
}

#[cfg(test)]
mod tests;
