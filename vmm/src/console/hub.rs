//! The console between a guest and its sinks.
//!
//! # Contract
//!
//! * The hub outlives machines: sinks and clients stay while one ends and
//!   another takes its place.
//! * The guest never waits. What it writes goes to all as fast as they read, and to files as fast as
//!   the host's storage takes it. Who is more than
//!   [`MOST_WAITING`](super::history::MOST_WAITING) behind misses the oldest of
//!   it, which is counted, and no other notices.
//! * Nobody else waits either: what there is to know of the sinks is told at once.
//! * Each sink gets the output in order, and from where it began without gaps
//!   while it keeps up.
//! * Input of all sinks is merged in pieces and given to the port as it has
//!   room; it waits at its source meanwhile, and while no machine runs.
//!
//! # Mechanism
//!
//! One thread waits for the descriptors of all sinks. It is there only while
//! there is a sink that has one to wait for: not for files alone. What a
//! terminal or a pipe takes at once is written by the thread that has the
//! output; the rest, and all that goes to clients, by the hub's. Each file has a
//! thread that writes it ([`scribe`](super::scribe)).
//!
//! Two locks are taken in this order: the port's, then (in the guest's device)
//! the device's own, then the state's. Nothing is read, logged, closed or written to a file while
//! the state's is held.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use api::{EventKind, EventLog};
use devices::LogLimit;
use devices::serial::{InputReady, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ConsoleError;
use super::scribe;
use super::sink::{Opened, Sink, SinkId, SinkInfo, SinkKind};
use super::source::{self, INPUT_CHUNK};
use super::state::{Heard, Left, Loss, Made, OnEnd, State, Wait, WaitSet};
use crate::config::SinkConfig;
use crate::machine::beside::put_away;
use crate::machine::driver::ppoll;
use crate::opener::Opener;
use crate::sandbox::{Builder, Kind};

/// The stack of the console's threads, in bytes: small, so that no huge page backs it.
pub(super) const STACK: usize = 128 << 10;

/// The most output that is taken in one go.
const PIECE: usize = 4096;

/// How much input is offered to a port at once.
const OFFER: usize = 256;

/// How many clients are let in before others have their turn.
const ACCEPTS: usize = 16;

const ESCAPES: &str = "\nCtrl-a x  end the machine\nCtrl-a a  send Ctrl-a\nCtrl-a h  this help\n";

const FULL: &[u8] = b"vireo: this console has as many clients as it takes: try again later\r\n";

/// A guest's device that takes input.
pub trait InputPort: Send + Sync {
    /// Offers input; how many of `bytes` were taken, from the first. It does not
    /// block. When not all were taken, [`ConsoleHub`] is told later
    /// ([`InputReady`]) that there is room.
    fn input(&self, bytes: &[u8]) -> usize;

    /// The terminal that the console leads to may have another size.
    fn window_changed(&self) {}
}

impl InputPort for Serial {
    fn input(&self, bytes: &[u8]) -> usize {
        Serial::input(self, bytes)
    }
}

/// The port of the machine that there is, if there is one.
#[derive(Default)]
struct PortPlace {
    port: Option<Arc<dyn InputPort>>,
    open: bool,
}

pub(super) struct Hub {
    /// The flag that configures it, for the log.
    pub(super) flag: &'static str,
    state: Mutex<State>,
    /// There is output for a file, or a file has been removed.
    pub(super) output: Condvar,
    port: Mutex<PortPlace>,
    /// How large the window is, in columns and rows, where it is not the process's terminal.
    window: Mutex<Option<(u16, u16)>>,
    wake: EventFd,
    /// Written when a reader has taken something while somebody waits for that.
    progress: EventFd,
    /// Where it is told which sinks come, go and miss output.
    events: OnceLock<EventLog>,
}

/// One console's hub. Clones are the same hub.
#[derive(Clone)]
pub struct ConsoleHub(pub(super) Arc<Hub>);

/// A sink of the configuration that has been opened, or is a terminal, which is opened last.
pub struct OpenedSink {
    config: SinkConfig,
    opened: Option<Opened>,
}

impl ConsoleHub {
    /// A hub without sinks, which keeps the last `replay` bytes of output for
    /// clients that come late. `flag` is what configures it, for the log.
    ///
    /// # Errors
    ///
    /// The host's, when it is out of descriptors.
    pub fn new(flag: &'static str, replay: usize) -> io::Result<Self> {
        Self::numbered(flag, replay, Arc::default())
    }

    /// As [`ConsoleHub::new`]. No hub with the same `numbers` has a sink of the same id.
    ///
    /// # Errors
    ///
    /// As [`ConsoleHub::new`].
    pub fn numbered(
        flag: &'static str,
        replay: usize,
        numbers: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        Ok(Self(Arc::new(Hub {
            flag,
            state: Mutex::new(State::new(replay, numbers)),
            window: Mutex::default(),
            output: Condvar::new(),
            port: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            progress: EventFd::new(EFD_NONBLOCK)?,
            events: OnceLock::new(),
        })))
    }

    /// Tells `events` from now on which sinks come, go and miss output. Only the first
    /// call counts.
    pub fn tell(&self, events: EventLog) {
        let _ = self.0.events.set(events);
    }

    /// Where a guest's device writes its output.
    #[must_use]
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter(self.clone())
    }

    /// Gives input to `port` from now on, in place of an earlier one, once the
    /// link is opened, and until it is dropped.
    #[must_use]
    pub fn connect(&self, port: Arc<dyn InputPort>) -> PortLink {
        let place = PortPlace {
            port: Some(Arc::clone(&port)),
            open: false,
        };
        let before = std::mem::replace(&mut *self.0.port(), place);
        drop(before);
        PortLink {
            hub: self.clone(),
            port,
        }
    }

    /// Tells the port that the terminal may have another size, which is the window's from now on.
    pub fn window_changed(&self) {
        self.set_window(None);
    }

    /// Tells the port that the window has so many columns and rows from now on.
    pub fn resize_window(&self, columns: u16, rows: u16) {
        self.set_window(Some((columns, rows)));
    }

    /// How large the window is, in columns and rows, where that is known.
    #[must_use]
    pub fn window(&self) -> Option<(u16, u16)> {
        let told = *self.0.window.lock().unwrap_or_else(PoisonError::into_inner);
        told.or_else(|| {
            let is_terminal = |sink: &SinkInfo| sink.kind == SinkKind::Tty;
            let has_terminal = self.list().iter().any(is_terminal);
            has_terminal.then(super::terminal::size).flatten()
        })
    }

    fn set_window(&self, size: Option<(u16, u16)>) {
        *self.0.window.lock().unwrap_or_else(PoisonError::into_inner) = size;
        let place = self.0.port();
        if let Some(port) = &place.port {
            port.window_changed();
        }
    }

    /// `on_end` is called, on the hub's thread, when the user of a terminal asks
    /// for the end of the machine or closes the terminal. It replaces an
    /// earlier one and must not block.
    pub fn on_end(&self, on_end: Arc<dyn Fn() + Send + Sync>) {
        let before = self.0.state().on_end.replace(on_end);
        drop(before);
    }

    /// Makes the sinks that are here by configuration those of `wanted`: what
    /// is new is opened, what is no longer named is removed, and what is in
    /// both stays as it is. A sink of `wanted` that was added otherwise is
    /// taken for it; other such sinks stay too.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`] of the first sink that cannot be opened. Those that
    /// this call has opened are removed again.
    pub fn configure(
        &self,
        wanted: &[SinkConfig],
        opener: &Arc<Opener>,
    ) -> Result<(), ConsoleError> {
        let missing = self.keep(wanted);
        self.take_up(self.open_each(missing, opener, &|| true)?, opener)
    }

    /// The first of three steps of [`ConsoleHub::configure`], at once: what is no longer named is removed. What is to be opened.
    #[must_use]
    pub fn keep(&self, wanted: &[SinkConfig]) -> Vec<SinkConfig> {
        let mut missing = wanted.to_vec();
        let mut superfluous = Vec::new();
        for made in &mut self.0.state().made {
            match missing.iter().position(|one| *one == made.config) {
                Some(index) => {
                    missing.remove(index);
                    made.configured = true;
                }
                None if made.configured => superfluous.push(made.id),
                None => (),
            }
        }
        for id in superfluous {
            // Somebody else may have removed it in the meantime.
            let _ = self.remove(id);
        }
        missing
    }

    /// The second step, which takes as long as the host's storage does, and opens nothing more once it is not `needed`. A
    /// terminal is left for the last step: whoever ends meanwhile has its settings back.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`]; what was opened is closed then.
    pub fn open_each(
        &self,
        missing: Vec<SinkConfig>,
        opener: &Arc<Opener>,
        needed: &dyn Fn() -> bool,
    ) -> Result<Vec<OpenedSink>, ConsoleError> {
        let open = |config: SinkConfig| {
            let opened = match config {
                SinkConfig::Tty => None,
                _ => Some(self.open(&config, opener)?),
            };
            Ok(OpenedSink { config, opened })
        };
        let missing = missing.into_iter().take_while(|_| needed());
        missing.map(open).collect()
    }

    /// The last step, at once.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`]; what was opened is removed again then.
    pub fn take_up(
        &self,
        opened: Vec<OpenedSink>,
        opener: &Arc<Opener>,
    ) -> Result<(), ConsoleError> {
        let mut added = Vec::new();
        for OpenedSink { config, opened } in opened {
            let put = match opened {
                Some(opened) => self.put(&config, opened),
                None => self.add(&config, opener),
            };
            match put {
                Ok(info) => added.push(info.id),
                Err(error) => {
                    for id in added {
                        let _ = self.remove(id);
                    }
                    return Err(error);
                }
            }
        }
        for made in &mut self.0.state().made {
            made.configured |= added.contains(&made.id);
        }
        Ok(())
    }

    /// Adds a sink, which gets what the guest writes from now on.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`]; nothing has changed then.
    pub fn add(&self, config: &SinkConfig, opener: &Arc<Opener>) -> Result<SinkInfo, ConsoleError> {
        self.put(config, self.open(config, opener)?)
    }

    /// The first half of [`ConsoleHub::add`], which takes as long as the host's storage does.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`].
    pub fn open(&self, config: &SinkConfig, opener: &Arc<Opener>) -> Result<Opened, ConsoleError> {
        if *config == SinkConfig::Tty {
            // A terminal that is in use must not be touched at all.
            self.0.state().check_room(SinkKind::Tty)?;
        }
        Opened::open(config, opener)
    }

    /// The second half, at once: `opened` is what `config` describes.
    ///
    /// # Errors
    ///
    /// [`ConsoleError`], when there are as many sinks as can be.
    pub fn put(&self, config: &SinkConfig, opened: Opened) -> Result<SinkInfo, ConsoleError> {
        let info = self.insert(opened)?;
        self.0.state().made.push(Made {
            config: config.clone(),
            id: info.id,
            configured: false,
        });
        Ok(info)
    }

    /// Has a sink that was added be one of the configuration:
    /// [`ConsoleHub::configure`] removes it once it is no longer named.
    pub fn adopt(&self, id: SinkId) {
        for made in &mut self.0.state().made {
            made.configured |= made.id == id;
        }
    }

    /// The description that a sink was made from, if it was.
    #[must_use]
    pub fn config_of(&self, id: SinkId) -> Option<SinkConfig> {
        let state = self.0.state();
        let made = state.made.iter().find(|made| made.id == id)?;
        Some(made.config.clone())
    }

    /// Adds standard output, without input.
    ///
    /// # Errors
    ///
    /// As [`ConsoleHub::add`].
    pub fn add_stdout(&self, opener: &Opener) -> Result<SinkInfo, ConsoleError> {
        let opened = Opened::stdout(opener).map_err(|source| ConsoleError::Host {
            what: "standard output cannot be used",
            source,
        })?;
        self.insert(opened)
    }

    /// Adds a stream, which becomes non-blocking: output goes to it, with
    /// `replay` first the last of what was written before, and what it brings
    /// is input. It is removed when its other end is closed. What waits for it at first is what was written before.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::TooManyClients`] among others; the stream is closed then.
    pub fn attach(&self, stream: UnixStream, replay: bool) -> Result<SinkInfo, ConsoleError> {
        let opened = Opened::stream(stream, None, replay).map_err(|source| ConsoleError::Host {
            what: "the stream cannot be used",
            source,
        })?;
        self.insert(opened)
    }

    /// Removes a sink, a socket with its clients. What waits for its reader is
    /// dropped, and what waits for a file is still written to it, without waiting for that; a terminal
    /// has its settings back on return.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::Unknown`].
    pub fn remove(&self, id: SinkId) -> Result<(), ConsoleError> {
        let sinks = self.0.state().take(id);
        if sinks.is_empty() {
            return Err(ConsoleError::Unknown { id });
        }
        self.0.tell_gone(&sinks);
        drop(sinks);
        self.0.rouse();
        self.0.output.notify_all();
        Ok(())
    }

    /// The sinks, in the order in which they came.
    #[must_use]
    pub fn list(&self) -> Vec<SinkInfo> {
        self.0.state().list()
    }

    /// Removes all sinks for good, and ends the thread.
    pub fn close(&self) {
        let mut state = self.0.state();
        state.closed = true;
        state.made.clear();
        let sinks = std::mem::take(&mut state.sinks);
        state.leaving.clear();
        let on_end = state.on_end.take();
        drop(state);
        drop((sinks, on_end));
        self.0.rouse();
        self.0.output.notify_all();
    }

    /// How much output waits; from now on, [`ConsoleHub::progress_fd`] tells
    /// when it may be less.
    pub(super) fn left(&self) -> Left {
        // Cleared before looking, so that progress in between is told again.
        let _ = self.0.progress.read();
        let mut state = self.0.state();
        state.finishing = true;
        state.left()
    }

    /// How much output is not in its file yet; until `end`, [`ConsoleHub::progress_fd`] tells when
    /// it may be less.
    pub(super) fn files_left(&self, end: bool) -> u64 {
        // Cleared before looking, so that progress in between is told again.
        let _ = self.0.progress.read();
        let mut state = self.0.state();
        state.finishing = !end;
        state.files_left()
    }

    pub(super) fn progress_fd(&self) -> RawFd {
        self.0.progress.as_raw_fd()
    }

    /// The far ends of the pseudo-terminals.
    pub(super) fn peers(&self) -> Vec<Arc<OwnedFd>> {
        let state = self.0.state();
        state.sinks.iter().filter_map(|s| s.peer.clone()).collect()
    }

    pub(super) fn insert(&self, opened: Opened) -> Result<SinkInfo, ConsoleError> {
        let mut state = self.0.state();
        let fits = state.check_room(opened.kind());
        let served = fits.and_then(|()| match opened.needs_thread() {
            true => self.0.ensure_thread(&mut state),
            false => Ok(()),
        });
        if let Err(error) = served {
            drop(state);
            put_away(opened);
            return Err(error);
        }
        if let Some(path) = opened.path() {
            tracing::debug!(flag = self.0.flag, path = %path.display(), "console sink");
        }
        let (id, oldest, file) = state.insert(opened);
        let info = state.info_of(id);
        drop(state);
        self.0.tell_gone(oldest.as_slice());
        drop(oldest);
        if let Some(Err(source)) = file.map(|file| scribe::start(&self.0, id, file)) {
            let mut state = self.0.state();
            let gone = state.take(id);
            state.forget_file(id);
            drop(state);
            drop(gone);
            let what = "no thread for the console's file";
            return Err(ConsoleError::Host { what, source });
        }
        self.0.rouse();
        let info = info.ok_or(ConsoleError::Unknown { id })?;
        self.0.publish(|| EventKind::ConsoleSinkAdded {
            id: info.id.to_string(),
            sink: info.kind.as_str().to_owned(),
            path: info.path.as_ref().map(|path| path.display().to_string()),
        });
        Ok(info)
    }
}

