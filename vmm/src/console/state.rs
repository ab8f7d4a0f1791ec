//! The sinks of a console with the output that they are still to get.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::ConsoleError;
use super::escape::Escape;
use super::file::LogFile;
use super::history::History;
use super::reader::Manners;
use super::scribe::FilePlace;
use super::sink::{Opened, Output, Sink, SinkId, SinkInfo, SinkKind};
use crate::config::SinkConfig;
use crate::config::serial::MAX_SINKS;

/// The most clients at a time, of all sockets and streams together.
pub(super) const MAX_CLIENTS: usize = 64;

/// How long a terminal is left alone that says that it takes something and does not.
const STALL: Duration = Duration::from_millis(10);
/// How long a socket is left alone that cannot be accepted from.
const REST: Duration = Duration::from_secs(1);

/// Called when the user asks for the machine's end.
pub(super) type OnEnd = Arc<dyn Fn() + Send + Sync>;

/// What a descriptor is waited on for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// Something has been said to the thread itself.
    Wake,
    /// Input.
    Source(SinkId),
    /// Room for output, or the end of a client.
    Reader(SinkId),
    /// Clients.
    Listener(SinkId),
}

/// What is waited for, kept from one round to the next for its memory.
#[derive(Default)]
pub(super) struct WaitSet {
    pub(super) fds: Vec<libc::pollfd>,
    pub(super) waits: Vec<Wait>,
    pub(super) timeout: Option<Duration>,
}

impl WaitSet {
    fn clear(&mut self) {
        self.fds.clear();
        self.waits.clear();
        self.timeout = None;
    }

    fn add(&mut self, fd: RawFd, events: i16, wait: Wait) {
        self.fds.push(libc::pollfd {
            fd,
            events,
            revents: 0,
        });
        self.waits.push(wait);
    }

    fn at_most(&mut self, time: Duration) {
        self.timeout = Some(self.timeout.map_or(time, |before| before.min(time)));
    }

    /// The `index`th wait with what came of it, if anything did.
    pub(super) fn ready(&self, index: usize) -> Option<(Wait, i16)> {
        let (fd, wait) = (self.fds.get(index)?, self.waits.get(index)?);
        (fd.revents != 0).then_some((*wait, fd.revents))
    }
}

/// What came of typing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Nothing,
    Help,
    End,
}

/// What came of a write.
#[derive(Default)]
pub(super) struct Put {
    /// Somebody is now to be waited for.
    pub(super) wake: bool,
    /// A file's thread is to go on.
    pub(super) write: bool,
    /// To be told.
    pub(super) losses: Vec<Loss>,
}

/// Output that a sink has missed.
pub(super) struct Loss {
    pub(super) id: SinkId,
    /// How much so far, in bytes.
    pub(super) lost: u64,
    /// Why, where the host has said so.
    pub(super) reason: Option<String>,
}

/// How much output waits at the end, by who is to get it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) patient: u64,
    pub(super) steady: u64,
    pub(super) brief: u64,
    pub(super) files: u64,
}

/// A sink that was made from its description.
pub(super) struct Made {
    pub(super) config: SinkConfig,
    pub(super) id: SinkId,
    /// It is here because the machine's configuration names it.
    pub(super) configured: bool,
}

pub(super) struct State {
    pub(super) history: History,
    pub(super) sinks: Vec<Sink>,
    /// Files that have been removed and are still to get what was written before.
    pub(super) leaving: Vec<(SinkId, FilePlace)>,
    /// The next sink's number, of this hub or of another that has it too.
    next_id: Arc<AtomicU64>,
    pub(super) made: Vec<Made>,
    pub(super) on_end: Option<OnEnd>,
    /// The thread is there.
    pub(super) serving: bool,
    pub(super) closed: bool,
    /// Somebody waits for readers.
    pub(super) finishing: bool,
    /// Whose input has its turn.
    turn: SinkId,
}

