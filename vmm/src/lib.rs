//! The virtual machine monitor: KVM, guest memory, boot, ACPI, machine
//! assembly, the state driver, configuration and the `vireo` program.

pub mod acpi;
pub mod agent;
mod boot;
mod chains;
pub mod cli;
pub mod config;
pub mod console;
pub mod definitions;
pub mod display;
pub mod doctor;
pub mod error;
pub mod gdb;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod monitor;
pub mod notice;
pub mod opener;
pub mod places;
pub mod process;
mod random;
pub mod run;
pub mod sandbox;
pub mod smbios;
pub mod tls;
