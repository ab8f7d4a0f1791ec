//! What a client has said of a machine that is restored: which of its devices are others now.

use std::os::fd::RawFd;

use api::wire::{self, RestoreConfig, RestoreOverrides, RestoredDevice, RestoredMemory};
use api::{ControlError, ErrorKind};
use serde_json::Value;
use virtio::models::{MODELS, net};

use super::super::restored::{KeepError, Renewal, settle};
use super::super::{HostLimits, Thp, VmConfig};
use super::{console, invalid, more_serial, serial};

/// What a card has that gets no descriptors.
const OF_NETWORKS: [&str; 6] = ["tap", "socket", "ip", "mask", "host_mac", "owner"];

/// What there is instead of what is not there.
fn but(known: &str) -> String {
    if known.is_empty() {
        return ", nor any other".to_owned();
    }
    format!(", but {known}")
}

impl KeepError {
    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        let (kind, message) = match self {
            Self::Passed { id, descriptors } => (
                ErrorKind::Conflict,
                format!(
                    "card {id:?} of the snapshot had descriptors that were passed to another process (fd={descriptors}): \
                     pass others and name it in net_fds, or give it a tap in overrides.net"
                ),
            ),
            Self::Seen { flag: _, what } => (
                ErrorKind::Invalid,
                format!("a machine that is restored keeps its {what}"),
            ),
            Self::Unknown { kind, id, known } => (
                ErrorKind::NotFound,
                format!(
                    "the snapshot has no {kind} with the id {id:?}{}",
                    but(known)
                ),
            ),
            Self::Kind { kind, id, saved } => (
                ErrorKind::Invalid,
                format!("{id:?} is no {kind}: the snapshot's is of kind {saved}"),
            ),
            Self::Slot {
                kind,
                id,
                wanted,
                slot,
            } => (
                ErrorKind::Invalid,
                format!(
                    "{kind} {id:?} cannot be in slot {wanted}: the snapshot has it in slot {slot}"
                ),
            ),
            Self::Random(_) => (ErrorKind::Failed, self.to_string()),
        };
        ControlError::new(kind, message)
    }
}

impl VmConfig {
    /// The machine of a snapshot as `request` has it: `passed` are the numbers of descriptors that came along. What it has to
    /// be told of itself is given too. No file is looked at.
    ///
    /// # Errors
    ///
    /// Of the kinds [`ErrorKind::Invalid`], [`ErrorKind::Conflict`], [`ErrorKind::NotFound`] and [`ErrorKind::Unimplemented`].
    pub fn restored(
        &self,
        request: &RestoreConfig,
        passed: &[RawFd],
    ) -> Result<(Self, Renewal), ControlError> {
        let mut config = self.clone();
        if let Some(overrides) = &request.overrides {
            config.apply(overrides)?;
        }
        config.pass(request.net_fds.as_deref().unwrap_or_default(), passed)?;
        let settled = settle(self, &mut config, request.identity);
        let renewal = settled.map_err(|error| error.to_control())?;
        config.complete(MODELS);
        let checked = config.validate(MODELS, &HostLimits::read());
        checked.map_err(|error| ControlError::from(&error))?;
        Ok((config, renewal))
    }

    fn apply(&mut self, overrides: &RestoreOverrides) -> Result<(), ControlError> {
        let RestoreOverrides {
            uuid,
            memory,
            devices,
            serial: first,
            serial2,
            serial3,
            serial4,
            console: virtio_console,
            ports,
            display,
        } = overrides;
        if uuid.is_some() {
            self.smbios.uuid.clone_from(uuid);
        }
        if let Some(memory) = memory {
            self.back(*memory);
        }
        for device in devices {
            self.change(device)?;
        }
        if let Some(described) = first {
            self.serial = serial("overrides.serial", described)?;
        }
        let more = [
            ("overrides.serial2", serial2, &mut self.serial2),
            ("overrides.serial3", serial3, &mut self.serial3),
            ("overrides.serial4", serial4, &mut self.serial4),
        ];
        for (field, described, place) in more {
            if described.is_some() {
                *place = more_serial(field, described.as_ref())?;
            }
        }
        if let Some(described) = virtio_console {
            self.console = console(described)?;
        }
        for port in ports {
            let Some(known) = self.ports.iter_mut().find(|known| known.name == port.name) else {
                let names: Vec<_> = self.ports.iter().map(|port| port.name.as_str()).collect();
                let (name, names) = (&port.name, names.join(", "));
                let message = format!(
                    "overrides.ports: the snapshot has no port {name:?}{}",
                    but(&names)
                );
                return Err(ControlError::new(ErrorKind::NotFound, message));
            };
            known.clone_from(port);
        }
        // The guest keeps the screen that it has.
        if let (Some(display), Some(known)) = (display, &mut self.display) {
            known.vnc.clone_from(&display.vnc);
            known.web.clone_from(&display.web);
        } else if display.is_some() {
            self.display.clone_from(display);
        }
        Ok(())
    }

