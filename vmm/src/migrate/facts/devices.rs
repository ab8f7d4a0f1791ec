//! What the guest sees of its virtio devices.

use migration::transport::compare::Rule;
use migration::transport::message::Disks;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use virtio::models::balloon::{self, BalloonConfig};
use virtio::models::blk::{self, BlkConfig};
use virtio::models::console::{self, ConsoleConfig};
use virtio::models::fs::{self, FsConfig};
use virtio::models::input::{self, InputConfig};
use virtio::models::mem::{self, MemConfig};
use virtio::models::net::{self, NetConfig};
use virtio::models::vhost_blk::{self, VhostBlkConfig};
use virtio::models::vhost_net::{self, VhostNetConfig};
use virtio::models::vsock::{self, VsockConfig};
use virtio::models::{BuildError, Model, parse, rng};

use super::{Format, List, Side, word};
use crate::config::{DeviceConfig, VmConfig};

/// How an image is reached that is read only.
pub(super) const READ_ONLY: &str = "readonly";
/// And one that is written.
const WRITABLE: &str = "writable";
/// How the names of facts end that are of the least unit of an image.
pub(super) const LOGICAL_BLOCK: &str = ".logical_block";
/// The last parts of the names of facts that are there where an image can be had.
pub(super) const OF_IMAGE: [&str; 4] = ["size", "discard", "logical_block", "physical_block"];

/// Of kinds that have nothing but their configuration, what of it the guest sees.
const SEEN: &[(Model, Normal, &[&str])] = &[
    (
        balloon::MODEL,
        normal::<BalloonConfig>,
        &["deflate_on_oom", "free_page_reporting"],
    ),
    (
        console::MODEL,
        normal::<ConsoleConfig>,
        &["console", "ports", "max_ports"],
    ),
    (
        fs::MODEL,
        normal::<FsConfig>,
        &["tag", "num_queues", "queue_size"],
    ),
    (input::MODEL, normal::<InputConfig>, &["type", "serial"]),
    (mem::MODEL, normal::<MemConfig>, &["size", "block"]),
    (
        vhost_blk::MODEL,
        normal::<VhostBlkConfig>,
        &["num_queues", "queue_size"],
    ),
    (
        vhost_net::MODEL,
        normal::<VhostNetConfig>,
        &[
            "mac",
            "mtu",
            "num_queues",
            "queue_size",
            "offload_csum",
            "offload_tso",
        ],
    ),
    (vsock::MODEL, normal::<VsockConfig>, &["cid"]),
    (rng::MODEL, |_| None, &[]),
];

/// Writes a configuration as it is with all that was left out of it.
type Normal = fn(Value) -> Option<Value>;

fn normal<T: DeserializeOwned + Serialize>(value: Value) -> Option<Value> {
    let config: T = serde_json::from_value(value).ok()?;
    serde_json::to_value(config).ok()
}

/// The facts of one device.
struct Device<'a> {
    list: &'a mut List,
    id: &'a str,
}

impl Device<'_> {
    fn put(&mut self, key: &str, value: impl ToString, rule: Rule) {
        let name = format!("device.{}.{key}", self.id);
        self.list.put(&name, value, rule);
    }

    fn same(&mut self, key: &str, value: impl ToString) {
        self.put(key, value, Rule::Same);
    }

    fn optional(&mut self, key: &str, value: Option<impl ToString>) {
        match value {
            Some(value) => self.same(key, value),
            None => self.same(key, "none"),
        }
    }

    fn disk(&mut self, config: &BlkConfig, cpus: u16, side: Side<'_>) -> Result<(), BuildError> {
        let settings = config.settings(cpus)?;
        self.same("queues", settings.num_queues);
        self.same("queue_size", settings.queue_size);
        self.same("serial", config.serial.as_deref().unwrap_or_default());
        let format = config.format.unwrap_or(Format::Raw).name();
        let rule = match side.disks {
            Disks::Mirrored if !config.readonly => Rule::Told,
            Disks::None | Disks::Shared | Disks::Mirrored => Rule::Same,
        };
        self.put("format", format, rule);
        let way = if config.readonly { READ_ONLY } else { WRITABLE };
        let image = side.images.iter().find(|image| image.id == self.id);
        match image.map(|image| &image.found) {
            None => self.same("access", "nobody has looked at it"),
            Some(Err(why)) => self.same("access", why),
            Some(Ok(info)) => {
                self.same("access", way);
                self.same("size", info.size);
                self.same("discard", info.discard);
                self.same("logical_block", info.logical_block);
                // What the guest has been told of it stays.
                self.put("physical_block", info.physical_block, Rule::Told);
            }
        }
        Ok(())
    }

    fn card(&mut self, config: &NetConfig) -> Result<(), BuildError> {
        let settings = config.settings()?;
        self.optional("mac", config.mac()?);
        self.optional("mtu", settings.mtu);
        self.same("queues", settings.pairs);
        self.same("queue_size", settings.queue_size);
        let names = settings.offloads.iter_names();
        let names: Vec<String> = names.map(|(name, _)| name.to_lowercase()).collect();
        self.put("offloads", names.join(" "), Rule::Words);
        Ok(())
    }
}

impl List {
    pub(super) fn device(&mut self, config: &VmConfig, device: &DeviceConfig, side: Side<'_>) {
        let DeviceConfig {
            kind,
            id,
            address,
            config: own,
        } = device;
        let mut facts = Device { list: self, id };
        facts.same("kind", kind);
        facts.optional("slot", *address);
        let read = if *kind == blk::MODEL.kind {
            let disk = parse(blk::MODEL.kind, own.clone());
            disk.and_then(|disk: BlkConfig| facts.disk(&disk, config.cpus.boot, side))
        } else if *kind == net::MODEL.kind {
            let card = parse(net::MODEL.kind, own.clone());
            card.and_then(|card: NetConfig| facts.card(&card))
        } else {
            let seen = SEEN.iter().find(|(other, ..)| other.kind == kind);
            if let Some((_, normal, keys)) = seen {
                let whole = normal(own.clone()).unwrap_or_default();
                keys.iter()
                    .for_each(|key| facts.optional(key, whole.get(key).map(word)));
            }
            Ok(())
        };
        if let Err(error) = read {
            facts.same("config", error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use virtio::models::MODELS;

    use super::*;

    #[test]
    fn of_every_kind_it_is_known_what_the_guest_sees_and_each_key_is_one_of_it() {
        let known = SEEN.iter().map(|(model, ..)| model.kind);
        let known: BTreeSet<_> = known.chain([blk::MODEL.kind, net::MODEL.kind]).collect();
        assert!(MODELS.iter().all(|model| known.contains(model.kind)));
        for (model, _, keys) in SEEN {
            let fields: BTreeSet<_> = model.fields.iter().map(|field| field.name).collect();
            for key in *keys {
                assert!(fields.contains(key), "{key} of {}", model.kind);
            }
        }
    }
}
