//! The socket device (Virtio 1.2, section 5.10): stream sockets between the guest and the host, whose
//! side of them are unix sockets.
//!
//! # Contract
//!
//! * A client on the host connects to the device's socket, says `CONNECT` and a port of the guest in one
//!   line, and is answered `OK` and the port of its own side, once the guest has accepted; otherwise its
//!   socket is closed. What follows goes both ways as it is.
//! * What the guest connects to, at the host's address 2, is the unix socket whose path is the device's
//!   with `_` and the port behind it. Where nobody listens there, or at any other address, it is refused.
//! * Bytes come in order and without gaps, or the connection ends with a reset. Each direction ends by
//!   itself, as `shutdown` has it. What a guest has sent before it ended both reaches a host that is slow to read also
//!   when the guest has forgotten the connection.
//! * Neither side makes the other's connections wait, nor the device: who does not read is sent no
//!   more. For each connection no more than [`BUFFER`] bytes are kept, and there are no more than
//!   [`MAX_CONNECTIONS`].
//! * Who takes too long to say what it wants, to accept, or to end is given up.
//! * Connections live as long as the driver uses the device in this process. One that is restored has none, which
//!   its driver is told.
//!
//! One worker serves all queues. It holds the connections while it works, which is
//! never long, and not while it sleeps.

mod connection;
mod greeting;
mod hub;
pub mod spec;
mod tally;
#[cfg(test)]
mod testing;
mod worker;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use crate::device::{
    ActivateError, Activation, Counters, Identity, StoppedQueue, VirtioDevice, read_space,
};
use crate::limit::Clock;
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::worker::Workers;

pub use connection::BUFFER;
use hub::{Hub, Setup};
pub use hub::{MAX_CONNECTIONS, MAX_GREETINGS};
use tally::Tally;
use worker::{Service, Worker, lock};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "vsock",
    flag: "vsock",
    about: "stream sockets between guest and host, through a unix socket",
    fields: &[
        Field {
            name: "cid",
            kind: FieldKind::Number,
            required: true,
            help: "the guest's address, from 3",
        },
        Field {
            name: "socket",
            kind: FieldKind::Path,
            required: true,
            help: "the unix socket at which clients ask for the guest's ports; the host's port N is SOCKET_N",
        },
    ],
    build,
};

const QUEUE_SIZE: u16 = 256;

/// The configuration of a socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's address: from 3, less than 2^32 - 1.
    pub cid: u64,
    /// The socket of clients on the host.
    pub socket: PathBuf,
}

impl VsockConfig {
    /// Checks the guest's address.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`].
    pub fn check(&self) -> Result<(), BuildError> {
        if spec::is_guest_cid(self.cid) {
            return Ok(());
        }
        Err(BuildError::Field {
            field: "cid",
            reason: format!(
                "{} is no guest's address: 0, 1, 2 and 4294967295 are kept for others: give one from 3 to 4294967294",
                self.cid
            ),
        })
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: VsockConfig = parse(MODEL.kind, config)?;
    let clock: Clock = Arc::new(Instant::now);
    Ok(Box::new(Vsock::new(
        &context.id,
        &config,
        &context.opener,
        clock,
    )?))
}

/// A socket device.
pub struct Vsock {
    workers: Workers,
    guest_cid: u64,
    tally: Arc<Tally>,
    hub: Arc<Mutex<Hub>>,
    clock: Clock,
}

impl Vsock {
    /// Makes the device `id`, which listens at its socket from now on.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] for an address that no guest has, and what the host says of the socket.
    pub fn new(
        id: &str,
        config: &VsockConfig,
        opener: &Arc<dyn block::Opener>,
        clock: Clock,
    ) -> Result<Self, BuildError> {
        config.check()?;
        let failed = |error: std::io::Error| BuildError::Backend(error.into());
        let listening = opener.listen(&config.socket).map_err(failed)?;
        let tally = Arc::new(Tally::default());
        let setup = Setup {
            id: id.to_owned(),
            guest_cid: config.cid,
            path: config.socket.clone(),
            opener: Arc::clone(opener),
            tally: Arc::clone(&tally),
        };
        let hub = Hub::new(setup, listening).map_err(failed)?;
        Ok(Self {
            workers: Workers::new("vsock", id),
            guest_cid: config.cid,
            tally,
            hub: Arc::new(Mutex::new(hub)),
            clock,
        })
    }
}

impl VirtioDevice for Vsock {
    fn identity(&self) -> Identity {
        Identity {
            device_type: u16::try_from(VIRTIO_ID_VSOCK).unwrap_or_default(),
            features: spec::F_STREAM,
            queue_sizes: vec![QUEUE_SIZE; spec::QUEUES],
            // A communication device of no other kind.
            pci_class: [0x07, 0x80, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::clone(&self.tally) as Arc<dyn Counters>)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        let service = Service {
            features,
            memory,
            notifier: Arc::clone(&notifier),
            hub: Arc::clone(&self.hub),
            clock: Arc::clone(&self.clock),
        };
        self.workers.start(&notifier, vec![queues], |queues, wake| {
            Worker::new(service.clone(), queues, wake).map_err(|error| ActivateError {
                what: "the worker of the sockets",
                reason: error.to_string(),
            })
        })
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        self.workers.stop(deadline)
    }

    fn reset(&mut self) {
        lock(&self.hub).forget();
    }
}

/// The saved state of a socket device. Its connections stay behind: their ends are sockets of this host.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockV1 {
    /// The address that the guest knows. Not put back: its driver is told to look again.
    pub guest_cid: u64,
}

impl SavedState for VsockV1 {
    const SCHEMA: &'static str = "virtio-vsock";
    const VERSION: u16 = 1;
}

impl Snapshot for Vsock {
    type State = VsockV1;

    fn save(&self) -> Result<VsockV1, SaveError> {
        Ok(VsockV1 {
            guest_cid: self.guest_cid,
        })
    }

    fn restore(&mut self, state: VsockV1) -> Result<(), RestoreError> {
        let VsockV1 { guest_cid } = state;
        if !spec::is_guest_cid(guest_cid) {
            return Err(RestoreError::Invalid {
                schema: VsockV1::SCHEMA,
                reason: format!("{guest_cid} is no guest's address"),
            });
        }
        let mut hub = lock(&self.hub);
        hub.forget();
        hub.reset_untold = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