    fn back(&mut self, memory: RestoredMemory) {
        let RestoredMemory {
            shared,
            hugepages,
            hugepage_size,
            thp,
        } = memory;
        let known = &mut self.memory;
        known.shared = shared.unwrap_or(known.shared);
        known.hugepages = hugepages.unwrap_or(known.hugepages);
        // A size is of pages that there are no more.
        known.hugepage_size = hugepage_size
            .or(known.hugepage_size)
            .filter(|_| known.hugepages);
        if let Some(thp) = thp {
            known.thp = if thp { Thp::On } else { Thp::Off };
        }
    }

    /// Describes a device anew; what is not said of it is filled in by who keeps the machine.
    fn change(&mut self, device: &RestoredDevice) -> Result<(), ControlError> {
        let RestoredDevice { id, config } = device;
        if config.get("fd").is_some_and(|fd| !fd.is_null()) {
            let message = format!(
                "overrides.devices: {id:?}: descriptors come beside the request: use net_fds"
            );
            return Err(invalid(message));
        }
        let Some(known) = self.devices.iter_mut().find(|known| known.id == *id) else {
            let ids: Vec<_> = self
                .devices
                .iter()
                .map(|device| device.id.as_str())
                .collect();
            let ids = ids.join(", ");
            let ids = but(&ids);
            let message = format!("overrides.devices: the snapshot has no {id:?}{ids}");
            return Err(ControlError::new(ErrorKind::NotFound, message));
        };
        // What is described anew has no slot yet.
        known.address = None;
        known.config = Value::Object(config.clone());
        Ok(())
    }

