//! The memory of the display adapter: not RAM, but memory of the host all the same, in a KVM slot of
//! its own that follows the adapter's base address register.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::display::VideoMemory;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use virtio::memory::DirtyLog;
use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::dirty::WriteLog;
use super::mapping::Mapping;
use super::{RamError, RamSlot, RamSpec, map_region};
use crate::kvm::Vm;
use crate::kvm::log::KvmLog;
use crate::layout::VIDEO_SLOT;
use crate::sandbox;

/// The adapter's memory. It costs the host what the guest has touched.
pub struct VideoRam {
    vm: Arc<VmFd>,
    log: KvmLog,
    region: GuestRegionMmap<DirtyLog>,
    mapping: Arc<Mapping>,
    place: Mutex<Place>,
}

#[derive(Default)]
struct Place {
    /// Where the guest sees it: guest-physical, while KVM has the slot.
    base: Option<u64>,
    tracked: bool,
}

impl VideoRam {
    /// Maps `size` bytes, which the guest does not see yet.
    ///
    /// # Errors
    ///
    /// [`RamError`] when the host has not got them.
    pub fn new(vm: &Vm, size: u64) -> Result<Self, RamError> {
        let spec = RamSpec {
            size,
            shared: false,
            huge_page: None,
            thp: None,
            prefault: false,
        };
        let (region, mapping) = map_region(&spec, 0, size, None).map_err(|error| match error {
            RamError::Map { size, source, .. } => RamError::Screen { size, source },
            other => other,
        })?;
        Ok(Self {
            vm: Arc::clone(vm.fd()),
            log: vm.log().clone(),
            region,
            mapping,
            place: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What gives KVM the slot at `base`, or takes it away, and tells whether that was done.
    fn slot(&self, base: Option<u64>, tracked: bool) -> impl FnOnce() -> bool + Send + 'static {
        let region = kvm_userspace_memory_region {
            slot: VIDEO_SLOT,
            flags: if tracked { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: base.unwrap_or(0),
            memory_size: base.map_or(0, |_| self.region.len()),
            userspace_addr: self.mapping.address(),
        };
        let vm = Arc::clone(&self.vm);
        move || {
            // SAFETY: the slot describes the whole of `self.mapping`, which lives as long as `self`, whose lock is held by who waits
            // for this; the slot is taken away when that is dropped.
            #[expect(unsafe_code, reason = "KVM is given a host address range")]
            let set = unsafe { vm.set_user_memory_region(region) };
            if let Err(error) = &set {
                tracing::warn!("KVM_SET_USER_MEMORY_REGION of video memory at {base:x?}: {error}");
            }
            set.is_ok()
        }
    }

    fn set_slot(&self, base: Option<u64>, tracked: bool) -> bool {
        self.slot(base, tracked)()
    }
}

impl VideoMemory for VideoRam {
    fn size(&self) -> usize {
        self.region.size()
    }

    fn place(&self, base: Option<u64>) {
        let mut place = self.lock();
        if place.base.is_some() && self.set_slot(None, false) {
            place.base = None;
        }
        if base.is_some() && self.set_slot(base, place.tracked) {
            place.base = base;
        }
    }

    fn track(&self, on: bool) {
        let mut place = self.lock();
        if place.tracked != on {
            place.tracked = on;
            if place.base.is_some() {
                // Viewers' threads may not say what of the host is the guest's.
                let set = self.slot(place.base, on);
                let _ = sandbox::as_job(move || Ok(set()));
            }
        }
    }

    fn changed(&self, pages: &mut [u64]) {
        let place = self.lock();
        let Some(base) = place.base.filter(|_| place.tracked) else {
            return;
        };
        let slot = RamSlot {
            slot: VIDEO_SLOT,
            guest: base,
            len: self.region.len(),
            host: self.mapping.address(),
        };
        match self.log.fetch(&slot) {
            Ok(log) => {
                for (to, from) in pages.iter_mut().zip(log) {
                    *to |= from;
                }
            }
            Err(error) => {
                tracing::debug!("KVM_GET_DIRTY_LOG of video memory: {error}");
                pages.fill(u64::MAX);
            }
        }
    }

    fn read(&self, offset: usize, buffer: &mut [u8]) {
        let at = MemoryRegionAddress(u64::try_from(offset).unwrap_or(u64::MAX));
        // What is past the end stays as it is.
        drop(self.region.read(buffer, at));
    }

    fn write(&self, offset: usize, data: &[u8]) {
        let at = MemoryRegionAddress(u64::try_from(offset).unwrap_or(u64::MAX));
        drop(self.region.write(data, at));
    }

    fn clear(&self) {
        if let Err(error) = self.mapping.discard_all() {
            tracing::warn!("video memory could not be cleared: {error}");
        }
    }
}

impl Drop for VideoRam {
    fn drop(&mut self) {
        self.place(None);
    }
}