/// The hub hears that its port has room.
impl InputReady for ConsoleHub {
    fn ready(&self) {
        self.0.rouse();
    }
}

/// What a guest's device writes to. It takes everything at once.
pub struct ConsoleWriter(ConsoleHub);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for piece in bytes.chunks(PIECE) {
            self.0.0.put(piece);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A port's connection to a hub, closed at first. Dropping it ends it.
pub struct PortLink {
    hub: ConsoleHub,
    port: Arc<dyn InputPort>,
}

impl PortLink {
    /// Input reaches the port from now on.
    pub fn open(&self) {
        self.set(true);
        self.hub.0.rouse();
    }

    /// No input reaches the port once this has returned; it waits.
    pub fn close(&self) {
        self.set(false);
    }

    fn set(&self, open: bool) {
        let mut place = self.hub.0.port();
        if self.is_in(&place) {
            place.open = open;
        }
    }

    fn is_in(&self, place: &PortPlace) -> bool {
        let there = place.port.as_ref();
        there.is_some_and(|there| Arc::ptr_eq(there, &self.port))
    }
}

impl Drop for PortLink {
    fn drop(&mut self) {
        let mut place = self.hub.0.port();
        if self.is_in(&place) {
            let before = std::mem::take(&mut *place);
            drop(place);
            drop(before);
        }
    }
}

impl Hub {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn port(&self) -> MutexGuard<'_, PortPlace> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the thread look at everything again.
    fn rouse(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.wake.write(1);
    }

