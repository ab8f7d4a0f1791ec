//! A vCPU's state as it is saved.

use migration::{RestoreError, SavedState};
use serde::{Deserialize, Serialize};

use super::*;

/// How far apart, in parts per million, two clocks may be that are taken for the same: what KVM itself tolerates
/// (Linux, `arch/x86/kvm/x86.c`, `tsc_tolerance_ppm`).
const TOLERATED_PPM: u64 = 250;

/// KVM's structures, which are as its binary interface has them and do not change.
#[derive(Serialize, Deserialize)]
pub struct VcpuV1 {
    index: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    /// Register and value.
    msrs: Vec<(u32, u64)>,
    /// How fast its time-stamp counter runs; 0 where the host does not say.
    tsc_khz: u32,
}

impl SavedState for VcpuV1 {
    const SCHEMA: &'static str = "kvm-vcpu";
    const VERSION: u16 = 1;
}

impl Vcpu {
    /// Takes all state, to be written down. The vCPU is not running.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn save(&self, msr_indices: &[u32]) -> Result<VcpuV1, KvmError> {
        let VcpuState {
            regs,
            sregs,
            // Taken once more, because its owners may be several.
            xsave: _,
            xcrs,
            debug,
            lapic,
            events,
            mp,
            msrs,
        } = self.state(msr_indices)?;
        let xsave = self.fd.get_xsave();
        Ok(VcpuV1 {
            index: self.index,
            regs,
            sregs,
            xsave: xsave.map_err(KvmError::call("KVM_GET_XSAVE"))?,
            xcrs,
            debug,
            lapic,
            events,
            mp,
            msrs: msrs.iter().map(|msr| (msr.index, msr.data)).collect(),
            tsc_khz: self.tsc_khz(),
        })
    }

    /// Puts state that is not trusted into a vCPU that has not run. Its time-stamp counter goes on where it stopped.
    ///
    /// # Errors
    ///
    /// [`RestoreError::Invalid`] where this vCPU cannot be as the state says.
    pub fn restore(&self, saved: VcpuV1) -> Result<(), RestoreError> {
        let invalid = |reason: String| RestoreError::Invalid {
            schema: VcpuV1::SCHEMA,
            reason,
        };
        let VcpuV1 {
            index,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            events,
            mp,
            msrs,
            tsc_khz,
        } = saved;
        if index != self.index {
            let text = format!("it is of vCPU {index}, not {}", self.index);
            return Err(invalid(text));
        }
        self.agree_on_speed(tsc_khz).map_err(&invalid)?;
        // Deadlines of the timer are counted by it, so it comes first.
        let counter = msrs.iter().find(|(index, _)| *index == MSR_TSC);
        let failed = |error: KvmError| invalid(crate::error::chain(&error));
        if let Some((index, data)) = counter {
            self.put_msrs(&[msr(*index, *data)]).map_err(failed)?;
        }
        let state = VcpuState {
            regs,
            sregs,
            xsave: Arc::new(xsave),
            xcrs,
            debug,
            lapic,
            events,
            mp,
            msrs: msrs.iter().map(|&(index, data)| msr(index, data)).collect(),
        };
        self.set_state(&state).map_err(failed)
    }

    /// How fast its time-stamp counter runs, in kHz; 0 where the host does not say. It is not running.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        speed(&self.fd)
    }

    /// Has the counter run as fast as where the state was taken, or says why it cannot.
    fn agree_on_speed(&self, saved: u32) -> Result<(), String> {
        let here = self.tsc_khz();
        if can_run_at(&self.fd, here, saved) {
            return Ok(());
        }
        Err(format!(
            "its time-stamp counter runs at {saved} kHz; this host's runs at {here} kHz and cannot be scaled"
        ))
    }
}

