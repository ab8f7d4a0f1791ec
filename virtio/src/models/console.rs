//! The console device (Virtio 1.2, section 5.3): a console, and ports that the
//! guest finds by their names.
//!
//! # Contract
//!
//! * Port 0 is the console, where there is one; the named ports follow in their
//!   order. With the console alone the device has its two queues and no others; with names it
//!   has room for more ports and tells of them through its control queues.
//! * What a guest writes goes to the port's end on the host ([`HostEnd`]) in
//!   order and without gaps. An end that takes no more makes the port wait, and nothing else: no
//!   vCPU, no other port, no stop. What is written while nobody is there is
//!   dropped and counted.
//! * What comes from the host is read only when the guest has the port open and has
//!   given a buffer for it; until then it waits where it is.
//! * The driver is told when somebody comes and goes on the host, and that they
//!   were two when one goes and another comes.
//! * Named ports come and go while the machine runs, as far as there is room for them.
//! * Whatever a driver asks for, what it is still to be told is bounded: a few
//!   messages for each port.
//!
//! One worker serves all queues. It holds the ports while it works, which is
//! never long, and not while it sleeps.

mod change;
mod port;
pub mod spec;
mod state;
mod worker;

use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::device::{
    ActivateError, Activation, Counters, Identity, Preparation, Prepared, ReconfigureError,
    Reconfigured, StoppedQueue, VirtioDevice, read_space,
};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::worker::Workers;

pub use port::{HostEnd, Look, NoPorts, PortHost, Size};
use state::{Port, Shared, Tally, Untold};
use worker::{Service, Worker};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "console",
    flag: "virtio-console",
    about: "the device of --console and --port, which add it by themselves",
    fields: &[
        Field {
            name: "console",
            kind: FieldKind::Switch,
            required: false,
            help: "whether its first port is the console hvc0; default on",
        },
        Field {
            name: "ports",
            kind: FieldKind::Text,
            required: false,
            help: "names of its other ports, with ':' between them; default none",
        },
        Field {
            name: "max_ports",
            kind: FieldKind::Number,
            required: false,
            help: "for how many ports there is room, the console's included: more can come later; default 8, or 1 without names",
        },
    ],
    build,
};

/// The most ports of a device, the console's place included.
pub const MAX_PORTS: usize = 31;

/// The places for ports of a device that has names, unless it needs more.
const SOME_PORTS: usize = 8;

/// The longest name of a port, in bytes.
pub const MAX_NAME: usize = 64;

const QUEUE_SIZE: u16 = 64;

/// What lies between the names of ports.
pub const SEPARATOR: char = ':';

/// The configuration of a console device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Whether port 0 is there, which is a console.
    #[serde(default = "yes")]
    pub console: bool,
    /// The names of the other ports with [`SEPARATOR`] between them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ports: String,
    /// For how many ports there is room, the console's place included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_ports: Option<u64>,
}

const fn yes() -> bool {
    true
}

impl ConsoleConfig {
    /// The names of the ports.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] for a name that is none, is there twice, or is one too many.
    pub fn names(&self) -> Result<Vec<&str>, BuildError> {
        let refused = |reason| BuildError::Field {
            field: "ports",
            reason,
        };
        let mut names = Vec::new();
        for name in self.ports.split_terminator(SEPARATOR) {
            if !is_port_name(name) {
                return Err(refused(format!(
                    "'{name}' is no name of a port: it has 1 to {MAX_NAME} letters, digits, '.', '_' or '-'"
                )));
            }
            if names.contains(&name) {
                return Err(refused(format!("'{name}' is there twice: leave one out")));
            }
            names.push(name);
        }
        if names.len() >= MAX_PORTS {
            let count = names.len();
            let most = MAX_PORTS - 1;
            return Err(refused(format!(
                "{count} ports: at most {most} have names: leave some out"
            )));
        }
        Ok(names)
    }

    /// For how many ports the device has room.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] as for [`ConsoleConfig::names`], and for too little room or too much.
    pub fn places(&self) -> Result<usize, BuildError> {
        let names = self.names()?.len();
        let needed = names + 1;
        let Some(wanted) = self.max_ports else {
            return Ok(match names {
                0 => 1,
                count if count < SOME_PORTS => SOME_PORTS,
                _ => MAX_PORTS,
            });
        };
        let places = usize::try_from(wanted).unwrap_or(usize::MAX);
        if (needed..=MAX_PORTS).contains(&places) {
            return Ok(places);
        }
        Err(BuildError::Field {
            field: "max_ports",
            reason: format!(
                "{wanted} is too few or too many: it is {needed} to {MAX_PORTS}, the console's place included"
            ),
        })
    }
}

