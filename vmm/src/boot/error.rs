//! Why a guest could not be loaded.

use std::fmt;
use std::io;

use vm_memory::GuestMemoryError;

use crate::layout::memory::{HIMEM_START, LOW_RAM_END};

/// Which of the files given by the user an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initramfs,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
        })
    }
}

/// Why a guest could not be loaded. Paths are the caller's to add: this module
/// sees open files only. All addresses are guest-physical, all lengths in bytes.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A directory was opened.
    #[error("the {0} is a directory, not a file")]
    Directory(Role),
    /// A pipe, socket or terminal.
    #[error(
        "the {role} is not a file that can be read at any place (a pipe?); give a regular file"
    )]
    NotSeekable {
        /// Which file.
        role: Role,
        /// What seeking in it answered.
        source: io::Error,
    },
    /// A file of no bytes.
    #[error("the {0} file is empty; make it again, or give another")]
    Empty(Role),
    /// The host could not read the file.
    #[error("cannot read the {role} file at byte {offset}")]
    Read {
        /// Which file.
        role: Role,
        /// From which byte on.
        offset: u64,
        /// What the host answered.
        source: io::Error,
    },
    /// The file ends before something it announces.
    #[error(
        "the {role} file is cut off: its {part} ends at byte {end}, but the file has {len} bytes; \
         copy it again"
    )]
    Truncated {
        /// Which file.
        role: Role,
        /// What is missing.
        part: &'static str,
        /// Where that would end.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// The file is something else.
    #[error(
        "not a kernel that Vireo can boot: {0}; give an x86-64 bzImage (vmlinuz) or ELF vmlinux"
    )]
    NotAKernel(String),
    /// A bzImage from before the 64-bit boot protocol.
    #[error(
        "the kernel speaks boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) is the oldest with a \
         64-bit entry"
    )]
    OldProtocol {
        /// The protocol's major version.
        major: u8,
        /// Its minor version.
        minor: u8,
    },
    /// A bzImage without a 64-bit entry.
    #[error("the kernel has no 64-bit entry: it was built for 32-bit x86")]
    Not64Bit,
    /// A header field with a value that cannot be.
    #[error("the kernel's header is damaged: {field} is {value:#x}, {expected}")]
    Malformed {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would be right.
        expected: &'static str,
    },
    /// The kernel would be where firmware tables and boot data are.
    #[error(
        "the kernel's {part} at {start:#x} to {end:#x} is below {HIMEM_START:#x}, where boot data \
         is; link it at 1 MiB or above"
    )]
    BelowHighMemory {
        /// Which part of the kernel.
        part: &'static str,
        /// Its first byte.
        start: u64,
        /// The byte after it.
        end: u64,
    },
    /// The kernel would be where no RAM is.
    #[error("the kernel's {part} needs guest memory at {start:#x} to {end:#x}; {}", mend(*.end))]
    OutsideMemory {
        /// Which part of the kernel.
        part: &'static str,
        /// Its first byte.
        start: u64,
        /// The byte after it.
        end: u64,
    },
    /// Two segments claim the same memory.
    #[error("the kernel's header is damaged: two segments overlap at {address:#x}")]
    SegmentsOverlap {
        /// An address in both.
        address: u64,
    },
    /// The entry point is not in the kernel.
    #[error("the kernel's header is damaged: its entry point {entry:#x} is in no loaded segment")]
    EntryOutsideKernel {
        /// The entry point.
        entry: u64,
    },
    /// PVH was asked for and the kernel has no such entry.
    #[error(
        "the kernel has no PVH entry (no XEN_ELFNOTE_PHYS32_ENTRY note); build it with CONFIG_PVH=y \
         or leave the protocol to Vireo"
    )]
    NoPvhEntry,
    /// PVH was asked for with a bzImage.
    #[error(
        "PVH needs an ELF kernel (vmlinux), and this is a bzImage (vmlinuz); use --boot-protocol \
         auto or another kernel"
    )]
    PvhNeedsElf,
    /// The initial RAM disk does not fit, and more memory would help.
    #[error(
        "the initramfs of {size} bytes does not fit in guest memory beside the kernel, which ends \
         at {kernel_end:#x}: {room} bytes are free; {}", mend(*.needed_end)
    )]
    InitramfsNoRoom {
        /// The file's length.
        size: u64,
        /// Where the kernel's memory ends.
        kernel_end: u64,
        /// The largest that would fit now.
        room: u64,
        /// Where guest memory would have to end.
        needed_end: u64,
    },
    /// The initial RAM disk is larger than this kernel can take.
    #[error(
        "the initramfs of {size} bytes is too large: between this kernel's end at {kernel_end:#x} \
         and the highest address it allows, {limit:#x}, {room} bytes fit"
    )]
    InitramfsTooLarge {
        /// The file's length.
        size: u64,
        /// Where the kernel's memory ends.
        kernel_end: u64,
        /// The byte after the highest that the initial RAM disk may use.
        limit: u64,
        /// The largest that would fit.
        room: u64,
    },
    /// The command line is longer than the kernel reads.
    #[error(
        "the kernel command line has {len} bytes, and this kernel takes at most {max}; shorten it"
    )]
    CommandLineTooLong {
        /// Its length without the NUL that ends it.
        len: usize,
        /// The most, without the NUL.
        max: usize,
    },
    /// The command line has a NUL inside, where the kernel would stop reading.
    #[error("the kernel command line has a NUL character at byte {offset}")]
    CommandLineNul {
        /// Where.
        offset: usize,
    },
    /// The machine has no RAM where boot data goes.
    #[error("the guest has no memory in its first MiB, where boot data goes")]
    NoLowMemory,
    /// More pieces of memory than the boot protocols can tell of.
    #[error("the guest's memory map has {count} entries, and the boot protocol has room for {max}")]
    MemoryMapFull {
        /// How many there are.
        count: usize,
        /// How many fit.
        max: usize,
    },
    /// Boot data could not be put into guest memory.
    #[error("cannot write the {what} to guest memory")]
    Write {
        /// Which boot data.
        what: &'static str,
        /// What the guest memory answered.
        source: GuestMemoryError,
    },
}

/// What the user can do so that RAM reaches `end`.
fn mend(end: u64) -> String {
    if end <= LOW_RAM_END {
        format!(
            "give the guest {}M of memory or more",
            end.div_ceil(1 << 20)
        )
    } else {
        format!("memory from {LOW_RAM_END:#x} to 4 GiB is for devices, whatever the memory size")
    }
}
