//! The SMBIOS tables: what the machine says of itself to software that asks
//! for its maker, name, serial number and UUID.
//!
//! [`build`] makes one image: the 64-bit entry point, then the structures. It
//! is copied to [`SmbiosImage::address`], which is in the last 64 KiB below
//! 1 MiB, where systems without EFI look for it, and as far up as the reset vector
//! allows: that page is in use anyway. The image depends on the
//! configuration alone, and its form is part of the machine type.
//!
//! Structures cite the SMBIOS specification (DSP0134) 3.0 by section.

use crate::config::VmConfig;
use crate::config::smbios::parse_uuid;
use crate::layout::memory::{HIGH_RAM_START, LOW_RAM_END, RESET_VECTOR, SMBIOS_START};

/// The tables, as they are in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmbiosImage {
    /// The bytes, the entry point first.
    pub bytes: Vec<u8>,
    /// Guest-physical address of the first byte.
    pub address: u64,
}

/// Why there are no tables for a configuration.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SmbiosImageError {
    /// They do not fit below the reset vector.
    #[error("the SMBIOS tables take {len} bytes, and there is room for {max}: give shorter texts")]
    TooLarge {
        /// Their length.
        len: u64,
        /// The most.
        max: u64,
    },
}

const VENDOR: &str = "Vireo";
/// Names the machine type to the guest.
pub(crate) const MACHINE: &str = "vireo-dev";
/// The specification that the structures follow: 3.0.
const VERSION: [u8; 2] = [3, 0];
/// The entry point's length (section 5.2.2).
const ENTRY_LEN: u8 = 24;
/// The entry point is searched for on this boundary.
const ENTRY_ALIGN: u64 = 16;
/// Where structures begin in the image.
const TABLE_AT: u64 = 32;

/// The types of the structures (section 7).
mod kind {
    pub(super) const BIOS: u8 = 0;
    pub(super) const SYSTEM: u8 = 1;
    pub(super) const CHASSIS: u8 = 3;
    pub(super) const PROCESSOR: u8 = 4;
    pub(super) const OEM_STRINGS: u8 = 11;
    pub(super) const MEMORY_ARRAY: u8 = 16;
    pub(super) const MEMORY_DEVICE: u8 = 17;
    pub(super) const MEMORY_MAPPED: u8 = 19;
    pub(super) const BOOT: u8 = 32;
    pub(super) const END: u8 = 127;
}

/// Refers to no structure.
const NO_HANDLE: u16 = 0xFFFF;
/// The reference to an error structure that does not exist (section 7.17).
const NO_ERRORS: u16 = 0xFFFE;
/// "Other" or "unknown" in most enumerations of the specification.
const OTHER: u8 = 1;
const UNKNOWN: u8 = 2;

/// Builds the tables of a machine whose configuration is valid.
///
/// # Errors
///
/// [`SmbiosImageError::TooLarge`].
pub fn build(config: &VmConfig) -> Result<SmbiosImage, SmbiosImageError> {
    let structures = structures(config);
    let len = TABLE_AT + structures.len() as u64;
    let max = RESET_VECTOR - SMBIOS_START;
    let address = RESET_VECTOR
        .checked_sub(len)
        .map(|start| start & !(ENTRY_ALIGN - 1))
        .filter(|start| *start >= SMBIOS_START)
        .ok_or(SmbiosImageError::TooLarge { len, max })?;
    let table_len = u32::try_from(structures.len()).unwrap_or(u32::MAX);
    let mut bytes = entry_point(address + TABLE_AT, table_len);
    bytes.resize(usize::try_from(TABLE_AT).unwrap_or_default(), 0);
    bytes.extend_from_slice(&structures);
    Ok(SmbiosImage { bytes, address })
}

/// The 64-bit entry point (section 5.2.2).
fn entry_point(table: u64, len: u32) -> Vec<u8> {
    let mut bytes = b"_SM3_".to_vec();
    bytes.extend([0, ENTRY_LEN]);
    bytes.extend(VERSION);
    // Revision of the specification's text, of the entry point, and a zero.
    bytes.extend([0, 1, 0]);
    bytes.extend(len.to_le_bytes());
    bytes.extend(table.to_le_bytes());
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    bytes
}

/// A structure in the making: its formatted area and its texts.
struct Structure {
    formatted: Vec<u8>,
    texts: Vec<u8>,
    count: u8,
}

impl Structure {
    /// One whose handle is its type, and which is the only one of it except
    /// for `number` others.
    fn new(kind: u8, number: u8) -> Self {
        Self {
            formatted: vec![kind, 0, number, kind],
            texts: Vec::new(),
            count: 0,
        }
    }

