//! What the flags say of what comes from elsewhere: descriptors that the process was started with, and programs that
//! work in the guest's memory.

use std::os::fd::RawFd;

use clap::ArgMatches;
use serde_json::Value;
use virtio::models::MODELS;

use super::{Flags, RunArgs, devices, read_table};
use crate::config::device::flag_of_kind;
use crate::config::{DeviceConfig, MEMORY_FIELDS, VmConfig};

/// The numbers of descriptors that network cards are to have. What else is wrong with cards is told later.
pub(super) fn taps(matches: &ArgMatches) -> Vec<RawFd> {
    let devices = devices(matches, MODELS).unwrap_or_default();
    let cards = devices.iter().filter_map(DeviceConfig::network);
    let taps = cards.filter_map(|card| card.descriptors().ok().flatten());
    taps.flatten().collect()
}

/// That memory which is said not to be shared does not have to be.
///
/// # Errors
///
/// Another program serves a device.
pub(super) fn check_sharing(
    flags: &Flags<'_>,
    arguments: &RunArgs,
    config: &VmConfig,
) -> anyhow::Result<()> {
    if !flags.has("memory") {
        return Ok(());
    }
    let keys = read_table("--memory", MEMORY_FIELDS, &arguments.memory)?;
    let served = config.devices.iter().find(|device| device.shares_memory());
    if let (Some(Value::Bool(false)), Some(device)) = (keys.get("shared"), served) {
        let flag = flag_of_kind(&device.kind, flags.models);
        anyhow::bail!(
            "--memory shared=off: --{flag} (id {:?}) is served by another program, which works in the guest's memory: \
             leave shared out, or the device",
            device.id
        );
    }
    Ok(())
}
