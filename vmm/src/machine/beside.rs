//! Work that touches files, done beside the control thread: the one way in which that opens, looks at and closes them.
//!
//! # Contract
//!
//! * Storage may never answer, and a system call that waits for it cannot be taken back. So no such call is made
//!   by the control thread, which hears signals and commands. A thread makes it ([`Opening::spawn`]); what came of it
//!   is brought to the control thread, where alone things change.
//! * A machine's driver goes on meanwhile, and takes the outcome as an errand. A monitor without a machine waits, and
//!   hears what ends the waiting ([`Pending`]).
//! * What nobody waits for any more is left to itself. It holds nothing of a machine but memory that it fills, and no lock, and what it
//!   opens after all it closes again.
//! * There are at most [`MAX_OPENING`] such threads, those included that were left to themselves.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use api::{ControlError, ErrorKind};

use super::inbox::Mailbox;
use crate::sandbox::{Builder, Kind};

/// How many threads may open files at once, those included that boots, requests and machines which have ended
/// left behind: what they wait for may never answer.
pub(crate) const MAX_OPENING: usize = 16;

/// How long it is waited until something has been closed or removed that is done with.
const CLOSING: Duration = Duration::from_secs(1);

/// Why work has not begun.
#[derive(Debug, thiserror::Error)]
pub enum BesideError {
    /// As many threads wait for storage as may.
    #[error(
        "{MAX_OPENING} files are being opened whose storage does not answer, those of boots and requests included that \
         were ended: have that storage answer again or unmount it by force; where neither is possible, end this \
         monitor (vmm.shutdown or SIGTERM) and start another"
    )]
    Full,
    /// The host refused.
    #[error("no thread to open files")]
    Thread(#[source] io::Error),
}

impl BesideError {
    /// The same for those who asked over the control interface.
    #[must_use]
    pub fn to_control(&self) -> ControlError {
        let kind = match self {
            Self::Full => ErrorKind::Busy,
            Self::Thread(_) => ErrorKind::Failed,
        };
        ControlError::from_error(kind, self)
    }
}

/// How many threads open files in this monitor. Clones count together.
#[derive(Clone, Default)]
pub struct Opening(Arc<AtomicUsize>);

impl Opening {
    /// Counts one more, unless there are [`MAX_OPENING`], until what it gives is dropped.
    ///
    /// # Errors
    ///
    /// [`BesideError::Full`].
    pub(crate) fn begin(&self) -> Result<Slot, BesideError> {
        let more = |count| (count < MAX_OPENING).then_some(count + 1);
        let begun = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        begun
            .map(|_| Slot(Arc::clone(&self.0)))
            .map_err(|_| BesideError::Full)
    }

    /// Has a thread do `work`, and then, when it no longer counts, `then`.
    ///
    /// # Errors
    ///
    /// [`BesideError`]; nothing happens at all then.
    pub(crate) fn spawn<T>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
        then: impl FnOnce(T) + Send + 'static,
    ) -> Result<(), BesideError> {
        let slot = self.begin()?;
        let run = move || {
            let done = work();
            drop(slot);
            then(done);
        };
        let started = Builder::new(Kind::Job).name(name.to_owned()).spawn(run);
        started.map(|_| ()).map_err(BesideError::Thread)
    }

    /// As [`Opening::spawn`], for one who waits and is roused through `mailbox`.
    ///
    /// # Errors
    ///
    /// [`BesideError`].
    pub(crate) fn start<T: Send + 'static>(
        &self,
        name: &str,
        mailbox: &Mailbox,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Pending<T>, BesideError> {
        let (sender, receiver) = channel();
        let bell = Bell::of(mailbox);
        let work = move || {
            // It rings last, also in a panic.
            let _bell = bell;
            let sender = sender;
            // Whoever has given up wants to know nothing.
            let _ = sender.send(work());
        };
        self.spawn(name, work, |()| ())?;
        Ok(Pending(receiver))
    }
}

