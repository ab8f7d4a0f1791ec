//! The host's ends of a machine's consoles and ports.
//!
//! They are had in three steps, because opening takes as long as storage does: [`Wanted::new`] says what is missing,
//! [`Wanted::open`] opens it beside the control thread, and [`Hosts::connect`] puts it into its place.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::MachineError;
use super::inbox::{Mailbox, Message};
use crate::config::port::AGENT;
use crate::config::serial::FileSink;
use crate::config::{
    COMS, CONSOLE_FLAGS, DebugconConfig, PortConfig, SerialConfig, SinkConfig, VmConfig,
};
use crate::console::port::{self as ends, HubEnd, HubPort, OpenPort, PortBoard, SocketEnd};
use crate::console::{ConsoleError, ConsoleHub, Consoles, OpenedSink, SinkKind};
use crate::notice;
use crate::opener::Opener;

/// What is to be opened.
pub struct Wanted {
    /// By the flag, with its hub.
    sinks: Vec<(&'static str, ConsoleHub, Vec<SinkConfig>)>,
    ports: Vec<PortConfig>,
}

/// What has been opened. Dropping it closes everything.
pub struct OpenHosts {
    sinks: Vec<(&'static str, ConsoleHub, Vec<OpenedSink>)>,
    ports: Vec<(String, OpenPort)>,
}

fn failed(flag: &'static str) -> impl Fn(ConsoleError) -> MachineError {
    move |source| MachineError::Console { flag, source }
}

impl Wanted {
    /// What the configuration names and is not open already. Sinks that it no longer names are removed.
    #[must_use]
    pub fn new(config: &VmConfig, consoles: &Consoles) -> Self {
        let file = match &config.debugcon {
            DebugconConfig::File(path) => Some(SinkConfig::File(FileSink::new(path))),
            DebugconConfig::Off | DebugconConfig::Stdio => None,
        };
        let hubs = consoles.hubs().into_iter().zip(CONSOLE_FLAGS);
        let sinks = config.consoles().into_iter().map(SerialConfig::sinks);
        let sinks = hubs.zip(sinks);
        let debugcon = ((consoles.debugcon(), "--debugcon"), file.as_slice());
        let sinks = sinks.chain([debugcon]);
        Self {
            sinks: sinks
                .map(|((hub, flag), wanted)| (flag, hub.clone(), hub.keep(wanted)))
                .collect(),
            ports: config.ports.clone(),
        }
    }

    /// Opens it, and nothing more once it is not `needed`. Not on the control thread.
    ///
    /// # Errors
    ///
    /// [`MachineError::Console`], naming the flag; what was opened is closed then.
    pub fn open(
        self,
        opener: &Arc<Opener>,
        needed: &dyn Fn() -> bool,
    ) -> Result<OpenHosts, MachineError> {
        let mut sinks = Vec::new();
        for (flag, hub, missing) in self.sinks {
            let opened = hub.open_each(missing, opener, needed);
            let opened = opened.map_err(failed(flag))?;
            sinks.push((flag, hub, opened));
        }
        let mut ports = Vec::new();
        for port in self.ports {
            if !needed() {
                break;
            }
            if let Some(opened) = ends::open(&port, opener).map_err(failed("--port"))? {
                ports.push((port.name, opened));
            }
        }
        Ok(OpenHosts { sinks, ports })
    }
}

/// The host's ends of the consoles that the machine has.
pub struct Hosts {
    /// Those of the serial ports that there are.
    pub serials: [Option<ConsoleHub>; COMS],
    /// What gives input to the virtio console.
    pub console: Option<(ConsoleHub, Arc<HubPort>)>,
    /// The debug console's, where there is one.
    pub debugcon: Option<ConsoleHub>,
}

impl Hosts {
    /// Puts what has been opened into its place. The ends of virtio ports are left with `board`.
    ///
    /// # Errors
    ///
    /// [`MachineError::Console`], naming the flag.
    pub fn connect(
        config: &VmConfig,
        opened: OpenHosts,
        opener: &Arc<Opener>,
        consoles: &Consoles,
        (board, mailbox): (&PortBoard, &Mailbox),
    ) -> Result<Self, MachineError> {
        for hub in consoles.hubs() {
            let mailbox = mailbox.clone();
            hub.on_end(Arc::new(move || {
                mailbox.send(Message::ConsoleEnd);
            }));
        }
        for (flag, hub, sinks) in opened.sinks {
            hub.take_up(sinks, opener).map_err(failed(flag))?;
        }
        add_stdout(&config.debugcon, opener, consoles.debugcon()).map_err(failed("--debugcon"))?;
        for (name, OpenPort { end, pty }) in opened.ports {
            board.put(Some(&name), end);
            if let Some(path) = pty {
                let path = path.display();
                notice::tell(format_args!("the port {name} is at {path}"));
            }
        }
        open_agent(config, consoles, board)?;
        let serials = config.serials().into_iter().zip(consoles.hubs());
        let mut serials = serials.map(|(port, hub)| port.is_on().then(|| hub.clone()));
        Ok(Self {
            serials: std::array::from_fn(|_| serials.next().flatten()),
            console: virtio_console(config, consoles, board)?,
            debugcon: (config.debugcon != DebugconConfig::Off).then(|| consoles.debugcon().clone()),
        })
    }
}

/// Has the agent's desk be the end of the agent's port, where that leads nowhere else.
fn open_agent(
    config: &VmConfig,
    consoles: &Consoles,
    board: &PortBoard,
) -> Result<(), MachineError> {
    consoles.agent().disconnect();
    if config.has_agent() {
        connect_agent(consoles, board)?;
    }
    Ok(())
}

/// Has the agent's desk be the end of the port that is left with `board`.
///
/// # Errors
///
/// The host's, when it is out of descriptors.
pub(super) fn connect_agent(consoles: &Consoles, board: &PortBoard) -> Result<(), MachineError> {
    let made = UnixStream::pair().and_then(|(near, far)| Ok((near, SocketEnd::stream(far)?)));
    let (near, (end, guest)) = made.map_err(|source| MachineError::Host {
        what: "the guest agent's port cannot be made",
        source,
    })?;
    board.put(Some(AGENT), Box::new(end));
    consoles.agent().connect(near, guest);
    Ok(())
}

/// Leaves the end of the virtio console with `board`, where there is one.
fn virtio_console(
    config: &VmConfig,
    consoles: &Consoles,
    board: &PortBoard,
) -> Result<Option<(ConsoleHub, Arc<HubPort>)>, MachineError> {
    if !config.console.is_on() {
        return Ok(None);
    }
    let [.., hub] = consoles.hubs();
    let (end, port) = HubEnd::new(hub).map_err(|source| MachineError::Host {
        what: "the console cannot be used",
        source,
    })?;
    board.put(None, Box::new(end));
    Ok(Some((hub.clone(), port)))
}

/// The debug console's standard output, where it is to have that and has not.
fn add_stdout(
    config: &DebugconConfig,
    opener: &Arc<Opener>,
    hub: &ConsoleHub,
) -> Result<(), ConsoleError> {
    let is_there = hub.list().iter().any(|sink| sink.kind == SinkKind::Tty);
    if *config == DebugconConfig::Stdio && !is_there {
        hub.add_stdout(opener)?;
    }
    Ok(())
}
