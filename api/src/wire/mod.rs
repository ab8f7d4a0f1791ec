//! The JSON objects of the socket.
//!
//! * [`config`]: the description of a machine, as Cloud Hypervisor's v1 API has it.
//! * [`device`]: the devices in it.
//! * [`request`]: what the other endpoints take.
//! * [`restore`]: what becomes of a snapshot.
//! * [`answer`]: what is given back.
//! * [`agent`]: what the guest agent is asked and answers.
//! * [`disk`]: what is done to the images of disks in use.
//! * [`input`]: keyboards and pointers.
//! * [`migrate`]: machines that go to other monitors.
//!
//! Fields that are not set are left out. What v1 knows and this monitor has
//! not is parsed all the same, so that it can be refused by name.

pub mod agent;
pub mod answer;
pub mod config;
pub mod device;
pub mod disk;
pub mod input;
pub mod migrate;
pub mod request;
pub mod restore;
#[cfg(test)]
mod tests;

pub use agent::*;
pub use answer::*;
pub use config::*;
pub use device::*;
pub use disk::*;
pub use input::*;
pub use migrate::*;
pub use request::*;
pub use restore::*;
