//! The devices of a description that another program serves.

use std::os::fd::RawFd;
use std::path::Path;

use api::wire;
use api::{ControlError, ErrorKind};
use virtio::models::vhost_blk::{MODEL, VhostBlkConfig};
use virtio::models::vhost_net::{self, VhostMode, VhostNetConfig};

use super::super::{DeviceConfig, VmConfig};
use super::devices::{json, refused, slot};
use super::{invalid, missing, networks, path};

/// The configuration of a disk that another program has; `None` for a disk of this one's.
pub(super) fn disk_from_wire(
    described: &wire::DiskConfig,
) -> Result<Option<DeviceConfig>, ControlError> {
    let socket = socket_of("disk", described.vhost_user, &described.vhost_socket)?;
    let Some(socket) = socket else {
        return Ok(None);
    };
    let own = [
        (described.path.is_some(), "disks.path beside vhost_user"),
        (described.readonly, "disks.readonly beside vhost_user"),
        (described.direct, "disks.direct beside vhost_user"),
        (described.serial.is_some(), "disks.serial beside vhost_user"),
        (
            described.rate_limiter_config.is_some() || described.rate_limit_group.is_some(),
            "a rate limit of a disk with vhost_user",
        ),
    ];
    if let Some((_, field)) = own.iter().find(|(asked, _)| *asked) {
        return Err(missing::named(field));
    }
    let config = VhostBlkConfig {
        socket: path("disks.vhost_socket", Path::new(socket))?,
        num_queues: u64::try_from(described.num_queues).unwrap_or(u64::MAX),
        queue_size: described.queue_size.into(),
    };
    config.queues().map_err(|error| refused(&error))?;
    Ok(Some(DeviceConfig {
        kind: MODEL.kind.to_owned(),
        id: described.id.clone().unwrap_or_default(),
        address: slot("disk", described.pci_device_id)?,
        config: json(&config)?,
    }))
}

/// The socket of the program that is to serve a device, if one is to; `device` is how it is called.
fn socket_of<'a>(
    device: &str,
    vhost_user: bool,
    socket: &'a Option<String>,
) -> Result<Option<&'a str>, ControlError> {
    match (vhost_user, socket.as_deref()) {
        (true, None) => Err(invalid(format!(
            "{device}: vhost_user is true: give vhost_socket, the program's socket"
        ))),
        (false, Some(_)) => Err(invalid(format!(
            "{device}: vhost_socket is given: give vhost_user=true beside it"
        ))),
        (_, socket) => Ok(socket),
    }
}

/// The configuration of a card that another program serves; `None` for a card of this one's.
pub(super) fn net_from_wire(
    described: &wire::NetConfig,
    descriptors: &[RawFd],
) -> Result<Option<DeviceConfig>, ControlError> {
    let socket = socket_of("net", described.vhost_user, &described.vhost_socket)?;
    let Some(socket) = socket else {
        return Ok(None);
    };
    let limits = [
        &described.rate_limiter_config,
        &described.rx_rate_limiter_config,
        &described.tx_rate_limiter_config,
    ];
    let addresses = described.ip.is_some() || described.mask.is_some();
    let own = [
        (described.tap.is_some(), "net.tap beside vhost_user"),
        (!descriptors.is_empty(), "net.fds beside vhost_user"),
        (described.socket.is_some(), "net.socket beside vhost_user"),
        (addresses, "net.ip beside vhost_user"),
        (
            described.host_mac.is_some(),
            "net.host_mac beside vhost_user",
        ),
        (described.mirror.is_some(), "net.mirror beside vhost_user"),
        (described.vhost.is_some(), "net.vhost beside vhost_user"),
        (
            limits.iter().any(|limits| limits.is_some()),
            "a rate limit of a card with vhost_user",
        ),
    ];
    if let Some((_, field)) = own.iter().find(|(asked, _)| *asked) {
        return Err(missing::named(field));
    }
    let off = |on: bool| (!on).then_some(false);
    let config = VhostNetConfig {
        socket: path("net.vhost_socket", Path::new(socket))?,
        vhost_mode: match described.vhost_mode {
            wire::VhostMode::Client => VhostMode::Client,
            wire::VhostMode::Server => VhostMode::Server,
        },
        mac: described.mac.clone(),
        mtu: described.mtu.map(Into::into),
        num_queues: u64::try_from(described.num_queues).unwrap_or(u64::MAX),
        queue_size: described.queue_size.into(),
        offload_csum: off(described.offload_csum),
        offload_tso: off(described.offload_tso),
    };
    config
        .settings()
        .map_err(|error| networks::refused(&error))?;
    Ok(Some(DeviceConfig {
        kind: vhost_net::MODEL.kind.to_owned(),
        id: described.id.clone().unwrap_or_default(),
        address: slot("net", described.pci_device_id)?,
        config: json(&config)?,
    }))
}

