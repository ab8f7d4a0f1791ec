//! Memory that the guest plugs and unplugs: the device that `--memory hotplug_method=virtio-mem` means.

use serde::{Deserialize, Serialize};
use virtio::models::Model;
use virtio::models::mem::{MODEL, MemConfig};

use super::{DeviceConfig, MemoryConfig, VmConfig, bytes};

/// The name of the device.
pub const DEVICE: &str = "__memory";

/// The least block: a huge page of the host.
const MIN_BLOCK: u64 = 2 << 20;

/// Blocks are so large that there are no more than this: each costs the monitor some bytes, and all that go through
/// memory some time.
const MAX_BLOCKS: u64 = 2048;

/// How memory is added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HotplugMethod {
    /// In pieces that stay, by ACPI.
    #[default]
    Acpi,
    /// In blocks that come and go, by virtio-mem.
    VirtioMem,
}

/// A rule on memory that comes and goes that is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    /// A device that nobody asked for in the way in which it can be had.
    #[error(
        "'{id}': memory that comes and goes is had by --memory hotplug_method=virtio-mem,hotplug_size=…, once"
    )]
    Stray {
        /// Its id.
        id: String,
    },
    /// It is needed.
    #[error("'{DEVICE}' is the machine's memory (--memory hotplug_method=virtio-mem) and stays")]
    Missing,
    /// The region is not whole blocks.
    #[error(
        "--memory hotplug_size={}: so much memory comes and goes in blocks of {}: give a multiple of it",
        bytes(*size), bytes(*block)
    )]
    Region {
        /// What was asked for, in bytes.
        size: u64,
        /// The size of a block in bytes.
        block: u64,
    },
    /// More is to be there than can be, or not whole blocks.
    #[error(
        "--memory hotplugged_size={}: give up to hotplug_size, {}, in blocks of {}",
        bytes(*size), bytes(*most), bytes(*block)
    )]
    Plugged {
        /// What was asked for, in bytes.
        size: u64,
        /// The most, in bytes.
        most: u64,
        /// The size of a block in bytes.
        block: u64,
    },
    /// Memory that was added by ACPI is part of the size.
    #[error(
        "--memory hotplugged_size={}: only with hotplug_method=virtio-mem: otherwise give a larger size",
        bytes(*size)
    )]
    Method {
        /// What was asked for, in bytes.
        size: u64,
    },
}

/// Whether this is memory that comes and goes.
#[must_use]
pub fn is_plugged(device: &DeviceConfig) -> bool {
    device.kind == MODEL.kind
}

impl MemoryConfig {
    /// Whether memory can be added by ACPI.
    #[must_use]
    pub fn has_slots(&self) -> bool {
        self.hotplug_method == HotplugMethod::Acpi && self.hotplug_size > 0
    }

    /// The size of the blocks that come and go, in bytes; `None` where none do.
    #[must_use]
    pub fn plug_block(&self) -> Option<u64> {
        if self.hotplug_method == HotplugMethod::Acpi || self.hotplug_size == 0 {
            return None;
        }
        let even = self.hotplug_size.div_ceil(MAX_BLOCKS);
        let even = even.checked_next_power_of_two().unwrap_or(1 << 63);
        Some(even.max(self.page_size()).max(MIN_BLOCK))
    }

    fn validate_plug(&self) -> Result<(), PlugError> {
        let size = self.hotplugged_size;
        let Some(block) = self.plug_block() else {
            return match size {
                0 => Ok(()),
                size => Err(PlugError::Method { size }),
            };
        };
        let most = self.hotplug_size;
        if !most.is_multiple_of(block) {
            return Err(PlugError::Region { size: most, block });
        }
        if size > most || !size.is_multiple_of(block) {
            return Err(PlugError::Plugged { size, most, block });
        }
        Ok(())
    }
}

impl VmConfig {
    /// Gives the machine the device by which its memory comes and goes, and lets one that is there already know how much that is.
    pub fn complete_memory(&mut self, models: &[Model]) {
        let Some(block) = self.memory.plug_block() else {
            return;
        };
        if !models.iter().any(|model| model.kind == MODEL.kind) {
            return;
        }
        let config = MemConfig {
            size: self.memory.hotplug_size,
            requested: self.memory.hotplugged_size,
            block,
        };
        // It has the shape of an object.
        let config = serde_json::to_value(config).unwrap_or_default();
        match self.devices.iter_mut().find(|device| device.id == DEVICE) {
            Some(device) => device.config = config,
            None => self.devices.push(DeviceConfig {
                kind: MODEL.kind.to_owned(),
                id: DEVICE.to_owned(),
                address: None,
                config,
            }),
        }
    }

