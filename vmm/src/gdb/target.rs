//! The guest as a debugger's target.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::{from_debugger, to_debugger};
use crate::kvm::KvmError;
use crate::machine::driver::{DebugSink, DebugStop, Driver};
use crate::machine::inbox::{Mailbox, Message};

const INT3: u8 = 0xCC;
const EXCEPTION_BREAKPOINT: u32 = 3;
/// DR6: a single step ended (Intel SDM volume 3, 18.2.3).
const DR6_SINGLE_STEP: u64 = 1 << 14;
/// DR7: reserved, always one.
const DR7_FIXED: u64 = 1 << 10;
const HARDWARE_BREAKPOINTS: usize = 4;
const PAGE: u64 = 4096;

/// Why the guest cannot be debugged any more.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
    /// The host is out of descriptors.
    #[error("no descriptor for the debugger")]
    Host(#[source] io::Error),
    /// KVM refused debugging.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A breakpoint instruction in guest memory. It is taken out where it was put
/// in: the virtual address may lead elsewhere by then.
struct Planted {
    physical: u64,
    original: u8,
}

/// Wakes the debugger's thread for a stop, and when the machine is gone.
struct Bell(Arc<EventFd>);

impl Bell {
    fn ring(&self) {
        // A full eventfd wakes as well as one more count would.
        let _ = self.0.write(1);
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.ring();
    }
}

/// The guest, held or running, with the debugger's breakpoints.
pub struct Guest {
    mailbox: Mailbox,
    link: RawFd,
    /// The stops of the present run. Each run has a channel of its own, so that
    /// a second vCPU that stopped in the run before is not taken for news: it
    /// stops again at the same place.
    stops: Receiver<DebugStop>,
    stopped: Arc<EventFd>,
    software: BTreeMap<u64, Planted>,
    hardware: Vec<u64>,
    /// What KVM can do, as `KVM_GUESTDBG_*` bits.
    offered: u32,
    /// vCPUs that are to execute one instruction only.
    stepping: Vec<usize>,
    /// vCPUs that are to run, besides those that step.
    continuing: Vec<usize>,
    /// vCPUs that are in neither list wait.
    locked: bool,
    /// The vCPU to whose guest its own breakpoint exception is given back.
    reinject: Option<usize>,
}

impl Guest {
    /// Holds all vCPUs for a debugger on the connection `link`.
    ///
    /// # Errors
    ///
    /// [`GuestError`] when the machine has ended or the host is out of descriptors.
    pub fn attach(mailbox: Mailbox, link: RawFd) -> Result<Self, GuestError> {
        let stopped = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(GuestError::Host)?);
        let mut guest = Self {
            mailbox,
            link,
            // Nothing stops before the first run.
            stops: channel().1,
            stopped,
            software: BTreeMap::new(),
            hardware: Vec::new(),
            offered: 0,
            stepping: Vec::new(),
            continuing: Vec::new(),
            locked: false,
            reinject: None,
        };
        guest.offered = guest.errand(|driver| {
            driver.hold();
            driver.machine().debug_controls()
        })?;
        Ok(guest)
    }

    /// Has the control thread do something, and waits for the answer.
    fn errand<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Result<T, GuestError> {
        let (answer, receiver) = channel();
        let errand = Box::new(move |driver: &mut Driver| {
            let _ = answer.send(work(driver));
        });
        if !self.mailbox.send(Message::Errand(errand)) {
            return Err(GuestError::Ended);
        }
        receiver.recv().map_err(|_| GuestError::Ended)
    }

    /// Stops the guest because the user asked.
    ///
    /// # Errors
    ///
    /// [`GuestError::Ended`].
    pub fn interrupt(&mut self) -> Result<MultiThreadStopReason<u64>, GuestError> {
        self.errand(Driver::hold)?;
        Ok(MultiThreadStopReason::SignalWithThread {
            tid: tid(0),
            signal: Signal::SIGINT,
        })
    }

    /// Why the guest has stopped or ended, if it has. A breakpoint exception that is
    /// the guest's own goes back to it, and the guest runs on.
    ///
    /// # Errors
    ///
    /// [`GuestError`].
    pub fn stop_reason(&mut self) -> Result<Option<MultiThreadStopReason<u64>>, GuestError> {
        let _ = self.stopped.read();
        let DebugStop { cpu, debug } = match self.stops.try_recv() {
            Ok(stop) => stop,
            Err(TryRecvError::Empty) => return Ok(None),
            Err(TryRecvError::Disconnected) => {
                return Ok(Some(MultiThreadStopReason::Exited(0)));
            }
        };
        let kvm_debug_exit_arch {
            exception, pc, dr6, ..
        } = debug;
        tracing::debug!(cpu, exception, pc, dr6, "debug stop");
        if exception == EXCEPTION_BREAKPOINT {
            if self.software.contains_key(&pc) {
                return Ok(Some(MultiThreadStopReason::SwBreak(tid(cpu))));
            }
            self.reinject = Some(cpu);
            self.resume()?;
            return Ok(None);
        }
        Ok(Some(if dr6 & DR6_SINGLE_STEP != 0 {
            MultiThreadStopReason::SignalWithThread {
                tid: tid(cpu),
                signal: Signal::SIGTRAP,
            }
        } else {
            MultiThreadStopReason::HwBreak(tid(cpu))
        }))
    }

    /// Waits for the debugger or the guest; `true` when the debugger has sent something.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn wait(&self) -> io::Result<bool> {
        let poll = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [poll(self.stopped.as_raw_fd()), poll(self.link)];
        crate::machine::driver::ppoll(&mut fds, None)?;
        Ok(fds[1].revents != 0)
    }

    /// Reads or writes guest memory at a virtual address as vCPU `cpu` sees
    /// it. Returns how many bytes were there.
    fn access(&self, cpu: usize, start: u64, mut data: Vec<u8>, write: bool) -> Option<Vec<u8>> {
        let accessed = self.errand(move |driver| {
            let mut done = 0;
            while done < data.len() {
                let address = start.checked_add(u64::try_from(done).ok()?)?;
                let left = usize::try_from(PAGE - address % PAGE).ok()?;
                let end = data.len().min(done + left);
                let piece = data.get_mut(done..end)?;
                let machine = driver.machine();
                let Some(physical) = machine
                    .vcpus()
                    .ask(cpu, move |vcpu| vcpu.translate(address))
                    .flatten()
                else {
                    break;
                };
                if !machine.access_memory(physical, piece, write) {
                    break;
                }
                done = end;
            }
            data.truncate(done);
            Some(data)
        });
        accessed.ok().flatten()
    }

    /// Puts a breakpoint instruction where vCPU 0 sees `address`.
    fn plant(&self, address: u64) -> Result<Option<Planted>, GuestError> {
        self.errand(move |driver| {
            let machine = driver.machine();
            let found = machine.vcpus().ask(0, move |vcpu| vcpu.translate(address));
            let physical = found.flatten()?;
            let mut original = [0];
            (machine.access_memory(physical, &mut original, false)
                && machine.access_memory(physical, &mut [INT3], true))
            .then_some(Planted {
                physical,
                original: original[0],
            })
        })
    }

    /// Takes a breakpoint instruction out again. Where something else has been
    /// written over it (the guest was reset, say) there is nothing to do.
    fn uproot(&self, planted: Planted) -> Result<(), GuestError> {
        self.errand(move |driver| {
            let Planted { physical, original } = planted;
            let mut found = [0];
            let machine = driver.machine();
            if machine.access_memory(physical, &mut found, false) && found == [INT3] {
                machine.access_memory(physical, &mut [original], true);
            }
        })
    }

    /// KVM's debug controls for one vCPU, or for one that is yet to come.
    fn controls(&self, cpu: Option<usize>) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
            ..Default::default()
        };
        if cpu.is_some_and(|cpu| self.stepping.contains(&cpu)) {
            // Where KVM can, no interrupt handler gets in between.
            debug.control |= KVM_GUESTDBG_SINGLESTEP | self.offered & KVM_GUESTDBG_BLOCKIRQ;
        }
        if cpu.is_some() && self.reinject == cpu {
            debug.control |= KVM_GUESTDBG_INJECT_BP;
        }
        if !self.hardware.is_empty() {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            let [r0, r1, r2, r3, .., dr7] = &mut debug.arch.debugreg;
            *dr7 = DR7_FIXED;
            let registers = [r0, r1, r2, r3];
            for (n, (register, address)) in registers.into_iter().zip(&self.hardware).enumerate() {
                *register = *address;
                // The global enable bit; length and kind zero mean execution.
                *dr7 |= 2 << (2 * n);
            }
        }
        debug
    }
}

