//! The sinks of the serial port, as the control socket lists and changes them.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use api::{ControlError, ErrorKind, wire};
use virtio::models::Model;

use super::view::not_created;
use crate::config::serial::SinkError;
use crate::config::{SerialConfig, SinkConfig, files};
use crate::console::{ConsoleError, ConsoleHub, SinkId, SinkInfo, SinkKind};
use crate::machine::driver::Ears;
use crate::machine::fault;
use crate::opener::Opener;

/// The sinks there are, in the order in which they came.
#[must_use]
pub fn list(hub: &ConsoleHub) -> Vec<wire::ConsoleSink> {
    let sink = |info: SinkInfo| wire::ConsoleSink {
        id: info.id.to_string(),
        kind: info.kind.as_str().to_owned(),
        path: info.path.map(|path| path.display().to_string()),
        clients: u64::try_from(info.clients).unwrap_or(u64::MAX),
        waiting: info.waiting,
        lost: info.lost,
    };
    hub.list().into_iter().map(sink).collect()
}

/// The far ends of the pseudo-terminals.
pub fn ptys(hub: &ConsoleHub) -> impl Iterator<Item = String> {
    let ptys = hub.list().into_iter();
    ptys.filter(|sink| sink.kind == SinkKind::Pty)
        .filter_map(|sink| Some(sink.path?.display().to_string()))
}

/// The far end of the first pseudo-terminal, where there is one.
#[must_use]
pub fn first_pty(hub: &ConsoleHub) -> Option<String> {
    ptys(hub).next()
}

/// A stream to the port, with `replay` first the last of what was written before.
///
/// # Errors
///
/// [`ErrorKind::Busy`] when there are as many clients as can be, [`ErrorKind::Conflict`] when the
/// monitor ends, and [`ErrorKind::Failed`] when the host is out of descriptors.
pub fn attach(hub: &ConsoleHub, replay: bool) -> Result<UnixStream, ControlError> {
    let (near, far) =
        UnixStream::pair().map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    hub.attach(far, replay).map_err(|error| refused(&error))?;
    Ok(near)
}

/// There is no serial port.
#[must_use]
pub fn no_port(kind: ErrorKind) -> ControlError {
    ControlError::new(
        kind,
        "the machine has no serial port: its mode is Off: start it with --serial, for example --serial null",
    )
}

/// That a path means the same to the client as to the monitor, whose directories are two.
fn check_path(text: &str, sink: &SinkConfig) -> Result<(), ControlError> {
    let path = match sink {
        SinkConfig::File(file) => &file.path,
        SinkConfig::Socket(socket) => &socket.path,
        SinkConfig::Tty | SinkConfig::Pty | SinkConfig::Null => return Ok(()),
    };
    if path.is_absolute() {
        return Ok(());
    }
    let message = format!("{text}: the path is not absolute: give the whole path, from / on");
    Err(ControlError::new(ErrorKind::Invalid, message))
}

/// Adds or removes a sink, and takes it up into the description, so that the next boot has it
/// too. Files and sockets are opened here.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] without a description and for a sink that is not there; [`ErrorKind::Invalid`]
/// for what is no sink; [`ErrorKind::Conflict`] without a port, for one sink too many and a file that is in use;
/// [`ErrorKind::Failed`] for what the host refuses. Nothing has changed then.
pub fn change(
    ears: &mut Ears,
    models: &'static [Model],
    opener: &Arc<Opener>,
    request: &wire::VmConsole,
) -> Result<(), ControlError> {
    let hub = ears.consoles.serial();
    let description = ears.description.as_mut().ok_or_else(not_created)?;
    let SerialConfig::Sinks(sinks) = &description.config.serial else {
        return Err(no_port(ErrorKind::Conflict));
    };
    let mut sinks = sinks.clone();
    match request {
        wire::VmConsole::Add(text) => {
            let sink = read(text)?;
            sinks.push(sink.clone());
            SerialConfig::Sinks(sinks.clone())
                .validate()
                .map_err(|error| broken(&error))?;
            check_path(text, &sink)?;
            let mut grown = description.config.clone();
            grown.serial = SerialConfig::Sinks(sinks.clone());
            grown
                .validate_consoles()
                .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            let own = ears.consoles.reserved();
            files::check_sink(&description.config, models, opener, own, &sink)
                .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
            let info = hub.add(&sink, opener).map_err(|error| refused(&error))?;
            hub.adopt(info.id);
        }
        wire::VmConsole::Remove(id) => {
            let id: SinkId = id
                .parse()
                .map_err(|error| ControlError::from_error(ErrorKind::Invalid, &error))?;
            let config = hub.config_of(id);
            hub.remove(id).map_err(|error| refused(&error))?;
            let named = |config| sinks.iter().position(|sink| *sink == config);
            if let Some(index) = config.and_then(named) {
                sinks.remove(index);
            }
        }
    }
    description.config.serial = SerialConfig::Sinks(sinks);
    description.wire.serial = (&description.config.serial).into();
    Ok(())
}

fn read(text: &str) -> Result<SinkConfig, ControlError> {
    if text.contains('\0') {
        let message = "a sink's path holds a zero byte";
        return Err(ControlError::new(ErrorKind::Invalid, message));
    }
    text.parse().map_err(|error| broken(&error))
}

fn broken(error: &SinkError) -> ControlError {
    let kind = match error {
        SinkError::TwoTerminals | SinkError::TooMany { .. } => ErrorKind::Conflict,
        _ => ErrorKind::Invalid,
    };
    ControlError::from_error(kind, error)
}

fn refused(error: &ConsoleError) -> ControlError {
    let kind = match error {
        ConsoleError::Config(_) => ErrorKind::Invalid,
        ConsoleError::Unknown { .. } => ErrorKind::NotFound,
        ConsoleError::TerminalTaken | ConsoleError::TooManySinks | ConsoleError::Closed => {
            ErrorKind::Conflict
        }
        ConsoleError::TooManyClients | ConsoleError::TooManyFiles => ErrorKind::Busy,
        ConsoleError::Open(error) => fault::of(error),
        ConsoleError::Host { .. } => ErrorKind::Failed,
    };
    ControlError::from_error(kind, error)
}
