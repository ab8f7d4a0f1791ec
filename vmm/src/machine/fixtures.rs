//! The devices that every machine has, or its description gives it, and that stay: for readers on other threads.
//!
//! What is kept here holds no device and none of its files: a reader that has it finds a device whose machine has ended
//! as nothing more than present.

use std::fmt;
use std::sync::{Arc, PoisonError, Weak};

use api::wire::{DeviceInfo, DeviceNode, DeviceState, PciBarType, Resource};
use devices::display::Adapter;
use devices::pci::{BarKind, ConfigSpace, PciAddress, PciFunction};
use devices::serial::Serial;
use devices::watchdog::Watchdog;

/// A device that shows whether the guest uses it.
pub trait Fixed: Send + Sync {
    /// Whether the guest uses it.
    fn in_use(&self) -> bool;

    /// Its configuration space, where it is on the PCI bus.
    fn function(&self) -> Option<&dyn PciFunction> {
        None
    }
}

impl Fixed for Serial {
    fn in_use(&self) -> bool {
        self.is_listened_to()
    }
}

impl Fixed for Watchdog {
    fn in_use(&self) -> bool {
        self.is_counting()
    }

    fn function(&self) -> Option<&dyn PciFunction> {
        Some(self)
    }
}

impl Fixed for Adapter {
    fn in_use(&self) -> bool {
        self.mode().is_some()
    }

    fn function(&self) -> Option<&dyn PciFunction> {
        Some(self)
    }
}

/// Where a fixture is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At so many ports from the first on.
    Ports(u16, u16),
    /// At so many guest-physical bytes from the first on.
    Memory(u64, u64),
    /// On the PCI bus.
    Pci(PciAddress),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ports(first, _) => write!(f, "port {first:#x}"),
            Self::Memory(first, _) => write!(f, "memory {first:#x}"),
            Self::Pci(address) => address.fmt(f),
        }
    }
}

/// A device that stays.
#[derive(Clone)]
pub struct Fixture {
    /// Its id.
    pub id: &'static str,
    /// What it is.
    pub kind: &'static str,
    /// Where it is.
    pub place: Place,
    /// It, where it shows whether the guest uses it.
    pub device: Option<Weak<dyn Fixed>>,
}

impl Fixture {
    /// One that does not show whether the guest uses it.
    #[must_use]
    pub fn still(id: &'static str, kind: &'static str, place: Place) -> Self {
        Self {
            id,
            kind,
            place,
            device: None,
        }
    }

    fn device(&self) -> Option<Arc<dyn Fixed>> {
        self.device.as_ref()?.upgrade()
    }

    /// As `vm.devices` lists it.
    #[must_use]
    pub fn info(&self) -> DeviceInfo {
        let text = self.place.to_string();
        let on_bus = matches!(self.place, Place::Pci(_));
        DeviceInfo {
            id: self.id.to_owned(),
            kind: self.kind.to_owned(),
            bdf: on_bus.then(|| text.clone()),
            address: (!on_bus).then_some(text),
            state: match self.device() {
                Some(device) if device.in_use() => DeviceState::Active,
                _ => DeviceState::Present,
            },
            link: None,
        }
    }

    /// As `vm.info` shows it.
    #[must_use]
    pub fn node(&self) -> DeviceNode {
        let (resources, pci_bdf) = match self.place {
            Place::Ports(base, size) => (vec![Resource::PioAddressRange { base, size }], None),
            Place::Memory(base, size) => (vec![Resource::MmioAddressRange { base, size }], None),
            Place::Pci(address) => {
                let device = self.device();
                let function = device.as_ref().and_then(|device| device.function());
                let decoded = function.map(bars).unwrap_or_default();
                (decoded, Some(address.to_string()))
            }
        };
        DeviceNode {
            id: self.id.to_owned(),
            resources,
            parent: None,
            children: Vec::new(),
            pci_bdf,
        }
    }
}

/// The base address registers of a function that decode.
pub(super) fn bars(function: &(impl PciFunction + ?Sized)) -> Vec<Resource> {
    let config = function.config().lock();
    let decoded = ConfigSpace::decoded(&config.unwrap_or_else(PoisonError::into_inner));
    let bar = |(bar, base): (devices::pci::Bar, Option<u64>)| {
        Some(Resource::PciBar {
            index: bar.index.into(),
            base: base?,
            size: bar.size,
            type_: match bar.kind {
                BarKind::Memory32 => PciBarType::Mmio32,
                BarKind::Memory64 => PciBarType::Mmio64,
            },
            prefetchable: false,
        })
    };
    decoded.into_iter().filter_map(bar).collect()
}
