//! Loading a kernel: from open files to a guest that can be entered.
//!
//! [`load`] puts the kernel, the initial RAM disk, the command line and the
//! protocol's data into guest memory and returns an [`Entry`], from which
//! [`Entry::registers`] makes the first vCPU's state. Nothing is written
//! before [`load`] but the ACPI tables, and nothing here depends on KVM being there.
//!
//! # Contract
//!
//! * Guest memory reads as zero where nothing was loaded: it is fresh, or it
//!   was discarded before the guest is started again. A kernel's `.bss` is
//!   not cleared here, which would make the host find pages for it.
//! * The files are untrusted. Whatever is in them, the result is a [`BootError`]
//!   that says what is wrong, never a panic or memory taken on a header's word. After an
//!   error guest memory holds parts of the files and is not to be entered.
//! * The files' bulk is read once, straight into guest memory.
//!
//! # Protocols
//!
//! | file | [`Protocol::Auto`] | otherwise |
//! |---|---|---|
//! | bzImage | 64-bit Linux | – |
//! | ELF with a PVH note | PVH | 64-bit Linux |
//! | ELF without | 64-bit Linux | – |

mod bzimage;
mod cmdline;
mod elf;
mod error;
mod identify;
mod image;
mod initrd;
mod memory_map;
mod pvh;
mod registers;
mod reset_stub;
#[cfg(test)]
mod tests;
mod zero_page;

use std::fs::File;

use linux_loader::bootparam::setup_header;
use virtio::memory::GuestMap;

pub use self::error::{BootError, Role};
use self::identify::Format;
use self::image::{HEAD_LEN, Image};
use self::initrd::Bounds;
use self::memory_map::Ram;
use crate::layout::memory::LOW_RAM_END;

/// How the kernel is to be entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// As suits the file; see the module's table.
    #[default]
    Auto,
    /// By the 64-bit Linux boot protocol.
    Linux64,
    /// By PVH; needs an ELF file with the note that names the entry.
    Pvh,
}

/// What to boot.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// The kernel's file: a bzImage or an ELF file. Its position is not used, and is changed.
    pub kernel: &'a mut File,
    /// The initial RAM disk's file, if there is one; the same holds for its position.
    pub initramfs: Option<&'a mut File>,
    /// The kernel's command line; may be empty.
    pub cmdline: &'a str,
    /// How to enter the kernel.
    pub protocol: Protocol,
    /// The framebuffer that it may draw in, if there is one. PVH has no way to tell of it.
    pub screen: Option<Screen>,
}

/// A framebuffer whose mode is set: pixels of 8 bits each of blue, green, red and nothing, line after line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screen {
    /// Guest-physical address of the first pixel.
    pub base: u64,
    /// Bytes of memory there.
    pub len: u64,
    /// Pixels of a line.
    pub width: u16,
    /// Lines.
    pub height: u16,
}

/// A loaded kernel's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In long mode, with `boot_params` at [`crate::layout::memory::ZERO_PAGE`].
    Linux64 {
        /// Guest-physical address of the first instruction.
        rip: u64,
        /// Where the memory ends that the kernel needs to be mapped; at most 3 GiB.
        kernel_end: u64,
    },
    /// In 32-bit protected mode, with the start info at
    /// [`crate::layout::memory::PVH_START_INFO`].
    Pvh {
        /// Guest-physical address of the first instruction.
        eip: u32,
    },
}

/// Loads `source` into `memory`. `rsdp` is the guest-physical address of the
/// ACPI root pointer, which the kernel is told.
///
/// To be called before the first vCPU runs, for each start of the guest; see
/// the module for what `memory` must be like.
pub fn load(memory: &GuestMap, source: BootSource<'_>, rsdp: u64) -> Result<Entry, BootError> {
    let BootSource {
        kernel,
        initramfs,
        cmdline,
        protocol,
        screen,
    } = source;
    let ram = Ram::new(memory)?;
    let mut image = Image::new(kernel, Role::Kernel)?;
    let mut head = [0; HEAD_LEN];
    let len = image.read_head(&mut head)?;
    let head = &head[..len];

    let plan = match identify::format(head) {
        Format::BzImage if protocol == Protocol::Pvh => return Err(BootError::PvhNeedsElf),
        Format::BzImage => plan_bzimage(bzimage::load(memory, &ram, &mut image, head)?),
        Format::Elf => plan_elf(&elf::load(memory, &ram, &mut image, head)?, protocol)?,
        Format::Other(what) => return Err(BootError::NotAKernel(what)),
    };
    cmdline::write(memory, cmdline, plan.cmdline_max)?;
    let initrd = match initramfs {
        Some(file) => Some(initrd::load(memory, &ram, file, plan.initrd)?),
        None => None,
    };
    reset_stub::write(memory)?;
    let areas = ram.areas();
    match plan.entry {
        Entry::Linux64 { .. } => {
            let extras = zero_page::Extras { initrd, screen };
            zero_page::write(memory, &areas, plan.header, extras, rsdp)?;
        }
        Entry::Pvh { .. } => pvh::write(memory, &areas, initrd, rsdp)?,
    }
    Ok(plan.entry)
}

/// What is left to do once the kernel itself is in memory.
struct Plan {
    entry: Entry,
    /// For `boot_params`; PVH has no use for it.
    header: setup_header,
    cmdline_max: u32,
    initrd: Bounds,
}

fn plan_bzimage(kernel: bzimage::Loaded) -> Plan {
    Plan {
        entry: Entry::Linux64 {
            rip: kernel.entry,
            kernel_end: kernel.initrd.kernel_end,
        },
        header: kernel.header,
        cmdline_max: kernel.cmdline_max,
        initrd: kernel.initrd,
    }
}

fn plan_elf(kernel: &elf::Loaded, protocol: Protocol) -> Result<Plan, BootError> {
    let pvh = match protocol {
        Protocol::Linux64 => None,
        Protocol::Auto => kernel.pvh_entry()?,
        Protocol::Pvh => Some(kernel.pvh_entry()?.ok_or(BootError::NoPvhEntry)?),
    };
    let entry = match pvh {
        Some(eip) => Entry::Pvh { eip },
        None => Entry::Linux64 {
            rip: kernel.entry64()?,
            kernel_end: kernel.end,
        },
    };
    Ok(Plan {
        entry,
        header: zero_page::header_from_scratch(),
        // The file does not tell; Linux cuts the line off at 2,047.
        cmdline_max: cmdline::ROOM,
        // Linux's PVH entry keeps the low half of the address only.
        initrd: Bounds {
            kernel_end: kernel.end,
            limit: LOW_RAM_END,
            above_4g: false,
        },
    })
}
