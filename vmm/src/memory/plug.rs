//! Memory that the guest plugs and unplugs while it runs (virtio-mem).
//!
//! One mapping lies behind the whole of its region, and one KVM slot. The map that devices work
//! through has the blocks that are plugged, and no others: a device does not reach what is not
//! plugged. What is unplugged goes back to the host at once. A vCPU that touches memory that it
//! has not plugged finds zeros there, or what it wrote, until the blocks come or go: it
//! costs the host no more than the region's size, and nobody else anything.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio::memory::{Backing, DirtyLog, GuestMap, GuestMemory};
use virtio::models::mem::MemoryHost;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::mapping::Mapping;
use super::{GuestRam, RamError, RamSlot, RamSpec, backing_file, hint};

type Region = Arc<GuestRegionMmap<DirtyLog>>;

/// A part of a mapping, which is the host's side of one block.
struct Part {
    mapping: Arc<Mapping>,
    offset: u64,
    len: u64,
}

impl Backing for Part {
    fn page_size(&self) -> u64 {
        self.mapping.page_size()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.mapping
            .discard(self.offset.saturating_add(offset), len)
    }
}

/// A region of guest-physical addresses whose blocks come and go.
pub struct PlugRegion {
    guest: u64,
    block: u64,
    memory: GuestMemory,
    mapping: Arc<Mapping>,
    /// The memory that is always there.
    base: Vec<Region>,
    blocks: Vec<Region>,
    plugged: Mutex<Vec<bool>>,
    /// Blocks are faulted in when they are plugged: the host may not have them later.
    populate: bool,
}

impl GuestRam {
    /// Maps a region of `area` for blocks of `block` bytes, none of which is plugged. Its slot is among [`GuestRam::slots`].
    /// Nothing else may be added to the memory any more.
    ///
    /// # Errors
    ///
    /// [`RamError`] when the host has not got it.
    pub fn reserve(&mut self, area: &Range<u64>, block: u64) -> Result<Arc<PlugRegion>, RamError> {
        let len = area.end.saturating_sub(area.start);
        let spec = RamSpec {
            size: len,
            ..self.spec.clone()
        };
        let file = backing_file(&spec)?;
        let bytes = usize::try_from(len).map_err(|_| RamError::Layout { size: len })?;
        let behind = file.as_ref().map(|file| (file.as_ref(), 0));
        let mapping = Mapping::over_committed(bytes, behind, spec.shared, spec.huge_page);
        let mapping = mapping.map_err(|source| RamError::Map {
            size: len,
            hint: hint(&spec, &source),
            source,
        })?;
        if spec.huge_page.is_none() {
            mapping.advise_thp(spec.thp);
        }
        let mapping = Arc::new(mapping);
        let offsets = (0..len / block).map(|index| index * block);
        let blocks = offsets
            .map(|offset| region(&mapping, file.as_ref(), (area.start, offset), block))
            .collect::<Result<Vec<_>, _>>()?;
        let next = self.slots.iter().map(|slot| slot.slot + 1).max();
        self.slots.push(RamSlot {
            slot: next.unwrap_or(0),
            guest: area.start,
            len,
            host: mapping.address(),
        });
        self.mappings.push(Arc::clone(&mapping));
        self.reserved = self.reserved.saturating_add(1);
        let plugged = vec![false; blocks.len()];
        Ok(Arc::new(PlugRegion {
            guest: area.start,
            block,
            memory: self.memory.clone(),
            mapping,
            base: self.regions.clone(),
            blocks,
            plugged: Mutex::new(plugged),
            populate: spec.prefault || spec.huge_page.is_some(),
        }))
    }
}

/// The block of `block` bytes that begins `offset` bytes into the mapping.
fn region(
    mapping: &Arc<Mapping>,
    file: Option<&Arc<File>>,
    (guest, offset): (u64, u64),
    block: u64,
) -> Result<Region, RamError> {
    let layout = || RamError::Layout { size: block };
    let bytes = usize::try_from(block).map_err(|_| layout())?;
    let part = Part {
        mapping: Arc::clone(mapping),
        offset,
        len: block,
    };
    let log = DirtyLog::for_backing(bytes, Arc::new(part));
    let mut builder = MmapRegionBuilder::new_with_bitmap(bytes, log)
        .with_mmap_prot(mapping.protection())
        .with_mmap_flags(mapping.flags());
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    }
    let region = mapping.into_part(builder, offset, block);
    let region = region.map_err(|_| layout())?.ok_or_else(layout)?;
    let region = GuestRegionMmap::new(region, GuestAddress(guest.saturating_add(offset)));
    region.map(Arc::new).ok_or_else(layout)
}

