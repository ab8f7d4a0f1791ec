//! What a machine is made from, as its clients gave it and as it is built.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use api::{AddDevice, Command, ControlError, ErrorKind, EventKind, Passed, VmState, wire};
use block::ImageOptions;
use serde_json::Value;
use virtio::models::{MODELS, Model};

use super::ports::PortChange;
use crate::config::balloon::BalloonError;
use crate::config::files::{self, OwnFiles};
use crate::config::network::{interface_address, is_card};
use crate::config::restored::Renewal;
use crate::config::wire::{
    DiskUpdate, NetUpdate, address_nets, name_devices, shown_fs, shown_input, update_disk,
    update_net, update_rng,
};
use crate::config::{DeviceConfig, HostLimits, VmConfig};
use crate::machine::resize::plugged_for;
use crate::machine::state::wrong_state;
use crate::opener::Opener;

/// A machine's description in both forms, which say the same.
#[derive(Clone)]
pub struct Description {
    /// As clients of the socket see it.
    pub wire: wire::VmConfig,
    /// As the machine is built.
    pub config: VmConfig,
    /// The descriptors that came with a device, by its id. They are open as long as
    /// it is described: a machine that is booted anew opens its devices anew.
    passed: BTreeMap<String, Arc<Vec<OwnedFd>>>,
}

/// A change of a device.
#[derive(Clone, Debug)]
pub enum Update {
    /// `vm.update-disk`.
    Disk(wire::VmUpdateDisk),
    /// `vm.update-net`.
    Net(wire::VmUpdateNet),
    /// `vm.update-rng`.
    Rng(wire::VmUpdateRng),
}

impl Update {
    /// Of which device.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(request) => &request.id,
            Self::Net(request) => &request.id,
            Self::Rng(request) => &request.id,
        }
    }

    /// Whether it brings a file that the machine did not have.
    #[must_use]
    pub fn names_files(&self) -> bool {
        match self {
            Self::Disk(request) => request.path.is_some(),
            Self::Net(request) => matches!(request.mirror, Some(wire::NetMirror::File(_))),
            Self::Rng(_) => false,
        }
    }

    /// What is told once it has been done.
    #[must_use]
    pub fn event(&self) -> EventKind {
        let id = self.id().to_owned();
        match self {
            Self::Disk(_) => EventKind::DiskUpdated { id },
            Self::Rng(_) => EventKind::RngUpdated { id },
            Self::Net(request) => EventKind::NetUpdated {
                id,
                link: request.link,
            },
        }
    }
}

/// A change that makes sense.
#[derive(Clone, Debug)]
pub struct PlannedUpdate {
    /// The device's configuration after it.
    pub device: DeviceConfig,
    /// What the device in the machine is told.
    pub patch: Value,
}

/// Decides what of a device to be added is left to chance, so that planning it again has the same result.
pub fn settle(device: &mut AddDevice) {
    match device {
        AddDevice::Net(net, _) => {
            let mut described = wire::VmConfig {
                net: Some(vec![net.clone()]),
                ..wire::VmConfig::default()
            };
            address_nets(&mut described);
            if let Some(settled) = described.net.and_then(|nets| nets.into_iter().next()) {
                *net = settled;
            }
        }
        AddDevice::Virtio(device) if is_card(&device.kind) => {
            let mac =
                interface_address(&device.config).unwrap_or_else(virtio::models::net::random_mac);
            let mac = || Value::String(mac.to_string());
            device.config.entry("mac").or_insert_with(mac);
        }
        _ => {}
    }
}

impl Description {
    /// The description of a machine that the command line or a file has given.
    /// It is complete and has been validated.
    #[must_use]
    pub fn of(config: VmConfig) -> Self {
        Self {
            wire: config.to_wire(),
            config,
            passed: BTreeMap::new(),
        }
    }

    /// The description of a machine that is restored, and what it has to be told of itself: that of its snapshot with what
    /// `request` changes, and the descriptors that came along.
    ///
    /// # Errors
    ///
    /// As for [`VmConfig::restored`].
    pub fn restored(
        saved: &VmConfig,
        request: &wire::RestoreConfig,
        mut descriptors: Passed,
    ) -> Result<(Self, Renewal), ControlError> {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let (config, renewal) = saved.restored(request, &numbers)?;
        let mut description = Self::of(config);
        let mut descriptors = descriptors.take().into_iter();
        for card in request
            .net_fds
            .iter()
            .flatten()
            .filter(|card| card.num_fds > 0)
        {
            let own = descriptors.by_ref().take(card.num_fds).collect();
            description.passed.insert(card.id.clone(), Arc::new(own));
        }
        Ok((description, renewal))
    }

