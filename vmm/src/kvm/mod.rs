//! The host's KVM: opening it, what it must offer, and the VM.
//!
//! Only this module and the vCPU code below it talk to KVM. What the rest of
//! the machine sees are the small traits of `devices`.

pub mod baseline;
pub mod cpuid;
pub mod irq;
pub mod log;
pub mod stats;
pub mod vcpu;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_X2APIC_API, KVM_CLOCK_TSC_STABLE,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS, kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use migration::{RestoreError, SavedState};
use serde::{Deserialize, Serialize};

use crate::config::capability::{CAPABILITIES, Capability};
use crate::layout;
use crate::memory::RamSlot;
use log::KvmLog;

/// Why KVM did not do what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device is there but speaks another protocol.
    #[error("/dev/kvm speaks API version {0}; version 12 is needed")]
    ApiVersion(i32),
    /// The host's KVM lacks something.
    #[error(
        "this host's KVM lacks {name}, needed for {purpose}: use a newer kernel; 'vireo doctor' \
         lists all that is needed"
    )]
    Missing {
        /// KVM's name for it.
        name: &'static str,
        /// What it is needed for.
        purpose: &'static str,
    },
    /// A call failed.
    #[error("{call} failed{hint}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// What the user can do, when that is known.
        hint: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

impl KvmError {
    /// The error of an ioctl by name.
    pub fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        Self::call_with(call, "")
    }

    fn call_with(call: &'static str, hint: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            call,
            hint,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}

/// An open `/dev/kvm` that has everything the machine needs.
pub struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Takes over an open `/dev/kvm` and checks what it offers.
    ///
    /// # Errors
    ///
    /// [`KvmError::ApiVersion`] or [`KvmError::Missing`], naming what lacks.
    pub fn new(kvm: Kvm) -> Result<Self, KvmError> {
        let version = kvm.get_api_version();
        if version != 12 {
            return Err(KvmError::ApiVersion(version));
        }
        let has = |c: &&Capability| kvm.check_extension_raw(c.number.into()) > 0;
        if let Some(missing) = CAPABILITIES.iter().find(|c| c.required && !has(c)) {
            let Capability { name, purpose, .. } = *missing;
            return Err(KvmError::Missing { name, purpose });
        }
        Ok(Self { kvm })
    }

    /// The most vCPUs that a VM can have here.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// What KVM can show a guest through CPUID.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))
    }

    /// The MSRs that make up a vCPU's state.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(KvmError::call("KVM_GET_MSR_INDEX_LIST"))?;
        let mut indices = list.as_slice().to_vec();
        for unlisted in vcpu::unlisted_msrs() {
            if !indices.contains(&unlisted) {
                indices.push(unlisted);
            }
        }
        Ok(indices)
    }

    /// Whether the local APIC timer can run in TSC-deadline mode.
    #[must_use]
    pub fn tsc_deadline(&self) -> bool {
        self.kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer)
    }

    /// Creates a VM: step one of the start order.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        trace("KVM_CREATE_VM");
        let fd = loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => (),
                other => break other.map_err(KvmError::call("KVM_CREATE_VM"))?,
            }
        };
        let fd = Arc::new(fd);
        let log = KvmLog::new(&fd);
        Ok(Vm { fd, log })
    }
}

/// The VM as KVM knows it. The methods are named after what they set up and
/// are called in the order in which they stand here.
pub struct Vm {
    fd: Arc<VmFd>,
    log: KvmLog,
}

/// The state of the in-kernel interrupt controllers outside the vCPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct IrqchipState(Vec<kvm_irqchip>);

/// As KVM's binary interface has it.
impl SavedState for IrqchipState {
    const SCHEMA: &'static str = "kvm-irqchip";
    const VERSION: u16 = 1;
}

impl IrqchipState {
    /// Sees that state which is not trusted is of the chips that there are, each once and in order.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`].
    pub fn check(&self) -> Result<(), RestoreError> {
        if self.0.iter().map(|chip| chip.chip_id).eq(CHIPS) {
            return Ok(());
        }
        Err(RestoreError::Invalid {
            schema: Self::SCHEMA,
            reason: "it is not of the PICs and the I/O APIC".to_owned(),
        })
    }
}

/// The chips in the order in which they are saved.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

impl Vm {
    /// Gives every vCPU a non-maskable interrupt, as a message to all local APICs
    /// (Intel SDM volume 3, 11.11).
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn signal_nmi(&self) -> Result<(), KvmError> {
        const TO_ALL: u32 = 0xff << 12;
        const DELIVER_NMI: u32 = 0b100 << 8;
        let message = kvm_msi {
            address_lo: u32::try_from(layout::memory::LAPIC).unwrap_or(u32::MAX) | TO_ALL,
            data: DELIVER_NMI,
            ..kvm_msi::default()
        };
        self.fd
            .signal_msi(message)
            .map(|_| ())
            .map_err(KvmError::call("KVM_SIGNAL_MSI"))
    }

