//! The devices of a description: disks and the entropy source.

use std::collections::BTreeMap;
use std::path::Path;

use api::wire::{self, ConsoleMode, ImageType};
use api::{ControlError, ErrorKind};
use block::{Aio, BackingPolicy, Cache, DetectZeroes, Discard, Format, ImageOptions};
use serde::Serialize;
use serde_json::{Map, Value};
use virtio::models::BuildError;
use virtio::models::blk::{self, BlkConfig, OnReadError, OnWriteError};
use virtio::models::console;
use virtio::models::net;
use virtio::models::rng::{self, RngConfig};

use super::super::device::free_id;
use super::super::port::DEVICE;
use super::super::{DeviceConfig, VmConfig};
use super::{
    balloon, conflict, fs, inputs, invalid, missing, names, networks, not_unique, path,
    rate_limiter, rate_limits, vhost, vsock,
};
use crate::layout::PCI_SLOTS;

/// The devices of a description whose devices are all named, for a machine with `cpus` vCPUs.
pub(super) fn from_wire(
    described: &wire::VmConfig,
    cpus: u16,
) -> Result<Vec<DeviceConfig>, ControlError> {
    let mut devices = Vec::new();
    let mut paths: BTreeMap<&Path, bool> = BTreeMap::new();
    for disk in described.disks.iter().flatten() {
        devices.push(DeviceConfig::from_wire_disk(disk, cpus)?);
        let Some(path) = disk.path.as_deref() else {
            continue;
        };
        if let Some(read_only) = paths.insert(path, disk.readonly)
            && !(read_only && disk.readonly)
        {
            return Err(duplicated(path));
        }
    }
    for net in described.net.iter().flatten() {
        devices.push(DeviceConfig::from_wire_net(net, &[])?);
    }
    let rng = &described.rng;
    devices.push(DeviceConfig {
        kind: rng::MODEL.kind.to_owned(),
        id: rng.id.clone().unwrap_or_else(|| names::RNG.to_owned()),
        address: slot("rng", rng.pci_device_id)?,
        config: json(&rng_config(rng)?)?,
    });
    devices.extend(console(described)?);
    for input in described.input.iter().flatten() {
        devices.push(inputs::from_wire(input)?);
    }
    if let Some(described) = &described.balloon {
        devices.push(balloon::from_wire(described)?);
    }
    for directory in described.fs.iter().flatten() {
        devices.push(fs::from_wire(directory)?);
    }
    if let Some(described) = &described.vsock {
        devices.push(vsock::from_wire(described)?);
    }
    Ok(devices)
}

fn rng_config(described: &wire::RngConfig) -> Result<RngConfig, ControlError> {
    let limits = described.rate_limiter_config.as_ref();
    let limits = limits.map(rate_limits).unwrap_or_default();
    let config = RngConfig::new(path("rng.src", &described.src)?, limits);
    config.rate_limits().map_err(|error| {
        let inner = ControlError::from_error(ErrorKind::Invalid, &error);
        inner.context("rng").context(super::INVALID)
    })?;
    Ok(config)
}

/// The device that console and ports are on. What is on it is put in when the configuration is completed.
fn console(described: &wire::VmConfig) -> Result<Option<DeviceConfig>, ControlError> {
    let console = &described.console;
    let off = matches!(console.mode, ConsoleMode::Off | ConsoleMode::Tty);
    let with_console = !off || console.sinks.is_some();
    let with_ports = described
        .ports
        .as_ref()
        .is_some_and(|ports| !ports.is_empty());
    if !with_console && !with_ports {
        return Ok(None);
    }
    Ok(Some(DeviceConfig {
        kind: console::MODEL.kind.to_owned(),
        id: console.id.clone().unwrap_or_else(|| DEVICE.to_owned()),
        address: slot("console", console.pci_device_id)?,
        config: Value::Object(Map::new()),
    }))
}

fn duplicated(path: &Path) -> ControlError {
    conflict(format!("Duplicated device path: {}", path.display()))
}

pub(super) fn json(config: &impl Serialize) -> Result<Value, ControlError> {
    // It fails for no configuration: their keys are texts.
    serde_json::to_value(config)
        .map_err(|error| ControlError::from_error(ErrorKind::Failed, &error))
}

