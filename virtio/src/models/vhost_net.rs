//! The network device (Virtio 1.2, section 5.1) whose frames another program moves (vhost-user-net).
//!
//! Offloads are that program's; address, packet size, link and the control queue are the device's own. The link is up
//! while the program is there. When it is back, or the machine has been restored, the guest is asked to announce itself:
//! a switch that was started again, or is another one, does not know who is where. For a driver that does not, the
//! program announces the address, if it can (`VHOST_USER_SEND_RARP`). A card whose address is another than that of the
//! machine that was saved shows the link down until the driver has seen it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use devices::StopError;
use migration::{RestoreError, SaveError, SavedState, Snapshot, decode_exact};
use net::MacAddress;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use zerocopy::IntoBytes;

use crate::device::{
    ActivateError, Activation, ActiveQueue, Counters, Identity, Notifier, StoppedQueue,
    VirtioDevice, read_space,
};
use crate::memory::GuestMemory;
use crate::models::net::random_mac;
use crate::models::net::spec::{ConfigSpace, LINK_AT, MIN_MTU};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};
use crate::vhost::{ANSWER, Front, Nature, PeerOptions, Steering};
use crate::worker::Workers;

mod control;
#[cfg(test)]
mod serving;
use self::control::{Clerk, Orders};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "vhost-user-net",
    flag: "vhost-user-net",
    about: "a network card of another program's (as --net vhost_user=on)",
    fields: FIELDS,
    build,
};

const fn field(name: &'static str, kind: FieldKind, help: &'static str) -> Field {
    Field {
        name,
        kind,
        required: false,
        help,
    }
}

const FIELDS: &[Field] = &[
    Field {
        name: "socket",
        kind: FieldKind::Path,
        required: true,
        help: "the unix socket at which the program listens, or to which it connects",
    },
    field(
        "vhost_mode",
        FieldKind::Choice(&["client", "server"]),
        "who connects: client, this process; server, the program (default client)",
    ),
    field(
        "mac",
        FieldKind::Text,
        "the card's address (default one that is made up, the same for the same machine)",
    ),
    field(
        "mtu",
        FieldKind::Number,
        "largest packet, in bytes, 1280 to 65521 (default the guest's)",
    ),
    field(
        "num_queues",
        FieldKind::Number,
        "queues of both directions, 2 to 128, an even number (default 2: one pair)",
    ),
    field(
        "queue_size",
        FieldKind::Number,
        "entries in each queue, a power of two from 4 to 1024 (default 256)",
    ),
    field(
        "offload_csum",
        FieldKind::Switch,
        "leave checksums to the program, if it can do them (default on)",
    ),
    field(
        "offload_tso",
        FieldKind::Switch,
        "leave cutting large TCP packets to the program, if it can (default on)",
    ),
];

/// What the driver and the program may leave to each other, without large packets.
const CHECKSUMS: u64 = bit(VIRTIO_NET_F_CSUM) | bit(VIRTIO_NET_F_GUEST_CSUM);
/// Large TCP packets, which need checksums (5.1.3.1).
const SEGMENTS: u64 = bit(VIRTIO_NET_F_HOST_TSO4)
    | bit(VIRTIO_NET_F_HOST_TSO6)
    | bit(VIRTIO_NET_F_HOST_ECN)
    | bit(VIRTIO_NET_F_GUEST_TSO4)
    | bit(VIRTIO_NET_F_GUEST_TSO6)
    | bit(VIRTIO_NET_F_GUEST_ECN);

