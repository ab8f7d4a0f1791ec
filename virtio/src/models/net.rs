//! The network device (Virtio 1.2, section 5.1).
//!
//! * [`NetConfig`]: how one is described; [`MODEL`] builds it.
//! * [`Net`]: configuration space, features, and the workers.
//! * `kernel`: what has the host's kernel serve pairs instead of workers (vhost-net).
//! * `launch`: who serves the pairs, and how that changes hands.
//! * `mirror`: where copies of its frames go.
//! * `change`: what of it can be changed in use; `saved`: what is kept of it.
//! * `shared`: what the workers and the device share; `filter`: which frames the driver
//!   wants; `control`: the control queue.
//! * `worker`: one for each pair of queues; `receive` and `transmit`: its halves;
//!   `reach`: how much room a call offers; `pieces`: chains as memory; `tally`: what it counts; `spec`: the layouts.
//!
//! # Queues
//!
//! Pair N has the queues 2N (to the guest) and 2N+1 (from it). The control
//! queue is behind the last pair if the driver accepted several of them, else it is queue 2 (5.1.2).
//!
//! # Link
//!
//! The link is down while it is set so from outside, and from when the network
//! vanishes. Frames of either direction are dropped then, and the guest goes on.

use std::sync::Arc;
use std::time::Instant;

use devices::StopError;
use net::{Backend, HEADER_LEN, MacAddress, Offloads};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::IntoBytes;

use self::control::{guest_offload_bits, guest_offloads};
use self::kernel::Engines;
use self::receive::Shape;
use self::shared::{Cable, Shared};
use self::spec::{ConfigSpace, LINK_AT, MAX_FRAME, TAGGED_LEN, USUAL_MTU};
use self::tally::Tallies;
use crate::device::{
    ActivateError, Activation, Counters, Identity, Notifier, Preparation, Prepared,
    ReconfigureError, Reconfigured, StoppedQueue, VirtioDevice, read_space,
};
use crate::limit::{Clock, Limiter};
use crate::memory::GuestMemory;
use crate::models::BuildContext;
use crate::worker::Workers;

mod change;
mod config;
pub(in crate::models) mod control;
mod filter;
mod kernel;
mod launch;
mod mirror;
mod pieces;
mod reach;
mod receive;
mod saved;
mod shared;
pub(super) mod spec;
mod tally;
#[cfg(test)]
mod tests;
mod transmit;
mod worker;

pub use self::config::{MODEL, NetConfig, NetLimits, RX_KEYS, TX_KEYS, Vhost, random_mac};
pub use self::saved::{NetV1, NetV2};

/// What the guest sees of a network device, beside its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetSettings {
    /// The address.
    pub mac: MacAddress,
    /// How many pairs of queues, from 1; as many as the network has.
    pub pairs: u16,
    /// Size of each queue: a power of two from 4 to 32768.
    pub queue_size: u16,
    /// The largest packet, in bytes, where it is stated.
    pub mtu: Option<u16>,
    /// Work that may be left to the other side, where the network can do it.
    pub offloads: Offloads,
}

/// A network device.
pub struct Net {
    settings: NetSettings,
    /// What the network can do, of what is allowed.
    offloads: Offloads,
    shared: Arc<Shared>,
    /// The limits of frames to the guest.
    rx_limits: Arc<Limiter>,
    /// And of those from it.
    tx_limits: Arc<Limiter>,
    tallies: Arc<Tallies>,
    workers: Workers,
    /// What has the host's kernel serve the pairs, where it is to.
    engines: Option<Arc<Engines>>,
    /// Changes that it could not follow are refused, rather than followed by workers.
    only_kernel: bool,
    /// It does.
    by_kernel: bool,
    /// It is not to for now: it does not tell what it writes to guest memory.
    here: bool,
    /// What the driver started it with, while it is active.
    running: Option<Running>,
    /// The features that the driver has accepted.
    accepted: u64,
    /// The driver is to be asked to announce itself when it is there again.
    restored: bool,
    /// It is to see the link go down and up then.
    renewed: bool,
    clock: Clock,
}

