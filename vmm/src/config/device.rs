//! The devices on the PCI bus, as the command line and files give them.
//!
//! Which kinds there are, their flags and their keys come from the registry
//! of models. This module adds what all of them have: an id and a PCI slot.

use std::collections::BTreeSet;

use api::spelling::nearest;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use virtio::models::Model;
use virtio::schema::{Field, FieldKind};

use super::flag::{self, FlagError, FlagTable};
use super::wire::names::next_number;
use super::{VmConfig, vhost};
use crate::layout::PCI_SLOTS;

/// A device on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// The model's kind.
    pub kind: String,
    /// The name in messages, events and saved state, unique in the machine.
    /// Empty until [`VmConfig::complete`] gives one.
    #[serde(default)]
    pub id: String,
    /// The PCI slot, 1 to [`PCI_SLOTS`], kept for the machine's life.
    /// `None` until [`VmConfig::complete`] gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<u8>,
    /// The model's own configuration: an object after its schema.
    #[serde(default = "empty_object")]
    pub config: Value,
}

fn empty_object() -> Value {
    Value::Object(Map::new())
}

const ID: &str = "id";
const ADDR: &str = "addr";

/// The keys that every device has besides its model's.
pub const COMMON_FIELDS: &[Field] = &[
    Field {
        name: ID,
        kind: FieldKind::Text,
        required: false,
        help: "name of the device; default is _, the flag and a number, as in _disk0",
    },
    Field {
        name: ADDR,
        kind: FieldKind::Number,
        required: false,
        help: "PCI slot, 1 to 31; default is the first free one",
    },
];

/// Why the text of a device's flag was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFlagError {
    /// The keys or values are wrong.
    #[error(transparent)]
    Flag(#[from] FlagError),
    /// `--device` names a kind that there is not.
    #[error("--device: unknown kind '{kind}': {hint}the kinds are {kinds}")]
    UnknownKind {
        /// What was given.
        kind: String,
        /// The kind that it may have been meant to be, as a sentence.
        hint: String,
        /// The kinds there are.
        kinds: String,
    },
    /// The slot is none.
    #[error("{flag}: addr={slot}: the PCI slots are 1 to {PCI_SLOTS}")]
    Slot {
        /// The flag.
        flag: String,
        /// What was given.
        slot: u64,
    },
}

/// The key whose name can be left out in a model's flag: the first one, where
/// it must be given.
#[must_use]
pub fn shorthand(model: &Model) -> Option<&'static str> {
    model
        .fields
        .first()
        .filter(|field| field.required)
        .map(|field| field.name)
}

impl DeviceConfig {
    /// Reads the text of a model's own flag; `flag` is how it was written.
    ///
    /// # Errors
    ///
    /// [`DeviceFlagError`], naming flag and key.
    pub fn from_flag(model: &Model, flag: &str, text: &str) -> Result<Self, DeviceFlagError> {
        let with_peer = vhost::variant(model, text);
        let model = with_peer.unwrap_or(model);
        let mut fields: Vec<Field> = model.fields.iter().chain(COMMON_FIELDS).copied().collect();
        fields.extend(with_peer.map(|_| vhost::SWITCH));
        let table = FlagTable {
            flag,
            fields: &fields,
            shorthand: shorthand(model),
        };
        let mut config = flag::parse(&table, text)?;
        config.remove(vhost::SWITCH.name);
        let id = config.remove(ID);
        let id = id.as_ref().and_then(Value::as_str).unwrap_or_default();
        let address = match config.remove(ADDR).as_ref().and_then(Value::as_u64) {
            None => None,
            Some(slot) => Some(valid_slot(slot).ok_or_else(|| DeviceFlagError::Slot {
                flag: flag.to_owned(),
                slot,
            })?),
        };
        Ok(Self {
            kind: model.kind.to_owned(),
            id: id.to_owned(),
            address,
            config: Value::Object(config),
        })
    }

    /// Reads the text of `--device`: a kind, then what its own flag takes.
    ///
    /// # Errors
    ///
    /// [`DeviceFlagError`], naming flag, kind and key.
    pub fn from_generic_flag(models: &[Model], text: &str) -> Result<Self, DeviceFlagError> {
        let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
        let Some(model) = models.iter().find(|model| model.kind == kind) else {
            let kinds: Vec<&str> = models.iter().map(|model| model.kind).collect();
            let near = nearest(kind, kinds.iter().copied());
            return Err(DeviceFlagError::UnknownKind {
                kind: kind.to_owned(),
                hint: near.map_or_else(String::new, |k| format!("did you mean '{k}'? ")),
                kinds: kinds.join(", "),
            });
        };
        Self::from_flag(model, &format!("--device {kind}"), rest)
    }
}

fn valid_slot(slot: u64) -> Option<u8> {
    u8::try_from(slot)
        .ok()
        .filter(|slot| (1..=PCI_SLOTS).contains(slot))
}

/// The flag that makes devices of this kind, without dashes; the kind where there is no such model.
pub fn flag_of_kind<'a>(kind: &'a str, models: &[Model]) -> &'a str {
    let model = models.iter().find(|model| model.kind == kind);
    let flag = vhost::usual_flag(kind).or(model.map(|model| model.flag));
    flag.unwrap_or(kind)
}

/// An id that is not `taken`, as v1 makes them: an underscore, the flag of the device's model and a number. All
/// kinds count together, as in `_disk0`, `_rng1`, `_disk2`.
pub(super) fn free_id(kind: &str, taken: &BTreeSet<String>, models: &[Model]) -> String {
    let stem = flag_of_kind(kind, models);
    (next_number(taken.iter().map(String::as_str))..=u64::MAX)
        .map(|number| format!("_{stem}{number}"))
        .find(|id| !taken.contains(id))
        .unwrap_or_default()
}