/// A thread that opens files.
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Wakes the control thread when it is dropped.
pub(crate) struct Bell(Mailbox);

impl Bell {
    pub(crate) fn of(mailbox: &Mailbox) -> Self {
        Self(mailbox.clone())
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.rouse();
    }
}

/// What is being done.
pub(crate) struct Pending<T>(Receiver<T>);

impl<T> Pending<T> {
    /// What came of it, once that is known; an error when its thread has been lost. Not to be called again then.
    pub(crate) fn take(&self) -> Option<io::Result<T>> {
        match self.0.try_recv() {
            Ok(done) => Some(Ok(done)),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
}

impl<T: Send + 'static> Pending<T> {
    /// It is not wanted any more, nor is `thing`: both are closed beside, and waited for a moment.
    pub(crate) fn give_up(self, thing: impl Send + 'static) -> bool {
        let close = move || {
            // Whatever comes of it.
            drop(self.0.recv());
            drop(thing);
        };
        run_within("close", close, CLOSING)
    }
}

/// [`put_away_within`] a moment.
pub(crate) fn put_away(thing: impl Send + 'static) -> bool {
    put_away_within(thing, CLOSING)
}

/// Has a thread drop `thing`, whose files may take their storage long to close or remove, and waits for `time` at most:
/// who hears of the end finds it closed, where storage answers. Whether it is.
pub(crate) fn put_away_within(thing: impl Send + 'static, time: Duration) -> bool {
    run_within("close", move || drop(thing), time)
}

fn run_within(name: &str, work: impl FnOnce() + Send + 'static, time: Duration) -> bool {
    let (alive, gone) = channel::<()>();
    let run = move || {
        work();
        drop(alive);
    };
    // Without a thread what `work` has is dropped here, with the closure.
    let started = Builder::new(Kind::Job).name(name.to_owned()).spawn(run);
    started.is_err() || gone.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::inbox::inbox;

    #[test]
    fn so_many_open_files_at_once_and_no_more() {
        let opening = Opening::default();
        let mut slots: Vec<Slot> = (0..MAX_OPENING)
            .map(|_| opening.clone().begin().unwrap())
            .collect();
        let full = opening.begin().err().unwrap();
        assert_eq!(full.to_control().kind, ErrorKind::Busy);
        slots.pop();
        assert!(opening.begin().is_ok());
        assert_eq!(opening.0.load(Ordering::Relaxed), MAX_OPENING - 1);
    }

    #[test]
    fn what_is_done_beside_is_waited_for_and_counts_until_it_is_done() {
        let opening = Opening::default();
        let (mailbox, _inbox) = inbox().unwrap();
        let (answer, storage) = channel::<u8>();
        let (told, over) = channel();
        let pending = opening
            .start("open", &mailbox, move || storage.recv().unwrap())
            .unwrap();
        opening
            .spawn("open", || (), move |()| told.send(()).unwrap())
            .unwrap();
        over.recv().unwrap();
        assert!(pending.take().is_none());
        assert_eq!(opening.0.load(Ordering::Relaxed), 1);
        answer.send(7).unwrap();
        let done = pending.0.recv().unwrap();
        assert_eq!(done, 7);
    }

    #[test]
    fn work_whose_thread_is_lost_is_an_error() {
        let (mailbox, _inbox) = inbox().unwrap();
        let (answer, storage) = channel::<u8>();
        let pending = Opening::default()
            .start("open", &mailbox, move || storage.recv().unwrap())
            .unwrap();
        drop(answer);
        assert!(pending.0.recv().is_err());
        assert!(pending.take().unwrap().is_err());
    }

    #[test]
    fn what_never_closes_is_left_to_itself() {
        struct Hangs(Receiver<()>);
        impl Drop for Hangs {
            fn drop(&mut self) {
                let _ = self.0.recv();
            }
        }
        let (answer, storage) = channel();
        assert!(!put_away(Hangs(storage)));
        drop(answer);
        assert!(put_away(()));
    }
}
