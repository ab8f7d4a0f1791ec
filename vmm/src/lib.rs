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
pub mod cli;
pub mod config;
pub mod doctor;
pub mod layout;
pub mod opener;
pub mod run;