pub(super) fn slot(device: &str, slot: Option<u8>) -> Result<Option<u8>, ControlError> {
    match slot {
        Some(slot) if !(1..=PCI_SLOTS).contains(&slot) => Err(invalid(format!(
            "{device}: pci_device_id {slot} is not from 1 to {PCI_SLOTS}"
        ))),
        slot => Ok(slot),
    }
}

impl DeviceConfig {
    /// Makes the configuration of a disk on a machine with `cpus` vCPUs. Its id is empty where the
    /// description has none.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`].
    pub fn from_wire_disk(described: &wire::DiskConfig, cpus: u16) -> Result<Self, ControlError> {
        missing::disk(described)?;
        if let Some(device) = vhost::disk_from_wire(described)? {
            return Ok(device);
        }
        let Some(image) = described.path.as_deref() else {
            return Err(invalid("disks: one has no path"));
        };
        let mut config = BlkConfig {
            path: path("disks.path", image)?,
            readonly: described.readonly,
            format: match described.image_type {
                ImageType::Raw => Some(Format::Raw),
                ImageType::Qcow2 => Some(Format::Qcow2),
                // What a guest has written into its disk must not decide what the disk is.
                _ => None,
            },
            cache: Cache::default(),
            direct: described.direct.then_some(true),
            discard: if described.sparse {
                Discard::Unmap
            } else {
                Discard::Ignore
            },
            aio: if described.disable_io_uring {
                Aio::Threads
            } else {
                Aio::Auto
            },
            lock: true,
            lease: None,
            rerror: OnReadError::default(),
            werror: OnWriteError::default(),
            detect_zeroes: DetectZeroes::default(),
            backing: if described.backing_files {
                BackingPolicy::Any
            } else {
                BackingPolicy::Deny
            },
            l2_cache_size: None,
            write_threshold: None,
            serial: described.serial.clone(),
            num_queues: Some(u64::try_from(described.num_queues).unwrap_or(u64::MAX)),
            queue_size: described.queue_size.into(),
            bw_size: None,
            bw_refill_time: None,
            bw_one_time_burst: None,
            ops_size: None,
            ops_refill_time: None,
            ops_one_time_burst: None,
            rate_limit_group: described.rate_limit_group.clone(),
        };
        let limits = described.rate_limiter_config.as_ref();
        config.set_rate_limits(limits.map(rate_limits).unwrap_or_default());
        config.rate_limits().map_err(|error| refused(&error))?;
        config.settings(cpus).map_err(|error| refused(&error))?;
        Ok(Self {
            kind: blk::MODEL.kind.to_owned(),
            id: described.id.clone().unwrap_or_default(),
            address: slot("disks", described.pci_device_id)?,
            config: json(&config)?,
        })
    }
}

pub(super) fn refused(error: &BuildError) -> ControlError {
    let inner = ControlError::from_error(ErrorKind::Invalid, error);
    inner.context("disks").context(super::INVALID)
}

impl VmConfig {
    /// What a disk will be that is to be added to this machine: its description and its
    /// configuration, both with its id. Nothing is changed; a slot is not
    /// chosen where none is asked for.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`].
    pub fn plan_disk(
        &self,
        described: &wire::DiskConfig,
    ) -> Result<(wire::DiskConfig, DeviceConfig), ControlError> {
        let mut disk = described.clone();
        let mut device = DeviceConfig::from_wire_disk(&disk, self.cpus.boot)?;
        if device.id.is_empty() {
            device.id = self.free_id(blk::MODEL.kind);
            disk.id = Some(device.id.clone());
        }
        self.check_new(&device)?;
        Ok((disk, device))
    }

    /// What a device of any kind will be that is to be added to this machine.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::from_wire`].
    pub fn plan_device(
        &self,
        described: &wire::VirtioConfig,
    ) -> Result<DeviceConfig, ControlError> {
        if described.kind == net::MODEL.kind && described.config.contains_key("fd") {
            return Err(invalid(
                "device: descriptors come beside the request: use vm.add-net",
            ));
        }
        let mut device = DeviceConfig {
            kind: described.kind.clone(),
            id: described.id.clone().unwrap_or_default(),
            address: slot("device", described.address)?,
            config: Value::Object(described.config.clone()),
        };
        if device.id.is_empty() {
            device.id = self.free_id(&device.kind);
        }
        self.check_new(&device)?;
        networks::give_address(&mut device);
        Ok(device)
    }

