//! Runs a monitor, with or without a machine of its own, to its end.

use std::sync::Arc;

use anyhow::Context;
use api::ExitReason;
use api::http::{ServerHandle, ServerOptions};
use virtio::models::MODELS;

use crate::config::{DEFAULT_SERIAL_REPLAY, VmConfig};
use crate::monitor::{ApiSocket, Description, Monitor, MonitorOptions, SocketPlace};
use crate::opener::Opener;

/// Where a monitor is controlled, and how it behaves.
#[derive(Debug, Default)]
pub struct Endpoint {
    /// The control socket, if there is one.
    pub place: Option<SocketPlace>,
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
    let (monitor, _control) = monitor(endpoint, replay, opener)?;
    Ok(monitor.run(Description::of(config))?)
}

/// Waits for clients that create and boot machines, until one of them, a signal or a guest ends the monitor.
///
/// # Errors
///
/// What kept the monitor from going on, or the socket from being made.
pub fn serve(endpoint: Endpoint, opener: Arc<Opener>) -> anyhow::Result<ExitReason> {
    let (monitor, _control) = monitor(endpoint, DEFAULT_SERIAL_REPLAY, opener)?;
    Ok(monitor.serve()?)
}

/// The control socket while it is served: the server ends, then the socket's file goes.
struct Served {
    _server: ServerHandle,
    _socket: ApiSocket,
}

fn monitor(
    endpoint: Endpoint,
    serial_replay: u64,
    opener: Arc<Opener>,
) -> anyhow::Result<(Monitor, Option<Served>)> {
    let Endpoint { place, mut options } = endpoint;
    options.serial_replay = usize::try_from(serial_replay).unwrap_or(usize::MAX);
    let strict = options.strict;
    let monitor =
        Monitor::new(MODELS, Arc::clone(&opener), options).context("the monitor cannot start")?;
    let Some(place) = place else {
        return Ok((monitor, None));
    };
    let socket = ApiSocket::listen(&place, &opener).context("--api-socket")?;
    let listener = socket.listener.try_clone().context("--api-socket")?;
    let options = ServerOptions {
        strict,
        ..ServerOptions::default()
    };
    let server = api::http::serve(listener, Arc::new(monitor.handle()), options)
        .context("no thread for --api-socket")?;
    let served = Served {
        _server: server,
        _socket: socket,
    };
    Ok((monitor, Some(served)))
}
