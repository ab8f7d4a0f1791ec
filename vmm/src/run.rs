//! Runs a monitor, with or without a machine of its own, to its end.

use std::sync::Arc;

use anyhow::Context;
use api::http::{ServerHandle, ServerOptions};
use api::{Control, EventMonitor, ExitReason};
use virtio::models::MODELS;

use crate::config::{DEFAULT_SERIAL_REPLAY, VmConfig};
use crate::monitor::{ApiSocket, Description, Monitor, MonitorOptions, Place, event_sink};
use crate::opener::Opener;

/// Where a monitor is controlled, and how it behaves.
#[derive(Debug, Default)]
pub struct Endpoint {
    /// The control socket, if there is one.
    pub place: Option<Place>,
    /// Where events are written in Cloud Hypervisor's form, if they are.
    pub events: Option<Place>,
    /// How it behaves.
    pub options: MonitorOptions,
}

/// Builds the machine, boots it and waits for its end; with a control socket
/// and [`MonitorOptions::no_shutdown`], for the end of the monitor.
///
/// # Errors
///
/// What kept the machine from being built or from going on, or the socket from being made.
pub fn run(
    config: VmConfig,
    endpoint: Endpoint,
    opener: Arc<Opener>,
) -> anyhow::Result<ExitReason> {
    let replay = config.serial_replay;
    let (monitor, _around) = monitor(endpoint, replay, opener)?;
    Ok(monitor.run(Description::of(config))?)
}

/// Waits for clients that create and boot machines, until one of them, a signal or a guest ends the monitor.
///
/// # Errors
///
/// What kept the monitor from going on, or the socket from being made.
pub fn serve(endpoint: Endpoint, opener: Arc<Opener>) -> anyhow::Result<ExitReason> {
    let (monitor, _around) = monitor(endpoint, DEFAULT_SERIAL_REPLAY, opener)?;
    Ok(monitor.serve()?)
}

/// What is beside the monitor and outlives it. The server ends, then the socket's file goes.
struct Surroundings {
    _server: Option<ServerHandle>,
    _socket: Option<ApiSocket>,
    _events: Option<EventMonitor>,
}

fn monitor(
    endpoint: Endpoint,
    serial_replay: u64,
    opener: Arc<Opener>,
) -> anyhow::Result<(Monitor, Surroundings)> {
    let Endpoint {
        place,
        events,
        mut options,
    } = endpoint;
    options.serial_replay = usize::try_from(serial_replay).unwrap_or(usize::MAX);
    let strict = options.strict;
    let monitor =
        Monitor::new(MODELS, Arc::clone(&opener), options).context("the monitor cannot start")?;
    let events = events.map(|place| write_events(&place, &monitor, &opener));
    let events = events.transpose().context("--event-monitor")?;
    let control = place.map(|place| listen(&place, &monitor, strict, &opener));
    let (server, socket) = control.transpose()?.unzip();
    let around = Surroundings {
        _server: server,
        _socket: socket,
        _events: events,
    };
    Ok((monitor, around))
}

fn write_events(place: &Place, monitor: &Monitor, opener: &Opener) -> anyhow::Result<EventMonitor> {
    let sink = event_sink(place, opener)?;
    Ok(EventMonitor::start(monitor.handle().events(), sink)?)
}

fn listen(
    place: &Place,
    monitor: &Monitor,
    strict: bool,
    opener: &Opener,
) -> anyhow::Result<(ServerHandle, ApiSocket)> {
    let socket = ApiSocket::listen(place, opener).context("--api-socket")?;
    let listener = socket.listener.try_clone().context("--api-socket")?;
    let options = ServerOptions {
        strict,
        ..ServerOptions::default()
    };
    let server = api::http::serve(listener, Arc::new(monitor.handle()), options)
        .context("no thread for --api-socket")?;
    Ok((server, socket))
}