    /// Output has gone where it was to go, for who waits for that.
    pub(super) fn progressed(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.progress.write(1);
    }

    /// Tells what sinks have missed. The state's lock is not held.
    pub(super) fn tell_lost(&self, losses: impl IntoIterator<Item = Loss>) {
        for Loss { id, lost, reason } in losses {
            self.publish(|| EventKind::ConsoleOutputLost {
                id: id.to_string(),
                lost,
                reason,
            });
        }
    }

    fn publish(&self, event: impl FnOnce() -> EventKind) {
        if let Some(events) = self.events.get() {
            events.publish(event());
        }
    }

    /// Tells which of those that were listed have gone. The state's lock is not held.
    fn tell_gone(&self, sinks: &[Sink]) {
        for sink in sinks.iter().filter(|sink| sink.parent.is_none()) {
            self.publish(|| EventKind::ConsoleSinkRemoved {
                id: sink.id.to_string(),
                sink: sink.kind.as_str().to_owned(),
            });
        }
    }

    fn put(&self, bytes: &[u8]) {
        let put = self.state().put(bytes);
        if put.wake {
            self.rouse();
        }
        if put.write {
            self.output.notify_all();
        }
        self.tell_lost(put.losses);
    }

    fn ensure_thread(self: &Arc<Self>, state: &mut State) -> Result<(), ConsoleError> {
        if state.serving {
            return Ok(());
        }
        let hub = Arc::clone(self);
        Builder::new(Kind::Console)
            .name("console".to_owned())
            .stack_size(STACK)
            .spawn(move || hub.serve())
            .map_err(|source| ConsoleError::Host {
                what: "no thread for the console",
                source,
            })?;
        state.serving = true;
        Ok(())
    }

