//! Guest memory: the one place that owns its backing.
//!
//! [`GuestRam`] maps the guest's RAM, says which KVM slots describe it, and
//! hands out the [`GuestMemory`] that devices and loaders work through. Each of its regions
//! knows its [`virtio::memory::Backing`], by which the balloon gives parts of it back. [`still`] holds
//! it as it is at one instant, [`dirty`] knows what has been written. Later consumers (post-copy) belong here as
//! well, because each of them excludes some of the others.
//!
//! RAM is mapped aligned to 2 MiB on the host, as it is in the guest, so that
//! the host can use huge pages in its nested page tables.

pub mod copy_in;
pub mod demand;
pub mod dirty;
pub(crate) mod lost;
mod mapping;
pub mod missing;
mod overlay;
mod plug;
mod presence;
pub mod restored;
pub mod still;
pub mod template;
mod userfault;
pub mod video;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use virtio::memory::{DirtyLog, GuestMap, GuestMemory};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryRegion, GuestRegionMmap};

use crate::layout;
use mapping::Mapping;
pub use plug::PlugRegion;
use restored::Restored;
use still::{Keeper, RamParts};

/// What memory a guest gets and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamSpec {
    /// RAM in bytes, a multiple of the page size in use.
    pub size: u64,
    /// Backed by a memfd and mapped shared, so that other processes can map it.
    pub shared: bool,
    /// Backed by pages of hugetlbfs, of this size in bytes.
    pub huge_page: Option<u64>,
    /// Whether transparent huge pages are advised; `None` leaves it to the host.
    pub thp: Option<bool>,
    /// Every page is faulted in before the guest starts.
    pub prefault: bool,
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host would not map that much.
    #[error("--memory: {size} bytes of guest memory could not be mapped{hint}")]
    Map {
        /// The bytes asked for.
        size: u64,
        /// The mend, when there is one.
        hint: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The screen's memory could not be mapped.
    #[error("{size} bytes of the screen's memory could not be mapped")]
    Screen {
        /// The bytes asked for.
        size: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The memfd behind shared memory could not be made.
    #[error("--memory: no memory file of {size} bytes{hint}")]
    File {
        /// The bytes asked for.
        size: u64,
        /// The mend, when there is one.
        hint: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// What another process has given is not the memory that it should be.
    #[error("the guest's memory, as it was handed over")]
    Given {
        /// What it is.
        #[source]
        source: io::Error,
    },
    /// Prefaulting failed part-way: the host ran out.
    #[error("--memory prefault=on: the host has not enough free memory for {size} bytes")]
    Prefault {
        /// The bytes asked for.
        size: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// The host would not take the pages back.
    #[error("{size} bytes of guest memory could not be cleared")]
    Discard {
        /// The guest's RAM in bytes.
        size: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// There is no descriptor left to hear of memory that is lost.
    #[error("memory cannot be taken from a snapshot")]
    Bell(#[source] io::Error),
    /// The ranges do not form a memory map.
    #[error("--memory: {size} bytes do not form a memory map")]
    Layout {
        /// The bytes asked for.
        size: u64,
    },
}

/// One contiguous piece of RAM: a KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSlot {
    /// The slot number.
    pub slot: u32,
    /// Where the guest sees it, in guest-physical bytes.
    pub guest: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Where the monitor sees it: a host virtual address.
    pub host: u64,
}

/// The guest's RAM.
pub struct GuestRam {
    memory: GuestMemory,
    slots: Vec<RamSlot>,
    mappings: Vec<Arc<Mapping>>,
    /// What there was at first.
    regions: Vec<Arc<GuestRegionMmap<DirtyLog>>>,
    /// How many of the last mappings are plugged piece by piece.
    reserved: usize,
    /// As it was made; `size` is what there is now.
    spec: RamSpec,
    /// How it came from a snapshot, if it did.
    restored: Option<Arc<Restored>>,
    /// What protects it against writing, once it has been wanted.
    keeper: Arc<Mutex<Keeper>>,
}

/// RAM that has been mapped and is to be added. Dropping it adds nothing.
pub struct MoreRam {
    /// The slot to give to KVM.
    pub slot: RamSlot,
    mapping: Arc<Mapping>,
    map: GuestMap,
}

impl GuestRam {
    /// Maps RAM as `spec` says, split around the hole for devices.
    ///
    /// # Errors
    ///
    /// [`RamError`] when the host has not got it; nothing stays mapped.
    pub fn new(spec: &RamSpec) -> Result<Self, RamError> {
        Self::on(spec, backing_file(spec)?)
    }

    /// Maps RAM that another process has made as `spec`, which is shared, says. It is not trusted to be that.
    ///
    /// # Errors
    ///
    /// As for [`GuestRam::new`], and [`RamError::Given`].
    pub fn of_file(spec: &RamSpec, file: Arc<File>) -> Result<Self, RamError> {
        let given = |source| RamError::Given { source };
        if !spec.shared {
            let what = "it is another process's, and this machine's is to be private";
            return Err(given(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        mapping::check_memory_file(&file, spec.size, spec.huge_page).map_err(given)?;
        Self::on(spec, Some(file))
    }

    /// The file behind all of it, where others can share it and nothing has been added.
    #[must_use]
    pub fn file(&self) -> Option<Arc<File>> {
        let first = self.regions.first().filter(|_| self.spec.shared)?;
        let whole = self.slots.iter().map(|slot| slot.len).sum::<u64>() == self.spec.size;
        let file = first.file_offset().map(|offset| Arc::clone(offset.arc()));
        file.filter(|_| whole && self.slots.len() == self.regions.len())
    }

    fn on(spec: &RamSpec, file: Option<Arc<File>>) -> Result<Self, RamError> {
        let mut regions = Vec::new();
        let mut slots = Vec::new();
        let mut mappings = Vec::new();
        let mut file_offset = 0;
        for (slot, (guest, len)) in (0u32..).zip(ram_ranges(spec.size)) {
            let backing = file.as_ref().map(|f| (Arc::clone(f), file_offset));
            file_offset += len;
            let (region, mapping) = map_region(spec, guest, len, backing)?;
            let host = mapping.address();
            regions.push(Arc::new(region));
            mappings.push(mapping);
            slots.push(RamSlot {
                slot,
                guest,
                len,
                host,
            });
        }
        let map = GuestMap::from_arc_regions(regions.clone())
            .map_err(|_| RamError::Layout { size: spec.size })?;
        Ok(Self {
            memory: GuestMemory::new(map),
            slots,
            mappings,
            regions,
            reserved: 0,
            spec: spec.clone(),
            restored: None,
            keeper: Arc::default(),
        })
    }

    /// The memory as [`still::Still`] holds it.
    #[must_use]
    pub fn parts(&self) -> RamParts {
        let guests = self.slots.iter().map(|slot| slot.guest);
        let parts = guests.zip(self.mappings.iter().cloned()).collect();
        RamParts::new(parts, Arc::clone(&self.keeper))
    }

    /// Maps `len` bytes more, of the same kind, for the guest-physical address
    /// `guest`. Devices see them once KVM has the slot and [`GuestRam::adopt`] has them.
    ///
    /// # Errors
    ///
    /// [`RamError`] when the host has not got it, or it overlaps what is there.
    pub fn map_more(&self, guest: u64, len: u64) -> Result<MoreRam, RamError> {
        let spec = RamSpec {
            size: len,
            ..self.spec.clone()
        };
        let file = backing_file(&spec)?.map(|file| (file, 0));
        let (region, mapping) = map_region(&spec, guest, len, file)?;
        let map = self
            .memory
            .memory()
            .insert_region(Arc::new(region))
            .map_err(|_| RamError::Layout { size: len })?;
        let next = self.slots.iter().map(|slot| slot.slot + 1).max();
        let slot = RamSlot {
            slot: next.unwrap_or(0),
            guest,
            len,
            host: mapping.address(),
        };
        Ok(MoreRam { slot, mapping, map })
    }

    /// Adds what KVM has been given. Whoever takes a view of the memory from now on
    /// sees it; views taken before stay as they are.
    pub fn adopt(&mut self, more: MoreRam) {
        let MoreRam { slot, mapping, map } = more;
        self.spec.size = self.spec.size.saturating_add(slot.len);
        self.slots.push(slot);
        self.mappings.push(mapping);
        self.memory.replace(map);
    }

    /// Gives all of the guest's pages back to the host; they read as zeros.
    /// With `prefault=on` they are faulted in again. vCPUs and devices are stopped.
    ///
    /// # Errors
    ///
    /// [`RamError::Discard`] and [`RamError::Prefault`].
    pub fn discard(&self) -> Result<(), RamError> {
        let size = self.spec.size;
        let whole = self.mappings.len().saturating_sub(self.reserved);
        if let Some(restored) = &self.restored {
            restored.give_up();
        }
        for (place, mapping) in self.mappings.iter().enumerate() {
            mapping
                .discard_all()
                .map_err(|source| RamError::Discard { size, source })?;
            if self.spec.prefault && place < whole {
                mapping
                    .populate()
                    .map_err(|source| RamError::Prefault { size, source })?;
            }
        }
        if let Some(restored) = &self.restored {
            restored.forget();
        }
        Ok(())
    }

    /// Prepares the memory to come from a snapshot.
    ///
    /// # Errors
    ///
    /// [`RamError::Bell`].
    pub fn restorable(&mut self) -> Result<Arc<Restored>, RamError> {
        let slots = self.slots.iter().map(|slot| slot.guest);
        let mappings = slots.zip(self.mappings.iter().cloned());
        let restored = Restored::new(mappings.collect()).map_err(RamError::Bell)?;
        let restored = Arc::new(restored);
        self.restored = Some(Arc::clone(&restored));
        Ok(restored)
    }

    /// How it came from a snapshot, if it did.
    #[must_use]
    pub fn restored(&self) -> Option<&Arc<Restored>> {
        self.restored.as_ref()
    }

    /// The memory as devices and loaders use it.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The slots to give to KVM.
    #[must_use]
    pub fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// RAM in bytes, holes not counted.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.spec.size
    }

    /// The first guest-physical byte after all RAM and after the hole below 4 GiB.
    #[must_use]
    pub fn end(&self) -> u64 {
        let ends = self.slots.iter().map(|s| s.guest.saturating_add(s.len));
        ends.max().unwrap_or(0).max(layout::memory::HIGH_RAM_START)
    }
}

/// RAM's guest-physical ranges: low RAM, then what did not fit below the hole.
pub(crate) fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::memory::LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::memory::HIGH_RAM_START, size - low));
    }
    ranges
}

/// The file behind shared memory and huge pages.
fn backing_file(spec: &RamSpec) -> Result<Option<Arc<File>>, RamError> {
    if !spec.shared && spec.huge_page.is_none() {
        return Ok(None);
    }
    match mapping::memory_file(spec.size, spec.huge_page) {
        Ok(file) => Ok(Some(Arc::new(file))),
        Err(source) => Err(RamError::File {
            size: spec.size,
            hint: hint(spec, &source),
            source,
        }),
    }
}

fn map_region(
    spec: &RamSpec,
    guest: u64,
    len: u64,
    file: Option<(Arc<File>, u64)>,
) -> Result<(GuestRegionMmap<DirtyLog>, Arc<Mapping>), RamError> {
    let fail = |source| RamError::Map {
        size: len,
        hint: hint(spec, &source),
        source,
    };
    let bytes = usize::try_from(len).map_err(|_| RamError::Layout { size: len })?;
    let backing = file.as_ref().map(|(file, offset)| (file.as_ref(), *offset));
    let mapping = Mapping::new(bytes, backing, spec.shared, spec.huge_page).map_err(fail)?;
    if spec.huge_page.is_none() {
        mapping.advise_thp(spec.thp);
    }
    if spec.prefault {
        mapping.populate().map_err(|source| RamError::Prefault {
            size: spec.size,
            source,
        })?;
    }
    let mapping = Arc::new(mapping);
    let log = DirtyLog::for_backing(bytes, Arc::clone(&mapping) as _);
    let mut builder = MmapRegionBuilder::new_with_bitmap(bytes, log)
        .with_mmap_prot(mapping.protection())
        .with_mmap_flags(mapping.flags());
    if let Some((file, offset)) = file {
        builder = builder.with_file_offset(FileOffset::from_arc(file, offset));
    }
    let region = mapping
        .into_region(builder)
        .map_err(|_| RamError::Layout { size: len })?;
    let region =
        GuestRegionMmap::new(region, GuestAddress(guest)).ok_or(RamError::Layout { size: len })?;
    Ok((region, mapping))
}

/// What the user can do about a mapping that the host refused.
fn hint(spec: &RamSpec, error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::ENOSPC | libc::EINVAL) if spec.huge_page.is_some() => {
            "; reserve huge pages in /proc/sys/vm/nr_hugepages or leave out hugepages=on"
        }
        Some(libc::ENOMEM) => "; give the guest less memory",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const GIB: u64 = 1 << 30;

    fn spec(size: u64) -> RamSpec {
        RamSpec {
            size,
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        }
    }

    #[test]
    fn ram_splits_around_the_hole() {
        assert_eq!(ram_ranges(GIB), [(0, GIB)]);
        assert_eq!(ram_ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(ram_ranges(5 * GIB), [(0, 3 * GIB), (4 * GIB, 2 * GIB)]);
    }

    #[test]
    fn both_sides_of_the_hole_hold_data_and_the_hole_does_not() {
        for shared in [false, true] {
            let ram = GuestRam::new(&RamSpec {
                shared,
                ..spec(3 * GIB + 0x2000)
            })
            .unwrap();
            let memory = ram.memory().memory();
            for address in [0, 3 * GIB - 8, 4 * GIB, 4 * GIB + 0x1ff8] {
                memory.write_obj(address, GuestAddress(address)).unwrap();
            }
            for address in [0, 3 * GIB - 8, 4 * GIB, 4 * GIB + 0x1ff8] {
                assert_eq!(
                    memory.read_obj::<u64>(GuestAddress(address)).unwrap(),
                    address
                );
            }
            assert!(memory.write_obj(0u64, GuestAddress(3 * GIB)).is_err());
            assert_eq!(ram.end(), 4 * GIB + 0x2000);
            assert_eq!(memory.iter().all(|r| r.file_offset().is_some()), shared);
        }
    }

    #[test]
    fn mappings_are_aligned_for_huge_pages_and_outlive_the_service() {
        let ram = GuestRam::new(&spec(64 << 20)).unwrap();
        assert_eq!(ram.slots()[0].host % (2 << 20), 0);
        let view = ram.memory().memory();
        drop(ram);
        view.write_obj(7u32, GuestAddress(0x1000)).unwrap();
        assert_eq!(view.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 7);
    }

    #[test]
    fn memory_that_is_added_is_seen_by_those_who_look_again() {
        for shared in [false, true] {
            let mut ram = GuestRam::new(&RamSpec {
                shared,
                ..spec(64 << 20)
            })
            .unwrap();
            let handle = ram.memory().clone();
            let (at, before) = (GuestAddress(4 * GIB), handle.memory());
            let more = ram.map_more(4 * GIB, 128 << 20).unwrap();
            assert_eq!((more.slot.slot, more.slot.guest), (1, 4 * GIB));
            assert!(handle.memory().write_obj(7u32, at).is_err(), "not yet");
            ram.adopt(more);
            assert!(before.write_obj(7u32, at).is_err());
            handle.memory().write_obj(7u32, at).unwrap();
            assert_eq!(ram.size(), 192 << 20);
            assert_eq!(ram.end(), 4 * GIB + (128 << 20));
            assert!(matches!(
                ram.map_more(4 * GIB, 128 << 20),
                Err(RamError::Layout { .. })
            ));
            ram.discard().unwrap();
            assert_eq!(handle.memory().read_obj::<u32>(at).unwrap(), 0);
        }
    }

    #[test]
    fn memory_that_is_not_adopted_changes_nothing() {
        let ram = GuestRam::new(&spec(64 << 20)).unwrap();
        drop(ram.map_more(4 * GIB, 128 << 20).unwrap());
        assert_eq!((ram.size(), ram.slots().len()), (64 << 20, 1));
        assert!(ram.map_more(4 * GIB, 1 << 52).is_err());
    }

    #[test]
    fn discarded_memory_reads_as_zeros_whatever_backs_it() {
        for shared in [false, true] {
            let ram = GuestRam::new(&RamSpec {
                shared,
                ..spec(4 << 20)
            })
            .unwrap();
            let memory = ram.memory().memory();
            memory.write_obj(7u32, GuestAddress(0x20_1000)).unwrap();
            ram.discard().unwrap();
            assert_eq!(memory.read_obj::<u32>(GuestAddress(0x20_1000)).unwrap(), 0);
        }
    }

    /// How many of the first `pages` pages of RAM the host has in memory.
    fn resident(ram: &GuestRam, pages: usize) -> usize {
        let mut present = vec![0_u8; pages];
        let address =
            std::ptr::without_provenance_mut(usize::try_from(ram.slots()[0].host).unwrap());
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        #[expect(unsafe_code, reason = "mincore is a system call on an address")]
        let result = unsafe { libc::mincore(address, pages * 4096, present.as_mut_ptr()) };
        assert_eq!(result, 0);
        present.iter().filter(|page| **page & 1 == 1).count()
    }

    #[test]
    fn a_part_that_is_given_back_is_the_hosts_whatever_backs_it() {
        const PAGES: usize = 512;
        for shared in [false, true] {
            let ram = GuestRam::new(&RamSpec {
                shared,
                thp: Some(false),
                ..spec(4 << 20)
            })
            .unwrap();
            let view = ram.memory().memory();
            let bytes = vec![7; PAGES * 4096];
            view.write_slice(&bytes, GuestAddress(0)).unwrap();
            assert_eq!(resident(&ram, PAGES), PAGES);
            let region = view.find_region(GuestAddress(0)).unwrap();
            let backing = region.bitmap().backing().unwrap();
            assert_eq!(backing.page_size(), 4096);
            backing.discard(0x2000, 0x10_0000).unwrap();
            assert_eq!(resident(&ram, PAGES), PAGES - 256);
            let read = |at| view.read_obj::<u8>(GuestAddress(at)).unwrap();
            assert_eq!([read(0x1fff), read(0x2000), read(0x10_2000)], [7, 0, 7]);
            for (offset, len) in [(4 << 20, 4096), (0, (4 << 20) + 4096), (u64::MAX, 2)] {
                assert!(backing.discard(offset, len).is_err());
            }
        }
    }

    #[test]
    fn more_than_the_host_can_map_is_refused_with_a_mend() {
        let error = GuestRam::new(&spec(1 << 52)).err().unwrap();
        assert!(error.to_string().contains("less memory"), "{error}");
    }

    #[test]
    fn huge_pages_that_are_not_reserved_are_refused_with_a_mend() {
        let size = 1 << 40;
        let spec = RamSpec {
            huge_page: Some(2 << 20),
            ..spec(size)
        };
        let error = GuestRam::new(&spec).err().unwrap();
        assert!(error.to_string().contains("hugepages"), "{error}");
    }
}