    /// What clients are shown of a device of this machine, if it is a disk.
    #[must_use]
    pub fn shown_disk(&self, device: &DeviceConfig) -> Option<wire::DiskConfig> {
        if device.kind != blk::MODEL.kind {
            return vhost::disk_to_wire(device);
        }
        let config = serde_json::from_value(device.config.clone()).ok()?;
        Some(disk_to_wire(&device.id, &config, self.cpus.boot))
    }

    /// Whether this machine can have `device` besides its own.
    pub(super) fn check_new(&self, device: &DeviceConfig) -> Result<(), ControlError> {
        names::check_one(&device.id)?;
        if self.ids().any(|id| id == device.id) {
            return Err(not_unique(&device.id));
        }
        let mut grown = self.clone();
        grown.devices.push(device.clone());
        grown.complete(virtio::models::MODELS);
        grown
            .validate_devices(virtio::models::MODELS)
            .map_err(|error| ControlError::from(&error))?;
        vhost::check_memory(self, device)?;
        self.check_disk_is_new(device)
    }

    /// What a disk of this machine will be after a change. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] when there is no such disk, otherwise as for [`VmConfig::from_wire`].
    pub fn plan_update(&self, request: &wire::VmUpdateDisk) -> Result<DiskUpdate, ControlError> {
        let disk = |device: &&DeviceConfig| device.id == request.id;
        let Some(device) = self.devices.iter().find(disk) else {
            return Err(not_found(&request.id));
        };
        let blk = (device.kind == blk::MODEL.kind)
            .then(|| serde_json::from_value::<BlkConfig>(device.config.clone()));
        let Some(Ok(mut config)) = blk else {
            return Err(invalid(format!("{}: it is no disk", request.id)));
        };
        let mut patch = Map::new();
        if let Some(medium) = request.path.as_deref() {
            if !config.readonly {
                return Err(invalid(format!(
                    "{}: only a read-only disk can be given another medium",
                    request.id
                )));
            }
            config.path = path("path", medium)?;
            patch.insert("path".to_owned(), json(&config.path)?);
        }
        if let Some(limiter) = &request.rate_limiter_config {
            let limits = rate_limits(limiter);
            config.set_rate_limits(limits);
            config.rate_limits().map_err(|error| refused(&error))?;
            patch.insert("limits".to_owned(), json(&limits)?);
        }
        let device = DeviceConfig {
            config: json(&config)?,
            ..device.clone()
        };
        if request.path.is_some() {
            self.check_disk_is_new(&device)?;
        }
        let patch = Value::Object(patch);
        Ok(DiskUpdate { device, patch })
    }

    /// The configuration of the disk `id`, if its image is this machine's to open.
    #[must_use]
    pub fn disk(&self, id: &str) -> Option<BlkConfig> {
        let mut disks = self.devices.iter().filter(|d| d.kind == blk::MODEL.kind);
        let disk = disks.find(|disk| disk.id == id)?;
        serde_json::from_value(disk.config.clone()).ok()
    }

    /// Says that the disk `id` has another image on top, which is opened with `options`.
    pub fn overlay_disk(&mut self, id: &str, path: &Path, options: &ImageOptions) {
        let Some(mut config) = self.disk(id) else {
            return;
        };
        path.clone_into(&mut config.path);
        config.format = options.disk.format;
        config.backing = options.backing;
        let known = self.devices.iter_mut().find(|device| device.id == id);
        if let (Some(device), Ok(config)) = (known, serde_json::to_value(&config)) {
            device.config = config;
        }
    }

