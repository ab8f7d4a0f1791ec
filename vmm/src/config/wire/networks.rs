//! The network cards of a description.

use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::path::Path;

use api::ControlError;
use api::wire;
use net::MirrorTarget;
use serde_json::{Map, Value, json as value};
use virtio::limit::RateLimits;
use virtio::models::net::{MODEL, NetConfig, NetLimits, Vhost, random_mac};

use super::super::network::{interface_address, is_card};
use super::super::{DeviceConfig, VmConfig};
use super::devices::{json, not_found, slot};
use super::{invalid, missing, names, path, rate_limiter, rate_limits, vhost};

/// What is wrong with a card.
pub(super) fn refused(error: &virtio::models::BuildError) -> ControlError {
    let inner = ControlError::from_error(api::ErrorKind::Invalid, error);
    inner.context("net").context(super::INVALID)
}

fn ipv4(field: &str, text: Option<&str>) -> Result<Option<Ipv4Addr>, ControlError> {
    let parsed = text.map(str::parse).transpose();
    parsed.map_err(|_| {
        let text = text.unwrap_or_default();
        invalid(format!("net.{field}: '{text}' is no IPv4 address"))
    })
}

/// What gets copies of a card's frames, as a client has said it.
fn mirror_target(described: &wire::NetMirror) -> Result<Option<MirrorTarget>, ControlError> {
    let (tap, file) = match described {
        wire::NetMirror::Off => (None, None),
        wire::NetMirror::Tap(name) => (Some(name.as_str()), None),
        wire::NetMirror::File(file) => (None, Some(file)),
    };
    let size = file.and_then(|file| file.size);
    let path = file.map(|file| path("net.mirror.file.path", &file.path));
    MirrorTarget::of(tap, path.transpose()?.as_deref(), size)
        .map_err(|error| invalid(format!("net.mirror: {error}")))
}

/// And as clients are shown it.
fn shown_mirror(target: MirrorTarget) -> wire::NetMirror {
    match target {
        MirrorTarget::Tap(name) => wire::NetMirror::Tap(name),
        MirrorTarget::File { path, size } => wire::NetMirror::File(wire::NetMirrorFile {
            path,
            size: Some(size),
        }),
    }
}

/// The limits that a client has said for two directions, where it has said any.
fn directions(
    both: Option<&wire::RateLimiterConfig>,
    rx: Option<&wire::RateLimiterConfig>,
    tx: Option<&wire::RateLimiterConfig>,
) -> [Option<RateLimits>; 2] {
    [rx.or(both), tx.or(both)].map(|limits| limits.map(rate_limits))
}

/// Has a card keep its address over the machine's life, if it has none yet.
pub(super) fn give_address(device: &mut DeviceConfig) {
    if is_card(&device.kind)
        && let Value::Object(config) = &mut device.config
    {
        let mac = interface_address(config).unwrap_or_else(random_mac);
        let mac = || Value::String(mac.to_string());
        config.entry("mac").or_insert_with(mac);
    }
}

/// Gives each card of a description that has none an address, so that clients see it.
pub fn address_nets(described: &mut wire::VmConfig) {
    for net in described.net.iter_mut().flatten() {
        let given = net.tap.as_deref().and_then(net::macvtap_address);
        let mac = || given.unwrap_or_else(random_mac).to_string();
        net.mac.get_or_insert_with(mac);
    }
}