impl PlugRegion {
    fn lock(&self) -> MutexGuard<'_, Vec<bool>> {
        // It is written whole; a panic elsewhere leaves it sound.
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has devices see which blocks there are.
    fn change(&self, offset: u64, len: u64, there: bool) -> io::Result<()> {
        let mut plugged = self.lock();
        let place = |at: u64| usize::try_from(at / self.block).ok();
        let range = place(offset).zip(place(offset.saturating_add(len)));
        let blocks = range.and_then(|(first, end)| plugged.get_mut(first..end));
        blocks.ok_or(io::ErrorKind::InvalidInput)?.fill(there);
        let blocks = self.blocks.iter().zip(plugged.iter());
        let blocks = blocks.filter(|(_, plugged)| **plugged);
        let regions = self.base.iter().chain(blocks.map(|(region, _)| region));
        let map = GuestMap::from_arc_regions(regions.cloned().collect());
        let map = map.map_err(io::Error::other)?;
        self.memory.replace(map);
        Ok(())
    }
}

impl MemoryHost for PlugRegion {
    fn address(&self) -> u64 {
        self.guest
    }

    fn plug(&self, offset: u64, len: u64) -> io::Result<()> {
        // What somebody wrote who should not have is gone.
        self.mapping.discard(offset, len)?;
        if self.populate
            && let Err(error) = self.mapping.populate_part(offset, len)
        {
            self.mapping.discard(offset, len)?;
            return Err(error);
        }
        self.change(offset, len, true)
    }