/// As many pairs as other cards have.
const MAX_QUEUES: u64 = 128;
/// Programs for the protocol have no larger ones.
const MAX_QUEUE_SIZE: u64 = 1024;
const MIN_QUEUE_SIZE: u64 = 4;
const MAX_MTU: u64 = 65_521;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The configuration of a card of another program's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostNetConfig {
    /// The unix socket at which the program listens, or to which it connects.
    pub socket: PathBuf,
    /// Who connects.
    #[serde(default, skip_serializing_if = "VhostMode::is_client")]
    pub vhost_mode: VhostMode,
    /// The card's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The largest packet, in bytes, 1280 to 65521.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u64>,
    /// Queues of both directions together: an even number from 2 to 128.
    #[serde(default = "two")]
    pub num_queues: u64,
    /// Entries in each queue: a power of two from 4 to 1024.
    #[serde(default = "default_queue_size")]
    pub queue_size: u64,
    /// Leave checksums to the program; on unless it says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload_csum: Option<bool>,
    /// Leave cutting large TCP packets to the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload_tso: Option<bool>,
}

/// Who connects to the socket of a program that serves a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostMode {
    /// This process, to the program.
    #[default]
    Client,
    /// The program, to this process.
    Server,
}

impl VhostMode {
    // A reference is what serde gives.
    fn is_client(&self) -> bool {
        *self == Self::Client
    }
}

fn two() -> u64 {
    2
}

fn default_queue_size() -> u64 {
    256
}

/// What the guest sees of a card of another program's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VhostNetSettings {
    /// The address, where one is given.
    pub mac: Option<MacAddress>,
    /// The largest packet, in bytes, where it is stated.
    pub mtu: Option<u16>,
    /// How many pairs of queues.
    pub pairs: u16,
    /// Entries in each queue.
    pub queue_size: u16,
}

impl VhostNetConfig {
    /// What the configuration says.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when a value is out of its range.
    pub fn settings(&self) -> Result<VhostNetSettings, BuildError> {
        let fail = |field, reason| BuildError::Field { field, reason };
        let mac = self.mac.as_deref().map(str::parse).transpose();
        let mac = mac.map_err(|error: net::ParseMacError| fail("mac", error.to_string()))?;
        let range = u64::from(MIN_MTU)..=MAX_MTU;
        if let Some(mtu) = self.mtu.filter(|mtu| !range.contains(mtu)) {
            let reason = format!("{mtu}: give {MIN_MTU} to {MAX_MTU}");
            return Err(fail("mtu", reason));
        }
        let queues = self.num_queues;
        if !(two()..=MAX_QUEUES).contains(&queues) || !queues.is_multiple_of(2) {
            let reason = format!("{queues}: give an even number from 2 to {MAX_QUEUES}");
            return Err(fail("num_queues", reason));
        }
        let size = self.queue_size;
        if !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) || !size.is_power_of_two() {
            let reason =
                format!("{size}: give a power of two from {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}");
            return Err(fail("queue_size", reason));
        }
        let number = |value| u16::try_from(value).unwrap_or(u16::MAX);
        Ok(VhostNetSettings {
            mac,
            mtu: self.mtu.map(number),
            pairs: number(queues / 2),
            queue_size: number(size),
        })
    }

    /// The features that go through to the guest, if the program has them.
    fn features(&self) -> u64 {
        let checksums = self.offload_csum.unwrap_or(true);
        let segments = checksums && self.offload_tso.unwrap_or(true);
        bit(VIRTIO_NET_F_MRG_RXBUF)
            | if checksums { CHECKSUMS } else { 0 }
            | if segments { SEGMENTS } else { 0 }
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    Ok(Box::new(open(config, context)?))
}

fn open(config: Value, context: &BuildContext) -> Result<VhostNet, BuildError> {
    let config: VhostNetConfig = parse(MODEL.kind, config)?;
    let settings = config.settings()?;
    let features = config.features();
    let options = PeerOptions {
        path: config.socket,
        listens: config.vhost_mode == VhostMode::Server,
        queues: settings.pairs.saturating_mul(2),
        // Programs count pairs here.
        counted: settings.pairs,
        features,
        config_len: 0,
        patience: ANSWER,
        nature: Nature::Buffers,
        epitaph: None,
        clock: Arc::new(Instant::now),
    };
    let front = Front::connect("net", context, options)?;
    front.steering().serve(ONE_PAIR);
    let own = settings.mac.unwrap_or_else(random_mac).octets();
    Ok(VhostNet {
        steering: front.steering(),
        front,
        clerk: Workers::new("net", &format!("{}_ctrl", context.id)),
        running: None,
        aside: Vec::new(),
        accepted: 0,
        mac: own,
        own,
        restored: false,
        renewed: false,
        blinks: AtomicBool::new(false),
        patience: PATIENCE,
        settings,
    })
}

