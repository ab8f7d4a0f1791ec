//! One vCPU: its set-up, its state, and running it until something stops it.

mod saved;

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use devices::Bus;
use kvm_bindings::{
    CpuId, Msrs, kvm_debug_exit_arch, kvm_debugregs, kvm_guest_debug, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::stats::VcpuStats;
use super::{KvmError, Vm, trace};

pub use saved::{VcpuV1, speed_here};

/// `IA32_TSC`: never set back, so that the guest's clocks go on over a reset.
const MSR_TSC: u32 = 0x10;
const MSR_KERNEL_GS_BASE: u32 = 0xC000_0102;
const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, all memory write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The variable MTRRs: eight pairs of base and mask.
const MSR_MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;
/// The fixed MTRRs, for the first MiB.
const MSR_MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
];

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
/// Local vector table entries (Intel SDM volume 3, 11.5.1).
const LVT_DELIVERY_NMI: u32 = 4 << 8;
const LVT_MASKED: u32 = 1 << 16;

/// Where a processor begins after reset and INIT.
const INIT_RIP: u64 = 0xFFF0;
const INIT_CS_BASE: u64 = 0xFFFF_0000;

thread_local! {
    /// Where the kick signal asks this thread's `KVM_RUN` to return at once.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The address spaces that a vCPU's accesses go to.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O: guest-physical addresses that are not RAM.
    pub mmio: Arc<Bus>,
}

/// Why [`Vcpu::run`] returned.
#[derive(Debug)]
pub enum Stop {
    /// It was asked to.
    Kicked,
    /// The guest shut the CPU down: a triple fault. The text says which vCPU
    /// and where.
    TripleFault(String),
    /// KVM could not go on; the text says why, with what the user can do.
    Failed(String),
    /// The host does not give the guest a page of its memory.
    Memory,
    /// A breakpoint or single step, under a debugger.
    Debug(kvm_debug_exit_arch),
}

/// All of a vCPU's state, as KVM's structures.
#[derive(Clone)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Arc<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

/// One vCPU. It belongs to one thread while it runs.
pub struct Vcpu {
    fd: VcpuFd,
    index: u32,
    buses: Buses,
    /// Called on its thread when it has been kicked, and need not stop.
    stand: Option<Stand>,
}

/// What a vCPU does that has been kicked and is not to stop yet; it returns at once when the flag is set.
type Stand = Box<dyn Fn(&AtomicBool) + Send>;

/// MSRs that belong to a vCPU's state although `KVM_GET_MSR_INDEX_LIST` leaves
/// them out.
pub fn unlisted_msrs() -> impl Iterator<Item = u32> {
    MSR_MTRR_VARIABLE
        .chain(MSR_MTRR_FIXED)
        .chain([MSR_MTRR_DEF_TYPE])
}

/// The signal that makes a vCPU thread leave `KVM_RUN`.
#[must_use]
pub fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Installs the handler of [`kick_signal`] for the process, once.
///
/// # Errors
///
/// The host's, when the signal cannot be handled.
pub fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            register_signal_handler(kick_signal(), on_kick).map_err(|error| error.errno())
        })
        .map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: a non-null pointer was put there by `Vcpu::run` on this
        // thread and points into the kvm_run page of a vCPU that it is running.
        #[expect(unsafe_code, reason = "a signal handler reaches KVM's shared page")]
        unsafe {
            ptr::write_volatile(flag, 1);
        }
    }
}

