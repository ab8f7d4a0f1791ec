//! The configuration of a network device.

use std::hash::{BuildHasher, RandomState};
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::PathBuf;

use net::{MacAddress, Offloads, Request, Setup, Source, is_interface_name};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::spec::MIN_MTU;
use super::{Net, NetSettings, kernel, mirror};
use crate::device::VirtioDevice;
use crate::limit::{self, Keys, Limiter, RateLimits};
use crate::models::{BuildContext, BuildError, Model, parse};
use crate::schema::{Field, FieldKind};

/// The entry in the registry.
pub const MODEL: Model = Model {
    kind: "net",
    flag: "net",
    about: "a network card",
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
    field(
        "tap",
        FieldKind::Text,
        "tap or macvtap of the host; a tap is made if there is none, %d is a free number (default vmtap%d)",
    ),
    field(
        "fd",
        FieldKind::Text,
        "open descriptor of a tap instead, or one for each pair of queues: 3:4",
    ),
    field(
        "socket",
        FieldKind::Path,
        "unix socket of a user-mode network instead, such as passt's: needs no rights",
    ),
    field(
        "mac",
        FieldKind::Text,
        "the card's address (default one that is made up, the same for the same machine)",
    ),
    field(
        "mtu",
        FieldKind::Number,
        "largest packet, in bytes, 1280 to 65521; set on the tap too (default the guest's)",
    ),
    field(
        "queues",
        FieldKind::Number,
        "pairs of queues, 1 to 64; more than one needs a multi_queue tap (default 1)",
    ),
    field(
        "num_queues",
        FieldKind::Number,
        "the same as queues of both directions: twice as many",
    ),
    field(
        "queue_size",
        FieldKind::Number,
        "entries in each queue, a power of two from 4 to 32768 (default 256)",
    ),
    field(
        "ip",
        FieldKind::Ipv4,
        "the host's IPv4 address on a tap that is made (default none)",
    ),
    field("mask", FieldKind::Ipv4, "the mask of that address"),
    field(
        "host_mac",
        FieldKind::Text,
        "address of a tap that is made (default the host's choice)",
    ),
    field(
        "owner",
        FieldKind::Number,
        "user id that may open a tap that is made (default none)",
    ),
    field(
        "offload_csum",
        FieldKind::Switch,
        "leave checksums to the other side (default on)",
    ),
    field(
        "offload_tso",
        FieldKind::Switch,
        "leave cutting large TCP packets to the other side (default on)",
    ),
    field(
        "offload_ufo",
        FieldKind::Switch,
        "leave cutting large UDP packets to the other side (default on)",
    ),
    field(
        "vhost",
        FieldKind::Choice(&["off", "on", "auto"]),
        "have the host's kernel move a tap's frames (vhost-net); auto where it can (default off)",
    ),
    field(
        "mirror_tap",
        FieldKind::Text,
        "tap that gets a copy of each frame of both directions (default none)",
    ),
    field(
        "mirror_file",
        FieldKind::Path,
        "capture file that gets them instead, in the format of libpcap; overwritten",
    ),
    field(
        "mirror_size",
        FieldKind::Bytes,
        "the most bytes of that file; later frames are left out (default 1G)",
    ),
    field(
        "bw_size",
        FieldKind::Bytes,
        "bytes that may pass, in each direction, in bw_refill_time (default no limit)",
    ),
    field(
        "bw_refill_time",
        FieldKind::Number,
        "milliseconds in which bw_size becomes available again",
    ),
    field(
        "bw_one_time_burst",
        FieldKind::Bytes,
        "bytes that may pass, in each direction, once beyond that (default 0)",
    ),
    field(
        "ops_size",
        FieldKind::Number,
        "frames that may pass, in each direction, in ops_refill_time (default no limit)",
    ),
    field(
        "ops_refill_time",
        FieldKind::Number,
        "milliseconds in which ops_size becomes available again",
    ),
    field(
        "ops_one_time_burst",
        FieldKind::Number,
        "frames that may pass, in each direction, once beyond that (default 0)",
    ),
    field(
        "rx_bw_size",
        FieldKind::Bytes,
        "bytes that may go to the guest in rx_bw_refill_time (default no limit)",
    ),
    field(
        "rx_bw_refill_time",
        FieldKind::Number,
        "milliseconds in which rx_bw_size becomes available again",
    ),
    field(
        "rx_bw_one_time_burst",
        FieldKind::Bytes,
        "bytes that may go to the guest once beyond that (default 0)",
    ),
    field(
        "rx_ops_size",
        FieldKind::Number,
        "frames that may go to the guest in rx_ops_refill_time (default no limit)",
    ),
    field(
        "rx_ops_refill_time",
        FieldKind::Number,
        "milliseconds in which rx_ops_size becomes available again",
    ),
    field(
        "rx_ops_one_time_burst",
        FieldKind::Number,
        "frames that may go to the guest once beyond that (default 0)",
    ),
    field(
        "tx_bw_size",
        FieldKind::Bytes,
        "bytes that may come from the guest in tx_bw_refill_time (default no limit)",
    ),
    field(
        "tx_bw_refill_time",
        FieldKind::Number,
        "milliseconds in which tx_bw_size becomes available again",
    ),
    field(
        "tx_bw_one_time_burst",
        FieldKind::Bytes,
        "bytes that may come from the guest once beyond that (default 0)",
    ),
    field(
        "tx_ops_size",
        FieldKind::Number,
        "frames that may come from the guest in tx_ops_refill_time (default no limit)",
    ),
    field(
        "tx_ops_refill_time",
        FieldKind::Number,
        "milliseconds in which tx_ops_size becomes available again",
    ),
    field(
        "tx_ops_one_time_burst",
        FieldKind::Number,
        "frames that may come from the guest once beyond that (default 0)",
    ),
];