/// A card of another program's.
pub struct VhostNet {
    front: Front,
    steering: Steering,
    /// Serves the control queue.
    clerk: Workers,
    /// By what the queues are served, while they are.
    running: Option<Running>,
    /// Queues that nobody serves: the driver has no use for them.
    aside: Vec<ActiveQueue>,
    settings: VhostNetSettings,
    /// The features that the driver has accepted.
    accepted: u64,
    /// The address that the guest sees.
    mac: [u8; 6],
    /// The one that it was built with, which the next driver sees.
    own: [u8; 6],
    /// The network is to be told where the guest is when it is there again.
    restored: bool,
    /// The driver is to see the link go down and up when it is started again.
    renewed: bool,
    /// The link is shown as down until the driver has looked, although frames go through.
    blinks: AtomicBool,
    /// How long the control queue has to be given back.
    patience: Duration,
}

/// What a start has given beside queues.
struct Running {
    features: u64,
    memory: GuestMemory,
    notifier: Arc<dyn Notifier>,
}

impl Running {
    fn with(&self, queues: Vec<ActiveQueue>) -> Activation {
        Activation {
            features: self.features,
            memory: self.memory.clone(),
            queues,
            notifier: Arc::clone(&self.notifier),
        }
    }
}

/// How many queues are used until the driver says otherwise (5.1.6.5.5).
const ONE_PAIR: u16 = 2;
/// How long the control queue has to be given back. Nothing is ever in flight.
const PATIENCE: Duration = Duration::from_secs(5);

impl VhostNet {
    fn accepts(&self, feature: u32) -> bool {
        self.accepted & bit(feature) != 0
    }

    /// The control queue. With a driver that does not know of several pairs it follows the first (5.1.2).
    fn control_queue(&self) -> u16 {
        let several = self.accepts(VIRTIO_NET_F_MQ);
        let last = if several { self.settings.pairs } else { 1 };
        last.saturating_mul(2)
    }

    /// Whether the driver tells the network where the guest is when it is asked to (5.1.4.2).
    fn announces_itself(&self) -> bool {
        self.accepts(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.accepts(VIRTIO_NET_F_STATUS)
    }

    /// Serves the queues again after a stop that has come half way.
    fn go_on(&mut self, frames: Vec<StoppedQueue>) {
        let Some(running) = &self.running else {
            return;
        };
        let queues = frames.into_iter().map(ActiveQueue::from).collect();
        if let Err(error) = self.front.start(running.with(queues)) {
            running.notifier.needs_reset(&error.to_string());
        }
    }

    fn start_clerk(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let notifier = Arc::clone(&activation.notifier);
        let (steering, pairs) = (&self.steering, self.settings.pairs);
        self.clerk
            .start(&notifier, vec![activation], |activation, wake| {
                let orders = Orders {
                    steering: steering.clone(),
                    features: activation.features,
                    pairs,
                };
                Clerk::new(activation, orders, wake)
            })
    }
}

impl VirtioDevice for VhostNet {
    fn identity(&self) -> Identity {
        let mut own = bit(VIRTIO_NET_F_MAC)
            | bit(VIRTIO_NET_F_STATUS)
            | bit(VIRTIO_NET_F_CTRL_VQ)
            | bit(VIRTIO_NET_F_GUEST_ANNOUNCE);
        if self.settings.pairs > 1 {
            own |= bit(VIRTIO_NET_F_MQ);
        }
        if self.settings.mtu.is_some() {
            own |= bit(VIRTIO_NET_F_MTU);
        }
        Identity {
            device_type: u16::try_from(VIRTIO_ID_NET).unwrap_or_default(),
            features: self.front.features() | own,
            queue_sizes: vec![self.settings.queue_size; usize::from(self.settings.pairs) * 2 + 1],
            pci_class: [2, 0, 0],
        }
    }

