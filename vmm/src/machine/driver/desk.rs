//! The way to the control thread for a thread that works for one machine for long.

use std::sync::Weak;
use std::sync::mpsc::channel;

use super::Driver;
use super::aside::Held;
use crate::machine::inbox::{Mailbox, Message};

/// Asks the control thread of one machine. Never to be used by that thread itself.
#[derive(Clone)]
pub struct Desk {
    mailbox: Mailbox,
    here: Weak<Held>,
}

impl Desk {
    /// Of the machine `here`.
    pub(super) fn new(mailbox: Mailbox, here: Weak<Held>) -> Self {
        Self { mailbox, here }
    }

    /// Has the control thread do `work`, and waits for what comes of it; `None`: the machine has ended, and nothing is done.
    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Driver) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = channel();
        let here = Weak::clone(&self.here);
        let sent = self.mailbox.send(Message::Errand(Box::new(move |driver| {
            // The next machine may be there by now.
            if here.ptr_eq(&driver.asides.here()) {
                // Who has asked waits below.
                let _ = sender.send(work(driver));
            }
        })));
        if sent {
            receiver.recv().ok()
        } else {
            // It may have been done before the machine ended.
            receiver.try_recv().ok()
        }
    }
}

impl Driver {
    /// The way to this machine, for another thread.
    pub(super) fn desk(&self) -> Desk {
        Desk::new(self.tools.mailbox.clone(), self.asides.here())
    }
}
