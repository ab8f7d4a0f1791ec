//! Streams of a migration: rounds of pages go over 1 to 64 connections at the same time, and come out of them.
//!
//! # Contract
//!
//! * A chunk of 2 MiB always goes over the same stream, so that of two versions of a page the newer one comes later.
//! * A round ends on every stream with its number and the count of its pages. The receiver gathers the ends of all streams in a [`Barrier`]; the state is loaded only behind that of the last round.
//! * Threads are the caller's: it gets jobs and runs them ([`Crew`]). So is time ([`Clock`]).
//! * Nothing is sent faster than the [`Limiter`] says, and a round stops within a frame when it is told to.

mod barrier;
mod receive;
mod send;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::frame::FrameError;
use super::pages::{Counts, PagesError};
use super::precopy::Limiter;

pub use barrier::{Barrier, BarrierError};
pub use receive::{Incoming, StreamReceiver};
pub use send::{Sent, StreamSender, send_round};

/// Memory of the guest, from which pages are sent while it runs.
pub trait RamSource: Sync {
    /// The ranges of RAM as start and length in bytes, in ascending order.
    fn ranges(&self) -> Vec<(u64, u64)>;

    /// Reads `bytes` from `address`.
    ///
    /// # Errors
    ///
    /// Memory is gone.
    fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Marks those of the pages from `address` on that read as zeros without being looked at, because they have never been written or have been given
    /// back; and those that the guest does not want, for what it has said itself. None, where nobody knows.
    fn absent(&self, _address: u64, _pages: &mut [bool]) {}

    /// Writes the bytes from `address` on straight to a socket, and waits until it has taken them.
    ///
    /// # Errors
    ///
    /// Those of the socket, or `Unsupported`.
    fn send(&self, _address: u64, _len: u64, _socket: BorrowedFd<'_>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The time, and waiting.
pub trait Clock: Sync {
    /// Since any fixed instant.
    fn now(&self) -> Duration;

    /// Waits so long.
    fn sleep(&self, time: Duration);
}

/// What one thread does.
pub type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Runs jobs, at the same time or one after the other, and returns when all have ended. One may run on the calling thread.
pub type Crew<'a> = &'a dyn Fn(Vec<Job<'_>>);

/// A [`Crew`] of threads that live as long as the jobs.
pub fn scoped(jobs: Vec<Job<'_>>) {
    std::thread::scope(|scope| {
        let mut jobs = jobs.into_iter();
        let own = jobs.next();
        for job in jobs {
            scope.spawn(job);
        }
        own.into_iter().for_each(|job| job());
    });
}

/// A [`Crew`] of the calling thread alone, for rounds that are hardly worth the threads.
pub fn in_turn(jobs: Vec<Job<'_>>) {
    jobs.into_iter().for_each(|job| job());
}

/// What has been sent or received so far. Threads add to it, and anyone reads.
#[derive(Debug, Default)]
pub struct Progress {
    pages: AtomicU64,
    zeros: AtomicU64,
    deltas: AtomicU64,
    bytes: AtomicU64,
    rounds: AtomicU64,
    remaining: AtomicU64,
    rate: AtomicU64,
}

/// [`Progress`] at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Pages in all; one that went twice counts twice.
    pub pages: u64,
    /// Of those that were zeros.
    pub zeros: u64,
    /// Of those that went as differences.
    pub deltas: u64,
    /// Over the wire.
    pub bytes: u64,
    /// Rounds that have begun.
    pub rounds: u64,
    /// Pages that are left of the round.
    pub remaining: u64,
    /// Bytes a second, as was last told.
    pub rate: u64,
}

impl Progress {
    /// What there is now.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Figures {
            pages: of(&self.pages),
            zeros: of(&self.zeros),
            deltas: of(&self.deltas),
            bytes: of(&self.bytes),
            rounds: of(&self.rounds),
            remaining: of(&self.remaining),
            rate: of(&self.rate),
        }
    }

    /// Tells the rate, in bytes a second.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// A round of so many pages begins.
    pub fn begin_round(&self, pages: u64) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        self.remaining.store(pages, Ordering::Relaxed);
    }

    /// So many pages are left.
    pub fn set_remaining(&self, pages: u64) {
        self.remaining.store(pages, Ordering::Relaxed);
    }

    fn add(&self, counts: Counts) {
        self.pages.fetch_add(counts.pages, Ordering::Relaxed);
        self.zeros.fetch_add(counts.zeros, Ordering::Relaxed);
        self.deltas.fetch_add(counts.deltas, Ordering::Relaxed);
        let less = |left: u64| Some(left.saturating_sub(counts.pages));
        let order = Ordering::Relaxed;
        // It always has a value, so this always succeeds.
        let _ = self.remaining.fetch_update(order, order, less);
    }

    fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What a round needs beside memory and streams.
#[derive(Clone, Copy)]
pub struct Sending<'a> {
    /// The time.
    pub clock: &'a dyn Clock,
    /// No more than this; all streams share it.
    pub limiter: &'a Limiter,
    /// Counts.
    pub progress: &'a Progress,
    /// Set by anyone: the round ends with [`ChannelError::Stopped`].
    pub stop: &'a AtomicBool,
    /// Set by anyone: the round ends soon as if its pages had been fewer.
    pub cut: &'a AtomicBool,
}

impl fmt::Debug for Sending<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sending")
            .field("limiter", &self.limiter)
            .field("progress", &self.progress)
            .finish_non_exhaustive()
    }
}

/// Why a stream is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection, or what came over it.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Pages.
    #[error(transparent)]
    Pages(#[from] PagesError),
    /// Someone wanted it to end.
    #[error("it was stopped")]
    Stopped,
    /// The caller's threads did not do what they were given.
    #[error("stream {0} was not served")]
    Unserved(usize),
}

#[cfg(test)]
mod tests;
