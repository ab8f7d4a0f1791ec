//! The bytes that a PS/2 device is about to send.

use std::collections::VecDeque;

/// A PS/2 device's buffer holds 16 bytes.
const CAPACITY: usize = 16;

/// A bounded queue of bytes towards the controller.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    bytes: VecDeque<u8>,
}

impl SendQueue {
    /// Adds bytes at the end; those that do not fit are lost.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = self.room();
        self.bytes.extend(bytes.iter().take(room));
    }

    /// How many bytes more it takes.
    pub(super) fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.bytes.len())
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes the first byte.
    pub(super) fn pop(&mut self) -> Option<u8> {
        self.bytes.pop_front()
    }

    /// Undoes a [`SendQueue::pop`]. At most two bytes are out at a time (a key's code and that it was released), so the
    /// queue grows to two more than its capacity at most.
    pub(super) fn put_back(&mut self, byte: u8) {
        self.bytes.push_front(byte);
    }

    /// Drops all bytes.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    pub(super) fn save(&self) -> Vec<u8> {
        let Self { bytes } = self;
        bytes.iter().copied().collect()
    }

    /// Rebuilds a queue from untrusted bytes; `one_is_out` when a byte is out
    /// that [`SendQueue::put_back`] may bring back.
    pub(super) fn restore(bytes: Vec<u8>, one_is_out: bool) -> Result<Self, String> {
        let limit = CAPACITY + if one_is_out { 0 } else { 2 };
        if bytes.len() > limit {
            return Err(format!(
                "{} bytes wait in a queue that holds {limit}",
                bytes.len()
            ));
        }
        Ok(Self {
            bytes: bytes.into(),
        })
    }
}
