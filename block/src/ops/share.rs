//! Work that several threads share out among themselves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::OpError;

/// Lets workers do a part of their work one after the other, in the order in which they got it.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// Whose turn it is; `None` once a worker has failed.
    next: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            next: Mutex::new(Some(0)),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<u64>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all pieces of work before this one have had their turn; `false` when that will never be.
    pub(super) fn wait(&self, number: u64) -> bool {
        let mut next = self.lock();
        loop {
            match *next {
                None => return false,
                Some(now) if now >= number => return true,
                Some(_) => {
                    next = self
                        .changed
                        .wait(next)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Ends the turn of a piece of work.
    pub(super) fn done(&self, number: u64) {
        let mut next = self.lock();
        if let Some(now) = &mut *next {
            *now = number + 1;
        }
        self.changed.notify_all();
    }

    /// No turn comes any more.
    fn fail(&self) {
        *self.lock() = None;
        self.changed.notify_all();
    }
}

/// Hands out pieces of work, numbered from 0, to `threads` threads, until there are no more or one fails. `next` is
/// called by one thread at a time; when it is, all pieces before have been handed out.
///
/// # Errors
///
/// The first error of `next` or `work`.
pub(super) fn share<T>(
    threads: usize,
    turns: &Turns,
    next: impl FnMut() -> Result<Option<T>, OpError> + Send,
    work: impl Fn(u64, T) -> Result<(), OpError> + Sync,
) -> Result<(), OpError> {
    let source = Mutex::new((0_u64, next));
    let failed = AtomicBool::new(false);
    let first: Mutex<Option<OpError>> = Mutex::new(None);
    let fail = |error| {
        failed.store(true, Ordering::Release);
        turns.fail();
        let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
    };
    let worker = || {
        while !failed.load(Ordering::Acquire) {
            let piece = {
                let mut source = source.lock().unwrap_or_else(PoisonError::into_inner);
                let (number, next) = &mut *source;
                next().map(|piece| {
                    *number += 1;
                    piece.map(|piece| (*number - 1, piece))
                })
            };
            match piece {
                Ok(Some((number, piece))) => {
                    if let Err(error) = work(number, piece) {
                        fail(error);
                    }
                }
                Ok(None) => return,
                Err(error) => fail(error),
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            // With fewer threads it only takes longer.
            if std::thread::Builder::new()
                .name("image".to_owned())
                .spawn_scoped(scope, worker)
                .is_err()
            {
                break;
            }
        }
        worker();
    });
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_work_is_done_once_and_turns_come_in_order() {
        let turns = Turns::new();
        let order = Mutex::new(Vec::new());
        let mut left = 0..500_u64;
        share(
            4,
            &turns,
            || Ok(left.next()),
            |number, piece| {
                assert_eq!(number, piece);
                assert!(turns.wait(number));
                order.lock().unwrap().push(piece);
                turns.done(number);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(order.into_inner().unwrap(), (0..500).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_ends_it_and_nobody_waits_for_ever() {
        let turns = Turns::new();
        let mut left = 0..500_u64;
        let result = share(
            4,
            &turns,
            || Ok(left.next()),
            |number, _| {
                if number == 7 {
                    return Err(OpError::Cancelled);
                }
                if turns.wait(number) {
                    turns.done(number);
                }
                Ok(())
            },
        );
        assert!(matches!(result, Err(OpError::Cancelled)));
    }
}
