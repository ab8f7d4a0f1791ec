//! Who may still be using a host offset that was looked up.
//!
//! Mapped data moves without a lock. When a cluster leaves the mapping while such a transfer
//! is on its way, the cluster must not be given to another use before the transfer has ended.
//! So whoever looks an offset up first pins the current epoch, and keeps the pin until its
//! transfer is over. Taking a cluster out of the mapping ends an epoch; the cluster is free when no pin
//! of that epoch or an older one is left.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// No epoch is pinned.
const NONE: u64 = u64::MAX;

/// The epochs of one image.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    current: AtomicU64,
    pins: Mutex<Vec<Weak<AtomicU64>>>,
}

impl Epochs {
    /// Ends the current epoch: what was taken out of the mapping before this call is tagged with the
    /// result.
    pub(crate) fn advance(&self) -> u64 {
        self.current.fetch_add(1, Ordering::SeqCst)
    }

    /// The oldest epoch that anybody has pinned. What has an older tag is not in use any more.
    pub(crate) fn oldest(&self) -> u64 {
        let mut pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        let mut oldest = self.current.load(Ordering::SeqCst);
        pins.retain(|pin| match pin.upgrade() {
            Some(pin) => {
                oldest = oldest.min(pin.load(Ordering::SeqCst));
                true
            }
            None => false,
        });
        oldest
    }

    /// Whether anybody has anything pinned.
    pub(crate) fn pinned(&self) -> bool {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.iter()
            .filter_map(Weak::upgrade)
            .any(|pin| pin.load(Ordering::SeqCst) != NONE)
    }

    /// A new party that does transfers; it has nothing pinned.
    pub(crate) fn join(self: &Arc<Self>) -> Pins {
        let oldest = Arc::new(AtomicU64::new(NONE));
        self.pins
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(Arc::downgrade(&oldest));
        Pins {
            epochs: Arc::clone(self),
            oldest,
            held: VecDeque::new(),
        }
    }
}

/// One party's pins: how many transfers it has in each epoch. Dropping it gives all of them up.
#[derive(Debug)]
pub(crate) struct Pins {
    epochs: Arc<Epochs>,
    oldest: Arc<AtomicU64>,
    held: VecDeque<(u64, u32)>,
}

impl Pins {
    /// Pins the current epoch, before a look-up. The result goes to [`Pins::leave`].
    pub(crate) fn enter(&mut self) -> u64 {
        let now = self.epochs.current.load(Ordering::SeqCst);
        match self.held.back_mut() {
            Some((epoch, count)) if *epoch == now => *count += 1,
            Some(_) => self.held.push_back((now, 1)),
            None => {
                self.held.push_back((now, 1));
                // Before any look-up, or the cluster that it finds could be reused unseen.
                self.oldest.store(now, Ordering::SeqCst);
            }
        }
        now
    }

    /// The transfer that pinned `epoch` has ended.
    pub(crate) fn leave(&mut self, epoch: u64) {
        if let Some((_, count)) = self.held.iter_mut().find(|(held, _)| *held == epoch) {
            *count -= 1;
        }
        let mut changed = false;
        while self.held.front().is_some_and(|(_, count)| *count == 0) {
            self.held.pop_front();
            changed = true;
        }
        if changed {
            let oldest = self.held.front().map_or(NONE, |(epoch, _)| *epoch);
            self.oldest.store(oldest, Ordering::SeqCst);
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.oldest.store(NONE, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_free_only_when_older_pins_are_gone() {
        let epochs = Arc::new(Epochs::default());
        let mut a = epochs.join();
        let mut b = epochs.join();
        let first = a.enter();
        let tag = epochs.advance();
        let later = b.enter();
        assert!(epochs.oldest() <= tag);
        b.leave(later);
        assert!(epochs.oldest() <= tag, "a still holds its pin");
        a.leave(first);
        assert!(epochs.oldest() > tag);
    }

    #[test]
    fn later_pins_of_one_party_do_not_hide_its_first() {
        let epochs = Arc::new(Epochs::default());
        let mut pins = epochs.join();
        let first = pins.enter();
        let tag = epochs.advance();
        let second = pins.enter();
        pins.leave(second);
        assert!(epochs.oldest() <= tag);
        let third = pins.enter();
        pins.leave(first);
        assert!(epochs.oldest() > tag);
        pins.leave(third);
    }

    #[test]
    fn a_party_that_is_gone_holds_nothing() {
        let epochs = Arc::new(Epochs::default());
        let mut pins = epochs.join();
        pins.enter();
        let tag = epochs.advance();
        drop(pins);
        assert!(epochs.oldest() > tag);
    }
}
