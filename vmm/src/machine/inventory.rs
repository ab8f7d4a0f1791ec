//! What is in a machine, for readers on other threads.
//!
//! Reading takes no lock that is held for longer than a moment: it answers while
//! the machine drains, boots or is stuck.

use std::collections::BTreeMap;
use std::sync::Arc;

use api::wire::{DeviceInfo, DeviceNode, DeviceState, LinkState, MemoryRestored};
use devices::input::InputQueue;
use devices::pci::PciAddress;
use virtio::models::balloon::BalloonView;
use virtio::transport::VirtioPci;

use super::fixtures::{Fixture, bars};
use super::vcpus::VcpuView;
use crate::memory::restored::Restored;

/// A device on the PCI bus.
#[derive(Clone)]
pub struct Item {
    /// The model's kind.
    pub kind: String,
    /// Where it is.
    pub address: PciAddress,
    /// The device; its unit's name is its id.
    pub device: Arc<VirtioPci>,
    /// The guest has been asked to give it up.
    pub removing: bool,
}

/// The devices, the vCPUs and the memory of a machine at one time.
#[derive(Clone, Default)]
pub struct Inventory {
    items: Vec<Item>,
    fixtures: Arc<[Fixture]>,
    vcpus: Vec<VcpuView>,
    memory: u64,
    restored: Option<Arc<Restored>>,
}

impl Inventory {
    /// These devices and vCPUs, and `memory` bytes besides what devices have plugged.
    #[must_use]
    pub fn new(
        items: Vec<Item>,
        fixtures: Arc<[Fixture]>,
        vcpus: Vec<VcpuView>,
        memory: u64,
    ) -> Self {
        Self {
            items,
            fixtures,
            vcpus,
            memory,
            restored: None,
        }
    }

    /// The same, with memory that came from a snapshot.
    #[must_use]
    pub fn with_restored(self, restored: Option<Arc<Restored>>) -> Self {
        Self { restored, ..self }
    }

    /// How its memory came from a snapshot, as long as that matters.
    #[must_use]
    pub fn memory_restored(&self) -> Option<MemoryRestored> {
        self.restored.as_ref()?.info()
    }

    /// The vCPUs that the guest has.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuView] {
        &self.vcpus
    }

    /// How much memory the guest has, with what it has plugged, in bytes.
    #[must_use]
    pub fn memory_size(&self) -> u64 {
        let plugged = self.items.iter().filter_map(|item| item.device.memory());
        let plugged = plugged.map(|memory| memory.plugged());
        plugged.fold(self.memory, u64::saturating_add)
    }

    /// Whether there is a device of this kind.
    #[must_use]
    pub fn has_kind(&self, kind: &str) -> bool {
        self.items.iter().any(|item| item.kind == kind)
    }

    /// The balloon.
    #[must_use]
    pub fn balloon(&self) -> Option<&Arc<BalloonView>> {
        self.items.iter().find_map(|item| item.device.balloon())
    }

    /// The keyboards and pointers with their ids, in the order of the devices.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &Arc<InputQueue>)> {
        let devices = self.items.iter().map(|item| &item.device);
        devices.filter_map(|device| Some((device.id(), device.input()?)))
    }

    /// As `vm.devices` lists them: those that can come and go, then those that stay.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceInfo> {
        let info = |item: &Item| DeviceInfo {
            id: item.device.id().to_owned(),
            kind: item.kind.clone(),
            bdf: Some(item.address.to_string()),
            address: None,
            state: item.state(),
            link: item
                .device
                .link()
                .map(|up| if up { LinkState::Up } else { LinkState::Down }),
        };
        let fixtures = self.fixtures.iter().map(Fixture::info);
        self.items.iter().map(info).chain(fixtures).collect()
    }

    /// What every device has counted.
    #[must_use]
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for item in &self.items {
            let counted: BTreeMap<_, _> = item
                .device
                .counters()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect();
            if !counted.is_empty() {
                all.insert(item.device.id().to_owned(), counted);
            }
        }
        all
    }

    /// As `vm.info` shows them: each device below its transport.
    #[must_use]
    pub fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let fixtures = self.fixtures.iter();
        let mut tree: BTreeMap<_, _> = fixtures
            .map(|fixture| (fixture.id.to_owned(), fixture.node()))
            .collect();
        for item in &self.items {
            let id = item.device.id().to_owned();
            let transport = format!("_virtio-pci-{id}");
            let leaf = DeviceNode {
                id: id.clone(),
                resources: Vec::new(),
                parent: Some(transport.clone()),
                children: Vec::new(),
                pci_bdf: None,
            };
            let node = DeviceNode {
                id: transport.clone(),
                resources: bars(&*item.device),
                parent: None,
                children: vec![id.clone()],
                pci_bdf: Some(item.address.to_string()),
            };
            tree.insert(id, leaf);
            tree.insert(transport, node);
        }
        tree
    }
}

impl Item {
    fn state(&self) -> DeviceState {
        if self.removing {
            DeviceState::Removing
        } else if self.device.needs_reset() {
            DeviceState::NeedsReset
        } else if self.device.peer_lost() {
            DeviceState::PeerLost
        } else if self.device.is_active() {
            DeviceState::Active
        } else {
            DeviceState::Present
        }
    }
}
