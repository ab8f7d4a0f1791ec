//! The sinks of the consoles, as the control socket lists and changes them.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{ControlError, ErrorKind, wire};
use virtio::models::Model;

use super::view::not_created;
use crate::config::files::OwnFiles;
use crate::config::serial::SinkError;
use crate::config::{COMS, SerialConfig, SinkConfig, VmConfig, files};
use crate::console::{ConsoleError, ConsoleHub, OpenSink, SinkId, SinkInfo, SinkKind, hub_of};
use crate::machine::beside::put_away;
use crate::machine::driver::Ears;
use crate::machine::fault;
use crate::opener::Opener;

/// The sinks there are, of one console after the other, in the order in which they came.
#[must_use]
pub fn list(hubs: &[ConsoleHub; COMS + 1]) -> Vec<wire::ConsoleSink> {
    let ports = wire::ConsolePort::ALL.into_iter().zip(hubs);
    ports
        .flat_map(|((_, port), hub)| list_of(port, hub))
        .collect()
}

fn list_of(port: wire::ConsolePort, hub: &ConsoleHub) -> impl Iterator<Item = wire::ConsoleSink> {
    let sink = move |info: SinkInfo| wire::ConsoleSink {
        id: info.id.to_string(),
        port,
        kind: info.kind.as_str().to_owned(),
        path: info.path.map(|path| path.display().to_string()),
        clients: u64::try_from(info.clients).unwrap_or(u64::MAX),
        waiting: info.waiting,
        lost: info.lost,
    };
    hub.list().into_iter().map(sink)
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

/// As [`attach`], with the last of what was written before, whose length comes along.
///
/// # Errors
///
/// The same.
pub fn attach_late(hub: &ConsoleHub) -> Result<(UnixStream, u64), ControlError> {
    let (near, far) =
        UnixStream::pair().map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))?;
    let sink = hub.attach(far, true).map_err(|error| refused(&error))?;
    Ok((near, sink.waiting))
}

