//! A device that is to join a machine which exists already.

use virtio::models::Model;

use super::device::free_id;
use super::{ConfigError, DeviceConfig, VmConfig, files};

impl VmConfig {
    /// Gives a device that is to be added to this machine an id if it has none,
    /// and checks it as if it had been there from the start, the files that it
    /// names included. A slot that is left open stays so: the bus knows which
    /// slots have never been used. This configuration stays as it is.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], for the first rule broken.
    pub fn admit(
        &self,
        mut device: DeviceConfig,
        models: &[Model],
    ) -> Result<DeviceConfig, ConfigError> {
        if device.id.is_empty() {
            let taken = self.devices.iter().map(|d| d.id.clone()).collect();
            device.id = free_id(&device.kind, &taken, models);
        }
        let mut whole = self.clone();
        whole.devices.push(device.clone());
        whole.validate_devices(models)?;
        files::check(&whole, models)?;
        Ok(device)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::device::tests::TEST_MODELS;
    use super::*;

    fn machine() -> VmConfig {
        serde_json::from_value(json!({
            "payload": { "kernel": "/k" },
            "devices": [
                { "kind": "blk", "id": "disk0", "address": 1, "config": { "path": "/one" } },
                { "kind": "rng", "id": "rng0", "address": 2 },
            ],
        }))
        .unwrap()
    }

    fn disk(id: &str, path: &str) -> DeviceConfig {
        DeviceConfig {
            kind: "blk".to_owned(),
            id: id.to_owned(),
            address: None,
            config: json!({ "path": path }),
        }
    }

    #[test]
    fn a_device_gets_an_id_and_keeps_what_it_has() {
        let admitted = machine().admit(disk("", "/two"), TEST_MODELS).unwrap();
        assert_eq!((admitted.id.as_str(), admitted.address), ("_disk0", None));
        let given = DeviceConfig {
            address: Some(31),
            ..disk("data", "/two")
        };
        let admitted = machine().admit(given.clone(), TEST_MODELS);
        assert_eq!(admitted, Ok(given));
    }

    #[test]
    fn the_rules_between_devices_hold_for_one_that_comes_later() {
        let refusal = |device| {
            let refused = machine().admit(device, TEST_MODELS);
            refused.unwrap_err().to_string()
        };
        assert!(refusal(disk("disk0", "/two")).contains("the id is taken"));
        assert!(refusal(disk("x", "/one")).contains("same file"));
        assert!(refusal(disk("-", "/two")).contains("--disk id '-'"));
        let in_slot = |address| DeviceConfig {
            address: Some(address),
            ..disk("x", "/two")
        };
        assert!(refusal(in_slot(2)).contains("'rng0' and 'x'"));
        assert!(refusal(in_slot(32)).contains("1 to 31"));
        let unknown = DeviceConfig {
            kind: "nic".to_owned(),
            ..disk("", "/two")
        };
        assert!(refusal(unknown).contains("unknown kind 'nic'"));
        let shapeless = DeviceConfig {
            config: json!({ "paht": "/two" }),
            ..disk("", "")
        };
        assert!(refusal(shapeless).contains("unknown key 'paht'"));
    }
}
