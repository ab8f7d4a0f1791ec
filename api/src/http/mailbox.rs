//! What other threads leave for the server's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::{Answer, ControlError, ErrorKind, Reply};

/// What became of a command.
pub(super) struct Completion {
    /// The connection that sent it.
    pub key: u64,
    /// What it answers.
    pub result: Result<Reply, ControlError>,
}

/// A place for completions, and a descriptor that is readable when there is something.
#[derive(Debug)]
pub(super) struct Mailbox {
    bell: OwnedFd,
    /// The bell has been rung and not been heard: ringing again would cost a system call.
    rung: AtomicBool,
    stopped: AtomicBool,
    completions: Mutex<Vec<Completion>>,
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Completion({})", self.key)
    }
}

impl Mailbox {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            rung: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            completions: Mutex::default(),
        })
    }

    /// Readable when [`Self::take`] is due.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Wakes the server. Never blocks.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            // It fails when it has been rung 2^64 times; then it is readable already.
            let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        }
    }

    /// Has the server end.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.ring();
    }

    /// Whether the server is to end. Asked before [`Self::take`], so that
    /// nothing that was there before is left behind.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Takes what has come and silences the bell.
    pub fn take(&self) -> Vec<Completion> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        // What comes from here on rings again.
        self.rung.store(false, Ordering::Release);
        std::mem::take(
            &mut *self
                .completions
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    fn post(&self, completion: Completion) {
        self.completions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(completion);
        self.ring();
    }

    /// What a command calls when it is done. One that is dropped instead answers
    /// that the monitor has ended.
    pub fn answer(self: &Arc<Self>, key: u64) -> Answer {
        let mut ticket = Ticket {
            mailbox: Arc::clone(self),
            key,
            given: false,
        };
        Box::new(move |result| ticket.give(result))
    }
}

struct Ticket {
    mailbox: Arc<Mailbox>,
    key: u64,
    given: bool,
}

impl Ticket {
    fn give(&mut self, result: Result<Reply, ControlError>) {
        self.given = true;
        let key = self.key;
        self.mailbox.post(Completion { key, result });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.given {
            let error = ControlError::new(ErrorKind::Failed, "The monitor has ended");
            self.give(Err(error));
        }
    }
}