    /// The description that a client has given.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] and [`ErrorKind::Conflict`] for what makes no sense, and
    /// [`ErrorKind::Unimplemented`] for what this monitor has not.
    pub fn from_wire(mut wire: wire::VmConfig) -> Result<Self, ControlError> {
        address_nets(&mut wire);
        let config = VmConfig::from_wire(&wire)?;
        Ok(Self {
            wire,
            config,
            passed: BTreeMap::new(),
        })
    }

    /// Whether there is anything to boot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`].
    pub fn check_bootable(&self) -> Result<(), ControlError> {
        self.config.check_bootable()
    }

    /// The description after `command`, which only changes it: there is no machine. The files of a new device are still to
    /// be looked at, as at a boot ([`Description::files_check`]).
    ///
    /// # Errors
    ///
    /// Why it makes no sense; [`ErrorKind::Conflict`] for a command that needs a machine.
    pub fn changed(
        &self,
        command: Command,
        models: &'static [Model],
    ) -> Result<Changed, ControlError> {
        let mut new = self.clone();
        let mut names_files = false;
        match command {
            Command::AddDevice(mut device) => {
                settle(&mut device);
                let planned = self.plan(&device)?;
                new.add(planned);
                names_files = true;
            }
            Command::RemoveDevice(request) => {
                new.retain(|id| id != request.id);
                if new.config.devices.len() == self.config.devices.len() {
                    let message = format!("No device with id {:?} to remove", request.id);
                    return Err(ControlError::new(ErrorKind::NotFound, message));
                }
            }
            Command::Resize(request) => new.resize(&request)?,
            Command::UpdateDisk(request) => {
                let update = Update::Disk(*request);
                let planned = self.plan_update(&update)?;
                name_devices(&mut new.wire);
                names_files = update.names_files();
                new.update(&update, planned);
            }
            Command::UpdateNet(request) => {
                let update = Update::Net(*request);
                let planned = self.plan_update(&update)?;
                name_devices(&mut new.wire);
                names_files = update.names_files();
                new.update(&update, planned);
            }
            Command::UpdateRng(request) => {
                let update = Update::Rng(request);
                let planned = self.plan_update(&update)?;
                new.update(&update, planned);
            }
            Command::AddPort(port) => {
                new.change_ports(&PortChange::Add(*port), models)?;
                names_files = true;
            }
            Command::RemovePort(request) => {
                new.change_ports(&PortChange::Remove(request.name), models)?;
            }
            other => return Err(wrong_state(VmState::Created, None, &other)),
        }
        new.config
            .validate(models, &HostLimits::read())
            .map_err(|error| ControlError::from(&error))?;
        Ok(if names_files {
            Changed::WithFiles(new)
        } else {
            Changed::Whole(new)
        })
    }

    /// Takes up how many vCPUs a machine has been given, and how much memory in all: the
    /// next one has as much from the start.
    pub fn resized(&mut self, cpus: u32, memory: u64) {
        if let Ok(boot) = u16::try_from(cpus) {
            self.config.cpus.boot = boot;
            self.wire.cpus.boot_vcpus = cpus;
        }
        let more = memory.saturating_sub(self.config.memory.size);
        if more > 0 {
            let config = &mut self.config.memory;
            config.size = memory;
            config.hotplug_size = config.hotplug_size.saturating_sub(more);
            let added = self.wire.memory.hotplugged_size.get_or_insert(0);
            *added = added.saturating_add(more);
        }
    }

    fn resize(&mut self, request: &wire::VmResize) -> Result<(), ControlError> {
        if let Some(count) = request.desired_vcpus {
            let cpus = &mut self.config.cpus;
            let most = cpus.most();
            let boot = u16::try_from(count)
                .ok()
                .filter(|boot| (1..=most).contains(boot));
            cpus.boot = boot.ok_or_else(|| {
                let message =
                    format!("{count} vCPUs: this machine has 1 to {most}; max_vcpus says how many");
                ControlError::new(ErrorKind::Invalid, message)
            })?;
            // With fewer at boot, what was all of them is what there may be.
            cpus.max = (most > cpus.boot).then_some(most);
            self.wire.cpus.boot_vcpus = count;
        }
        let block = self.config.memory.plug_block();
        if let (Some(size), Some(block)) = (request.desired_ram, block) {
            let memory = &self.config.memory;
            let requested = plugged_for(memory.size, (memory.hotplug_size, block), size);
            self.request_memory(requested.map_err(|error| error.to_control())?);
        } else if let Some(size) = request.desired_ram {
            // What was added to a machine before is part of it.
            self.wire.memory.size = size;
            self.wire.memory.hotplugged_size = None;
            self.config.memory.size = size;
            self.config.memory.hotplug_size = self.wire.memory.hotplug_size.unwrap_or(0);
        }
        if let Some(size) = request.desired_balloon {
            let resized = self.resize_balloon(size);
            resized.map_err(|error| ControlError::from(&error))?;
        }
        Ok(())
    }

