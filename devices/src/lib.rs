//! The buses, interrupt lines, PCI functions and platform devices of the machine.
//!
//! This crate knows no KVM and no guest memory. It meets its surroundings
//! through small traits that `vmm` implements:
//!
//! | trait | what it stands for |
//! |---|---|
//! | [`IrqLine`], [`LevelLine`] | an edge- or level-triggered input of the interrupt controller |
//! | [`MsiVector`], [`MsiAllocator`] | a message-signalled interrupt and where they come from |
//! | [`GuestRequests`] | what a guest asks of the machine: power off, reset, panic |
//! | [`time::Clock`], [`time::WakeTimer`] | what time it is, and being called later |
//!
//! # Devices
//!
//! A device is an `Arc` of a struct with interior mutability. It sits on a
//! [`Bus`] as a [`BusDevice`] (called by vCPU threads, concurrently) and in the
//! machine's list of units as a [`Unit`] (called by the control thread).
//! Each device file has a pure register core, which is what is tested and
//! saved, and a thin shell that owns the lock and the interrupt line.

pub mod acpi;
pub mod bus;
#[cfg(test)]
mod conformance;
pub mod debugcon;
pub mod display;
pub mod i8042;
pub mod input;
pub mod irq;
pub mod log_limit;
pub mod output;
pub mod pci;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod time;
pub mod unit;
pub mod watchdog;

pub use bus::{Bus, BusDevice, BusError};
pub use irq::{
    GuestRequest, GuestRequests, IrqLine, LevelLine, MsiAllocator, MsiError, MsiMessage, MsiVector,
};
pub use log_limit::LogLimit;
pub use unit::{StartError, StopError, Unit};
