//! PVH start info: what a kernel with a PVH entry is told
//! (`xen/include/public/arch-x86/hvm/start_info.h`, version 1).

use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use virtio::memory::GuestMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::error::BootError;
use super::initrd::Initrd;
use super::memory_map::Area;
use crate::layout::memory::{CMDLINE, PVH_START_INFO, ZERO_PAGE};

const VERSION: u32 = 1;
/// After the start info, both on an 8-byte boundary.
const MODULE_LIST: u64 = PVH_START_INFO + 64;
const MEMORY_MAP: u64 = MODULE_LIST + 32;
const MEMORY_MAP_END: u64 = ZERO_PAGE;
const ENTRY_LEN: usize = size_of::<hvm_memmap_table_entry>();

/// Writes the start info to [`PVH_START_INFO`], its tables after it.
pub(super) fn write(
    memory: &GuestMap,
    areas: &[Area],
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let max = usize::try_from(MEMORY_MAP_END - MEMORY_MAP).unwrap_or_default() / ENTRY_LEN;
    let full = || BootError::MemoryMapFull {
        count: areas.len(),
        max,
    };
    if areas.len() > max {
        return Err(full());
    }
    let memmap_entries = u32::try_from(areas.len()).map_err(|_| full())?;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: initrd.map_or(0, |_| MODULE_LIST),
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries,
        ..hvm_start_info::default()
    };
    write_all(memory, info, areas, initrd).map_err(|source| BootError::Write {
        what: "PVH start info",
        source,
    })
}

fn write_all(
    memory: &GuestMap,
    info: hvm_start_info,
    areas: &[Area],
    initrd: Option<Initrd>,
) -> Result<(), GuestMemoryError> {
    memory.write_obj(info, GuestAddress(PVH_START_INFO))?;
    if let Some(Initrd { address, size }) = initrd {
        let module = hvm_modlist_entry {
            paddr: address,
            size,
            ..hvm_modlist_entry::default()
        };
        memory.write_obj(module, GuestAddress(MODULE_LIST))?;
    }
    let mut at = MEMORY_MAP;
    for area in areas {
        let entry = hvm_memmap_table_entry {
            addr: area.range.start,
            size: area.range.end - area.range.start,
            type_: area.kind as u32,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at))?;
        at += ENTRY_LEN as u64;
    }
    Ok(())
}
