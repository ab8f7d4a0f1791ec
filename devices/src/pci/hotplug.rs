//! How a guest hears of functions that came and of functions that are to go,
//! and how it gives one up: three registers of 32 bits with a bit for each slot.
//!
//! | offset | register | access |
//! |---|---|---|
//! | 0 | up: slots into which functions came | reading clears the bytes that were read |
//! | 4 | down: slots whose functions are to go | read-only; a bit stays until the function is gone |
//! | 8 | eject: writing ones gives slots up; reads as the slots that are being emptied | read, write |
//!
//! They follow QEMU's ACPI PCI hot-plug registers (`docs/specs/acpi_pci_hotplug.rst`),
//! without their choice of a bus and with another meaning of reading the eject
//! register: emptying a slot takes a moment, and the guest's `_EJ0` (ACPI 6.5,
//! section 6.3.3) waits until its bit is clear. When the function is there still
//! then, its back end did not drain; the guest may try again.
//!
//! # Nothing is lost
//!
//! Bits wait until the guest looks, and so does the event that tells of them:
//! the interrupt line of [`EventRegister`] stays high meanwhile. A guest that is
//! not yet up finds both once it has a driver for them. A reset empties the
//! slots that were to be emptied ([`PciHotplug::leaving`]), and the next guest
//! finds all that is left when it looks at the bus.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration::{RestoreError, SaveError, SavedState, Section, SectionSet, Snapshot};
use serde::{Deserialize, Serialize};

use super::PciAddress;
use crate::acpi::EventRegister;
use crate::{BusDevice, StartError, Unit};

/// Bytes of the three registers.
pub const HOTPLUG_LEN: u8 = 12;
const UP: usize = 0;
const DOWN: usize = 4;
const EJECT: usize = 8;

/// Hears of slots that the guest gives up. Called on vCPU threads and, when
/// the machine starts, on the control thread; must neither block nor call back.
pub trait EjectRequests: Send + Sync {
    /// The function at `address` is to be taken out; then
    /// [`PciHotplug::removed`] or [`PciHotplug::kept`] is to be called. Of one
    /// slot it may be told more than once.
    fn eject(&self, address: PciAddress);
}

/// The registers. As a [`Unit`] its name is `pci-hotplug`.
///
/// The control thread tells it of functions; the order of calls for a slot is
/// `inserted`, `announce`, then any number of `request_removal`, then `removed`.
pub struct PciHotplug {
    registers: Mutex<Registers>,
    /// Where the guest hears that a bit is up or down, and by which event.
    events: Arc<EventRegister>,
    event: u32,
    ejects: Arc<dyn EjectRequests>,
}

/// A bit for each slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    up: u32,
    down: u32,
    ejecting: u32,
    /// Slots that hold functions that can be ejected. Follows from the
    /// machine's configuration, so it is not saved.
    occupied: u32,
}

impl Registers {
    /// The byte at an offset, 0 past the end; a byte of the up register is cleared by that.
    fn read(&mut self, offset: u64) -> u8 {
        let Ok(at) = usize::try_from(offset) else {
            return 0;
        };
        let byte = |register: u32, start: usize| {
            at.checked_sub(start)
                .and_then(|at| register.to_le_bytes().get(at).copied())
        };
        if let Some(value) = byte(self.up, UP) {
            let mut bytes = self.up.to_le_bytes();
            bytes[at] = 0;
            self.up = u32::from_le_bytes(bytes);
            return value;
        }
        byte(self.down, DOWN)
            .or_else(|| byte(self.ejecting, EJECT))
            .unwrap_or(0)
    }

    /// Takes a write of any width; the slots whose ejection it begins.
    fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        let mut asked = [0; 4];
        for (value, register) in data.iter().zip(0_u64..) {
            let place = usize::try_from(offset.wrapping_add(register))
                .ok()
                .and_then(|at| asked.get_mut(at.checked_sub(EJECT)?));
            if let Some(place) = place {
                *place = *value;
            }
        }
        let begun = u32::from_le_bytes(asked) & self.occupied & !self.ejecting;
        self.ejecting |= begun;
        begun
    }
}

/// Saved form of [`PciHotplug`]. All bits are of slots with functions.
#[derive(Serialize, Deserialize)]
struct HotplugV1 {
    up: u32,
    down: u32,
    ejecting: u32,
}

impl SavedState for HotplugV1 {
    const SCHEMA: &'static str = "pci-hotplug";
    const VERSION: u16 = 1;
}

impl Snapshot for Registers {
    type State = HotplugV1;

