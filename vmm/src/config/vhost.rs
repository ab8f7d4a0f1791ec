//! Devices that another program serves, in a configuration.
//!
//! Such a program works in the guest's memory, so that is shared: in a machine that is described with such a device
//! unasked; one that runs has the memory that it has.

use virtio::models::{Model, blk, fs, net, vhost_blk, vhost_net};
use virtio::schema::{Field, FieldKind};

use super::{DeviceConfig, VmConfig};

/// The key by which a flag says that another program serves the device.
pub(super) const SWITCH: Field = Field {
    name: "vhost_user",
    kind: FieldKind::Switch,
    required: false,
    help: "another program serves the device",
};

/// What a flag without that key makes, and what with it.
const VARIANTS: &[(&Model, &Model)] = &[
    (&blk::MODEL, &vhost_blk::MODEL),
    (&net::MODEL, &vhost_net::MODEL),
];

/// The model that the text of a flag asks for instead of the flag's own.
pub(super) fn variant(model: &Model, text: &str) -> Option<&'static Model> {
    let asked = text.split(',').any(|item| item == "vhost_user=on");
    let mut variants = VARIANTS.iter().filter(|_| asked);
    variants
        .find(|(usual, _)| usual.kind == model.kind)
        .map(|(_, variant)| *variant)
}

/// The flag that devices of this kind are usually made with, where it is not their own.
pub(super) fn usual_flag(kind: &str) -> Option<&'static str> {
    let mut variants = VARIANTS.iter();
    let found = variants.find(|(_, variant)| variant.kind == kind);
    found.map(|(usual, _)| usual.flag)
}

impl DeviceConfig {
    /// Whether another program serves it, which works in the guest's memory.
    #[must_use]
    pub fn shares_memory(&self) -> bool {
        self.kind == fs::MODEL.kind || VARIANTS.iter().any(|(_, model)| model.kind == self.kind)
    }
}

impl VmConfig {
    /// Has memory be shared where a device needs that.
    pub(super) fn share_memory(&mut self) {
        self.memory.shared |= self.devices.iter().any(DeviceConfig::shares_memory);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;

    fn disk(text: &str) -> Result<DeviceConfig, String> {
        DeviceConfig::from_flag(&blk::MODEL, "--disk", text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_disk_of_another_programs_is_asked_for_with_the_disks_flag() {
        let device = disk("vhost_user=on,socket=/s,num_queues=2,id=d").unwrap();
        assert_eq!(device.kind, "vhost-user-blk");
        assert_eq!(device.config, json!({"socket": "/s", "num_queues": 2}));
        assert_eq!(disk("path=/p").unwrap().kind, "blk");
        for (text, named) in [
            ("vhost_user=on", "'socket' is missing"),
            ("vhost_user=on,socket=/s,path=/p", "unknown key 'path'"),
            ("socket=/s", "unknown key 'socket'"),
        ] {
            let refusal = disk(text).unwrap_err();
            assert!(refusal.contains(named), "{refusal}");
        }
    }

    #[test]
    fn a_card_of_another_programs_is_asked_for_with_the_cards_flag_and_has_an_address() {
        let text = "vhost_user=on,socket=/s,mtu=1400";
        let card = DeviceConfig::from_flag(&net::MODEL, "--net", text).unwrap();
        assert_eq!(card.kind, "vhost-user-net");
        let mut config: VmConfig =
            serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
        config.devices.push(card);
        config.complete(MODELS);
        assert!(config.memory.shared);
        assert_eq!(config.devices[0].id, "_net0");
        assert!(config.devices[0].config["mac"].is_string());
        let waits = "vhost_user=on,socket=/s,vhost_mode=server,num_queues=8";
        let waits = DeviceConfig::from_flag(&net::MODEL, "--net", waits).unwrap();
        let wanted = json!({"socket": "/s", "vhost_mode": "server", "num_queues": 8});
        assert_eq!(waits.config, wanted);
        let both = "vhost_user=on,socket=/s,tap=t";
        let refusal = DeviceConfig::from_flag(&net::MODEL, "--net", both).unwrap_err();
        assert!(
            refusal.to_string().contains("unknown key 'tap'"),
            "{refusal}"
        );
    }

    #[test]
    fn memory_is_shared_where_a_device_needs_that() {
        for (text, shared) in [("vhost_user=on,socket=/s", true), ("path=/p", false)] {
            let mut config: VmConfig =
                serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
            config.devices.push(disk(text).unwrap());
            config.complete(MODELS);
            assert_eq!(config.memory.shared, shared);
            assert_eq!(config.devices[0].id, "_disk0");
        }
    }
}