/// The configuration of a network device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// The host's tap or macvtap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Descriptors of a tap instead, by their numbers with colons between.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<String>,
    /// The socket of a user-mode network instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The card's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// The largest packet, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u64>,
    /// Pairs of queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u64>,
    /// Queues of both directions together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u64>,
    /// Entries in each queue: a power of two from 4 to 32768.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u64>,
    /// The host's address on a tap that is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<Ipv4Addr>,
    /// Its mask.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<Ipv4Addr>,
    /// The address of a tap that is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<String>,
    /// The user who may open a tap that is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<u64>,
    /// Leave checksums to the other side; on unless it says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload_csum: Option<bool>,
    /// Leave cutting large TCP packets to the other side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload_tso: Option<bool>,
    /// Leave cutting large UDP packets to the other side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offload_ufo: Option<bool>,
    /// Whether the host's kernel moves the frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost: Option<Vhost>,
    /// The tap that gets copies of the frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror_tap: Option<String>,
    /// The capture file that gets them instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror_file: Option<PathBuf>,
    /// The most bytes of that file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror_size: Option<u64>,
    /// Bytes that may pass in bw_refill_time, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bw_size: Option<u64>,
    /// Milliseconds in which they become available again, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bw_refill_time: Option<u64>,
    /// Bytes that may pass once beyond that, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bw_one_time_burst: Option<u64>,
    /// Frames that may pass in ops_refill_time, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_size: Option<u64>,
    /// Milliseconds in which they become available again, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_refill_time: Option<u64>,
    /// Frames that may pass once beyond that, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops_one_time_burst: Option<u64>,
    /// Bytes that may pass in rx_bw_refill_time, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_bw_size: Option<u64>,
    /// Milliseconds in which they become available again, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_bw_refill_time: Option<u64>,
    /// Bytes that may pass once beyond that, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_bw_one_time_burst: Option<u64>,
    /// Frames that may pass in rx_ops_refill_time, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_ops_size: Option<u64>,
    /// Milliseconds in which they become available again, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_ops_refill_time: Option<u64>,
    /// Frames that may pass once beyond that, to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_ops_one_time_burst: Option<u64>,
    /// Bytes that may pass in tx_bw_refill_time, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_bw_size: Option<u64>,
    /// Milliseconds in which they become available again, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_bw_refill_time: Option<u64>,
    /// Bytes that may pass once beyond that, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_bw_one_time_burst: Option<u64>,
    /// Frames that may pass in tx_ops_refill_time, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_ops_size: Option<u64>,
    /// Milliseconds in which they become available again, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_ops_refill_time: Option<u64>,
    /// Frames that may pass once beyond that, from the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_ops_one_time_burst: Option<u64>,
}

