//! What other threads leave for the server's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
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
    /// How many commands are under way, those of clients that have gone included.
    commands: AtomicUsize,
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
            commands: AtomicUsize::new(0),
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

    /// Takes what has come and silences the bell. Returns also whether the server is
    /// to end; what was there before it was told so is then among what has come.
    pub fn take(&self) -> (Vec<Completion>, bool) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
        // What comes from here on rings again, and what came before is seen: the
        // swap has read what the last one to ring has written.
        self.rung.swap(false, Ordering::AcqRel);
        let stopped = self.stopped.load(Ordering::Acquire);
        let mut completions = self
            .completions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut *completions), stopped)
    }

    fn post(&self, completion: Completion) {
        self.completions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(completion);
        self.ring();
    }

    /// How many commands have been submitted and not answered.
    pub fn commands(&self) -> usize {
        self.commands.load(Ordering::Relaxed)
    }

    /// What a command calls when it is done. One that is dropped instead answers
    /// that the monitor has ended.
    pub fn answer(self: &Arc<Self>, key: u64) -> Answer {
        self.commands.fetch_add(1, Ordering::Relaxed);
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
        self.mailbox.commands.fetch_sub(1, Ordering::Relaxed);
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
