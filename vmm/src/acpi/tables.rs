//! The tables other than the DSDT.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{AcpiConfig, Processor};
use crate::layout::memory::{ECAM_START, IOAPIC, LAPIC};
use crate::layout::port;

/// In every table's header (section 5.2.6).
pub(super) const OEM_ID: [u8; 6] = *b"VIREO ";
/// Names the machine type to the guest.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"VIREODEV";
/// Of [`OEM_TABLE_ID`].
pub(super) const OEM_REVISION: u32 = 1;

/// Section 5.2.12, table 5.19: the revision of ACPI 6.5.
const MADT_REVISION: u8 = 6;
/// The header, the local APIC's address and the flags.
const MADT_FIXED_LEN: u32 = 44;
/// Written to the reset control register: full reset (section 4.8.3.6).
const RESET_VALUE: u8 = 6;

/// Section 5.2.9.3, table 5.11.
mod boot_arch {
    pub(super) const LEGACY_DEVICES: u16 = 1 << 0;
    pub(super) const I8042: u16 = 1 << 1;
    pub(super) const VGA_NOT_PRESENT: u16 = 1 << 2;
}

/// A table's bytes.
pub(super) fn bytes_of(table: &impl Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The root pointer (section 5.2.5.3), revision 2.
pub(super) fn rsdp(xsdt: u64) -> Rsdp {
    Rsdp::new(OEM_ID, xsdt)
}

/// The table of tables (section 5.2.8).
pub(super) fn xsdt(tables: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(*table);
    }
    xsdt
}

/// The fixed description table (section 5.2.9), revision 6.5.
///
/// Without fixed hardware there are no fixed buttons and no fixed wake bit of
/// the clock, which their flags say by being set; the power button is a device
/// in the DSDT. There is no FACS: without a global lock and firmware waking
/// it is optional (section 5.2.10).
pub(super) fn fadt(config: &AcpiConfig, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc);
    let mut flags = boot_arch::I8042 | boot_arch::VGA_NOT_PRESENT;
    if config.serials.contains(&true) {
        flags |= boot_arch::LEGACY_DEVICES;
    }
    fadt.iapc_boot_arch = flags.into();
    fadt.reset_reg = byte_register(port::RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = byte_register(port::SLEEP_CONTROL);
    fadt.sleep_status_reg = byte_register(port::SLEEP_STATUS);
    fadt.finalize()
}

/// An I/O port of one byte as a generic address (section 5.2.3.2).
fn byte_register(port: u16) -> GAS {
    let address = u64::from(port);
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address,
    )
}

/// Processors and the I/O APIC (section 5.2.12). The flags are zero, since
/// there is no PIC; interrupts of legacy devices are the I/O APIC's pins
/// one to one, so there are no overrides (section 5.2.12.5).
pub(super) fn madt(processors: &[Processor]) -> Vec<u8> {
    let mut entries = Vec::new();
    // APIC ids below 255 are told as local APICs, not x2APICs (section 5.2.12.12).
    for (id, processor) in (0..=u8::MAX).zip(processors) {
        local_apic(id, *processor).to_aml_bytes(&mut entries);
    }
    IoApic::new(0, address32(IOAPIC), 0).to_aml_bytes(&mut entries);

    let mut madt = Sdt::new(
        *b"APIC",
        MADT_FIXED_LEN,
        MADT_REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    madt.write_u32(36, address32(LAPIC));
    madt.append_slice(&entries);
    madt.as_slice().to_vec()
}

/// What the MADT, or `_MAT`, says of one processor (section 5.2.12.2): one that is
/// absent can be added.
pub(super) fn local_apic(id: u8, processor: Processor) -> ProcessorLocalApic {
    let status = match processor {
        Processor::Present => EnabledStatus::Enabled,
        Processor::Absent => EnabledStatus::DisabledOnlineCapable,
    };
    ProcessorLocalApic::new(id, id, status)
}

/// The enhanced configuration space of segment 0, bus 0 (PCI Firmware
/// Specification 3.3, section 4.1.2).
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    mcfg
}

/// An address of the layout that is below 4 GiB.
pub(super) const fn address32(address: u64) -> u32 {
    assert!(address >> 32 == 0);
    #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
    let address = address as u32;
    address
}