/// What there is to start the workers again with.
struct Running {
    features: u64,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What the driver may leave to the network, and the network to the driver: each feature with its offload.
const OFFLOAD_FEATURES: [(Offloads, &[u32]); 5] = [
    (
        Offloads::CSUM,
        &[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM],
    ),
    (
        Offloads::TSO4,
        &[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4],
    ),
    (
        Offloads::TSO6,
        &[VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6],
    ),
    (
        Offloads::ECN,
        &[VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN],
    ),
    (
        Offloads::USO,
        &[
            VIRTIO_NET_F_HOST_USO,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ],
    ),
];

/// The features that every network has.
const FEATURES: [u32; 10] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

impl Net {
    /// Makes the device `id` for an open network, which has as many pairs as the settings.
    #[must_use]
    pub fn new(id: &str, backend: Box<dyn Backend>, settings: NetSettings) -> Self {
        let offloads = (backend.offloads() & settings.offloads).consistent();
        Self {
            offloads,
            shared: Arc::new(Shared::new(id, backend, settings.pairs, settings.mac)),
            rx_limits: Arc::default(),
            tx_limits: Arc::default(),
            tallies: Arc::new(Tallies::new(settings.pairs)),
            workers: Workers::new("net", id),
            engines: None,
            only_kernel: false,
            by_kernel: false,
            here: false,
            running: None,
            accepted: 0,
            restored: false,
            renewed: false,
            clock: Arc::new(Instant::now),
            settings,
        }
    }

    fn features(&self) -> u64 {
        let mut features = FEATURES.iter().fold(0, |all, feature| all | bit(*feature));
        for (offload, given) in OFFLOAD_FEATURES {
            if self.offloads.contains(offload) {
                features |= given.iter().fold(0, |all, feature| all | bit(*feature));
            }
        }
        if self.settings.pairs > 1 {
            features |= bit(VIRTIO_NET_F_MQ);
        }
        if self.settings.mtu.is_some() {
            features |= bit(VIRTIO_NET_F_MTU);
        }
        if self
            .engines
            .as_ref()
            .is_some_and(|engines| !engines.merges())
        {
            features &= !bit(VIRTIO_NET_F_MRG_RXBUF);
        }
        features
    }

    fn accepts(&self, feature: u32) -> bool {
        self.accepted & bit(feature) != 0
    }

    fn config_space(&self) -> ConfigSpace {
        let status = |set: bool, bit: u32| {
            if set {
                u16::try_from(bit).unwrap_or(0)
            } else {
                0
            }
        };
        let up = self.shared.link() && !self.shared.blinks();
        let up = status(up, VIRTIO_NET_S_LINK_UP);
        let announce = status(self.shared.announce(), VIRTIO_NET_S_ANNOUNCE);
        ConfigSpace {
            mac: self.shared.filter().mac,
            status: (up | announce).into(),
            max_virtqueue_pairs: self.settings.pairs.into(),
            mtu: self.settings.mtu.unwrap_or(0).into(),
        }
    }

    /// How the driver takes frames.
    fn shape(&self) -> Shape {
        let long = guest_offloads(self.accepted).intersects(Offloads::SEGMENTS);
        let packet = self.settings.mtu.unwrap_or(USUAL_MTU).max(USUAL_MTU);
        Shape {
            mergeable: self.accepts(VIRTIO_NET_F_MRG_RXBUF),
            wanted: if long {
                MAX_FRAME
            } else {
                HEADER_LEN + TAGGED_LEN + usize::from(packet)
            },
        }
    }

    /// Tells the network what the driver is, as it was before a stop or as it begins.
    fn prepare_network(&self) -> Result<(), ActivateError> {
        let failed = |error: std::io::Error| ActivateError {
            what: "the network",
            reason: error.to_string(),
        };
        let several = self.accepts(VIRTIO_NET_F_MQ);
        let pairs = if several { self.shared.pairs() } else { 1 };
        self.shared.set_pairs(pairs).map_err(failed)?;
        let offloads = guest_offloads(self.shared.guest_bits() & self.accepted);
        self.shared.set_offloads(offloads).map_err(failed)
    }