/// Whether a port may be called so: 1 to [`MAX_NAME`] letters, digits, `.`, `_` and `-`.
#[must_use]
pub fn is_port_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain)
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: ConsoleConfig = parse(MODEL.kind, config)?;
    let host = Arc::clone(&context.ports);
    Ok(Box::new(Console::new(&context.id, &config, host)?))
}

/// A console device.
pub struct Console {
    id: String,
    host: Arc<dyn PortHost>,
    /// How many ports there may be.
    places: usize,
    workers: Workers,
    tally: Arc<Tally>,
    shared: Arc<Shared>,
}

impl Console {
    /// Makes the device `id`, whose ports lead to the ends that `host` has.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] for names that cannot be had.
    pub fn new(
        id: &str,
        config: &ConsoleConfig,
        host: Arc<dyn PortHost>,
    ) -> Result<Self, BuildError> {
        let names = config.names()?;
        let places = config.places()?;
        let console = config.console.then(|| Port::new(None));
        let named = names.iter().map(|name| Port::new(Some((*name).to_owned())));
        let mut ports: Vec<_> = [console].into_iter().chain(named.map(Some)).collect();
        ports.resize_with(places, || None);
        Ok(Self {
            id: id.to_owned(),
            host,
            places,
            workers: Workers::new("console", id),
            tally: Arc::default(),
            shared: Arc::new(Shared::new(ports)),
        })
    }

    fn multiport(&self) -> bool {
        self.places > 1
    }

    fn config(&self) -> [u8; 12] {
        let Size { cols, rows } = self.shared.size();
        let ports = u32::try_from(self.places).unwrap_or(1);
        let mut config = [0; 12];
        let words = [cols.to_le_bytes(), rows.to_le_bytes()].concat();
        let all = words.into_iter().chain(ports.to_le_bytes());
        for (to, from) in config.iter_mut().zip(all) {
            *to = from;
        }
        config
    }

    /// A byte for the console from a driver that has set nothing up (5.3.4).
    fn emergency(&self, byte: u8) {
        let mut ports = self.shared.ports();
        let Some(Some(console)) = ports.first_mut() else {
            return;
        };
        let written = console.end(&*self.host).and_then(|end| end.write(&[byte]));
        let counter = match written {
            Ok(_) => &self.tally.tx_bytes,
            Err(_) => &self.tally.dropped_bytes,
        };
        Tally::add(counter, 1);
    }
}

impl VirtioDevice for Console {
    fn identity(&self) -> Identity {
        let several = if self.multiport() {
            spec::F_MULTIPORT
        } else {
            0
        };
        let queues = match self.places {
            1 => 2,
            places => 2 * places + 2,
        };
        Identity {
            device_type: u16::try_from(VIRTIO_ID_CONSOLE).unwrap_or_default(),
            features: spec::F_SIZE | spec::F_EMERG_WRITE | several,
            queue_sizes: vec![QUEUE_SIZE; queues],
            // A simple communication controller of no other kind.
            pci_class: [0x07, 0x80, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.tally) as Arc<dyn Counters>)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset == spec::EMERG_WR
            && let Some(byte) = data.first()
        {
            self.emergency(*byte);
        }
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        for port in self.shared.ports().iter_mut().flatten() {
            if port.is_leaving() {
                continue;
            }
            port.stirred = true;
            let open = port.guest_open;
            let end = port.end(&*self.host).map_err(|error| ActivateError {
                what: "a port's end",
                reason: error.to_string(),
            })?;
            end.guest_opened(open);
        }
        let service = Service {
            id: self.id.clone(),
            features,
            memory,
            notifier: Arc::clone(&notifier),
            shared: Arc::clone(&self.shared),
            tally: Arc::clone(&self.tally),
        };
        self.workers.start(&notifier, vec![queues], |queues, wake| {
            Worker::new(service.clone(), queues, wake).map_err(|error| ActivateError {
                what: "the console's worker",
                reason: error.to_string(),
            })
        })
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.workers.stop(deadline)
    }

    fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        change::plan(patch, &*context.ports)
    }

    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        self.change(prepared)
    }

    fn reset(&mut self) {
        self.shared.set_ready(false);
        state::forget_all(&mut self.shared.ports());
    }
}

/// A port that a driver may know.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are the registers of the port, independent of each other"
)]
pub struct PortV1 {
    /// Its number.
    pub number: u32,
    /// Its name: another port is not the guest's port.
    pub name: Option<String>,
    /// The driver has been told that the device has it.
    pub known: bool,
    /// The driver has taken it into use.
    pub ready: bool,
    /// The guest has it open.
    pub guest_open: bool,
    /// The driver knows that somebody is there on the host.
    pub told_open: bool,
    /// The one of whom it knows has gone.
    pub cycled: bool,
    /// The driver is still to be told that the device has the port.
    pub tell_add: bool,
    /// The same for that the device has it no more.
    pub tell_remove: bool,
    /// The same for that it is a console.
    pub tell_console: bool,
    /// The same for its name.
    pub tell_name: bool,
    /// The same for its size.
    pub tell_size: bool,
    /// How many bytes have gone of the chain that is sent next.
    pub sent: u64,
}

