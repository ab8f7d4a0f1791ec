//! What is on the PCI bus of a machine.

use std::sync::Arc;

use devices::pci::PciAddress;
use virtio::transport::VirtioPci;

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