    /// Has the cards that are named use descriptors of taps.
    fn pass(&mut self, cards: &[wire::RestoredNet], passed: &[RawFd]) -> Result<(), ControlError> {
        let wanted = cards
            .iter()
            .map(|card| card.num_fds)
            .fold(0_usize, usize::saturating_add);
        if wanted != passed.len() {
            let came = passed.len();
            return Err(invalid(format!(
                "net_fds wants {wanted} descriptors, and {came} came along"
            )));
        }
        let mut left = passed.iter();
        for card in cards.iter().filter(|card| card.num_fds > 0) {
            let numbers: Vec<_> = left
                .by_ref()
                .take(card.num_fds)
                .map(ToString::to_string)
                .collect();
            let mut devices = self.devices.iter_mut();
            let device =
                devices.find(|device| device.id == card.id && device.kind == net::MODEL.kind);
            let config = device.map(|device| {
                device.address = None;
                &mut device.config
            });
            let Some(Value::Object(config)) = config else {
                let id = &card.id;
                let message = format!(
                    "net_fds: the snapshot has no network card with the id {id:?} that takes a tap"
                );
                return Err(ControlError::new(ErrorKind::NotFound, message));
            };
            config.retain(|key, _| !OF_NETWORKS.contains(&key.as_str()));
            config.insert("fd".to_owned(), Value::String(numbers.join(":")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine() -> VmConfig {
        let mut config: VmConfig = serde_json::from_value(json!({
            "payload": { "kernel": "/k" },
            "devices": [
                { "kind": "blk", "id": "d", "address": 4, "config": { "path": "/d" } },
                { "kind": "net", "id": "n", "address": 3, "config": { "tap": "t" } },
                { "kind": "vsock", "id": "s", "address": 5, "config": { "cid": 3, "socket": "/s" } },
                { "kind": "rng", "id": "r", "address": 2 },
            ],
        }))
        .unwrap();
        config.complete(MODELS);
        config
    }

    fn restored(more: Value, passed: &[RawFd]) -> Result<(VmConfig, Renewal), ControlError> {
        let mut request = json!({ "source_url": "file:///s" });
        let both = request.as_object_mut().unwrap();
        both.extend(more.as_object().unwrap().clone());
        let request: RestoreConfig = serde_json::from_value(request).unwrap();
        machine().restored(&request, passed)
    }

    fn device<'a>(config: &'a VmConfig, id: &str) -> &'a super::super::super::DeviceConfig {
        config
            .devices
            .iter()
            .find(|device| device.id == id)
            .unwrap()
    }

    #[test]
    fn what_is_named_is_another_and_all_else_as_it_was() {
        let same = restored(json!({ "net_fds": null, "zone_updates": [] }), &[]).unwrap();
        assert_eq!(device(&same.0, "d"), device(&machine(), "d"));
        assert!(same.1.cards.is_empty());
        let overrides = json!({
            "uuid": "00112233-4455-6677-8899-aabbccddeeff",
            "memory": { "shared": true },
            "devices": [
                { "id": "d", "config": { "path": "/copy" } },
                { "id": "n", "config": { "tap": "u", "mac": "02:00:00:00:00:01" } },
                { "id": "s", "config": { "cid": 9, "socket": "/other" } },
                { "id": "r", "config": { "src": "/dev/random" } },
            ],
            "serial": { "mode": "Null" },
        });
        let (config, renewal) = restored(json!({ "overrides": overrides }), &[]).unwrap();
        let disk = device(&config, "d");
        assert_eq!(
            (&disk.config["path"], disk.address),
            (&json!("/copy"), Some(4))
        );
        let card = device(&config, "n");
        assert_eq!((&card.config["tap"], card.address), (&json!("u"), Some(3)));
        assert_eq!(device(&config, "s").config["cid"], 9);
        assert_eq!(device(&config, "r").config["src"], "/dev/random");
        assert!(config.memory.shared);
        assert!(config.smbios.uuid.is_some());
        assert_eq!(renewal.cards.len(), 1);
        assert!(!renewal.clock);
        let (config, renewal) = restored(json!({ "identity": "new" }), &[]).unwrap();
        assert!(renewal.clock && config.smbios.uuid.is_some());
    }

    #[test]
    fn descriptors_go_to_the_cards_that_are_named_in_order() {
        let one = json!({ "net_fds": [{ "id": "n", "num_fds": 1, "fds": [99] }] });
        let (config, _) = restored(one.clone(), &[7]).unwrap();
        let card = &device(&config, "n").config;
        assert_eq!((card.get("fd"), card.get("tap")), (Some(&json!("7")), None));
        for (passed, words) in [
            (&[][..], "wants 1 descriptors, and 0"),
            (&[7, 8], "and 2 came"),
        ] {
            let told = restored(one.clone(), passed).unwrap_err();
            assert_eq!(told.kind, ErrorKind::Invalid);
            assert!(told.to_string().contains(words), "{told}");
        }
        let mut made = machine();
        made.devices[1].config = json!({ "tap": "t", "ip": "10.0.0.1", "mask": "255.0.0.0" });
        let request: RestoreConfig = serde_json::from_value(
            json!({ "source_url": "/s", "net_fds": [{ "id": "n", "num_fds": 1 }] }),
        )
        .unwrap();
        assert!(made.restored(&request, &[7]).is_ok());
        // Numbers may be what they were in the other process.
        let mut before = machine();
        before.devices[1].config = json!({ "fd": "7" });
        let request = json!({ "source_url": "/s", "net_fds": [{ "id": "n", "num_fds": 1 }] });
        let request: RestoreConfig = serde_json::from_value(request).unwrap();
        assert!(before.restored(&request, &[7]).is_ok());
        let plain = RestoreConfig::of("/s".to_owned());
        let told = before.restored(&plain, &[]).unwrap_err();
        assert!(told.to_string().contains("name it in net_fds"), "{told}");
        let none = json!({ "net_fds": [{ "id": "d", "num_fds": 1 }] });
        let told = restored(none, &[7]).unwrap_err();
        assert!(
            told.to_string()
                .contains("no network card with the id \"d\""),
            "{told}"
        );
        assert!(restored(json!({}), &[7]).is_err());
    }

    #[test]
    fn what_is_unknown_or_no_other_is_refused_by_name() {
        let device = |device: Value| json!({ "devices": [device] });
        for (overrides, words) in [
            (
                device(json!({ "id": "x", "config": { "path": "/c" } })),
                "has no \"x\", but d, n, s, r",
            ),
            (
                device(json!({ "id": "r", "config": { "path": "/c" } })),
                "unknown key 'path'",
            ),
            (
                device(json!({ "id": "n", "config": { "mac": "zz" } })),
                "zz",
            ),
            (
                device(json!({ "id": "n", "config": { "fd": "3" } })),
                "use net_fds",
            ),
            (json!({ "ports": [{ "name": "p" }] }), "no port \"p\""),
            (json!({ "uuid": "x" }), "'x' is none"),
            (json!({ "display": {} }), "keeps its devices"),
        ] {
            let told = restored(json!({ "overrides": overrides }), &[]).unwrap_err();
            assert!(told.to_string().contains(words), "{told}");
        }
        let unknown = json!({ "source_url": "/s", "overrides": { "disks": [] } });
        assert!(serde_json::from_value::<RestoreConfig>(unknown).is_err());
    }
}
