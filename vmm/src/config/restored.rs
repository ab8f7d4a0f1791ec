//! The machine of a snapshot, as it is restored: what of it may be another, and what of a copy has to be.
//!
//! [`keep`] sees that the guest finds the machine that it knows; [`renew`] makes a copy of it another machine.

use std::collections::BTreeSet;

use api::wire::RestoreIdentity;
use serde_json::{Map, Value};
use virtio::models::MODELS;
use virtio::models::net::random_mac;

use super::device::flag_of_kind;
use super::network::{interface_address, is_card};
use super::{MemoryConfig, VmConfig};
use crate::random::random;

const MAC: &str = "mac";
const DESCRIPTORS: &str = "fd";

/// Why a machine cannot be restored as it is described now. The messages name flags of the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeepError {
    /// A card has descriptors that are another process's.
    #[error(
        "--restore: card {id:?} had descriptors that were passed to another process (fd={descriptors}): \
         give --net id={id},… with some of this one, or with a tap"
    )]
    Passed {
        /// The card.
        id: String,
        /// Their numbers there.
        descriptors: String,
    },
    /// The guest has seen another.
    #[error("{flag}: a machine that is restored keeps its {what}: leave the flag out")]
    Seen {
        /// The flag.
        flag: &'static str,
        /// What it changes.
        what: String,
    },
    /// A device that the snapshot's machine has not.
    #[error("{}: the snapshot has {}", flag(kind, id), others(known))]
    Unknown {
        /// What it is to be.
        kind: String,
        /// Its id.
        id: String,
        /// The ids that there are.
        known: String,
    },
    /// A device of another kind.
    #[error("{}: the snapshot's is of kind {saved}", flag(kind, id))]
    Kind {
        /// What it is to be.
        kind: String,
        /// Its id.
        id: String,
        /// What it was.
        saved: String,
    },
    /// The host gives none.
    #[error("no random numbers for a new identity: {0}")]
    Random(rustix::io::Errno),
    /// A device in another place.
    #[error(
        "{}: addr={wanted}: the snapshot has it in slot {slot}: leave addr out",
        flag(kind, id)
    )]
    Slot {
        /// What it is.
        kind: String,
        /// Its id.
        id: String,
        /// Where it is to be.
        wanted: u8,
        /// Where it was.
        slot: u8,
    },
}

/// The flag that describes a device of this kind, with the device's id if it has one.
fn flag(kind: &str, id: &str) -> String {
    let flag = flag_of_kind(kind, MODELS);
    if id.is_empty() {
        return format!("--{flag}");
    }
    format!("--{flag} (id {id:?})")
}

/// What a snapshot has instead of a device that it has not, and the mend.
fn others(known: &str) -> String {
    if known.is_empty() {
        return "no devices that could be replaced: leave the flag out".to_owned();
    }
    format!("no such device, but {known}: give id= of the one to replace")
}

/// Sees that `config` is still of the machine that was `saved`: a device that is described anew keeps its place, and what is not
/// said of it is as it was.
///
/// # Errors
///
/// What of it the guest has seen otherwise.
pub fn keep(saved: &VmConfig, config: &mut VmConfig) -> Result<(), KeepError> {
    let seen = |flag, what: &str| KeepError::Seen {
        flag,
        what: what.to_owned(),
    };
    let of_memory = |m: &MemoryConfig| (m.size, m.hotplug_size, m.hotplug_method);
    let mut passed = saved.passed_cards();
    // What is described anew has no slot yet.
    if let Some((card, descriptors)) = passed.find(|(card, _)| config.devices.contains(card)) {
        return Err(KeepError::Passed {
            id: card.id.clone(),
            descriptors: descriptors.to_string(),
        });
    }
    if of_memory(&saved.memory) != of_memory(&config.memory) {
        return Err(seen("--memory", &format!("{} bytes", saved.memory.size)));
    }
    if saved.cpus != config.cpus {
        return Err(seen("--cpus", "processors"));
    }
    let fixed = |config: &VmConfig| (config.pvpanic, config.watchdog, config.display.is_some());
    if fixed(saved) != fixed(config) {
        return Err(seen("--pvpanic, --watchdog, --display", "devices"));
    }
    for device in &mut config.devices {
        let (kind, id) = (&device.kind, &device.id);
        let Some(before) = saved.devices.iter().find(|other| other.id == *id) else {
            let ids: Vec<&str> = saved.devices.iter().map(|d| d.id.as_str()).collect();
            return Err(KeepError::Unknown {
                kind: kind.clone(),
                id: id.clone(),
                known: ids.join(", "),
            });
        };
        if before.kind != *kind {
            return Err(KeepError::Kind {
                kind: kind.clone(),
                id: id.clone(),
                saved: before.kind.clone(),
            });
        }
        match (device.address, before.address) {
            (Some(wanted), Some(slot)) if wanted != slot => {
                return Err(KeepError::Slot {
                    kind: kind.clone(),
                    id: id.clone(),
                    wanted,
                    slot,
                });
            }
            (_, slot) => device.address = slot,
        }
        let (Value::Object(config), Value::Object(before)) = (&mut device.config, &before.config)
        else {
            continue;
        };
        let own = config.contains_key(DESCRIPTORS);
        complete(config, before);
        if let (false, Some(Value::String(descriptors))) = (own, config.get(DESCRIPTORS)) {
            return Err(KeepError::Passed {
                id: id.clone(),
                descriptors: descriptors.clone(),
            });
        }
    }
    Ok(())
}