/// The saved state of a console device.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleV1 {
    /// The size that configuration space shows.
    pub cols: u16,
    /// See `cols`.
    pub rows: u16,
    /// The driver has asked which ports there are.
    pub ready: bool,
    /// The ports.
    pub ports: Vec<PortV1>,
}

impl SavedState for ConsoleV1 {
    const SCHEMA: &'static str = "virtio-console";
    const VERSION: u16 = 1;
}

impl Snapshot for Console {
    type State = ConsoleV1;

    fn save(&self) -> Result<ConsoleV1, SaveError> {
        let Size { cols, rows } = self.shared.size();
        let ports = self.shared.ports();
        let there = (0..).zip(ports.iter());
        let ports = there.filter_map(|(number, port)| Some(saved(number, port.as_ref()?)));
        Ok(ConsoleV1 {
            cols,
            rows,
            ready: self.shared.is_ready(),
            ports: ports.collect(),
        })
    }

    fn restore(&mut self, state: ConsoleV1) -> Result<(), RestoreError> {
        let ConsoleV1 {
            cols,
            rows,
            ready,
            ports: saved,
        } = state;
        let mut ports = self.shared.ports();
        let Some(placed) = place(&mut ports, saved) else {
            return Err(RestoreError::Invalid {
                schema: ConsoleV1::SCHEMA,
                reason: format!("{} has other ports than the saved machine's", self.id),
            });
        };
        *ports = placed;
        drop(ports);
        self.shared.set_ready(ready);
        self.shared.set_size(Size { cols, rows });
        Ok(())
    }
}

/// Gives each port the number that it had: ports are the same by their names, and come and go while a machine
/// runs. `None`, with all as it was, when they are others.
fn place(ports: &mut [Option<Port>], saved: Vec<PortV1>) -> Option<Vec<Option<Port>>> {
    let stays = |port: &&PortV1| !port.tell_remove;
    let wanted: Vec<_> = saved.iter().filter(stays).map(|port| &port.name).collect();
    let there = ports.iter().flatten().filter(|port| !port.is_leaving());
    let alike = there.clone().count() == wanted.len()
        && there.clone().all(|port| wanted.contains(&&port.name));
    let mut numbers: Vec<_> = saved.iter().map(|port| port.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let fits = |port: &PortV1| {
        let console = port.name.is_none();
        usize::try_from(port.number).is_ok_and(|at| at < ports.len())
            && console == (port.number == 0)
    };
    if !alike || numbers.len() != saved.len() || !saved.iter().all(fits) {
        return None;
    }
    let mut placed = Vec::new();
    placed.resize_with(ports.len(), || None);
    for saved in saved {
        let own = |port: &&mut Option<Port>| port.as_ref().is_some_and(|p| p.name == saved.name);
        let mut port = match ports.iter_mut().find(own) {
            Some(port) if !saved.tell_remove => port.take()?,
            _ => Port::new(saved.name.clone()),
        };
        let number = usize::try_from(saved.number).unwrap_or(usize::MAX);
        put_back(&mut port, saved);
        *placed.get_mut(number)? = Some(port);
    }
    Some(placed)
}

fn saved(number: u32, port: &Port) -> PortV1 {
    let Port {
        name,
        end: _,
        fresh: _,
        stirred: _,
        connected: _,
        cycled,
        told_open,
        known,
        ready,
        guest_open,
        untold,
        sent,
    } = port;
    let Untold {
        add,
        remove,
        console,
        name: tell_name,
        size,
    } = *untold;
    PortV1 {
        number,
        name: name.clone(),
        known: *known,
        ready: *ready,
        guest_open: *guest_open,
        told_open: *told_open,
        cycled: *cycled,
        tell_add: add,
        tell_remove: remove,
        tell_console: console,
        tell_name,
        tell_size: size,
        sent: *sent,
    }
}

fn put_back(port: &mut Port, saved: PortV1) {
    let PortV1 {
        number: _,
        name: _,
        known,
        ready,
        guest_open,
        told_open,
        cycled,
        tell_add,
        tell_remove,
        tell_console,
        tell_name,
        tell_size,
        sent,
    } = saved;
    port.known = known;
    port.ready = ready;
    port.open(guest_open);
    port.told_open = told_open;
    port.cycled = cycled;
    port.untold = Untold {
        add: tell_add,
        remove: tell_remove,
        console: tell_console,
        name: tell_name,
        size: tell_size,
    };
    port.sent = sent;
}

#[cfg(test)]
mod tests;