    /// Has the switches of the network learn that the driver's address is here now: a driver that is to announce itself may take its
    /// time, or not know how.
    fn tell_network(&self) {
        let address = MacAddress::new(self.shared.filter().mac);
        if let (true, Ok(address)) = (self.shared.link(), address)
            && let Err(error) = self.shared.backend().announce(address)
        {
            tracing::debug!(%error, "the network was not told that a card has come");
        }
    }
}

/// What can be seen of a card at any time, also when it is gone: it does not hold the network.
struct Seen {
    tallies: Arc<Tallies>,
    cable: Arc<Cable>,
}

impl Counters for Seen {
    fn read(&self) -> Vec<(&'static str, u64)> {
        self.tallies.read()
    }

    fn link(&self) -> Option<bool> {
        Some(self.cable.passes())
    }
}

impl VirtioDevice for Net {
    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(Arc::new(Seen {
            tallies: Arc::clone(&self.tallies),
            cable: self.shared.seen(),
        }))
    }

    fn identity(&self) -> Identity {
        let queues = usize::from(self.settings.pairs) * 2 + 1;
        Identity {
            device_type: u16::try_from(VIRTIO_ID_NET).unwrap_or_default(),
            features: self.features(),
            queue_sizes: vec![self.settings.queue_size; queues],
            pci_class: [2, 0, 0],
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(self.config_space().as_bytes(), offset, data);
        let seen = offset.checked_add(data.len() as u64);
        let looked = offset <= LINK_AT && seen.is_some_and(|end| end > LINK_AT);
        // Once it has seen the link down, it is told to look again.
        if looked
            && self.shared.set_blinks(false)
            && let Some(running) = &self.running
        {
            running.notifier.config_changed();
        }
    }

    /// Nothing of it can be written: the address is set by the control queue (5.1.4.1).
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn features_negotiated(&mut self, features: u64) {
        self.accepted = features;
        self.shared.set_guest_bits(features & guest_offload_bits());
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        self.accepted = features;
        self.prepare_network()?;
        let running = Running {
            features,
            memory,
            notifier: Arc::clone(&notifier),
        };
        self.launch(running, queues)?;
        let restored = std::mem::take(&mut self.restored);
        let renewed = std::mem::take(&mut self.renewed);
        // What the driver of a copy still takes for its address may be another's by now.
        if restored && !renewed {
            self.tell_network();
        }
        let announces = restored && self.accepts(VIRTIO_NET_F_GUEST_ANNOUNCE);
        let blinks = renewed && self.accepts(VIRTIO_NET_F_STATUS);
        if announces {
            self.shared.set_announce(true);
        }
        if blinks {
            self.shared.set_blinks(true);
        }
        if announces || blinks {
            notifier.config_changed();
        }
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let stopped = self.workers.stop(deadline);
        if !matches!(stopped, Err(StopError::Deadline { .. })) {
            self.shared.set_wakes(Vec::new());
            self.running = None;
            self.by_kernel = false;
        }
        stopped
    }

    fn renew(&mut self) {
        let own = self.settings.mac.octets();
        self.shared.change_filter(|filter| {
            let before = std::mem::replace(&mut filter.mac, own);
            // A driver that runs goes on with the address that it has read.
            if before != own {
                filter.former.get_or_insert(before);
            }
            before != own
        });
        self.renewed = true;
    }

    fn vector_changed(&mut self, queue: u16) {
        if let Some(engines) = self.engines.as_ref().filter(|_| self.by_kernel) {
            engines.vector_changed(queue);
        }
    }

    fn prepare(
        &self,
        patch: Value,
        context: BuildContext,
    ) -> Result<Preparation, ReconfigureError> {
        change::plan(patch, context, self.only_kernel)
    }

    fn reconfigure(&mut self, prepared: Prepared) -> Result<Reconfigured, ReconfigureError> {
        self.change(prepared.take()?)
    }

    fn serve_here(&mut self, here: bool) -> Result<(), ReconfigureError> {
        let before = std::mem::replace(&mut self.here, here);
        self.hand_over().inspect_err(|error| {
            if !matches!(error, ReconfigureError::Broken(_)) {
                self.here = before;
            }
        })
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.restored = false;
        self.renewed = false;
        self.shared.set_blinks(false);
        self.shared.set_announce(false);
        self.shared.set_guest_bits(0);
        self.shared.change_filter(|filter| {
            *filter = filter::Filter::open(self.settings.mac);
            true
        });
        // The next driver begins with one pair. If the network refuses now it does so again then, and that is told.
        let _ = self.shared.set_pairs(1);
    }
}
