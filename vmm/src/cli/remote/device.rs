//! What the verbs for disks and network cards share.

use api::wire::{DeviceInfo, DeviceState, PciDeviceInfo, VirtioConfig, VmConfig};
use serde_json::{Value, json};

use super::super::target::Remote;
use super::{print, print_json, word};
use crate::config::DeviceConfig;

/// How messages call a kind of device.
pub(super) struct Noun {
    /// In full, as in "has no network card".
    pub full: &'static str,
    /// In short, as in "its cards are".
    pub short: &'static str,
}

/// The description, and what the machine says of its devices.
pub(super) fn described(remote: &mut Remote) -> anyhow::Result<(VmConfig, Vec<DeviceInfo>)> {
    let info = remote.client.info();
    let info = info.map_err(|error| remote.failed(error))?;
    let devices = remote.client.devices();
    let devices = devices.map_err(|error| remote.failed(error))?;
    Ok((info.config, devices))
}

/// What `vm.add-virtio` takes for a device.
pub(super) fn request(device: DeviceConfig, noun: &Noun) -> anyhow::Result<VirtioConfig> {
    let Value::Object(config) = device.config else {
        anyhow::bail!("the configuration of a {} is no object", noun.full);
    };
    Ok(VirtioConfig {
        kind: device.kind,
        id: Some(device.id).filter(|id| !id.is_empty()),
        address: device.address,
        config,
    })
}

/// Adds a device and tells where it is. Of a machine that is not booted the device's id is told, which is that of the
/// `last` of its kind in the description.
pub(super) fn add(
    remote: &mut Remote,
    request: &VirtioConfig,
    json: bool,
    noun: &Noun,
    last: fn(VmConfig) -> Option<String>,
) -> anyhow::Result<()> {
    let added = remote.client.add_virtio(request);
    let added: Option<PciDeviceInfo> = added.map_err(|error| remote.failed(error))?;
    if let Some(place) = added {
        return if json {
            print_json(&place)
        } else {
            print(&format!("{} is at {}\n", place.id, place.bdf))
        };
    }
    let info = remote.client.info();
    let info = info.map_err(|error| remote.failed(error))?;
    let id = request.id.clone().or_else(|| last(info.config));
    let id = id.unwrap_or_default();
    if json {
        return print_json(&json!({ "id": id, "state": word(&DeviceState::Configured) }));
    }
    let what = noun.full;
    print(&format!(
        "{id} is described: the machine has this {what} from its next boot on\n"
    ))
}

/// That `id` is one of the devices of this kind, which are `known`.
pub(super) fn check_known<'a>(
    remote: &Remote,
    id: &str,
    noun: &Noun,
    known: impl Iterator<Item = &'a str>,
) -> anyhow::Result<()> {
    let known: Vec<&str> = known.collect();
    if known.contains(&id) {
        return Ok(());
    }
    let Noun { full, short } = noun;
    let those = match known.as_slice() {
        [] => "it has none".to_owned(),
        known => format!("its {short}s are {}", known.join(", ")),
    };
    anyhow::bail!("{} has no {full} '{id}': {those}", remote.who)
}
