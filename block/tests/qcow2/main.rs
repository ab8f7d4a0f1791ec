//! The qcow2 engine against QEMU's tools and against a model in memory.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "tests"
)]

mod bitmaps;
mod concurrent;
mod differential;
mod hostile;
mod shape;
mod support;