/// Lets the guest run on when the debugger has gone, however it has.
impl Drop for Guest {
    fn drop(&mut self) {
        // An ended machine needs none of this.
        let _ = self.errand(Driver::hold);
        for planted in std::mem::take(&mut self.software).into_values() {
            let _ = self.uproot(planted);
        }
        let _ = self.errand(move |driver| {
            driver.machine_mut().debug_new_cpus(None);
            for cpu in 0..driver.machine().vcpus().count() {
                let off = kvm_guest_debug::default();
                driver
                    .machine()
                    .vcpus()
                    .ask(cpu, move |vcpu| vcpu.set_debug(&off));
            }
            driver.release(None, None);
        });
    }
}

fn tid(cpu: usize) -> Tid {
    NonZeroUsize::MIN.saturating_add(cpu)
}

fn cpu_of(tid: Tid) -> usize {
    tid.get() - 1
}

fn fatal(error: GuestError) -> TargetError<GuestError> {
    TargetError::Fatal(error)
}

impl Target for Guest {
    type Arch = X86_64_SSE;
    type Error = GuestError;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64_SSE, GuestError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Guest {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let cpu = cpu_of(tid);
        let read = self
            .errand(move |driver| {
                driver
                    .machine()
                    .vcpus()
                    .ask(cpu, |vcpu| Ok((vcpu.regs()?, vcpu.sregs()?)))
            })
            .map_err(fatal)?;
        let (general, segments) = read
            .ok_or(TargetError::NonFatal)?
            .map_err(|e: KvmError| fatal(e.into()))?;
        *regs = to_debugger(&general, &segments);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let (cpu, general) = (cpu_of(tid), from_debugger(regs));
        self.errand(move |driver| {
            driver
                .machine()
                .vcpus()
                .ask(cpu, move |vcpu| vcpu.set_regs(&general))
        })
        .map_err(fatal)?
        .ok_or(TargetError::NonFatal)?
        .map_err(|error| fatal(error.into()))
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let read = self
            .access(cpu_of(tid), start, vec![0; data.len()], false)
            .filter(|read| !read.is_empty())
            .ok_or(TargetError::NonFatal)?;
        for (to, from) in data.iter_mut().zip(&read) {
            *to = *from;
        }
        Ok(read.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let written = self.access(cpu_of(tid), start, data.to_vec(), true);
        match written {
            Some(written) if written.len() == data.len() => Ok(()),
            _ => Err(TargetError::NonFatal),
        }
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), GuestError> {
        let present = self.errand(|driver| driver.machine().vcpus().present())?;
        let present = present
            .into_iter()
            .filter_map(|cpu| usize::try_from(cpu).ok());
        present.map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), GuestError> {
        let cpus = match self.errand(|driver| driver.machine().vcpus().count()) {
            // That is told below.
            Err(GuestError::Ended) => 0,
            counted => counted?,
        };
        let controls: Vec<_> = (0..cpus).map(|cpu| self.controls(Some(cpu))).collect();
        let others = self.controls(None);
        self.reinject = None;
        let only = self.locked.then(|| {
            let chosen = self.stepping.iter().chain(&self.continuing);
            chosen.copied().collect()
        });
        let (sender, stops) = channel();
        let bell = Bell(Arc::clone(&self.stopped));
        let sink: DebugSink = Box::new(move |stop| {
            // The debugger may just have gone; then nobody wants to know.
            let _ = sender.send(stop);
            bell.ring();
        });
        let resumed = self.errand(move |driver| {
            driver.machine_mut().debug_new_cpus(Some(others));
            // More may have come since they were counted.
            for cpu in 0..driver.machine().vcpus().count() {
                let debug = controls.get(cpu).copied().unwrap_or(others);
                driver
                    .machine()
                    .vcpus()
                    .ask(cpu, move |vcpu| vcpu.set_debug(&debug))
                    .transpose()?;
            }
            driver.release(Some(sink), only);
            Ok::<_, KvmError>(())
        });
        match resumed {
            // The new channel has no sender left, which tells the debugger of the end.
            Err(GuestError::Ended) => (),
            done => done??,
        }
        self.stops = stops;
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), GuestError> {
        self.stepping.clear();
        self.continuing.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), GuestError> {
        self.continuing.push(cpu_of(tid));
        Ok(())
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Guest {
    fn set_resume_action_step(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), GuestError> {
        self.stepping.push(cpu_of(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Guest {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), GuestError> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Guest {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Guest {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.software.contains_key(&address) {
            return Ok(true);
        }
        let planted = self.plant(address).map_err(fatal)?;
        let found = planted.is_some();
        self.software
            .extend(planted.map(|planted| (address, planted)));
        Ok(found)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some(planted) = self.software.remove(&address) else {
            return Ok(false);
        };
        self.uproot(planted).map_err(fatal)?;
        Ok(true)
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.hardware.contains(&address) {
            return Ok(true);
        }
        if self.hardware.len() >= HARDWARE_BREAKPOINTS || self.offered & KVM_GUESTDBG_USE_HW_BP == 0
        {
            return Ok(false);
        }
        self.hardware.push(address);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let before = self.hardware.len();
        self.hardware.retain(|planted| *planted != address);
        Ok(self.hardware.len() < before)
    }
}
