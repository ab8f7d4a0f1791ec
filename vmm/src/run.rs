//! Runs a monitor, with or without a machine of its own, to its end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use api::http::{Clients, ServerHandle, ServerOptions};
use api::wire::{JobState, ReceiveMigrationData};
use api::{
    Answer, Command, Control, ControlError, Event, EventKind, EventLog, EventMonitor, ExitReason,
    Subscription, VmState,
};
use virtio::models::MODELS;

use crate::config::files::{OwnFiles, reached};
use crate::config::{DEFAULT_SERIAL_REPLAY, VmConfig};
use crate::machine::saved::Saved;
use crate::monitor::{ApiSocket, Description, Monitor, MonitorOptions, Place, event_sink};
use crate::opener::{OpenError, Opener};
use crate::sandbox::{self, files::Rule};

/// The kind of the job that waits for a machine of another monitor.
const RECEIVE: &str = "receive";

/// Where a monitor is controlled, and how it behaves.
#[derive(Debug, Default)]
pub struct Endpoint {
    /// The control socket, if there is one.
    pub place: Option<Place>,
    /// Whom it serves, where that is not as [`ApiSocket::clients`] has it.
    pub clients: Option<Clients>,
    /// Where events are written in Cloud Hypervisor's form, if they are.
    pub events: Option<Place>,
    /// What its threads' filters of system calls do.
    pub seccomp: sandbox::Mode,
    /// Which files it reaches besides those that it and its machine are described with; `None`: any.
    pub files: Option<Vec<Rule>>,
    /// Where its log goes, which is open already, if not to standard error.
    pub log: Option<PathBuf>,
    /// How it behaves.
    pub options: MonitorOptions,
}

/// Called once, on the control thread, when the guest runs for the first time, or is restored and stays paused; must not block.
pub type OnRunning = Box<dyn FnOnce() + Send>;

/// What is done when a machine of another monitor is waited for, and where that is.
pub type OnWaiting = Box<dyn FnOnce(&str) + Send>;

/// Builds the machine, boots it, or has it begin as `saved` says, and waits for its end; with a control socket
/// and [`MonitorOptions::no_shutdown`], for the end of the monitor.
///
/// # Errors
///
/// What kept the machine from being built or from going on, or the socket from being made.
pub fn run(
    config: VmConfig,
    mut endpoint: Endpoint,
    opener: Arc<Opener>,
    running: Option<OnRunning>,
    saved: Option<(Saved, bool)>,
) -> anyhow::Result<ExitReason> {
    let replay = config.serial_replay;
    if let Some(rules) = &mut endpoint.files {
        rules.extend(reached(&config, MODELS, &opener));
        rules.extend(saved.iter().map(|(saved, _)| saved.reached()));
    }
    let (mut monitor, _around) = monitor(endpoint, replay, opener, None)?;
    if let Some((saved, resume)) = saved {
        monitor.begin_as(saved, resume);
    }
    let _alarm = running.map(|running| when_running(monitor.handle().events(), running));
    Ok(monitor.run(Description::of(config))?)
}

/// Waits for clients that create and boot machines, until one of them, a signal or a guest ends the monitor.
/// They find `machine` described, if it is given.
///
/// # Errors
///
/// What kept the monitor from going on, or the socket from being made.
pub fn serve(
    machine: Option<VmConfig>,
    mut endpoint: Endpoint,
    opener: Arc<Opener>,
) -> anyhow::Result<ExitReason> {
    let replay = machine.as_ref().map(|machine| machine.serial_replay);
    let replay = replay.unwrap_or(DEFAULT_SERIAL_REPLAY);
    if let (Some(rules), Some(machine)) = (&mut endpoint.files, &machine) {
        rules.extend(reached(machine, MODELS, &opener));
    }
    let (monitor, _around) = monitor(endpoint, replay, opener, machine)?;
    Ok(monitor.serve()?)
}

/// Waits for the machine that another monitor gives as `request` says, and runs it to its end. `listening` is called once it is
/// waited for, with where that is. The socket of `fd:` is `passed`.
///
/// # Errors
///
/// What kept the machine from coming or going on, or the socket from being made.
pub fn receive(
    (request, passed): (ReceiveMigrationData, Vec<OwnedFd>),
    endpoint: Endpoint,
    opener: Arc<Opener>,
    listening: OnWaiting,
) -> anyhow::Result<ExitReason> {
    let (monitor, _around) = monitor(endpoint, DEFAULT_SERIAL_REPLAY, opener, None)?;
    let handle = monitor.handle();
    let (asked, url) = (handle.clone(), request.receiver_url.clone());
    let listening: OnRunning = Box::new(move || {
        let place = asked.migration().map(|info| info.peer);
        listening(&place.unwrap_or(url));
    });
    let _alarm = when(handle.events(), listening, is_waited_for);
    let refused: Arc<Mutex<Option<ControlError>>> = Arc::default();
    let answer: Answer = {
        let (refused, handle) = (Arc::clone(&refused), handle.clone());
        Box::new(move |received| {
            if let Err(error) = received {
                *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                // Nobody else is to be waited for.
                handle.submit(Command::Quit, Box::new(|_| ()));
            }
        })
    };
    let receive = Command::ReceiveMigration(Box::new(request), passed.into());
    handle.submit(receive, answer);
    let reason = monitor.serve()?;
    let refused = refused
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    refused.map_or(Ok(reason), |error| Err(error.into()))
}