    /// The thread: until there is nothing to wait for.
    fn serve(&self) {
        let mut set = WaitSet::default();
        while self.list_waits(&mut set) {
            if let Err(error) = ppoll(&mut set.fds, set.timeout) {
                tracing::error!("{}: the console cannot wait: {error}", self.flag);
                self.state().serving = false;
                return;
            }
            // Cleared before looking, so that what is said in between wakes again.
            let _ = self.wake.read();
            for index in 0..set.waits.len() {
                match set.ready(index) {
                    None | Some((Wait::Wake, _)) => (),
                    Some((Wait::Source(id), _)) => self.hear(id),
                    Some((Wait::Listener(id), _)) => self.let_in(id),
                    Some((Wait::Reader(id), events)) => self.state().on_reader(id, events),
                }
            }
            self.feed();
            self.drain();
        }
    }

    /// Lists what to wait for; `false` when the thread is to end.
    fn list_waits(&self, set: &mut WaitSet) -> bool {
        let mut state = self.state();
        state.serving = !state.closed && state.sinks.iter().any(|sink| sink.needs_thread());
        if state.serving {
            state.waits(self.wake.as_raw_fd(), set);
        }
        state.serving
    }

    /// Reads what has been typed. Without the lock: on a descriptor that others
    /// have too, somebody else may have been faster, and reading then waits.
    fn hear(&self, id: SinkId) {
        let file = self.state().sink(id).and_then(|sink| {
            let source = sink.source.as_ref()?;
            Some(Arc::clone(source.file()))
        });
        let Some(file) = file else { return };
        let mut chunk = [0; INPUT_CHUNK];
        let read = source::read(&file, &mut chunk);
        drop(file);
        let typed = read.map(|len| chunk.get(..len).unwrap_or_default());
        let heard = self.state().on_typed(id, typed);
        match heard {
            Heard::Nothing => (),
            Heard::Help => eprint!("{ESCAPES}"),
            Heard::End => {
                let on_end: Option<OnEnd> = self.state().on_end.clone();
                if let Some(on_end) = on_end {
                    on_end();
                }
            }
        }
    }

