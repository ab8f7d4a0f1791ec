//! What Vireo asks of KVM, by the names of the KVM API's capabilities.

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_DEBUGREGS, KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXT_CPUID, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD,
    KVM_CAP_IOEVENTFD_NO_LENGTH, KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD,
    KVM_CAP_KVMCLOCK_CTRL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_MP_STATE,
    KVM_CAP_NESTED_STATE, KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG,
    KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR, KVM_CAP_SIGNAL_MSI, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_SYNC_MMU, KVM_CAP_TSC_CONTROL, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_USER_MEMORY,
    KVM_CAP_VCPU_EVENTS, KVM_CAP_X2APIC_API, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_CAP_XSAVE2,
};

/// A capability, and what Vireo has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number in the KVM API.
    pub number: u32,
    /// Its name there.
    pub name: &'static str,
    /// Whether no machine can run without it.
    pub required: bool,
    /// What it is for, or, where it is not required, what is lost without it.
    pub purpose: &'static str,
}

macro_rules! capabilities {
    ($($need:ident $name:ident: $purpose:literal;)*) => {
        &[$(Capability {
            number: $name,
            name: stringify!($name),
            required: capabilities!(@$need),
            purpose: $purpose,
        }),*]
    };
    (@needs) => { true };
    (@likes) => { false };
}

/// Every capability that Vireo looks at, the required ones first.
pub const CAPABILITIES: &[Capability] = capabilities! {
    needs KVM_CAP_USER_MEMORY: "guest memory";
    needs KVM_CAP_SYNC_MMU: "guest memory that the host can page and discard";
    needs KVM_CAP_IRQCHIP: "interrupt controllers in the kernel";
    needs KVM_CAP_IRQ_ROUTING: "message-signalled interrupts";
    needs KVM_CAP_SIGNAL_MSI: "message-signalled interrupts";
    needs KVM_CAP_IRQFD: "interrupts from device threads";
    needs KVM_CAP_IOEVENTFD: "doorbells of virtio devices";
    needs KVM_CAP_IMMEDIATE_EXIT: "stopping a vCPU without losing an event";
    needs KVM_CAP_SET_TSS_ADDR: "real mode on Intel processors";
    needs KVM_CAP_SET_IDENTITY_MAP_ADDR: "real mode on Intel processors";
    needs KVM_CAP_EXT_CPUID: "the processor that the guest sees";
    needs KVM_CAP_X2APIC_API: "interrupts with x2APIC ids";
    needs KVM_CAP_ADJUST_CLOCK: "the guest's clock (kvmclock)";
    needs KVM_CAP_MP_STATE: "starting vCPUs";
    needs KVM_CAP_VCPU_EVENTS: "saving vCPUs";
    needs KVM_CAP_DEBUGREGS: "saving vCPUs";
    needs KVM_CAP_XSAVE: "saving vCPUs";
    needs KVM_CAP_XCRS: "saving vCPUs";
    likes KVM_CAP_XSAVE2: "saving vCPUs with AMX";
    likes KVM_CAP_KVMCLOCK_CTRL: "no soft-lockup warnings in a guest after a pause";
    likes KVM_CAP_TSC_DEADLINE_TIMER: "the cheapest timer of the guest";
    likes KVM_CAP_TSC_CONTROL: "the same TSC frequency after a move to another processor";
    likes KVM_CAP_IOEVENTFD_NO_LENGTH: "the cheapest doorbells";
    likes KVM_CAP_READONLY_MEM: "read-only memory, for firmware";
    likes KVM_CAP_SPLIT_IRQCHIP: "an I/O APIC outside the kernel";
    likes KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: "cheap dirty logs of large guests";
    likes KVM_CAP_DIRTY_LOG_RING: "dirty rings";
    likes KVM_CAP_DIRTY_LOG_RING_ACQ_REL: "dirty rings with stated ordering";
    likes KVM_CAP_SET_GUEST_DEBUG: "breakpoints and single steps with --gdb";
    likes KVM_CAP_NESTED_STATE: "saving guests that run guests";
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_is_listed_once_and_the_required_come_first() {
        for (index, capability) in CAPABILITIES.iter().enumerate() {
            let rest = &CAPABILITIES[index + 1..];
            assert!(rest.iter().all(|c| c.number != capability.number));
            assert!(capability.required || rest.iter().all(|c| !c.required));
        }
    }
}