    fn unplug(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(offset, len, false)?;
        self.mapping.discard(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    const GIB: u64 = 1 << 30;
    const BLOCK: u64 = 2 << 20;

    fn ram(shared: bool, prefault: bool) -> (GuestRam, Arc<PlugRegion>) {
        let spec = RamSpec {
            size: 64 << 20,
            shared,
            huge_page: None,
            thp: Some(false),
            prefault,
        };
        let mut ram = GuestRam::new(&spec).unwrap();
        let region = ram.reserve(&(4 * GIB..5 * GIB), BLOCK).unwrap();
        (ram, region)
    }

    /// How many bytes of the process's memory lie in the region.
    fn resident(region: &PlugRegion) -> u64 {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", region.mapping.address());
        let lines = text.lines().skip_while(|line| !line.starts_with(&start));
        let rss = lines.clone().find(|line| line.starts_with("Rss:")).unwrap();
        rss.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    /// Whether the memory at an address is in no core dump, and in no forked child (proc_pid_smaps(5), `VmFlags`).
    fn is_withheld(address: u64) -> bool {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let number = |text| u64::from_str_radix(text, 16);
        let mut inside = false;
        for line in text.lines() {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            if let Some((Ok(start), Ok(end))) = range.map(|(a, b)| (number(a), number(b))) {
                inside = (start..end).contains(&address);
            } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
                let has = |flag| flags.split_whitespace().any(|found| found == flag);
                return has("dd") && has("dc");
            }
        }
        panic!("nothing is mapped at {address:x}");
    }

    #[test]
    fn guest_memory_is_in_no_core_dump_and_no_child() {
        for shared in [false, true] {
            let (ram, region) = ram(shared, false);
            for slot in ram.slots() {
                assert!(is_withheld(slot.host), "{:x}", slot.guest);
                assert!(is_withheld(slot.host + slot.len - 1), "{:x}", slot.guest);
            }
            // What is taken back is so too.
            region.plug(0, 2 * BLOCK).unwrap();
            region.unplug(BLOCK, BLOCK).unwrap();
            assert!(is_withheld(region.mapping.address() + BLOCK));
        }
        let own = std::ptr::from_ref(&GIB).addr() as u64;
        assert!(!is_withheld(own));
    }

    #[test]
    fn devices_reach_what_is_plugged_and_nothing_else() {
        for shared in [false, true] {
            let (ram, region) = ram(shared, false);
            let handle = ram.memory().clone();
            let write = |at: u64| handle.memory().write_obj(7_u64, GuestAddress(at)).is_ok();
            assert_eq!((ram.size(), ram.slots().len()), (64 << 20, 2));
            let slot = ram.slots()[1];
            assert_eq!((slot.guest, slot.len, slot.slot), (4 * GIB, GIB, 1));
            assert!(write(0) && !write(4 * GIB));
            let before = handle.memory();
            region.plug(BLOCK, 3 * BLOCK).unwrap();
            assert!(
                before
                    .write_obj(7_u64, GuestAddress(4 * GIB + BLOCK))
                    .is_err()
            );
            assert!(!write(4 * GIB) && write(4 * GIB + BLOCK) && write(4 * GIB + 4 * BLOCK - 8));
            assert!(!write(4 * GIB + 4 * BLOCK - 4));
            // From one block into the next.
            assert!(write(4 * GIB + 2 * BLOCK - 4));
            assert_eq!(handle.memory().num_regions(), 4);
            region.unplug(2 * BLOCK, BLOCK).unwrap();
            assert!(
                write(4 * GIB + BLOCK) && !write(4 * GIB + 2 * BLOCK) && write(4 * GIB + 3 * BLOCK)
            );
            assert!(write(0));
        }
    }

    #[test]
    fn what_is_unplugged_is_the_hosts_again_and_reads_as_zeros_when_it_comes_back() {
        for shared in [false, true] {
            let (ram, region) = ram(shared, false);
            let view = || ram.memory().memory();
            region.plug(0, 4 * BLOCK).unwrap();
            let bytes = vec![7; 4 << 21];
            let before = resident(&region);
            view().write_slice(&bytes, GuestAddress(4 * GIB)).unwrap();
            assert_eq!(resident(&region) - before, 4 * BLOCK);
            region.unplug(BLOCK, 3 * BLOCK).unwrap();
            assert_eq!(resident(&region) - before, BLOCK);
            region.plug(BLOCK, BLOCK).unwrap();
            let read = |at| view().read_obj::<u8>(GuestAddress(4 * GIB + at)).unwrap();
            assert_eq!([read(BLOCK - 1), read(BLOCK)], [7, 0]);
        }
    }

    #[test]
    fn prefaulted_memory_is_there_when_it_is_plugged_and_a_reset_takes_it_away() {
        let (ram, region) = ram(false, true);
        assert_eq!(resident(&region), 0);
        region.plug(0, 2 * BLOCK).unwrap();
        assert_eq!(resident(&region), 2 * BLOCK);
        region.unplug(0, 2 * BLOCK).unwrap();
        ram.discard().unwrap();
        assert_eq!(resident(&region), 0);
    }

    #[test]
    fn a_blocks_backing_is_its_own() {
        let (ram, region) = ram(false, false);
        region.plug(0, 2 * BLOCK).unwrap();
        let view = ram.memory().memory();
        for at in [0, BLOCK] {
            view.write_obj(7_u64, GuestAddress(4 * GIB + at)).unwrap();
        }
        let second = view.find_region(GuestAddress(4 * GIB + BLOCK)).unwrap();
        let backing = second.bitmap().backing().unwrap();
        backing.discard(0, BLOCK).unwrap();
        let read = |at| view.read_obj::<u64>(GuestAddress(4 * GIB + at)).unwrap();
        assert_eq!([read(0), read(BLOCK)], [7, 0]);
        for (offset, len) in [(0, BLOCK + 4096), (BLOCK, 4096), (u64::MAX, 2)] {
            assert!(backing.discard(offset, len).is_err());
        }
    }

    #[test]
    fn blocks_outside_the_region_are_refused() {
        let (_ram, region) = ram(false, false);
        for (offset, len) in [(GIB, BLOCK), (GIB - BLOCK, 2 * BLOCK), (u64::MAX, BLOCK)] {
            assert!(region.plug(offset, len).is_err());
            assert!(region.unplug(offset, len).is_err());
        }
    }
}