    fn save(&self) -> Result<HotplugV1, SaveError> {
        let Self {
            up,
            down,
            ejecting,
            occupied: _,
        } = *self;
        Ok(HotplugV1 { up, down, ejecting })
    }

    fn restore(&mut self, state: HotplugV1) -> Result<(), RestoreError> {
        let HotplugV1 { up, down, ejecting } = state;
        let occupied = self.occupied;
        let strange = (up | down | ejecting) & !occupied;
        if strange != 0 {
            return Err(RestoreError::Invalid {
                schema: HotplugV1::SCHEMA,
                reason: format!("the slots {strange:#010x} are empty and cannot change"),
            });
        }
        *self = Self {
            up,
            down,
            ejecting,
            occupied,
        };
        Ok(())
    }
}

fn bit(address: PciAddress) -> u32 {
    1 << address.slot()
}

/// The slots of a register's bits, lowest first.
fn addresses(bits: u32) -> impl Iterator<Item = PciAddress> {
    (0..PciAddress::SLOTS)
        .filter(move |slot| bits & 1 << slot != 0)
        .filter_map(PciAddress::new)
}

impl PciHotplug {
    /// Makes the registers of an empty bus. Changes are told by `event`, bits
    /// of `events`; slots that the guest gives up go to `ejects`.
    #[must_use]
    pub fn new(events: Arc<EventRegister>, event: u32, ejects: Arc<dyn EjectRequests>) -> Self {
        Self {
            registers: Mutex::default(),
            events,
            event,
            ejects,
        }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A function is at `address` and may be ejected from there. The guest is
    /// not told: it has not looked at the bus yet, or [`PciHotplug::announce`] follows.
    pub fn inserted(&self, address: PciAddress) {
        self.registers().occupied |= bit(address);
    }

    /// Tells the guest of the function at `address`. The machine may be paused.
    pub fn announce(&self, address: PciAddress) {
        self.registers().up |= bit(address);
        self.events.raise(self.event);
    }

    /// Asks the guest to give up the function at `address`, once more if it has
    /// been asked before. The machine may be paused.
    pub fn request_removal(&self, address: PciAddress) {
        self.registers().down |= bit(address);
        self.events.raise(self.event);
    }

    /// Whether the guest has given up the function at `address` and waits for it to go.
    #[must_use]
    pub fn is_ejecting(&self, address: PciAddress) -> bool {
        self.registers().ejecting & bit(address) != 0
    }

    /// The functions that are to go, whether or not the guest has given them
    /// up already. A reset of the machine takes them out.
    #[must_use]
    pub fn leaving(&self) -> Vec<PciAddress> {
        let registers = *self.registers();
        addresses(registers.down | registers.ejecting).collect()
    }

    /// The function at `address` is gone.
    pub fn removed(&self, address: PciAddress) {
        let mut registers = self.registers();
        let Registers {
            up,
            down,
            ejecting,
            occupied,
        } = &mut *registers;
        for register in [up, down, ejecting, occupied] {
            *register &= !bit(address);
        }
    }

    /// The function at `address` could not be taken out, and works on. The
    /// guest sees that it is there still; if it had been asked to give it up,
    /// it is asked still.
    pub fn kept(&self, address: PciAddress) {
        self.registers().ejecting &= !bit(address);
    }

    fn tell(&self, slots: u32) {
        for address in addresses(slots) {
            self.ejects.eject(address);
        }
    }
}

impl BusDevice for PciHotplug {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.registers();
        for (byte, register) in data.iter_mut().zip(0_u64..) {
            *byte = registers.read(offset.wrapping_add(register));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let begun = self.registers().write(offset, data);
        self.tell(begun);
    }
}

impl Unit for PciHotplug {
    fn name(&self) -> &'static str {
        "pci-hotplug"
    }

    /// Tells of ejections that were under way when the state was saved.
    fn start(&self) -> Result<(), StartError> {
        let ejecting = self.registers().ejecting;
        self.tell(ejecting);
        Ok(())
    }

    fn reset(&self) {
        let mut registers = self.registers();
        let occupied = registers.occupied;
        *registers = Registers {
            occupied,
            ..Registers::default()
        };
    }

    fn save(&self) -> Result<Vec<Section>, SaveError> {
        let state = self.registers().save()?;
        Ok(vec![Section::encode(self.name(), &state)?])
    }

    fn restore(&self, set: &mut SectionSet) -> Result<(), RestoreError> {
        let section = set.take(self.name(), HotplugV1::SCHEMA)?;
        self.registers().restore(section.decode()?)
    }
}

#[cfg(test)]
mod tests;