impl DeviceConfig {
    /// Makes the configuration of a network card, which uses these descriptors of a tap if there
    /// are any. Its id is empty where the description has none.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`].
    pub fn from_wire_net(
        described: &wire::NetConfig,
        descriptors: &[RawFd],
    ) -> Result<Self, ControlError> {
        missing::net(described)?;
        if let Some(device) = vhost::net_from_wire(described, descriptors)? {
            return Ok(device);
        }
        let numbers: Vec<_> = descriptors.iter().map(ToString::to_string).collect();
        let passed = !numbers.is_empty();
        let off = |on: bool| (!on).then_some(false);
        let socket = described.socket.as_deref().map(Path::new);
        let socket = socket.map(|socket| path("net.socket", socket));
        let mut config = NetConfig {
            tap: described.tap.clone().filter(|_| !passed),
            fd: passed.then(|| numbers.join(":")),
            socket: socket.transpose()?,
            mac: described.mac.clone(),
            mtu: described.mtu.map(Into::into),
            num_queues: Some(u64::try_from(described.num_queues).unwrap_or(u64::MAX)),
            queue_size: Some(described.queue_size.into()),
            ip: ipv4("ip", described.ip.as_deref())?,
            mask: ipv4("mask", described.mask.as_deref())?,
            host_mac: described.host_mac.clone(),
            offload_csum: off(described.offload_csum),
            offload_tso: off(described.offload_tso),
            offload_ufo: off(described.offload_ufo),
            vhost: described.vhost.map(|vhost| match vhost {
                wire::NetVhost::Off => Vhost::Off,
                wire::NetVhost::On => Vhost::On,
                wire::NetVhost::Auto => Vhost::Auto,
            }),
            ..NetConfig::default()
        };
        let [rx, tx] = directions(
            described.rate_limiter_config.as_ref(),
            described.rx_rate_limiter_config.as_ref(),
            described.tx_rate_limiter_config.as_ref(),
        );
        config.set_rate_limits(NetLimits {
            rx: rx.unwrap_or_default(),
            tx: tx.unwrap_or_default(),
        });
        let mirror = described.mirror.as_ref().map(mirror_target).transpose()?;
        config.set_mirror(mirror.flatten().as_ref());
        config.request().map_err(|error| refused(&error))?;
        Ok(Self {
            kind: MODEL.kind.to_owned(),
            id: described.id.clone().unwrap_or_default(),
            address: slot("net", described.pci_device_id)?,
            config: json(&config)?,
        })
    }
}

/// What clients are shown of a device, if it is a network card.
pub(super) fn to_wire(device: &DeviceConfig) -> Option<wire::NetConfig> {
    if let Some(shown) = vhost::net_to_wire(device) {
        return Some(shown);
    }
    let config = device.network()?;
    let settings = config.settings().ok()?;
    let NetLimits { rx, tx } = config.rate_limits().unwrap_or_default();
    let alike = rx == tx;
    let on = |switch: Option<bool>| switch.unwrap_or(true);
    Some(wire::NetConfig {
        id: Some(device.id.clone()),
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        ip: config.ip.map(|ip| ip.to_string()),
        mask: config.mask.map(|mask| mask.to_string()),
        mtu: settings.mtu,
        num_queues: usize::from(settings.pairs) * 2,
        queue_size: settings.queue_size,
        vhost_user: false,
        vhost_socket: None,
        vhost_mode: wire::VhostMode::default(),
        rate_limiter_config: rate_limiter(rx).filter(|_| alike),
        rx_rate_limiter_config: rate_limiter(rx).filter(|_| !alike),
        tx_rate_limiter_config: rate_limiter(tx).filter(|_| !alike),
        offload_csum: on(config.offload_csum),
        offload_tso: on(config.offload_tso),
        offload_ufo: on(config.offload_ufo),
        fds: None,
        mirror: config.mirror().ok().flatten().map(shown_mirror),
        vhost: config.vhost.map(|vhost| match vhost {
            Vhost::Off => wire::NetVhost::Off,
            Vhost::On => wire::NetVhost::On,
            Vhost::Auto => wire::NetVhost::Auto,
        }),
        tap: config.tap,
        socket: config.socket.map(|p| p.to_string_lossy().into_owned()),
        mac: config.mac,
        host_mac: config.host_mac,
    })
}