impl State {
    pub(super) fn new(replay: usize, next_id: Arc<AtomicU64>) -> Self {
        Self {
            history: History::new(replay),
            sinks: Vec::new(),
            leaving: Vec::new(),
            next_id,
            made: Vec::new(),
            on_end: None,
            serving: false,
            closed: false,
            finishing: false,
            turn: SinkId(0),
        }
    }

    pub(super) fn sink(&mut self, id: SinkId) -> Option<&mut Sink> {
        self.sinks.iter_mut().find(|sink| sink.id == id)
    }

    /// The place of a file, also when it has been removed and is not written yet.
    pub(super) fn file(&mut self, id: SinkId) -> Option<&mut FilePlace> {
        file_in(&mut self.sinks, &mut self.leaving, id)
    }

    /// A file that has been removed has got all that it was to get.
    pub(super) fn forget_file(&mut self, id: SinkId) {
        self.leaving.retain(|(leaving, _)| *leaving != id);
    }

    /// What is to be told of output that a sink has missed.
    pub(super) fn loss(&mut self, id: SinkId, reason: Option<String>) -> Option<Loss> {
        let sink = self.sinks.iter_mut().find(|sink| sink.id == id)?;
        sink.loss(&self.history, reason)
    }

    fn clients_of(&self, id: SinkId) -> impl Iterator<Item = &Sink> {
        self.sinks
            .iter()
            .filter(move |sink| sink.parent == Some(id) && !sink.has_left())
    }

    /// Refuses what would be too much.
    pub(super) fn check_room(&self, kind: SinkKind) -> Result<(), ConsoleError> {
        let count = |test: fn(&Sink) -> bool| self.sinks.iter().filter(|s| test(s)).count();
        match kind {
            _ if self.closed => Err(ConsoleError::Closed),
            SinkKind::Stream if count(|s| s.is_client() && !s.has_left()) >= MAX_CLIENTS => {
                Err(ConsoleError::TooManyClients)
            }
            SinkKind::Stream => Ok(()),
            _ if count(|s| !s.is_client()) >= MAX_SINKS => Err(ConsoleError::TooManySinks),
            // Each has a thread, which storage that hangs may hold for ever.
            SinkKind::File if self.leaving.len() >= MAX_SINKS => Err(ConsoleError::TooManyFiles),
            SinkKind::Tty if count(|s| s.kind == SinkKind::Tty) > 0 => {
                Err(ConsoleError::TerminalTaken)
            }
            _ => Ok(()),
        }
    }

    /// Gives a sink its id and its place. What it returns is to be dropped
    /// with the lock released: a client that has left long ago; and the file that is to be written.
    pub(super) fn insert(&mut self, opened: Opened) -> (SinkId, Option<Sink>, Option<LogFile>) {
        let id = SinkId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (sink, file) = opened.place(id, &self.history);
        let mut oldest = None;
        let left = self.sinks.iter().filter(|sink| sink.has_left()).count();
        // Their last words wait for the guest, but not those of any number.
        if sink.is_client()
            && left >= MAX_CLIENTS
            && let Some(index) = self.sinks.iter().position(Sink::has_left)
        {
            oldest = Some(self.sinks.remove(index));
        }
        self.sinks.push(sink);
        (id, oldest, file)
    }

    /// Takes a sink out, a socket with its clients. Drop it with the lock released. A file is
    /// still to get what has been written.
    pub(super) fn take(&mut self, id: SinkId) -> Vec<Sink> {
        self.made.retain(|made| made.id != id);
        let mut gone = self.take_where(|sink| sink.id == id || sink.parent == Some(id));
        for sink in &mut gone {
            match std::mem::replace(&mut sink.output, Output::None) {
                Output::File(mut file) => {
                    file.leave(&self.history);
                    self.leaving.push((sink.id, file));
                }
                other => sink.output = other,
            }
        }
        gone
    }

    /// Takes out the clients that are over.
    pub(super) fn take_over(&mut self) -> Vec<Sink> {
        if self.sinks.iter().any(Sink::is_over) {
            self.take_where(Sink::is_over)
        } else {
            Vec::new()
        }
    }

    fn take_where(&mut self, test: impl Fn(&Sink) -> bool) -> Vec<Sink> {
        let (gone, kept) = std::mem::take(&mut self.sinks).into_iter().partition(test);
        self.sinks = kept;
        gone
    }

