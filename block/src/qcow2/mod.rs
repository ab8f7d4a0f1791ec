//! qcow2, versions 2 and 3: mapping, allocation, snapshots, checks.
//!
//! The format is that of QEMU's interoperability document (`docs/interop/qcow2`).

mod allocate;
pub(crate) mod bitmap;
pub(crate) mod bitmap_table;
pub(crate) mod check;
mod checkpoint;
mod claims;
mod clusters;
mod compress;
pub(crate) mod create;
mod debt;
pub(crate) mod dirty;
pub(crate) mod disk;
pub(crate) mod entry;
pub(crate) mod epoch;
pub(crate) mod extension;
pub(crate) mod fields;
pub(crate) mod geometry;
pub(crate) mod header;
mod holes;
pub(crate) mod image;
pub(crate) mod map;
pub(crate) mod meta;
mod packed;
mod pages;
mod populate;
mod queue;
pub(crate) mod refblock;
mod refcount;
pub(crate) mod repair;
mod reserved;
mod resize;
mod seal;
pub(crate) mod session;
mod slow;
pub(crate) mod snapshot;
pub(crate) mod snapshot_table;
#[cfg(test)]
pub(crate) mod testing;
mod tracking;
mod tree;
mod vacate;
mod words;
pub(crate) mod write;
mod zero;

#[cfg(test)]
pub(crate) mod tests;

pub use check::{CheckReport, Finding, Severity};
pub use create::{CreateError, CreateOptions, Preallocation};
pub use header::Compression;
pub use image::Qcow2;
pub use repair::Repair;
pub use session::ChangeError;
pub use snapshot::NewSnapshot;