/// Keys of which one that is given is instead of others: what a device is on the host, or the same by another name.
const INSTEAD: [(&[&str], &[&str]); 3] = [
    (
        &["path"],
        &["format", "lease", "write_threshold", "lock", "backing"],
    ),
    (
        &["tap", "fd", "socket"],
        &["tap", "fd", "socket", "ip", "mask", "host_mac", "owner"],
    ),
    (&["queues", "num_queues"], &["queues", "num_queues"]),
];

/// Gives a device's configuration what it does not say from the one `before`: the guest finds the device that it knows. A
/// key of `null` is left out.
fn complete(config: &mut Map<String, Value>, before: &Map<String, Value>) {
    let changes = |key: &str| {
        config
            .get(key)
            .is_some_and(|value| before.get(key) != Some(value))
    };
    let replaced: BTreeSet<&str> = INSTEAD
        .iter()
        .filter(|(given, _)| given.iter().any(|key| changes(key)))
        .flat_map(|(_, others)| others.iter().copied())
        .collect();
    for (key, value) in before {
        // What an image may refer to and who else may use it was said of that image; but none stays none.
        let stays = key == "backing" && value == "deny";
        if stays || !replaced.contains(key.as_str()) {
            config.entry(key).or_insert_with(|| value.clone());
        }
    }
    config.retain(|_, value| !value.is_null());
}

/// What a restored machine has to be told of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Renewal {
    /// The cards whose addresses are others, or that are on another network.
    pub cards: BTreeSet<String>,
    /// Its clock is late.
    pub clock: bool,
}

impl Renewal {
    /// What is to be told of a machine that was `saved`, and whose description `config` [`keep`] has passed.
    #[must_use]
    pub fn of(saved: &VmConfig, config: &VmConfig) -> Self {
        let moved = config.devices.iter().filter(|device| {
            let before = saved.devices.iter().find(|other| other.id == device.id);
            is_card(&device.kind)
                && before.is_some_and(|before| before.config.get(MAC) != device.config.get(MAC))
        });
        Self {
            cards: moved.map(|card| card.id.clone()).collect(),
            clock: false,
        }
    }
}

/// Makes the machine that was `saved` the one that `config` describes now, of this `identity`: [`keep`], and [`renew`] where it is another.
///
/// # Errors
///
/// [`KeepError`]; also when the host has no random numbers.
pub fn settle(
    saved: &VmConfig,
    config: &mut VmConfig,
    identity: RestoreIdentity,
) -> Result<Renewal, KeepError> {
    keep(saved, config)?;
    Ok(match identity {
        RestoreIdentity::Same => Renewal::of(saved, config),
        RestoreIdentity::New => renew(saved, config, random().map_err(KeepError::Random)?),
    })
}