    /// Checks the rules on memory that comes and goes.
    pub(super) fn validate_plug(&self) -> Result<(), PlugError> {
        self.memory.validate_plug()?;
        let wanted = self.memory.plug_block().is_some();
        let mut devices = self.devices.iter().filter(|device| is_plugged(device));
        if let Some(stray) = devices.find(|device| !wanted || device.id != DEVICE) {
            let id = stray.id.clone();
            return Err(PlugError::Stray { id });
        }
        let there = self.devices.iter().any(|device| device.id == DEVICE);
        if wanted && !there {
            return Err(PlugError::Missing);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::HostLimits;

    const MIB: u64 = 1 << 20;

    fn machine(memory: serde_json::Value) -> VmConfig {
        let config = json!({"payload": {"kernel": "/k"}, "memory": memory});
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.complete(MODELS);
        config
    }

    fn validate(config: &VmConfig) -> Result<(), String> {
        let host = HostLimits {
            ram: 1 << 50,
            swap: 0,
        };
        let checked = config.validate(MODELS, &host);
        checked.map_err(|error| crate::error::chain(&error))
    }

    fn plugged(size: u64, most: u64) -> VmConfig {
        machine(json!({
            "size": 64 * MIB, "hotplug_method": "virtio-mem", "hotplug_size": most, "hotplugged_size": size,
        }))
    }

    #[test]
    fn the_method_gives_the_machine_a_device() {
        let mut config = plugged(128 * MIB, 512 * MIB);
        validate(&config).unwrap();
        assert!(!config.memory.has_slots());
        let device = &config.devices[0];
        assert_eq!((device.kind.as_str(), device.id.as_str()), ("mem", DEVICE));
        assert_eq!(
            device.config,
            json!({"size": 512 * MIB, "requested": 128 * MIB, "block": 2 * MIB})
        );
        config.memory.hotplugged_size = 0;
        config.complete_memory(MODELS);
        assert_eq!(config.devices.len(), 1);
        assert_eq!(config.devices[0].config["requested"], 0);
        let acpi = machine(json!({"hotplug_size": 512 * MIB}));
        assert!(acpi.devices.is_empty() && acpi.memory.has_slots());
        validate(&acpi).unwrap();
        let none = machine(json!({"hotplug_method": "virtio-mem"}));
        assert!(none.devices.is_empty() && !none.memory.has_slots());
        validate(&none).unwrap();
    }

    #[test]
    fn blocks_grow_with_the_region() {
        let block = |most| plugged(0, most).memory.plug_block().unwrap();
        assert_eq!(block(128 * MIB), 2 * MIB);
        assert_eq!(block(4096 * MIB), 2 * MIB);
        assert_eq!(block(4224 * MIB), 4 * MIB);
        assert_eq!(block(1 << 40), 512 * MIB);
        let mut huge = plugged(0, 4096 * MIB).memory;
        (huge.hugepages, huge.hugepage_size) = (true, Some(1 << 30));
        assert_eq!(huge.plug_block(), Some(1 << 30));
    }

    #[test]
    fn what_cannot_come_and_go_is_refused_with_a_mend() {
        let told = |config: &VmConfig| validate(config).unwrap_err();
        assert!(told(&plugged(0, 100 * MIB)).contains("pieces of 128M"));
        assert!(told(&plugged(0, (1 << 40) + 128 * MIB)).contains("blocks of 1G"));
        assert!(told(&plugged(640 * MIB, 512 * MIB)).contains("hotplugged_size=640M"));
        assert!(told(&plugged(MIB, 512 * MIB)).contains("blocks of 2M"));
        let acpi = machine(json!({"hotplug_size": 512 * MIB, "hotplugged_size": 128 * MIB}));
        assert!(told(&acpi).contains("only with hotplug_method=virtio-mem"));
        let stray = DeviceConfig::from_generic_flag(MODELS, "mem,size=128M").unwrap();
        for mut config in [plugged(0, 512 * MIB), machine(json!({}))] {
            config.devices.push(stray.clone());
            config.complete(MODELS);
            assert!(told(&config).contains("is had by --memory"));
        }
        let mut gone = plugged(0, 512 * MIB);
        gone.devices.clear();
        assert!(told(&gone).contains("and stays"));
    }
}