/// What clients are shown of a device, if it is a card that another program serves.
pub(super) fn net_to_wire(device: &DeviceConfig) -> Option<wire::NetConfig> {
    let config = device.served_network()?;
    let settings = config.settings().ok()?;
    Some(wire::NetConfig {
        id: Some(device.id.clone()),
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        ip: None,
        mask: None,
        mtu: settings.mtu,
        num_queues: usize::try_from(config.num_queues).ok()?,
        queue_size: settings.queue_size,
        vhost_user: true,
        vhost_socket: Some(config.socket.to_string_lossy().into_owned()),
        vhost_mode: match config.vhost_mode {
            VhostMode::Client => wire::VhostMode::Client,
            VhostMode::Server => wire::VhostMode::Server,
        },
        rate_limiter_config: None,
        rx_rate_limiter_config: None,
        tx_rate_limiter_config: None,
        offload_csum: config.offload_csum.unwrap_or(true),
        offload_tso: config.offload_tso.unwrap_or(true),
        offload_ufo: true,
        fds: None,
        mirror: None,
        vhost: None,
        tap: None,
        socket: None,
        mac: config.mac,
        host_mac: None,
    })
}

/// What clients are shown of a device, if it is a disk that another program has.
pub(super) fn disk_to_wire(device: &DeviceConfig) -> Option<wire::DiskConfig> {
    let config = (device.kind == MODEL.kind).then(|| device.config.clone())?;
    let config: VhostBlkConfig = serde_json::from_value(config).ok()?;
    Some(wire::DiskConfig {
        id: Some(device.id.clone()),
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        path: None,
        readonly: false,
        direct: false,
        num_queues: usize::try_from(config.num_queues).unwrap_or(usize::MAX),
        queue_size: u16::try_from(config.queue_size).unwrap_or(u16::MAX),
        vhost_user: true,
        vhost_socket: Some(config.socket.to_string_lossy().into_owned()),
        rate_limit_group: None,
        rate_limiter_config: None,
        disable_io_uring: false,
        disable_aio: false,
        serial: None,
        queue_affinity: None,
        backing_files: false,
        sparse: true,
        image_type: wire::ImageType::Unknown,
        lock_granularity: wire::LockGranularity::ByteRange,
    })
}

