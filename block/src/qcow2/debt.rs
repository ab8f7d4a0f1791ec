//! What an image owes for the one below it: that was covered while it had something in memory, and a guest's flush is to
//! make durable all that the guest had written before.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::image::Qcow2;
use crate::live::Live;

/// The image that is to be written out with this one.
#[derive(Debug, Default)]
pub(super) struct Debt {
    due: AtomicBool,
    below: OnceLock<Live>,
}

impl Debt {
    /// Whether something is owed.
    pub(super) fn is_due(&self) -> bool {
        self.due.load(Ordering::Acquire)
    }

    /// Pays, if something is owed. Nothing is written below meanwhile, so once is enough.
    pub(super) fn pay(&self) -> io::Result<()> {
        if self.is_due() {
            if let Some(below) = self.below.get() {
                below.flush()?;
            }
            self.due.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Has the flushes of this image, from the next one on, make `below` durable, which nobody writes to any more. Once.
    pub(crate) fn owe(&self, below: Live) {
        if self.debt.below.set(below).is_ok() {
            self.debt.due.store(true, Ordering::Release);
        }
    }
}
