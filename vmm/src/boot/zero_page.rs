//! `boot_params`, the "zero page" of the Linux boot protocol
//! (`Documentation/arch/x86/zero-page.rst`).
//!
//! `screen_info` stays zero, which means that there is no screen.

use linux_loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params, setup_header,
};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::error::BootError;
use super::initrd::Initrd;
use super::memory_map::Area;
use crate::layout::memory::{CMDLINE, ZERO_PAGE};

/// "Undefined": a boot loader without a number of its own.
const LOADER_TYPE: u8 = 0xFF;
const BOOT_FLAG: u16 = 0xAA55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version with the RSDP's address, so the one that this page follows.
const VERSION: u16 = 0x020E;

/// The header for a kernel that has none in its file (ELF).
pub(super) fn header_from_scratch() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        loadflags: LOADED_HIGH,
        ..setup_header::default()
    }
}

/// Fills in `header` what a boot loader has to, and writes the page to
/// [`ZERO_PAGE`]. The command line is at [`CMDLINE`], the RSDP at `rsdp`.
pub(super) fn write(
    memory: &GuestMap,
    areas: &[Area],
    mut header: setup_header,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_TYPE;
    header.cmd_line_ptr = halves(CMDLINE).0;
    header.setup_data = 0;
    let mut page = boot_params {
        acpi_rsdp_addr: rsdp,
        ..boot_params::default()
    };
    if let Some(Initrd { address, size }) = initrd {
        (header.ramdisk_image, page.ext_ramdisk_image) = halves(address);
        (header.ramdisk_size, page.ext_ramdisk_size) = halves(size);
    }
    page.hdr = header;
    let full = || BootError::MemoryMapFull {
        count: areas.len(),
        max: E820_MAX_ENTRIES_ZEROPAGE,
    };
    let mut table = [boot_e820_entry::default(); E820_MAX_ENTRIES_ZEROPAGE];
    let used = table.get_mut(..areas.len()).ok_or_else(full)?;
    page.e820_entries = u8::try_from(used.len()).map_err(|_| full())?;
    for (entry, area) in used.iter_mut().zip(areas) {
        *entry = boot_e820_entry {
            addr: area.range.start,
            size: area.range.end - area.range.start,
            r#type: area.kind as u32,
        };
    }
    page.e820_table = table;
    memory
        .write_obj(page, GuestAddress(ZERO_PAGE))
        .map_err(|source| BootError::Write {
            what: "zero page",
            source,
        })
}

/// The low and the high half, as the protocol splits addresses.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}
