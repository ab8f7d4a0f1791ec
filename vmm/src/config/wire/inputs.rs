//! The keyboards and pointers of a description.

use api::{ControlError, wire};
use serde_json::Value;
use virtio::models::input::{InputConfig, InputType, MODEL};

use super::super::DeviceConfig;
use super::super::display::{KEYBOARD, TABLET};
use super::devices;

/// Its id is empty where the description has none.
pub(super) fn from_wire(described: &wire::InputConfig) -> Result<DeviceConfig, ControlError> {
    let wire::InputConfig {
        kind,
        serial,
        id,
        pci_device_id,
    } = described;
    Ok(DeviceConfig {
        kind: MODEL.kind.to_owned(),
        id: id.clone().unwrap_or_default(),
        address: devices::slot("input", *pci_device_id)?,
        config: devices::json(&InputConfig {
            kind: match kind {
                wire::InputType::Keyboard => InputType::Keyboard,
                wire::InputType::Tablet => InputType::Tablet,
                wire::InputType::Mouse => InputType::Mouse,
            },
            serial: serial.clone(),
        })?,
    })
}

/// What clients are shown of a device, if it is a keyboard or pointer.
#[must_use]
pub fn shown_input(device: &DeviceConfig) -> Option<wire::InputConfig> {
    // Those that come with a screen are the screen's, by its description.
    let own = [KEYBOARD, TABLET].contains(&device.id.as_str());
    if device.kind != MODEL.kind || own {
        return None;
    }
    // Configurations that are valid have their models' shape.
    let InputConfig { kind, serial } = serde_json::from_value(Value::clone(&device.config)).ok()?;
    Some(wire::InputConfig {
        kind: match kind {
            InputType::Keyboard => wire::InputType::Keyboard,
            InputType::Tablet => wire::InputType::Tablet,
            InputType::Mouse => wire::InputType::Mouse,
        },
        serial,
        id: Some(device.id.clone()),
        pci_device_id: None,
    })
}

impl super::super::VmConfig {
    /// What clients are shown of this machine's keyboards and pointers, if it has any.
    #[must_use]
    pub fn shown_inputs(&self) -> Option<Vec<wire::InputConfig>> {
        let inputs: Vec<_> = self.devices.iter().filter_map(shown_input).collect();
        (!inputs.is_empty()).then_some(inputs)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::config::VmConfig;
    use api::wire;

    #[test]
    fn inputs_are_shown_as_they_are_described() {
        let body = json!({
            "memory": {"size": 64 << 20},
            "input": [
                {"type": "keyboard"},
                {"type": "tablet", "id": "pen", "serial": "7", "pci_device_id": 9},
            ],
        });
        let described: wire::VmConfig = serde_json::from_value(body).unwrap();
        let config = VmConfig::from_wire(&described).unwrap();
        let pen = config
            .devices
            .iter()
            .find(|device| device.id == "pen")
            .unwrap();
        assert_eq!(pen.address, Some(9));
        let shown = config.to_wire();
        let inputs = shown.input.clone().unwrap();
        assert_eq!(inputs[0].id.as_deref(), Some("_input0"));
        assert_eq!(inputs[1].serial.as_deref(), Some("7"));
        let again = VmConfig::from_wire(&shown).unwrap();
        assert_eq!(again.shown_inputs(), shown.input);
    }

    #[test]
    fn inputs_that_are_none_are_refused() {
        let config = |input: serde_json::Value| {
            let body = json!({"memory": {"size": 64 << 20}, "input": [input]});
            let described = serde_json::from_value::<wire::VmConfig>(body).ok()?;
            VmConfig::from_wire(&described).ok()
        };
        assert!(config(json!({"type": "mouse"})).is_some());
        for bad in [
            json!({}),
            json!({"type": "joystick"}),
            json!({"type": "mouse", "x": 1}),
            json!({"type": "mouse", "id": ""}),
            json!({"type": "mouse", "pci_device_id": 32}),
        ] {
            assert!(config(bad.clone()).is_none(), "{bad}");
        }
    }
}
