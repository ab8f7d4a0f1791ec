//! The socket device of a description.

use api::{ControlError, wire};
use virtio::models::vsock::{MODEL, VsockConfig};

use super::super::vsock::is_vsock;
use super::super::{DeviceConfig, VmConfig};
use super::{devices, missing, path};

/// The socket device. Its id is empty where it has none.
pub(super) fn from_wire(described: &wire::VsockConfig) -> Result<DeviceConfig, ControlError> {
    missing::pci("vsock", described.pci())?;
    Ok(DeviceConfig {
        kind: MODEL.kind.to_owned(),
        id: described.id.clone().unwrap_or_default(),
        address: devices::slot("vsock", described.pci_device_id)?,
        config: devices::json(&VsockConfig {
            cid: described.cid.into(),
            socket: path("vsock.socket", &described.socket)?,
        })?,
    })
}

impl VmConfig {
    /// What a socket device will be that is to be added to this machine. Nothing is changed.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`]; [`api::ErrorKind::Conflict`] when it has one.
    pub fn plan_vsock(&self, described: &wire::VsockConfig) -> Result<DeviceConfig, ControlError> {
        let mut device = from_wire(described)?;
        if device.id.is_empty() {
            device.id = self.free_id(MODEL.kind);
        }
        self.check_new(&device)?;
        Ok(device)
    }

    /// What clients are shown of this machine's socket device.
    #[must_use]
    pub fn shown_vsock(&self) -> Option<wire::VsockConfig> {
        let device = self.devices.iter().find(|device| is_vsock(device))?;
        // Configurations that are valid have their models' shape.
        let config = serde_json::from_value::<VsockConfig>(device.config.clone()).ok()?;
        Some(wire::VsockConfig {
            id: Some(device.id.clone()),
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            cid: u32::try_from(config.cid).ok()?,
            socket: config.socket,
        })
    }
}

#[cfg(test)]
mod tests {
    use api::ErrorKind;
    use serde_json::{Value, json};

    use super::*;

    fn described(value: Value) -> wire::VsockConfig {
        serde_json::from_value(value).unwrap()
    }

    fn machine(more: Value) -> Result<VmConfig, ControlError> {
        let mut whole = json!({"payload": {"kernel": "/k"}});
        let Value::Object(more) = more else {
            panic!("not an object");
        };
        whole.as_object_mut().unwrap().extend(more);
        VmConfig::from_wire(&serde_json::from_value(whole).unwrap())
    }

    #[test]
    fn a_description_and_its_device_say_the_same() {
        let vsock = json!({"cid": 3, "socket": "/v", "pci_device_id": 7});
        let config = machine(json!({ "vsock": vsock })).unwrap();
        let device = config.devices.last().unwrap();
        assert_eq!((&*device.kind, &*device.id), ("vsock", "_vsock0"));
        assert_eq!(device.address, Some(7));
        assert_eq!(device.config, json!({"cid": 3, "socket": "/v"}));
        let shown = config.to_wire().vsock.unwrap();
        let expected = json!({"id": "_vsock0", "cid": 3, "socket": "/v"});
        assert_eq!(shown, described(expected));
        for (cid, socket) in [(0, "/v"), (2, "/v"), (u32::MAX, "/v"), (3, ""), (3, "a\0b")] {
            let vsock = json!({"vsock": {"cid": cid, "socket": socket}});
            let refused = machine(vsock).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::Invalid, "{cid} {socket:?}");
        }
    }

    #[test]
    fn a_second_one_is_a_conflict_however_it_is_added() {
        let none = machine(json!({})).unwrap();
        let more = described(json!({"cid": 4, "socket": "/w"}));
        let planned = none.plan_vsock(&more).unwrap();
        assert_eq!(planned.id, "_vsock0");
        let one = machine(json!({"vsock": {"cid": 3, "socket": "/v"}})).unwrap();
        let refused = one.plan_vsock(&more).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Conflict);
        let generic = json!({"kind": "vsock", "config": {"cid": 4, "socket": "/w"}});
        let generic = serde_json::from_value(generic).unwrap();
        assert_eq!(
            one.plan_device(&generic).unwrap_err().kind,
            ErrorKind::Conflict
        );
        none.plan_device(&generic).unwrap();
    }
}
