//! The directories of a description.

use api::{ControlError, wire};
use virtio::models::fs::{FsConfig, MODEL};

use super::super::fs::directory;
use super::super::{DeviceConfig, VmConfig};
use super::{devices, invalid, missing, path};

/// Its id is empty where the description has none.
pub(super) fn from_wire(described: &wire::FsConfig) -> Result<DeviceConfig, ControlError> {
    missing::pci("fs", described.pci())?;
    let config = FsConfig {
        tag: described.tag.clone(),
        socket: path("fs.socket", &described.socket)?,
        num_queues: u64::try_from(described.num_queues).unwrap_or(u64::MAX),
        queue_size: described.queue_size.into(),
    };
    config
        .check()
        .map_err(|error| invalid(format!("fs.{error}")))?;
    Ok(DeviceConfig {
        kind: MODEL.kind.to_owned(),
        id: described.id.clone().unwrap_or_default(),
        address: devices::slot("fs", described.pci_device_id)?,
        config: devices::json(&config)?,
    })
}

/// What clients are shown of a device, if it is a directory.
#[must_use]
pub fn shown_fs(device: &DeviceConfig) -> Option<wire::FsConfig> {
    let config = directory(device)?;
    Some(wire::FsConfig {
        id: Some(device.id.clone()),
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        tag: config.tag,
        socket: config.socket,
        num_queues: usize::try_from(config.num_queues).ok()?,
        queue_size: u16::try_from(config.queue_size).ok()?,
    })
}

impl VmConfig {
    /// What a directory will be that is to be added to this machine. Nothing is changed.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`]; [`api::ErrorKind::Conflict`] when another one has its tag.
    pub fn plan_fs(&self, described: &wire::FsConfig) -> Result<DeviceConfig, ControlError> {
        let mut device = from_wire(described)?;
        if device.id.is_empty() {
            device.id = self.free_id(MODEL.kind);
        }
        self.check_new(&device)?;
        Ok(device)
    }

    /// What clients are shown of this machine's directories, if it has any.
    #[must_use]
    pub fn shown_directories(&self) -> Option<Vec<wire::FsConfig>> {
        let shown: Vec<_> = self.devices.iter().filter_map(shown_fs).collect();
        (!shown.is_empty()).then_some(shown)
    }
}

#[cfg(test)]
mod tests {
    use api::ErrorKind;
    use serde_json::{Value, json};

    use super::*;

    fn described(value: Value) -> wire::FsConfig {
        serde_json::from_value(value).unwrap()
    }

    fn machine(shared: bool, fs: &Value) -> Result<VmConfig, ControlError> {
        let whole = json!({
            "payload": { "kernel": "/k" },
            "memory": { "size": 64 << 20, "shared": shared },
            "fs": fs,
        });
        VmConfig::from_wire(&serde_json::from_value(whole).unwrap())
    }

    #[test]
    fn a_directory_goes_from_its_description_and_back() {
        let told = json!({ "tag": "src", "socket": "/s", "num_queues": 2, "pci_device_id": 7 });
        let config = machine(false, &json!([told])).unwrap();
        assert!(config.memory.shared);
        let device = &config.devices.last().unwrap();
        assert_eq!((&*device.kind, &*device.id), ("fs", "_fs0"));
        assert_eq!(device.address, Some(7));
        let shown = config.to_wire().fs.unwrap();
        let expected = json!({ "id": "_fs0", "tag": "src", "socket": "/s", "num_queues": 2 });
        assert_eq!(shown, [described(expected)]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_field() {
        for (fs, kind, named) in [
            (
                json!({ "tag": "", "socket": "/s" }),
                ErrorKind::Invalid,
                "fs.tag",
            ),
            (
                json!({ "tag": "t", "socket": "" }),
                ErrorKind::Invalid,
                "fs.socket",
            ),
            (
                json!({ "tag": "t", "socket": "/s", "num_queues": 0 }),
                ErrorKind::Invalid,
                "fs.num_queues",
            ),
            (
                json!({ "tag": "t", "socket": "/s", "queue_size": 1000 }),
                ErrorKind::Invalid,
                "fs.queue_size",
            ),
            (
                json!({ "tag": "t", "socket": "/s", "iommu": true }),
                ErrorKind::Unimplemented,
                "fs.iommu",
            ),
        ] {
            let refusal = machine(true, &json!([fs])).unwrap_err();
            assert_eq!(refusal.kind, kind, "{fs}: {refusal}");
            assert!(refusal.to_string().contains(named), "{fs}: {refusal}");
        }
    }

    #[test]
    fn a_directory_comes_under_a_tag_that_is_free_into_memory_that_is_shared() {
        let more = described(json!({ "tag": "t", "socket": "/s" }));
        let planned = machine(true, &json!([])).unwrap().plan_fs(&more).unwrap();
        assert_eq!(planned.id, "_fs0");
        let one = machine(true, &json!([{ "tag": "t", "socket": "/r" }])).unwrap();
        let refusal = one.plan_fs(&more).unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Conflict);
        assert!(refusal.to_string().contains("'_fs0'"), "{refusal}");
        let refusal = machine(false, &json!([])).unwrap().plan_fs(&more);
        let refusal = refusal.unwrap_err();
        assert_eq!(refusal.kind, ErrorKind::Invalid);
        assert!(
            refusal.to_string().contains("--memory shared=on"),
            "{refusal}"
        );
    }
}
