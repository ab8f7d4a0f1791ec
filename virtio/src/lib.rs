//! Virtio 1.2: queues, the PCI transport, and the device models.
//!
//! * [`device`]: the trait that a model implements and what it is handed.
//! * [`memory`]: the guest memory that queues live in, and the log of pages
//!   that devices have written.
//! * [`transport`]: what joins a model to the PCI bus.
//! * [`models`]: one file for each device, and the registry that lists them.
//!
//! # Adding a device
//!
//! Write `models/NAME.rs` with a configuration struct (serde,
//! `deny_unknown_fields`), a saved state, a type that implements
//! [`device::VirtioDevice`] and a `pub const MODEL: Model`; then add `NAME` to the
//! `models!` list in `models/mod.rs`. Command line, configuration file, help, the
//! conformance suite and saved state follow from the registry.

pub mod device;
pub mod memory;
pub mod models;
pub mod schema;
pub mod transport;
