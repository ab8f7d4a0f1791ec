//! One suite for every device model, driven as a guest drives it: through PCI
//! configuration space, base address registers and rings in guest memory.
//!
//! * [`rig`]: a machine with one device, and what it signals.
//! * [`driver`]: the driver's side of the transport.
//! * [`subjects`]: the devices that are tested; a new model needs a line there
//!   only when it cannot be built from an empty configuration.
//! * [`peer`]: a program that serves a device, for those that need one.
//! * [`echo`]: a device for what needs a known back end.
//! * [`requests`]: what a driver asks each kind of device for.
//! * [`registry`]: what belongs to every model beside its file.
//! * [`regular`]: what a correct driver may rely on.
//! * `balloon` and [`plugged`]: what those of single kinds may rely on besides.
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
#[path = "../../src/vhost/peer.rs"]
#[expect(dead_code, reason = "other tests make more use of it")]
mod peer;
mod plugged;
mod registry;
mod regular;
mod requests;
mod rig;
mod subjects;