    /// The descriptor, for interrupt routes, doorbells and vCPUs.
    #[must_use]
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The log of pages that are written.
    #[must_use]
    pub fn log(&self) -> &KvmLog {
        &self.log
    }

    /// What `KVM_SET_GUEST_DEBUG` offers, as `KVM_GUESTDBG_*` bits. Kernels
    /// before 5.16 do not say; they have all that is older.
    #[must_use]
    pub fn debug_controls(&self) -> u32 {
        let asked = self.fd.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        match u32::try_from(asked) {
            Ok(0) | Err(_) => KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP,
            Ok(offered) => offered,
        }
    }

    /// Enables what must be enabled before anything else exists: 32-bit
    /// x2APIC ids without the broadcast quirk.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn enable_capabilities(&self) -> Result<(), KvmError> {
        trace("KVM_ENABLE_CAP");
        let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            ..Default::default()
        };
        cap.args[0] = u64::from(flags);
        self.fd
            .enable_cap(&cap)
            .map_err(KvmError::call("KVM_ENABLE_CAP(X2APIC_API)"))
    }

    /// Gives the guest its RAM.
    ///
    /// Memory comes before the interrupt controllers: with a controller in
    /// place each new slot waits for a grace period of the host's kernel.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_memory(&self, slots: &[RamSlot]) -> Result<(), KvmError> {
        for slot in slots {
            trace("KVM_SET_USER_MEMORY_REGION");
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.guest,
                memory_size: slot.len,
                userspace_addr: slot.host,
            };
            // SAFETY: the slot describes a mapping of guest RAM that stays in
            // place for as long as the machine owns this VM.
            #[expect(unsafe_code, reason = "KVM is given a host address range")]
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Creates the in-kernel PICs, I/O APIC and (with each vCPU) local APIC.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        let base = KvmError::call("KVM_SET_TSS_ADDR");
        let tss = usize::try_from(layout::memory::KVM_TSS).unwrap_or(usize::MAX);
        trace("KVM_SET_TSS_ADDR");
        self.fd.set_tss_address(tss).map_err(base)?;
        trace("KVM_SET_IDENTITY_MAP_ADDR");
        self.fd
            .set_identity_map_address(layout::memory::KVM_IDENTITY_MAP)
            .map_err(KvmError::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        trace("KVM_CREATE_IRQCHIP");
        self.fd
            .create_irq_chip()
            .map_err(KvmError::call("KVM_CREATE_IRQCHIP"))
    }

    /// Reads the PICs and the I/O APIC.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn irqchip_state(&self) -> Result<IrqchipState, KvmError> {
        let mut chips = Vec::new();
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(KvmError::call("KVM_GET_IRQCHIP"))?;
            chips.push(chip);
        }
        Ok(IrqchipState(chips))
    }

    /// Writes the PICs and the I/O APIC.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_irqchip_state(&self, state: &IrqchipState) -> Result<(), KvmError> {
        for chip in &state.0 {
            self.fd
                .set_irqchip(chip)
                .map_err(KvmError::call("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Reads kvmclock, so that a pause does not look like lost time to the guest, and what the host's clock says with it.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn clock(&self) -> Result<kvm_clock_data, KvmError> {
        let clock = self.fd.get_clock();
        let mut clock = clock.map_err(KvmError::call("KVM_GET_CLOCK"))?;
        if clock.flags & KVM_CLOCK_REALTIME == 0 {
            clock.realtime = realtime();
        }
        Ok(clock)
    }

    /// Sets kvmclock to what [`Vm::clock`] read.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), KvmError> {
        // Flags say what KVM_GET_CLOCK found; the setter takes none of them.
        let clock = kvm_clock_data {
            clock: clock.clock,
            flags: clock.flags & !(KVM_CLOCK_TSC_STABLE | REALTIME_FLAGS),
            ..Default::default()
        };
        self.fd
            .set_clock(&clock)
            .map_err(KvmError::call("KVM_SET_CLOCK"))
    }
}

/// The host's clock was read together with the guest's.
const KVM_CLOCK_REALTIME: u32 = 1 << 2;
/// And `KVM_CLOCK_HOST_TSC`: would step the clock over the pause.
const REALTIME_FLAGS: u32 = KVM_CLOCK_REALTIME | 1 << 3;

/// The host's clock, in nanoseconds since 1970.
#[must_use]
pub fn realtime() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let now = Duration::try_from(now).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Records a set-up call, so that a test can check their order.
pub(crate) fn trace(call: &'static str) {
    tracing::trace!(target: "vireo::kvm", "{call}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_restored_from_their_bytes_and_others_are_refused() {
        let chip = |chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        let state = IrqchipState(CHIPS.map(chip).into());
        let section = migration::Section::encode("machine", &state).unwrap();
        let read: IrqchipState = section.decode().unwrap();
        read.check().unwrap();
        for ids in [&CHIPS[..2], &[], &[2, 1, 0], &[0, 1, 2, 2]] {
            let other = IrqchipState(ids.iter().copied().map(chip).collect());
            assert!(other.check().is_err(), "{ids:?}");
        }
    }
}
