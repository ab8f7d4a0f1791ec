//! Host networking: what a virtio-net device plugs into.
//!
//! The crate owns taps, the user-mode back end, rate limits, mirroring and
//! announcements. It sees frames in buffers, never virtio or guest memory.
//! Back ends arrive with the network devices; what is here already is the
//! [`MacAddress`], because configuration files name it.

mod mac;

pub use mac::{MacAddress, ParseMacError};
