//! What a network device counts.
//!
//! Each pair of queues has a tally of its own, which its worker alone writes;
//! readers add them up. Bytes are those of frames, without the header in front.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use net::MirrorCounts;

use crate::device::Counters;

/// A number with one writer.
#[derive(Default)]
struct Tally(AtomicU64);

impl Tally {
    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, more: u64) {
        self.0
            .store(self.get().wrapping_add(more), Ordering::Relaxed);
    }
}

/// Frames of one direction.
#[derive(Default)]
pub struct Direction {
    frames: Tally,
    bytes: Tally,
    dropped: Tally,
    errors: Tally,
}

impl Direction {
    /// A frame has gone to where it was to go. Only the pair's worker may call this, as what follows.
    pub fn passed(&self, bytes: usize) {
        self.frames.add(1);
        self.bytes.add(bytes as u64);
    }

    /// A frame has been left out: the link is down, nobody wants it, or there is no room for it.
    pub fn dropped(&self) {
        self.dropped.add(1);
    }

    /// A chain or a frame made no sense, or the network refused it.
    pub fn failed(&self) {
        self.errors.add(1);
    }
}

/// What one pair has done. No other pair's is on its cache lines.
#[derive(Default)]
#[repr(align(128))]
pub struct PairTally {
    /// Frames to the guest.
    pub rx: Direction,
    /// Frames from the guest.
    pub tx: Direction,
}

const _: () = assert!(size_of::<PairTally>() == 128);

/// The tallies of a device, one for each pair, and that of its mirrors.
pub struct Tallies {
    pairs: Box<[Arc<PairTally>]>,
    mirrored: Arc<MirrorCounts>,
}

impl Tallies {
    /// Nothing has been done yet.
    #[must_use]
    pub fn new(pairs: u16) -> Self {
        Self {
            pairs: (0..pairs).map(|_| Arc::default()).collect(),
            mirrored: Arc::default(),
        }
    }

    /// The tally of a pair, for its worker.
    #[must_use]
    pub fn of(&self, pair: u16) -> Arc<PairTally> {
        let tally = self.pairs.get(usize::from(pair));
        tally.cloned().unwrap_or_default()
    }

    /// The tally of all mirrors.
    #[must_use]
    pub fn mirrored(&self) -> Arc<MirrorCounts> {
        Arc::clone(&self.mirrored)
    }

    fn sum(&self, value: impl Fn(&PairTally) -> &Tally) -> u64 {
        let values = self.pairs.iter().map(|tally| value(tally).get());
        values.fold(0, u64::wrapping_add)
    }
}

impl Counters for Tallies {
    fn read(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_bytes", self.sum(|tally| &tally.rx.bytes)),
            ("rx_frames", self.sum(|tally| &tally.rx.frames)),
            ("rx_dropped", self.sum(|tally| &tally.rx.dropped)),
            ("rx_errors", self.sum(|tally| &tally.rx.errors)),
            ("tx_bytes", self.sum(|tally| &tally.tx.bytes)),
            ("tx_frames", self.sum(|tally| &tally.tx.frames)),
            ("tx_dropped", self.sum(|tally| &tally.tx.dropped)),
            ("tx_errors", self.sum(|tally| &tally.tx.errors)),
            ("mirror_frames", self.mirrored.written()),
            ("mirror_dropped", self.mirrored.lost()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn pairs_are_added_up_by_direction_and_outcome() {
        let tallies = Tallies::new(2);
        tallies.of(0).rx.passed(60);
        tallies.of(1).rx.passed(1514);
        tallies.of(1).tx.passed(100);
        tallies.of(0).rx.dropped();
        tallies.of(1).tx.dropped();
        tallies.of(0).tx.failed();
        tallies.of(2).tx.failed();
        let values: BTreeMap<_, _> = tallies.read().into_iter().collect();
        let expected = [
            ("mirror_dropped", 0),
            ("mirror_frames", 0),
            ("rx_bytes", 1574),
            ("rx_dropped", 1),
            ("rx_errors", 0),
            ("rx_frames", 2),
            ("tx_bytes", 100),
            ("tx_dropped", 1),
            ("tx_errors", 1),
            ("tx_frames", 1),
        ];
        assert_eq!(values, BTreeMap::from(expected));
    }
}