/// Has `running` called when the log tells that the guest runs, or is there and stays paused.
fn when_running(events: &EventLog, running: OnRunning) -> Subscription {
    when(events, running, |kind| {
        matches!(
            kind,
            EventKind::State {
                state: VmState::Running | VmState::Paused,
                ..
            }
        )
    })
}

/// Whether this tells that a machine is waited for: the job of that begins when somebody listens.
fn is_waited_for(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Job { info } if info.kind == RECEIVE && info.state == JobState::Running)
}

/// Has `then` called once, when the log tells of something that `is_it`.
fn when(events: &EventLog, then: OnRunning, is_it: fn(&EventKind) -> bool) -> Subscription {
    let waiting = Mutex::new(Some(then));
    let log = events.clone();
    events.subscribe(Arc::new(move || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |event: &Arc<Event>| is_it(&event.kind);
        if waiting.is_some() && log.after(0, usize::MAX).iter().any(is_it) {
            waiting.take().into_iter().for_each(|then| then());
        }
    }))
}

/// What is beside the monitor and outlives it. The server ends, then the socket's file goes.
struct Surroundings {
    _server: Option<ServerHandle>,
    _socket: Option<ApiSocket>,
    _events: Option<EventMonitor>,
}

/// A monitor and what is around it. Its first client finds `machine` described.
fn monitor(
    endpoint: Endpoint,
    serial_replay: u64,
    opener: Arc<Opener>,
    machine: Option<VmConfig>,
) -> anyhow::Result<(Monitor, Surroundings)> {
    let Endpoint {
        place,
        clients,
        events,
        seccomp,
        files,
        log,
        mut options,
    } = endpoint;
    options.serial_replay = usize::try_from(serial_replay).unwrap_or(usize::MAX);
    let strict = options.strict;
    let mut monitor =
        Monitor::new(MODELS, Arc::clone(&opener), options).context("the monitor cannot start")?;
    // Its signals are blocked, and it has no threads.
    if let Some(mut rules) = files {
        let made = [&place, &events].into_iter().flatten();
        let made = made.filter_map(|place| match place {
            Place::Path(path) => Some(path),
            Place::Descriptor(_) => None,
        });
        rules.extend(made.chain(&log).map(|path| Rule::around(path)));
        sandbox::files::confine(&rules).context("--landlock")?;
    }
    sandbox::begin(seccomp).context("--seccomp")?;
    let mut own = OwnFiles::default();
    if let Some(log) = &log {
        own.add(log, "--log-file");
    }
    let written = events.as_ref().map(Place::to_path);
    let locked = place.as_ref().and_then(ApiSocket::lock_of);
    let events = events.map(|place| write_events(place, &monitor, &opener));
    let events = events.transpose().context("--event-monitor")?;
    if let Some(machine) = machine {
        monitor.describe(Description::of(machine));
    }
    let control = place.map(|place| {
        let options = ServerOptions {
            clients: clients.unwrap_or_else(|| ApiSocket::clients(&place)),
            strict,
            ..ServerOptions::default()
        };
        listen(place, &monitor, options, &opener)
    });
    let (server, socket) = control.transpose()?.unzip();
    if let Some(path) = written {
        own.add(&path, "--event-monitor");
    }
    if let Some(path) = locked {
        own.add(&path, "--api-socket");
    }
    monitor.reserve(own);
    let around = Surroundings {
        _server: server,
        _socket: socket,
        _events: events,
    };
    Ok((monitor, around))
}

fn write_events(place: Place, monitor: &Monitor, opener: &Opener) -> anyhow::Result<EventMonitor> {
    let sink = event_sink(place, opener)?;
    Ok(EventMonitor::start(monitor.handle().events(), sink)?)
}

fn listen(
    place: Place,
    monitor: &Monitor,
    options: ServerOptions,
    opener: &Opener,
) -> anyhow::Result<(ServerHandle, ApiSocket)> {
    let socket = match ApiSocket::listen(place, opener) {
        // The path comes from the name, and no flag has given it.
        Err(error @ OpenError::NameInUse { .. }) => return Err(error.into()),
        other => other.context("--api-socket")?,
    };
    let listener = socket.listener.try_clone().context("--api-socket")?;
    let server = api::http::serve(listener, Arc::new(monitor.handle()), options)
        .context("no thread for --api-socket")?;
    Ok((server, socket))
}