    fn byte(self, value: u8) -> Self {
        self.raw(&[value])
    }

    fn word(self, value: u16) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn dword(self, value: u32) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn qword(self, value: u64) -> Self {
        self.raw(&value.to_le_bytes())
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.formatted.extend_from_slice(bytes);
        self
    }

    /// The number of a text, which is put behind; 0 for none.
    fn text(mut self, text: &str) -> Self {
        let number = self.add(text);
        self.byte(number)
    }

    /// Puts a text behind and tells its number. A text ends at a zero byte, and there is none of no length.
    fn add(&mut self, text: &str) -> u8 {
        if text.is_empty() || text.contains('\0') {
            return 0;
        }
        let Some(count) = self.count.checked_add(1) else {
            return 0;
        };
        self.texts.extend_from_slice(text.as_bytes());
        self.texts.push(0);
        self.count = count;
        count
    }

    /// Puts it behind the others (section 6.1).
    fn append(mut self, table: &mut Vec<u8>) {
        let len = u8::try_from(self.formatted.len()).unwrap_or(u8::MAX);
        if let Some(at) = self.formatted.get_mut(1) {
            *at = len;
        }
        table.extend(self.formatted);
        if self.texts.is_empty() {
            table.push(0);
        }
        table.extend(self.texts);
        table.push(0);
    }
}

fn structures(config: &VmConfig) -> Vec<u8> {
    let mut table = Vec::with_capacity(1024);
    bios().append(&mut table);
    system(config).append(&mut table);
    chassis(config).append(&mut table);
    processor(config.cpus.boot).append(&mut table);
    if let Some(strings) = oem_strings(config) {
        strings.append(&mut table);
    }
    memory(config.memory.size, &mut table);
    // Section 7.33: six reserved bytes and "no errors detected".
    Structure::new(kind::BOOT, 0)
        .raw(&[0; 7])
        .append(&mut table);
    Structure::new(kind::END, 0).append(&mut table);
    table
}

/// Section 7.1. The characteristics say no more than that this is a virtual machine with ACPI.
fn bios() -> Structure {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const ACPI: u8 = 1 << 0;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    Structure::new(kind::BIOS, 0)
        .text(VENDOR)
        .text(MACHINE)
        // Where a BIOS would start.
        .word(0xF000)
        .text("01/01/2026")
        .byte(0)
        .qword(CHARACTERISTICS_NOT_SUPPORTED)
        .raw(&[ACPI, VIRTUAL_MACHINE])
        // Neither BIOS nor embedded controller has a release number of this kind.
        .raw(&[0xFF; 4])
}

/// Section 7.2.
fn system(config: &VmConfig) -> Structure {
    const POWER_SWITCH: u8 = 6;
    let texts = &config.smbios;
    let or = |text: &Option<String>, default: &str| text.clone().unwrap_or(default.to_owned());
    Structure::new(kind::SYSTEM, 0)
        .text(&or(&texts.manufacturer, VENDOR))
        .text(&or(&texts.product, MACHINE))
        .text(&or(&texts.version, ""))
        .text(&or(&texts.serial, ""))
        .raw(&uuid(texts.uuid.as_deref()))
        .byte(POWER_SWITCH)
        .text(&or(&texts.sku, ""))
        .text(&or(&texts.family, ""))
}

/// Section 7.2.1: the first three fields are little-endian; all zeros is none.
fn uuid(text: Option<&str>) -> [u8; 16] {
    let Some(mut uuid) = text.and_then(parse_uuid) else {
        return [0; 16];
    };
    for field in [0..4, 4..6, 6..8] {
        if let Some(bytes) = uuid.get_mut(field) {
            bytes.reverse();
        }
    }
    uuid
}

/// Section 7.4.
fn chassis(config: &VmConfig) -> Structure {
    const SAFE: u8 = 3;
    let texts = &config.smbios;
    Structure::new(kind::CHASSIS, 0)
        .text(texts.manufacturer.as_deref().unwrap_or(VENDOR))
        .byte(OTHER)
        .raw(&[0, 0])
        .text(texts.asset_tag.as_deref().unwrap_or_default())
        // When booted, power supply, temperature.
        .raw(&[SAFE; 3])
        .byte(UNKNOWN)
        .dword(0)
        // Height, power cords, contained elements and the length of their records.
        .raw(&[0; 4])
        .byte(0)
}