    fn counters(&self) -> Option<Arc<dyn Counters>> {
        Some(self.front.counters())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut status = 0;
        if self.front.is_connected() {
            if !self.blinks.load(Ordering::Acquire) {
                status |= VIRTIO_NET_S_LINK_UP;
            }
            if self.announces_itself() && self.steering.has_returned() {
                status |= VIRTIO_NET_S_ANNOUNCE;
            }
        }
        let space = ConfigSpace {
            mac: self.mac,
            status: u16::try_from(status).unwrap_or(0).into(),
            max_virtqueue_pairs: self.settings.pairs.into(),
            mtu: self.settings.mtu.unwrap_or(0).into(),
        };
        read_space(space.as_bytes(), offset, data);
        let seen = offset.checked_add(data.len() as u64);
        let looked = offset <= LINK_AT && seen.is_some_and(|end| end > LINK_AT);
        // Once it has seen the link down, it is told to look again.
        if looked
            && self.blinks.swap(false, Ordering::AcqRel)
            && let Some(running) = &self.running
        {
            running.notifier.config_changed();
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn attached(&mut self, notifier: &Arc<dyn Notifier>) {
        self.front.attached(notifier);
    }

    fn features_negotiated(&mut self, features: u64) {
        self.accepted = features;
    }

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            features,
            memory,
            queues,
            notifier,
        } = activation;
        self.accepted = features;
        let last = self.control_queue();
        let running = Running {
            features,
            memory,
            notifier: Arc::clone(&notifier),
        };
        // Behind the control queue there is nothing (5.1.2): the program does not know of such a queue.
        let (known, aside): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| queue.index <= last);
        let (commands, frames): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|queue| queue.index == last);
        let own = self.announces_itself();
        self.steering.announce_by_peer((!own).then_some(self.mac));
        let arrives = std::mem::take(&mut self.restored);
        if arrives {
            self.steering.arrive();
        }
        if !commands.is_empty() {
            self.start_clerk(running.with(commands))?;
        }
        self.front.start(running.with(frames)).inspect_err(|_| {
            // The queue is of no use to a device that does not work.
            let _ = self.clerk.stop(Instant::now() + self.patience);
        })?;
        self.running = Some(running);
        self.aside = aside;
        let blinks = std::mem::take(&mut self.renewed) && self.accepts(VIRTIO_NET_F_STATUS);
        if blinks {
            self.blinks.store(true, Ordering::Release);
        }
        if own && arrives || blinks {
            notifier.config_changed();
        }
        Ok(())
    }

    fn stop(&mut self, deadline: Instant) -> Result<Vec<StoppedQueue>, StopError> {
        let frames = match self.front.stop(deadline) {
            Err(error @ StopError::Deadline { .. }) => return Err(error),
            frames => frames,
        };
        // It has nothing in flight, whatever the deadline is.
        let commands = match self.clerk.stop(Instant::now() + self.patience) {
            Err(error @ StopError::Deadline { .. }) => {
                self.go_on(frames.unwrap_or_default());
                return Err(error);
            }
            commands => commands,
        };
        self.running = None;
        let aside = std::mem::take(&mut self.aside);
        let mut stopped = frames?;
        stopped.extend(commands?);
        stopped.extend(aside.into_iter().map(StoppedQueue::from));
        Ok(stopped)
    }

    fn renew(&mut self) {
        self.mac = self.own;
        self.renewed = true;
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.mac = self.own;
        self.restored = false;
        self.renewed = false;
        *self.blinks.get_mut() = false;
        self.steering.serve(ONE_PAIR);
        self.steering.greet();
    }
}

