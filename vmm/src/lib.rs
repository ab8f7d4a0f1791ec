//! The virtual machine monitor: KVM, guest memory, boot, ACPI, machine
//! assembly, the state driver, configuration and the `vireo` program.

pub mod kvm;
pub mod layout;
pub mod memory;
