//! `vireo image` beside QEMU's tools: the same images, the same arguments, the same answers.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends at what it did not expect"
)]

mod answers;
mod bitmaps;
mod change;
mod copy;
mod place;
mod random;
mod safety;
mod snapshots;
