//! Network cards in a configuration: their addresses, and what two of them cannot share.

use std::collections::BTreeMap;

use net::MacAddress;
use serde_json::Value;
use virtio::models::BuildError;
use virtio::models::net::{MODEL, NetConfig, random_mac};
use virtio::models::vhost_net::{self, VhostNetConfig};

use super::{ConfigError, DeviceConfig, VmConfig};

const MAC: &str = "mac";
const DESCRIPTORS: &str = "fd";

impl DeviceConfig {
    /// The configuration of a network card; `None` for another device, or what has another shape.
    #[must_use]
    pub fn network(&self) -> Option<NetConfig> {
        let config = (self.kind == MODEL.kind).then(|| self.config.clone());
        config.and_then(|config| serde_json::from_value(config).ok())
    }
}

/// Whether devices of this kind are network cards.
#[must_use]
pub fn is_card(kind: &str) -> bool {
    [MODEL.kind, vhost_net::MODEL.kind].contains(&kind)
}

impl DeviceConfig {
    /// The configuration of a network card that another program serves; `None` for another device, or what has
    /// another shape.
    #[must_use]
    pub fn served_network(&self) -> Option<VhostNetConfig> {
        let config = (self.kind == vhost_net::MODEL.kind).then(|| self.config.clone());
        config.and_then(|config| serde_json::from_value(config).ok())
    }

    /// Checks a network card; its address, if it is one and has one.
    fn checked_card(&self) -> Result<Option<MacAddress>, BuildError> {
        if let Some(config) = self.served_network() {
            return Ok(config.settings()?.mac);
        }
        let Some(config) = self.network() else {
            return Ok(None);
        };
        config.request()?;
        config.rate_limits()?;
        config.mac()
    }
}

impl VmConfig {
    /// Gives each network card that has none an address: always the same one to
    /// a card of a machine with a name, otherwise a random one. Cards have their ids.
    pub(super) fn complete_networks(&mut self) {
        let name = self.name.clone();
        for device in &mut self.devices {
            if !is_card(&device.kind) {
                continue;
            }
            let mac = match &name {
                Some(name) => address_of(&host(), name, &device.id),
                None => random_mac(),
            };
            if let Value::Object(config) = &mut device.config {
                let mac = interface_address(config).unwrap_or(mac);
                let mac = || Value::String(mac.to_string());
                config.entry(MAC).or_insert_with(mac);
            }
        }
    }

    /// The cards that have open descriptors of the process that they were described to, and their numbers there. They
    /// mean nothing to another one.
    pub fn passed_cards(&self) -> impl Iterator<Item = (&DeviceConfig, &str)> {
        let cards = self
            .devices
            .iter()
            .filter(|device| device.kind == MODEL.kind);
        cards.filter_map(|card| Some((card, card.config.get(DESCRIPTORS)?.as_str()?)))
    }

    /// Checks what the schema cannot say of network cards.
    pub(super) fn validate_networks(&self) -> Result<(), ConfigError> {
        let mut taken: BTreeMap<[u8; 6], &str> = BTreeMap::new();
        for device in &self.devices {
            let checked = device.checked_card();
            let mac = checked.map_err(|error| ConfigError::Network {
                id: device.id.clone(),
                reason: error.to_string(),
            })?;
            let Some(mac) = mac else {
                continue;
            };
            if let Some(first) = taken.insert(mac.octets(), &device.id) {
                return Err(ConfigError::SameMac {
                    mac,
                    first: first.to_owned(),
                    second: device.id.clone(),
                });
            }
        }
        Ok(())
    }
}

/// The address that the card's interface has for it: that of a macvtap.
pub fn interface_address(card: &serde_json::Map<String, Value>) -> Option<MacAddress> {
    net::macvtap_address(card.get("tap")?.as_str()?)
}

/// The host's name, which tells machines of the same name on different hosts apart.
pub fn host() -> String {
    let names = rustix::system::uname();
    names.nodename().to_string_lossy().into_owned()
}

/// The address of a machine's card.
fn address_of(host: &str, machine: &str, card: &str) -> MacAddress {
    // Its halves folded. What it comes to is never to change: guests know their cards by it.
    let hash = hash([host, machine, card].map(str::as_bytes));
    MacAddress::local(hash ^ hash >> 32)
}

/// A number by which texts are told from others (FNV-1a, 64 bits). It is the same for the same ones, always.
pub fn hash<const N: usize>(parts: [&[u8]; N]) -> u64 {
    let bytes = parts.into_iter().flat_map(|part| part.iter().chain(&[0]));
    bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;

    fn config(name: Option<&str>, cards: &[Value]) -> VmConfig {
        let devices: Vec<_> = cards
            .iter()
            .map(|card| json!({ "kind": "net", "config": card }))
            .collect();
        let config = json!({ "payload": { "kernel": "/k" }, "devices": devices });
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.name = name.map(str::to_owned);
        config.complete(MODELS);
        config
    }

    fn macs(config: &VmConfig) -> Vec<String> {
        let cards = config.devices.iter();
        cards
            .map(|card| card.network().unwrap().mac.unwrap())
            .collect()
    }

    #[test]
    fn an_address_is_the_same_for_the_same_card_and_another_for_each() {
        assert_eq!(
            address_of("h", "web", "net0").to_string(),
            "66:2a:c0:ab:31:aa"
        );
        let cards = [json!({}), json!({}), json!({ "mac": "52:54:00:00:00:01" })];
        let web = macs(&config(Some("web"), &cards));
        assert_eq!(web, macs(&config(Some("web"), &cards)));
        assert_eq!(web[2], "52:54:00:00:00:01");
        let mut all = [
            web,
            macs(&config(Some("db"), &cards[..2])),
            macs(&config(None, &cards[..2])),
        ]
        .concat();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 7);
    }

    #[test]
    fn cards_that_share_an_address_or_make_no_sense_are_refused_by_name() {
        let refusal = |cards: &[Value]| {
            let refused = config(None, cards).validate_networks().unwrap_err();
            refused.to_string()
        };
        let mac = json!({ "mac": "52:54:00:00:00:01" });
        assert_eq!(
            refusal(&[mac.clone(), mac]),
            "--net: _net0 and _net1 have the same MAC address 52:54:00:00:00:01: give one of them another"
        );
        let bad = refusal(&[json!({}), json!({ "mac": "01:00:00:00:00:00" })]);
        assert!(
            bad.starts_with("--net (id _net1): mac: 01:00:00:00:00:00 is a multicast"),
            "{bad}"
        );
        let bad = refusal(&[json!({ "bw_size": 5 })]);
        assert!(bad.contains("bw_refill_time"), "{bad}");
    }
}
