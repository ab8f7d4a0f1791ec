//! The guest as a debugger's target.

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSingleStep,
    MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_debug_exit_arch, kvm_guest_debug,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::registers::{from_debugger, to_debugger};
use crate::kvm::KvmError;
use crate::machine::driver::{DebugStop, Driver};
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

/// A breakpoint instruction in guest memory.
struct Planted {
    original: u8,
}

/// The guest, held or running, with the debugger's breakpoints.
pub struct Guest {
    mailbox: Mailbox,
    cpus: usize,
    link: RawFd,
    stops: Receiver<DebugStop>,
    stopped: Arc<EventFd>,
    software: BTreeMap<u64, Planted>,
    hardware: Vec<u64>,
    /// vCPUs that are to execute one instruction only.
    stepping: Vec<usize>,
    /// The vCPU to whose guest its own breakpoint exception is given back.
    reinject: Option<usize>,
}

impl Guest {
    /// Holds all vCPUs for a debugger on the connection `link`.
    ///
    /// # Errors
    ///
    /// [`GuestError`] when the machine has ended or the host is out of descriptors.
    pub fn attach(mailbox: Mailbox, cpus: usize, link: RawFd) -> Result<Self, GuestError> {
        let stopped = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(GuestError::Host)?);
        let (sender, stops) = channel();
        let wake = Arc::clone(&stopped);
        let guest = Self {
            mailbox,
            cpus,
            link,
            stops,
            stopped,
            software: BTreeMap::new(),
            hardware: Vec::new(),
            stepping: Vec::new(),
            reinject: None,
        };
        guest.errand(move |driver| {
            driver.attach_debugger(Box::new(move |stop| {
                // The debugger may just have gone; then nobody wants to know.
                let _ = sender.send(stop);
                let _ = wake.write(1);
            }));
        })?;
        Ok(guest)
    }

    /// Takes all breakpoints out and lets the guest run on.
    pub fn detach(mut self) {
        // Running vCPUs answer nothing: whoever asked one would wait for good.
        let _ = self.errand(Driver::hold);
        let planted: Vec<_> = self.software.keys().copied().collect();
        for address in planted {
            let _ = self.remove_sw_breakpoint(address, 0);
        }
        let cpus = self.cpus;
        // An ended machine needs no release.
        let _ = self.errand(move |driver| {
            for cpu in 0..cpus {
                let off = kvm_guest_debug::default();
                let _ = driver
                    .machine()
                    .vcpus()
                    .ask(cpu, move |vcpu| vcpu.set_debug(&off));
            }
            driver.detach_debugger();
        });
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

    /// Why the guest has stopped, if it has. A breakpoint exception that is
    /// the guest's own goes back to it, and the guest runs on.
    ///
    /// # Errors
    ///
    /// [`GuestError`].
    pub fn stop_reason(&mut self) -> Result<Option<MultiThreadStopReason<u64>>, GuestError> {
        let _ = self.stopped.read();
        let Ok(DebugStop { cpu, debug }) = self.stops.try_recv() else {
            return Ok(None);
        };
        let kvm_debug_exit_arch {
            exception, pc, dr6, ..
        } = debug;
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

    fn peek_byte(&self, address: u64) -> Option<u8> {
        self.access(0, address, vec![0], false)?.first().copied()
    }

    fn poke_byte(&self, address: u64, byte: u8) -> bool {
        self.access(0, address, vec![byte], true)
            .is_some_and(|done| done.len() == 1)
    }

    /// KVM's debug controls for one vCPU.
    fn controls(&self, cpu: usize) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP,
            ..Default::default()
        };
        if self.stepping.contains(&cpu) {
            debug.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if self.reinject == Some(cpu) {
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
        (0..self.cpus).map(tid).for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Guest {
    fn resume(&mut self) -> Result<(), GuestError> {
        let controls: Vec<_> = (0..self.cpus).map(|cpu| self.controls(cpu)).collect();
        self.reinject = None;
        self.errand(move |driver| {
            for (cpu, debug) in controls.into_iter().enumerate() {
                driver
                    .machine()
                    .vcpus()
                    .ask(cpu, move |vcpu| vcpu.set_debug(&debug))
                    .transpose()?;
            }
            driver.release();
            Ok::<_, KvmError>(())
        })??;
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), GuestError> {
        self.stepping.clear();
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        _signal: Option<Signal>,
    ) -> Result<(), GuestError> {
        self.stepping.retain(|cpu| *cpu != cpu_of(tid));
        Ok(())
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
        let Some(original) = self.peek_byte(address) else {
            return Ok(false);
        };
        if !self.poke_byte(address, INT3) {
            return Ok(false);
        }
        self.software.insert(address, Planted { original });
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let Some(Planted { original }) = self.software.remove(&address) else {
            return Ok(false);
        };
        Ok(self.poke_byte(address, original))
    }
}

impl HwBreakpoint for Guest {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        if self.hardware.len() >= HARDWARE_BREAKPOINTS {
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
