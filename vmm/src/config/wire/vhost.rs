//! The devices of a description that another program serves.

use std::path::Path;

use api::wire;
use api::{ControlError, ErrorKind};
use virtio::models::vhost_blk::{MODEL, VhostBlkConfig};

use super::super::{DeviceConfig, VmConfig};
use super::devices::{json, refused, slot};
use super::{invalid, missing, path};

/// The configuration of a disk that another program has; `None` for a disk of this one's.
pub(super) fn disk_from_wire(
    described: &wire::DiskConfig,
) -> Result<Option<DeviceConfig>, ControlError> {
    let Some(socket) = described.vhost_socket.as_deref() else {
        return if described.vhost_user {
            let message = "disk: vhost_user is true: give vhost_socket, the program's socket";
            Err(invalid(message))
        } else {
            Ok(None)
        };
    };
    if !described.vhost_user {
        return Err(invalid(
            "disk: vhost_socket is given: give vhost_user=true beside it",
        ));
    }
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
