//! Where the guest has RAM, and what it is told about it.
//!
//! One map serves both boot protocols: the e820 table of `boot_params` and the
//! memory map of PVH's start info use the same types (ACPI 6.5, section 15.1,
//! table 15.2).

use virtio::memory::GuestMap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::BootError;
use crate::layout::memory::{
    ACPI_START, EBDA_START, ECAM_LEN, ECAM_START, GENERATION_ID, HIMEM_START, KVM_IDENTITY_MAP,
};

/// The end of conventional memory; video memory and ROMs follow on a PC.
const CONVENTIONAL_END: u64 = 0xA_0000;
/// KVM's identity map page and its three pages of task state segment.
const KVM_PAGES_LEN: u64 = 4 * 4096;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Its first byte.
    pub(super) start: u64,
    /// The byte after it.
    pub(super) end: u64,
}

/// What an area is used for, by its number in e820.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// Free for the operating system.
    Ram = 1,
    /// Not to be used, nor to be given to devices.
    Reserved = 2,
    /// ACPI tables; RAM once they are read.
    Acpi = 3,
}

/// An area with its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Area {
    /// Where it is.
    pub(super) range: Range,
    /// What it is used for.
    pub(super) kind: Kind,
}

/// The guest's RAM: ascending ranges that neither touch nor overlap.
#[derive(Debug)]
pub(super) struct Ram(Vec<Range>);

impl Ram {
    /// Takes the ranges from `memory`. The first MiB must be RAM, since boot data goes there.
    pub(super) fn new(memory: &GuestMap) -> Result<Self, BootError> {
        let mut ranges: Vec<Range> = Vec::new();
        for region in memory.iter() {
            let start = region.start_addr().0;
            let end = start.saturating_add(region.len());
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(Range { start, end }),
            }
        }
        let ram = Self(ranges);
        if !ram.contains(0, HIMEM_START) {
            return Err(BootError::NoLowMemory);
        }
        Ok(ram)
    }

    /// Whether all of `start` to `end` is RAM.
    pub(super) fn contains(&self, start: u64, end: u64) -> bool {
        self.0.iter().any(|r| r.start <= start && end <= r.end)
    }

    /// The ranges, ascending.
    pub(super) fn ranges(&self) -> &[Range] {
        &self.0
    }

    /// The map for the guest, ascending by address.
    ///
    /// The ECAM is in it because Linux uses an MCFG area only if e820 or ACPI reserves it.
    pub(super) fn areas(&self) -> Vec<Area> {
        let area = |start, end, kind| Area {
            range: Range { start, end },
            kind,
        };
        let mut areas = vec![
            area(0, EBDA_START, Kind::Ram),
            area(EBDA_START, CONVENTIONAL_END, Kind::Reserved),
            area(ACPI_START, GENERATION_ID, Kind::Acpi),
            area(GENERATION_ID, HIMEM_START, Kind::Reserved),
            area(ECAM_START, ECAM_START + ECAM_LEN, Kind::Reserved),
            area(
                KVM_IDENTITY_MAP,
                KVM_IDENTITY_MAP + KVM_PAGES_LEN,
                Kind::Reserved,
            ),
        ];
        areas.extend(
            self.0
                .iter()
                .map(|r| area(r.start.max(HIMEM_START), r.end, Kind::Ram))
                .filter(|a| a.range.start < a.range.end),
        );
        areas.sort_unstable_by_key(|a| a.range.start);
        areas
    }
}