impl Vcpu {
    /// Creates vCPU `index`, whose APIC id is its index, and shows it `cpuid`.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn new(vm: &Vm, index: u32, cpuid: &CpuId, buses: Buses) -> Result<Self, KvmError> {
        trace("KVM_CREATE_VCPU");
        let fd = vm
            .fd()
            .create_vcpu(u64::from(index))
            .map_err(KvmError::call_with(
                "KVM_CREATE_VCPU",
                "; give the machine fewer vCPUs",
            ))?;
        fd.set_cpuid2(cpuid)
            .map_err(KvmError::call("KVM_SET_CPUID2"))?;
        let vcpu = Self {
            fd,
            index,
            buses,
            stand: None,
        };
        vcpu.write_msrs(&[
            msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ])?;
        if index == 0 {
            vcpu.wire_local_interrupts()?;
        }
        Ok(vcpu)
    }

    /// Has the vCPU do something on its thread, outside of the guest, whenever it has been kicked and is not to stop. It is given the flag
    /// that tells it to stop, and returns soon after that is set.
    pub fn when_kicked(&mut self, stand: impl Fn(&AtomicBool) + Send + 'static) {
        self.stand = Some(Box::new(stand));
    }

    /// The vCPU's number and APIC id.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What KVM counts of this vCPU, which is not running. `None` where it does not count.
    #[must_use]
    pub fn stats(&self) -> Option<VcpuStats> {
        VcpuStats::of(&self.fd).ok()
    }

    /// The boot CPU takes NMIs on LINT1. LINT0 is masked: KVM has a PIC behind
    /// it, which a kernel on hardware-reduced ACPI takes for absent and never
    /// programs, so that its interrupts would come as exceptions 0 to 15.
    fn wire_local_interrupts(&self) -> Result<(), KvmError> {
        let mut lapic = self
            .fd
            .get_lapic()
            .map_err(KvmError::call("KVM_GET_LAPIC"))?;
        for (register, entry) in [
            (APIC_LVT_LINT0, LVT_MASKED),
            (APIC_LVT_LINT1, LVT_DELIVERY_NMI),
        ] {
            for (byte, value) in lapic.regs[register..].iter_mut().zip(entry.to_le_bytes()) {
                *byte = value.cast_signed();
            }
        }
        self.fd
            .set_lapic(&lapic)
            .map_err(KvmError::call("KVM_SET_LAPIC"))
    }

    /// The general registers.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().map_err(KvmError::call("KVM_GET_REGS"))
    }

    /// Sets the general registers.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd
            .set_regs(regs)
            .map_err(KvmError::call("KVM_SET_REGS"))
    }

    /// The segment, control and table registers.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))
    }

    /// Sets the segment, control and table registers.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd
            .set_sregs(sregs)
            .map_err(KvmError::call("KVM_SET_SREGS"))
    }

    /// Sets breakpoints and single-stepping.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_debug(&self, debug: &kvm_guest_debug) -> Result<(), KvmError> {
        self.fd
            .set_guest_debug(debug)
            .map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))
    }

    /// The base that `swapgs` gives GS; 0 where the vCPU has no such register.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn kernel_gs_base(&self) -> Result<u64, KvmError> {
        let read = self.read_msrs(&[MSR_KERNEL_GS_BASE])?;
        Ok(read.first().map_or(0, |entry| entry.data))
    }

    /// The guest-physical address behind a virtual one, as this vCPU sees it now.
    #[must_use]
    pub fn translate(&self, virtual_address: u64) -> Option<u64> {
        let found = self.fd.translate_gva(virtual_address).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    }

    /// Takes all state; `msr_indices` names the MSRs that belong to it. The
    /// vCPU is not running.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn state(&self, msr_indices: &[u32]) -> Result<VcpuState, KvmError> {
        Ok(VcpuState {
            mp: self
                .fd
                .get_mp_state()
                .map_err(KvmError::call("KVM_GET_MP_STATE"))?,
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: Arc::new(
                self.fd
                    .get_xsave()
                    .map_err(KvmError::call("KVM_GET_XSAVE"))?,
            ),
            xcrs: self.fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?,
            debug: self
                .fd
                .get_debug_regs()
                .map_err(KvmError::call("KVM_GET_DEBUGREGS"))?,
            lapic: self
                .fd
                .get_lapic()
                .map_err(KvmError::call("KVM_GET_LAPIC"))?,
            msrs: self.read_msrs(msr_indices)?,
            events: self
                .fd
                .get_vcpu_events()
                .map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts state back that [`Vcpu::state`] took, of a vCPU that the guest may have sent
    /// INIT or SIPI while nobody ran it: KVM forgets them only when asked for
    /// the state that they lead to.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn reset_to(&self, state: &VcpuState) -> Result<(), KvmError> {
        self.fd
            .get_mp_state()
            .map_err(KvmError::call("KVM_GET_MP_STATE"))?;
        self.set_state(state)
    }

    /// Puts state back that [`Vcpu::state`] took. Segment registers come
    /// before the local APIC (they hold its mode), MSRs after it (they may
    /// arm its timer), and what makes the CPU run comes last.
    ///
    /// # Errors
    ///
    /// [`KvmError::Call`].
    pub fn set_state(&self, state: &VcpuState) -> Result<(), KvmError> {
        let VcpuState {
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            events,
            mp,
            msrs,
        } = state;
        self.set_sregs(sregs)?;
        self.fd
            .set_xcrs(xcrs)
            .map_err(KvmError::call("KVM_SET_XCRS"))?;
        // SAFETY: the area is 4 KiB and KVM reads no more, because dynamically
        // enabled features (which need more) are never granted to this process.
        #[expect(unsafe_code, reason = "KVM may read past the structure otherwise")]
        unsafe { self.fd.set_xsave(xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
        self.fd
            .set_debug_regs(debug)
            .map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
        self.fd
            .set_lapic(lapic)
            .map_err(KvmError::call("KVM_SET_LAPIC"))?;
        self.write_msrs(msrs)?;
        self.set_regs(regs)?;
        self.fd
            .set_vcpu_events(events)
            .map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))?;
        self.fd
            .set_mp_state(*mp)
            .map_err(KvmError::call("KVM_SET_MP_STATE"))
    }

    /// Reads those of the MSRs that the vCPU has.
    fn read_msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
        let mut entries = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let wanted: Vec<_> = rest.iter().map(|&index| msr(index, 0)).collect();
            let mut msrs = msr_list(&wanted)?;
            let read = self
                .fd
                .get_msrs(&mut msrs)
                .map_err(KvmError::call("KVM_GET_MSRS"))?;
            entries.extend(msrs.as_slice().iter().take(read));
            // KVM stops at the first that this vCPU lacks: skip it.
            rest = rest.get(read + 1..).unwrap_or_default();
        }
        Ok(entries)
    }

    /// Writes MSRs, passing over those that KVM lists but refuses to set.
    fn write_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let settable: Vec<_> = entries
            .iter()
            .filter(|e| e.index != MSR_TSC)
            .copied()
            .collect();
        self.put_msrs(&settable)
    }

    fn put_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let mut rest = entries;
        while !rest.is_empty() {
            let msrs = msr_list(rest)?;
            let written = self
                .fd
                .set_msrs(&msrs)
                .map_err(KvmError::call("KVM_SET_MSRS"))?;
            if let Some(refused) = rest.get(written) {
                tracing::debug!("KVM does not set MSR {:#x}", refused.index);
            }
            rest = rest.get(written + 1..).unwrap_or_default();
        }
        Ok(())
    }

    /// Tells the guest's kvmclock watchdogs that a pause was not a lock-up.
    pub fn announce_pause(&self) {
        // Refused while the guest has no kvmclock, which then does not matter.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs guest code until `stop` is set and the thread is kicked, or the
    /// vCPU cannot go on. Serves port and memory-mapped I/O on the way.
    ///
    /// With [`Stop::Kicked`] the last instruction is complete: KVM finishes an
    /// access that was served here only when it is entered again, and would
    /// otherwise finish it over registers that were set in the meantime.
    pub fn run(&mut self, stop: &AtomicBool) -> Stop {
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        let result = self.run_until(stop);
        IMMEDIATE_EXIT.set(ptr::null_mut());
        self.fd.set_kvm_immediate_exit(0);
        result
    }

    fn run_until(&mut self, stop: &AtomicBool) -> Stop {
        loop {
            if stop.load(Ordering::Acquire) {
                // KVM completes what is pending and enters no guest code.
                self.fd.set_kvm_immediate_exit(1);
            }
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.fd.set_kvm_immediate_exit(0);
                    if stop.load(Ordering::Acquire) {
                        return Stop::Kicked;
                    }
                    // All that was served is complete.
                    if let Some(stand) = &self.stand {
                        stand(stop);
                    }
                    continue;
                }
                Err(error) if error.errno() == libc::EFAULT => return Stop::Memory,
                Err(error) => {
                    let error = io::Error::from_raw_os_error(error.errno());
                    return Stop::Failed(format!("vCPU {}: KVM_RUN: {error}", self.index));
                }
            };
            match exit {
                VcpuExit::IoIn(port, data) => {
                    self.buses.pio.read(u64::from(port), data);
                }
                VcpuExit::IoOut(port, data) => {
                    self.buses.pio.write(u64::from(port), data);
                }
                VcpuExit::MmioRead(address, data) => {
                    self.buses.mmio.read(address, data);
                }
                VcpuExit::MmioWrite(address, data) => {
                    self.buses.mmio.write(address, data);
                }
                VcpuExit::Intr | VcpuExit::IrqWindowOpen => (),
                VcpuExit::Shutdown => return Stop::TripleFault(self.triple_fault()),
                VcpuExit::Debug(debug) => return Stop::Debug(debug),
                VcpuExit::InternalError => return Stop::Failed(self.internal_error()),
                VcpuExit::FailEntry(reason, cpu) => {
                    let index = self.index;
                    return Stop::Failed(format!(
                        "vCPU {index}: the hardware refused to enter the guest \
                         (reason {reason:#x}, host CPU {cpu})"
                    ));
                }
                other => {
                    let exit = format!("{other:?}");
                    return Stop::Failed(format!("vCPU {}: unexpected exit {exit}", self.index));
                }
            }
        }
    }

    /// Describes KVM_EXIT_SHUTDOWN.
    fn triple_fault(&self) -> String {
        let place = match (self.regs(), self.sregs()) {
            (Ok(regs), Ok(sregs)) => place_of_shutdown(&regs, &sregs),
            (Err(error), _) | (_, Err(error)) => format!("no registers: {error}"),
        };
        let index = self.index;
        format!("vCPU {index} shut down after a triple fault ({place})")
    }

    /// Describes KVM_EXIT_INTERNAL_ERROR.
    fn internal_error(&mut self) -> String {
        const EMULATION: u32 = 1;
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM
        // fills this member of the union.
        #[expect(unsafe_code, reason = "reads a union's field")]
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self.regs().map_or(0, |r| r.rip);
        let index = self.index;
        match suberror {
            EMULATION => format!(
                "vCPU {index}: KVM cannot emulate the instruction at {rip:#x}; `vireo doctor` \
                 says whether this host has hardware virtualization"
            ),
            other => format!("vCPU {index}: KVM internal error {other} at {rip:#x}"),
        }
    }
}

