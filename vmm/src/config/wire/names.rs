//! The names of devices on the wire: which may be given, and how the others are made.

use std::collections::BTreeSet;

use api::ControlError;
use api::wire;

use super::{invalid, not_unique};

/// What the names that are made begin with, one for each kind.
const STEMS: [&str; 11] = [
    "_disk",
    "_rng",
    "_net",
    "_input",
    "_fs",
    "_pmem",
    "_vsock",
    "_vdpa",
    "_vfio",
    "_vfio_user",
    "_generic_vhost_user",
];

/// Names that begin like this are the monitor's own.
const RESERVED: &str = "__";

/// The name of the entropy source when none is given.
pub(super) const RNG: &str = "__rng";
/// And of the balloon.
pub(super) const BALLOON: &str = "__balloon";

/// Gives each device that has no name one: its kind and a number, as in
/// `_disk0` and `_vsock1`. All kinds count together.
pub fn name_devices(described: &mut wire::VmConfig) {
    let mut number = next_number(ids(described));
    let disks = described.disks.iter_mut().flatten();
    let nets = described.net.iter_mut().flatten();
    let fs = described.fs.iter_mut().flatten();
    let inputs = described.input.iter_mut().flatten();
    let vsock = described.vsock.iter_mut();
    let devices = disks
        .map(|disk| ("_disk", &mut disk.id))
        .chain(nets.map(|net| ("_net", &mut net.id)))
        .chain(fs.map(|fs| ("_fs", &mut fs.id)))
        .chain(inputs.map(|input| ("_input", &mut input.id)))
        .chain(vsock.map(|vsock| ("_vsock", &mut vsock.id)));
    for (stem, id) in devices {
        if id.is_none() {
            *id = Some(format!("{stem}{number}"));
            number = number.saturating_add(1);
        }
    }
}

/// The first number that is past all those in the names of this form.
pub(in crate::config) fn next_number<'a>(ids: impl Iterator<Item = &'a str>) -> u64 {
    let number_of = |id: &str| {
        let stem = id.trim_end_matches(|c: char| c.is_ascii_digit());
        let digits = id.get(stem.len()..)?;
        STEMS.contains(&stem).then(|| digits.parse::<u64>().ok())?
    };
    let highest = ids.filter_map(number_of).max();
    highest.map_or(0, |highest| highest.saturating_add(1))
}

/// Every name in the description.
pub(super) fn ids(described: &wire::VmConfig) -> impl Iterator<Item = &str> {
    let disks = described.disks.iter().flatten().map(|disk| &disk.id);
    let nets = described.net.iter().flatten().map(|net| &net.id);
    let fs = described.fs.iter().flatten().map(|fs| &fs.id);
    let inputs = described.input.iter().flatten().map(|input| &input.id);
    let one = [
        Some(&described.rng.id),
        Some(&described.console.id),
        described.balloon.as_ref().map(|balloon| &balloon.id),
        described.vsock.as_ref().map(|vsock| &vsock.id),
    ];
    let devices = disks
        .chain(nets)
        .chain(fs)
        .chain(inputs)
        .chain(one.into_iter().flatten());
    let groups = described.rate_limit_groups.iter().flatten();
    devices
        .filter_map(|id| id.as_deref())
        .chain(groups.map(|group| group.id.as_str()))
}

/// Checks that no name is there twice and none is the monitor's own.
pub(super) fn check(described: &wire::VmConfig) -> Result<(), ControlError> {
    let mut seen = BTreeSet::new();
    for id in ids(described) {
        check_one(id)?;
        if !seen.insert(id) {
            return Err(not_unique(id));
        }
    }
    Ok(())
}

/// Checks that a client may give this name.
pub(super) fn check_one(id: &str) -> Result<(), ControlError> {
    if id.is_empty() {
        return Err(invalid(
            "Identifier '' is empty: leave it out to have one made",
        ));
    }
    if id.starts_with(RESERVED) && ![RNG, BALLOON].contains(&id) {
        return Err(invalid(format!(
            "Identifier {id} begins with {RESERVED}, which is kept for the monitor's own devices"
        )));
    }
    Ok(())
}
