//! Tests of the engine on storages of their own.

mod crash;
mod faults;
pub(super) mod memory;
