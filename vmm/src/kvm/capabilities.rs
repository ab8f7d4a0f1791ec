//! What the machine needs of the host's KVM.

use kvm_ioctls::{Cap, Kvm};

/// A capability that the machine cannot do without.
#[derive(Clone, Copy, Debug)]
pub struct Requirement {
    /// The capability.
    pub cap: Cap,
    /// KVM's name for it.
    pub name: &'static str,
    /// What the machine uses it for.
    pub purpose: &'static str,
}

/// KVM lacks a capability.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host's KVM lacks {name}, needed for {purpose}; a newer kernel is needed")]
pub struct MissingCapability {
    /// KVM's name for it.
    pub name: &'static str,
    /// What the machine uses it for.
    pub purpose: &'static str,
}

macro_rules! requirements {
    ($($cap:ident $name:literal $purpose:literal;)*) => {
        &[$(Requirement { cap: Cap::$cap, name: $name, purpose: $purpose }),*]
    };
}

/// Everything that is required, in the order in which it is checked.
pub const REQUIRED: &[Requirement] = requirements! {
    UserMemory "KVM_CAP_USER_MEMORY" "guest RAM";
    Irqchip "KVM_CAP_IRQCHIP" "in-kernel interrupt controllers";
    IrqRouting "KVM_CAP_IRQ_ROUTING" "message-signalled interrupts";
    Irqfd "KVM_CAP_IRQFD" "interrupts from devices";
    Ioeventfd "KVM_CAP_IOEVENTFD" "doorbells of virtio queues";
    SetTssAddr "KVM_CAP_SET_TSS_ADDR" "real mode on Intel hosts";
    SetIdentityMapAddr "KVM_CAP_SET_IDENTITY_MAP_ADDR" "real mode on Intel hosts";
    ExtCpuid "KVM_CAP_EXT_CPUID" "CPUID";
    MpState "KVM_CAP_MP_STATE" "several vCPUs";
    VcpuEvents "KVM_CAP_VCPU_EVENTS" "vCPU state";
    Debugregs "KVM_CAP_DEBUGREGS" "vCPU state";
    Xsave "KVM_CAP_XSAVE" "vCPU state";
    Xcrs "KVM_CAP_XCRS" "vCPU state";
    AdjustClock "KVM_CAP_ADJUST_CLOCK" "kvmclock";
    ImmediateExit "KVM_CAP_IMMEDIATE_EXIT" "stopping vCPUs";
    X2ApicApi "KVM_CAP_X2APIC_API" "x2APIC";
};

/// Checks all of [`REQUIRED`].
///
/// # Errors
///
/// The first that is missing.
pub fn check(kvm: &Kvm) -> Result<(), MissingCapability> {
    match REQUIRED.iter().find(|r| !kvm.check_extension(r.cap)) {
        None => Ok(()),
        Some(&Requirement { name, purpose, .. }) => Err(MissingCapability { name, purpose }),
    }
}