    /// Has the guest of the next machine plug so many bytes of memory that comes and goes.
    pub fn request_memory(&mut self, requested: u64) {
        self.config.memory.hotplugged_size = requested;
        self.config.complete_memory(MODELS);
        self.wire.memory.hotplugged_size = Some(requested).filter(|size| *size > 0);
    }

    /// Has the balloon of the next machine be of another size.
    ///
    /// # Errors
    ///
    /// [`BalloonError::None`] and [`BalloonError::TooLarge`].
    pub fn resize_balloon(&mut self, size: u64) -> Result<(), BalloonError> {
        self.config.resize_balloon(size)?;
        if let Some(balloon) = &mut self.wire.balloon {
            balloon.size = size;
        }
        Ok(())
    }

    /// What a device will be that is to be added. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`], [`ErrorKind::Conflict`], [`ErrorKind::Unimplemented`].
    pub fn plan(&self, device: &AddDevice) -> Result<Planned, ControlError> {
        match device {
            AddDevice::Disk(disk) => {
                let (disk, config) = self.config.plan_disk(disk)?;
                Ok(Planned {
                    disk: Some(disk),
                    ..Planned::of(config)
                })
            }
            AddDevice::Virtio(device) => {
                let config = self.config.plan_device(device)?;
                Ok(Planned {
                    disk: self.config.shown_disk(&config),
                    net: self.config.shown_net(&config),
                    ..Planned::of(config)
                })
            }
            AddDevice::Net(net, descriptors) => {
                let copies = descriptors.iter().map(OwnedFd::try_clone);
                let passed = copies.collect::<Result<Vec<_>, _>>().map_err(|error| {
                    ControlError::from_error(ErrorKind::Failed, &error)
                        .context("the descriptors cannot be kept")
                })?;
                let numbers: Vec<RawFd> = passed.iter().map(AsRawFd::as_raw_fd).collect();
                let (net, config) = self.config.plan_net(net, &numbers)?;
                Ok(Planned {
                    net: Some(net),
                    passed: Arc::new(passed),
                    ..Planned::of(config)
                })
            }
            AddDevice::Vsock(vsock) => Ok(Planned::of(self.config.plan_vsock(vsock)?)),
            AddDevice::Fs(fs) => Ok(Planned::of(self.config.plan_fs(fs)?)),
        }
    }

    /// Takes up a device that has been planned.
    pub fn add(&mut self, planned: Planned) {
        let Planned {
            config,
            disk,
            net,
            passed,
        } = planned;
        if !passed.is_empty() {
            self.passed.insert(config.id.clone(), passed);
        }
        self.config.devices.push(config);
        if self.wire.balloon.is_none() {
            self.wire.balloon = self.config.shown_balloon();
        }
        let input = self.config.devices.last().and_then(shown_input);
        if let Some(input) = input {
            self.wire.input.get_or_insert_default().push(input);
        }
        let fs = self.config.devices.last().and_then(shown_fs);
        if let Some(fs) = fs {
            self.wire.fs.get_or_insert_default().push(fs);
        }
        if self.wire.vsock.is_none() {
            self.wire.vsock = self.config.shown_vsock();
        }
        if let Some(disk) = disk {
            self.wire.disks.get_or_insert_default().push(disk);
        }
        if let Some(net) = net {
            self.wire.net.get_or_insert_default().push(net);
        }
    }

