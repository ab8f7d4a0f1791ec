//! KVM's log of the pages that vCPUs, and KVM itself, have written.
//!
//! Where KVM has `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, a log that begins says of every page that it was written, and pages are protected
//! when they are cleared, which is done in pieces while the guest runs: nothing takes long at once. Without it, beginning
//! protects all pages at once.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use super::trace;
use crate::memory::RamSlot;
use crate::memory::dirty::WriteLog;

/// `KVM_CLEAR_DIRTY_LOG`, by `<linux/kvm.h>`.
const CLEAR: libc::c_ulong = 0xc018_aec0;
/// How many words of 64 pages are cleared at once: 256 MiB.
const PIECE: usize = 1024;

/// The log of a VM. Clones are handles on it.
#[derive(Clone)]
pub struct KvmLog {
    vm: Arc<VmFd>,
    /// What has been read is cleared by hand.
    manual: bool,
}

/// `struct kvm_clear_dirty_log`, whose last member is an address.
#[repr(C)]
struct Clear {
    slot: u32,
    pages: u32,
    first: u64,
    bits: *const u64,
}

impl KvmLog {
    /// The log of `vm`, no slot of which has been logged yet.
    #[must_use]
    pub fn new(vm: &Arc<VmFd>) -> Self {
        const WANTED: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offered = u32::try_from(offered).unwrap_or(0) & WANTED;
        let mut manual = false;
        if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            trace("KVM_ENABLE_CAP");
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..Default::default()
            };
            cap.args[0] = u64::from(offered);
            manual = vm.enable_cap(&cap).is_ok();
        }
        Self {
            vm: Arc::clone(vm),
            manual,
        }
    }

    /// Tells KVM that the pages of `words` have been read: their next write is logged.
    fn clear(&self, slot: &RamSlot, words: &[u64]) -> io::Result<()> {
        let pages = slot.len.div_ceil(4096);
        for (piece, words) in words.chunks(PIECE).enumerate() {
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            let first = (piece as u64).saturating_mul(PIECE as u64 * 64);
            let here = (words.len() as u64).saturating_mul(64);
            let here = here.min(pages.saturating_sub(first));
            let clear = Clear {
                slot: slot.slot,
                pages: u32::try_from(here).map_err(io::Error::other)?,
                first,
                bits: words.as_ptr(),
            };
            // SAFETY: the structure is KVM's, and as many bits as it counts are behind its address, which KVM only reads.
            #[expect(unsafe_code, reason = "KVM_CLEAR_DIRTY_LOG has no wrapper")]
            let result = unsafe { libc::ioctl(self.vm.as_raw_fd(), CLEAR, &raw const clear) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl WriteLog for KvmLog {
    fn log(&self, slot: &RamSlot, on: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.guest,
            memory_size: slot.len,
            userspace_addr: slot.host,
        };
        // SAFETY: the slot is there already, and describes the same mapping.
        #[expect(unsafe_code, reason = "KVM is given a host address range")]
        let set = unsafe { self.vm.set_user_memory_region(region) };
        set.map_err(Into::into)
    }

    fn fetch(&self, slot: &RamSlot) -> io::Result<Vec<u64>> {
        let len = usize::try_from(slot.len).map_err(io::Error::other)?;
        let words = self.vm.get_dirty_log(slot.slot, len)?;
        if self.manual {
            // What is not cleared is told of once more. What is, is told of nowhere else.
            if let Err(error) = self.clear(slot, &words) {
                tracing::warn!("KVM's log of guest memory is not cleared: {error}");
            }
        }
        Ok(words)
    }
}
