//! Where streams wait for each other.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Why a round will not be whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// A stream has failed.
    #[error("{0}")]
    Failed(String),
    /// Time has run out.
    #[error("round {0} has not arrived on all streams in time")]
    TimedOut(u32),
}

#[derive(Debug, Default)]
struct Ends {
    /// The last round of each stream.
    rounds: Vec<u32>,
    failed: Option<String>,
}

/// The ends of rounds on all streams. Threads that receive tell of them, and one that has the state waits.
#[derive(Debug)]
pub struct Barrier {
    ends: Mutex<Ends>,
    changed: Condvar,
}

impl Barrier {
    /// For so many streams.
    #[must_use]
    pub fn new(streams: u16) -> Self {
        Self {
            ends: Mutex::new(Ends {
                rounds: vec![0; usize::from(streams)],
                failed: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// A round has ended on a stream. Says whether it has now ended on all: then it is to be acknowledged.
    pub fn arrive(&self, stream: u16, round: u32) -> bool {
        let mut ends = self.lock();
        let Some(last) = ends.rounds.get_mut(usize::from(stream)) else {
            return false;
        };
        let before = std::mem::replace(last, round);
        let whole = ends.rounds.iter().all(|last| *last >= round);
        drop(ends);
        self.changed.notify_all();
        whole && before < round
    }

    /// A stream has failed; nobody waits any longer. The first reason stays.
    pub fn fail(&self, reason: &str) {
        self.lock().failed.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Waits until `round` has ended on all streams.
    ///
    /// # Errors
    ///
    /// [`BarrierError`].
    pub fn wait(&self, round: u32, timeout: Duration) -> Result<(), BarrierError> {
        let open =
            |ends: &mut Ends| ends.failed.is_none() && ends.rounds.iter().any(|last| *last < round);
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, open);
        let (ends, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if ends.rounds.iter().all(|last| *last >= round) {
            return Ok(());
        }
        let failed = ends.failed.clone();
        Err(failed.map_or(BarrierError::TimedOut(round), BarrierError::Failed))
    }

    fn lock(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_whole_when_it_has_ended_on_all_streams() {
        let barrier = Barrier::new(2);
        assert!(!barrier.arrive(0, 1) && !barrier.arrive(0, 2));
        let late = barrier.wait(1, Duration::ZERO);
        assert_eq!(late, Err(BarrierError::TimedOut(1)));
        assert!(barrier.arrive(1, 1) && barrier.arrive(1, 2));
        assert!(!barrier.arrive(2, 3));
        assert_eq!(barrier.wait(2, Duration::ZERO), Ok(()));
    }

    #[test]
    fn who_waits_hears_of_a_stream_that_fails() {
        let barrier = Barrier::new(1);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| barrier.wait(1, Duration::MAX));
            barrier.fail("cut");
            barrier.fail("later");
            let failed = Err(BarrierError::Failed("cut".to_owned()));
            assert_eq!(waits.join().unwrap(), failed);
            assert_eq!(barrier.wait(1, Duration::MAX), failed);
        });
    }
}