/// How fast the counter of a vCPU would run that comes from elsewhere, where it runs at `wanted` kHz: so fast, where [`Vcpu::restore`] takes it,
/// and else as fast as this host's. `vm` has no vCPU, and is for nothing else.
///
/// # Errors
///
/// [`KvmError::Call`].
pub fn speed_here(vm: &Vm, wanted: Option<u32>) -> Result<u32, KvmError> {
    let fd = vm.fd().create_vcpu(0);
    let fd = fd.map_err(KvmError::call("KVM_CREATE_VCPU"))?;
    // KVM tells of a speed that it has refused as if it had taken it.
    let here = speed(&fd);
    let taken = wanted.filter(|wanted| can_run_at(&fd, here, *wanted));
    Ok(taken.unwrap_or(here))
}

fn speed(fd: &VcpuFd) -> u32 {
    fd.get_tsc_khz().unwrap_or(0)
}

/// Has a vCPU whose counter runs `here` kHz fast run `wanted` fast, if it can.
fn can_run_at(fd: &VcpuFd, here: u32, wanted: u32) -> bool {
    is_same_speed(wanted, here) || fd.set_tsc_khz(wanted).is_ok()
}

/// Whether two speeds are the same, as far as they are known.
fn is_same_speed(saved: u32, here: u32) -> bool {
    let apart = u64::from(saved.abs_diff(here)) * 1_000_000;
    saved == 0 || here == 0 || apart <= u64::from(saved) * TOLERATED_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU of a VM of its own, where this host has KVM.
    fn vcpu(index: u32) -> Option<Vcpu> {
        let kvm = kvm_ioctls::Kvm::new().ok()?;
        let hypervisor = crate::kvm::Hypervisor::new(kvm).ok()?;
        let vm = hypervisor.create_vm().ok()?;
        vm.enable_capabilities().unwrap();
        vm.create_irqchip().unwrap();
        let buses = Buses {
            pio: Arc::new(Bus::default()),
            mmio: Arc::new(Bus::default()),
        };
        let cpuid = hypervisor.supported_cpuid().unwrap();
        Some(Vcpu::new(&vm, index, &cpuid, buses).unwrap())
    }

    #[test]
    fn a_vcpu_is_restored_from_its_bytes_and_no_other_takes_them() {
        let (Some(first), Some(second), Some(other)) = (vcpu(0), vcpu(0), vcpu(1)) else {
            return;
        };
        let mut regs = first.regs().unwrap();
        (regs.rip, regs.r15) = (0x1234, 0x5678_9ABC_DEF0);
        first.set_regs(&regs).unwrap();
        let msrs = [MSR_TSC, MSR_KERNEL_GS_BASE, MSR_MTRR_DEF_TYPE];
        let saved = first.save(&msrs).unwrap();
        let section = migration::Section::encode("vcpu0", &saved).unwrap();
        second.restore(section.decode().unwrap()).unwrap();
        assert_eq!(second.regs().unwrap(), regs);
        let error = other.restore(section.decode().unwrap()).unwrap_err();
        assert!(error.to_string().contains("vCPU 0, not 1"), "{error}");
    }

    #[test]
    fn a_speed_is_taken_where_a_restored_vcpu_takes_it() {
        let here = |wanted| {
            let kvm = kvm_ioctls::Kvm::new().ok()?;
            let hypervisor = crate::kvm::Hypervisor::new(kvm).ok()?;
            speed_here(&hypervisor.create_vm().ok()?, wanted).ok()
        };
        let (Some(own), Some(vcpu)) = (here(None), vcpu(0)) else {
            return;
        };
        let close = own.saturating_add(own / 10_000);
        assert_eq!(here(Some(own)), Some(own));
        assert_eq!(here(Some(close)), Some(close));
        // Some hosts can go that slowly, too.
        let taken = vcpu.agree_on_speed(1).is_ok();
        assert_eq!(here(Some(1)), Some(if taken { 1 } else { own }));
    }

    #[test]
    fn speeds_are_the_same_up_to_what_kvm_tolerates() {
        assert!(is_same_speed(2_000_000, 2_000_500));
        assert!(!is_same_speed(2_000_000, 2_000_501));
        assert!(!is_same_speed(2_000_501, 2_000_000));
        assert!(is_same_speed(0, 1) && is_same_speed(1, 0));
        assert!(!is_same_speed(u32::MAX, 1));
    }
}