    /// What a device will be after a change. Nothing is changed.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::Invalid`], [`ErrorKind::Conflict`].
    pub fn plan_update(&self, update: &Update) -> Result<PlannedUpdate, ControlError> {
        Ok(match update {
            Update::Disk(request) => {
                let DiskUpdate { device, patch } = self.config.plan_update(request)?;
                PlannedUpdate { device, patch }
            }
            Update::Net(request) => {
                let NetUpdate { device, patch } = self.config.plan_net_update(request)?;
                PlannedUpdate { device, patch }
            }
            Update::Rng(request) => {
                let (device, patch) = self.config.plan_rng_update(request)?;
                PlannedUpdate { device, patch }
            }
        })
    }

    /// Takes up a change of a device that has been planned.
    pub fn update(&mut self, update: &Update, planned: PlannedUpdate) {
        let PlannedUpdate { device, .. } = planned;
        match update {
            Update::Disk(request) => {
                // Every disk is in both forms.
                let _ = update_disk(&mut self.wire, request);
            }
            Update::Net(_) => update_net(&mut self.wire, &device),
            Update::Rng(request) => update_rng(&mut self.wire, request),
        }
        let mut devices = self.config.devices.iter_mut();
        if let Some(known) = devices.find(|known| known.id == device.id) {
            *known = device;
        }
    }

    /// Takes up that the disk `id` has another image on top.
    pub fn overlay(&mut self, id: &str, path: &Path, options: &ImageOptions) {
        self.config.overlay_disk(id, path, options);
        let shown = self.config.devices.iter().find(|device| device.id == id);
        let shown = shown.and_then(|device| self.config.shown_disk(device));
        let mut disks = self.wire.disks.iter_mut().flatten();
        let disk = disks.find(|disk| disk.id.as_deref() == Some(id));
        if let (Some(disk), Some(shown)) = (disk, shown) {
            disk.path = shown.path;
            disk.image_type = shown.image_type;
            disk.backing_files = shown.backing_files;
        }
    }

    /// Keeps those devices whose ids `keep` knows.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.config.devices.retain(|device| keep(&device.id));
        self.config.settle_display();
        self.wire.display.clone_from(&self.config.display);
        // The next machine has its memory whatever the guest of this one has thrown out.
        self.config.complete_memory(MODELS);
        if self.config.shown_balloon().is_none() {
            self.wire.balloon = None;
        }
        if let Some(inputs) = &mut self.wire.input {
            inputs.retain(|input| input.id.as_deref().is_none_or(&keep));
            if inputs.is_empty() {
                self.wire.input = None;
            }
        }
        if let Some(directories) = &mut self.wire.fs {
            directories.retain(|fs| fs.id.as_deref().is_none_or(&keep));
            if directories.is_empty() {
                self.wire.fs = None;
            }
        }
        if self.config.shown_vsock().is_none() {
            self.wire.vsock = None;
        }
        if let Some(disks) = &mut self.wire.disks {
            disks.retain(|disk| disk.id.as_deref().is_none_or(&keep));
            if disks.is_empty() {
                self.wire.disks = None;
            }
        }
        if let Some(nets) = &mut self.wire.net {
            nets.retain(|net| net.id.as_deref().is_none_or(&keep));
            if nets.is_empty() {
                self.wire.net = None;
            }
        }
        self.passed.retain(|id, _| keep(id));
    }

    /// Gives every device its name, as its clients are to see it from now on.
    pub fn name_devices(&mut self) {
        name_devices(&mut self.wire);
    }

    /// [`files::check_all`] for this machine. What is returned does it, not on the control thread: the host may take long.
    pub fn files_check(
        &self,
        models: &'static [Model],
        opener: &Arc<Opener>,
        own: &OwnFiles,
    ) -> impl FnOnce() -> Result<(), ControlError> + Send + use<> {
        let (config, opener, own) = (self.config.clone(), Arc::clone(opener), own.clone());
        move || {
            files::check_all(&config, models, &opener, &own)
                .map_err(|error| ControlError::from(&error))
        }
    }

    /// The same with `device`, which is new or takes the place of the one that has its id.
    pub fn file_check(
        &self,
        device: &DeviceConfig,
        models: &'static [Model],
        opener: &Arc<Opener>,
        own: &OwnFiles,
    ) -> impl FnOnce() -> Result<(), ControlError> + Send + use<> {
        let mut with = self.clone();
        with.config.devices.retain(|known| known.id != device.id);
        with.config.devices.push(device.clone());
        with.files_check(models, opener, own)
    }
}

/// A description after a change.
pub enum Changed {
    /// It can be taken up.
    Whole(Description),
    /// It names files that nobody has looked at.
    WithFiles(Description),
}

