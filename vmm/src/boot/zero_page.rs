//! `boot_params`, the "zero page" of the Linux boot protocol
//! (`Documentation/arch/x86/zero-page.rst`).
//!
//! `screen_info` stays zero where there is no screen. A framebuffer is announced as one that UEFI has set up
//! (`VIDEO_TYPE_EFI`), which the kernels' built-in `efifb` takes.

use linux_loader::bootparam::{
    E820_MAX_ENTRIES_ZEROPAGE, LOADED_HIGH, boot_e820_entry, boot_params, screen_info, setup_header,
};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::Screen;
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

/// `VIDEO_TYPE_EFI`: a linear framebuffer and nothing else.
const VIDEO_TYPE_EFI: u8 = 0x70;
/// The framebuffer's address has a higher half.
const VIDEO_CAPABILITY_64BIT_BASE: u32 = 1 << 1;

/// What a guest may have been given besides its kernel.
#[derive(Clone, Copy)]
pub(super) struct Extras {
    pub initrd: Option<Initrd>,
    pub screen: Option<Screen>,
}

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
    Extras { initrd, screen }: Extras,
    rsdp: u64,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_TYPE;
    header.cmd_line_ptr = halves(CMDLINE).0;
    header.setup_data = 0;
    let mut page = boot_params {
        acpi_rsdp_addr: rsdp,
        screen_info: screen.map(described).unwrap_or_default(),
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

/// A framebuffer with pixels of 32 bits: blue lowest, then green, then red.
fn described(screen: Screen) -> screen_info {
    let Screen {
        base,
        len,
        width,
        height,
    } = screen;
    let (lfb_base, ext_lfb_base) = halves(base);
    screen_info {
        orig_video_isVGA: VIDEO_TYPE_EFI,
        lfb_width: width,
        lfb_height: height,
        lfb_depth: 32,
        lfb_base,
        ext_lfb_base,
        lfb_size: u32::try_from(len).unwrap_or(u32::MAX),
        lfb_linelength: width.saturating_mul(4),
        blue_size: 8,
        green_size: 8,
        green_pos: 8,
        red_size: 8,
        red_pos: 16,
        rsvd_size: 8,
        rsvd_pos: 24,
        capabilities: if ext_lfb_base == 0 {
            0
        } else {
            VIDEO_CAPABILITY_64BIT_BASE
        },
        ..screen_info::default()
    }
}

/// The low and the high half, as the protocol splits addresses.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}