/// Whether the host's kernel moves a card's frames (vhost-net), or this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// This process.
    #[default]
    Off,
    /// The kernel, or it is an error. While there is a mirror, it is this process.
    On,
    /// The kernel, where there is vhost-net, the network is a tap, and the card has neither limits nor mirror.
    Auto,
}

/// The limits of a network device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetLimits {
    /// Of frames to the guest.
    pub rx: RateLimits,
    /// Of frames from the guest.
    pub tx: RateLimits,
}

/// The keys of the limits of frames that go to the guest.
pub const RX_KEYS: Keys = [
    ["rx_bw_size", "rx_bw_refill_time", "rx_bw_one_time_burst"],
    ["rx_ops_size", "rx_ops_refill_time", "rx_ops_one_time_burst"],
];
/// The keys of the limits of frames that come from the guest.
pub const TX_KEYS: Keys = [
    ["tx_bw_size", "tx_bw_refill_time", "tx_bw_one_time_burst"],
    ["tx_ops_size", "tx_ops_refill_time", "tx_ops_one_time_burst"],
];
const DEFAULT_TAP: &str = "vmtap%d";
const MAX_PAIRS: u16 = 64;
const MAX_MTU: u16 = 65_521;
const DEFAULT_QUEUE_SIZE: u64 = 256;
const MIN_QUEUE_SIZE: u16 = 4;
const MAX_QUEUE_SIZE: u16 = 32768;

/// A field's value that makes no sense, and the mend.
fn bad<T>(field: &'static str, reason: impl Into<String>) -> Result<T, BuildError> {
    Err(BuildError::Field {
        field,
        reason: reason.into(),
    })
}

fn number(field: &'static str, value: u64, least: u16, most: u16) -> Result<u16, BuildError> {
    match u16::try_from(value)
        .ok()
        .filter(|n| (least..=most).contains(n))
    {
        Some(number) => Ok(number),
        None => bad(
            field,
            format!("{value}: give a number from {least} to {most}"),
        ),
    }
}

fn address(field: &'static str, text: &str) -> Result<MacAddress, BuildError> {
    text.parse().or_else(|error| bad(field, format!("{error}")))
}

impl NetConfig {
    /// The card's address, if one is given.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`]
    pub fn mac(&self) -> Result<Option<MacAddress>, BuildError> {
        self.mac
            .as_deref()
            .map(|text| address("mac", text))
            .transpose()
    }

    /// The descriptors, if they are given.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`]
    pub fn descriptors(&self) -> Result<Option<Vec<RawFd>>, BuildError> {
        let Some(text) = &self.fd else {
            return Ok(None);
        };
        let bare = text.trim_start_matches('[').trim_end_matches(']');
        let numbers = bare
            .split([':', ','])
            .map(|part| part.trim().parse::<RawFd>());
        match numbers.collect::<Result<Vec<_>, _>>() {
            Ok(numbers) if numbers.iter().all(|number| *number > 2) => Ok(Some(numbers)),
            _ => bad(
                "fd",
                format!("'{text}': give open descriptors from 3 on, as in 3 or 3:4"),
            ),
        }
    }

    fn pairs(&self, passed: Option<usize>) -> Result<u16, BuildError> {
        let of_both = match self.num_queues {
            Some(count) if count >= 2 && count.is_multiple_of(2) => Some(count / 2),
            Some(count) => {
                let reason = format!("{count}: give an even number from 2 on, or queues=…");
                return bad("num_queues", reason);
            }
            None => None,
        };
        let given = match (self.queues, of_both) {
            (Some(queues), Some(pairs)) if queues != pairs => {
                return bad(
                    "num_queues",
                    format!("it says {pairs} pairs, and queues={queues}"),
                );
            }
            (queues, of_both) => queues.or(of_both),
        };
        let passed = passed.and_then(|passed| u64::try_from(passed).ok());
        match (given, passed) {
            (Some(given), Some(passed)) if given != passed => bad(
                "fd",
                format!("{passed} descriptors for {given} pairs of queues: pass one for each pair"),
            ),
            (given, passed) => number("queues", given.or(passed).unwrap_or(1), 1, MAX_PAIRS),
        }
    }