/// There is no such console.
#[must_use]
pub fn no_port(kind: ErrorKind, port: wire::ConsolePort) -> ControlError {
    let message = match port {
        wire::ConsolePort::Serial => {
            "the machine has no serial port: its mode is Off: start it with --serial, for example --serial null".to_owned()
        }
        port => {
            let name = port.as_str();
            format!("the machine has no console '{name}': start it with --{name}, for example --{name} null")
        }
    };
    ControlError::new(kind, message)
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

/// A change of the sinks that makes sense.
pub enum Change {
    /// A sink that is to be opened first.
    Sink(Box<Planned>),
    /// One that can be made at once.
    Ready(Ready),
}

/// A sink that is to be opened.
pub struct Planned {
    port: wire::ConsolePort,
    sink: SinkConfig,
    config: VmConfig,
    own: OwnFiles,
    hub: ConsoleHub,
    dump: Option<PathBuf>,
}

/// What [`finish`] takes up.
pub enum Ready {
    /// A sink that has been opened.
    Opened(wire::ConsolePort, SinkConfig, Box<OpenSink>),
    /// A sink of that console that is to go.
    Removed(wire::ConsolePort, SinkId),
}

impl Planned {
    /// It is to keep clear of the core dump that is being written to `path`.
    pub fn spare(&mut self, path: &Path) {
        self.dump = Some(path.to_owned());
    }

    /// Looks whether its file is its own, and opens it. Not on the control thread: the host may take long.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Conflict`] for a file that is in use; [`ErrorKind::Failed`] for what the host refuses.
    pub fn open(
        mut self,
        models: &'static [Model],
        opener: &Arc<Opener>,
    ) -> Result<Ready, ControlError> {
        if let Some(path) = &self.dump {
            self.own.add(path, files::DUMP);
        }
        files::check_sink(&self.config, models, opener, &self.own, &self.sink)
            .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
        let opened = self.hub.open(&self.sink, opener);
        let opened = opened.map_err(|error| refused(&error))?;
        Ok(Ready::Opened(self.port, self.sink, Box::new(opened)))
    }
}

/// The sinks of a console that are described.
fn described(
    ears: &Ears,
    port: wire::ConsolePort,
) -> Result<(&VmConfig, &[SinkConfig]), ControlError> {
    let description = ears.description.as_ref().ok_or_else(not_created)?;
    match hub_of(description.config.consoles(), port) {
        SerialConfig::Sinks(sinks) => Ok((&description.config, sinks)),
        SerialConfig::Off => Err(no_port(ErrorKind::Conflict, port)),
    }
}

/// The console that has a sink.
fn home(ears: &Ears, id: SinkId) -> Option<wire::ConsolePort> {
    let hubs = ears.consoles.hubs();
    let mut ports = wire::ConsolePort::ALL.into_iter().zip(hubs);
    let has = |hub: &ConsoleHub| hub.list().iter().any(|sink| sink.id == id);
    ports.find(|(_, hub)| has(hub)).map(|((_, port), _)| port)
}

/// The sinks with one more.
fn grown(
    ears: &Ears,
    port: wire::ConsolePort,
    sink: &SinkConfig,
) -> Result<SerialConfig, ControlError> {
    let (config, sinks) = described(ears, port)?;
    let serial = SerialConfig::Sinks([sinks, std::slice::from_ref(sink)].concat());
    serial.validate().map_err(|error| broken(&error))?;
    let mut grown = config.clone();
    *hub_of(grown.consoles_mut(), port) = serial.clone();
    grown
        .validate_consoles()
        .map_err(|error| ControlError::from_error(ErrorKind::Conflict, &error))?;
    Ok(serial)
}

/// Begins to add or remove a sink.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] without a description; [`ErrorKind::Invalid`] for what is no sink;
/// [`ErrorKind::Conflict`] without a port and for one sink too many.
pub fn begin(ears: &Ears, request: wire::VmConsole) -> Result<Change, ControlError> {
    Ok(match request {
        wire::VmConsole::Add(text, port) => {
            let (config, _) = described(ears, port)?;
            let sink = read(&text)?;
            grown(ears, port, &sink)?;
            check_path(&text, &sink)?;
            Change::Sink(Box::new(Planned {
                port,
                sink,
                config: config.clone(),
                own: ears.consoles.reserved().clone(),
                hub: ears.consoles.hub(port).clone(),
                dump: None,
            }))
        }
        wire::VmConsole::Remove(id) => {
            let id = id.parse();
            let id = id.map_err(|error| ControlError::from_error(ErrorKind::Invalid, &error))?;
            // One that is nowhere is told of by the first.
            let port = home(ears, id).unwrap_or_default();
            described(ears, port)?;
            Change::Ready(Ready::Removed(port, id))
        }
    })
}

/// Makes the change, and takes it up into the description, so that the next boot has it too. What has been opened is
/// looked at once more: others may have come or gone meanwhile.
///
/// # Errors
///
/// As [`begin`], and [`ErrorKind::NotFound`] for a sink that is not there. Nothing has changed then.
pub fn finish(ears: &mut Ears, ready: Ready) -> Result<(), ControlError> {
    let (Ready::Opened(port, ..) | Ready::Removed(port, _)) = ready;
    let hub = ears.consoles.hub(port);
    let serial = match ready {
        Ready::Opened(_, sink, opened) => {
            let serial = match grown(ears, port, &sink) {
                Ok(serial) => serial,
                Err(error) => {
                    put_away(opened);
                    return Err(error);
                }
            };
            let info = hub.put(&sink, *opened).map_err(|error| refused(&error))?;
            hub.adopt(info.id);
            serial
        }
        Ready::Removed(_, id) => {
            let mut sinks = described(ears, port)?.1.to_vec();
            let config = hub.config_of(id);
            hub.remove(id).map_err(|error| refused(&error))?;
            let named = |config| sinks.iter().position(|sink| *sink == config);
            if let Some(index) = config.and_then(named) {
                sinks.remove(index);
            }
            SerialConfig::Sinks(sinks)
        }
    };
    let description = ears.description.as_mut().ok_or_else(not_created)?;
    *hub_of(description.config.consoles_mut(), port) = serial;
    description.config.show_console(port, &mut description.wire);
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
    ControlError::from_error(fault::of(error), error)
}
