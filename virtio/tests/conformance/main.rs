//! One suite for every device model, driven as a guest drives it: through PCI
//! configuration space, base address registers and rings in guest memory.
//!
//! * [`rig`]: a machine with one device, and what it signals.
//! * [`driver`]: the driver's side of the transport.
//! * [`subjects`]: the devices that are tested; a new model needs a line there
//!   only when it cannot be built from an empty configuration.
//! * [`echo`]: a device for what needs a known back end.
//! * [`registry`]: what belongs to every model beside its file.
//! * [`regular`]: what a correct driver may rely on.
//! * [`hostile`]: what a broken or malicious one must not achieve.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the whole crate is tests; a failure is a panic"
)]

mod balloon;
mod driver;
mod echo;
mod hostile;
mod registry;
mod regular;
mod rig;
mod subjects;