    pub(super) fn info_of(&self, id: SinkId) -> Option<SinkInfo> {
        let sink = self.sinks.iter().find(|sink| sink.id == id)?;
        Some(self.info(sink))
    }

    fn info(&self, sink: &Sink) -> SinkInfo {
        let history = &self.history;
        let clients = self.clients_of(sink.id);
        let (count, waiting, lost) = clients.fold((0, 0, 0u64), |(count, waiting, lost), c| {
            (
                count + 1,
                c.waiting(history).max(waiting),
                lost.saturating_add(c.lost(history)),
            )
        });
        SinkInfo {
            id: sink.id,
            kind: sink.kind,
            path: sink.path.clone(),
            clients: count,
            waiting: sink.waiting(history).max(waiting),
            lost: sink.lost(history).saturating_add(lost),
        }
    }

    /// Those that were asked for by themselves, in the order in which they came.
    pub(super) fn list(&self) -> Vec<SinkInfo> {
        self.sinks
            .iter()
            .filter(|sink| sink.parent.is_none() && !sink.has_left())
            .map(|sink| self.info(sink))
            .collect()
    }

    /// Takes output of the guest.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Put {
        let mut put = Put::default();
        let before = self.history.end();
        let needed = self.needed();
        self.history.push(bytes, needed);
        for sink in &mut self.sinks {
            match &mut sink.output {
                Output::None => (),
                Output::File(file) => put.write |= file.rouse(),
                Output::Reader(reader) => {
                    // For those who were behind before, the thread waits already.
                    if reader.needs() == Some(before) {
                        // Clients may be many, and are left to it altogether.
                        if reader.manners() != Manners::Brief {
                            reader.advance(&self.history);
                        }
                        put.wake |= reader.lags(&self.history);
                    }
                }
            }
            put.losses.extend(sink.loss(&self.history, None));
        }
        put
    }

    /// The place of the first byte that anybody is still to get.
    fn needed(&self) -> u64 {
        let files = self.leaving.iter().map(|(_, file)| file.needs());
        let needs = self.sinks.iter().filter_map(Sink::needs).chain(files);
        needs.min().unwrap_or(u64::MAX)
    }

    /// Lists what is to be waited for.
    pub(super) fn waits(&mut self, wake: RawFd, set: &mut WaitSet) {
        set.clear();
        set.add(wake, libc::POLLIN, Wait::Wake);
        for sink in &mut self.sinks {
            let id = sink.id;
            if let Some(source) = sink.source.as_ref().filter(|source| source.wants_more()) {
                set.add(source.file().as_raw_fd(), libc::POLLIN, Wait::Source(id));
            }
            if let Some(listener) = &mut sink.listener {
                if std::mem::take(&mut listener.resting) {
                    set.at_most(REST);
                } else {
                    set.add(
                        listener.socket.as_raw_fd(),
                        libc::POLLIN,
                        Wait::Listener(id),
                    );
                }
            }
            let Some(reader) = sink.reader().filter(|reader| !reader.is_gone()) else {
                continue;
            };
            let (fd, lags, is_client) = (
                reader.raw_fd(),
                reader.lags(&self.history),
                sink.is_client(),
            );
            if std::mem::take(&mut sink.stalled) {
                set.at_most(STALL);
            } else if lags {
                set.add(fd, libc::POLLOUT, Wait::Reader(id));
            } else if is_client {
                // To hear of its end alone.
                set.add(fd, 0, Wait::Reader(id));
            }
        }
    }

    /// Notes what became of waiting for a reader.
    pub(super) fn on_reader(&mut self, id: SinkId, events: i16) {
        let Some(sink) = self.sink(id) else { return };
        sink.writable = events & libc::POLLOUT != 0;
        let is_client = sink.is_client();
        if let Output::Reader(reader) = &mut sink.output
            && is_client
            && events & (libc::POLLHUP | libc::POLLERR) != 0
        {
            reader.leave();
        }
    }

    /// Gives readers what waits, as far as they take it now.
    pub(super) fn drain(&mut self) {
        let mut progress = false;
        for sink in &mut self.sinks {
            let writable = std::mem::take(&mut sink.writable);
            let Output::Reader(reader) = &mut sink.output else {
                continue;
            };
            if !reader.lags(&self.history) {
                continue;
            }
            let advanced = reader.advance(&self.history);
            sink.stalled = writable && !advanced;
            progress |= advanced;
        }
        if progress {
            let needed = self.needed();
            self.history.trim(needed);
        }
    }

    /// Takes what `id` has typed, or that there will be no more.
    pub(super) fn on_typed(&mut self, id: SinkId, typed: Option<&[u8]>) -> Heard {
        let Some(sink) = self.sink(id) else {
            return Heard::Nothing;
        };
        let Some(bytes) = typed else {
            // A terminal that is closed ends the machine; for others it is no
            // more than the end of input.
            return match sink.source.take() {
                Some(source) if source.is_terminal() => Heard::End,
                _ => Heard::Nothing,
            };
        };
        let escape = sink.source.as_mut().and_then(|source| source.typed(bytes));
        match escape {
            None => Heard::Nothing,
            Some(Escape::Help) => Heard::Help,
            Some(Escape::Quit) => Heard::End,
        }
    }

    /// Copies the input whose turn it is into `chunk`. A source goes on until
    /// all that it has typed is taken.
    pub(super) fn next_input(&mut self, chunk: &mut [u8]) -> Option<(SinkId, usize)> {
        let pending = |sink: &Sink| {
            let source = sink.source.as_ref();
            source.is_some_and(|source| !source.pending().is_empty())
        };
        let from = self.turn;
        let index = self
            .sinks
            .iter()
            .position(|sink| sink.id >= from && pending(sink))
            .or_else(|| self.sinks.iter().position(pending))?;
        let sink = self.sinks.get(index)?;
        self.turn = sink.id;
        let bytes = sink.source.as_ref()?.pending();
        let len = bytes.len().min(chunk.len());
        chunk.get_mut(..len)?.copy_from_slice(bytes.get(..len)?);
        Some((sink.id, len))
    }

    /// The guest has taken so much of a source's input.
    pub(super) fn input_taken(&mut self, id: SinkId, len: usize) {
        let Some(source) = self.sink(id).and_then(|sink| sink.source.as_mut()) else {
            return;
        };
        source.take(len);
        if source.pending().is_empty() {
            self.turn = SinkId(id.0.saturating_add(1));
        }
    }

    /// How much output waits for readers.
    pub(super) fn left(&self) -> Left {
        let mut left = Left::default();
        for reader in self.sinks.iter().filter_map(Sink::reader) {
            let sum = match reader.manners() {
                Manners::Patient => &mut left.patient,
                Manners::Steady => &mut left.steady,
                Manners::Brief => &mut left.brief,
            };
            *sum = sum.saturating_add(reader.waiting(&self.history));
        }
        left.files = self.files_left();
        left
    }

    /// How much output is not in its file yet.
    pub(super) fn files_left(&self) -> u64 {
        let files = self.sinks.iter().filter_map(|sink| match &sink.output {
            Output::File(file) => Some(file),
            _ => None,
        });
        let leaving = self.leaving.iter().map(|(_, file)| file);
        files.chain(leaving).fold(0, |sum: u64, file| {
            sum.saturating_add(file.waiting(&self.history))
        })
    }
}

/// The place of the file `id`, wherever it is.
pub(super) fn file_in<'a>(
    sinks: &'a mut [Sink],
    leaving: &'a mut [(SinkId, FilePlace)],
    id: SinkId,
) -> Option<&'a mut FilePlace> {
    let sink = sinks.iter_mut().find(|sink| sink.id == id);
    let there = sink.and_then(|sink| match &mut sink.output {
        Output::File(file) => Some(file),
        _ => None,
    });
    there.or_else(|| {
        let left = leaving.iter_mut().find(|(leaving, _)| *leaving == id);
        left.map(|(_, file)| file)
    })
}
