//! Disks that are copied with the machine, over a connection of their own.
//!
//! ```text
//!   source                                                 destination
//!   [`Transfer`]s ── all, then what changes ──► frames ──► [`Landing`]s, written one frame after the other
//!        ▲                (a thread)                            │
//!        └── how far it is, and whether all is there ◄── answers ┘
//! ```
//!
//! [`leaving`] is the source's side: it goes through the disks once, and then through what the guest has changed, for as long as the migration lasts. In the pause of the guest the
//! rest goes, and is durable at the destination before the state is sent. [`coming`] is the destination's: images that are made before the machine is accepted, and removed
//! again unless its guest runs there.
//!
//! [`Transfer`]: block::Transfer
//! [`Landing`]: block::Landing

pub mod coming;
pub mod leaving;

use std::sync::atomic::{AtomicU64, Ordering};

/// How far the copying of disks is, in bytes. Threads write it, and anyone reads.
#[derive(Debug, Default)]
pub struct Figures {
    transferred: AtomicU64,
    remaining: AtomicU64,
    total: AtomicU64,
}

impl Figures {
    /// So many bytes have gone over the wire.
    pub(super) fn add(&self, bytes: u64) {
        self.transferred.fetch_add(bytes, Ordering::Relaxed);
    }

    /// There are disks of so many bytes.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
        self.remaining.store(bytes, Ordering::Relaxed);
    }

    /// So much is left.
    pub(super) fn set_remaining(&self, bytes: u64) {
        self.remaining.store(bytes, Ordering::Relaxed);
    }

    /// How many bytes have gone, how many are left of the disks, and how many these have in all.
    #[must_use]
    pub fn now(&self) -> (u64, u64, u64) {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        (of(&self.transferred), of(&self.remaining), of(&self.total))
    }
}
