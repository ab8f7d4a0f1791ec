//! The state in which the first vCPU enters a kernel, with the descriptor
//! table and page tables that it rests on.
//!
//! Linux's 64-bit entry wants long mode with paging, memory mapped one to one,
//! flat segments with the selectors 0x10 and 0x18, interrupts off and `boot_params`
//! in RSI (`Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"). PVH wants
//! 32-bit protected mode without paging, flat segments, a task register with
//! a limit of 0x67 and the start info in EBX (Xen's `docs/misc/pvh.pandoc`, "x86/HVM
//! direct boot ABI"). Register bits are those of Intel's SDM, volume 3,
//! sections 2.2.1, 2.5 and 3.4.5.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress};

use super::Entry;
use super::error::BootError;
use crate::layout::memory::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK, PVH_START_INFO, ZERO_PAGE};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 always reads as one; interrupts are off.
const RFLAGS: u64 = 1 << 1;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const CODE_ACCESSED: u8 = 0xB;
const DATA_ACCESSED: u8 = 0x3;
const BUSY_TASK: u8 = 0xB;
/// Null, unused, code, data, and a task state segment, which takes two in long mode.
const GDT_ENTRIES: usize = 6;

const PAGE: u64 = 4096;
const TABLE_ENTRIES: usize = 512;
/// Present and writable.
const TABLE: u64 = 0b11;
/// The same, and a large page.
const LARGE_PAGE: u64 = TABLE | 1 << 7;
const LARGE_PAGE_SHIFT: u32 = 21;
const GIB_SHIFT: u32 = 30;
/// The tables reach 4 GiB at most, which is where low memory ends.
const MAX_DIRECTORIES: u64 = 4;

impl Entry {
    /// The registers of vCPU 0 for this entry: general ones, and `sregs`, the
    /// vCPU's special registers after its creation or reset, with all that
    /// matters replaced.
    ///
    /// Writes the descriptor table to [`BOOT_GDT`] and, for the 64-bit entry,
    /// page tables to [`BOOT_PAGE_TABLES`]. They map 1 GiB, or as many as the
    /// kernel needs; it makes its own for the rest.
    pub fn registers(
        &self,
        memory: &GuestMap,
        sregs: &kvm_sregs,
    ) -> Result<(kvm_regs, kvm_sregs), BootError> {
        let mut regs = kvm_regs {
            rflags: RFLAGS,
            ..kvm_regs::default()
        };
        let mut sregs = *sregs;
        let long = match *self {
            Self::Linux64 { rip, kernel_end } => {
                regs.rip = rip;
                regs.rsi = ZERO_PAGE;
                regs.rsp = BOOT_STACK;
                write_page_tables(memory, kernel_end)?;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = BOOT_PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.efer = EFER_LME | EFER_LMA;
                true
            }
            Self::Pvh { eip } => {
                regs.rip = u64::from(eip);
                regs.rbx = PVH_START_INFO;
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr3 = 0;
                sregs.cr4 = 0;
                sregs.efer = 0;
                false
            }
        };
        set_segments(&mut sregs, long);
        write_gdt(memory, &mut sregs)?;
        Ok((regs, sregs))
    }
}

fn set_segments(sregs: &mut kvm_sregs, long: bool) {
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR,
        type_: CODE_ACCESSED,
        l: u8::from(long),
        db: u8::from(!long),
        ..flat
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: DATA_ACCESSED,
        db: 1,
        ..flat
    };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        base: 0,
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: BUSY_TASK,
        present: 1,
        ..kvm_segment::default()
    };
}

/// A segment as its descriptor (SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let base = segment.base;
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
}

fn write_gdt(memory: &GuestMap, sregs: &mut kvm_sregs) -> Result<(), BootError> {
    let table: [u64; GDT_ENTRIES] = [
        0,
        0,
        descriptor(&sregs.cs),
        descriptor(&sregs.ds),
        descriptor(&sregs.tr),
        0,
    ];
    sregs.gdt = kvm_dtable {
        base: BOOT_GDT,
        limit: GDT_LIMIT,
        ..kvm_dtable::default()
    };
    sregs.idt = kvm_dtable::default();
    memory
        .write_obj(table, GuestAddress(BOOT_GDT))
        .map_err(|source| BootError::Write {
            what: "descriptor table",
            source,
        })
}

#[expect(clippy::cast_possible_truncation, reason = "47")]
const GDT_LIMIT: u16 = (GDT_ENTRIES * size_of::<u64>() - 1) as u16;

/// One page-map level 4, one table of page directories, and a directory of 2 MiB
/// pages for each GiB (SDM volume 3, section 4.5). `end` is at most 4 GiB.
fn write_page_tables(memory: &GuestMap, end: u64) -> Result<(), BootError> {
    let directories = end.div_ceil(1 << GIB_SHIFT).clamp(1, MAX_DIRECTORIES);
    let pointers_at = BOOT_PAGE_TABLES + PAGE;
    let directories_at = pointers_at + PAGE;

    let mut level4 = [0u64; TABLE_ENTRIES];
    level4[0] = pointers_at | TABLE;
    write_table(memory, BOOT_PAGE_TABLES, level4)?;
    let mut pointers = [0u64; TABLE_ENTRIES];
    for (gib, pointer) in (0..directories).zip(&mut pointers) {
        *pointer = (directories_at + gib * PAGE) | TABLE;
    }
    write_table(memory, pointers_at, pointers)?;
    for gib in 0..directories {
        let mut directory = [0u64; TABLE_ENTRIES];
        for (page, entry) in (0u64..).zip(&mut directory) {
            *entry = gib << GIB_SHIFT | page << LARGE_PAGE_SHIFT | LARGE_PAGE;
        }
        write_table(memory, directories_at + gib * PAGE, directory)?;
    }
    Ok(())
}

fn write_table(
    memory: &GuestMap,
    address: u64,
    table: [u64; TABLE_ENTRIES],
) -> Result<(), BootError> {
    let mut bytes = [0; TABLE_ENTRIES * size_of::<u64>()];
    for (to, entry) in bytes.chunks_exact_mut(size_of::<u64>()).zip(table) {
        to.copy_from_slice(&entry.to_le_bytes());
    }
    memory
        .write_slice(&bytes, GuestAddress(address))
        .map_err(|source| BootError::Write {
            what: "page tables",
            source,
        })
}
