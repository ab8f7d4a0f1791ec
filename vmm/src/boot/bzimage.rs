//! bzImage kernels, by the 64-bit Linux boot protocol.
//!
//! The document is `Documentation/arch/x86/boot.rst` in the Linux sources;
//! sections are named by their headings. The file is a boot sector and setup
//! code for 16-bit firmware, which is skipped but for its header, and then the
//! kernel proper, which is loaded as it is and unpacks itself.

use linux_loader::bootparam::{
    LOADED_HIGH, XLF_CAN_BE_LOADED_ABOVE_4G, XLF_KERNEL_64, setup_header,
};
use virtio::memory::GuestMap;
use vm_memory::ByteValued;

use super::error::BootError;
use super::identify::BOOT_FLAG_AT;
use super::image::Image;
use super::initrd::Bounds;
use super::memory_map::Ram;
use crate::layout::memory::{HIMEM_START, LOW_RAM_END};

/// Where the setup header starts in the file and in `boot_params`.
const HEADER_AT: usize = 0x1F1;
/// The header ends where the jump over it, at 0x200, leads: 0x202 plus this byte.
const JUMP_DISTANCE_AT: usize = 0x201;
const JUMP_BASE: usize = 0x202;
/// The end of `init_size`, the last field that is needed here.
const NEEDED_END: usize = 0x264;
const BOOT_FLAG: u16 = 0xAA55;
/// The first protocol with a 64-bit entry.
const MIN_VERSION: u16 = 0x020C;
const SECTOR: u64 = 512;
const PARAGRAPH: u64 = 16;
/// "64-bit Boot Protocol": the entry is this far into the kernel.
const ENTRY_OFFSET: u64 = 0x200;
/// Kernels ask for 2 MiB, at the very most 16 MiB (`CONFIG_PHYSICAL_ALIGN`).
const MAX_ALIGNMENT: u64 = 1 << 30;

/// A bzImage in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The 64-bit entry point.
    pub(super) entry: u64,
    /// The header as it was in the file, with the load address put in.
    pub(super) header: setup_header,
    /// The longest command line that the kernel reads, without the NUL.
    pub(super) cmdline_max: u32,
    /// Where the initial RAM disk may go.
    pub(super) initrd: Bounds,
}

/// Where the kernel is put.
struct Place {
    load: u64,
    /// Where the memory ends that it needs to unpack itself and start.
    end: u64,
}

/// Loads the kernel, of which `head` is the first page.
pub(super) fn load(
    memory: &GuestMap,
    ram: &Ram,
    image: &mut Image<'_>,
    head: &[u8],
) -> Result<Loaded, BootError> {
    let mut header = parse(image, head)?;
    let setup_sectors = match header.setup_sects {
        0 => 4,
        count => u64::from(count),
    };
    let code_at = (setup_sectors + 1) * SECTOR;
    let code_len = code_len(image, &header, code_at)?;
    let place = place(ram, &header, code_len)?;
    image.load(code_at, code_len, "kernel code", memory, place.load)?;

    // The place is below 3 GiB.
    header.code32_start = u32::try_from(place.load).unwrap_or(u32::MAX);
    Ok(Loaded {
        entry: place.load + ENTRY_OFFSET,
        header,
        cmdline_max: header.cmdline_size,
        initrd: bounds(&header, place.end),
    })
}

/// "Details of Header Fields": checks what loading rests on.
fn parse(image: &Image<'_>, head: &[u8]) -> Result<setup_header, BootError> {
    let full_end = HEADER_AT + size_of::<setup_header>();
    image.check(0, full_end as u64, "setup header")?;
    let end = JUMP_BASE + usize::from(head[JUMP_DISTANCE_AT]);
    let version = u16::from_le_bytes([head[0x206], head[0x207]]);
    if version < MIN_VERSION {
        let [minor, major] = version.to_le_bytes();
        return Err(BootError::OldProtocol { major, minor });
    }
    if end < NEEDED_END {
        return Err(BootError::Malformed {
            field: "header end",
            value: end as u64,
            expected: "and 0x264 or more for its protocol version",
        });
    }
    // Bytes after the header's own end are code, and not for the kernel to read as fields.
    let end = end.min(full_end);
    let mut header = setup_header::default();
    header.as_mut_slice()[..end - HEADER_AT].copy_from_slice(&head[HEADER_AT..end]);

    if header.boot_flag != BOOT_FLAG {
        return Err(BootError::Malformed {
            field: "boot_flag",
            value: u64::from(u16::from_le_bytes([
                head[BOOT_FLAG_AT],
                head[BOOT_FLAG_AT + 1],
            ])),
            expected: "and 0xaa55 in every kernel",
        });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::Not64Bit);
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::Malformed {
            field: "loadflags",
            value: u64::from(header.loadflags),
            expected: "and its bit 0 (LOADED_HIGH) set in every bzImage",
        });
    }
    Ok(header)
}

/// The length of the kernel proper. `syssize` counts paragraphs, and the file
/// need not be padded to a whole one; a signature may follow.
fn code_len(image: &Image<'_>, header: &setup_header, at: u64) -> Result<u64, BootError> {
    let announced = u64::from(header.syssize) * PARAGRAPH;
    if announced <= ENTRY_OFFSET {
        return Err(BootError::Malformed {
            field: "syssize",
            value: u64::from(header.syssize),
            expected: "too small to hold the entry point",
        });
    }
    image.check(at, announced - (PARAGRAPH - 1), "kernel code")?;
    Ok(announced.min(image.len() - at))
}

/// `pref_address`, `relocatable_kernel`, `kernel_alignment` and `init_size`.
///
/// A relocatable kernel that is loaded below its preferred address moves
/// itself up to there, so no other place saves memory.
fn place(ram: &Ram, header: &setup_header, code_len: u64) -> Result<Place, BootError> {
    let alignment = u64::from(header.kernel_alignment);
    if header.relocatable_kernel != 0
        && !(alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT)
    {
        return Err(BootError::Malformed {
            field: "kernel_alignment",
            value: alignment,
            expected: "not a power of two up to 1 GiB",
        });
    }
    let preferred = header.pref_address;
    if !(HIMEM_START..LOW_RAM_END).contains(&preferred) {
        return Err(BootError::Malformed {
            field: "pref_address",
            value: preferred,
            expected: "not between 1 MiB and 3 GiB",
        });
    }
    let (load, run) = if header.relocatable_kernel != 0 {
        let aligned = preferred.next_multiple_of(alignment);
        (aligned, aligned)
    } else {
        (HIMEM_START, preferred)
    };
    let code_end = load + code_len;
    let run_end = run + u64::from(header.init_size);
    for (part, start, end) in [("code", load, code_end), ("working memory", run, run_end)] {
        if end > LOW_RAM_END || !ram.contains(start, end) {
            return Err(BootError::OutsideMemory { part, start, end });
        }
    }
    Ok(Place {
        load,
        end: code_end.max(run_end),
    })
}

/// `initrd_addr_max` and `XLF_CAN_BE_LOADED_ABOVE_4G`, which makes it void.
fn bounds(header: &setup_header, kernel_end: u64) -> Bounds {
    let above_4g = header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0;
    Bounds {
        kernel_end,
        limit: if above_4g {
            LOW_RAM_END
        } else {
            u64::from(header.initrd_addr_max) + 1
        },
        above_4g,
    }
}