    /// What the guest sees.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when a value is out of its range.
    pub fn settings(&self) -> Result<NetSettings, BuildError> {
        let given = self.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE);
        let queue_size = number("queue_size", given, MIN_QUEUE_SIZE, MAX_QUEUE_SIZE)?;
        if !queue_size.is_power_of_two() {
            return bad("queue_size", format!("{given}: give a power of two"));
        }
        let mtu = |mtu| number("mtu", mtu, MIN_MTU, MAX_MTU);
        let on = |switch: Option<bool>| switch.unwrap_or(true);
        let mut offloads = Offloads::empty();
        offloads.set(Offloads::CSUM, on(self.offload_csum));
        let tcp = Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        offloads.set(tcp, on(self.offload_tso));
        offloads.set(Offloads::USO, on(self.offload_ufo));
        Ok(NetSettings {
            mac: self.mac()?.unwrap_or_else(random_mac),
            pairs: self.pairs(self.descriptors()?.map(|numbers| numbers.len()))?,
            queue_size,
            mtu: self.mtu.map(mtu).transpose()?,
            offloads: offloads.consistent(),
        })
    }

    /// The network that is asked for.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`]
    pub fn request(&self) -> Result<Request, BuildError> {
        let NetSettings { pairs, mtu, .. } = self.settings()?;
        self.mirror()?;
        self.check_vhost()?;
        let source = match (&self.tap, self.descriptors()?, &self.socket) {
            (Some(_), Some(_), _) => return bad("fd", "it does not go with tap: give one of them"),
            (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => {
                return bad("socket", "it does not go with tap or fd: give one of them");
            }
            (None, None, Some(_)) if pairs > 1 => {
                return bad(
                    "queues",
                    format!("{pairs}: a network behind a socket has one pair"),
                );
            }
            (None, None, Some(path)) => Source::Stream(path.clone()),
            (None, Some(numbers), None) => Source::Descriptors(numbers),
            (tap, None, None) => {
                let name = tap.as_deref().unwrap_or(DEFAULT_TAP);
                if !is_interface_name(name) {
                    let reason = format!(
                        "'{name}' cannot be the name of an interface: give 1 to 15 characters without space, '/' and ':'"
                    );
                    return bad("tap", reason);
                }
                Source::Interface(name.to_owned())
            }
        };
        let of_tap = self.ip.is_some() || self.host_mac.is_some() || self.owner.is_some();
        let given = match source {
            Source::Interface(_) => None,
            Source::Descriptors(_) => Some("fd"),
            Source::Stream(_) => Some("socket"),
        };
        if let Some(given) = given.filter(|_| of_tap) {
            return bad(
                given,
                "ip, host_mac and owner are for a tap that is made: leave them out",
            );
        }
        let owner = self.owner.map(u32::try_from).transpose();
        let owner =
            owner.or_else(|_| bad("owner", "it is no user id: give the number of a user"))?;
        let host_mac = self.host_mac.as_deref();
        let mac = host_mac.map(|text| address("host_mac", text)).transpose()?;
        let address = match (self.ip, self.mask) {
            (Some(_), Some(mask)) if !is_mask(mask) => {
                return bad(
                    "mask",
                    format!("{mask} has ones behind zeros: give one as 255.255.255.0"),
                );
            }
            (Some(ip), Some(mask)) => Some((ip, mask)),
            (None, None) => None,
            (Some(_), None) => return bad("mask", "it is missing beside ip: give it too"),
            (None, Some(_)) => return bad("ip", "it is missing beside mask: give it too"),
        };
        Ok(Request {
            source,
            pairs,
            setup: Setup {
                owner,
                mtu,
                mac,
                address,
            },
        })
    }

    /// Refuses what the kernel has no way to do.
    fn check_vhost(&self) -> Result<(), BuildError> {
        if self.vhost != Some(Vhost::On) {
            return Ok(());
        }
        let NetLimits { rx, tx } = self.rate_limits()?;
        let limited = [rx, tx].map(|limits| Limiter::new(limits).limited());
        let without = match () {
            () if self.socket.is_some() => "a network behind a socket is not the kernel's",
            () if limited.contains(&true) => "the kernel keeps no limits",
            () => return Ok(()),
        };
        bad(
            "vhost",
            format!("on: {without}: give vhost=off, or auto, or leave that out"),
        )
    }

    /// The device's limits: those of a direction, where they are given, else those of both.
    ///
    /// # Errors
    ///
    /// [`BuildError::Field`] when half a limit is given, or one that fills in no time.
    pub fn rate_limits(&self) -> Result<NetLimits, BuildError> {
        let values = serde_json::to_value(self).unwrap_or_default();
        let limits = |keys| {
            RateLimits::from_keys(keys, |key| values.get(key)?.as_u64()).map_err(BuildError::from)
        };
        let both = limits(limit::KEYS)?;
        let over = |own: RateLimits| RateLimits {
            bandwidth: own.bandwidth.or(both.bandwidth),
            ops: own.ops.or(both.ops),
        };
        Ok(NetLimits {
            rx: over(limits(RX_KEYS)?),
            tx: over(limits(TX_KEYS)?),
        })
    }

    /// Puts limits into the keys that say them: those of both directions, where these are alike.
    pub fn set_rate_limits(&mut self, limits: NetLimits) {
        let NetLimits { rx, tx } = limits;
        let alike = rx == tx;
        let none = RateLimits::default();
        let size = |limits: RateLimits| {
            [limits.bandwidth, limits.ops].map(|bucket| bucket.map(|bucket| bucket.size))
        };
        let time = |limits: RateLimits| {
            [limits.bandwidth, limits.ops].map(|bucket| bucket.map(|bucket| bucket.refill_time))
        };
        let burst = |limits: RateLimits| {
            [limits.bandwidth, limits.ops].map(|bucket| bucket.map(|bucket| bucket.one_time_burst))
        };
        let both = if alike { rx } else { none };
        let (rx, tx) = if alike { (none, none) } else { (rx, tx) };
        [self.bw_size, self.ops_size] = size(both);
        [self.bw_refill_time, self.ops_refill_time] = time(both);
        [self.bw_one_time_burst, self.ops_one_time_burst] = burst(both);
        [self.rx_bw_size, self.rx_ops_size] = size(rx);
        [self.rx_bw_refill_time, self.rx_ops_refill_time] = time(rx);
        [self.rx_bw_one_time_burst, self.rx_ops_one_time_burst] = burst(rx);
        [self.tx_bw_size, self.tx_ops_size] = size(tx);
        [self.tx_bw_refill_time, self.tx_ops_refill_time] = time(tx);
        [self.tx_bw_one_time_burst, self.tx_ops_one_time_burst] = burst(tx);
    }
}