/// A device that is to be added, with its name.
#[derive(Clone)]
pub struct Planned {
    /// As it is built.
    pub config: DeviceConfig,
    /// As clients see it, when it is a disk.
    disk: Option<wire::DiskConfig>,
    /// As clients see it, when it is a network card.
    net: Option<wire::NetConfig>,
    /// The descriptors that came along, by whose numbers the configuration names them.
    passed: Arc<Vec<OwnedFd>>,
}

impl Planned {
    /// One that clients see among the devices alone.
    fn of(config: DeviceConfig) -> Self {
        Self {
            config,
            disk: None,
            net: None,
            passed: Arc::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use virtio::models::MODELS;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn changed(description: &Description, command: Command) -> Result<Description, ControlError> {
        description
            .changed(command, MODELS)
            .map(|changed| match changed {
                Changed::Whole(changed) | Changed::WithFiles(changed) => changed,
            })
    }

    #[test]
    fn a_machine_that_is_not_booted_has_no_more_vcpus_than_it_may_have() {
        for max in [2, 4] {
            let wire = json!({ "payload": {}, "cpus": { "boot_vcpus": 2, "max_vcpus": max } });
            let wire = serde_json::from_value(wire).unwrap();
            let mut description = Description::from_wire(wire).unwrap();
            let resize = |description: &Description, count| {
                let request = wire::VmResize {
                    desired_vcpus: Some(count),
                    ..wire::VmResize::default()
                };
                changed(description, Command::Resize(request))
            };
            for count in [0, max + 1, 70_000] {
                let refused = resize(&description, count).err().unwrap();
                assert_eq!(refused.kind, ErrorKind::Invalid, "{refused}");
            }
            for count in [1, max] {
                description = resize(&description, count).unwrap();
                assert_eq!(description.wire.cpus.boot_vcpus, count);
                assert_eq!(u32::from(description.config.cpus.boot), count);
            }
        }
    }

    #[test]
    fn both_forms_agree_on_memory_that_was_added_before_the_boot_in_use_and_between() {
        let wire = json!({
            "payload": {},
            "memory": { "size": 64 * MIB, "hotplug_size": 512 * MIB, "hotplugged_size": 128 * MIB },
        });
        let wire = serde_json::from_value(wire).unwrap();
        let mut description = Description::from_wire(wire).unwrap();
        let agree = |description: &Description, total: u64, left: u64| {
            let (memory, wire) = (description.config.memory, &description.wire.memory);
            let added = wire.hotplugged_size.unwrap_or(0);
            assert_eq!(
                (memory.size, memory.hotplug_size),
                (total * MIB, left * MIB)
            );
            assert_eq!(
                (wire.size + added, wire.hotplug_size),
                (total * MIB, Some(left * MIB + added))
            );
        };
        agree(&description, 192, 384);
        description.resized(1, 448 * MIB);
        agree(&description, 448, 128);
        let request = wire::VmResize {
            desired_ram: Some(100 * MIB),
            ..wire::VmResize::default()
        };
        let changed = changed(&description, Command::Resize(request)).unwrap();
        // Nothing has been added to what it is now: all the room is there again.
        agree(&changed, 100, 512);
    }

    #[test]
    fn descriptors_are_kept_as_long_as_their_card_is_described() {
        let wire = serde_json::from_value(json!({ "payload": {} })).unwrap();
        let mut description = Description::from_wire(wire).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let card = serde_json::from_value(json!({ "id": "n" })).unwrap();
        let add = Command::AddDevice(Box::new(AddDevice::Net(card, vec![theirs.into()].into())));
        description = changed(&description, add).unwrap();
        let wire = description.wire.net.as_ref().unwrap();
        let card = description
            .config
            .devices
            .iter()
            .find_map(DeviceConfig::network);
        assert_eq!(wire[0].mac, card.unwrap().mac);
        // The other end is open.
        ours.set_nonblocking(true).unwrap();
        let read =
            |ours: &std::os::unix::net::UnixStream| std::io::Read::read(&mut { ours }, &mut [0]);
        let waiting = read(&ours).unwrap_err();
        assert_eq!(waiting.kind(), std::io::ErrorKind::WouldBlock);
        let remove = wire::VmRemoveDevice { id: "n".to_owned() };
        description = changed(&description, Command::RemoveDevice(remove)).unwrap();
        assert_eq!(description.wire.net, None);
        // A thread closes it.
        ours.set_nonblocking(false).unwrap();
        assert_eq!(read(&ours).unwrap(), 0);
    }
}