/// The registers of a card of another program's.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostNetV1 {
    /// The address by which the guest knows it.
    pub mac: [u8; 6],
    /// How many queues of frames the driver uses.
    pub queues: u16,
}

/// The saved state of a card of another program's: its registers, and what its driver has not seen yet.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VhostNetV2 {
    /// The registers.
    pub registers: VhostNetV1,
    /// The driver is to see the link go down and up, and has not seen it down.
    pub blinks: bool,
}

impl SavedState for VhostNetV2 {
    const SCHEMA: &'static str = "virtio-vhost-user-net";
    const VERSION: u16 = 2;

    fn upgrade(found: u16, body: &[u8]) -> Result<Self, RestoreError> {
        match found {
            1 => Ok(Self {
                registers: decode_exact(Self::SCHEMA, found, body)?,
                blinks: false,
            }),
            Self::VERSION => decode_exact(Self::SCHEMA, found, body),
            _ => Err(RestoreError::Version {
                schema: Self::SCHEMA,
                found,
                newest: Self::VERSION,
            }),
        }
    }
}

impl Snapshot for VhostNet {
    type State = VhostNetV2;

    fn save(&self) -> Result<VhostNetV2, SaveError> {
        Ok(VhostNetV2 {
            registers: VhostNetV1 {
                mac: self.mac,
                queues: self.steering.served(),
            },
            blinks: self.renewed || self.blinks.load(Ordering::Acquire),
        })
    }

    fn restore(&mut self, state: VhostNetV2) -> Result<(), RestoreError> {
        let VhostNetV2 { registers, blinks } = state;
        let VhostNetV1 { mac, queues } = registers;
        let invalid = |reason| RestoreError::Invalid {
            schema: VhostNetV2::SCHEMA,
            reason,
        };
        MacAddress::new(mac).map_err(|error| invalid(error.to_string()))?;
        let most = self.settings.pairs.saturating_mul(2);
        if !(ONE_PAIR..=most).contains(&queues) || !queues.is_multiple_of(2) {
            let reason = format!("{queues} queues of frames are used, and there are {most}");
            return Err(invalid(reason));
        }
        self.mac = mac;
        self.restored = true;
        self.renewed = blinks;
        self.steering.serve(queues);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(more: Value) -> VhostNetConfig {
        let mut whole = json!({ "socket": "/s" });
        if let (Value::Object(whole), Value::Object(more)) = (&mut whole, more) {
            whole.extend(more);
        }
        parse(MODEL.kind, whole).unwrap()
    }

    #[test]
    fn a_configuration_is_checked_by_key() {
        let settings = config(json!({ "mtu": 9000, "queue_size": 1024 })).settings();
        let settings = settings.unwrap();
        assert_eq!(
            (settings.mac, settings.mtu, settings.queue_size),
            (None, Some(9000), 1024)
        );
        for (more, named) in [
            (json!({ "mac": "01:00:00:00:00:00" }), "mac: "),
            (json!({ "mtu": 1279 }), "mtu: 1279"),
            (json!({ "mtu": 65_522 }), "mtu: 65522"),
            (json!({ "num_queues": 3 }), "num_queues: 3"),
            (json!({ "num_queues": 0 }), "num_queues: 0"),
            (json!({ "num_queues": 130 }), "num_queues: 130"),
            (json!({ "queue_size": 2 }), "queue_size: 2"),
            (json!({ "queue_size": 2048 }), "queue_size: 2048"),
        ] {
            let refusal = config(more).settings().unwrap_err().to_string();
            assert!(refusal.starts_with(named), "{refusal}");
        }
    }

    #[test]
    fn large_packets_go_with_checksums() {
        let features = |more: Value| config(more).features();
        let merge = bit(VIRTIO_NET_F_MRG_RXBUF);
        assert_eq!(features(json!({})), merge | CHECKSUMS | SEGMENTS);
        let plain = features(json!({ "offload_tso": false }));
        assert_eq!(plain, merge | CHECKSUMS);
        assert_eq!(features(json!({ "offload_csum": false })), merge);
    }
}