/// Section 7.5: one package with all vCPUs. What it is the guest asks the processor.
fn processor(cpus: u16) -> Structure {
    const CENTRAL: u8 = 3;
    const POPULATED_AND_ENABLED: u8 = 0x41;
    const SEE_SECOND: u8 = 0xFF;
    let few = u8::try_from(cpus).unwrap_or(SEE_SECOND);
    Structure::new(kind::PROCESSOR, 0)
        .text("CPU 0")
        .byte(CENTRAL)
        .byte(UNKNOWN)
        .text(VENDOR)
        .qword(0)
        .byte(0)
        .byte(0)
        // External clock, most and current speed: unknown.
        .raw(&[0; 6])
        .byte(POPULATED_AND_ENABLED)
        .byte(OTHER)
        // Caches of three levels.
        .word(NO_HANDLE)
        .word(NO_HANDLE)
        .word(NO_HANDLE)
        // Serial number, asset tag, part number.
        .raw(&[0; 3])
        // Cores, cores that are on, threads.
        .raw(&[few; 3])
        .word(0)
        .word(UNKNOWN.into())
        .word(cpus)
        .word(cpus)
        .word(cpus)
}

/// Section 7.12.
fn oem_strings(config: &VmConfig) -> Option<Structure> {
    let texts = config.smbios.oem_strings.iter().filter(|t| !t.is_empty());
    let mut structure = Structure::new(kind::OEM_STRINGS, 0).byte(0);
    for text in texts {
        structure.add(text);
    }
    let count = structure.count;
    if let Some(at) = structure.formatted.last_mut() {
        *at = count;
    }
    (count > 0).then_some(structure)
}

/// Sections 7.17, 7.18 and 7.20: an array of one device with all memory, and where it is.
fn memory(size: u64, table: &mut Vec<u8>) {
    const SYSTEM_BOARD: u8 = 3;
    const SYSTEM_MEMORY: u8 = 3;
    const NO_CORRECTION: u8 = 3;
    const EXTENDED_KIB: u32 = 1 << 31;
    const EXTENDED_MIB: u16 = 0x7FFF;
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    let array = u16::from_le_bytes([0, kind::MEMORY_ARRAY]);
    let kib = u32::try_from(size >> 10)
        .ok()
        .filter(|kib| *kib < EXTENDED_KIB);
    Structure::new(kind::MEMORY_ARRAY, 0)
        .raw(&[SYSTEM_BOARD, SYSTEM_MEMORY, NO_CORRECTION])
        .dword(kib.unwrap_or(EXTENDED_KIB))
        .word(NO_ERRORS)
        .word(1)
        .qword(if kib.is_some() { 0 } else { size })
        .append(table);

    let mib = size >> 20;
    let few = u16::try_from(mib).ok().filter(|mib| *mib < EXTENDED_MIB);
    Structure::new(kind::MEMORY_DEVICE, 0)
        .word(array)
        .word(NO_ERRORS)
        // Total and data width: unknown.
        .word(0xFFFF)
        .word(0xFFFF)
        .word(few.unwrap_or(EXTENDED_MIB))
        .byte(DIMM)
        .byte(0)
        .text("DIMM 0")
        .byte(0)
        .byte(RAM)
        // Details: other.
        .word(1 << 1)
        .word(0)
        .text(VENDOR)
        // Serial number, asset tag, part number, rank.
        .raw(&[0; 4])
        .dword(match few {
            Some(_) => 0,
            None => u32::try_from(mib).unwrap_or(0x7FFF_FFFF).min(0x7FFF_FFFF),
        })
        // Speed and voltages: unknown.
        .raw(&[0; 8])
        .append(table);

    let low = size.min(LOW_RAM_END);
    let ranges = [(0, low), (HIGH_RAM_START, size - low)];
    for (number, (start, len)) in (0..).zip(ranges) {
        if len > 0 {
            mapped(number, array, start, start.saturating_add(len)).append(table);
        }
    }
}

/// Section 7.20.
fn mapped(number: u8, array: u16, start: u64, end: u64) -> Structure {
    const EXTENDED: u32 = u32::MAX;
    let last = end.saturating_sub(1);
    let kib = |address: u64| u32::try_from(address >> 10).ok().filter(|k| *k != EXTENDED);
    let structure = Structure::new(kind::MEMORY_MAPPED, number);
    match (kib(start), kib(last)) {
        (Some(first), Some(final_kib)) => structure
            .dword(first)
            .dword(final_kib)
            .word(array)
            .byte(1)
            .raw(&[0; 16]),
        _ => structure
            .dword(EXTENDED)
            .dword(EXTENDED)
            .word(array)
            .byte(1)
            .qword(start)
            .qword(last),
    }
}

#[cfg(test)]
mod tests;
