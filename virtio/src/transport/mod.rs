//! The virtio-pci transport (Virtio 1.2, chapter 2 and section 4.1).
//!
//! [`VirtioPci`] joins a [`VirtioDevice`](crate::device::VirtioDevice) to the
//! PCI bus. It owns what all devices share: status, feature negotiation, queue
//! addresses, doorbells and interrupts. The device model sees only complete,
//! checked queues.
//!
//! | part | what it does |
//! |---|---|
//! | `pci` | configuration space, BAR layout, lifecycle |
//! | `core` | the device's registers and their rules, apart from any bus |
//! | `signals` | interrupts, and what workers may touch without a lock |
//! | `doorbell` | kicks from the driver |
//! | `state` | the saved form |
//! | `gone` | what is left of a device that was removed |
//!
//! # What a driver's mistake does
//!
//! Register writes that the specification forbids are ignored, and read back
//! as before. Queues that cannot be used (rings outside RAM) set
//! `DEVICE_NEEDS_RESET` when the driver sets `DRIVER_OK`. The machine goes on
//! in either case.

mod core;
mod doorbell;
mod gone;
mod pci;
mod signals;
mod state;

pub use doorbell::Doorbells;
pub use pci::{TransportError, VirtioPci};
pub use signals::{DeviceEvent, DeviceEvents};
pub use state::{ProgressV1, QueueV1, VirtioPciV1};
