//! qcow2, versions 2 and 3: mapping, allocation, snapshots, checks.
//!
//! The format is that of QEMU's interoperability document (`docs/interop/qcow2`).

pub(crate) mod bitmap_table;
pub(crate) mod check;
pub(crate) mod create;
pub(crate) mod entry;
pub(crate) mod extension;
pub(crate) mod fields;
pub(crate) mod geometry;
pub(crate) mod header;
pub(crate) mod refblock;
pub(crate) mod repair;
pub(crate) mod snapshot_table;
#[cfg(test)]
mod testing;
