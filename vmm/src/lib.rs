//! The virtual machine monitor: KVM, guest memory, boot, ACPI, machine
//! assembly, the state driver, configuration and the `vireo` program.

pub mod console;
pub mod events;
pub mod kvm;
pub mod acpi;
pub mod boot;
pub mod layout;
pub mod machine;
pub mod memory;