impl VmConfig {
    /// What a network card will be that is to be added to this machine: its description and
    /// its configuration, both with its id and address. Nothing is changed.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`].
    pub fn plan_net(
        &self,
        described: &wire::NetConfig,
        descriptors: &[RawFd],
    ) -> Result<(wire::NetConfig, DeviceConfig), ControlError> {
        let mut net = described.clone();
        net.fds = None;
        let mut device = DeviceConfig::from_wire_net(&net, descriptors)?;
        if device.id.is_empty() {
            let number = names::next_number(self.ids());
            device.id = format!("_net{number}");
            net.id = Some(device.id.clone());
        }
        give_address(&mut device);
        net.mac = to_wire(&device).and_then(|shown| shown.mac);
        self.check_new(&device)?;
        Ok((net, device))
    }

    /// What clients are shown of a device of this machine, if it is a network card.
    #[must_use]
    pub fn shown_net(&self, device: &DeviceConfig) -> Option<wire::NetConfig> {
        to_wire(device)
    }

    /// What a network card of this machine will be after a change. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`api::ErrorKind::NotFound`] when there is no such card, otherwise as for [`VmConfig::from_wire`].
    pub fn plan_net_update(&self, request: &wire::VmUpdateNet) -> Result<NetUpdate, ControlError> {
        let found = self.devices.iter().find(|device| device.id == request.id);
        let Some(device) = found else {
            return Err(not_found(&request.id));
        };
        if device.served_network().is_some() {
            let what = "another program serves it: what can be changed is that program's";
            return Err(invalid(format!("{}: {what}", request.id)));
        }
        let Some(mut config) = device.network() else {
            return Err(invalid(format!("{}: it is no network card", request.id)));
        };
        let mut limits = config.rate_limits().map_err(|error| refused(&error))?;
        let [rx, tx] = directions(
            request.rate_limiter_config.as_ref(),
            request.rx_rate_limiter_config.as_ref(),
            request.tx_rate_limiter_config.as_ref(),
        );
        let mut patch = Map::new();
        if let Some(rx) = rx {
            limits.rx = rx;
            patch.insert("rx_limits".to_owned(), json(&rx)?);
        }
        if let Some(tx) = tx {
            limits.tx = tx;
            patch.insert("tx_limits".to_owned(), json(&tx)?);
        }
        if let Some(link) = &request.link {
            patch.insert("link".to_owned(), json(link)?);
        }
        config.set_rate_limits(limits);
        if let Some(mirror) = &request.mirror {
            let target = mirror_target(mirror)?;
            config.set_mirror(target.as_ref());
            let told = match target {
                None => value!({}),
                Some(MirrorTarget::Tap(tap)) => value!({ "tap": tap }),
                Some(MirrorTarget::File { path, size }) => value!({ "file": path, "size": size }),
            };
            patch.insert("mirror".to_owned(), told);
        }
        config.request().map_err(|error| refused(&error))?;
        let device = DeviceConfig {
            config: json(&config)?,
            ..device.clone()
        };
        let patch = Value::Object(patch);
        Ok(NetUpdate { device, patch })
    }
}

/// A change of a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetUpdate {
    /// The card's configuration after it.
    pub device: DeviceConfig,
    /// What the device in the machine is told.
    pub patch: Value,
}

/// Puts a change of a network card, whose configuration is now `device`, into the description.
pub fn update_net(described: &mut wire::VmConfig, device: &DeviceConfig) {
    let mut nets = described.net.iter_mut().flatten();
    let net = nets.find(|net| net.id.as_deref() == Some(&device.id));
    if let (Some(net), Some(shown)) = (net, to_wire(device)) {
        net.rate_limiter_config = shown.rate_limiter_config;
        net.rx_rate_limiter_config = shown.rx_rate_limiter_config;
        net.tx_rate_limiter_config = shown.tx_rate_limiter_config;
        net.mirror = shown.mirror;
    }
}

#[cfg(test)]
mod tests;
