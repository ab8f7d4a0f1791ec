//! Tests of the engine on storages of their own.

pub(crate) mod crash;
mod faults;
pub(super) mod memory;