/// Whether all ones of a mask are before its zeros.
fn is_mask(mask: Ipv4Addr) -> bool {
    let bits = mask.to_bits();
    bits.leading_ones() == bits.count_ones()
}

/// An address that nothing else is likely to have.
#[must_use]
pub fn random_mac() -> MacAddress {
    let mut bytes = [0; 8];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(_) => MacAddress::local(u64::from_ne_bytes(bytes)),
        // The standard library keys its hashers by what the system had of randomness. Processes that were forked have the same.
        Err(_) => MacAddress::local(RandomState::new().hash_one(std::process::id())),
    }
}

fn build(config: Value, context: &BuildContext) -> Result<Box<dyn VirtioDevice>, BuildError> {
    let config: NetConfig = parse(MODEL.kind, config)?;
    let settings = config.settings()?;
    let limits = config.rate_limits()?;
    let target = config.mirror()?;
    let outlet = target.map(|target| mirror::open(&target, context));
    let outlet = outlet.transpose()?;
    let request = config.request()?;
    let vhost = match request.source {
        Source::Stream(_) => Vhost::Off,
        _ => config.vhost.unwrap_or_default(),
    };
    // First, so that a tap is not made for nothing.
    let engines = kernel::open(vhost, settings.pairs, context)?;
    let backend = context
        .networks
        .network(&request)
        .map_err(|error| BuildError::Backend(error.into()))?;
    if let Some(address) = backend.address().filter(|address| *address != settings.mac) {
        tracing::warn!(
            device = %context.id,
            network = backend.name(),
            mac = %settings.mac,
            %address,
            "the macvtap passes frames for its own address, unless it is promiscuous: leave mac out, or give it the card's",
        );
    }
    let mut net = Net::new(&context.id, backend, settings);
    net.rx_limits.set(limits.rx);
    net.tx_limits.set(limits.tx);
    net.mirror_to(outlet)?;
    if let Some(engines) = engines {
        net.serve_by_kernel(engines, vhost);
    }
    Ok(Box::new(net))
}
