//! Tests of the engine on storages of their own.

mod changes;
pub(crate) mod crash;
mod faults;
mod found;
mod header;
pub(super) mod memory;
mod sparse;
