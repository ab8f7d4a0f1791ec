//! The ACPI tables: how the guest learns of its processors, interrupts, PCI
//! bus and platform devices.
//!
//! [`build`] makes one image, to be copied to [`AcpiImage::address`] before the
//! guest starts; the root pointer (RSDP) is its first byte, so that systems
//! which search the BIOS area find it too. The image depends on its
//! configuration alone, and is part of the machine type.
//!
//! The machine is hardware-reduced (ACPI 6.5, section 4.1): no fixed registers,
//! no SCI, no PIC, no PM timer. Events come through a generic event device,
//! sleep and reset through registers that the FADT names. Table formats cite
//! ACPI 6.5 by section.

mod cpus;
mod dsdt;
mod memory;
mod slots;
mod tables;
#[cfg(test)]
mod tests;

use acpi_tables::rsdp::Rsdp;

use self::dsdt::dsdt;
use self::tables::{bytes_of, fadt, madt, mcfg, rsdp, xsdt};
use crate::layout::MAX_CPUS;
use crate::layout::memory::{ACPI_START, GENERATION_ID};

/// Tables start on this boundary; FACS alone would ask for more.
const TABLE_ALIGN: usize = 16;

/// A range of guest-physical addresses that the PCI bus decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Its first byte.
    pub start: u64,
    /// Its length in bytes; not zero.
    pub len: u64,
}

/// Whether a vCPU is there when the guest boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    /// It is.
    Present,
    /// It may be added later.
    Absent,
}

/// What the tables describe, besides what every machine of this type has:
/// [`crate::layout`], i8042, real-time clock, power button, generation id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// All vCPUs that the machine may have, from 1 to [`MAX_CPUS`]; vCPU *n* has APIC id *n*.
    pub processors: Vec<Processor>,
    /// Whether vCPUs come and go; without, all are present.
    pub cpu_slots: bool,
    /// Slots for memory to be added; 0 when it cannot be.
    pub memory_slots: u32,
    /// Where 32-bit PCI base addresses may be; below 4 GiB.
    pub pci_mmio32: Window,
    /// Where 64-bit PCI base addresses may be, if the address width has room.
    pub pci_mmio64: Option<Window>,
    /// Which of COM1 to COM4 are there.
    pub serials: [bool; 4],
    /// Whether the pvpanic port is there.
    pub pvpanic: bool,
}

/// The tables, as they are in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiImage {
    /// The bytes, the RSDP first.
    pub bytes: Vec<u8>,
    /// Guest-physical address of the first byte, so of the RSDP.
    pub address: u64,
}

/// Why there are no tables for a configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// No vCPU or too many.
    #[error("a machine has 1 to {MAX_CPUS} vCPUs, not {0}")]
    Cpus(u32),
    /// A PCI window that is empty, wraps or is past what its size allows.
    #[error(
        "the {bits}-bit PCI window of {len:#x} bytes at {start:#x} is empty or past {bits} bits"
    )]
    Window {
        /// Address bits of the window.
        bits: u32,
        /// Its first byte.
        start: u64,
        /// Its length.
        len: u64,
    },
    /// The tables do not fit into the BIOS area.
    #[error("the ACPI tables take {len} bytes, and there is room for {max}")]
    TooLarge {
        /// Their length.
        len: usize,
        /// The most.
        max: u64,
    },
}

impl Window {
    /// The last address, if the window is not empty and ends within `bits` bits.
    fn last(self, bits: u32) -> Result<u64, AcpiError> {
        let last = self
            .len
            .checked_sub(1)
            .and_then(|rest| self.start.checked_add(rest));
        let max = u64::MAX >> (64 - bits);
        // The length itself is encoded in so many bits, too.
        last.filter(|last| *last <= max && self.len <= max)
            .ok_or(AcpiError::Window {
                bits,
                start: self.start,
                len: self.len,
            })
    }
}

/// Builds the tables of a machine.
pub fn build(config: &AcpiConfig) -> Result<AcpiImage, AcpiError> {
    let cpus = u32::try_from(config.processors.len()).unwrap_or(u32::MAX);
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(AcpiError::Cpus(cpus));
    }
    let mut image = Image(vec![0; Rsdp::len()]);
    let dsdt_at = image.append(&dsdt(config)?);
    let tables = [
        image.append(&bytes_of(&fadt(config, dsdt_at))),
        image.append(&madt(&config.processors)),
        image.append(&bytes_of(&mcfg())),
    ];
    let xsdt_at = image.append(&bytes_of(&xsdt(&tables)));

    let Image(mut bytes) = image;
    bytes[..Rsdp::len()].copy_from_slice(&bytes_of(&rsdp(xsdt_at)));
    let max = GENERATION_ID - ACPI_START;
    if bytes.len() as u64 > max {
        return Err(AcpiError::TooLarge {
            len: bytes.len(),
            max,
        });
    }
    Ok(AcpiImage {
        bytes,
        address: ACPI_START,
    })
}

/// The image while it grows.
struct Image(Vec<u8>);

impl Image {
    /// Puts a table at the end and returns its guest-physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        let Self(bytes) = self;
        bytes.resize(bytes.len().next_multiple_of(TABLE_ALIGN), 0);
        let address = ACPI_START + bytes.len() as u64;
        bytes.extend_from_slice(table);
        address
    }
}