    /// A name for a device of this kind.
    pub(super) fn free_id(&self, kind: &str) -> String {
        let taken = self.ids().map(str::to_owned).collect();
        free_id(kind, &taken, virtio::models::MODELS)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = &str> {
        let groups = self.rate_limit_groups.iter().map(|group| group.id.as_str());
        self.devices
            .iter()
            .map(|device| device.id.as_str())
            .chain(groups)
    }

    fn check_disk_is_new(&self, new: &DeviceConfig) -> Result<(), ControlError> {
        let facts = |device: &DeviceConfig| {
            let config: BlkConfig = serde_json::from_value(device.config.clone()).ok()?;
            Some((config.path, config.readonly))
        };
        let Some((path, readonly)) = facts(new) else {
            return Ok(());
        };
        let mut others = self
            .devices
            .iter()
            .filter(|other| other.kind == blk::MODEL.kind && other.id != new.id);
        let clash = others.any(|other| {
            facts(other).is_some_and(|(other, other_readonly)| {
                other == path && !(readonly && other_readonly)
            })
        });
        if clash {
            return Err(duplicated(&path));
        }
        Ok(())
    }
}

/// A change of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskUpdate {
    /// The disk's configuration after it.
    pub device: DeviceConfig,
    /// What the device in the machine is told
    /// ([`virtio::device::VirtioDevice::reconfigure`]).
    pub patch: Value,
}

pub(super) fn not_found(id: &str) -> ControlError {
    let message = format!("Failed to find device corresponding to the given identifier: {id}");
    ControlError::new(ErrorKind::NotFound, message)
}

/// Puts a change of a disk, which makes sense, into the description that has it.
///
/// # Errors
///
/// [`ErrorKind::NotFound`] when no disk of the description has that id.
pub fn update_disk(
    described: &mut wire::VmConfig,
    request: &wire::VmUpdateDisk,
) -> Result<(), ControlError> {
    let mut disks = described.disks.iter_mut().flatten();
    let disk = disks
        .find(|disk| disk.id.as_deref() == Some(&request.id))
        .ok_or_else(|| not_found(&request.id))?;
    if request.path.is_some() {
        disk.path.clone_from(&request.path);
    }
    if let Some(limiter) = &request.rate_limiter_config {
        disk.rate_limiter_config = rate_limiter(rate_limits(limiter));
    }
    Ok(())
}

/// The disks among `devices`, and the first entropy source.
pub(super) fn to_wire(
    devices: &[DeviceConfig],
    cpus: u16,
) -> (Vec<wire::DiskConfig>, Option<wire::RngConfig>) {
    let mut disks = Vec::new();
    let mut rng = None;
    for device in devices {
        disks.extend(vhost::disk_to_wire(device));
        let config = device.config.clone();
        if device.kind == blk::MODEL.kind {
            // Configurations that are valid have their models' shape.
            if let Ok(config) = serde_json::from_value::<BlkConfig>(config) {
                disks.push(disk_to_wire(&device.id, &config, cpus));
            }
        } else if device.kind == rng::MODEL.kind
            && rng.is_none()
            && let Ok(config) = serde_json::from_value::<RngConfig>(config)
        {
            rng = Some(wire::RngConfig {
                id: Some(device.id.clone()),
                rate_limiter_config: rate_limiter(config.rate_limits().unwrap_or_default()),
                src: config.src,
                ..wire::RngConfig::default()
            });
        }
    }
    (disks, rng)
}

fn disk_to_wire(id: &str, config: &BlkConfig, cpus: u16) -> wire::DiskConfig {
    let settings = config.settings(cpus).ok();
    let limits = config.rate_limits().unwrap_or_default();
    wire::DiskConfig {
        id: Some(id.to_owned()),
        iommu: false,
        pci_segment: 0,
        pci_device_id: None,
        path: Some(config.path.clone()),
        readonly: config.readonly,
        direct: config.direct.unwrap_or_else(|| config.cache.direct()),
        num_queues: settings
            .as_ref()
            .map_or(1, |settings| settings.num_queues.into()),
        queue_size: settings.as_ref().map_or(0, |settings| settings.queue_size),
        vhost_user: false,
        vhost_socket: None,
        rate_limit_group: config.rate_limit_group.clone(),
        rate_limiter_config: rate_limiter(limits),
        disable_io_uring: config.aio == Aio::Threads,
        disable_aio: false,
        serial: config.serial.clone(),
        queue_affinity: None,
        backing_files: config.backing != BackingPolicy::Deny,
        sparse: config.discard == Discard::Unmap,
        image_type: match config.format {
            Some(Format::Raw) => ImageType::Raw,
            Some(Format::Qcow2) => ImageType::Qcow2,
            None => ImageType::Unknown,
        },
        lock_granularity: wire::LockGranularity::ByteRange,
    }
}
