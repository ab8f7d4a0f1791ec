//! What a socket device counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::Counters;

/// The numbers of a device. Packets and bytes are the guest's: what it sends is `tx`.
#[derive(Debug, Default)]
pub struct Tally {
    /// Packets that the guest has sent.
    pub tx_packets: AtomicU64,
    /// Bytes in them that were taken for a connection.
    pub tx_bytes: AtomicU64,
    /// Packets that the guest was given.
    pub rx_packets: AtomicU64,
    /// Bytes in them.
    pub rx_bytes: AtomicU64,
    /// Chains and packets of the guest that made no sense.
    pub errors: AtomicU64,
    /// Connections that have been made, from either side.
    pub connected: AtomicU64,
    /// Those that were asked for and did not come about.
    pub refused: AtomicU64,
    /// Connections that there are now.
    pub connections: AtomicU64,
}

impl Tally {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(u64::try_from(count).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Counters for Tally {
    fn read(&self) -> Vec<(&'static str, u64)> {
        [
            ("tx_packets", &self.tx_packets),
            ("tx_bytes", &self.tx_bytes),
            ("rx_packets", &self.rx_packets),
            ("rx_bytes", &self.rx_bytes),
            ("errors", &self.errors),
            ("connected", &self.connected),
            ("refused", &self.refused),
            ("connections", &self.connections),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}
