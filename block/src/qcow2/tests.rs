//! Tests of the engine on storages of their own.

mod changes;
pub(crate) mod crash;
mod faults;
pub(super) mod memory;