/// Where a vCPU shut down, for who debugs the guest's kernel. The processor
/// does not tell of which exceptions; RSP, CR2 and the IDT mostly show it.
fn place_of_shutdown(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    // The state after INIT (AMD APM volume 2, 14.1.3): the VMCB is undefined
    // after a shutdown intercept, so KVM on AMD gives the vCPU an INIT first.
    if regs.rip == INIT_RIP && sregs.cs.base == INIT_CS_BASE {
        return "KVM has reset its registers: the processor does not keep them".to_owned();
    }
    let kvm_regs { rip, rsp, .. } = regs;
    let kvm_sregs {
        cr0,
        cr2,
        cr3,
        cr4,
        idt,
        ..
    } = sregs;
    format!(
        "rip {rip:#x} rsp {rsp:#x} cr0 {cr0:#x} cr2 {cr2:#x} cr3 {cr3:#x} cr4 {cr4:#x} \
         idt {:#x}+{:#x}",
        idt.base, idt.limit
    )
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Call {
        call: "KVM_*_MSRS",
        hint: "",
        source: io::Error::from_raw_os_error(libc::E2BIG),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_is_placed_by_its_registers_unless_kvm_has_reset_them() {
        let mut regs = kvm_regs {
            rip: 0xFFF0,
            rsp: 0x7000,
            ..Default::default()
        };
        let mut sregs = kvm_sregs {
            cr2: 0xDEAD_0000,
            ..Default::default()
        };
        let place = place_of_shutdown(&regs, &sregs);
        assert!(place.starts_with("rip 0xfff0 rsp 0x7000 "), "{place}");
        assert!(place.contains(" cr2 0xdead0000 "), "{place}");
        sregs.cs.base = 0xFFFF_0000;
        assert!(!place_of_shutdown(&regs, &sregs).contains("rip"));
        regs.rip = 0xFFF1;
        assert!(place_of_shutdown(&regs, &sregs).contains("rip 0xfff1"));
    }
}