impl VmConfig {
    /// Adds the devices of console and ports, of memory that comes and goes and of the screen, where there are any. Gives each device that has none an id (as in
    /// `_disk0`: its model's flag and the next number) and a PCI slot (the first free one), in order, and each
    /// network card an address, and shares memory with the programs that serve devices. What was
    /// given stays. With more devices than slots the last stay without, which
    /// [`VmConfig::validate`] refuses.
    pub fn complete(&mut self, models: &[Model]) {
        self.complete_console(models);
        self.complete_memory(models);
        self.complete_display(models);
        let mut ids: BTreeSet<String> = self.devices.iter().map(|d| d.id.clone()).collect();
        let mut taken: BTreeSet<u8> = self.devices.iter().filter_map(|d| d.address).collect();
        taken.extend(self.own_slots().into_iter().map(|(slot, _)| slot));
        let mut free = (1..=PCI_SLOTS).filter(|slot| !taken.contains(slot));
        for device in &mut self.devices {
            if device.id.is_empty() {
                device.id = free_id(&device.kind, &ids, models);
                ids.insert(device.id.clone());
            }
            if device.address.is_none() {
                device.address = free.next();
            }
        }
        self.complete_networks();
        self.share_memory();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use virtio::models::{BuildContext, BuildError};

    use super::*;

    fn build(
        _: Value,
        _: &BuildContext,
    ) -> Result<Box<dyn virtio::device::VirtioDevice>, BuildError> {
        Err(BuildError::Field {
            field: "path",
            reason: "a model for tests of the command line is never built".to_owned(),
        })
    }

    /// Models as the registry could have them: one with a required path, one
    /// that needs nothing.
    pub(crate) const TEST_MODELS: &[Model] = &[
        Model {
            kind: "blk",
            flag: "disk",
            about: "a disk",
            fields: &[
                Field {
                    name: "path",
                    kind: FieldKind::Path,
                    required: true,
                    help: "image file or block device",
                },
                Field {
                    name: "readonly",
                    kind: FieldKind::Switch,
                    required: false,
                    help: "refuse writes; default off",
                },
            ],
            build,
        },
        Model {
            kind: "rng",
            flag: "rng",
            about: "a source of random numbers",
            fields: &[Field {
                name: "src",
                kind: FieldKind::Path,
                required: false,
                help: "where the numbers come from; default /dev/urandom",
            }],
            build,
        },
    ];

    fn disk(text: &str) -> Result<DeviceConfig, DeviceFlagError> {
        DeviceConfig::from_flag(&TEST_MODELS[0], "--disk", text)
    }

    #[test]
    fn common_keys_are_taken_out_of_the_models_own() {
        let device = disk("path=a.img,readonly=on,id=root,addr=31").unwrap();
        assert_eq!(
            device,
            DeviceConfig {
                kind: "blk".to_owned(),
                id: "root".to_owned(),
                address: Some(31),
                config: json!({"path": "a.img", "readonly": true}),
            }
        );
        assert_eq!(disk("a.img").unwrap().config, json!({"path": "a.img"}));
    }

    #[test]
    fn the_generic_flag_reads_as_the_models_own() {
        let generic = |text| DeviceConfig::from_generic_flag(TEST_MODELS, text);
        assert_eq!(generic("blk,path=a.img,id=x"), disk("path=a.img,id=x"));
        assert_eq!(generic("rng").unwrap().config, json!({}));
        assert_eq!(
            generic("blkk,path=a").unwrap_err().to_string(),
            "--device: unknown kind 'blkk': did you mean 'blk'? the kinds are blk, rng"
        );
        assert_eq!(
            generic("blk").unwrap_err().to_string(),
            "--device blk: 'path' is missing: add path=…"
        );
    }

    #[test]
    fn slots_outside_the_bus_are_refused() {
        for slot in [0, 32, 256, u64::MAX] {
            assert_eq!(
                disk(&format!("a.img,addr={slot}")),
                Err(DeviceFlagError::Slot {
                    flag: "--disk".to_owned(),
                    slot
                })
            );
        }
    }

    fn completed(devices: Vec<DeviceConfig>) -> Vec<(String, Option<u8>)> {
        let mut config: VmConfig =
            serde_json::from_value(json!({"payload": {"kernel": "/k"}})).unwrap();
        config.devices = devices;
        config.complete(TEST_MODELS);
        config
            .devices
            .into_iter()
            .map(|d| (d.id, d.address))
            .collect()
    }

    #[test]
    fn open_ids_and_slots_are_filled_round_the_given_ones() {
        let rng = DeviceConfig::from_generic_flag(TEST_MODELS, "rng").unwrap();
        let devices = vec![
            disk("a").unwrap(),
            disk("b,id=_disk0,addr=1").unwrap(),
            rng,
            disk("c,addr=3").unwrap(),
            disk("d").unwrap(),
        ];
        let expected = [
            ("_disk1", 2),
            ("_disk0", 1),
            ("_rng2", 4),
            ("_disk3", 3),
            ("_disk4", 5),
        ];
        assert_eq!(
            completed(devices),
            expected.map(|(id, slot)| (id.to_owned(), Some(slot)))
        );
    }

    #[test]
    fn devices_past_the_last_slot_stay_without_one() {
        let slots = completed((0..33).map(|_| disk("a").unwrap()).collect());
        assert_eq!(slots[30].1, Some(31));
        assert_eq!(slots[31].1, None);
    }
}