    /// Accepts clients.
    fn let_in(&self, id: SinkId) {
        static LIMIT: LogLimit = LogLimit::new();
        let listener = self.state().sink(id).and_then(|sink| {
            let listener = sink.listener.as_ref()?;
            Some((Arc::clone(&listener.socket), listener.replay))
        });
        let Some((socket, replay)) = listener else {
            return;
        };
        for _ in 0..ACCEPTS {
            match accept(&socket) {
                Ok(Some(stream)) => self.admit(stream, id, replay),
                Ok(None) => return,
                Err(error) => {
                    if let Some(listener) = self.state().sink(id).and_then(|s| s.listener.as_mut())
                    {
                        listener.resting = true;
                    }
                    if let Some(suppressed) = LIMIT.allow() {
                        let flag = self.flag;
                        tracing::warn!(suppressed, "{flag}: no client is let in: {error}");
                    }
                    return;
                }
            }
        }
    }

    fn admit(&self, mut stream: UnixStream, parent: SinkId, replay: bool) {
        if self.state().check_room(SinkKind::Stream).is_err() {
            // It does not wait: the stream is new. Whoever has gone already does not hear it.
            let _ = stream.write(FULL);
            return;
        }
        let Ok(opened) = Opened::stream(stream, Some(parent), replay) else {
            return;
        };
        let mut state = self.state();
        if state.sink(parent).is_none() {
            // The socket has been removed in the meantime.
            drop(state);
            return;
        }
        let (_, oldest, _) = state.insert(opened);
        drop(state);
        self.tell_gone(oldest.as_slice());
        drop(oldest);
    }

    /// Gives the port what has been typed, as far as it has room.
    fn feed(&self) {
        let mut chunk = [0; OFFER];
        loop {
            let Some((id, len)) = self.state().next_input(&mut chunk) else {
                return;
            };
            let offered = chunk.get(..len).unwrap_or_default();
            let place = self.port();
            let taken = match &place.port {
                Some(port) if place.open => port.input(offered).min(len),
                _ => 0,
            };
            drop(place);
            self.state().input_taken(id, taken);
            if taken < len {
                return;
            }
        }
    }

    fn drain(&self) {
        let mut state = self.state();
        state.drain();
        let over = state.take_over();
        let told = state.finishing;
        drop(state);
        self.tell_gone(&over);
        drop(over);
        if told {
            self.progressed();
        }
    }
}

/// The next client, if one waits.
fn accept(socket: &UnixListener) -> io::Result<Option<UnixStream>> {
    loop {
        match socket.accept() {
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => (),
                _ => return Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests;
