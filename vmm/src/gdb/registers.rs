//! KVM's register structures and the debugger's.

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{kvm_regs, kvm_sregs};

/// The registers as the debugger shows them.
#[must_use]
pub fn to_debugger(regs: &kvm_regs, sregs: &kvm_sregs) -> X86_64CoreRegs {
    let mut core = X86_64CoreRegs {
        regs: [
            regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ],
        // The upper half of RFLAGS is reserved.
        eflags: u32::try_from(regs.rflags & u64::from(u32::MAX)).unwrap_or_default(),
        rip: regs.rip,
        ..X86_64CoreRegs::default()
    };
    core.segments.cs = u32::from(sregs.cs.selector);
    core.segments.ss = u32::from(sregs.ss.selector);
    core.segments.ds = u32::from(sregs.ds.selector);
    core.segments.es = u32::from(sregs.es.selector);
    core.segments.fs = u32::from(sregs.fs.selector);
    core.segments.gs = u32::from(sregs.gs.selector);
    core
}

/// The general registers as the debugger wants them. Segments and vector
/// registers are shown, not changed.
#[must_use]
pub fn from_debugger(core: &X86_64CoreRegs) -> kvm_regs {
    let [
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rbp,
        rsp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = core.regs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: core.rip,
        rflags: u64::from(core.eflags),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_survive_both_ways() {
        let regs = kvm_regs {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            rsp: 7,
            rbp: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: u64::MAX,
            rip: 0xFFFF_FFFF_8100_0000,
            rflags: 0x246,
        };
        assert_eq!(
            from_debugger(&to_debugger(&regs, &kvm_sregs::default())),
            regs
        );
    }
}