/// Whether a machine that is described already has the memory that `device` needs.
pub(super) fn check_memory(machine: &VmConfig, device: &DeviceConfig) -> Result<(), ControlError> {
    if machine.memory.shared || !device.shares_memory() {
        return Ok(());
    }
    let message = format!(
        "{}: another program serves it, in the guest's memory, which is not shared: describe the machine with \
         memory.shared=true (--memory shared=on)",
        device.id
    );
    Err(ControlError::new(ErrorKind::Invalid, message))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn machine(shared: bool, disks: &Value) -> Result<VmConfig, ControlError> {
        let described = json!({
            "payload": { "kernel": "/k" },
            "memory": { "size": 64 << 20, "shared": shared },
            "disks": disks,
        });
        VmConfig::from_wire(&serde_json::from_value(described).unwrap())
    }

    #[test]
    fn a_disk_of_another_programs_goes_from_its_description_and_back() {
        let disk = json!({ "vhost_user": true, "vhost_socket": "/s", "num_queues": 2 });
        let config = machine(false, &json!([disk])).unwrap();
        assert!(config.memory.shared);
        let device = &config.devices[0];
        assert_eq!((&*device.kind, &*device.id), ("vhost-user-blk", "_disk0"));
        let shown = config.to_wire().disks.unwrap().remove(0);
        assert_eq!(config.shown_disk(device), Some(shown.clone()));
        assert!(shown.vhost_user && shown.path.is_none());
        assert_eq!(
            (shown.vhost_socket.as_deref(), shown.num_queues),
            (Some("/s"), 2)
        );
        assert_eq!(
            DeviceConfig::from_wire_disk(&shown, 1).unwrap().config,
            device.config
        );
    }

    #[test]
    fn a_disk_comes_only_into_memory_that_is_shared() {
        let disk = json!({ "vhost_user": true, "vhost_socket": "/s" });
        let disk: wire::DiskConfig = serde_json::from_value(disk).unwrap();
        let (_, device) = machine(true, &json!([])).unwrap().plan_disk(&disk).unwrap();
        assert_eq!(device.id, "_disk0");
        let refusal = machine(false, &json!([])).unwrap().plan_disk(&disk);
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Invalid);
        assert!(
            refusal.to_string().contains("--memory shared=on"),
            "{refusal}"
        );
    }

    #[test]
    fn a_card_of_another_programs_goes_from_its_description_and_back() {
        let net = |net: Value| {
            let described = json!({ "payload": { "kernel": "/k" }, "net": [net] });
            VmConfig::from_wire(&serde_json::from_value(described).unwrap())
        };
        let told = json!({
            "vhost_user": true, "vhost_socket": "/s", "mtu": 1400, "offload_tso": false,
            "mac": "52:54:00:00:00:01", "num_queues": 4, "vhost_mode": "Server",
        });
        let config = net(told.clone()).unwrap();
        assert!(config.memory.shared);
        let device = &config.devices[0];
        assert_eq!((&*device.kind, &*device.id), ("vhost-user-net", "_net0"));
        let shown = config.to_wire().net.unwrap().remove(0);
        let mut expected: wire::NetConfig = serde_json::from_value(told).unwrap();
        expected.id = Some("_net0".to_owned());
        assert_eq!(shown, expected);
        let update = json!({ "id": "_net0", "link": "down" });
        let update = config.plan_net_update(&serde_json::from_value(update).unwrap());
        assert_eq!(update.unwrap_err().kind, ErrorKind::Invalid);
        for (more, kind, named) in [
            (
                json!({ "vhost_socket": null }),
                ErrorKind::Invalid,
                "vhost_socket",
            ),
            (
                json!({ "vhost_user": false }),
                ErrorKind::Invalid,
                "vhost_user=true",
            ),
            (json!({ "num_queues": 3 }), ErrorKind::Invalid, "num_queues"),
            (json!({ "tap": "t" }), ErrorKind::Unimplemented, "net.tap"),
            (
                json!({ "vhost_mode": "Server", "vhost_user": false, "vhost_socket": null }),
                ErrorKind::Unimplemented,
                "net.vhost_mode=Server",
            ),
            (
                json!({ "rate_limiter_config": {} }),
                ErrorKind::Unimplemented,
                "a rate limit",
            ),
        ] {
            let mut whole = json!({ "vhost_user": true, "vhost_socket": "/s" });
            if let (Value::Object(whole), Value::Object(more)) = (&mut whole, more) {
                whole.extend(more);
            }
            let refusal = net(whole.clone()).unwrap_err();
            assert_eq!(refusal.kind, kind, "{whole}: {refusal}");
            assert!(refusal.to_string().contains(named), "{whole}: {refusal}");
        }
    }

    #[test]
    fn half_a_description_and_what_is_the_programs_are_refused_by_name() {
        for (disk, named) in [
            (json!({ "vhost_user": true }), "vhost_socket"),
            (json!({ "vhost_socket": "/s" }), "vhost_user=true"),
            (
                json!({ "vhost_user": true, "vhost_socket": "/s", "path": "/p" }),
                "disks.path",
            ),
            (
                json!({ "vhost_user": true, "vhost_socket": "/s", "serial": "x" }),
                "disks.serial",
            ),
            (
                json!({ "vhost_user": true, "vhost_socket": "/s", "num_queues": 0 }),
                "num_queues",
            ),
        ] {
            let refusal = machine(false, &json!([disk])).unwrap_err();
            let text = format!("{refusal:?}");
            assert!(text.contains(named), "{disk}: {text}");
        }
    }
}