/// Makes the machine that was `saved`, and is described by `config` now, another one: it gets a UUID from `uuid`, and its cards
/// addresses, where they are still the saved ones.
pub fn renew(saved: &VmConfig, config: &mut VmConfig, uuid: [u8; 16]) -> Renewal {
    if config.smbios.uuid == saved.smbios.uuid {
        config.smbios.uuid = Some(random_uuid(uuid));
    }
    let mut cards = BTreeSet::new();
    for device in config.devices.iter_mut().filter(|d| is_card(&d.kind)) {
        cards.insert(device.id.clone());
        let before = saved.devices.iter().find(|other| other.id == device.id);
        let before = before.and_then(|before| before.config.get(MAC));
        if let Value::Object(config) = &mut device.config
            && config.get(MAC) == before
        {
            let own = interface_address(config).unwrap_or_else(random_mac);
            config.insert(MAC.to_owned(), Value::String(own.to_string()));
        }
    }
    Renewal { cards, clock: true }
}

/// A random UUID (version 4, RFC 9562, section 5.4) of random bytes.
fn random_uuid(bytes: [u8; 16]) -> String {
    let bits = u128::from_be_bytes(bytes);
    let bits = bits & !(0xF << 76) | 4 << 76;
    let bits = bits & !(0b11 << 62) | 0b10 << 62;
    let digits = format!("{bits:032x}");
    let part = |range: std::ops::Range<usize>| digits.get(range).unwrap_or_default();
    let parts = [
        part(0..8),
        part(8..12),
        part(12..16),
        part(16..20),
        part(20..32),
    ];
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;
    use crate::config::smbios::parse_uuid;

    fn machine() -> VmConfig {
        let mut config: VmConfig = serde_json::from_value(json!({
            "payload": { "kernel": "/k" },
            "devices": [
                { "kind": "blk", "id": "d", "address": 4, "config": { "path": "/d" } },
                { "kind": "rng", "id": "r", "address": 2 },
                { "kind": "net", "id": "n", "address": 3, "config": { "tap": "t" } },
            ],
        }))
        .unwrap();
        config.complete(MODELS);
        config
    }

    #[test]
    fn what_a_snapshot_has_not_is_told_by_its_flag_without_an_empty_list() {
        let told = |kind: &str, id: &str, known: &str| {
            let [kind, id, known] = [kind, id, known].map(str::to_owned);
            let error = KeepError::Unknown { kind, id, known };
            [error.to_string(), error.to_control().to_string()]
        };
        let [flag, control] = told("blk", "d", "n, r");
        assert!(flag.starts_with("--disk (id \"d\"): the snapshot has no such device, but n, r:"));
        assert!(
            control.ends_with("has no blk with the id \"d\", but n, r"),
            "{control}"
        );
        let [flag, control] = told("rng", "", "");
        assert!(
            flag.starts_with("--rng: the snapshot has no devices"),
            "{flag}"
        );
        assert!(control.ends_with(", nor any other"), "{control}");
    }

    #[test]
    fn a_device_that_replaces_another_keeps_its_place_and_its_address() {
        let saved = machine();
        let mut config = machine();
        config.devices = saved.devices.clone();
        config.devices[0].address = None;
        config.devices[0].config = json!({ "path": "/copy" });
        config.devices[2].config = json!({ "tap": "other" });
        keep(&saved, &mut config).unwrap();
        assert_eq!(config.devices[0].address, Some(4));
        let mac = &config.devices[2].config[MAC];
        assert_eq!(*mac, saved.devices[2].config[MAC]);
        assert!(mac.is_string());
        assert_eq!(Renewal::of(&saved, &config), Renewal::default());
        assert_eq!(config.devices[2].config["tap"], "other");
        config.devices[2].config = json!({ "tap": "t", "mac": "02:00:00:00:00:01" });
        keep(&saved, &mut config).unwrap();
        let told = Renewal::of(&saved, &config).cards;
        assert_eq!(told, BTreeSet::from(["n".to_owned()]));
    }

    #[test]
    fn what_is_not_said_of_a_device_is_as_it_was_but_for_what_is_instead() {
        let completed = |given: Value, before: Value| {
            let (Value::Object(mut given), Value::Object(before)) = (given, before) else {
                unreachable!()
            };
            complete(&mut given, &before);
            Value::Object(given)
        };
        let trusted = json!({ "path": "/d", "lock": false, "backing": "any" });
        assert_eq!(
            completed(json!({ "path": "/c" }), trusted),
            json!({ "path": "/c" })
        );
        let alone = json!({ "path": "/d", "backing": "deny" });
        let expected = json!({ "path": "/c", "backing": "deny" });
        assert_eq!(completed(json!({ "path": "/c" }), alone), expected);
        let disk = json!({ "path": "/d", "format": "raw", "readonly": true, "num_queues": 2 });
        // Another image may be of another format, which taking it for the first one's would harm.
        assert_eq!(
            completed(json!({ "path": "/c" }), disk.clone()),
            json!({ "path": "/c", "readonly": true, "num_queues": 2 })
        );
        assert_eq!(completed(json!({ "path": "/d" }), disk.clone()), disk);
        assert_eq!(
            completed(json!({ "readonly": null, "queues": 1 }), disk),
            json!({ "path": "/d", "format": "raw", "queues": 1 })
        );
        let card = json!({ "tap": "t", "ip": "10.0.0.1", "mac": "02:00:00:00:00:01" });
        assert_eq!(
            completed(json!({ "fd": "3" }), card),
            json!({ "fd": "3", "mac": "02:00:00:00:00:01" })
        );
    }

    #[test]
    fn a_card_of_another_process_s_descriptors_has_to_be_described_anew() {
        let described = |id: &str| {
            let card = json!({ "kind": "net", "id": id, "config": { "fd": "12" } });
            serde_json::from_value(card).unwrap()
        };
        let machine = || {
            let mut config = machine();
            config.devices.truncate(2);
            config.devices.extend(["a", "b"].map(described));
            config.complete(MODELS);
            config
        };
        let saved = machine();
        let told = |config: &VmConfig| keep(&saved, &mut config.clone()).unwrap_err().to_string();
        let mut config = saved.clone();
        for (place, id) in [(2, "a"), (3, "b")] {
            let text = told(&config);
            for part in [
                format!("card {id:?}"),
                "fd=12".to_owned(),
                format!("--net id={id}"),
            ] {
                assert!(text.contains(&part), "{text}");
            }
            config.devices[place] = described(id);
        }
        // One of which nothing is said of its network has them, too.
        let mut other = config.clone();
        other.devices[3].config = json!({ "mtu": 1400 });
        assert!(told(&other).contains("card \"b\""));
        keep(&saved, &mut config).unwrap();
    }

    #[test]
    fn what_the_guest_has_seen_is_kept_and_the_flag_that_changes_it_named() {
        type Change = fn(&mut VmConfig);
        let changes: [(Change, &str); 6] = [
            (
                |c| c.memory.size *= 2,
                "--memory: a machine that is restored keeps",
            ),
            (|c| c.cpus.boot = 2, "--cpus: a machine"),
            (|c| c.watchdog = true, "--watchdog"),
            (|c| c.devices[0].address = Some(9), "slot 4: leave addr out"),
            (
                |c| c.devices[0].id = "e".to_owned(),
                "no such device, but d, r",
            ),
            (|c| c.devices[1].kind = "blk".to_owned(), "of kind rng"),
        ];
        let saved = machine();
        for (change, words) in changes {
            let mut config = saved.clone();
            change(&mut config);
            let told = keep(&saved, &mut config).unwrap_err().to_string();
            assert!(told.contains(words), "{told}");
        }
    }

    #[test]
    fn a_copy_gets_a_uuid_and_addresses_of_its_own_unless_they_are_given() {
        let saved = machine();
        let mut config = saved.clone();
        let told = renew(&saved, &mut config, [0xFF; 16]);
        assert_eq!(told.cards.len(), 1);
        assert!(told.clock);
        let uuid = config.smbios.uuid.clone().unwrap();
        assert_eq!(uuid, "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert!(parse_uuid(&uuid).is_some());
        assert_ne!(config.devices[2].config[MAC], saved.devices[2].config[MAC]);
        assert_eq!(config.devices[..2], saved.devices[..2]);

        let given = "00112233-4455-6677-8899-aabbccddeeff";
        let mut config = saved.clone();
        config.smbios.uuid = Some(given.to_owned());
        config.devices[2].config[MAC] = json!("02:00:00:00:00:01");
        renew(&saved, &mut config, [0; 16]);
        assert_eq!(config.smbios.uuid.as_deref(), Some(given));
        assert_eq!(config.devices[2].config[MAC], "02:00:00:00:00:01");
    }
}
