//! What a disk tells those who watch over it, beside the completions of requests.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// No threshold is set: nothing is past it.
const UNARMED: u64 = u64::MAX;

/// Something that happened to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskEvent {
    /// A write goes past the threshold, which is disarmed by that.
    WriteThreshold {
        /// The threshold that was set, a byte offset of the image file.
        threshold: u64,
        /// Where in the image file the write ends, in bytes; more than `threshold`.
        offset: u64,
    },
    /// The image was found to contradict itself. Nothing is written to it any more.
    Corrupt {
        /// What was found.
        message: String,
    },
}

/// Hears of a disk's events.
pub trait Observer: Send + Sync {
    /// Something has happened. Called by whichever thread found it, a worker with requests to serve among them: it
    /// must be quick, must not wait, and must not call the disk.
    fn event(&self, event: &DiskEvent);
}

/// A disk's observers, and what they wait for. Shared by all queues.
pub(crate) struct Events {
    threshold: AtomicU64,
    observers: Mutex<Vec<Arc<dyn Observer>>>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            threshold: AtomicU64::new(UNARMED),
            observers: Mutex::default(),
        }
    }
}

impl Events {
    /// Adds an observer that is not there yet.
    pub(crate) fn observe(&self, observer: Arc<dyn Observer>) {
        let mut observers = self.lock();
        let same = |other: &Arc<dyn Observer>| {
            std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(&observer))
        };
        if !observers.iter().any(same) {
            observers.push(observer);
        }
    }

    /// As [`crate::Disk::set_write_threshold`].
    pub(crate) fn set_threshold(&self, threshold: Option<u64>) {
        self.threshold
            .store(threshold.unwrap_or(UNARMED), Ordering::Relaxed);
    }

    /// The threshold that is armed.
    pub(crate) fn threshold(&self) -> Option<u64> {
        let threshold = self.threshold.load(Ordering::Relaxed);
        (threshold != UNARMED).then_some(threshold)
    }

    /// Takes note of a write that ends at this byte offset of the image file.
    pub(crate) fn writes_to(&self, end: u64) {
        let threshold = self.threshold.load(Ordering::Relaxed);
        if end > threshold {
            self.pass(threshold, end);
        }
    }

    #[cold]
    fn pass(&self, threshold: u64, offset: u64) {
        // Of several queues that come by, one reports.
        let disarmed = self.threshold.compare_exchange(
            threshold,
            UNARMED,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if disarmed.is_ok() {
            self.emit(&DiskEvent::WriteThreshold { threshold, offset });
        }
    }

    /// Tells everybody.
    pub(crate) fn emit(&self, event: &DiskEvent) {
        let observers = self.lock().clone();
        for observer in observers {
            observer.event(event);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<dyn Observer>>> {
        self.observers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events")
            .field("threshold", &self.threshold())
            .field("observers", &self.lock().len())
            .finish()
    }
}
