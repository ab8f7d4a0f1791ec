//! PCI: one bus, its functions and their routing.
//!
//! * [`PciRoot`]: bus 0 with its slots, both ways to configuration space, and
//!   the memory windows in which base address registers decode.
//! * [`PciFunction`]: what sits in a slot.
//! * [`ConfigSpace`], [`Msix`]: the parts that functions are made of.
//! * [`PciHotplug`]: how a guest hears of functions that come and go.
//!
//! There are no bridges, no I/O space registers and no interrupt pins; each
//! slot holds function 0 only.

mod config;
mod hotplug;
mod msix;
mod root;
mod routes;

use std::fmt;
use std::sync::{Mutex, PoisonError};

pub use config::{BAR_COUNT, Bar, BarKind, ConfigError, ConfigSpace, ConfigSpaceV1, FunctionId};
pub use hotplug::{EjectRequests, HOTPLUG_LEN, PciHotplug};
pub use msix::{CAPABILITY_ID as MSIX_CAPABILITY_ID, ENTRY_SIZE as MSIX_ENTRY_SIZE, Msix};
pub use msix::{MAX_VECTORS as MSIX_MAX_VECTORS, MsixEntryV1, MsixV1};
pub use root::{PciError, PciRoot, PciRootV1};
pub use routes::Windows;

/// The place of a function on the one bus: slot 0 to 31, function 0.
/// Shown as `0000:00:SS.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress(u8);

impl PciAddress {
    /// How many slots the bus has, the host bridge's (0) included.
    pub const SLOTS: u8 = 32;

    /// The address of `slot`, if there is such a slot.
    #[must_use]
    pub fn new(slot: u8) -> Option<Self> {
        (slot < Self::SLOTS).then_some(Self(slot))
    }

    /// The slot's number, 0 to 31.
    #[must_use]
    pub fn slot(self) -> u8 {
        self.0
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.0", self.0)
    }
}

/// A function in a slot of the bus.
///
/// The root calls it on vCPU threads, concurrently. It holds none of its own
/// locks while it reads or writes; it holds its routing lock during
/// [`PciFunction::bar_mapped`], from where the root must not be called.
pub trait PciFunction: Send + Sync {
    /// The configuration space. Locked for moments only.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// Reads configuration space: 1, 2 or 4 bytes within one 32-bit register
    /// whose offset is below 4096.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset, data);
    }

    /// Writes configuration space, within the bounds of
    /// [`PciFunction::config_read`]. The root follows changed base addresses by itself.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, data);
    }

    /// Reads at byte `offset` of the BAR at register `bar`. At most 8 bytes,
    /// which lie inside the BAR; `data` holds ones beforehand.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes at byte `offset` of the BAR at register `bar`; bounds as for reads.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// The BAR at register `bar` decodes from guest-physical `base` on, or no
    /// longer decodes. Calls alternate for each BAR; a BAR that moves is
    /// unmapped first. The root serialises the calls.
    fn bar_mapped(&self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }
}
