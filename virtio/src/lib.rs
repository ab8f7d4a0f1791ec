//! Virtio 1.2: queues, the PCI transport, and the device models.
//!
//! * [`device`]: the trait that a model implements and what it is handed.
//! * [`limit`]: rate limits.
//! * [`memory`]: the guest memory that queues live in, and the log of pages
//!   that devices have written.
//! * [`transport`]: what joins a model to the PCI bus.
//! * [`worker`]: the threads that serve a device's queues.
//! * [`ring`]: a queue in the hands of its worker.
//! * [`vhost`]: devices whose requests another process serves.
//! * [`models`]: one file for each device, and the registry that lists them.
//!
//! # Adding a device
//!
//! Write `models/NAME.rs` and add `NAME` to the `models!` list in
//! `models/mod.rs`. Command line, configuration file, help, the conformance
//! suite and saved state follow from the registry. `models/rng.rs` is the
//! smallest complete example; the file has, in this order:
//!
//! 1. a configuration struct (serde, `deny_unknown_fields`) and a
//!    `pub const MODEL: Model` whose `fields` table mirrors it;
//! 2. the device: what it was configured with, a [`worker::Workers`], and its
//!    registers; with the two `impl`s [`device::VirtioDevice`] and
//!    [`migration::Snapshot`], the latter over a struct `…V1` of the registers
//!    alone;
//! 3. the worker: a [`worker::QueueWorker`] that owns a [`ring::Ring`] for each
//!    of its queues. `start` hands the queues to [`worker::Workers::start`],
//!    `stop` is [`worker::Workers::stop`].

pub mod device;
pub mod limit;
pub mod memory;
pub mod models;
pub mod ring;
pub mod schema;
pub mod transport;
pub mod vhost;
pub mod worker;

#[cfg(test)]
mod testing;
